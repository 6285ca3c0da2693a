"""Models that FSDP2 has sharded over the ranks, in a replica: which way to a product is taken, and how.

The arithmetic of vectors in parts is in `curvature.sharded`. FSDP's own private names are in `training.fsdp` alone.
"""
