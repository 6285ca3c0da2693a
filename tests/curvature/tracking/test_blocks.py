"""Diagonal blocks: their parameters, and their largest eigenvalues over a training."""

import io
from typing import Any

import pytest
import torch

from lyapunov_lightning.curvature.tracking.blocks import BlockTrackers, check_groups, parameter_blocks
from tests.curvature.helpers import DenseOperator, symmetric_matrix

NAMES = ["embed.weight", "net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "scale"]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (None, {}),
        ("modules", {"embed": NAMES[:1], "net": NAMES[1:5], "scale": NAMES[5:]}),
        (1, {"embed": NAMES[:1], "net": NAMES[1:5], "scale": NAMES[5:]}),
        (2, {"embed": NAMES[:1], "net.0": NAMES[1:3], "net.2": NAMES[3:5], "scale": NAMES[5:]}),
        ("layers", {"embed": NAMES[:1], "net.0": NAMES[1:3], "net.2": NAMES[3:5], "scale": NAMES[5:]}),
        ({"biases": "*.bias", "first": "net.0.*"}, {"biases": [NAMES[2], NAMES[4]], "first": NAMES[1:3]}),
        ({"all": "*", "none": "head.*"}, {"all": NAMES, "none": []}),
        ({"case": "NET.*"}, {"case": []}),
    ],
    ids=["none", "modules", "depth 1", "depth 2", "layers", "patterns", "empty", "case"],
)
def test_blocks_have_the_parameters_of_their_pattern(groups: Any, expected: dict[str, list[str]]) -> None:
    assert parameter_blocks(iter(NAMES), groups) == expected


def test_a_layer_within_a_layer_is_one_of_its_own() -> None:
    names = ["block.scale", "block.attention.query.weight", "block.attention.query.bias"]
    assert parameter_blocks(names, "layers") == {"block": names[:1], "block.attention.query": names[1:]}
    assert parameter_blocks(names, 2) == {"block": names[:1], "block.attention": names[1:]}


@pytest.mark.parametrize("groups", [0, -1, True, "layer", 1.5, ["net.*"]])
def test_other_groups_are_refused(groups: Any) -> None:
    with pytest.raises(ValueError, match="`groups` should be 'layers', 'modules', the depth of the modules, or"):
        check_groups(groups)


def test_each_block_is_followed_on_its_own_and_goes_on_from_its_state() -> None:
    spectra = {"a": torch.linspace(-1, 3, 40), "b": torch.linspace(-5, 2, 30)}
    matrices = {name: symmetric_matrix(spectrum) for name, spectrum in spectra.items()}
    trackers = BlockTrackers(tol=1e-6)
    first = {name: trackers.measure(name, DenseOperator(matrix)) for name, matrix in matrices.items()}
    for name, value in (("a", 3.0), ("b", 2.0)):
        assert float(first[name].largest) == pytest.approx(value, rel=1e-6)
    file = io.BytesIO()
    torch.save(trackers.state_dict(), file)
    file.seek(0)
    restored = BlockTrackers(tol=1e-6)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for name, matrix in matrices.items():
        again, resumed = (each.measure(name, DenseOperator(matrix)) for each in (trackers, restored))
        assert again.num_matvecs < first[name].num_matvecs
        assert resumed.num_matvecs == again.num_matvecs
        assert torch.equal(resumed.values, again.values)
