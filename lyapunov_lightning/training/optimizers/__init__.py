"""The user's optimizer: what is required of it, its update, its learning rates, and copies to go back to.

Whatever reads or changes an optimizer's groups and state, or parameters in its place, is here. How a learning rate is
found is not: formulas over plain numbers are in `curvature.acting`, and the rules that use them in `callbacks.rules`.
"""
