"""The probe's Lyapunov exponents, and what its estimators cost."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lyapunov_lightning import CurvatureProbe, HessianConfig
from lyapunov_lightning.training.replica.objective import TrainingObjective
from tests.callbacks.probing import Fit, Reference, all_near, name_of, sgd, two_groups
from tests.modules import SmallRegressor, regression_loader

# The Lyapunov estimator.


@pytest.mark.parametrize(("dropout", "iterations", "settled"), [(0.0, 60, 8), (0.3, 400, 0)])
def test_lyapunov_converges_to_the_largest_eigenvalue(fit: Fit, dropout: float, iterations: int, settled: int) -> None:
    # The parameters stay where they are. With dropout each step has a Hessian of its own, so one probe must suffice.
    reference = Reference()
    probe = CurvatureProbe(1, "lyapunov", tol=1e-3, iterations=iterations, delta_q=1e-5)
    module, loader = SmallRegressor(sgd(lr=1e-12), dropout), regression_loader(batch_size=48)
    logger = fit(module, reference, probe, loader=loader, max_steps=settled + 1).logger
    steps = range(settled, settled + 1)
    largest = {step: reference.largest[step] for step in steps}
    assert {step: logger.curve("curvature/lambda_max")[step] for step in steps} == pytest.approx(largest, rel=1e-3)
    assert {logger.curve("curvature_details/converged")[step] for step in steps} == {1.0}
    assert all_near([logger.curve("curvature/lyapunov_exponent")[step] for step in steps], 1, abs=1e-2)
    h0 = {step: (math.e - 1) / largest[step] for step in steps}
    assert {step: logger.curve("curvature/inverse_h0")[step] for step in steps} == pytest.approx(h0, rel=2e-2)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> "Counter[int]":
    """How often the training step was replayed, by optimizer step."""
    counts: Counter[int] = Counter()
    evaluated = TrainingObjective.evaluated

    def counting(objective: TrainingObjective, *args: Any) -> Any:
        counts[objective._trainer.global_step] += 1
        return evaluated(objective, *args)

    monkeypatch.setattr(TrainingObjective, "evaluated", counting)
    return counts


GAUGE = 1
"""Replays for the batch sharpness of a batch: of its gradient, with the graph that its product is taken from. As many
for another batch that it is compared with, as it is here at the second and the third measurement."""

SYMMETRY = 8
"""Those that show once, when an exponent has come to rest, whether that is at an eigenvalue."""


@pytest.mark.parametrize(
    ("options", "first", "later", "module"),
    [
        ({}, 2, 1, {}),
        ({}, 2, 1, {"dropout": 0.3}),
        ({}, 2, 1, {"optimizer": sgd(momentum=0.9)}),
        ({"iterations": 3}, 4, 3, {"optimizer": sgd(momentum=0.9)}),
        ({"end": "both"}, 3, 2, {"dropout": 0.3}),
        ({"hessian": HessianConfig("fixed", 1)}, 2, 2, {}),
    ],
    ids=name_of,
)
def test_lyapunov_reuses_the_gradient_of_the_step(
    fit: Fit, replays: Any, options: dict[str, Any], first: int, later: int, module: dict[str, Any]
) -> None:
    fit(SmallRegressor(**module), CurvatureProbe(4, "lyapunov", **options), gradient_clip_val=1e-3)
    first, later = first + GAUGE, later + 2 * GAUGE
    assert [replays[step] for step in range(12)] == [first, 0, 0, 0, later, 0, 0, 0, later, 0, 0, 0]


def test_lyapunov_follows_the_mean_over_all_accumulated_batches(fit: Fit, replays: Any) -> None:
    # An epoch of 20, 20 and 8 samples, the last one a step by itself: `.grad` is half of its gradient.
    reference = Reference()
    probe = CurvatureProbe(1, "lyapunov", delta_q=1e-6, iterations=200)
    loader = regression_loader(batch_size=20)
    logger = fit(SmallRegressor(), reference, probe, loader=loader, accumulate_grad_batches=2, max_steps=2).logger
    assert len(reference.largest) == 2
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-3)
    assert replays[0] == 2 * (201 + GAUGE + SYMMETRY)


class ScaledGradients(SmallRegressor):
    """Its gradients after the backward pass are not those of its loss."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (3 * loss).backward()


def test_lyapunov_computes_the_gradient_where_the_step_has_another_one(fit: Fit, replays: Any) -> None:
    reference = Reference()
    probe = CurvatureProbe(1, "lyapunov", delta_q=1e-6, iterations=200)
    logger = fit(ScaledGradients(), reference, probe, max_steps=2).logger
    assert [replays[step] for step in range(2)] == [201 + GAUGE + SYMMETRY, 201 + 2 * GAUGE]
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-3)


@pytest.mark.parametrize(("lr", "momentum"), [(0.4, 0.0), (0.1, 0.5)])
def test_training_map_finds_the_smallest_eigenvalue_with_the_rate_and_momentum_of_the_optimizer(
    fit: Fit, lr: float, momentum: float
) -> None:
    reference = Reference()
    module = SmallRegressor(sgd(lr=lr, momentum=momentum), linear=True)
    probe = CurvatureProbe(1, "lyapunov", "smallest", iterations=40, tol=1e-3)
    logger = fit(module, reference, probe, loader=regression_loader(batch_size=48)).logger
    assert logger.curve("curvature/lambda_min")[11] == pytest.approx(reference.smallest[11], rel=1e-3)
    assert logger.curve("curvature_details/converged")[11] == 1.0
    # the larger root of the characteristic polynomial of heavy ball, μ² - (1 + m - αh) μ + m = 0
    trace = 1 + momentum - lr * reference.smallest[11]
    growth = (trace + math.sqrt(trace**2 - 4 * momentum)) / 2
    assert logger.curve("curvature/lyapunov_exponent")[11] == pytest.approx(math.log(growth), rel=1e-3)


def test_training_map_that_oscillates_is_not_passed_off_as_converged(fit: Fit) -> None:
    # With much momentum every direction swings, the roots of the polynomial are complex and no growth settles.
    reference = Reference()
    module = SmallRegressor(sgd(lr=0.4, momentum=0.5), linear=True)
    probe = CurvatureProbe(1, "lyapunov", "smallest", iterations=40)
    logger = fit(module, reference, probe, loader=regression_loader(batch_size=48)).logger
    found, bottom = logger.curve("curvature/lambda_min"), reference.smallest[11]
    wrong = [step for step, value in found.items() if value != pytest.approx(bottom, rel=0.1)]
    assert wrong
    assert not any(logger.curve("curvature_details/converged")[step] for step in wrong)


def test_training_map_beyond_the_edge_of_stability_finds_the_largest_eigenvalue(fit: Fit) -> None:
    reference = Reference()
    module = SmallRegressor(sgd(lr=3.0), linear=True)
    probe = CurvatureProbe(
        1, "lyapunov", "smallest", iterations=40, hessian=HessianConfig(loss_fn=lambda m, b: m.loss_at_hand(b))
    )
    module.loss_at_hand = lambda batch: nn.functional.mse_loss(module(batch[0]), batch[1])
    logger = fit(module, reference, probe, loader=regression_loader(batch_size=48), max_steps=4).logger
    assert 3.0 * reference.largest[3] > 2
    assert logger.curve("curvature/lambda_max")[3] == pytest.approx(reference.largest[3], rel=1e-3)
    assert "curvature/lambda_min" not in logger.tags


@pytest.mark.parametrize("end", ["smallest", "both"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p),
        sgd(momentum=0.9, nesterov=True),
        sgd(momentum=0.9, dampening=0.5),
        two_groups,
    ],
    ids=["adamw", "nesterov", "dampening", "groups"],
)
def test_training_map_of_another_optimizer_than_sgd_is_refused(fit: Fit, end: str, optimizer: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`CurvatureProbe.* the map of SGD.*Use `estimator="):
        fit(SmallRegressor(optimizer), CurvatureProbe(1, "lyapunov", end))


# Cost.


@pytest.mark.parametrize("estimator", ["lanczos", "power"])
def test_later_probes_need_fewer_products_than_the_first(fit: Fit, estimator: str) -> None:
    module = SmallRegressor(sgd(lr=0.02))
    logger = fit(module, CurvatureProbe(1, estimator), loader=regression_loader(batch_size=48)).logger
    first, *later = logger.curve("curvature_details/matvecs").values()
    assert max(later) < first


def test_probe_builds_the_graph_of_the_gradient_once(fit: Fit, replays: Any) -> None:
    logger = fit(SmallRegressor(), CurvatureProbe(1, "lanczos", "both", eigenvalue_every=1)).logger
    # And a gradient and a graph of the batch before it, at the measurements that compare the two.
    is_compared = [step in (1, 2, 3, 8) for step in range(12)]
    assert [replays[step] for step in range(12)] == [1 + GAUGE * compared for compared in is_compared]
    assert min(logger.curve("curvature_details/matvecs").values()) > 1
