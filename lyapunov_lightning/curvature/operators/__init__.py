"""The Hessian and its kin as linear operators, and nothing else.

An operator multiplies; how a loss is differentiated is in `curvature.loss`, what is found with products in
`curvature.solvers`.
"""
