"""Estimates from random vectors: trace, norms and the density of the spectrum, each with its standard error.

Functions of an operator; nothing is kept from call to call.
"""
