"""The stability limit of each optimizer of PyTorch, read off its settings and its state."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import LinearOperator, ScaledOperator
from lyapunov_lightning.curvature.stability.step_map import StepMap
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of

_SETTLED = 20
"""Steps after which an adaptive optimizer is judged by its divisor, a mean of so many squares: of normal ones it is off
by a third then, and in the first steps, where it is the gradient's own size, by any factor."""

_Group = Mapping[str, Any]
_State = Mapping[str, Any]
_Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Stability:
    """The stability of an optimizer's next steps: up to where the largest eigenvalue of a matrix may grow.

    The matrix is ``sign · diag(scale) H diag(scale) + diag(shift)``.

    Attributes:
        lr: The learning rate, the highest one of the parameter groups.
        limit: The eigenvalue at which the optimizer turns unstable, always positive; infinite where nothing moves.
        scale: ``P^{-1/2}`` as a flat vector of shape ``(n,)``, if the limit is one on ``P^{-1}H``, with what makes
            groups of different settings alike; None for ones.
        shift: What weight decay adds to the diagonal, of shape ``(n,)``; None for zeros. Where it is the same number
            for all parameters and `scale` is None, it is taken from the limit instead.
        sign: -1 for an optimizer that maximizes the loss, else 1.
        decay: What weight decay adds to the curvature and is taken from the limit, where that is done.
        maps: What the steps do, each kind once, with the pace of its parameters over the highest one.
        is_settled: Whether what divides the gradient is the mean of enough squares to judge by it.

    """

    lr: float
    limit: float
    scale: Tensor | None
    shift: Tensor | None = None
    sign: float = 1.0
    decay: float = 0.0
    maps: tuple[tuple[StepMap, float], ...] = ()
    is_settled: bool = True

    def limit_at(self, agreement: float) -> float:
        """The batch sharpness at which the optimizer turns unstable under mini-batches.

        The batch sharpness is that of the same matrix: ``dᵀ(H_B + D)d / g_Bᵀd`` along the step
        ``d = sign · diag(scale²) g_B`` that a mini-batch with gradient ``g_B`` asks for, ``D`` being the decay in the
        gradient where there is a `shift`. At an agreement of 1 this is `limit`.

        Args:
            agreement: How far the batches agree in their curvature: 1 for batches that are all of the data, towards 0
                for small ones. It counts for optimizers with momentum only.

        Raises:
            ValueError: If the agreement is not in (0, 1].

        """
        if not 0 < agreement <= 1:
            raise ValueError(f"`agreement` should be in (0, 1], got {agreement!r}.")
        # Groups whose momenta differ have no metric in common for all agreements. Each is compared with its own limit
        # in the classical metric, and the smallest limit counts, which is on the safe side.
        limits = (ratio * map.limit(agreement, self.decay) for map, ratio in self.maps)
        return min(limits, default=math.inf)

    @property
    def lasting_pace(self) -> float:
        """How far a gradient that lasts moves the parameters in a step, momentum included: ``η / (1 - m)`` for SGD.

        In the metric of `scale`, which holds the ratios of the groups already.

        """
        return max((map.lasting_pace / ratio for map, ratio in self.maps), default=0.0)

    @property
    def is_on_hessian(self) -> bool:
        """Whether the limit is one on the largest eigenvalue of the Hessian itself."""
        return self.scale is None and self.shift is None and self.sign == 1

    def matrix(self, hessian: LinearOperator) -> LinearOperator:
        """The matrix whose largest eigenvalue is to be compared with the limit."""
        return hessian if self.is_on_hessian else ScaledOperator(hessian, self.scale, self.shift, sign=self.sign)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The highest learning rate of the parameter groups; NaN for an optimizer without one."""
    return max(float(group.get("lr", "nan")) for group in optimizer.param_groups)


def stability_of(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    layout: FlatLayout | None = None,
    gradient: Tensor | None = None,
) -> Stability | None:
    """The stability limit of an optimizer as it is configured now.

    The corrections of Adam's second moment count, that of its first moment does not: it fades within a few times
    ``1 / (1 - β1)`` steps. A parameter that the optimizer does not have, or has not stepped yet as one that gets no
    gradient, does not move. Settings and counters that are tensors on an accelerator are read in one transfer.

    Args:
        optimizer: The optimizer.
        parameters: The parameters of the Hessian, in the order of its coordinates.
        layout: How they form a vector, such as `HessianOperator.layout`; made from the parameters if None.
        gradient: The gradient of the coming step, of shape ``(n,)``, which an adaptive optimizer counts in before it
            divides by its moments: on small batches the divisor of a seldom used weight is mostly that. Left out of it
            if None; others do not need it.

    Returns:
        The limit, or None where it is not known: for optimizers that are not in this module's table, subclasses of
        those in it included; for a learning rate of zero; for an adaptive optimizer before its first step; for a
        momentum above 1 and a decoupled weight decay of ``ηw ≥ 2``, which diverge whatever the curvature; and where
        some groups maximize the loss that others minimize, which is a game, and no matrix is symmetric that decides on
        it.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.stability import stability_of
        >>> x = torch.zeros(3, requires_grad=True)
        >>> stability_of(torch.optim.SGD([x], lr=0.1, momentum=0.9), [x]).limit
        38.0

    """
    # By the very type: a subclass may make other steps, and a wrong limit is worse than none.
    rule = _RULE_OF_OPTIMIZER.get(type(optimizer))
    if rule is None:
        return None
    layout = FlatLayout(parameters) if layout is None else layout
    groups, states = _in_numbers(optimizer, parameters)
    lr = max(group["lr"] for group in groups)
    if not lr > 0 or any(rule.diverges(group) for group in groups):
        return None
    place = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    owners = [groups[place[id(p)]] if id(p) in place else None for p in parameters]
    trained = [(owner, state) for owner, state in zip(owners, states, strict=True) if owner is not None]
    age = max((float(state.get("step", 0)) for _, state in trained), default=0.0)
    if gradient is not None and rule.is_adaptive:
        pieces = layout.split(gradient.to(layout.device))
        states = [
            state if owner is None else rule.seen(owner, state, piece, parameter)
            for owner, state, piece, parameter in zip(owners, states, pieces, parameters, strict=True)
        ]
        trained = [(owner, state) for owner, state in zip(owners, states, strict=True) if owner is not None]
    if trained and not any(rule.has_started(state) for _, state in trained):
        return None
    moves = [_move(rule, owner, state) for owner, state in zip(owners, states, strict=True)]
    highest = max((move.pace for move in moves if move is not None), default=0.0)
    if not highest:
        return Stability(lr, math.inf, None)
    signs = {move.sign for move in moves if move is not None}
    if len(signs) > 1:
        return None
    limit, sign = 1 / highest, signs.pop()
    ratios = [0.0 if move is None else move.pace / highest for move in moves]
    decays = [0.0 if move is None else move.decay for move in moves]
    is_settled = not rule.is_adaptive or age >= _SETTLED
    paired = zip(moves, ratios, strict=True)
    maps = tuple(dict.fromkeys((move.map, ratio) for move, ratio in paired if move is not None))
    # What is the same for all parameters is taken from the limit and not added to the matrix, which then is the Hessian
    # itself. Not where the decay alone exceeds the limit: a limit has to be positive.
    if not rule.is_adaptive and len(set(ratios)) == len(set(decays)) == 1 and decays[0] < limit:
        return Stability(lr, limit - decays[0], None, None, sign, decays[0], maps, is_settled)
    squares = _squares(rule, owners, states, ratios, parameters, layout)
    scale = None if not rule.is_adaptive and set(ratios) == {1.0} else layout.flatten(squares).sqrt_()
    shifts = [None if square is None or not w else square * w for square, w in zip(squares, decays, strict=True)]
    return Stability(lr, limit, scale, layout.flatten(shifts) if any(decays) else None, sign, 0.0, maps, is_settled)


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer of this kind divides the gradient by moments of it, as far as it is known."""
    rule = _RULE_OF_OPTIMIZER.get(type(optimizer))
    return rule is not None and rule.is_adaptive


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the stability limit of this kind of optimizer is known at all."""
    return type(optimizer) in _RULE_OF_OPTIMIZER


@dataclass(frozen=True)
class _Move:
    """How an optimizer moves a parameter, but for the division of its gradient.

    Attributes:
        map: What the step does along one direction.
        decay: The weight decay that is part of the gradient.
        sign: -1 if the parameter moves along the gradient, 1 if against it.

    """

    map: StepMap
    decay: float
    sign: float

    @property
    def pace(self) -> float:
        """One over the largest stable curvature."""
        return self.map.pace


def _move(rule: "_Rule", group: _Group | None, state: _State) -> _Move | None:
    """How a parameter moves; None if it does not."""
    if group is None or not rule.has_started(state):
        return None
    map = rule.map(group, state)
    # At a learning rate of 0; with a dampening of 1, too, for the momentum gets nothing then.
    if not map.pace:
        return None
    # What turns the sign of the gradient in the step, as a dampening above 1 does, turns that of the decay in it too.
    turn = -1.0 if map.pace < 0 else 1.0
    if turn < 0:  # seldom; a copy for each of 1,000 parameters would take 1.5 ms of a measurement
        map = replace(map, now=-map.now, later=-map.later)
    return _Move(map, turn * rule.decay(group), -turn if group.get("maximize") else turn)


class _Rule:
    """The rule of SGD, and the base of the others."""

    is_adaptive = False

    def has_started(self, state: _State) -> bool:
        """Whether the optimizer's state shows how it divides the gradient."""
        return True

    def seen(self, group: _Group, state: dict[str, Any], gradient: Tensor, parameter: Tensor) -> dict[str, Any]:
        """The state as the coming step divides by it, with that step's own gradient counted in.

        What `response` reads, the number of steps before it, is left under ``"step"``; ``"counted"`` is how many
        gradients the moments hold.

        """
        own = local_of(parameter)
        # As a parameter that gets no gradient. Of a sharded one that may be so on one rank and not on another, and all
        # have to take it for the same.
        if own is parameter and not self.has_started(state) and not gradient.any():
            return state
        gradient = gradient.reshape(own.shape) if gradient.shape != own.shape else gradient
        if group.get("maximize"):
            gradient = -gradient
        decay = self.decay(group)
        if decay:
            gradient = gradient + decay * own.detach().to(gradient)
        step = state.get("step", 0)
        return {**state, **self.moments(group, state, gradient), "step": step, "counted": step + 1}

    def moments(self, group: _Group, state: _State, gradient: Tensor) -> dict[str, Tensor]:
        """The moments that `divisors` reads, with a further gradient counted in."""
        raise NotImplementedError

    def map(self, group: _Group, state: _State) -> StepMap:
        """What the step does, before any division of the gradient."""
        now, later, memory = self.response(group, state)
        rate = self.rate(group, state)
        return StepMap(rate * now, rate * later, memory, self.kept(group))

    def rate(self, group: _Group, state: _State) -> float:
        """The learning rate of the next step."""
        return float(group["lr"])

    def kept(self, group: _Group) -> float:
        """What decoupled weight decay leaves of a parameter."""
        return 1.0 - group["lr"] * group["weight_decay"] if self.is_decoupled(group) else 1.0

    def decay(self, group: _Group) -> float:
        """The weight decay that is part of the gradient."""
        return 0.0 if self.is_decoupled(group) else float(group["weight_decay"])

    def diverges(self, group: _Group) -> bool:
        """Whether the step diverges without any curvature."""
        return group.get("momentum", 0) > 1 or self.kept(group) <= -1

    def is_decoupled(self, group: _Group) -> bool:
        """Whether weight decay acts on the parameters, not on the gradient."""
        return bool(group.get("decoupled_weight_decay"))

    def response(self, group: _Group, state: _State) -> tuple[float, float, float]:
        """What a gradient of 1 moves now and in the next step, per unit of the rate, and what the momentum keeps."""
        momentum: float = group["momentum"]
        # PyTorch's step is η(g + m·b) with the buffer b ← m·b + g: 1 + m now, and m² of it in the next step.
        if group["nesterov"]:
            return 1 + momentum, momentum**2, momentum
        share = 1 - group["dampening"] if momentum else 1.0  # without momentum PyTorch does not dampen
        return share, momentum * share, momentum

    def divisors(self, group: _Group, states: Sequence[_State], dtype: torch.dtype) -> _Tensors:
        """What each parameter's gradient is divided by in the update, for the parameters of one group."""
        raise NotImplementedError


class _Adam(_Rule):
    """The divisor is that of the coming step."""

    is_adaptive = True

    def moments(self, group: _Group, state: _State, gradient: Tensor) -> dict[str, Tensor]:
        beta2: float = group["betas"][1]
        found = {"exp_avg_sq": _averaged(state.get("exp_avg_sq"), gradient.square(), beta2)}
        if group.get("amsgrad"):
            found["max_exp_avg_sq"] = _highest(state.get("max_exp_avg_sq"), found["exp_avg_sq"])
        return found

    def has_started(self, state: _State) -> bool:
        return "exp_avg_sq" in state

    def response(self, group: _Group, state: _State) -> tuple[float, float, float]:
        beta1: float = group["betas"][0]
        return 1 - beta1, beta1 * (1 - beta1), beta1

    def divisors(self, group: _Group, states: Sequence[_State], dtype: torch.dtype) -> _Tensors:
        name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        # Of Adam's corrections the one of the second moment (D. Kingma, J. Ba, 2015, Algorithm 1): at β2 = 0.999 the
        # moment is a thousandth of the square of the gradient after the first step.
        corrections = [1 - group["betas"][1] ** _count(state) for state in states]
        return _rooted(torch._foreach_div([state[name].to(dtype) for state in states], corrections), group["eps"])


class _AdamW(_Adam):
    def is_decoupled(self, group: _Group) -> bool:
        return True


class _NAdam(_Adam):
    """Its momentum grows with the steps, and is applied one step ahead, as Nesterov's is."""

    def response(self, group: _Group, state: _State) -> tuple[float, float, float]:
        beta1: float = group["betas"][0]
        decay: float = group["momentum_decay"]
        step: float = state["step"]
        # μ_t = β1 (1 - 0.96^(tψ) / 2) of T. Dozat, "Incorporating Nesterov momentum into Adam", 2016, for the next step
        # and the one after it: the counter is that of the last step.
        now, ahead = (beta1 * (1 - 0.5 * math.pow(0.96, count * decay)) for count in (step + 1, step + 2))
        return 1 - now + ahead * (1 - beta1), ahead * beta1 * (1 - beta1), beta1


class _RAdam(_Adam):
    """Without a divisor in the first steps, whose second moment is too noisy; then with a rectified one."""

    def divisors(self, group: _Group, states: Sequence[_State], dtype: torch.dtype) -> _Tensors:
        beta2: float = group["betas"][1]
        longest = 2 / (1 - beta2) - 1
        divisors = []
        for state in states:
            step = state["step"] + 1
            # The length of the approximated moving average, ρ_t of L. Liu et al., "On the variance of the adaptive
            # learning rate and beyond", 2020. The paper rectifies from 4 on, PyTorch from 5.
            length = longest - 2 * step * beta2**step / (1 - beta2**step)
            moment = state["exp_avg_sq"].to(dtype)
            if length > 5:
                rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                corrected = (1 - beta2 ** _count(state)) * rectified
                divisors.append(moment.sqrt().add_(group["eps"]).div_(corrected**0.5))
            else:
                divisors.append(torch.ones_like(moment))
        return divisors


class _Adamax(_Adam):
    def has_started(self, state: _State) -> bool:
        return "exp_inf" in state

    def moments(self, group: _Group, state: _State, gradient: Tensor) -> dict[str, Tensor]:
        latest = gradient.abs() + group["eps"]
        before = state.get("exp_inf")
        return {"exp_inf": latest if before is None else torch.maximum(before.to(latest) * group["betas"][1], latest)}

    def divisors(self, group: _Group, states: Sequence[_State], dtype: torch.dtype) -> _Tensors:
        # PyTorch adds `eps` to each gradient before it takes the maximum: it is in there already.
        return [state["exp_inf"].to(dtype) for state in states]


class _RmsProp(_Rule):
    is_adaptive = True

    def has_started(self, state: _State) -> bool:
        return "square_avg" in state

    def moments(self, group: _Group, state: _State, gradient: Tensor) -> dict[str, Tensor]:
        found = {"square_avg": _averaged(state.get("square_avg"), gradient.square(), group["alpha"])}
        if group["centered"]:
            found["grad_avg"] = _averaged(state.get("grad_avg"), gradient, group["alpha"])
        return found

    def response(self, group: _Group, state: _State) -> tuple[float, float, float]:
        momentum = float(group["momentum"])
        return 1.0, momentum, momentum

    def divisors(self, group: _Group, states: Sequence[_State], dtype: torch.dtype) -> _Tensors:
        moments: _Tensors = [state["square_avg"].to(dtype) for state in states]
        if group["centered"]:
            means = [state["grad_avg"].to(dtype) for state in states]
            moments = torch._foreach_sub(moments, torch._foreach_mul(means, means))
            moments = torch._foreach_clamp_min(moments, 0.0)  # rounding
        return _rooted(moments, group["eps"])


class _Adagrad(_Rule):
    is_adaptive = True

    def has_started(self, state: _State) -> bool:
        # The sum is there from the beginning, before any gradient.
        return "sum" in state and _count(state) > 0

    def moments(self, group: _Group, state: _State, gradient: Tensor) -> dict[str, Tensor]:
        return {"sum": state["sum"].to(gradient) + gradient.square()}

    def rate(self, group: _Group, state: _State) -> float:
        # PyTorch divides by 1 + (step - 1) · lr_decay with the step counted first: for the next step, by the steps so
        # far.
        return super().rate(group, state) / (1 + float(state["step"] * group["lr_decay"]))

    def response(self, group: _Group, state: _State) -> tuple[float, float, float]:
        return 1.0, 0.0, 0.0

    def divisors(self, group: _Group, states: Sequence[_State], dtype: torch.dtype) -> _Tensors:
        return _rooted([state["sum"].to(dtype) for state in states], group["eps"])


_RULE_OF_OPTIMIZER: dict[type[torch.optim.Optimizer], _Rule] = {
    torch.optim.SGD: _Rule(),
    torch.optim.Adam: _Adam(),
    torch.optim.AdamW: _AdamW(),
    torch.optim.NAdam: _NAdam(),
    torch.optim.RAdam: _RAdam(),
    torch.optim.Adamax: _Adamax(),
    torch.optim.RMSprop: _RmsProp(),
    torch.optim.Adagrad: _Adagrad(),
}


def _in_numbers(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The settings of the groups and the parameters' states, with Python numbers for what may be tensors of one number.

    Learning rates, decays and betas may be tensors, and the counters of steps are; on an accelerator every one that is
    read for itself waits for all work that is queued there.
    """
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    states = [
        {name: local_of(value) for name, value in optimizer.state.get(parameter, {}).items()}
        for parameter in parameters
    ]
    settings = chain.from_iterable(
        value if isinstance(value, tuple) else (value,) for group in groups for value in group.values()
    )
    counters = (state["step"] for state in states if "step" in state)
    tensors = {id(value): value for value in chain(settings, counters) if isinstance(value, Tensor)}
    numbers = dict(zip(tensors, _numbers(tensors.values()), strict=True))

    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, tuple) else numbers.get(id(value), value)

    for state in states:
        if "step" in state:
            state["step"] = plain(state["step"])
    return [{name: plain(value) for name, value in group.items()} for group in groups], states


def _numbers(tensors: Iterable[Tensor]) -> list[float]:
    """Tensors of one number each as Python numbers, in one transfer from each device that holds some."""
    tensors = list(tensors)
    found = [0.0] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[place].detach().reshape(1) for place in places]).tolist()
        for place, number in zip(places, together, strict=True):
            found[place] = number
    return found


def _squares(
    rule: _Rule,
    owners: Sequence[_Group | None],
    states: Sequence[_State],
    ratios: Sequence[float],
    parameters: Sequence[Tensor],
    layout: FlatLayout,
) -> list[Tensor | None]:
    """The square of the scale for each parameter; None for one that does not move."""
    squares: list[Tensor | None] = [None] * len(parameters)
    for group in {id(owner): owner for owner in owners if owner is not None}.values():
        places = [index for index, owner in enumerate(owners) if owner is group and ratios[index]]
        if not places:
            continue
        if rule.is_adaptive:
            divisors = rule.divisors(group, [states[place] for place in places], layout.dtype)
            kept = [ratios[place] for place in places]
            found: _Tensors = torch._foreach_mul(torch._foreach_reciprocal(divisors), kept)
        else:
            found = [
                torch.full_like(local_of(parameters[p]), ratios[p], dtype=layout.dtype, requires_grad=False)
                for p in places
            ]
        for place, square in zip(places, found, strict=True):
            squares[place] = square
    return squares


def _count(state: _State) -> float:
    """How many gradients the moments hold."""
    count: float = state.get("counted", state.get("step", 0))
    return count


def _averaged(before: Tensor | None, latest: Tensor, decay: float) -> Tensor:
    """A running average, from zero where there is none yet, with a further value counted in."""
    return latest * (1 - decay) if before is None else before.to(latest).lerp(latest, 1 - decay)


def _highest(before: Tensor | None, latest: Tensor) -> Tensor:
    return latest if before is None else torch.maximum(before.to(latest), latest)


def _rooted(moments: _Tensors, eps: float) -> _Tensors:
    return torch._foreach_add(torch._foreach_sqrt(moments), eps)
