"""How a measurement is reported: to loggers, tables, progress bars and the console.

Nothing here measures, or decides what to measure. Nothing that goes wrong while reporting ends a run.
"""
