"""The ends of a spectrum that changes slowly, each measurement starting from where the last one ended."""

from typing import Any, Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import lanczos
from lyapunov_lightning.curvature.solvers.power import power_iteration

Solver = Literal["lanczos", "power"]
End = Literal["largest", "smallest", "both"]


class ExtremeTracker:
    """The outermost eigenvalue of one or both ends, followed through a training.

    Args:
        solver: ``"lanczos"`` or ``"power"``.
        end: Which end of the spectrum.
        tol: Relative accuracy of the eigenvalues; for ``"power"`` relative tolerance of the residuals.
        seed: Seed of the random parts of the vectors that the searches start from.

    """

    def __init__(self, solver: Solver = "lanczos", end: End = "largest", tol: float = 2e-2, seed: int = 0) -> None:
        self._solver = solver
        self._end = end
        self._tol = tol
        self._seed = seed
        self._start: Tensor | None = None
        self._count = 0

    def measure(self, operator: LinearOperator) -> Eigenpairs:
        """The eigenpairs of the operator as it is now; the largest one first where both ends are asked for."""
        start = self._start
        if start is not None and start.shape[-1] != space_of(operator).length:
            start = None  # parameters were frozen or unfrozen since
        # Another seed each time: what one search overlooked, the next one is to see. A start that is an exact
        # eigenvector of another eigenvalue has a residual of 0 and would be believed, if nothing random were added.
        seed = self._seed + self._count
        if self._solver == "lanczos":
            pairs = self._lanczos(operator, start, seed)
            self._start = pairs.start
        else:
            pairs = self._power(operator, start, seed)
            self._start = pairs.vectors
        self._count += 1
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """Where the next search starts, on the CPU."""
        return {"start": None if self._start is None else self._start.cpu(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self._start, self._count = state["start"], int(state["count"])

    def _lanczos(self, operator: LinearOperator, start: Tensor | None, seed: int) -> Eigenpairs:
        largest = int(self._end != "smallest")
        smallest = int(self._end != "largest")
        if largest + smallest > operator.size:
            raise ValueError("An operator of size 1 has one eigenvalue: ask for the largest or the smallest, not both.")
        return lanczos(operator, largest=largest, smallest=smallest, value_tol=self._tol, start=start, seed=seed)

    def _power(self, operator: LinearOperator, start: Tensor | None, seed: int) -> Eigenpairs:
        found: list[Eigenpairs] = []
        if self._end != "smallest":
            first = None if start is None else start[0]
            found.append(power_iteration(operator, end="largest", tol=self._tol, start=first, seed=seed))
        if self._end != "largest":
            last = None if start is None else start[-1]
            found.append(power_iteration(operator, end="smallest", tol=self._tol, start=last, seed=seed))
        return Eigenpairs(
            values=torch.cat([pairs.values for pairs in found]),
            vectors=torch.cat([pairs.vectors for pairs in found]),
            residuals=torch.cat([pairs.residuals for pairs in found]),
            value_errors=torch.cat([pairs.value_errors for pairs in found]),
            missed_probability=torch.cat([pairs.missed_probability for pairs in found]),
            converged=torch.cat([pairs.converged for pairs in found]),
            num_matvecs=sum(pairs.num_matvecs for pairs in found),
            num_largest=sum(pairs.num_largest for pairs in found),
            # One vector, as `Eigenpairs.start` is, for whoever searches both ends at once. Here the rows of `vectors`
            # are what the next search starts from.
            start=torch.stack([pairs.start for pairs in found]).sum(dim=0),
        )
