"""The critical sharpness of made-up steps, against closed forms of quadratics and a dense search."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lyapunov_lightning.callbacks.estimators import CriticalLearningRate, EstimatorSettings
from lyapunov_lightning.curvature.errors import MeasurementError, NonFiniteCurvatureError
from tests.callbacks.estimators.made_up import MadeUpRun, Valley

CONVEX = [9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.1]

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.5),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "two groups": lambda parameters: torch.optim.SGD([{"params": [next(parameters)], "lr": 0.01}, *groups(parameters)]),
}


def groups(parameters: Any) -> list[dict[str, Any]]:
    return [{"params": [parameter], "lr": 0.05} for parameter in parameters]


def run_of(optimizer: Any = "SGD", module: Valley | None = None, **settings: Any) -> MadeUpRun:
    module = module or Valley(spectrum=CONVEX)
    make = OPTIMIZERS.get(optimizer, optimizer) if isinstance(optimizer, str) else optimizer
    return MadeUpRun(CriticalLearningRate(EstimatorSettings(**settings)), module, make(module.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_quadratic_it_is_the_curvature_over_the_slope_along_the_update(name: str) -> None:
    run = run_of(name)
    highest = max(group["lr"] for group in run._optimizers[0].param_groups)
    for index in range(4):
        before, gradient = run.module.flat.detach(), run.module.gradient()
        found = run.step()
        update = (run.module.flat.detach() - before) / highest
        expected = float(update @ run.module.matrix @ update / -(gradient @ update))
        assert found.critical_sharpness == pytest.approx(expected, rel=0.021)
        assert abs(found.critical_sharpness - expected) <= found.value_error
        assert (found.step, found.converged, found.stability_limit) == (index, True, 2 / highest)
        assert found.stability_ratio == pytest.approx(highest * expected / 2, rel=0.021)
    assert run.moments == ["update"] * 4


def test_on_another_loss_it_is_where_a_fine_grid_finds_the_loss_back_at_its_beginning() -> None:
    run = run_of(module=Valley(quartic=0.3, spectrum=CONVEX), tol=1e-3)
    before, gradient = run.module.flat.detach(), run.module.gradient()
    found = run.step()
    etas = torch.logspace(-4, 0, 20_001, dtype=torch.float64)
    losses = torch.vmap(run.module.loss_at)(before - etas[:, None] * gradient)
    eta = float(etas[(losses > run.module.loss_at(before)).nonzero()[0]])
    assert 2 / found.critical_sharpness == pytest.approx(eta, rel=2e-3)


def test_the_parameters_stay_where_the_step_ended() -> None:
    run, other = run_of(), run_of()
    for _ in range(3):
        run.step()
        other.module.zero_grad()
        other.module.loss().backward()
        other._optimizers[0].step()
    assert torch.equal(run.module.flat, other.module.flat)


@pytest.mark.parametrize(("lr", "is_raised"), [(0.05, False), (0.9, True)])
def test_above_one_the_step_has_raised_the_loss(lr: float, is_raised: bool) -> None:
    run = run_of(lambda parameters: torch.optim.SGD(parameters, lr=lr))
    before = float(run.module.loss().detach())
    found = run.step()
    assert (found.stability_ratio > 1) is is_raised is (float(run.module.loss().detach()) > before)


def test_a_later_search_starts_where_the_last_one_ended() -> None:
    run, other = run_of(lambda parameters: torch.optim.SGD(parameters, lr=1e-4)), None
    first = run.step()
    second = run.step()
    assert second.forward_passes < first.forward_passes
    other = run_of(lambda parameters: torch.optim.SGD(parameters, lr=1e-4))
    other.step()
    fresh = MadeUpRun(CriticalLearningRate(EstimatorSettings()), other.module, *other._optimizers)
    fresh._trainer.global_step = 1
    fresh._estimator.parts()["critical"].load_state_dict(other._estimator.parts()["critical"].state_dict())
    assert fresh.step() == second


def test_uphill_there_is_no_value_and_a_limit() -> None:
    found = run_of(lambda parameters: torch.optim.SGD(parameters, lr=1e-3, maximize=True)).step()
    assert (found.critical_sharpness, found.converged, found.stability_ratio) == (None, False, None)
    assert found.stability_limit == 2 / 1e-3


def test_what_is_no_step_is_no_measurement() -> None:
    with pytest.raises(MeasurementError, match="did not move the parameters"):
        run_of().step(is_taken=False)
    with pytest.raises(MeasurementError, match=r"a learning rate of 0\.0"):
        run_of(lambda parameters: torch.optim.SGD(parameters, lr=0.0)).step()
    with pytest.raises(MeasurementError, match="lost in the rounding"):
        run_of(lambda parameters: torch.optim.SGD(parameters, lr=1e-17)).step()
    run = run_of()
    run.module.matrix = run.module.matrix * float("inf")
    with pytest.raises(NonFiniteCurvatureError, match="not finite after the step"):
        run.step()


def test_nothing_of_a_step_is_held_once_it_is_measured_or_given_up() -> None:
    run = run_of()
    run.step()
    assert run._estimator._before is None
    run._estimator.begin(run.at())
    run._estimator.forget()
    assert run._estimator._before is None


def test_it_is_of_one_optimizer_and_no_end_of_the_spectrum() -> None:
    module = Valley()
    estimator = CriticalLearningRate(EstimatorSettings())
    first, second = (torch.optim.SGD([parameter], lr=0.1) for parameter in module.parameters())
    for optimizers in ((), (first, second)):
        with pytest.raises(MisconfigurationException, match=f"here are {len(optimizers)}"):
            MadeUpRun(estimator, module, *optimizers)
    assert estimator.start(MadeUpRun(estimator, module, first)._trainer, "CurvatureProbe") is first
    with pytest.raises(ValueError, match="`end` should be 'largest' with"):
        CriticalLearningRate(EstimatorSettings(end="both"))
