r"""A running estimate of the smallest eigenpair, for one product a step.

The smallest eigenvector is the unit vector ``v`` that minimizes ``vᵀHv``; the gradient of that is ``2Hv``, so that the
pair can be carried along by a descent of its own while the network trains ("Negative eigenvalues of the Hessian in deep
neural networks", appendix C). Here the steps of this descent are not set by hand: ``vᵀHv`` is minimized exactly in a
small space. One *cycle* is a few steps with one product each:

1. ``Hv``, which gives the value ``λ = vᵀHv``, the residual ``Hv − λv``, and the gradient's direction;
2. ``Hq`` for that direction, orthogonalised; then for what ``Hq`` adds to the space, and so on;
3. the smallest Ritz vector of all of these, and of the direction in which ``v`` moved in the last cycle, is the next
   ``v``; the last move makes it a conjugate-gradient method instead of a steepest descent, with its rate of convergence
   (A. Knyazev, "Toward the optimal preconditioned eigensolver", SIAM J. Sci. Comput. 23, 2001; A. Stathopoulos and
   Y. Saad on restarting with the previous direction, 1998).

While the parameters move the products of a cycle belong to a few neighbouring Hessians. The value and its residual
never mix them: they come from the one product that was spent on ``v`` itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.krylov import random_vector
from lyapunov_lightning.curvature.linear import LinearOperator


@dataclass(frozen=True)
class OnlineEstimate:
    """The smallest eigenpair as it was last measured.

    Attributes:
        value: The Rayleigh quotient ``λ = vᵀHv``.
        residual: ``‖Hv − λv‖``: an eigenvalue of the Hessian of that step lies within it of `value`.
        vector: The unit vector ``v``, of shape ``(size,)``.
        age: How many steps ago these were measured; 0 for the present one.

    """

    value: float
    residual: float
    vector: Tensor
    age: int


class OnlineEigenpair:
    """Follows the smallest eigenpair of a symmetric operator that changes slowly, one product a step.

    It holds ``cycle + 1`` vectors of the operator's size. Every `cycle`-th product is spent on the vector itself, and
    makes the estimate anew; the others find out where to go next. Long cycles converge faster on an operator that
    stays, short ones follow one that moves.

    Args:
        cycle: Products in a cycle, at least 2.
        seed: Seed of the first vector.

    Raises:
        ValueError: If `cycle` is not an int of at least 2.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, OnlineEigenpair
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> running = OnlineEigenpair()
        >>> for _ in range(20):
        ...     estimate = running.step(hessian)
        >>> round(estimate.value, 6)
        -2.0

    """

    def __init__(self, cycle: int = 4, seed: int = 0) -> None:
        if isinstance(cycle, bool) or not isinstance(cycle, int) or cycle < 2:
            raise ValueError(f"`cycle` should be an int of at least 2, got {cycle}.")
        self._cycle = cycle
        self._seed = seed
        self._basis: list[Tensor] = []
        self._projection = torch.zeros(0, 0, dtype=torch.float64)
        self._direction: Tensor | None = None
        self._value = 0.0
        self._residual = 0.0
        self._age = 0
        self._num_steps = 0

    def step(self, operator: LinearOperator) -> OnlineEstimate:
        """Spend one product.

        Args:
            operator: The operator as it is now.

        Returns:
            The estimate of this step or, between two products on the vector itself, the last one.

        Raises:
            NonFiniteCurvatureError: If the product is not finite; the estimate stays as it was.

        """
        self._fit_to(operator)
        self._num_steps += 1
        if self._direction is None:
            self._measure(operator, *self._next_cycle())
        else:
            self._look_around(operator, self._direction)
        return OnlineEstimate(self._value, self._residual, self._basis[0], self._age)

    def state_dict(self) -> dict[str, Any]:
        """The vectors and numbers of the present cycle, on the CPU."""
        return {
            "basis": torch.stack(self._basis).cpu() if self._basis else None,
            "projection": self._projection.clone(),
            "direction": None if self._direction is None else self._direction.cpu(),
            "value": self._value,
            "residual": self._residual,
            "age": self._age,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        # Each row a tensor of its own, as before: where it lies in memory may decide on how a product rounds.
        self._basis = [] if state["basis"] is None else [row.clone() for row in state["basis"]]
        self._projection = state["projection"].clone()
        self._direction = state["direction"]
        self._value, self._residual, self._age = state["value"], state["residual"], state["age"]
        self._num_steps = state["num_steps"]

    def _fit_to(self, operator: LinearOperator) -> None:
        """Begin with a random vector, at first and where parameters were frozen or unfrozen since."""
        if self._basis and len(self._basis[0]) == operator.size:
            self._basis = [vector.to(operator.device, operator.dtype) for vector in self._basis]
            if self._direction is not None:
                self._direction = self._direction.to(operator.device, operator.dtype)
            return
        vector = random_vector(operator, torch.Generator().manual_seed(self._seed))
        self._basis = [vector / torch.linalg.vector_norm(vector)]
        self._projection = torch.zeros(1, 1, dtype=torch.float64)
        self._direction = None

    def _next_cycle(self) -> tuple[list[Tensor], Tensor]:
        """The basis of a new cycle and its projection: the smallest Ritz vector, and the way that it moved."""
        if len(self._basis) == 1:
            return self._basis, self._projection
        smallest = torch.linalg.eigh(self._projection).eigenvectors[:, 0]
        # The first vector is where the last cycle began; the part of it that the Ritz vector lacks is the move.
        move = -smallest[0] * smallest
        move[0] += 1
        rotation = torch.stack([smallest, move / torch.linalg.vector_norm(move)]) if smallest[0].abs() < 1 else None
        if rotation is None or not bool(torch.isfinite(rotation).all()):  # it did not move
            rotation = smallest.reshape(1, -1)
        basis: list[Tensor] = []
        for row in rotation.tolist():
            vector = sum((c * b for c, b in zip(row[1:], self._basis[1:], strict=True)), row[0] * self._basis[0])
            basis.append(_orthonormalised(vector, basis))
        return basis, rotation @ self._projection @ rotation.T

    def _measure(self, operator: LinearOperator, basis: list[Tensor], projection: Tensor) -> None:
        """The product of the vector itself, and the direction of its residual."""
        product, column = _product(operator, basis[0], basis)
        value = float(column[0])
        norm = float(torch.linalg.vector_norm(product))
        remainder = float(torch.linalg.vector_norm(product - value * basis[0]))
        projection = projection.clone()
        projection[0], projection[:, 0] = column, column
        self._basis, self._projection = basis, projection
        self._value, self._age = value, 0
        self._residual = max(remainder, _rounding(operator) * norm)
        self._direction = self._beyond(operator, product)

    def _look_around(self, operator: LinearOperator, direction: Tensor) -> None:
        """The product of a direction beside the vector, which joins the basis."""
        basis = [*self._basis, direction]
        product, column = _product(operator, direction, basis)
        projection = torch.nn.functional.pad(self._projection, (0, 1, 0, 1))
        projection[-1], projection[:, -1] = column, column
        self._basis, self._projection = basis, projection
        self._age += 1
        is_last = self._age == self._cycle - 1
        self._direction = None if is_last else self._beyond(operator, product)

    def _beyond(self, operator: LinearOperator, product: Tensor) -> Tensor | None:
        """What a product adds to the basis, as a unit vector; None if there is nothing left to add."""
        if len(self._basis) == operator.size:
            return None
        norm = torch.linalg.vector_norm(product)
        rest = _without(product, self._basis)
        if bool(torch.linalg.vector_norm(rest) <= _rounding(operator) * norm):  # an eigenvector, maybe of another value
            rest = random_vector(operator, torch.Generator().manual_seed(self._seed + self._num_steps))
        return _orthonormalised(rest, self._basis)


def _product(operator: LinearOperator, vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The product of a vector, and its components along the basis."""
    product = operator.matvec(vector)
    column = torch.stack([row @ product for row in basis]).to("cpu", torch.float64)
    if not (bool(torch.isfinite(column).all()) and bool(torch.isfinite(product).all())):
        raise NonFiniteCurvatureError(
            "A Hessian-vector product is not finite: the loss or its derivatives overflow or are NaN here."
        )
    return product, column


def _rounding(operator: LinearOperator) -> float:
    """What the rounding of a product may amount to, relative to its norm."""
    return 10 * torch.finfo(operator.dtype).eps


def _without(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for row in basis:
        vector = vector - (row @ vector) * row
    return vector


def _orthonormalised(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):
        vector = _without(vector, basis)
        vector = vector / torch.linalg.vector_norm(vector)
    return vector
