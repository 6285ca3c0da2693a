"""How to act on curvature: step lengths, pace, projections, descent, and the watch over the loss.

Here are formulas and decisions over plain numbers and vectors, with the state that they keep. Nothing here knows an
optimizer or a Trainer: what carries the decisions out is in `training.optimizers`.
"""
