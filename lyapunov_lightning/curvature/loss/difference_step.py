"""How long the step of a finite difference should be, found out by a few of them.

The central difference of gradients over ``h`` errs by ``h²`` times a fourth derivative of the loss, and by the rounding
of the gradients over ``h``. Neither is known beforehand: on a sharp transformer in float32 the best step is a hundredth
of the best one on a small network. But with a quarter of the step 15/16 of the first error are gone, so that the
difference changes by nearly all that was wrong with it: the changes from step to step say where the error is least.

With kinks, as ReLU has them, there is no best step. The fewer of them lie within the step, the more each of them
counts, until suddenly none is left in this direction while some remain in others: the changes do not become smaller, or
they do all at once, and no smaller after that. There the first, long step is kept.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lyapunov_lightning.curvature.vectors.space import VectorSpace

FIRST_STEPS = {torch.float32: 5e-2, torch.float64: 4e-6}
"""The longest step to be tried, where parameters are neither very small nor very large; in float32 the papers' Δq."""

_STEP_RATIO = 4
"""By how much a step is shorter than the one before it."""

_MAX_CHANGES = 5
"""How many times it is made shorter at most."""

_SMALL_CHANGE = 1e-2
"""A change of the product, relative to it, at which the shorter step is short enough: a sixteenth of the change is left
as an error, and several times as much in the directions where the loss is least like a parabola."""

_TOLERABLE_CHANGE = 5e-2
"""A change that is good enough where rounding does not allow for a smaller one."""

_SUDDEN_DROP = 64
"""A change that is so many times smaller than the one before is no error that falls with ``h²``, which would make it 16
times smaller, or some 30 times where ``h⁴`` counts as well: the last kink has left the step."""


def first_step(parameters: Iterable[Tensor], space: VectorSpace) -> float:
    """The longest step to be tried: longer for many or large parameters, and never longer than they are themselves.

    Args:
        parameters: What the loss is a function of. Those that are not trained do not count.
        space: Has norms, and makes ranks agree.

    """
    trained = [parameter.detach() for parameter in parameters if parameter.requires_grad]
    # A step has to be far above the rounding of each parameter, so the coarsest dtype decides.
    narrow = any(parameter.dtype != torch.float64 for parameter in trained)
    longest = FIRST_STEPS[torch.float32 if narrow else torch.float64]
    if not trained:
        return longest
    norms = torch.stack([space.norm(parameter.reshape(-1)).to(space.device) for parameter in trained])
    norm = float(space.agreed(torch.linalg.vector_norm(norms)[None]))
    return longest * min(max(1.0, norm / 500), norm) if norm else longest


def fitting_step(
    difference: Callable[[Tensor, float], Tensor], gradient: Tensor, longest: float, space: VectorSpace
) -> float:
    """The step at which differences of gradients err least, see above.

    Args:
        difference: The product with a vector by a difference over a step, with the step as its length.
        gradient: The gradient, which lies where the curvature is large.
        longest: The first step to be tried.
        space: The space of the vectors.

    Returns:
        One of `longest`, a quarter of it, and so on; `longest` where a shorter one is not seen to be better.

    """
    if not float(space.agreed(space.norm(gradient)[None])):
        gradient = space.random(torch.Generator().manual_seed(0))
    # A product turns towards the directions of large curvature: there the loss bends most, and there solvers look.
    direction = difference(gradient, longest)
    steps, changes = [longest], []
    coarse = difference(direction, longest)
    for _ in range(_MAX_CHANGES):
        steps.append(steps[-1] / _STEP_RATIO)
        fine = difference(direction, steps[-1])
        length, change = space.agreed(torch.stack([space.norm(fine), space.norm(coarse.sub_(fine))])).tolist()
        coarse = fine
        changes.append(change / length if length else change)
        if not changes[-1] < float("inf") or _is_settled(changes):  # NaN compares false, and ends it as well
            break
    return steps[_best(changes)]


def _is_settled(changes: list[float]) -> bool:
    """Whether it is known what the best step is."""
    *before, change = changes
    if before and before[-1] <= _TOLERABLE_CHANGE and change > before[-1]:  # nothing but rounding is left
        return True
    return change <= _SMALL_CHANGE and not _is_sudden(changes, len(before))


def _best(changes: list[float]) -> int:
    """Which step errs least, by its place."""
    if not all(change < float("inf") for change in changes):
        return 0
    lowest = min(range(len(changes)), key=changes.__getitem__)
    if changes[lowest] > _TOLERABLE_CHANGE or _is_sudden(changes, lowest):
        return 0
    if lowest + 1 == len(changes):
        return lowest + 1
    # What goes with h² is known from the longer steps, what goes with 1/h from the shorter ones.
    truncation = min([changes[lowest], *(change / _STEP_RATIO**2 for change in changes[:lowest][-1:])])
    rounding = changes[lowest + 1] / _STEP_RATIO**2
    return lowest + (max(truncation, rounding) > max(truncation / _STEP_RATIO**2, rounding * _STEP_RATIO))


def _is_sudden(changes: list[float], place: int) -> bool:
    return place > 0 and changes[place - 1] > _SUDDEN_DROP * changes[place]
