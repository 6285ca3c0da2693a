"""The result of a measurement of `NudgedSGDHook`."""

from dataclasses import dataclass

from typing_extensions import override

from lyapunov_lightning.training.results import Result, known, ranked


@dataclass(frozen=True, kw_only=True)
class NudgeResult(Result):
    """The result of a measurement of `NudgedSGDHook`.

    Attributes:
        eigenvalues: The largest eigenvalues, in descending order.
        residual: The largest residual ``‖Hv − λv‖`` among them.
        num_converged: How many of them met the tolerance, and are acted upon.
        matvecs: Hessian-vector products spent.
        subspace_overlap: ``‖V_old V_newᵀ‖²_F / k`` with the eigenvectors that were acted upon before; None if there
            were none, if they belong to other parameters, or if no new ones converged.

    """

    eigenvalues: tuple[float, ...]
    residual: float
    num_converged: int
    matvecs: int
    subspace_overlap: float | None = None

    @property
    @override
    def has_converged(self) -> bool:
        return self.num_converged == len(self.eigenvalues)

    @override
    def scalars(self) -> dict[str, float]:
        found = {
            **ranked("nudge/lambda", self.eigenvalues),
            "nudge_details/residual": self.residual,
            "nudge_details/converged": self.num_converged / len(self.eigenvalues),
            "nudge_details/matvecs": float(self.matvecs),
        }
        return known({**found, "nudge_details/subspace_overlap": self.subspace_overlap})
