r"""Finite-size Lyapunov exponents of training maps, and the Hessian eigenvalues that they stand for.

A training step maps parameters to parameters, and a small perturbation ``q`` of the parameters grows or shrinks under
it. With the perturbation brought back to the fixed length ``Δq`` after every step, its direction turns to the one that
grows fastest, and ``λ = log(‖q'‖ / Δq)`` tends to the largest Lyapunov exponent ("A chaos theory approach to understand
neural network optimization", secs. 2 and 3, appendix B). Three maps, with ``μ = ±e^λ`` the factor by which ``q`` grew,
negative if it turned round:

==========  ===========================================  ==========================  ==================================
map         step of the perturbation                     the paper's eigenvalue      exact inversion
==========  ===========================================  ==========================  ==================================
ascent      ``q' = q + β Hq``                            ``h0 = 1/β`` at ``λ = 1``   ``(μ - 1) / β``
sgd         ``q' = q - α Hq``                            ``-λ / α``                  ``(1 - μ) / α``
momentum    ``p' = m p - Hq``, ``q' = q + α p'``         ``-(λ² + λ(1 - m)) / α``    ``(1 + m - μ - m/μ) / α``
==========  ===========================================  ==========================  ==================================

Here ``Hq`` is the finite difference ``g(θ + q) - g(θ)``: the curvature smoothed over ``Δq``. The paper takes the limit
of small steps, in which ``e^λ = 1 + λ``; at the exponents that its own control sets (``λ = 1``) the two columns differ
by the factor ``e - 1 = 1.718``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError

LyapunovMap = Literal["ascent", "sgd"]

_MAX_RESCALING = 10.0
"""The most that the control changes β in one iteration; the paper's rule divides by an exponent that may be near 0."""


@dataclass(frozen=True)
class LyapunovEstimate:
    """One iteration of `LyapunovIteration`.

    Attributes:
        exponent: The finite-size exponent ``λ``, per iteration.
        eigenvalue: The Hessian eigenvalue that belongs to it, by exact inversion.
        paper_eigenvalue: The same in the paper's convention: ``h0 = 1/β`` for the ascent map, with the ``β`` that this
            iteration's control arrived at; ``h_N`` for the training maps.
        end: Which end of the spectrum dominated. The ascent map finds the largest eigenvalue. The training maps find
            the smallest one, or, beyond the edge of stability, the largest.
        residual: ``‖Hv − eigenvalue·v‖`` for the direction ``v`` of the perturbation before the iteration.
        curvature: The Rayleigh quotient ``vᵀHv``.
        num_gradients: Gradients that were spent.

    """

    exponent: float
    eigenvalue: float
    paper_eigenvalue: float
    end: Literal["largest", "smallest"]
    residual: float
    curvature: float
    num_gradients: int


class LyapunovIteration:
    """Follows one perturbation of the parameters from step to step.

    The state (perturbation, velocity, control) lives on across iterations, in which the parameters may move on: the
    direction is then already near to the right one and a single iteration a step suffices (Algorithm 1).

    Args:
        map: ``"ascent"`` for Algorithm 1, whose step size is controlled; ``"sgd"`` for the training map itself, with
            the learning rate and the momentum given at each iteration.
        delta_q: The length ``Δq`` of the perturbation, in parameter space.
        seed: Seed of the first perturbation.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import LyapunovIteration
        >>> hessian = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> iteration = LyapunovIteration()
        >>> for _ in range(60):
        ...     estimate = iteration.step(lambda q: hessian @ q, torch.zeros(2, dtype=torch.float64))
        >>> round(estimate.exponent, 3), round(estimate.eigenvalue, 3), round(estimate.paper_eigenvalue, 3)
        (1.0, 4.0, 2.328)

    """

    def __init__(self, *, map: LyapunovMap = "ascent", delta_q: float = 5e-2, seed: int = 0) -> None:
        if map not in ("ascent", "sgd"):
            raise ValueError(f"`map` should be 'ascent' or 'sgd', got {map!r}.")
        if not delta_q > 0:
            raise ValueError(f"`delta_q` should be a positive float, got {delta_q}.")
        self._map = map
        self._delta_q = delta_q
        self._seed = seed
        self._perturbation: Optional[Tensor] = None
        self._velocity: Optional[Tensor] = None
        self.beta = 1.0

    def step(
        self,
        gradient: Callable[[Tensor], Tensor],
        gradient_here: Tensor,
        *,
        lr: float = 0.0,
        momentum: float = 0.0,
    ) -> LyapunovEstimate:
        """Move the perturbation once: one gradient.

        Args:
            gradient: Maps a displacement ``q`` of shape ``(n,)`` to the gradient at ``θ + q``.
            gradient_here: The gradient at ``θ``, shape ``(n,)``, of the same loss on the same batch.
            lr: Learning rate ``α`` of the training map.
            momentum: Its heavy-ball momentum ``m``.

        Raises:
            ValueError: If the training map is followed without a positive `lr`.
            NonFiniteCurvatureError: If a gradient is not finite; the state stays as it was.

        """
        if self._map == "sgd" and not lr > 0:
            raise ValueError(f"`lr` should be a positive float for the map 'sgd', got {lr}.")
        q = self._perturbation_like(gradient_here)
        curvature_q = gradient(q) - gradient_here
        direction = q / self._delta_q
        hv = curvature_q / self._delta_q
        rayleigh = float(direction @ hv)
        velocity: Optional[Tensor] = None
        if self._map == "ascent":
            moved = q + self.beta * curvature_q
        elif momentum:
            velocity = (torch.zeros_like(q) if self._velocity is None else self._velocity) * momentum - curvature_q
            moved = q + lr * velocity
        else:
            moved = q - lr * curvature_q
        length = float(torch.linalg.vector_norm(moved))
        if not math.isfinite(length):
            raise NonFiniteCurvatureError(
                f"The gradient at or near the present parameters (distance {self._delta_q:g}) is not finite."
            )
        growth = length / self._delta_q
        if float(moved @ q) < 0:
            growth = -growth
        exponent = math.log(abs(growth)) if growth else -math.inf
        if self._map == "ascent":
            eigenvalue, end = (growth - 1) / self.beta, "largest"
            self._control(exponent)
            paper = 1 / self.beta
        else:
            eigenvalue = (1 + momentum - growth - (momentum / growth if momentum else 0.0)) / lr
            paper = -(exponent**2 * bool(momentum) + exponent * (1 - momentum)) / lr
            end = "largest" if growth < 0 else "smallest"
        if growth:
            self._perturbation = moved / abs(growth)
            self._velocity = None if velocity is None else velocity / abs(growth)
        return LyapunovEstimate(
            exponent=exponent,
            eigenvalue=eigenvalue,
            paper_eigenvalue=paper,
            end=end,  # type: ignore[arg-type]
            residual=float(torch.linalg.vector_norm(hv - eigenvalue * direction)),
            curvature=rayleigh,
            num_gradients=1,
        )

    def state_dict(self) -> dict[str, Any]:
        """The perturbation, the velocity and the control, on the CPU."""
        tensors = {"perturbation": self._perturbation, "velocity": self._velocity}
        return {"beta": self.beta, **{name: None if t is None else t.cpu() for name, t in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.beta = state["beta"]
        self._perturbation = state["perturbation"]
        self._velocity = state["velocity"]

    def _control(self, exponent: float) -> None:
        """Steer the exponent to 1 by dividing β by it (Algorithm 1), within bounds."""
        inverse = 1 / exponent if exponent > 0 else math.inf
        self.beta *= min(max(inverse, 1 / _MAX_RESCALING), _MAX_RESCALING)

    def _perturbation_like(self, gradient: Tensor) -> Tensor:
        if self._perturbation is None or self._perturbation.shape != gradient.shape:
            generator = torch.Generator().manual_seed(self._seed)
            random = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
            self._perturbation = random * (self._delta_q / torch.linalg.vector_norm(random))
            self._velocity = None
        self._perturbation = self._perturbation.to(gradient)
        if self._velocity is not None:
            self._velocity = self._velocity.to(gradient)
        return self._perturbation
