"""Extreme eigenpairs of an operator that changes slowly, each measurement starting from the last one's vectors."""

from typing import Any, Literal, Optional

import torch
from torch import Tensor

from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.lanczos import lanczos
from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.power import power_iteration

Solver = Literal["lanczos", "power"]
End = Literal["largest", "smallest", "both"]


class ExtremeTracker:
    """The outermost eigenvalue of one or both ends, followed through a training.

    Args:
        solver: ``"lanczos"`` or ``"power"``.
        end: Which end of the spectrum.
        tol: Relative tolerance of the residuals.
        seed: Seed of the first vector.

    """

    def __init__(self, solver: Solver = "lanczos", end: End = "largest", tol: float = 1e-2, seed: int = 0) -> None:
        self._solver = solver
        self._end = end
        self._tol = tol
        self._seed = seed
        self._vectors: Optional[Tensor] = None

    def measure(self, operator: LinearOperator) -> Eigenpairs:
        """The eigenpairs of the operator as it is now; the largest one first where both ends are asked for."""
        start = self._vectors
        if start is not None and start.shape[1] != operator.size:
            start = None  # parameters were frozen or unfrozen since
        pairs = self._lanczos(operator, start) if self._solver == "lanczos" else self._power(operator, start)
        self._vectors = pairs.vectors
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """The vectors, on the CPU."""
        return {"vectors": None if self._vectors is None else self._vectors.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._vectors = state["vectors"]

    def _lanczos(self, operator: LinearOperator, start: Optional[Tensor]) -> Eigenpairs:
        largest = int(self._end != "smallest")
        smallest = int(self._end != "largest")
        if largest + smallest > operator.size:
            raise ValueError("An operator of size 1 has one eigenvalue: ask for the largest or the smallest, not both.")
        return lanczos(operator, largest=largest, smallest=smallest, tol=self._tol, start=start, seed=self._seed)

    def _power(self, operator: LinearOperator, start: Optional[Tensor]) -> Eigenpairs:
        found: list[Eigenpairs] = []
        if self._end != "smallest":
            first = None if start is None else start[0]
            found.append(power_iteration(operator, end="largest", tol=self._tol, start=first, seed=self._seed))
        if self._end != "largest":
            last = None if start is None else start[-1]
            found.append(power_iteration(operator, end="smallest", tol=self._tol, start=last, seed=self._seed))
        return Eigenpairs(
            values=torch.cat([pairs.values for pairs in found]),
            vectors=torch.cat([pairs.vectors for pairs in found]),
            residuals=torch.cat([pairs.residuals for pairs in found]),
            converged=torch.cat([pairs.converged for pairs in found]),
            num_matvecs=sum(pairs.num_matvecs for pairs in found),
            num_largest=sum(pairs.num_largest for pairs in found),
        )
