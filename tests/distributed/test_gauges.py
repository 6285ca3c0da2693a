"""How near a training of several ranks is to its edge is what one process says that has all their batches."""

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.callbacks.results.probe import WHOLE_AGREEMENT
from tests.distributed import gauge_runs as runs
from tests.distributed.references import dense_hessian, gradient_at, loss_at, same, union_of

EPS = 1e-8
"""That of AdamW."""

AVERAGED = 8
"""Measurements, comparisons and steps that are averaged over."""

ROUNDING, SEARCHED = 1e-8, 1e-5
"""Relative errors: of sums in another order, and of what an eigenvalue is part of."""


def assert_same_everywhere(outcomes):
    first, *others = outcomes
    for other in others:
        for part in ("logged", "results", "state", "parameters"):
            assert same(first[part], other[part]), part
        assert not other["warned"]


@dataclass
class OneProcess:
    """What a process that has the batches of all ranks finds, from dense matrices.

    Args:
        outcomes: What the ranks trained on, and where.
        optimizer: A key of `gauge_runs.OPTIMIZERS`.
        accumulated: Batches of each rank in a step.
        clip: The length of the longest gradient.
        fixed: The data that batches are compared with.
        lost: Steps at which the batch before is not known any more.

    """

    outcomes: Sequence[dict[str, Any]]
    optimizer: str
    accumulated: int = 1
    clip: float = math.inf
    fixed: Any = None
    lost: Sequence[int] = ()
    seen: deque = field(default_factory=lambda: deque(maxlen=AVERAGED))
    compared: deque = field(default_factory=lambda: deque(maxlen=AVERAGED))
    steps: deque = field(default_factory=lambda: deque(maxlen=AVERAGED))
    moment: float | Tensor = 0.0
    eigenvalue: float = math.nan

    def results(self) -> Iterator[dict[str, float | None]]:
        parameters = self.outcomes[0]["parameters"]
        before, count = None, 0
        for step, place in enumerate(range(0, len(parameters) - 1, self.accumulated)):
            here, there = parameters[place], parameters[place + self.accumulated]
            batches = [o["batches"][p] for o in self.outcomes for p in range(place, place + self.accumulated)]
            own = union_of(batches)
            # Of the ranks' gradients DDP takes the plain mean, whatever their numbers of samples.
            gradient = torch.stack([gradient_at(here, batch) for batch in batches]).mean(0)
            clipping = min(1.0, self.clip / (float(gradient.norm()) + 1e-6))
            found: dict[str, float | None] = {"clipping": None if self.clip == math.inf else clipping}
            if self.optimizer == "unknown":
                found |= self.decrease(here, there, own)
            else:
                other = None if step in self.lost else before
                found |= self.sharpness(here, own, other if self.fixed is None else self.fixed, step, count)
                for name in ("noise_ratio", "stability_ratio"):
                    found[name] = None if found[name] is None else found[name] * clipping
                before, count = own, count + 1
            self.moment = runs.BETAS[1] * self.moment + (1 - runs.BETAS[1]) * (clipping * gradient) ** 2
            yield found

    def decrease(self, here: Tensor, there: Tensor, own: Any) -> dict[str, float | None]:
        self.steps.append((float(gradient_at(here, own) @ (there - here)), loss_at(there, own) - loss_at(here, own)))
        lost = 1 - sum(change for _, change in self.steps) / sum(slope for slope, _ in self.steps)
        return {"lost_decrease": lost, "stability_ratio": lost}

    def sharpness(self, here: Tensor, own: Any, other: Any, step: int, count: int) -> dict[str, float | None]:
        gradient, scale = gradient_at(here, own), torch.ones_like(here, dtype=torch.float64)
        if self.optimizer == "adamw":  # which counts the gradient of the step in
            moment = runs.BETAS[1] * self.moment + (1 - runs.BETAS[1]) * gradient**2
            scale = (torch.sqrt(moment / (1 - runs.BETAS[1] ** (step + 1))) + EPS) ** -0.5
        matrix, direction = scale[:, None] * dense_hessian(here, own) * scale, scale * gradient
        slope, curvature = float(direction @ direction), float(direction @ matrix @ direction)
        has_eigenvalue = step < 2 or step % runs.EIGENVALUE_EVERY == 0
        is_compared = len(self.compared) < 3 or count % 8 == 0
        if not (has_eigenvalue or is_compared):
            curvature = self.second_difference(here, own, scale * direction, slope)
        self.seen.append((slope, curvature))
        if other is not None and is_compared:
            across = scale * gradient_at(here, other)
            elsewhere = scale[:, None] * dense_hessian(here, other) * scale
            numbers = across @ direction, direction @ elsewhere @ direction, across @ matrix @ direction
            self.compared.append((*self.seen[-1], *map(float, numbers)))
        if has_eigenvalue:
            measured = matrix if self.fixed is None else dense_hessian(here, self.fixed)
            self.eigenvalue = float(torch.linalg.eigvalsh(measured)[-1])
        slopes, curvatures = map(sum, zip(*self.seen, strict=True))
        sharpness, number = curvatures / slopes, len(self.seen)
        left = sum((curvature - sharpness * slope) ** 2 for slope, curvature in self.seen)
        found: dict[str, float | None] = {
            "batch_sharpness": sharpness,
            "batch_sharpness_error": math.sqrt(number / (number - 1) * left) / slopes if number > 1 else None,
            "step_sharpness": self.seen[-1][1] / self.seen[-1][0],
            **dict.fromkeys(("batch_agreement", "stability_limit", "noise_ratio", "stability_ratio")),
        }
        if not self.compared:
            return found
        own_slope, own_curvature, progress, shared, crossed = map(sum, zip(*self.compared, strict=True))
        agreement = min(1.0, math.sqrt(max(1e-3, crossed / own_curvature) * max(1e-3, shared / own_curvature)))
        limit = self.limit(agreement)
        pace = runs.LR if self.optimizer == "adamw" else runs.LR / (1 - runs.MOMENTUM)
        is_progress = progress > 0
        noise = pace * (shared / own_curvature) * sharpness / (2 * progress / own_slope) if is_progress else None
        return found | {
            "batch_agreement": agreement,
            "stability_limit": limit,
            "noise_ratio": noise,
            "stability_ratio": max(sharpness, self.eigenvalue if agreement >= WHOLE_AGREEMENT else 0) / limit,
        }

    def limit(self, agreement: float) -> float:
        if self.optimizer == "adamw":
            beta = runs.BETAS[0]
            return 2 * (1 + beta) / (runs.LR * (1 + beta - 2 * beta * agreement))
        m = runs.MOMENTUM
        return 2 * (1 - m**2) / (runs.LR * (1 + m - 2 * m * agreement))

    def second_difference(self, here: Tensor, own: Any, step: Tensor, slope: float) -> float:
        """Over a fifth of the distance on which the slope is expected to change by its size."""
        slopes, curvatures = map(sum, zip(*self.seen, strict=True))
        expected, base = max(0.1 * self.limit(1.0), curvatures / slopes), loss_at(here, own)
        rounding = 400 * torch.finfo(torch.float64).eps * abs(base)
        distance = max(0.2 / expected, math.sqrt(rounding / (expected * slope)))
        around = [loss_at(here + sign * distance * step, own) for sign in (1, -1)]
        return (sum(around) - 2 * base) / distance**2


def assert_as_of(process: OneProcess, results: Sequence[Any]) -> None:
    for result, expected in zip(results, process.results(), strict=True):
        for name, value in expected.items():
            found = getattr(result, name)
            if value is None or found is None:
                assert found is value, (result.step, name)
            else:
                tolerance = SEARCHED if name == "stability_ratio" else ROUNDING
                assert found == pytest.approx(value, rel=tolerance), (result.step, name)


def process_of(found: Sequence[dict[str, Any]], optimizer: str, options: dict[str, Any], **more: Any) -> OneProcess:
    accumulated, clip = options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val", math.inf)
    return OneProcess(found, optimizer, accumulated, clip, **more)


@pytest.mark.parametrize("name", runs.OPTIMIZERS)
@pytest.mark.parametrize(("check", "settings"), [("gauges", runs.GAUGED), ("gauges_of_three", runs.OF_THREE)])
def test_gauges_are_those_of_one_process_with_the_batches_of_all_ranks(outcomes, check, settings, name):
    found = [outcome[name] for outcome in outcomes(check)]
    assert_same_everywhere(found)
    assert len(found[0]["results"]) == runs.NUM_STEPS
    assert_as_of(process_of(found, *settings[name]), found[0]["results"])


def test_steps_are_compared_with_the_fixed_data_of_all_ranks(outcomes):
    found = [outcome["fixed"] for outcome in outcomes("gauges")]
    assert_same_everywhere(found)
    fixed = union_of([batch for outcome in found for batch in outcome["measured"][0]])
    assert_as_of(OneProcess(found, "momentum", clip=runs.CLIP, fixed=fixed), found[0]["results"])


# Resuming.


def is_plain(state: Any) -> bool:
    if isinstance(state, dict):
        return all(isinstance(name, str) and is_plain(entry) for name, entry in state.items())
    if isinstance(state, (list, tuple)):
        return all(map(is_plain, state))
    return state is None or type(state) in (bool, int, float, str, Tensor)


@pytest.mark.parametrize("name", runs.RESUMED)
def test_averages_go_on_where_a_training_of_several_ranks_was_interrupted(outcomes, name):
    straight, resumed = ([outcome[f"{name}{which}"] for outcome in outcomes("gauges")] for which in ("", ", resumed"))
    assert_same_everywhere(resumed)
    assert 0 < len(resumed[0]["batches"]) < len(straight[0]["batches"])
    assert same(straight[0]["parameters"][-1], resumed[0]["parameters"][-1])
    # The batch that the first step is compared with is not in a checkpoint.
    assert_as_of(process_of(straight, *runs.GAUGED[name], lost=[3]), resumed[0]["results"])
    assert is_plain(outcomes("gauges")[0][f"{name}, kept"])


def test_averages_go_on_where_a_training_was_interrupted(outcomes):
    [outcome] = outcomes("gauges_of_one")
    straight, resumed = outcome["straight"], outcome["resumed"]
    assert same(straight["parameters"][-1], resumed["parameters"][-1])
    assert_as_of(process_of([straight], *runs.OF_ONE), straight["results"])
    assert_as_of(process_of([straight], *runs.OF_ONE, lost=[3]), resumed["results"])
    assert is_plain(outcome["kept"])


# What goes wrong.

FAILURES = [f"{optimizer}, {what}" for optimizer, evaluations in runs.EVALUATIONS.items() for what in evaluations]
FAILURES += [f"momentum, {what}" for what in runs.CALLS]


@pytest.mark.parametrize("what", FAILURES)
def test_a_gauge_that_fails_on_one_rank_ends_the_measurement_on_all_and_not_the_training(outcomes, what):
    first, second = found = [outcome[what] for outcome in outcomes("failing_gauges")]
    for part in ("logged", "results", "parameters"):
        assert same(first[part], second[part]), part
    assert [result.step for result in first["results"]] == [0, 1, 3]
    assert all(result.clipping is not None for result in first["results"])
    told = [[message for message in outcome["warned"] if "failed" in message] for outcome in found]
    assert [len(messages) for messages in told] == [1, 1]
    assert re.search("at step 2 failed.*PeerFailureError", told[0][0])
    assert re.search("at step 2 failed.*PlannedError", told[1][0])
    for outcome in outcomes("failing_gauges"):
        assert torch.equal(outcome[what]["parameters"][-1], outcome[f"{what.split(',')[0]}, without"])
