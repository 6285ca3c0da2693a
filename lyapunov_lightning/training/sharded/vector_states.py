"""The states of callbacks in a checkpoint: read as far as they are whole, with the vectors of the model's size in them.

In a checkpoint each vector is whole, so that a run can be resumed on another number of ranks. In a running training of
a sharded model each rank holds its part of every vector, which no other rank can use.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.training.fsdp import put_away, space_of_parameters
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.telling import described

VECTORS = frozenset({"perturbation", "perturbations", "rows", "start", "vector", "vectors", "velocity"})
"""The names under which a state keeps vectors of the model's size: one, one in each row, or dictionaries of these."""


VERSION = 1
"""Of the states that are written. A state without one is of an earlier time, and is read too."""


class Stateful(Protocol):
    """A part of a callback that continues where it was in a resumed run.

    Its state keeps vectors of the model's size under the names `VECTORS` only, where they are found and gathered for
    the checkpoint of a sharded model. Under another name the checkpoint would have the part of one rank.
    """

    def state_dict(self) -> dict[str, Any]:
        """What is kept: tensors, numbers, strings, None, and lists and dictionaries of these."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned."""


def restore(parts: Mapping[str, Stateful], state: Any) -> list[str]:
    """Let parts continue from a state, each of them as far as its own is whole.

    Args:
        parts: The parts, by their names in the state.
        state: What a checkpoint holds. It may be of another version of this package, or broken.

    Returns:
        What is wrong with it, a clause for each fault.

    """
    if not isinstance(state, dict):
        return [f"it is a {type(state).__name__} and no dictionary"]
    wrong: list[str] = []
    version = state.get("version", 0)
    if not isinstance(version, int) or version > VERSION:
        wrong.append(f"it is of version {version!r}, where this package knows those up to {VERSION}")
    for name, part in parts.items():
        if name not in state:  # an earlier version lacks what it did not measure
            continue
        # A start that is not finite would let every measurement fail that begins there.
        kept = _mapped(state[name], lambda vector: vector if bool(vector.isfinite().all()) else None)
        if kept is not state[name]:
            wrong.append(f"`{name}` has vectors that are not finite")
        before = part.state_dict()
        try:
            _check_alike(before, kept)
            part.load_state_dict(kept)
        except Exception as error:
            part.load_state_dict(before)
            wrong.append(f"`{name}` cannot be read, {described(error)}")
    return wrong


def _check_alike(fresh: Any, kept: Any, name: str = "it", is_vector: bool = False) -> None:
    """Make sure that what was kept is of the kinds that a part keeps.

    Raises:
        ValueError: Naming what is not.

    """
    if is_vector and isinstance(kept, Tensor):
        fits = kept.ndim in (1, 2) and kept.is_floating_point()
    elif is_vector and not isinstance(kept, dict):
        fits = kept is None
    elif isinstance(kept, dict) or isinstance(fresh, dict):
        fits = isinstance(kept, dict) and isinstance(fresh, dict | None)
        for key, entry in kept.items() if fits else ():
            _check_alike((fresh or {}).get(key), entry, str(key), is_vector or key in VECTORS)
    else:
        # What is None in a part that has seen nothing may be of any kind: there the part itself has to look.
        kinds = (int, float) if type(fresh) is float else (type(fresh),)
        fits = fresh is None or type(kept) in kinds
    if not fits:
        raise ValueError(f"{name} should not be a {type(kept).__name__}")


def fitting_space(
    pl_module: nn.Module, ranks: Ranks, before: VectorSpace | None, parts: Iterable[Stateful]
) -> VectorSpace:
    """The space of the vectors that the trainable parameters form now; all ranks have to ask together.

    Args:
        pl_module: The module.
        ranks: All ranks.
        before: The space that the parts' vectors belong to.
        parts: Parts of a callback. Where the parameters of a sharded model were frozen or unfrozen since, they lose
            all their vectors: a rank sees the length of its own part alone, which may be what it was, and with vectors
            kept on some ranks and dropped on others the ranks would wait for each other forever.

    """
    if before is not None and not isinstance(before, ShardedSpace):
        return before  # every rank has whole vectors, so the parts themselves see whether their vectors still fit
    # After validation the outermost module may still have its parameters gathered, and a space of these would be one of
    # whole vectors.
    put_away(pl_module)
    space = space_of_parameters(list(trainable_parameters(pl_module).values()), ranks)
    if isinstance(before, ShardedSpace) and not space.is_like(before):
        _convert(parts, without_vectors)
    return space


def cut_states(parts: Iterable[Stateful], space: VectorSpace | None) -> None:
    """Let parts that were restored from a checkpoint continue with this rank's parts of the whole vectors in it."""
    if isinstance(space, ShardedSpace):
        _convert(parts, partial(converted_vectors, length=space.size, convert=partial(cut_vectors, space)))


def gathered_state(state: dict[str, Any], space: VectorSpace | None) -> dict[str, Any]:
    """A state as it belongs into a checkpoint, with whole vectors; all ranks have to ask together."""
    if not isinstance(space, ShardedSpace):
        return state
    found: dict[str, Any] = converted_vectors(state, space.length, partial(gathered_vectors, space))
    return found


def converted_vectors(state: Any, length: int, convert: Callable[[Tensor], Tensor]) -> Any:
    """A state with other vectors in it; the state itself if there are none.

    Vectors of another length, such as those of a block of the parameters, are left out: whether vectors fit has to be
    decided alike on all ranks, and each rank of a sharded model sees only the length of its own part.

    Args:
        state: The state, or a part of it.
        length: The length of the vectors that are meant.
        convert: Maps the vectors, one in each row of a tensor, to those that take their place.

    """

    def fitting(vectors: Tensor) -> Tensor | None:
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != length:
            return None
        return convert(vectors.reshape(-1, length)).reshape(*vectors.shape[:-1], -1)

    return _mapped(state, fitting)


def _mapped(state: Any, change: Callable[[Tensor], Tensor | None], is_vector: bool = False) -> Any:
    """A state with something else in place of its vectors; the state itself if nothing changed."""
    if isinstance(state, dict):
        found = {name: _mapped(entry, change, is_vector or name in VECTORS) for name, entry in state.items()}
        # The same object where nothing changed: `_convert` then leaves the part alone.
        return found if any(found[name] is not entry for name, entry in state.items()) else state
    return change(state) if is_vector and isinstance(state, Tensor) else state


def without_vectors(state: Any) -> Any:
    """A state from which all vectors are removed."""
    return converted_vectors(state, -1, lambda rows: rows)


def gathered_vectors(space: ShardedSpace, rows: Tensor) -> Tensor:
    """The whole vectors, on the CPU of the first rank, which writes the checkpoint; the other ranks get none.

    All ranks have to ask together.
    """
    # All ranks take part in gathering, and one keeps the result: k vectors of the whole model on each of eight ranks of
    # a machine would be eight times the checkpoint in its memory.
    keeps = dist.get_rank() == 0
    whole = torch.empty(len(rows), space.size if keeps else 0, dtype=rows.dtype, device="cpu")
    for out, row in zip(whole, rows, strict=True):
        # One vector at a time: a device that cannot hold the whole model can hold few of its vectors.
        found = space.whole(row.to(space.device, space.dtype))
        if keeps:
            out.copy_(found)
    return whole


def cut_vectors(space: ShardedSpace, rows: Tensor) -> Tensor:
    """This rank's parts of whole vectors."""
    return torch.stack([space.cut(row) for row in rows]) if len(rows) else rows.new_empty(0, space.length)


def _convert(parts: Iterable[Stateful], converted: Callable[[Any], Any]) -> None:
    """Replace the vectors in the states of parts."""
    for part in parts:
        state = part.state_dict()
        own = converted(state)
        if own is not state:  # loading a state has effects of its own, such as marking a part as restored
            part.load_state_dict(own)
