r"""Products with the inverse of a symmetric positive definite operator, by conjugate gradients.

``x = (A + δ)⁻¹ b`` from products with ``A`` alone (M. Hestenes and E. Stiefel, "Methods of conjugate gradients for
solving linear systems", J. Res. Natl. Bur. Stand. 49, 1952). Newton steps, influence functions and the response of a
minimum to anything that moves it are such products.

Three things keep it honest:

- The residual ``b − (A + δ)x`` that the iteration updates drifts from the true one by rounding, in float32 from three
  digits on. So it is computed anew at the end, by a product, and the iteration begins again from it where it is not yet
  as small as was asked for.
- The Hessian of a network has negative eigenvalues. Along a direction ``d`` in which ``dᵀ(A + δ)d`` is not positive the
  method has no next step, and ``(A + δ)⁻¹b`` would be a saddle of what it minimises: it stops there and returns ``d``.
- Ranks agree on every number by which a branch is taken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_int, check_positive
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.vectors.space import VectorSpace

_ROUNDINGS = 10.0
"""Curvature along a direction that is less than so many roundings of the product there has no sign."""

_LEAST_GAIN = 0.5
"""What the true residual has to fall to, from one beginning of the iteration to the next, for another one: rounding is
reached where it does not."""


@dataclass(frozen=True)
class NonPositiveDirection:
    """A direction in which an operator is not positive.

    Attributes:
        vector: The unit vector ``d`` of shape ``(size,)``.
        curvature: ``dᵀ(A + δ)d``, which is negative, or positive by no more than the rounding of the product.

    """

    vector: Tensor
    curvature: float


@dataclass(frozen=True)
class InverseProduct:
    """The product of a vector with the inverse of an operator, with its certificate.

    Attributes:
        solution: Shape ``(size,)``: ``x``, on the operator's device in its dtype.
        residual: ``‖b − (A + δ)x‖``, computed from `solution` by a product of its own. If ``A + δ`` has no eigenvalue
            below ``m > 0``, the solution is within ``residual / m`` of the exact one: with a Gauss–Newton matrix, which
            has no negative eigenvalues, ``m = δ``.
        relative_residual: The residual over ``‖b‖``; 0 where ``b`` is 0.
        converged: Whether the relative residual is as small as was asked for.
        num_matvecs: Products that were spent, those for the residual included.
        non_positive: The direction of negative or no curvature at which the search ended, or None. `solution` is then
            what it had got to, the minimum of ``xᵀ(A + δ)x/2 − bᵀx`` over the directions before.

    """

    solution: Tensor
    residual: float
    relative_residual: float
    converged: bool
    num_matvecs: int
    non_positive: NonPositiveDirection | None


def conjugate_gradient(
    operator: LinearOperator, b: Tensor, *, damping: float = 0.0, tol: float = 1e-3, max_matvecs: int = 500
) -> InverseProduct:
    """The solution ``x`` of ``(A + damping)x = b`` for a symmetric operator ``A``.

    Stops when the residual is at most ``tol·‖b‖``, when the curvature along the next direction is not positive (see
    `InverseProduct.non_positive`; a larger `damping`, or the Gauss–Newton matrix, then helps), when rounding keeps the
    residual from falling further, or when the products are spent. The number of products grows with the square root of
    the condition number of ``A + damping``. Four vectors are held. What fails on one rank of a distributed operator
    ends the search on all of them.

    Args:
        operator: The symmetric operator, known by ``matvec``, ``size``, ``dtype`` and ``device``.
        b: The vector, of shape ``(size,)``; of an operator whose vectors are in parts, this rank's part. A gradient in
            the shapes of the parameters is made one by ``operator.layout.flatten``.
        damping: A multiple of the identity that is added, at least 0.
        tol: Relative tolerance of the residual. In float32 it cannot be met below about 1e-7 times the condition
            number.
        max_matvecs: The most products to spend, at least 2: the last one is kept for the residual.

    Returns:
        The solution, its residual, and whether it is what was asked for.

    Raises:
        ValueError: If an argument is out of its range, or `b` does not fit the operator.
        NonFiniteCurvatureError: If a product is not finite.
        PeerFailureError: If another rank failed.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator
        >>> from lyapunov_lightning.curvature.solvers import conjugate_gradient
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> hessian = HessianOperator(lambda scale: (scale * x**2).sum() / 2, [x], [torch.tensor([4.0, 1.0])])
        >>> found = conjugate_gradient(hessian, hessian.gradient(), damping=1.0)
        >>> found.solution.round(decimals=6), found.converged, found.num_matvecs
        (tensor([0.8000, 0.5000], dtype=torch.float64), True, 3)

    """
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"`damping` should be a non-negative float, got {damping}.")
    check_positive("tol", tol)
    check_int("max_matvecs", max_matvecs, least=1)
    if max_matvecs < 2:
        raise ValueError("`max_matvecs` should be at least 2, one product being kept for the residual, got 1.")
    space = space_of(operator)

    def product(vector: Tensor) -> Tensor:
        image = operator.matvec(vector)
        return image.add_(vector, alpha=damping) if damping else image

    with space.together():
        if b.ndim != 1:
            raise ValueError(f"`b` should be one vector, got shape {tuple(b.shape)}. Solve for one after the other.")
        (right,) = space.adopt(b, "b")
        (length,) = space.agreed(space.norm(right)[None]).tolist()
        solution, residual, norm = torch.zeros_like(right), right.clone(), length
        num_matvecs, non_positive = 0, None
        while norm > tol * length and num_matvecs + 2 <= max_matvecs:
            spent, non_positive = _descend(
                product, space, solution, residual, norm, tol * length, max_matvecs - num_matvecs - 1
            )
            residual = right - product(solution)
            num_matvecs += spent + 1
            before = norm
            (norm,) = space.agreed(space.norm(residual)[None]).tolist()
            if not math.isfinite(norm):
                raise NonFiniteCurvatureError
            if non_positive is not None or norm > _LEAST_GAIN * before:
                break
    return InverseProduct(
        solution=solution,
        residual=norm,
        relative_residual=norm / length if length else 0.0,
        converged=norm <= tol * length,
        num_matvecs=num_matvecs,
        non_positive=non_positive,
    )


def _descend(
    product: Callable[[Tensor], Tensor],
    space: VectorSpace,
    solution: Tensor,
    residual: Tensor,
    norm: float,
    allowed: float,
    max_matvecs: int,
) -> tuple[int, NonPositiveDirection | None]:
    """Conjugate gradients from a solution with its residual, both of which are moved on in place.

    Returns:
        The products that were spent, and the direction at which the search ended if its curvature is not positive.

    """
    direction = residual.clone()
    for num_matvecs in range(1, max_matvecs + 1):
        image = product(direction)
        lengths = torch.stack([space.norm(direction), space.norm(image)])
        quotient = space.inner(direction, image).to(lengths)
        curvature, length, stretched = space.agreed(torch.cat([quotient[None], lengths])).tolist()
        if not math.isfinite(curvature + length + stretched):
            raise NonFiniteCurvatureError
        if curvature <= _ROUNDINGS * torch.finfo(space.dtype).eps * length * stretched:
            return num_matvecs, NonPositiveDirection(direction / length, curvature / length**2)
        step = norm**2 / curvature
        solution.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        before = norm
        (norm,) = space.agreed(space.norm(residual)[None]).tolist()
        if norm <= allowed:
            break
        direction.mul_((norm / before) ** 2).add_(residual)
    return num_matvecs, None
