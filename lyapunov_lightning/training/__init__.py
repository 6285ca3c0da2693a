"""The bridge: turns a LightningModule in a Trainer into a curvature problem, and its results into logs.

What every callback does alike is here, from when to measure to how a run resumes. What a callback measures and how it
acts is in `callbacks`, the mathematics in `curvature`.
"""
