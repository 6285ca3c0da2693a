"""The learning rates of an optimizer's parameter groups, set together."""

from typing import Any

import torch
from torch import Tensor


class LearningRates:
    """The learning rates of an optimizer's parameter groups: the highest is set, the others keep their ratio to it.

    A group that is added in mid-run, by a callback that unfreezes layers for example, gets the ratio that its learning
    rate has when it is first seen. If its learning rate is the highest then, it becomes the one that is set.
    """

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._ratios: list[float] = []
        self._is_restored = False
        self._left: list[float] = []

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin a run, with the present ratios between the learning rates, or with the ratios of the checkpoint."""
        if not self._is_restored:
            self._ratios = []
        self._is_restored = False
        self._optimizer = optimizer
        self._admit_new_groups()
        self._left = self._present()

    def changed(self) -> float | None:
        """The highest learning rate that somebody else has set since they were last set or read here; None if none."""
        present = self._present()
        others = [now for now, left in zip(present, self._left, strict=False) if now != left]  # without new groups
        self._left = present
        return max(others, default=None)

    @property
    def highest(self) -> float:
        """The highest learning rate of the parameter groups."""
        return max(self._present())

    def set(self, highest: float) -> None:
        """Set all learning rates, the highest one to the given value."""
        self._admit_new_groups()
        for group, ratio in zip(self._groups(), self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                # In place: a compiled step, or one in a CUDA graph, reads this tensor and would not see another one.
                group["lr"].fill_(highest * ratio)
            else:
                group["lr"] = highest * ratio
        self._left = self._present()

    def state_dict(self) -> dict[str, Any]:
        """The ratios."""
        # They cannot be computed from the learning rates of the checkpoint: (lr · ratio) / lr differs from the ratio in
        # the last digit, and the resumed run from the one without a break.
        return {"ratios": list(self._ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._ratios = [*map(float, state["ratios"])]
        self._is_restored = True

    def _groups(self) -> list[dict[str, Any]]:
        assert self._optimizer is not None  # by `start`
        return self._optimizer.param_groups

    def _present(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups()]

    def _admit_new_groups(self) -> None:
        rates, known = self._present(), len(self._ratios)
        if len(rates) > known:
            unit = max(rates[:known] or rates)  # the learning rate whose ratio is 1 so far
            ratios = [*self._ratios, *(rate / unit for rate in rates[known:])]
            self._ratios = [ratio / max(ratios) for ratio in ratios]
