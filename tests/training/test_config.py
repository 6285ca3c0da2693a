"""Equal configurations are one, and their values are checked."""

import pytest
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, Schedule, SpectrumTracker, callbacks
from lyapunov_lightning.training.config import HessianConfig


def loss_fn(module, batch):
    return module(batch).sum()


def test_equal_configurations_are_one_key():
    config = HessianConfig("fixed", 4, loss_fn=loss_fn)
    assert {config: 1}[HessianConfig(data="fixed", num_batches=4, loss_fn=loss_fn)] == 1
    assert config != HessianConfig("fixed", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "all"}, "`data` should be one of batch, fixed, got 'all'"),
        ({"data": [1, 2]}, r"`data` should be 'batch', 'fixed' or a DataLoader, got \[1, 2\]"),
        ({"mode": "test"}, "`mode` should be one of train, eval, got 'test'"),
        ({"method": "exact"}, "`method` should be one of auto, .* got 'exact'"),
        ({"num_batches": 0}, "`num_batches` should be a positive int, got 0"),
        ({"fraction": 0}, r"`fraction` should be in \(0, 1\], got 0"),
        ({"fraction": 1.5}, r"`fraction` should be in \(0, 1\], got 1.5"),
        ({"fraction": float("nan")}, r"`fraction` should be in \(0, 1\], got nan"),
        ({"fraction": "0.5"}, r"`fraction` should be in \(0, 1\], got '0.5'"),
        ({"num_batches": 2, "fraction": 0.5}, "two sizes of the same data, got num_batches=2 and fraction=0.5"),
        (
            {"data": "batch", "num_batches": 3},
            "`num_batches=3` is a size of fixed data, and `data='batch'` is",
        ),
        ({"data": "batch", "fraction": 0.5}, "`fraction=0.5` is a size of fixed data"),
        ({"loss_fn": 3}, "`loss_fn` should be a function, got 3"),
        ({"batch_size_fn": "len"}, "`batch_size_fn` should be a function, got 'len'"),
        ({"compile": 1}, "`compile` should be a bool, got 1"),
        ({"seed": 0.5}, "`seed` should be an int, got 0.5"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HessianConfig(**options)


def test_a_size_is_kept_where_the_callback_fills_in_the_rest():
    defaults = {"data": "fixed", "fraction": 0.05, "mode": "train"}
    assert HessianConfig(num_batches=3).filled(**defaults) == HessianConfig("fixed", 3, mode="train")
    assert HessianConfig().filled(**defaults) == HessianConfig("fixed", fraction=0.05, mode="train")
    assert HessianConfig().filled(**{**defaults, "data": "batch"}) == HessianConfig("batch", mode="train")


def test_a_loader_is_taken_whole_and_by_its_identity():
    first, second = (DataLoader(range(6), 2) for _ in range(2))
    defaults = {"data": "batch", "fraction": 0.05, "mode": "train"}
    filled = HessianConfig(data=first).filled(**defaults)
    assert (
        filled == HessianConfig(first, fraction=1.0, mode="train") != HessianConfig(second, fraction=1.0, mode="train")
    )
    assert hash(filled) == hash(HessianConfig(first, fraction=1.0, mode="train"))
    assert HessianConfig(first, num_batches=2).filled(**defaults).fraction is None
    assert HessianConfig(DataLoader([])).filled(**defaults).data != "batch"


def test_a_size_is_refused_by_a_callback_that_measures_the_batch_of_the_step():
    with pytest.raises(ValueError, match=r"`num_batches=3` is a size of fixed data.*`data='fixed'`"):
        CurvatureProbe(hessian=HessianConfig(num_batches=3))
    with pytest.raises(ValueError, match="`data='fixed'` with `estimator='benettin'`"):
        SpectrumTracker(estimator="benettin", hessian=HessianConfig(data="fixed"))
    with pytest.raises(ValueError, match="not have data of its own with `estimator='benettin'`"):
        SpectrumTracker(estimator="benettin", hessian=HessianConfig(data=DataLoader(range(6))))


@pytest.mark.parametrize("name", callbacks.__all__)
def test_a_mapping_stands_for_a_configuration_and_for_a_schedule(name):
    kind = getattr(callbacks, name)
    hessian = {"data": "fixed", "num_batches": 2, "seed": 3}
    own = kind(schedule={"every_n_epochs": 2}, hessian=hessian)
    assert own.config == kind(hessian=HessianConfig(**hessian)).config
    assert own.schedule == Schedule(every_n_epochs=2)
    with pytest.raises(ValueError, match=r"`hessian` should have no other fields than data, .* got 'dat'"):
        kind(hessian={"dat": "fixed"})
