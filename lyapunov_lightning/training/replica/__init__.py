"""The training loss, evaluated on a twin of the module, so that nothing of the run changes.

What is copied and how, which globals and class attributes are replaced meanwhile, and what the step sees of the Trainer
stand here. Nothing here knows which callback asks, or for which number.
"""
