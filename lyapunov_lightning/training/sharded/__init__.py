"""Models that FSDP2 has sharded over the ranks: which way to a product is taken, and how it is evaluated on replicas.

The arithmetic of vectors in parts is in `curvature.sharded`. FSDP's private names are in `training.fsdp` only.
"""
