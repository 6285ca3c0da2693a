"""A generator of LightningModules with their data, optimizers and trainers, and the check that nothing shows.

`case_of` puts together what a seed says, from ingredients that are named pieces of a user's code; `check` trains it
without and with the reading callbacks, compares everything that can be reached bit by bit, and compares eigenvalues
with the dense Hessian of the step's own loss.
"""
