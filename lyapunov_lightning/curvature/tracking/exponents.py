"""Extreme eigenvalues by Lyapunov exponents that are followed through a training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lyapunov_lightning.curvature.solvers.lyapunov import LyapunovEstimate, LyapunovIteration
from lyapunov_lightning.curvature.tracking.extremes import End
from lyapunov_lightning.curvature.vectors.space import VectorSpace


@dataclass(frozen=True)
class EndExponents:
    """What one measurement of `ExponentTracker` found; None where it did not look, or found another end.

    Attributes:
        lambda_max: The largest eigenvalue.
        lambda_min: The smallest eigenvalue.
        exponent: The exponent of the map that was followed, of gradient ascent where both were.
        exponent_sgd: The exponent of the training map, where both were followed.
        inverse_h0: The inverse of the largest eigenvalue in the paper's convention.
        paper_lambda_min: The smallest eigenvalue in the paper's convention.
        estimates: The last iteration of each map.
        num_gradients: Gradients that were spent.

    """

    lambda_max: float | None
    lambda_min: float | None
    exponent: float
    exponent_sgd: float | None
    inverse_h0: float | None
    paper_lambda_min: float | None
    estimates: tuple[LyapunovEstimate, ...]
    num_gradients: int

    def is_within(self, tol: float) -> bool:
        """Whether the residual of each estimate is at most `tol` times its eigenvalue."""
        return all(estimate.residual <= tol * abs(estimate.eigenvalue) for estimate in self.estimates)


class ExponentTracker:
    """The outermost eigenvalue of one or both ends by finite-size Lyapunov exponents, followed through a training.

    The largest end is measured under gradient ascent, Algorithm 1 of the chaos-theory paper, and the smallest end under
    the training map.

    Args:
        end: Which end of the spectrum.
        iterations: Iterations for each measurement.
        delta_q: Length of the perturbations, in parameter space.
        seed: Seed of the first perturbations.

    """

    def __init__(self, end: End = "largest", *, iterations: int = 1, delta_q: float = 5e-2, seed: int = 0) -> None:
        self._iterations = iterations
        self._ascent = LyapunovIteration(map="ascent", delta_q=delta_q, seed=seed) if end != "smallest" else None
        self._training = LyapunovIteration(map="sgd", delta_q=delta_q, seed=seed) if end != "largest" else None

    def measure(
        self,
        gradient: Callable[[Tensor], Tensor],
        here: Tensor,
        *,
        lr: float = 0.0,
        momentum: float = 0.0,
        space: VectorSpace | None = None,
    ) -> EndExponents | None:
        """Follow the perturbations through some iterations.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.
            lr: Learning rate of the training map; at 0 nothing moves, and it is not followed.
            momentum: Its heavy-ball momentum.
            space: The space of the vectors, if they are not plain tensors of their whole length.

        Returns:
            What was found; None if no map could be followed.

        """
        ascent = training = None
        if self._ascent is not None:
            # At the same parameters: each iteration turns the perturbation further towards its eigenvector.
            for _ in range(self._iterations):
                ascent = self._ascent.step(gradient, here, space=space)
        if self._training is not None and lr > 0:
            for _ in range(self._iterations):
                training = self._training.step(gradient, here, lr=lr, momentum=momentum, space=space)
        estimates = tuple(estimate for estimate in (ascent, training) if estimate is not None)
        if not estimates:
            return None
        # Each map follows what grows fastest under it: under ascent that is a negative eigenvalue if it is very large,
        # under training the sharpest one beyond the edge of stability. Where both are followed, each end has its own.
        lambda_max = lambda_min = None
        if ascent is not None and ascent.end == "largest":
            lambda_max = ascent.eigenvalue
        elif ascent is not None and self._training is None:
            lambda_min = ascent.eigenvalue
        if training is not None and training.end == "smallest":
            lambda_min = training.eigenvalue
        elif training is not None and self._ascent is None:
            lambda_max = training.eigenvalue
        return EndExponents(
            lambda_max=lambda_max,
            lambda_min=lambda_min,
            exponent=estimates[0].exponent,
            exponent_sgd=None if ascent is None or training is None else training.exponent,
            # In the paper h0 = 1/β, and what it plots is its inverse, in the unit of a learning rate.
            inverse_h0=None if ascent is None else 1 / ascent.paper_eigenvalue,
            paper_lambda_min=training.paper_eigenvalue if training is not None and training.end == "smallest" else None,
            estimates=estimates,
            # Without the gradient at the present parameters, which the caller has taken.
            num_gradients=self._iterations * len(estimates),
        )

    def state_dict(self) -> dict[str, Any]:
        """The perturbations and the control."""
        maps = {"ascent": self._ascent, "training": self._training}
        return {name: iteration.state_dict() for name, iteration in maps.items() if iteration is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        for name, iteration in (("ascent", self._ascent), ("training", self._training)):
            if iteration is not None:
                iteration.load_state_dict(state[name])
