"""Everything that keeps a state from one measurement to the next: warm starts, running estimates, frozen directions.

States are plain values that a checkpoint can hold. Searches that start anew every time are in `curvature.solvers`.
"""

from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker

__all__ = ["ExtremeTracker"]
