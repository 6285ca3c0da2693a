"""Results are kept in their order, thinned out in a very long run, and go through a checkpoint."""

import io
import math
import sys
from dataclasses import dataclass

import pytest
import torch

from lyapunov_lightning.training import results
from lyapunov_lightning.training.results import Result, Results, finite, known, ranked


@dataclass(frozen=True, kw_only=True)
class Found(Result):
    values: tuple[float, ...] = ()


def test_results_go_through_a_checkpoint():
    first, second = Results(Found), Results(Found)
    for step in range(3):
        first.add(Found(step=step, epoch=step / 2, values=(1.0 * step,)))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.items == first.items


def test_a_table_without_pandas_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"`results.to_pandas` needs pandas. .* `pip install pandas`"):
        Results(Found).items.to_pandas()


def test_a_very_long_run_stays_in_view(monkeypatch):
    monkeypatch.setattr(results, "_MOST_KEPT", 10)
    kept = Results(Found)
    for step in range(100):
        kept.add(Found(step=step, epoch=0.0))
        assert len(kept.items) <= 10
    steps = [result.step for result in kept.items]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 99)


def test_numbers_are_told_under_their_tags():
    assert ranked("spectrum/lambda", [3.0, 1.0]) == {"spectrum/lambda_1": 3.0, "spectrum/lambda_2": 1.0}
    assert known({"a": 1, "b": None}) == {"a": 1.0}
    assert [finite(value) for value in (0.5, math.nan, -math.inf)] == [0.5, None, None]
