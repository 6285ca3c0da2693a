"""On which batches a measurement is made: the step's own, or fixed ones as the dataloader gives them.

Reading data here leaves the training's order of data, its workers and its random numbers as they are. What is computed
on the batches is not here.
"""
