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

What grows fastest is what ``|μ|`` is largest for, not the eigenvalue: under the ascent map an eigenvalue below ``-2/β``
outgrows all small positive ones, and comes with a negative ``μ``. So every value says from which end of the spectrum it
is. And a direction turns only as fast as the growth of its neighbours differs: each iteration reduces what is left of
them by the ratio of their multipliers, which after few steps on a flat spectrum leaves nearly all of it. So every value
comes with its residual.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.vectors.space import VectorSpace, space_like

LyapunovMap = Literal["ascent", "sgd"]
End = Literal["largest", "smallest"]

H0_CONVENTION = math.e - 1
"""``λ_max / h0``, where Algorithm 1 has settled: it steers ``1 + βλ_max = e`` and calls ``1/β`` the curvature."""

_COMPARED = 3
"""Directions in which the symmetry of the products is looked at. With stopped gradients (SimSiam, four networks) the
difference was 0.0005 to 0.14 of the eigenvalue in each of the three and 0.03 to 0.15 in the largest of them; without,
and in four other networks with kinks or none, 0.02 at most."""

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
    end: End
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
        space: VectorSpace | None = None,
    ) -> LyapunovEstimate:
        """Move the perturbation once: one gradient.

        Args:
            gradient: Maps a displacement ``q`` of shape ``(n,)`` to the gradient at ``θ + q``.
            gradient_here: The gradient at ``θ``, shape ``(n,)``, of the same loss on the same batch.
            lr: Learning rate ``α`` of the training map.
            momentum: Its heavy-ball momentum ``m``.
            space: The space of the vectors, if they are not plain tensors of their whole length.

        Raises:
            ValueError: If the training map is followed without a positive `lr`.
            NonFiniteCurvatureError: If a gradient is not finite; the state stays as it was.

        """
        if self._map == "sgd" and not lr > 0:
            raise ValueError(f"`lr` should be a positive float for the map 'sgd', got {lr!r}.")
        space = space_like(gradient_here) if space is None else space
        q = self._perturbation_like(gradient_here, space)
        # One-sided, as the paper defines the exponent by the growth of one perturbation; a central difference would
        # cost a second gradient.
        curvature_q = gradient(q) - gradient_here
        velocity: Tensor | None = None
        if self._map == "ascent":
            moved = torch.add(q, curvature_q, alpha=self.beta)
        elif momentum:
            velocity = (torch.zeros_like(q) if self._velocity is None else self._velocity) * momentum - curvature_q
            moved = torch.add(q, velocity, alpha=lr)
        else:
            moved = torch.sub(q, curvature_q, alpha=lr)
        rayleigh, rest, length, turned = self._measured(space, q, curvature_q, moved)
        # A length has no sign, and the multiplier may be negative: beyond the edge of stability the perturbation turns
        # round at each step.
        growth = math.copysign(length / self._delta_q, turned)
        exponent = math.log(abs(growth)) if growth else -math.inf
        if self._map == "ascent":
            eigenvalue, end = (growth - 1) / self.beta, _end(self._map, growth)
            self.beta = controlled(self.beta, exponent)
            paper = 1 / self.beta
        else:
            eigenvalue = (1 + momentum - growth - (momentum / growth if momentum and growth else 0.0)) / lr
            # Without momentum the paper has no square (secs. 2 and 3): the table's formula at m = 0 would add -λ²/α.
            paper = -(exponent**2 * bool(momentum) + exponent * (1 - momentum)) / lr
            end = _end(self._map, growth)
        # The velocity is scaled alike: the map is linear in both together, and its multipliers are those of the pair.
        if growth:
            self._perturbation = moved.div_(abs(growth))
            self._velocity = None if velocity is None else velocity.div_(abs(growth))
        return LyapunovEstimate(
            exponent=exponent,
            eigenvalue=eigenvalue,
            paper_eigenvalue=paper,
            end=end,
            residual=math.hypot(rest, eigenvalue - rayleigh),
            curvature=rayleigh,
            num_gradients=1,
        )

    def _measured(
        self, space: VectorSpace, q: Tensor, curvature_q: Tensor, moved: Tensor
    ) -> tuple[float, float, float, float]:
        """The numbers that one iteration gives, in one transfer from the device.

        Args:
            space: The space of the vectors.
            q: The perturbation.
            curvature_q: The difference of gradients along it, which is written over.
            moved: The perturbation after the iteration.

        Returns:
            The Rayleigh quotient ``vᵀHv``, the norm of the rest ``Hv - (vᵀHv) v``, the length of the perturbation after
            the iteration, and its component along the one before, of which only the sign counts.

        """
        rayleigh = space.inner(q, curvature_q) / self._delta_q / self._delta_q
        space.subtract(curvature_q, rayleigh[None], q[None])
        rest = space.norm(curvature_q) / self._delta_q
        found = [rayleigh, rest, space.norm(moved), space.inner(moved, q)]
        values: list[float] = torch.stack([value.to(rest.dtype) for value in found]).tolist()
        # Of the four numbers this one is enough: the perturbation has moved by the product, and holds what that does.
        if not math.isfinite(values[2]):
            raise _not_finite(self._delta_q)
        return values[0], values[1], values[2], values[3]

    def asymmetry(
        self, gradient: Callable[[Tensor], Tensor], gradient_here: Tensor, space: VectorSpace | None = None
    ) -> float:
        """How far ``uᵀHw`` and ``wᵀHu`` differ at most, for ``u`` along the perturbation and three other directions.

        The iterates alone do not show it: they come to rest in a direction with ``Hu = λu`` whether or not that is an
        eigenvector of ``Hᵀ`` too, and only then ``λ`` is a curvature. The directions are those of the Krylov space of
        the gradient, where the large eigenvalues are: along a random one of a million there would be nothing to see. It
        takes eight gradients, of central differences: one-sided ones would differ by the third derivative.
        """
        space = space_like(gradient_here) if space is None else space

        def product(direction: Tensor) -> Tensor:
            ahead = gradient(direction * self._delta_q)
            return ahead.sub(gradient(direction * -self._delta_q)).div_(2 * self._delta_q)

        u = self._perturbation_like(gradient_here, space) / self._delta_q
        of_u = product(u)
        rows = space.empty(_COMPARED + 1)
        rows[0] = u
        w, found = gradient_here, []
        for index in range(1, _COMPARED + 1):
            rows[index] = w
            space.orthonormalise(rows[index], [rows[:index]])
            w = product(rows[index])
            found.append((space.inner(u, w) - space.inner(rows[index], of_u)).abs())
        return float(torch.stack(found).max())

    def restart(self, direction: Tensor, space: VectorSpace | None = None) -> None:
        """Continue with a perturbation along another direction, of shape ``(n,)``, without velocity."""
        space = space_like(direction) if space is None else space
        self._perturbation = direction * (self._delta_q / space.norm(direction)).to(direction)
        self._velocity = None

    def state_dict(self) -> dict[str, Any]:
        """The perturbation, the velocity and the control, on the CPU."""
        tensors = {"perturbation": self._perturbation, "velocity": self._velocity}
        return {"beta": self.beta, **{name: None if t is None else t.cpu() for name, t in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.beta = state["beta"]
        self._perturbation = state["perturbation"]
        self._velocity = state["velocity"]

    def _perturbation_like(self, gradient: Tensor, space: VectorSpace) -> Tensor:
        if self._perturbation is None or self._perturbation.shape != gradient.shape:
            self.restart(space.random(torch.Generator().manual_seed(self._seed)), space)
            assert self._perturbation is not None
        # A state that was loaded is on the CPU.
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
        residuals: Shape ``(k,)``: ``‖Hv − eigenvalue·v‖`` for the direction ``v`` of each perturbation before the
            iteration. An eigenvalue of the Hessian lies within it; whether it is the one of that rank is not said.
        ends: For each of them, which end of the spectrum it is from, see `LyapunovEstimate`.
        num_gradients: Gradients that were spent.

    """

    exponents: Tensor
    mean_exponents: Tensor
    eigenvalues: Tensor
    paper_eigenvalues: Tensor
    residuals: Tensor
    ends: tuple[End, ...]
    num_gradients: int

    def converged(self, tol: float) -> Tensor:
        """Shape ``(k,)``, bool: whether each residual is within this share of its eigenvalue."""
        return self.residuals <= tol * self.eigenvalues.abs()


class LyapunovSpectrum:
    """Follows k perturbations that are kept orthogonal: the k largest Lyapunov exponents.

    After every step the perturbations are orthogonalised in their order and brought back to the length ``Δq``; the
    growth of each, once the parts along its predecessors are taken out, gives an exponent (G. Benettin et al., 1980;
    the paper's appendix C).

    It finds the k eigenvalues of largest growth: ``|1 + βλ|`` under the ascent map, ``|1 - αλ|`` under the training map
    of plain SGD. These are the k largest and the k smallest as long as no multiplier is negative enough; the others are
    marked by their `ends`. The convergence is that of power iteration, so the residuals have to be looked at.

    It takes the memory of ``2k + 4`` vectors of the model's size during an iteration, the gradients' own not counted,
    and of k between them.

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
            raise ValueError(f"`num_perturbations` should be a positive int, got {num_perturbations!r}.")
        _check_perturbation(map, delta_q)
        self._count = num_perturbations
        self._map = map
        self._delta_q = delta_q
        self._seed = seed
        self._perturbations: Tensor | None = None
        self._sum = torch.zeros(num_perturbations, dtype=torch.float64, device="cpu")
        self._num_steps = 0
        self.beta = 1.0

    def step(
        self,
        gradient: Callable[[Tensor], Tensor],
        gradient_here: Tensor,
        *,
        lr: float = 0.0,
        space: VectorSpace | None = None,
    ) -> LyapunovSpectrumEstimate:
        """Move all perturbations once: k gradients.

        Args:
            gradient: Maps a displacement ``q`` of shape ``(n,)`` to the gradient at ``θ + q``.
            gradient_here: The gradient at ``θ``, shape ``(n,)``, of the same loss on the same batch.
            lr: Learning rate ``α`` of the training map.
            space: The space of the vectors, if they are not plain tensors of their whole length.

        Raises:
            ValueError: If the training map is followed without a positive `lr`, or there are fewer parameters than
                perturbations.
            NonFiniteCurvatureError: If a gradient is not finite; the state stays as it was.

        """
        if self._map == "sgd" and not lr > 0:
            raise ValueError(f"`lr` should be a positive float for the map 'sgd', got {lr!r}.")
        space = space_like(gradient_here) if space is None else space
        directions = self._directions(gradient_here, space)
        step = self.beta if self._map == "ascent" else -lr
        moved = space.empty(self._count)
        found: list[Tensor] = []
        for index, direction in enumerate(directions):
            product = gradient(direction * self._delta_q).sub(gradient_here).div_(self._delta_q)
            rayleigh = space.inner(direction, product)
            torch.add(direction, product, alpha=step, out=moved[index])
            rest = space.norm(product.sub_(rayleigh * direction))
            # Against the rows ahead, which have moved already: the order makes the first the largest exponent.
            found += [rayleigh, rest, *_orthonormalised(space, moved, index, direction)]
        table = torch.stack([value.to(found[1].dtype) for value in found]).to("cpu", torch.float64).view(-1, 4)
        if not bool(torch.isfinite(table).all()):
            raise _not_finite(self._delta_q)
        rayleighs, rests, growth, turned = table.T
        exponents = growth.log()
        # A length has no sign, the multiplier has: see `LyapunovIteration.step`.
        multipliers = growth.copysign(turned)
        eigenvalues = (multipliers - 1) / step
        # Not before: a gradient that is not finite has to leave the state as it was.
        self._perturbations = moved
        if not bool(growth.all()):  # what vanishes altogether has no direction any more
            self._begin(space, growth == 0)
        self._sum += exponents
        self._num_steps += 1
        paper = exponents / step
        if self._map == "ascent":
            self.beta = controlled(self.beta, float(exponents[0]))
        return LyapunovSpectrumEstimate(
            exponents=exponents,
            mean_exponents=self._sum / self._num_steps,
            eigenvalues=eigenvalues,
            paper_eigenvalues=paper,
            residuals=torch.hypot(rests, eigenvalues - rayleighs),
            ends=tuple(_end(self._map, multiplier) for multiplier in multipliers.tolist()),
            num_gradients=self._count,
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
        """Continue from a `state_dict`."""
        self._perturbations = state["perturbations"]
        self._sum = state["sum"].clone()
        self._num_steps = state["num_steps"]
        self.beta = state["beta"]

    def _directions(self, gradient: Tensor, space: VectorSpace) -> Tensor:
        """The unit vectors of the perturbations, one row each."""
        if space.size < self._count:
            raise ValueError(
                f"`num_perturbations` should be at most the number of parameters {space.size}, got {self._count}."
            )
        if self._perturbations is None or self._perturbations.shape[1] != len(gradient):
            self._perturbations = space.empty(self._count)
            self._begin(space, torch.ones(self._count, dtype=torch.bool, device="cpu"))
        self._perturbations = self._perturbations.to(gradient)
        return self._perturbations

    def _begin(self, space: VectorSpace, chosen: Tensor) -> None:
        """Let some perturbations begin anew in random directions; `chosen` is a bool for each of them."""
        assert self._perturbations is not None
        generator = torch.Generator().manual_seed(self._seed)
        for index, row in enumerate(self._perturbations):
            if chosen[index]:
                row.copy_(space.random(generator))
            _orthonormalised(space, self._perturbations, index, row)


def _orthonormalised(space: VectorSpace, rows: Tensor, index: int, before: Tensor) -> tuple[Tensor, Tensor]:
    """Make a row a unit vector that is orthogonal to the rows ahead of it, in place and by Gram and Schmidt, twice.

    Args:
        space: The space of the rows.
        rows: Shape ``(k, n)``, of which those ahead are orthonormal already.
        index: Which row.
        before: A vector of shape ``(n,)``.

    Returns:
        The length of the row without its part in the span of the rows ahead, 0 only for a row that vanishes; and the
        component of the unit vector along `before`, whose sign says whether it has turned round.

    """
    row = rows[index]
    length = space.orthonormalise(row, [rows[:index]])
    return length, space.inner(row, before)


def _end(map: LyapunovMap, multiplier: float) -> End:
    """The end of the spectrum that a multiplier is from: gradient ascent turns the lower one, descent the upper one."""
    return "largest" if (multiplier >= 0) == (map == "ascent") else "smallest"


def _not_finite(delta_q: float) -> NonFiniteCurvatureError:
    return NonFiniteCurvatureError(
        f"The gradient at or near the present parameters (distance {delta_q:g}) is not finite."
    )


def controlled(beta: float, exponent: float) -> float:
    """The step size that steers the exponent to 1: β divided by it (Algorithm 1), within bounds."""
    # A perturbation that shrinks, λ <= 0, says that β is too small or the curvature negative: the paper's rule would
    # make β negative and turn the map round; here β grows by the most that is allowed.
    inverse = 1 / exponent if exponent > 0 else math.inf
    # Bounded, since without any curvature β grows tenfold at each iteration: after 39 of them no float32 would hold it.
    return min(max(beta * min(max(inverse, 1 / _MAX_RESCALING), _MAX_RESCALING), 1e-30), 1e30)


def _check_perturbation(map: LyapunovMap, delta_q: float) -> None:
    if map not in ("ascent", "sgd"):
        raise ValueError(f"`map` should be 'ascent' or 'sgd', got {map!r}.")
    if not delta_q > 0:
        raise ValueError(f"`delta_q` should be a positive float, got {delta_q!r}.")
