"""The figures and tables of the three papers, run again, each with a verdict: ``python -m examples.papers --list``."""
