r"""Where an optimizer's present learning rate turns unstable.

On a quadratic with curvature ``h`` a training step multiplies the error by a number that depends on ``ηh`` and the
optimizer's momentum; the iteration diverges once its modulus exceeds 1. The largest stable ``h``:

=======================================  =================================
optimizer                                stability limit
=======================================  =================================
SGD                                      ``2 / η``
SGD, momentum ``m``, dampening ``d``     ``(2 + 2m) / ((1 - d) η)``
SGD, Nesterov momentum ``m``             ``(2 + 2m) / ((1 + 2m) η)``
Adam, AdamW                              ``(2 + 2β1) / ((1 - β1) η)``
RMSprop, momentum ``m``                  ``(2 + 2m) / η``
=======================================  =================================

For an adaptive optimizer it is to be compared with the largest eigenvalue of the preconditioned Hessian ``P^{-1}H``,
where ``P`` divides the gradient in its update (J. Cohen et al., "Adaptive gradient methods at the edge of stability",
2022); likewise ``P`` is the ratio of learning rates where parameter groups differ in theirs. Weight decay that is part
of SGD's gradient adds to the curvature and lowers the limit on that of the loss by as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.vectors import FlatLayout


@dataclass(frozen=True)
class Stability:
    """The stability of an optimizer's next step.

    Attributes:
        lr: The learning rate, the highest one of the parameter groups.
        limit: The eigenvalue at which it turns unstable.
        scale: ``P^{-1/2}`` as a flat vector of shape ``(n,)``, if the limit is one on ``P^{-1}H``; None if it is one on
            the Hessian itself.

    """

    lr: float
    limit: float
    scale: Tensor | None


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The highest learning rate of the parameter groups; NaN for an optimizer without one."""
    return max(float(group.get("lr", "nan")) for group in optimizer.param_groups)


def stability_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Stability | None:
    """The stability limit of an optimizer as it is configured now.

    Args:
        optimizer: The optimizer.
        parameters: The parameters of the Hessian, in the order of its coordinates.

    Returns:
        The limit, or None where it is not known: for other optimizers than those of this module's table and subclasses
        of them, for groups that differ in momentum, for a learning rate of zero, and for an adaptive optimizer before
        its first step.

    """
    rule = _RULES.get(type(optimizer))
    lr = learning_rate(optimizer)
    if rule is None or not lr > 0 or any(group.get("maximize") for group in optimizer.param_groups):
        return None
    factors = {rule.factor(group) for group in optimizer.param_groups}
    if len(factors) != 1:
        return None
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales: list[Tensor] = []
    for parameter in parameters:
        group = groups.get(id(parameter))
        if group is None:  # not trained by this optimizer
            scales.append(torch.zeros_like(parameter))
            continue
        divisor = rule.divisor(optimizer.state.get(parameter, {}), group)
        if divisor is None:
            return None
        scales.append((torch.as_tensor(float(group["lr"]) / lr, device=parameter.device) / divisor).sqrt())
    limit = factors.pop() / lr - rule.added_curvature(optimizer.param_groups)
    if all(scale.ndim == 0 for scale in scales) and len({float(scale) for scale in scales}) == 1:
        return Stability(lr, limit, None)
    full = [scale.expand(parameter.shape) for scale, parameter in zip(scales, parameters, strict=True)]
    return Stability(lr, limit, FlatLayout(parameters).flatten(full))


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the stability limit of this kind of optimizer is known at all."""
    return type(optimizer) in _RULES


class _Sgd:
    def factor(self, group: dict[str, Any]) -> float:
        momentum = float(group["momentum"])
        if group["nesterov"]:
            return (2 + 2 * momentum) / (1 + 2 * momentum)
        return (2 + 2 * momentum) / (1 - float(group["dampening"])) if momentum else 2.0

    def divisor(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        return torch.ones(())

    def added_curvature(self, groups: Sequence[dict[str, Any]]) -> float:
        return max(float(group["weight_decay"]) for group in groups)


class _Adam:
    def factor(self, group: dict[str, Any]) -> float:
        beta1 = float(group["betas"][0])
        return (2 + 2 * beta1) / (1 - beta1)

    def divisor(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        """The divisor of the next step but for that step's own gradient, which is not known yet."""
        if "exp_avg_sq" not in state:
            return None
        second_moment: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        correction: float = 1 - group["betas"][1] ** float(state["step"])
        return (second_moment / correction).sqrt().add(group["eps"])

    def added_curvature(self, groups: Sequence[dict[str, Any]]) -> float:
        return 0.0


class _RmsProp(_Adam):
    def factor(self, group: dict[str, Any]) -> float:
        return 2 + 2 * float(group["momentum"])

    def divisor(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
        if "square_avg" not in state:
            return None
        second_moment: Tensor = state["square_avg"]
        if group["centered"]:
            second_moment = second_moment - state["grad_avg"].square()
        return second_moment.sqrt().add(group["eps"])


_RULES: dict[type[torch.optim.Optimizer], Any] = {
    torch.optim.SGD: _Sgd(),
    torch.optim.Adam: _Adam(),
    torch.optim.AdamW: _Adam(),
    torch.optim.RMSprop: _RmsProp(),
}
