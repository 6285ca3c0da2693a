"""The learning rate from slope and curvature along the optimizer's own update."""

from typing import Any, ClassVar

from typing_extensions import override

from lyapunov_lightning.callbacks.rules.base import Proposal, Rule, Situation
from lyapunov_lightning.callbacks.rules.first_rate import first_rate
from lyapunov_lightning.curvature.acting.step_length import StepLength
from lyapunov_lightning.training.optimizers.steering import StepLengths
from lyapunov_lightning.training.optimizers.updates import SeenUpdate, slope_and_curvature

_FIRST_LR_SHARE = 0.3
"""The first learning rate, as a share of the longest step along the first update at which the loss falls."""

_LARGEST_RELATIVE_STEP = 0.05
"""Change of the parameters in one step, relative to their size, beyond which steps do not become longer: a parabola
says little of the loss so far away."""


class AlongUpdate(Rule):
    """Slope and curvature along the last update, which the next batch sees; see `StepLength`.

    "Stepping on the edge: curvature aware learning rate tuners" (V. Roulet et al., 2024).
    """

    every_n_steps: ClassVar[int] = 10
    first_n_steps: ClassVar[int] = 20  # most changes in these
    annealing: ClassVar[float] = 0.4
    begins_with_update: ClassVar[bool] = True
    follows_updates: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._length = StepLength()

    @override
    def measure(self, given: Situation) -> Proposal:
        return first_rate(given, _FIRST_LR_SHARE) if given.is_first else self._later(given)

    def _later(self, given: Situation) -> Proposal:
        """Slope and curvature along the last update; the learning rate itself moves in `follow`."""
        update, hessian = given.update, given.hessian
        # Before anything can fail: with the curvature of another update the slopes of this one would count wrongly.
        self._length.lose_curvature()
        if (
            update is None
            or len(update.vector) != hessian.space.length  # parameters were frozen or unfrozen since
            or not float(hessian.space.norm(update.vector)) > 0
        ):
            return Proposal(None, {"converged": False})
        slope_at_end, curvature = slope_and_curvature(hessian, update.vector, given.optimizer)
        # Per unit length, since the next slopes belong to updates of other lengths than this one.
        self._length.see_curvature(curvature / float(hessian.space.inner(update.vector, update.vector)))
        return Proposal(
            None,
            {
                "proposed": self._length.best_lr,
                "step_length": self._length.of(update.lr),
                # Along the parabola the slope has fallen by lr · uᵀHu from where the step began to where it ended.
                "slope_along_update": slope_at_end + update.lr * abs(curvature),
                "curvature_along_update": curvature,
            },
        )

    @override
    def follow(self, seen: SeenUpdate, lr: float) -> StepLengths | None:
        if not self._length.see_slope(seen.slope, squared_norm=seen.squared_norm, lr=lr):
            return None
        length, at_least = self._length.of(lr), self._length.at_least(lr)
        assert length is not None  # with slope and curvature
        assert at_least is not None
        may_grow = lr * seen.change <= _LARGEST_RELATIVE_STEP * seen.size
        return StepLengths(length, at_least, self._length.memory, may_grow)

    @override
    def forget(self) -> None:
        self._length = StepLength()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._length.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._length.load_state_dict(state)
