"""Extreme eigenvalues by Lyapunov exponents that are followed through a training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lyapunov_lightning.curvature.solvers.lyapunov import LyapunovEstimate, LyapunovIteration
from lyapunov_lightning.curvature.tracking.extremes import End
from lyapunov_lightning.curvature.vectors.space import VectorSpace

_ASYMMETRY_EVERY = 64
"""At which measurements the asymmetry is looked at: the first that would count as converged, and every so many of
those after it. It takes eight gradients, so that this is an eighth of a gradient each."""

_NUM_GRADIENTS_OF_ASYMMETRY = 8


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
        asymmetry: By how much the products were last seen to be none of a symmetric matrix, relative to the eigenvalue.

    """

    lambda_max: float | None
    lambda_min: float | None
    exponent: float
    exponent_sgd: float | None
    inverse_h0: float | None
    paper_lambda_min: float | None
    estimates: tuple[LyapunovEstimate, ...]
    num_gradients: int
    asymmetry: float = 0.0

    def is_within(self, tol: float) -> bool:
        """Whether each is an eigenvalue of a symmetric matrix to `tol`, with a residual of at most that times it."""
        return self.asymmetry <= tol and self.has_settled(tol)

    def has_settled(self, tol: float) -> bool:
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
        tol: Relative residual of a measurement after which it is worth looking whether the products are symmetric.

    """

    def __init__(
        self,
        end: End = "largest",
        *,
        iterations: int = 1,
        delta_q: float = 5e-2,
        seed: int = 0,
        tol: float = 2e-2,
    ) -> None:
        self._iterations = iterations
        self._tol = tol
        self._num_settled = 0
        self._asymmetry = 0.0
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
        found = EndExponents(
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
        if not found.has_settled(self._tol):
            return replace(found, asymmetry=self._asymmetry)
        looks = self._num_settled % _ASYMMETRY_EVERY == 0
        self._num_settled += 1
        if looks:
            followed = self._ascent if ascent is not None else self._training
            assert followed is not None
            scale = abs(estimates[0].eigenvalue)
            self._asymmetry = followed.asymmetry(gradient, here, space) / scale if scale else 0.0
        return replace(
            found, asymmetry=self._asymmetry, num_gradients=found.num_gradients + _NUM_GRADIENTS_OF_ASYMMETRY * looks
        )

    def state_dict(self) -> dict[str, Any]:
        """The perturbations and the control."""
        maps = {"ascent": self._ascent, "training": self._training}
        state: dict[str, Any] = {name: each.state_dict() for name, each in maps.items() if each is not None}
        return {**state, "symmetry": {"num_settled": self._num_settled, "asymmetry": self._asymmetry}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        symmetry = state.get("symmetry", {})  # a checkpoint of an earlier version lacks it
        self._num_settled, self._asymmetry = symmetry.get("num_settled", 0), symmetry.get("asymmetry", 0.0)
        for name, iteration in (("ascent", self._ascent), ("training", self._training)):
            if iteration is not None:
                iteration.load_state_dict(state[name])
