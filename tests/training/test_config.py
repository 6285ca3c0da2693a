"""Equal configurations are one, and their values are checked."""

import pytest

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
        ({"mode": "test"}, "`mode` should be one of train, eval, got 'test'"),
        ({"method": "exact"}, "`method` should be one of auto, .* got 'exact'"),
        ({"num_batches": 0}, "`num_batches` should be a positive int, got 0"),
        ({"fraction": 0}, r"`fraction` should be in \(0, 1\], got 0"),
        ({"fraction": 1.5}, r"`fraction` should be in \(0, 1\], got 1.5"),
        ({"fraction": float("nan")}, r"`fraction` should be in \(0, 1\], got nan"),
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
