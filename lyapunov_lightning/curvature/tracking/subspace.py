"""How far a subspace has turned since an earlier measurement."""

from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.directions.alignment import subspace_overlap
from lyapunov_lightning.curvature.vectors.space import VectorSpace


class KeptSubspace:
    """The span of the vectors of an earlier measurement, to compare with that of the present one.

    The vectors are kept in bfloat16, which is exact enough for an overlap and takes half the memory of float32.

    Args:
        moves_on: Whether each measurement replaces the last one; else the first one is kept.

    """

    def __init__(self, *, moves_on: bool = True) -> None:
        self._moves_on = moves_on
        self._vectors: Tensor | None = None

    def compare(self, vectors: Tensor, space: VectorSpace | None = None) -> float | None:
        """Compare the span of orthonormal vectors with the kept one, and keep the new one if `moves_on`.

        Args:
            vectors: Shape ``(k, n)``: one vector for each row.
            space: Their space, see `subspace_overlap`.

        Returns:
            The overlap, as `subspace_overlap`; None if there are no vectors, if none were kept, or if those kept are of
            another length, since parameters were frozen or unfrozen; they are replaced then.

        """
        if not len(vectors):
            return None
        kept = self._vectors
        overlap = None
        if kept is not None and kept.shape[1] == vectors.shape[1]:
            overlap = subspace_overlap(kept, vectors, space)
        # Rounded after the comparison: the three digits of bfloat16 are the error of one of the two spans only.
        if self._moves_on or overlap is None:
            self._vectors = vectors.to(torch.bfloat16)
        return overlap

    def state_dict(self) -> dict[str, Any]:
        """The vectors, on the CPU."""
        return {"vectors": None if self._vectors is None else self._vectors.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._vectors = state["vectors"]
