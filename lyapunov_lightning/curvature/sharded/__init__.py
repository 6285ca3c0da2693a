"""Vectors in parts, one on each rank, and three ways to the Hessian-vector products of a sharded model.

The solvers see the same spaces and operators as elsewhere. How FSDP2 shards a module is known to `training` only.
"""
