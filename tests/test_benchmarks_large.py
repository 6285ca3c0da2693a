"""The benchmark of large models runs at toy size and says what was measured; the sharded one is in `distributed`."""

import inspect
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import large
from benchmarks.large import CRITICAL, PLAIN, WARM, Found, Meter, Options, outcome_of, setup_of, trained
from benchmarks.report import load
from lyapunov_lightning.curvature import lanczos

DENSITY = "density, 32 products"


def test_gpt2_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["products", CRITICAL, "sharpness", "10 + 3 eigenpairs"]
    options = ["--model", "gpt2", "--scale", "toy", "--repeats", "2", "--root", str(tmp_path), "--offload"]
    large.main([*options, "--kept", str(tmp_path), "--ways", *ways])
    run = load(tmp_path / "large-gpt2-toy.json")
    (outcome,) = run.outcomes
    assert run.markdown() in capsys.readouterr().out
    assert "random text" in outcome.about
    assert "`offload=True`" in outcome.about
    figures = {figure.name: figure.sample.values for figure in outcome.figures}
    assert figures["waits of the host within a product"] == (0.0,)
    assert all(ratio > 0 for ratio in figures["a product, in gradients"])
    (table,) = outcome.tables
    assert [row[0] for row in table.rows] == ways[1:]
    for _, counts, accurate, first, later, *memory in table.rows[1:]:
        assert all(int(count) >= 4 for count in counts.split(", "))
        assert accurate == "100%"
        assert float(first) > 0
        assert float(later) > 0
        assert memory == ["", ""]


@pytest.mark.filterwarnings("ignore:.*the Trainer has no logger")
def test_resnet50_runs() -> None:
    options = Options("resnet50", "toy", repeats=1, ways=("products", CRITICAL, "both ends", DENSITY))
    outcome = outcome_of(options, trained(options), {"both ends": 2**30}, 1.0)
    rows = {row[0]: row[1:] for row in outcome.tables[0].rows}
    assert rows[CRITICAL][0].endswith(" forward passes")
    assert rows[DENSITY][0] == "32"
    assert rows["both ends"][-2] == "1.00"
    assert "random images" in outcome.about


@pytest.mark.parametrize(("model", "millions"), [("gpt2", 124.4), ("resnet50", 25.6), ("decoder1b", 1037.1)])
def test_full_models_are_as_large_as_they_are_said_to_be(model: str, millions: float) -> None:
    with torch.device("meta"):
        network = setup_of(model, "full").make()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_text_is_that_of_the_penn_treebank_where_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "ptb"
    folder.mkdir()
    for part in ("train", "valid"):
        (folder / f"ptb.{part}.txt").write_text("to be or not to be\n" * 20)
    inputs, targets = setup_of("gpt2", "toy").data(str(tmp_path), 3)
    assert inputs.shape == targets.shape == (3, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert len(inputs.unique()) == 5  # with the end of a sentence


def test_the_memory_of_the_documentation_is_that_of_the_formulae(capsys: pytest.CaptureFixture[str]) -> None:
    large.main(["--reckon"])
    page = Path(__file__).parents[1] / "docs" / "large_models.md"
    assert capsys.readouterr().out.strip() in page.read_text()


@pytest.mark.parametrize(("wanted", "count"), [(1, 9), (13, 43)])
def test_a_basis_is_as_large_as_it_is_said_to_be(wanted: int, count: int) -> None:
    assert inspect.signature(lanczos).parameters["max_basis_bytes"].default == large.DEFAULT_BASIS_BYTES
    assert large.basis_vectors(1e6, wanted) == count
    assert large.basis_vectors(1e9, wanted) == wanted + 5
    assert large.basis_vectors(1e8, wanted, devices=8) == {1: 9, 13: 18}[wanted]


def test_measurements_take_turns() -> None:
    options = Options("gpt2", repeats=2, ways=("products", "sharpness"))
    assert options.steps == {"products": [4, 10], "sharpness": [7, 13]}
    assert options.num_steps == 14
    assert Options("gpt2", ways=()).num_steps == WARM + PLAIN + 1


def test_cost_and_memory_are_those_beyond_the_plain_steps() -> None:
    options = Options("gpt2", repeats=2, ways=("sharpness",))
    meter = Meter()
    meter.seconds = [9.0, 9.0, 1.0, 3.0, 12.0, 2.0, 2.0, 7.0]
    meter.gradients = [1.0] * 8
    meter.peaks = [9, 9, 100, 200, 200 + 2**30, 100, 100, 200]
    probe: Any = SimpleNamespace(results=[SimpleNamespace(matvecs=9, converged=True) for _ in range(2)])
    outcome = outcome_of(options, Found(2**26, True, meter, {"sharpness": probe}), {}, 1.0)
    assert outcome.figures[0].sample.values == (5.0, 2.5)
    assert outcome.tables[0].rows == [["sharpness", "9, 9", "100%", "5.0", "2.5", "1.00", "4.0"]]


def test_memory_is_that_of_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {(): 100, ("sharpness",): 170, ("both ends",): 180}

    def run(command: list[str], **_: Any) -> Any:
        ways = tuple(command[command.index("--weigh") + 1 :])
        return SimpleNamespace(stdout=f"something else\nPEAK {peaks[ways]}\n")

    monkeypatch.setattr(subprocess, "run", run)
    options = Options("gpt2", ways=("products", "sharpness", "both ends"))
    assert large.weighed(options, ["--model", "gpt2"]) == {"sharpness": 70, "both ends": 80}


def test_a_process_says_what_it_has_held(capsys: pytest.CaptureFixture[str]) -> None:
    large.main(["--model", "gpt2", "--scale", "toy", "--weigh"])
    kind, num_bytes = capsys.readouterr().out.split()
    assert kind == "PEAK"
    assert int(num_bytes) > 2**26
