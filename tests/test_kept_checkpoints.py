"""Checkpoints that an earlier state of the package wrote resume in this one, as if nothing had happened.

`tests.data.checkpoints` says how they were written. What is kept under a name and restored from it is a promise: a new
name is no trouble, as long as what stands under the old one is read.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.data.checkpoints import OURS, RUNS, fit, kept

KEPT = kept()

PRECONDITIONED = tuple(f"preconditioned_{name}" for name in ("lambda_max", "residual", "value_error"))

NOT_COMPARED = ("seconds", "matvecs", "block_matvecs", "stability_limit", "stability_ratio", *PRECONDITIONED)
"""Tags that a faster machine or a better solver changes, and those that mean something else by now: the limit was that
for all of the data, whatever the batches, the ratio was the eigenvalue's alone, and the gradient of the step was not
counted in what divides it."""

UP_TO_SIGN = ("descent_step",)
"""Numbers along an eigenvector, whose sign means nothing."""


class Restored(Callback):
    """What the callbacks hold when their states have been read, before anything is done with them."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.states = {
            callback.state_key: callback.state_dict()
            for callback in trainer.callbacks
            if type(callback).__name__ in OURS
        }


def resumed(name: str, step: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run came to that goes on from a checkpoint, and the states that it went on from."""
    path, restored = folder / "kept.ckpt", Restored()
    torch.save(KEPT[name]["checkpoints"][step], path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        end = fit(RUNS[name], folder, restored, ckpt_path=path)
    return end, restored.states


def is_empty(kept: Any) -> bool:
    """Whether a part of a state holds nothing, as that of an estimator which was not asked for."""
    return all(map(is_empty, kept.values())) if isinstance(kept, dict) else kept is None or kept == 0


def assert_holds(state: Any, kept: Any, where: str) -> None:
    """All that was kept is there, to the bit. There may be more, and what held nothing may be gone."""
    if isinstance(kept, dict):
        assert isinstance(state, dict), where
        for key, value in kept.items():
            is_of_no_vector = "vector" in kept and kept["vector"] is None  # then the rest says nothing
            if is_of_no_vector or (key not in state and isinstance(value, dict) and is_empty(value)):
                continue
            assert key in state, f"{where}: {key} is not kept any more"
            assert_holds(state[key], value, f"{where}/{key}")
    elif isinstance(kept, (list, tuple)):
        assert len(state) == len(kept), where
        for index, (here, there) in enumerate(zip(state, kept, strict=True)):
            assert_holds(here, there, f"{where}/{index}")
    elif isinstance(kept, Tensor):
        torch.testing.assert_close(state, kept, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert state == kept or (state != state and kept != kept), where


def assert_same_numbers(found: dict[str, float], kept: dict[str, float], where: str) -> None:
    """The same numbers under all tags that were kept, but for what differs from one processor to another."""
    found = {tag: value for tag, value in found.items() if tag in kept}
    compared = [
        {tag: abs(value) if tag.endswith(UP_TO_SIGN) else value for tag, value in metrics.items()}
        for metrics in (found, kept)
    ]
    for metrics in compared:
        for tag in [tag for tag in metrics if tag.rpartition("/")[2] in NOT_COMPARED]:
            del metrics[tag]
    assert compared[0] == pytest.approx(compared[1], rel=1e-5, abs=1e-6, nan_ok=True), where


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, run in RUNS.items() for step in run.at])
def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_state_of_the_package(name, step, tmp_path):
    before = KEPT[name]
    after, states = resumed(name, step, tmp_path)
    assert_holds(states, before["checkpoints"][step]["callbacks"], name)
    assert [len(results) for results in after["results"]] == [len(results) for results in before["results"]]
    for mine, theirs in zip(after["results"], before["results"], strict=True):
        for found, expected in zip(mine, theirs, strict=True):
            assert_same_numbers(found, expected, f"{name}: the result of step {expected['step']}")
    logged = {at: metrics for at, metrics in before["logged"].items() if at >= step}
    assert after["logged"].keys() == logged.keys()
    for at, metrics in logged.items():
        assert_same_numbers(after["logged"][at], metrics, f"{name}: what is logged at step {at}")
    torch.testing.assert_close(after["parameters"], before["parameters"], rtol=1e-6, atol=1e-8)
    assert after["learning_rates"] == pytest.approx(before["learning_rates"], rel=1e-6)


def test_every_callback_has_a_checkpoint():
    found = {
        key.partition("{")[0] for run in KEPT.values() for c in run["checkpoints"].values() for key in c["callbacks"]
    }
    assert found == {*OURS}
    assert KEPT.keys() == RUNS.keys()
