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

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.vectors.space import VectorSpace

_SHORTEST_CYCLE = 4
"""A cycle spends one product on the vector and the others on new directions. With fewer than three of these, a vector
that is an eigenvector of a value that is no longer the smallest stays where it is."""


@dataclass(frozen=True)
class OnlineEstimate:
    """The smallest eigenpair as it was last measured.

    Attributes:
        value: The Rayleigh quotient ``λ = vᵀHv``.
        residual: ``‖Hv − λv‖``: an eigenvalue of the Hessian of that step lies within it of `value`.
        vector: The unit vector ``v``, of shape ``(size,)``.
        age: How many steps ago these were measured; 0 if at the present one.

    """

    value: float
    residual: float
    vector: Tensor
    age: int


class OnlineEigenpair:
    """Tracks the smallest eigenpair of a symmetric operator that changes slowly, with one product a step.

    It holds ``cycle + 1`` vectors of the operator's size, and one more while it works. Every `cycle`-th product is
    spent on the vector itself and renews the estimate; the others explore where the vector should move. Long cycles
    converge faster if the operator stays the same, and short ones follow an operator that changes.

    Args:
        cycle: Products in a cycle, at least 4.
        seed: Seed of the first vector.

    Raises:
        ValueError: If `cycle` is not an int of at least 4.

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
        if isinstance(cycle, bool) or not isinstance(cycle, int) or cycle < _SHORTEST_CYCLE:
            raise ValueError(f"`cycle` should be an int of at least {_SHORTEST_CYCLE}, got {cycle!r}.")
        self._cycle = cycle
        self._seed = seed
        self._rows: Tensor | None = None
        self._length = 0
        self._has_direction = False
        self._projection = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self._value = 0.0
        self._residual = 0.0
        self._age = 0
        self._num_steps = 0

    def step(self, operator: LinearOperator) -> OnlineEstimate:
        """Spend one product.

        Args:
            operator: The operator as it is now.

        Returns:
            The estimate of this step or, between two products on the vector itself, the last estimate.

        Raises:
            NonFiniteCurvatureError: If the product is not finite; the estimate stays as it was.
            PeerFailureError: If another rank of a distributed operator failed; all ranks begin the search anew then.

        """
        space = space_of(operator)
        try:
            with space.together():
                rows = self._fitted(space)
                if self._has_direction:
                    self._look_around(operator, space, rows)
                else:
                    self._next_cycle(space, rows)
                    self._measure(operator, space, rows)
                estimate = OnlineEstimate(self._value, self._residual, rows[0].clone(), self._age)
        except NonFiniteCurvatureError:
            raise  # all ranks find it in the same numbers, before any of them has changed its state
        except Exception:
            # The ranks were interrupted at different places, and would continue with different vectors.
            self._rows = None
            self._num_steps = 0
            raise
        self._num_steps += 1
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """The vectors and numbers of the present cycle, on the CPU."""
        count = self._length + self._has_direction
        return {
            "rows": None if self._rows is None else self._rows[:count].cpu().clone(),
            "length": self._length,
            "projection": self._projection.clone(),
            "value": self._value,
            "residual": self._residual,
            "age": self._age,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rows = state["rows"]
        self._length = state["length"]
        self._has_direction = state["rows"] is not None and len(state["rows"]) > state["length"]
        self._projection = state["projection"].clone()
        self._value, self._residual, self._age = state["value"], state["residual"], state["age"]
        self._num_steps = state["num_steps"]

    def _fitted(self, space: VectorSpace) -> Tensor:
        """The storage; begins with a random vector, the first time and after parameters were frozen or unfrozen."""
        before = self._rows
        if before is not None and before.shape[1] == space.length:
            if len(before) == self._cycle + 1 and before.device == space.device and before.dtype == space.dtype:
                return before
            # After a resume: a checkpoint has only the rows in use, on the CPU.
            self._rows = space.empty(self._cycle + 1)
            self._rows[: len(before)] = before[: len(self._rows)]
            return self._rows
        self._rows = space.empty(self._cycle + 1)
        self._rows[0] = space.random(torch.Generator().manual_seed(self._seed))
        self._rows[0] /= space.norm(self._rows[0])
        self._projection = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
        self._length, self._has_direction = 1, False
        return self._rows

    def _next_cycle(self, space: VectorSpace, rows: Tensor) -> None:
        """Begin a cycle with the smallest Ritz vector, and with the direction in which it moved."""
        if self._length == 1:
            return
        smallest = torch.linalg.eigh(self._projection).eigenvectors[:, 0]
        # In coordinates of the basis, whose first row is the vector of the last cycle: that vector less its projection
        # on the new one. Kept as a direction, it makes a conjugate-gradient method of the descent.
        move = -smallest[0] * smallest
        move[0] += 1
        # Where the vector did not move, the direction would be 0/0.
        rotation = torch.stack([smallest, move / torch.linalg.vector_norm(move)]) if smallest[0].abs() < 1 else None
        if rotation is None or not bool(torch.isfinite(rotation).all()):
            rotation = smallest.reshape(1, -1)
        space.combine(rotation, [rows[: self._length]], [rows[: len(rotation)]])
        self._projection = rotation @ self._projection @ rotation.T
        self._length = len(rotation)
        # A rotation keeps rows orthonormal up to rounding, which would add up from cycle to cycle.
        for index in range(self._length):
            space.orthonormalise(rows[index], [rows[:index]])

    def _measure(self, operator: LinearOperator, space: VectorSpace, rows: Tensor) -> None:
        """Spend the product on the vector itself; the residual is the next direction."""
        column, norm, rest, residual = self._multiply(operator, space, rows, 0, self._length)
        self._projection[0], self._projection[:, 0] = column, column
        self._value, self._age = float(column[0]), 0
        # A residual below the rounding of the product is no bound of the eigenvalue's error.
        self._residual = max(residual, _rounding(space) * norm)
        self._look_on(space, rows, is_new=rest > _rounding(space) * norm)

    def _look_around(self, operator: LinearOperator, space: VectorSpace, rows: Tensor) -> None:
        """Spend the product on the new direction, which joins the basis."""
        length = self._length + 1
        column, norm, rest, _ = self._multiply(operator, space, rows, length - 1, length)
        self._length = length
        self._has_direction = False
        self._projection = torch.nn.functional.pad(self._projection, (0, 1, 0, 1))
        self._projection[-1], self._projection[:, -1] = column, column
        self._age += 1
        if self._age < self._cycle - 1:
            self._look_on(space, rows, is_new=rest > _rounding(space) * norm)

    def _multiply(
        self, operator: LinearOperator, space: VectorSpace, rows: Tensor, index: int, length: int
    ) -> tuple[Tensor, float, float, float]:
        """The product of a row with the numbers that follow from it, which are read from the device once.

        Args:
            operator: The operator.
            space: Its space.
            rows: The storage.
            index: The index of the row.
            length: The number of rows in the basis.

        Returns:
            The product's components along the basis, its norm, the norm of its part outside the basis, and the norm of
            the residual of the row. The part outside the basis is left in the row after the basis, if there is one.

        """
        basis = rows[:length]
        product = operator.matvec(rows[index])
        column = space.inner(basis, product)
        norms = [space.norm(product)]
        if length < len(rows):
            rest = rows[length]
            rest.copy_(product)
            del product  # or it would be one more vector of the model's size
            space.subtract(rest, column, basis)
            norms.append(space.norm(rest))
        # All decisions are made on these numbers: ranks that round differently would take different ones.
        numbers = space.agreed(torch.cat([column, torch.stack(norms).to(column)]))
        if not bool(torch.isfinite(numbers).all()):
            raise NonFiniteCurvatureError
        column, (norm, *further) = numbers[:length], numbers[length:].tolist()
        rest_norm = further[0] if further else 0.0
        others = torch.linalg.vector_norm(torch.cat([column[:index], column[index + 1 :]]))
        return column, norm, rest_norm, math.hypot(float(others), rest_norm)

    def _look_on(self, space: VectorSpace, rows: Tensor, *, is_new: bool) -> None:
        """Make the next direction of the part of a product outside the basis, or a random one if there is no such part.

        Without such a part the vector is an eigenvector, but perhaps not that of the smallest eigenvalue: only a random
        direction can show that there is a smaller one.
        """
        self._has_direction = self._length < min(space.size, len(rows))
        if self._has_direction:
            row = rows[self._length]
            if not is_new:
                row.copy_(space.random(torch.Generator().manual_seed(self._seed + self._num_steps + 1)))
            space.orthonormalise(row, [rows[: self._length]])


def _rounding(space: VectorSpace) -> float:
    """The size of a product's rounding errors, relative to its norm."""
    return 10 * torch.finfo(space.dtype).eps
