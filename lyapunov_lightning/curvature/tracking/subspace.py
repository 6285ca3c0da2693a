"""A subspace that is kept, and how far the next one has turned from it."""

from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.directions.alignment import subspace_overlap
from lyapunov_lightning.curvature.vectors.space import VectorSpace


class KeptSubspace:
    """The span of the vectors of an earlier measurement, with which those of the present one are compared.

    It is kept in bfloat16, which is exact enough for an overlap and no burden on memory and checkpoint.

    Args:
        moves_on: Whether each measurement takes the place of the last one; else the first one stays.

    """

    def __init__(self, *, moves_on: bool = True) -> None:
        self._moves_on = moves_on
        self._vectors: Tensor | None = None

    def compare(self, vectors: Tensor, space: VectorSpace | None = None) -> float | None:
        """Compare the span of orthonormal vectors with the one kept, and keep it if it is its turn.

        Args:
            vectors: Shape ``(k, n)``: one vector for each row.
            space: Their space, see `subspace_overlap`.

        Returns:
            The overlap, as `subspace_overlap`; None if there are no vectors, nothing was kept, or what was kept belongs
            to another number of parameters and has so been replaced.

        """
        if not len(vectors):
            return None
        kept = self._vectors
        overlap = None
        if kept is not None and kept.shape[1] == vectors.shape[1]:
            overlap = subspace_overlap(kept, vectors, space)
        if self._moves_on or overlap is None:
            self._vectors = vectors.to(torch.bfloat16)
        return overlap

    def state_dict(self) -> dict[str, Any]:
        """The vectors, on the CPU."""
        return {"vectors": None if self._vectors is None else self._vectors.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._vectors = state["vectors"]
