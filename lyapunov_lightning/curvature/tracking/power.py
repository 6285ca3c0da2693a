"""The largest eigenvalue of an operator that changes slowly, for one product a measurement.

A power iteration that never ends: the product that measures the vector also moves it on. A little of the gradient is
mixed in at each step. It keeps a vector that lies along an eigenvector of a smaller eigenvalue from staying there, and
where a training turns unstable it is the direction in which it does.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of

_FIRST_PRODUCTS = 8
"""Products at the first measurement, when the vector is the gradient."""

_SHARE_OF_GRADIENT = 0.1
"""Share of the gradient's direction in the next vector: of the eigenvalue it costs a hundredth."""


class PowerIteration:
    """Follows the eigenvalue of largest size, with one product a step.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator
        >>> from lyapunov_lightning.curvature.tracking.power import PowerIteration
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> iteration = PowerIteration()
        >>> round(iteration.step(hessian, hessian.gradient()), 1)
        4.0

    """

    def __init__(self) -> None:
        self._vector: Tensor | None = None

    def step(self, operator: LinearOperator, gradient: Tensor) -> float:
        """The size of the eigenvalue, ``‖Mv‖`` for the unit vector ``v`` that is followed.

        Args:
            operator: The symmetric operator ``M`` as it is now.
            gradient: A direction to begin with and to mix in, of shape ``(n,)``.

        Raises:
            NonFiniteCurvatureError: If the product or the gradient is not finite; the vector is forgotten.

        """
        space = space_of(operator)
        norm = float(space.norm(gradient))
        vector, count = self._vector, 1
        if vector is None or vector.shape != gradient.shape:
            vector, count = gradient / norm if norm > 0 else None, _FIRST_PRODUCTS
        self._vector = None
        if vector is None:
            return 0.0
        size = 0.0
        for _ in range(count):
            product = operator.matvec(vector.to(gradient))
            size = float(space.norm(product))
            if not (math.isfinite(size) and math.isfinite(norm)):
                raise NonFiniteCurvatureError("The product of the followed vector is not finite.")
            if not size:
                return 0.0
            mixed = product / size
            if norm > 0:
                mixed = mixed + gradient * (_SHARE_OF_GRADIENT / norm)
            vector = mixed / space.norm(mixed)
        self._vector = vector
        return size

    def state_dict(self) -> dict[str, Any]:
        """The vector, on the CPU."""
        return {"vector": None if self._vector is None else self._vector.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        vector = state["vector"]
        is_whole = isinstance(vector, Tensor) and bool(torch.isfinite(vector).all())
        self._vector = vector if is_whole else None
