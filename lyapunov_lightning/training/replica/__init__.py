"""The training loss, evaluated on a twin of the module, so that nothing of the run changes.

What is copied and how, which global variables and class attributes hold copies meanwhile, and what the step sees of the
Trainer stand here. Nothing here knows which callback asks, or for which number.

Upwards: `memo` (which copy stands for which original), `walk` (from object to object), `tensors` and `handlers` (ways
to copy what is neither a container nor known by its attributes), `rules` (what is copied how, and why: where to look
first when a module leaks), `copier` (these together, and the policy), `namespaces` (state that is reached by name),
`trainer_view`, `replica` (the twin), `objective` (the loss on it).
"""
