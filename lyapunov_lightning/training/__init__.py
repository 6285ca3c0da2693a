"""The bridge: turns a LightningModule in a Trainer into a curvature problem, and its results into logs.

What every callback needs of a run is here: when to measure, on which data, on which copy of the module, and where the
results go. All that is known of Lightning, of optimizers and of FSDP is in this room and in those below it. No formula
of a measurement is here, and no decision on what to measure or how to act on it.
"""
