"""A plane that stays what it was at one step, so that a training leaves a path on it.

Eigenvectors turn as a training goes on, and positions along those of two steps cannot be compared. So the axes of the
first step are kept, two vectors of the size of the parameters, and of every later one the two components along them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lyapunov_lightning.curvature.directions.plane import PlaneAxes
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian


class FixedPlane:
    """The axes of a plane, as they were at the step at which they were first asked for.

    Attributes:
        step: That step; None before.

    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._names: list[str] = []
        self._vectors: Tensor | None = None

    def axes(self, operator: LossHessian, step: int, make: Callable[[], PlaneAxes]) -> PlaneAxes:
        """The axes.

        Args:
            operator: The Hessian at the present parameters.
            step: The present step.
            make: Makes axes, where there are none yet, or none of the present parameters: some were frozen or unfrozen
                since, and a new path begins.

        """
        if self._vectors is None or self._vectors.shape[1] != operator.space.length:
            made = make()
            self.step, self._names, self._vectors = step, list(made.names), made.vectors
        # Moved to the device once, after a resume, and kept there.
        self._vectors = self._vectors.to(operator.device, operator.dtype)
        first, second = self._names
        return PlaneAxes((first, second), self._vectors)

    def state_dict(self) -> dict[str, Any]:
        """The axes, on the CPU."""
        return {
            "step": self.step,
            "names": self._names,
            "vectors": None if self._vectors is None else self._vectors.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step, self._names, self._vectors = state["step"], state["names"], state["vectors"]
