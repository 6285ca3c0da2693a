"""What is told of a measurement, and to whom: loggers, tables, progress bars, the guard round it all.

Nothing here measures or decides what to measure. Whatever goes wrong while reporting ends no run.
"""
