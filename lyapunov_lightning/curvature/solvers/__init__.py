"""Eigen-solvers and Lyapunov iterations: what can be learnt from products with a symmetric operator.

A solver takes a linear operator and returns a frozen result; it keeps nothing from call to call and knows no loss.
"""
