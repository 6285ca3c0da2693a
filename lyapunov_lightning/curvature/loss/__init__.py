"""The mean loss over fixed batches: its value, gradient, products, randomness and kept graphs.

Here a loss is differentiated. That the products form a linear operator is the business of `curvature.operators`.
"""
