"""The truth benchmark of the verdict: searches, readings and their tables, on toys that need no data."""

import gzip
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.verdicts import __main__ as command_line
from benchmarks.verdicts import report, work
from benchmarks.verdicts.design import BATCHES, every_pair, half_of_the_pairs
from benchmarks.verdicts.held_out import HELD_OUT
from benchmarks.verdicts.kept import Kept
from benchmarks.verdicts.problems import PROBLEMS, SAMPLES, mnist
from benchmarks.verdicts.readings import read
from benchmarks.verdicts.report import Reading, Score
from benchmarks.verdicts.sweeps import HIGHEST, LOWEST, Sweep, search
from benchmarks.verdicts.training import (
    EVERY_PROBLEM,
    MORE_OPTIMIZERS,
    OPTIMIZERS,
    SCHEDULES,
    Cell,
    Learner,
    Size,
    factor,
    in_loop,
    in_trainer,
    loader,
    samples,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the Trainer has no logger"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
]
TOY = Size(steps=8, samples=32)
SPIRALS = Cell("spirals, tanh", "momentum", 8, "cosine", 1)
NO_DATA = "nowhere"


def valley(lowest: int, lost_from: int) -> Callable[[float], float]:
    """Losses that fall towards a rate and are lost from another one on."""
    return lambda rate: 1.5 ** abs(math.log2(rate) - lowest) if math.log2(rate) < lost_from else math.inf


# The truth


@pytest.mark.parametrize("start", [-12, -6, 0, HIGHEST])
def test_a_search_finds_the_largest_usable_rate_from_everywhere(start: int) -> None:
    found = search(valley(-5, 0), start)
    assert (found.best, found.rate, found.is_inside) == (1.0, 2**-5, True)


def test_a_search_looks_beyond_a_rate_that_was_lost_by_luck() -> None:
    losses = {-3: 1.0, -2: math.inf, -1: 9.0, 0: 1.2}
    assert search(lambda rate: losses.get(round(math.log2(rate)), 50.0), -3).rate == 1.0


def test_a_search_goes_on_to_lower_losses_below_its_start() -> None:
    tried: list[int] = []

    def final(rate: float) -> float:
        tried.append(round(math.log2(rate)))
        return {-9: 1.0, -8: 1.2}.get(tried[-1], 5.0)

    found = search(final, -7)
    assert found.exponent == -8
    assert min(tried) == -12
    assert len(tried) == len(set(tried))


def test_a_search_without_an_end_says_so() -> None:
    assert not search(lambda rate: 1.0, 0).is_inside
    lost = search(lambda rate: math.inf, 0)
    assert lost.rate is None
    assert not lost.is_inside
    assert min(lost.losses) == LOWEST


def test_a_sweep_tells_little_if_hardly_anything_was_learned() -> None:
    assert Sweep({0: 2.0, 1: math.inf}, untrained=2.4).tells_little
    assert not Sweep({0: 1.0, 1: math.inf}, untrained=2.4).tells_little


def test_the_rate_rises_and_falls_to_zero() -> None:
    factors = [factor(step, "cosine", 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert factors[-1] < 1e-3
    assert {factor(step, "constant", 100) for step in range(100)} == {1.0}


# Trainings


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
def test_the_loop_and_the_trainer_train_the_same(optimizer: str) -> None:
    cell = Cell("spirals, tanh", optimizer, 8, "cosine", 1)
    looped, trained = Learner(cell, 0.1, TOY.steps), Learner(cell, 0.1, TOY.steps)
    in_loop(looped, loader(cell, NO_DATA, TOY), lambda: 0.0)
    in_trainer(trained, loader(cell, NO_DATA, TOY), [])
    before = Learner(cell, 0.1, TOY.steps).network[1].weight
    assert not torch.equal(before, looped.network[1].weight)
    for ours, other in zip(looped.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_the_last_tenth_is_what_counts() -> None:
    count = itertools.count()
    learner = Learner(SPIRALS, 0.01, 100)
    assert in_loop(learner, loader(SPIRALS, NO_DATA, TOY), lambda: float(next(count))) == 4.5
    assert next(count) == 10


def test_a_lost_run_is_infinitely_bad() -> None:
    cell = Cell("bad conditioning", "SGD", None, "constant", 0)
    assert in_loop(Learner(cell, 100.0, 30), loader(cell, NO_DATA, TOY), lambda: 1.0) == math.inf


def test_dropout_is_off_where_the_loss_of_all_data_is_measured() -> None:
    cell = Cell("dropout", "SGD", None, "constant", 0)
    learner, data = Learner(cell, 0.1, 10), samples("dropout", NO_DATA, 32)
    assert learner.loss_of_all(data) == learner.loss_of_all(data) != float(learner.training_step(data, 0))


@pytest.mark.parametrize("name", [name for name, problem in EVERY_PROBLEM.items() if not problem.needs])
def test_every_problem_without_data_trains(name: str) -> None:
    cell = Cell(name, "AdamW", 8, "constant", 0)
    learner, data = Learner(cell, 3e-3, 40), samples(name, NO_DATA, 32)
    before = learner.loss_of_all(data)
    final = in_loop(learner, loader(cell, NO_DATA, Size(40, 32)), lambda: learner.loss_of_all(data))
    assert 0 <= final < before
    assert 700 <= sum(parameter.numel() for parameter in learner.parameters()) <= 8000


def test_digits_are_read_packed_and_unpacked(tmp_path: Path) -> None:
    pixels = torch.randint(256, (SAMPLES, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    files = {
        "train-images-idx3-ubyte": bytes(16) + pixels.numpy().tobytes(),
        "train-labels-idx1-ubyte": bytes(8) + bytes(number % 10 for number in range(SAMPLES)),
    }
    found = []
    for root, write in ((tmp_path / "packed", gzip.compress), (tmp_path / "plain", bytes)):
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, content in files.items():
            (raw / (name + ".gz" * (write is gzip.compress))).write_bytes(write(content))
        assert PROBLEMS["MNIST, ReLU"].is_there(str(root))
        found.append(mnist(str(root)))
    (images, labels), (others, _) = found
    assert torch.equal(images, others)
    assert images.shape == (SAMPLES, 1, 10, 10)
    assert labels[:12].tolist() == [*range(10), 0, 1]


# Readings


def test_the_probe_is_read() -> None:
    cell, size = Cell("bad conditioning", "SGD", None, "constant", 0), Size(120, 64)
    found = read(cell, 0.02, NO_DATA, size)
    assert 0.05 < found["limit"] < 2
    low, high = found["range"]
    assert low < found["limit"] < high
    assert len(found["measured"]) >= 6
    assert [rate for _, rate, *_ in found["measured"]] == [0.02] * len(found["measured"])


def test_a_run_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "configure_optimizers", lambda *_: 1 / 0)
    found = read(Cell("bad conditioning", "SGD", 8, "constant", 0), 0.02, NO_DATA, TOY)
    assert found == {"limit": None, "error": "ZeroDivisionError: division by zero"}


# The design


def test_every_pair_has_every_problem_and_the_rest_takes_turns() -> None:
    cells = every_pair(list(PROBLEMS), list(OPTIMIZERS), BATCHES)
    assert len({(cell.problem, cell.optimizer, cell.batch) for cell in cells}) == len(cells) == 220
    for name in ("optimizer", "batch", "problem"):
        for value in {getattr(cell, name) for cell in cells}:
            ways = Counter((cell.schedule, cell.seed) for cell in cells if getattr(cell, name) == value)
            assert len(ways) == 4
            assert max(ways.values()) <= 1.7 * min(ways.values()), (name, value, ways)
    for pair in itertools.product(OPTIMIZERS, BATCHES):
        mine = [cell for cell in cells if (cell.optimizer, cell.batch) == pair]
        assert min(Counter((cell.schedule, cell.seed) for cell in mine).values()) >= 2


def test_held_out_pairs_have_half_of_the_problems() -> None:
    optimizers = [*OPTIMIZERS, *MORE_OPTIMIZERS]
    cells = half_of_the_pairs(list(HELD_OUT), optimizers, BATCHES)
    assert len(cells) == len(set(cells)) == 160
    for pair in itertools.product(optimizers, BATCHES):
        mine = [cell for cell in cells if (cell.optimizer, cell.batch) == pair]
        assert len(mine) == 5
        assert {cell.schedule for cell in mine} == set(SCHEDULES)
        assert {cell.seed for cell in mine} == {0, 1}
    for name in HELD_OUT:
        assert {cell.schedule for cell in cells if cell.problem == name} == set(SCHEDULES)


def test_no_held_out_problem_is_tuned_on() -> None:
    assert not set(HELD_OUT) & set(PROBLEMS)


# The tables


def reading(limit: float | None, fraction: int = 1, optimizer: str = "SGD", **options: object) -> Reading:
    return Reading(Cell("toy", optimizer, 4, "constant", 0), 1.0, fraction, limit, **options)


def test_a_score_counts_what_was_not_named_as_not_right() -> None:
    score = Score([reading(limit) for limit in (0.2, 0.4, 1.0, 2.5, 3.5, None)])
    assert score.median == 1.0
    assert score.within(2) == pytest.approx(1 / 6)
    assert score.within(3) == pytest.approx(3 / 6)
    assert (score.too_high, score.too_low) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert score.row() == ["6", "1.00", "17%", "50%", "17%", "17%", "1"]
    assert score.covered is None


def test_a_range_is_right_if_the_rate_lies_in_it() -> None:
    ranges = [(0.5, 2.0), (1.5, 2.0), (0.2, 0.9), (0.9, 1.1)]
    assert Score([reading(1.0, range=found) for found in ranges] + [reading(1.0)]).covered == 0.5


def test_targets_look_at_the_worst_pair() -> None:
    good = [reading(1.0) for _ in range(18)]
    figures = report.targets([*good, reading(1.0, optimizer="AdamW"), reading(0.1, optimizer="AdamW")])
    assert [figure.is_met for figure in figures] == [True, False, True, True, True]
    assert "AdamW at batch 4" in figures[1].name
    assert [figure.is_met for figure in report.targets([*good, reading(4.0), reading(9.0)])][-1] is False


def test_tables_are_broken_down() -> None:
    text = report.markdown("About.", [reading(1.0), reading(2.5, 30, "AdamW"), reading(None, 4, error="broke")], [])
    assert "| AdamW | 4 | 1 | 2.50 | 0% | 100% | 0% | 0% |  |" in text
    assert "| 1/30 | 1 | 2.50 |" in text
    assert "| within a factor of 3 | 0.67 | ≥ 0.85 | **missed** |" in text
    assert report.markdown("About.", [], ["A note."]) == "About.\n\nA note.\n"


def test_what_is_left_out_is_said() -> None:
    cell = Cell("toy", "SGD", None, "cosine", 1)
    said = report.notes(["MNIST"], [cell], [SPIRALS], [Reading(cell, 1.0, 8, error="ValueError: no")], 3)
    assert "MNIST" in said[0]
    assert "toy, SGD, batch full, cosine, seed 1" in said[1]
    assert "spirals, tanh, momentum, batch 8" in said[2]
    assert "at 1/8: ValueError: no" in said[3]
    assert said[4].startswith("3 cells")
    assert report.notes([], [], [], [], 0) == []


# What is kept


def test_lines_of_another_mark_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    Kept(path, "first").add(SPIRALS, {"-3": None})
    assert Kept(path, "first").get(SPIRALS) == {"-3": None}
    assert Kept(path, "second").get(SPIRALS) is None


def test_other_processes_find_the_work() -> None:
    # What stands in a `__main__` is not found by a process that is spawned, and cannot be sent to one.
    assert {thing.__module__ for thing in (work.work, work.Task, work.Finding)} == {"benchmarks.verdicts.work"}


def test_the_command_line_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "QUICK", TOY)
    chosen = ["--quick", "--jobs", "1", "--out", str(tmp_path), "--root", NO_DATA, "--optimizers", "SGD"]
    chosen += ["--problems", "bad conditioning", "MNIST, ReLU", "--batches"]
    command_line.main([*chosen, "full", "--sweeps"])
    (swept,) = (tmp_path / "sweeps.jsonl").read_text().splitlines()
    assert not (tmp_path / "readings.jsonl").exists()
    command_line.main([*chosen, "full", "8"])
    sweeps, readings = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("sweeps", "readings"))
    assert sweeps[0] == swept
    assert len(sweeps) == len(readings) == 2
    assert [line["fraction"] for line in json.loads(readings[0])["found"]] == [1, 2, 4, 8, 16, 30]
    text = (tmp_path / "report.md").read_text()
    assert "2 cells, 12 readings" in text
    assert "Left out, as their data are not there: MNIST, ReLU." in text
    monkeypatch.setattr(work, "work", lambda task: 1 / 0)  # nothing is left to do
    command_line.main([*chosen, "full", "8"])
    assert (tmp_path / "report.md").read_text() == text
    with pytest.raises(ZeroDivisionError):
        command_line.main([*chosen, "full", "--fresh"])
