"""Vectors of the model's size in the states of callbacks: whole in a checkpoint, in parts where a model is sharded."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace

VECTORS = frozenset({"perturbation", "perturbations", "rows", "start", "vector", "vectors", "velocity"})
"""The names under which a state has vectors of the model's size, one for each row, or dictionaries of these."""


def converted_vectors(state: Any, length: int, convert: Callable[[Tensor], Tensor], is_vector: bool = False) -> Any:
    """A state with other vectors in it; the state itself if there are none.

    Vectors of another length, such as those of a block of the parameters, are left out: whether vectors fit has to be
    decided alike on all ranks, and of a sharded one each rank sees its own length.

    Args:
        state: The state, or a part of it.
        length: The length of the vectors that are meant.
        convert: Makes of the vectors, one for each row of a tensor, those that take their place.
        is_vector: Whether it stands under one of the names `VECTORS`.

    """
    if isinstance(state, dict):
        found = {
            name: converted_vectors(entry, length, convert, is_vector or name in VECTORS)
            for name, entry in state.items()
        }
        return found if any(found[name] is not entry for name, entry in state.items()) else state
    if not is_vector or not isinstance(state, Tensor):
        return state
    if state.ndim not in (1, 2) or state.shape[-1] != length:
        return None
    return convert(state.reshape(-1, length)).reshape(*state.shape[:-1], -1)


def without_vectors(state: Any) -> Any:
    """A state of which no vector is left."""
    return converted_vectors(state, -1, lambda rows: rows)


def gathered_vectors(space: ShardedSpace, rows: Tensor) -> Tensor:
    """The whole vectors, on the CPU of the first rank, which writes the checkpoint; the others have none.

    All ranks have to ask together.
    """
    keeps = dist.get_rank() == 0
    whole = torch.empty(len(rows), space.size if keeps else 0, dtype=rows.dtype, device="cpu")
    for out, row in zip(whole, rows, strict=True):
        found = space.whole(row.to(space.device, space.dtype))
        if keeps:
            out.copy_(found)
    return whole


def cut_vectors(space: ShardedSpace, rows: Tensor) -> Tensor:
    """This rank's parts of whole vectors."""
    return torch.stack([space.cut(row) for row in rows]) if len(rows) else rows.new_empty(0, space.length)
