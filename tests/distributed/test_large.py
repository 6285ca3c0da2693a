"""The benchmark of large models measures a sharded decoder, and finds what it finds of the same model whole."""

from dataclasses import replace

import pytest

from benchmarks import large
from benchmarks.large import Options, setup_of, trained
from tests.distributed import large_runs as runs
from tests.distributed.ranks import WORLD_SIZE


@pytest.mark.filterwarnings("ignore:.*the Trainer has no logger")
def test_the_sharded_decoder_is_measured(outcomes, monkeypatch):
    whole = replace(setup_of("decoder1b", "toy", batch_size=2 * WORLD_SIZE), is_sharded=False)
    monkeypatch.setattr(large, "setup_of", lambda *_: whole)
    expected = trained(Options("decoder1b", "toy", repeats=1, ways=runs.WAYS[:1]))
    sharpness = expected.callbacks["sharpness"].results[0].lambda_max
    ranks = outcomes("sharded_decoder")
    for found in ranks:
        assert found["gathered"]["method"].endswith("on gathered parameters")
        assert found["on shards"]["method"].endswith("on shards")
        assert "`max_gather_bytes=0`" in found["on shards"]["about"]
        for name, outcome in found.items():
            assert outcome["parameters"] == expected.num_parameters
            assert outcome["rows"][0][0] == "sharpness"
            assert outcome["sharpness"] == pytest.approx(sharpness, rel=0.04), name
    assert ranks[0]["gathered"]["rows"][1][1].endswith(" forward passes")
    assert ranks[0]["gathered"]["sharpness"] == ranks[1]["gathered"]["sharpness"]
