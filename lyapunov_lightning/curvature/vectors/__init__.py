"""How vectors of parameters are laid out and combined, on one process or on many ranks that have to fail together.

Nothing here knows a loss: tensors in, tensors and numbers out.
"""
