"""How to act on curvature: step lengths, pace, projections, descent, and the watch over the loss.

These are rules of plain numbers and vectors. The optimizer and the Trainer on which they are carried out are in
`training.optimizers`.
"""
