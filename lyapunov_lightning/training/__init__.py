"""The bridge: turns a LightningModule in a Trainer into a curvature problem, and its results into logs."""
