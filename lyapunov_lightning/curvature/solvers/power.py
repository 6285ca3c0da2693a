"""The outermost eigenvalue by power iteration, the classical baseline.

It needs memory for two vectors instead of a Krylov basis, and more products than `lanczos` for the same accuracy
(Y. LeCun, P. Simard and B. Pearlmutter, "Automatic learning rate maximization by on-line estimation of the Hessian's
eigenvectors", 1993, is the form in which it came to neural networks).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_int, check_positive
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.warm_start import with_noise
from lyapunov_lightning.curvature.vectors.space import VectorSpace

_LEAST_PRODUCTS = 6
"""Products that are spent at least: a start near another eigenvector has a small residual, and would end the iteration
at once."""

_STALLED_AFTER = 20
"""Products in which the residual has to fall by a third. Where it does not, the two ends of the spectrum may be equal
in modulus: the vector then swings between both for ever, unless the spectrum is shifted."""


def power_iteration(
    operator: LinearOperator,
    *,
    end: Literal["largest", "smallest"] = "largest",
    tol: float = 1e-2,
    max_matvecs: int = 200,
    start: Tensor | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The largest or the smallest eigenvalue of a symmetric operator by power iteration.

    Plain power iteration finds the eigenvalue of largest modulus, whichever end that is. Once an eigenvalue of the
    wrong sign shows, or the iteration swings between both ends, the spectrum is shifted so that the wanted end is the
    larger one. Stops when the residual ``‖Av − θv‖`` is at most ``tol·|θ|``, after six products at least.

    Args:
        operator: The symmetric operator.
        end: Which end of the spectrum.
        tol: Relative tolerance of the residual.
        max_matvecs: The most products to spend.
        start: The vector to begin with, shape ``(size,)``; random if None.
        seed: Seed of the random vector.

    Returns:
        One eigenpair.

    Raises:
        ValueError: If an argument is out of its range.
        NonFiniteCurvatureError: If a product is not finite.
        PeerFailureError: If another rank of a distributed operator failed.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, power_iteration
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [torch.tensor([1.0, -2.0])])
        >>> round(float(power_iteration(hessian, end="smallest", tol=1e-6).values), 6)
        -2.0

    """
    if end not in ("largest", "smallest"):
        raise ValueError(f"`end` should be 'largest' or 'smallest', got {end!r}.")
    check_positive("tol", tol)
    check_int("max_matvecs", max_matvecs, least=1)
    space = space_of(operator)
    sign = 1.0 if end == "largest" else -1.0
    with space.together():
        noise = space.random(torch.Generator().manual_seed(seed))
        noise /= space.norm(noise)
        vector = noise if start is None else _blended(space, start, noise)
        shift, residuals = 0.0, [math.inf]
        for num_matvecs in range(1, max_matvecs + 1):
            product = operator.matvec(vector)
            quotient = space.inner(vector, product)
            remainder = space.norm(product - quotient * vector)
            # Agreed on, since all branches below depend on them: ranks that round differently would take different
            # ones.
            raw, residual = space.agreed(torch.stack([quotient.to(remainder), remainder])).tolist()
            if not math.isfinite(raw + residual):
                raise NonFiniteCurvatureError
            value = sign * raw  # the eigenvalue of ±A, whose upper end is wanted
            # A residual below the rounding of the product shows nothing, and a `tol` below it would never be met.
            rounding = 10 * torch.finfo(space.dtype).eps * abs(value)
            converged = residual <= max(tol * abs(value), rounding)
            residuals.append(residual)
            needed = 0.0 if converged and value >= 0 else _needed_shift(value, residuals)
            # By 1 % at least, or the shift would creep up with each better estimate and start the iteration anew. What
            # was found at the wrong end is no start, so the noise is mixed in again.
            if needed > shift * 1.01 and num_matvecs < max_matvecs:
                shift, residuals, converged = needed, [math.inf], False
                vector = _blended(space, vector, noise)
                continue
            # Started at the second of two eigenvectors, with values 3 and 5, the residual met the tolerance after three
            # products, at 3; the noise in the start needs some more to outgrow it.
            if (converged and num_matvecs >= min(_LEAST_PRODUCTS, space.size)) or num_matvecs == max_matvecs:
                break
            if value + shift == 0 and residual == 0:
                break  # the next vector would be 0/0
            ahead = sign * product + shift * vector
            vector = ahead / space.norm(ahead)
        return Eigenpairs(
            values=torch.tensor([raw], dtype=torch.float64, device="cpu"),
            vectors=vector.reshape(1, -1),
            residuals=torch.tensor([max(residual, rounding)], dtype=torch.float64, device="cpu"),
            value_errors=torch.tensor([max(residual, rounding)], dtype=torch.float64, device="cpu"),
            missed_probability=torch.ones(1, dtype=torch.float64, device="cpu"),
            converged=torch.tensor([converged], device="cpu"),
            num_matvecs=num_matvecs,
            num_largest=1 if end == "largest" else 0,
            start=vector,
        )


def _needed_shift(value: float, residuals: Sequence[float]) -> float:
    """The shift that makes the upper end the one of largest modulus, as far as the products so far show.

    A negative value, converged or not, shows that the other end may be the larger one in modulus. With the shift by its
    modulus (and residual) the spectrum is non-negative there. Where both ends are alike in modulus, the vector swings
    between them and the residual stays.
    """
    if value < 0:
        return residuals[-1] - value
    # Half-way between two ends of equal modulus the quotient is anywhere between them. Its square and that of the
    # residual add up to the mean of A², which is the square of that modulus.
    if len(residuals) > _STALLED_AFTER and residuals[-1] > 2 / 3 * residuals[-_STALLED_AFTER]:
        return math.hypot(value, residuals[-1])
    return 0.0


def _blended(space: VectorSpace, start: Tensor, noise: Tensor) -> Tensor:
    """A unit vector along the start, with a little of everything else."""
    (vector,) = space.adopt(start, "start")[:1]
    blended = with_noise(space, vector.clone(), noise)
    return noise if blended is noise else blended.div_(space.norm(blended))
