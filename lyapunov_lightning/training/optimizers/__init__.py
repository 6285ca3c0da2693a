"""The user's optimizer: what is demanded of it, its update, its learning rates, and going back.

Whatever handles an optimizer's groups and state is here. Rules that find a learning rate from numbers are in
`curvature.acting`.
"""
