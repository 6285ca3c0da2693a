"""The learning rates of an optimizer's groups, set together and put back."""

from typing import Any

import torch
from torch import Tensor


class LearningRates:
    """The learning rates of an optimizer's parameter groups, of which the highest is steered and the others follow.

    A group that is added in mid-run, by a callback that unfreezes layers for example, takes part with the ratio that
    its own learning rate had then. Should it have the highest one, it is the others that follow from then on.
    """

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._ratios: list[float] = []
        self._is_restored = False

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin a run: with the ratios that the learning rates have now, or with those of the checkpoint."""
        if not self._is_restored:
            self._ratios = []
        self._is_restored = False
        self._optimizer = optimizer
        self._admit_new_groups()

    @property
    def highest(self) -> float:
        """The highest one."""
        return max(self._present())

    def set(self, highest: float) -> None:
        """Change all of them, so that the highest is as given."""
        self._admit_new_groups()
        for group, ratio in zip(self._groups(), self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):  # as compiled and captured optimizers have it
                group["lr"].fill_(highest * ratio)
            else:
                group["lr"] = highest * ratio

    def state_dict(self) -> dict[str, Any]:
        """The ratios: what they were at the start cannot be had from the learning rates again to the last digit."""
        return {"ratios": list(self._ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._ratios = list(state["ratios"])
        self._is_restored = True

    def _groups(self) -> list[dict[str, Any]]:
        assert self._optimizer is not None  # by `start`
        return self._optimizer.param_groups

    def _present(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups()]

    def _admit_new_groups(self) -> None:
        rates, known = self._present(), len(self._ratios)
        if len(rates) > known:
            unit = max(rates[:known] or rates)  # the highest known one, to which the ratios are relative
            ratios = [*self._ratios, *(rate / unit for rate in rates[known:])]
            self._ratios = [ratio / max(ratios) for ratio in ratios]
