"""The rules by which `QuasiNewtonLRController` finds its learning rate: one file for each, and the table of all.

A rule is given a Hessian and the optimizer's updates, keeps what it needs for the next measurement, and returns the
learning rate that it proposes. It sets no learning rate and knows neither the callback nor the Trainer: bounds,
annealing and safeguard are in `training.optimizers.steering`, and formulas over plain numbers in `curvature.acting`.
"""

from typing import Literal

from lyapunov_lightning.callbacks.rules.along_update import AlongUpdate
from lyapunov_lightning.callbacks.rules.base import Proposal, Rule, Situation
from lyapunov_lightning.callbacks.rules.batch_sharpness import FollowBatchSharpness
from lyapunov_lightning.callbacks.rules.inverse_sharpness import InverseSharpness

RuleName = Literal["batch_sharpness", "along_update", "inverse_sharpness"]
"""The names in `RULES`, in words that type checkers and command lines read."""

RULES: dict[RuleName, type[Rule]] = {
    "batch_sharpness": FollowBatchSharpness,
    "along_update": AlongUpdate,
    "inverse_sharpness": InverseSharpness,
}
"""What the argument ``rule`` of `QuasiNewtonLRController` may be."""

__all__ = [
    "RULES",
    "AlongUpdate",
    "FollowBatchSharpness",
    "InverseSharpness",
    "Proposal",
    "Rule",
    "RuleName",
    "Situation",
]
