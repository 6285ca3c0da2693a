"""All that keeps state from one measurement to the next: warm starts, running estimates, frozen directions.

States are plain values that a checkpoint can hold. A search that starts anew every time is in `curvature.solvers`.
"""

from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker

__all__ = ["ExtremeTracker"]
