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
from typing import Any, Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError

LyapunovMap = Literal["ascent", "sgd"]

H0_CONVENTION = math.e - 1
"""``λ_max / h0``, where Algorithm 1 has settled: it steers ``1 + βλ_max = e`` and calls ``1/β`` the curvature."""

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
        _check_perturbation(map, delta_q)
        self._map = map
        self._delta_q = delta_q
        self._seed = seed
        self._perturbation: Tensor | None = None
        self._velocity: Tensor | None = None
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
        velocity: Tensor | None = None
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
            eigenvalue, end = (growth - 1) / self.beta, "largest" if growth >= 0 else "smallest"
            self.beta = controlled(self.beta, exponent)
            paper = 1 / self.beta
        else:
            eigenvalue = (1 + momentum - growth - (momentum / growth if momentum and growth else 0.0)) / lr
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

    def restart(self, direction: Tensor) -> None:
        """Go on with a perturbation along another direction, of shape ``(n,)``, and at rest."""
        self._perturbation = direction * (self._delta_q / torch.linalg.vector_norm(direction))
        self._velocity = None

    def state_dict(self) -> dict[str, Any]:
        """The perturbation, the velocity and the control, on the CPU."""
        tensors = {"perturbation": self._perturbation, "velocity": self._velocity}
        return {"beta": self.beta, **{name: None if t is None else t.cpu() for name, t in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.beta = state["beta"]
        self._perturbation = state["perturbation"]
        self._velocity = state["velocity"]

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


@dataclass(frozen=True)
class LyapunovSpectrumEstimate:
    """One iteration of `LyapunovSpectrum`.

    Attributes:
        exponents: Shape ``(k,)``: the finite-size exponents of this iteration, largest growth first once settled.
        mean_exponents: Shape ``(k,)``: their average over all iterations so far, the Lyapunov spectrum along the way.
        eigenvalues: Shape ``(k,)``: the Hessian eigenvalues that belong to the exponents, by exact inversion.
        paper_eigenvalues: Shape ``(k,)``: the same in the paper's limit of small steps, ``λ/β`` for the ascent map and
            ``-λ/α`` for the training map.
        num_gradients: Gradients that were spent.

    """

    exponents: Tensor
    mean_exponents: Tensor
    eigenvalues: Tensor
    paper_eigenvalues: Tensor
    num_gradients: int


class LyapunovSpectrum:
    """Follows k perturbations that are kept orthogonal: the k largest Lyapunov exponents.

    After every step the perturbations are orthogonalised in their order and brought back to the length ``Δq``; the
    growth of each, once the parts along its predecessors are taken out, gives an exponent (G. Benettin et al., 1980;
    the paper's appendix C). The ascent map finds the k largest eigenvalues of the Hessian, the training map of plain
    SGD the k smallest.

    Args:
        num_perturbations: How many, k.
        map: ``"ascent"``, whose step size is controlled by the first exponent, or ``"sgd"``.
        delta_q: The length ``Δq`` of the perturbations, in parameter space.
        seed: Seed of the first perturbations.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import LyapunovSpectrum
        >>> hessian = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
        >>> spectrum = LyapunovSpectrum(2)
        >>> for _ in range(100):
        ...     estimate = spectrum.step(lambda q: hessian @ q, torch.zeros(3, dtype=torch.float64))
        >>> estimate.eigenvalues.round(decimals=3)
        tensor([4., 2.], dtype=torch.float64)

    """

    def __init__(
        self, num_perturbations: int, *, map: LyapunovMap = "ascent", delta_q: float = 5e-2, seed: int = 0
    ) -> None:
        if num_perturbations < 1:
            raise ValueError(f"`num_perturbations` should be a positive int, got {num_perturbations}.")
        _check_perturbation(map, delta_q)
        self._count = num_perturbations
        self._map = map
        self._delta_q = delta_q
        self._seed = seed
        self._perturbations: Tensor | None = None
        self._sum = torch.zeros(num_perturbations, dtype=torch.float64)
        self._num_steps = 0
        self.beta = 1.0

    def step(
        self, gradient: Callable[[Tensor], Tensor], gradient_here: Tensor, *, lr: float = 0.0
    ) -> LyapunovSpectrumEstimate:
        """Move all perturbations once: k gradients.

        Args:
            gradient: Maps a displacement ``q`` of shape ``(n,)`` to the gradient at ``θ + q``.
            gradient_here: The gradient at ``θ``, shape ``(n,)``, of the same loss on the same batch.
            lr: Learning rate ``α`` of the training map.

        Raises:
            ValueError: If the training map is followed without a positive `lr`, or there are fewer parameters than
                perturbations.
            NonFiniteCurvatureError: If a gradient is not finite; the state stays as it was.

        """
        if self._map == "sgd" and not lr > 0:
            raise ValueError(f"`lr` should be a positive float for the map 'sgd', got {lr}.")
        directions = self._directions(gradient_here)
        step = self.beta if self._map == "ascent" else -lr
        moved = torch.stack([q + step * (gradient(q) - gradient_here) for q in directions * self._delta_q])
        if not bool(torch.isfinite(moved).all()):
            raise NonFiniteCurvatureError(
                f"The gradient at or near the present parameters (distance {self._delta_q:g}) is not finite."
            )
        orthonormal, triangle = torch.linalg.qr(moved.T)
        growth = triangle.diagonal().to("cpu", torch.float64) / self._delta_q
        exponents = growth.abs().log()
        # The QR factors are unique up to signs; the sign of the growth is that of the turn of the perturbation itself.
        turned = (orthonormal.T * directions).sum(dim=1).to("cpu", torch.float64) * growth
        multipliers = growth.abs() * turned.sign()
        eigenvalues = (multipliers - 1) / step
        self._perturbations = orthonormal.T
        self._sum += exponents
        self._num_steps += 1
        paper = exponents / step
        if self._map == "ascent":
            self.beta = controlled(self.beta, float(exponents[0]))
        return LyapunovSpectrumEstimate(
            exponents, self._sum / self._num_steps, eigenvalues, paper, num_gradients=self._count
        )

    def state_dict(self) -> dict[str, Any]:
        """The perturbations, the sums and the control, on the CPU."""
        perturbations = None if self._perturbations is None else self._perturbations.cpu()
        return {
            "perturbations": perturbations,
            "sum": self._sum.clone(),
            "num_steps": self._num_steps,
            "beta": self.beta,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._perturbations = state["perturbations"]
        self._sum = state["sum"].clone()
        self._num_steps = state["num_steps"]
        self.beta = state["beta"]

    def _directions(self, gradient: Tensor) -> Tensor:
        """The unit vectors of the perturbations, one row each."""
        if len(gradient) < self._count:
            raise ValueError(
                f"`num_perturbations` should be at most the number of parameters {len(gradient)}, got {self._count}."
            )
        if self._perturbations is None or self._perturbations.shape[1] != len(gradient):
            generator = torch.Generator().manual_seed(self._seed)
            random = torch.randn(len(gradient), self._count, generator=generator, dtype=gradient.dtype)
            self._perturbations = torch.linalg.qr(random).Q.T
        self._perturbations = self._perturbations.to(gradient)
        return self._perturbations


def controlled(beta: float, exponent: float) -> float:
    """The step size that steers the exponent to 1: β divided by it (Algorithm 1), within bounds."""
    inverse = 1 / exponent if exponent > 0 else math.inf
    return min(max(beta * min(max(inverse, 1 / _MAX_RESCALING), _MAX_RESCALING), 1e-30), 1e30)


def _check_perturbation(map: LyapunovMap, delta_q: float) -> None:
    if map not in ("ascent", "sgd"):
        raise ValueError(f"`map` should be 'ascent' or 'sgd', got {map!r}.")
    if not delta_q > 0:
        raise ValueError(f"`delta_q` should be a positive float, got {delta_q}.")
