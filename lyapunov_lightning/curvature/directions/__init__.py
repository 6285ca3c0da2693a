"""The loss along lines: line scans and searches, the critical sharpness, and how directions lie to one another.

Functions of a loss or of vectors; nothing is kept from measurement to measurement.
"""
