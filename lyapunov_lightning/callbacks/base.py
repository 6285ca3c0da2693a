"""What every callback of this package does alike: check before it starts, share measurements, go on after a resume."""

from typing import Any, Optional, Protocol

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lyapunov_lightning.training.objective import trainable_parameters
from lyapunov_lightning.training.recording import Recorder
from lyapunov_lightning.training.series import SeriesFile
from lyapunov_lightning.training.sharing import Subscription


class Stateful(Protocol):
    """A part of a callback that goes on where it was in a resumed run."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept: tensors, numbers, strings, None, and lists and dictionaries of these."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a `state_dict`."""


class CurvatureCallback(Callback):
    """A callback that measures the curvature.

    Args:
        subscription: What it wants to be measured, and when.
        log_prefix: Put in front of every tag.
        table: The file that keeps all that is logged, if there is to be one.

    """

    def __init__(
        self, subscription: Subscription, log_prefix: Optional[str] = None, table: Optional[SeriesFile] = None
    ) -> None:
        super().__init__()
        self.subscription = subscription
        self._log_prefix = log_prefix
        self._recorder = Recorder(type(self).__name__, log_prefix, table)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self.subscription.problem.check_setup(trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.subscription.start(trainer, pl_module)
        self._recorder.start(trainer)
        self._recorder.layout(trainer, self)

    def charts(self) -> dict[str, dict[str, list[str]]]:
        """The curves that belong on one chart, for TensorBoard's custom scalars; by group and title."""
        return {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._stateful().items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state_dict[name])

    def _check_size(self, pl_module: "pl.LightningModule", num_eigenvalues: int) -> None:
        """Refuse to look for more eigenvalues than there are, for the hook ``on_train_start``.

        Raises:
            MisconfigurationException: With both numbers.

        """
        size = sum(parameter.numel() for parameter in trainable_parameters(pl_module).values())
        if num_eigenvalues > size:
            raise MisconfigurationException(
                f"`{type(self).__name__}` cannot find {num_eigenvalues} eigenvalues of a model with {size} trainable"
                " parameters. Ask for fewer."
            )

    def _check_alone(self, trainer: "pl.Trainer", reason: str) -> None:
        """Refuse a second callback of the same class, for the hook ``setup`` of one that acts.

        Raises:
            MisconfigurationException: With the reason.

        """
        count = sum(isinstance(callback, type(self)) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise MisconfigurationException(
                f"A Trainer can have one `{type(self).__name__}`, got {count}: {reason}. Remove all but one."
            )

    def _stateful(self) -> dict[str, Stateful]:
        """The parts that go on where they were in a resumed run."""
        return {"timetable": self.subscription.timetable}
