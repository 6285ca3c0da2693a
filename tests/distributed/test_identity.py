"""A distributed training is the same bit by bit without and with the callbacks that read, on every rank."""

import pytest
import torch

from tests.distributed import identity_runs as runs
from tests.distributed.references import same

PARTS = [
    "parameters",
    "gradients",
    "buffers",
    "optimizer",
    "logged",
    "callback metrics",
    "metrics",
    "losses",
    "hidden state",
    "generators",
    "steps",
]


@pytest.mark.parametrize("settings", runs.SETTINGS)
@pytest.mark.parametrize("part", PARTS)
def test_a_training_of_several_ranks_is_bit_identical_with_and_without_callbacks(outcomes, settings, part):
    for outcome in outcomes("identity"):
        found = outcome[settings]
        assert same(found["without"][part], found["with"][part])


@pytest.mark.parametrize("settings", runs.SETTINGS)
def test_bit_identity_is_of_a_training_that_did_something_and_was_measured(outcomes, settings):
    first, second = (outcome[settings] for outcome in outcomes("identity"))
    plain = first["without"]
    assert plain["steps"] == runs.SETTINGS[settings][1]["max_steps"]
    assert plain["measurements"] == 0
    assert first["with"]["measurements"] > plain["steps"]
    assert len(plain["logged"]) >= plain["steps"]
    assert not same(plain["losses"], second["without"]["losses"])  # the ranks saw different data
    assert same(plain["parameters"], second["without"]["parameters"])
    losses = torch.stack(plain["losses"])
    assert losses[-3:].mean() < losses[:3].mean()
    assert plain["hidden state"][0] == len(losses)
