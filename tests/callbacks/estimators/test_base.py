"""The table of estimators, and their protocol: old checkpoints fit, and one more takes a file and a line."""

import ast
import inspect
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.callbacks import curvature_probe
from lyapunov_lightning.callbacks.estimators import (
    ESTIMATORS,
    Estimator,
    EstimatorName,
    EstimatorSettings,
    MeasuredStep,
    Moment,
)
from lyapunov_lightning.callbacks.estimators.base import missed
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.callback import Stateful
from lyapunov_lightning.training.optimizers.own_gradient import OwnGradient
from tests.callbacks.probing import Fit, sgd
from tests.modules import SmallRegressor, dense_hessian

KEPT: dict[str, Any] = json.loads((Path(__file__).parent / "states_of_one_class.json").read_text())
"""The states of probes after 6 steps, from when all estimators were one class."""


def test_the_names_in_the_table_are_those_of_the_argument() -> None:
    assert set(ESTIMATORS) == set(get_args(EstimatorName))
    assert inspect.signature(CurvatureProbe).parameters["estimator"].annotation == EstimatorName


def test_the_probe_asks_no_estimator_for_its_name() -> None:
    constants = [node.value for node in ast.walk(ast.parse(inspect.getsource(curvature_probe))) if is_name(node)]
    assert constants == ["lanczos"]  # the default of the argument


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in ESTIMATORS


def tensors(state: Any) -> Any:
    """A state as a checkpoint has it, of one that was written as text."""
    if isinstance(state, dict):
        if set(state) == {"tensor"}:
            return torch.tensor(state["tensor"], dtype=torch.float64)
        return {name: tensors(value) for name, value in state.items()}
    return [tensors(value) for value in state] if isinstance(state, list) else state


def texts(state: Any) -> Any:
    if isinstance(state, Tensor):
        return {"tensor": state.tolist()}
    if isinstance(state, dict):
        return {name: texts(value) for name, value in state.items()}
    return [texts(value) for value in state] if isinstance(state, (list, tuple)) else state


def of_what_was_kept(state: Any, kept: Any) -> Any:
    """A state without the entries that an earlier one does not have."""
    if isinstance(state, dict):
        return {name: of_what_was_kept(value, kept[name]) for name, value in state.items() if name in kept}
    if isinstance(state, list):
        return [of_what_was_kept(*both) for both in zip(state, kept, strict=True)]
    return state


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_state_from_before_the_estimators_is_taken_up(name: EstimatorName) -> None:
    kept = KEPT[name]
    probe = CurvatureProbe(1, name, **kept["options"])
    fresh = texts(probe.state_dict())
    probe.load_state_dict(tensors(kept["state"]))
    state = texts(probe.state_dict())
    assert state.pop("version") == 1
    # What was not measured then begins as in a new probe, and is not known of its results.
    assert {
        part: state.pop(part) for part in ("cadence", "sharpness", "decrease", "step_gradient", "step_loss")
    }.items() <= fresh.items()
    unknown = asdict(ProbeResult(step=0, epoch=0.0))
    for result, before in zip(state["results"]["items"], kept["state"]["results"]["items"], strict=True):
        assert all(result[field] == unknown[field] for field in set(result) - set(before))
    assert of_what_was_kept(state, kept["state"]) == {part: kept["state"][part] for part in state}
    # Left out: trackers that the estimator never used, and that had never seen an operator.
    assert {part: kept["state"][part] for part in set(kept["state"]) - set(state)} in (
        {},
        {"power": {"start": None, "count": 0}},
        {"start": {"vector": None}},
    )
    assert len(probe.results) == 6


@pytest.mark.parametrize(("moment", "reason"), [("gradient", "no backward pass"), ("update", "did not move")])
def test_a_moment_that_did_not_come_is_a_failure_with_its_reason(moment: Moment, reason: str) -> None:
    with pytest.raises(MeasurementError, match=reason):
        missed(moment)


class AlongTheGradient(Estimator):
    """A fifth estimator: the curvature of the batch's loss along the optimizer's direction, averaged over the probes.

    ``dᵀHd / gᵀd`` with the training's own gradient g and ``d = g``. It needs what the batch sharpness needs: the step's
    own gradient, exact products after the backward pass, and a mean that goes on in a resumed run.

    """

    def __init__(self, settings: EstimatorSettings) -> None:
        super().__init__(settings)
        self._own_gradient = OwnGradient()
        self._mean = Mean()

    def begin(self, at: MeasuredStep) -> Moment:
        return "gradient" if self._own_gradient.may_fit(at.step.trainer) else "start"

    def measure(self, at: MeasuredStep) -> ProbeResult:
        is_there = at.moment == "gradient"
        gradient = self._own_gradient.take(at.hessian) if is_there else at.hessian.gradient()
        with at.watched() as operator:
            product = operator.matvec(gradient)
        space = at.hessian.space
        mean = self._mean.of(float(space.inner(gradient, product) / space.inner(gradient, gradient)))
        step = at.step
        limits = at.limits(at.stability())
        return ProbeResult(
            step=step.index, epoch=step.epoch, lambda_max=mean, decisive_eigenvalue=mean, converged=True, **limits
        )

    def parts(self) -> dict[str, Stateful]:
        return {"own_gradient": self._own_gradient, "mean": self._mean}


class Mean:
    def __init__(self) -> None:
        self.values: list[float] = []

    def of(self, value: float) -> float:
        self.values.append(value)
        return math.fsum(self.values) / len(self.values)

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])


def test_one_more_estimator_needs_nothing_of_the_probe(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[float] = []

    class Dense(SmallRegressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            _, hessian = dense_hessian(self, batch)
            with torch.enable_grad():
                loss = torch.nn.functional.mse_loss(self(batch[0]), batch[1])
                gradients = torch.autograd.grad(loss, list(self.parameters()))
            gradient = torch.cat([part.reshape(-1) for part in gradients])
            expected.append(float(gradient @ hessian @ gradient / (gradient @ gradient)))

    monkeypatch.setitem(ESTIMATORS, "power", AlongTheGradient)
    probe = CurvatureProbe(1, "power")
    logger = fit(Dense(sgd(lr=0.05)), probe, gradient_clip_val=1e-2).logger
    means = {step: math.fsum(expected[: step + 1]) / (step + 1) for step in range(12)}
    assert len(probe.results) == 12
    assert logger.curve("curvature/lambda_max") == pytest.approx(means, rel=1e-6)
    clipping = logger.curve("curvature_details/clipping")
    assert logger.curve("curvature_details/eigenvalue_ratio") == pytest.approx(
        {s: 0.025 * v * clipping[s] for s, v in means.items()}, rel=1e-6
    )
    assert set(probe.state_dict()) >= {"own_gradient", "mean"}
    assert probe.plot().axes[0].lines[0].get_label() == "sharpness"
    other = CurvatureProbe(1, "power")
    other.load_state_dict(probe.state_dict())
    assert other._estimator.parts()["mean"].state_dict() == probe._estimator.parts()["mean"].state_dict()
