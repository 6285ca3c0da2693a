"""The benchmarks run at toy size, and their tables say what was measured: nothing here is about speed."""

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import eigenpairs, growth, peers, problems, processes, products, training_cost
from benchmarks.eigenpairs import Row
from benchmarks.peers import OUR_PRODUCT, OURS, Found, Task
from benchmarks.problems import Problem
from benchmarks.report import Figure, Outcome, Run, Settings, load, picture, save
from benchmarks.timing import Sample, exponent, interleaved

QUICK = Settings(root=None, repeats=2, jobs=1, quick=True)
PLAIN = "SciPy `eigsh`, plain PyTorch"


@pytest.fixture(autouse=True)
def _no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other packages are not part of the environment of the tests; where one is, it is not to be met here."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # before each timing, which takes longer than what is timed here
    for module in ("curvlinops", "hessian_eigenthings", "pyhessian", "cockpit", "backpack"):
        monkeypatch.setitem(sys.modules, module, None)


def quadratic(curvatures: list[float]) -> Problem:
    """A problem whose Hessian is diagonal."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(len(curvatures)))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * self.weight**2 / 2

    class Total(torch.nn.Module):
        def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return outputs.sum(dim=1).mean()

    batch = torch.tensor([curvatures]), torch.zeros(1)
    return Problem("quadratic", Network(), [batch], criterion=Total())


# Sections


def test_eigenpairs_have_a_row_for_each_solver() -> None:
    outcome = eigenpairs.run(QUICK)
    assert [table.title for table in outcome.tables] == ["small transformer, 2 + 1", "small transformer, 2 + 0"]
    for table in outcome.tables:
        rows = {row[0]: row for row in table.rows}
        assert list(rows) == list(peers.SOLVERS)
        for name in (OURS, OUR_PRODUCT, PLAIN):
            assert int(rows[name][1]) > 2, rows[name]
            assert 2 < int(rows[name][2]) <= int(rows[OURS][1])
            assert float(rows[name][6]) <= 1e-3
        assert float(rows[OURS][3]) <= 1e-2
        assert rows[PLAIN][3] == ""
        assert rows["curvlinops + `eigsh`"][-1] == rows["hessian-eigenthings"][-1] == "not installed"
        assert rows[PLAIN][-1] == "best peer"
    assert [len(figure.sample.values) for figure in outcome.figures] == [2, 2, 2]
    assert PLAIN in outcome.figures[0].name


def test_products_have_times_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {products.GRADIENT: 1.0, products.KEPT: 4.0, products.REBUILT: 2.0, "plain PyTorch, graph rebuilt": 3.0}
    monkeypatch.setattr(products, "memory", lambda name, who, quick: peaks[who] * 2**20)
    outcome = products.run(QUICK)
    times, memory = outcome.tables
    assert {row[0]: row[1] for row in times.rows}["curvlinops"] == "not installed"
    assert float(times.rows[0][1].split()[0]) > 0
    assert [row[1] for row in memory.rows] == ["1", "4", "2", "3"]
    assert outcome.figures[-1].sample.median == pytest.approx(2 / 3)
    assert outcome.figures[-1].is_met


def test_memory_is_that_of_a_process_of_its_own() -> None:
    vector = 4 * products.weighed_problem("MLP", quick=False).size
    found = products.memory("MLP", products.REBUILT, quick=False)
    assert 2 * vector < found < 12 * vector


def test_memory_says_why_it_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    products.weigh("MLP", "curvlinops", quick=True)
    assert json.loads(capsys.readouterr().out) == "not installed"


def test_training_has_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("CurvatureProbe(10)", "SpectrumTracker, every epoch")
    monkeypatch.setattr(training_cost, "WAYS", {name: training_cost.WAYS[name] for name in some})
    outcome = training_cost.run(QUICK)
    rows = {row[0]: row[1] for row in outcome.tables[0].rows}
    assert set(rows) == {*some, *training_cost.COCKPIT}
    assert all(rows[name] == "not installed" for name in training_cost.COCKPIT)
    assert rows["SpectrumTracker, every epoch"].endswith("; 4")  # one epoch
    assert [figure.bound for figure in outcome.figures] == [1.6, 2.0]
    assert all(len(figure.sample.values) == 2 for figure in outcome.figures)


def test_two_processes_measure_the_same() -> None:
    outcome = processes.run(QUICK)
    (row,) = outcome.tables[0].rows
    one, two = row[4].split(", ")
    assert one == two
    assert float(row[5]) < 1e-4
    assert len(outcome.figures[0].sample.values) == 2


def test_growth_has_three_curves() -> None:
    outcome = growth.run(QUICK)
    assert [len(table.rows) for table in outcome.tables] == [2, 2, 3]
    assert all(math.isfinite(figure.sample.median) for figure in outcome.figures)


def test_the_command_line_writes_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome("growth", "Growth", "How.", [Figure("a figure", Sample((2.0,)), 1.0)])
    monkeypatch.setattr(growth, "run", lambda settings: outcome)
    monkeypatch.setattr(processes, "run", lambda settings: 1 / 0)
    places = ["--docs", str(tmp_path / "docs"), "--kept", str(tmp_path / "kept.json")]
    assert command_line.main(["processes", "growth", "--quick", "--write", *places]) == 1
    page = (tmp_path / "docs" / "benchmarks" / "results.md").read_text()
    assert "| a figure | 2.00 | 2.00 to 2.00 | ≤ 1 | **missed** |" in page
    assert "This section failed: ZeroDivisionError" in page
    assert (tmp_path / "docs" / "images" / "benchmark.png").exists()
    assert command_line.main(["--again", *places]) == 1
    with pytest.raises(SystemExit):
        command_line.main(["no_such_section"])


# What is said of the figures


def test_a_wrong_eigenvector_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = quadratic([5.0, 3.0, 1.0, -1.0, -2.0, 0.5, 0.2])
    basis = torch.eye(7)
    answers = {
        OURS: basis[[0, 4]],
        "slanted": torch.stack([basis[0] + 0.1 * basis[1], basis[4]]),
        "another": basis[[1, 4]],
        "right": basis[[0, 4]],
    }
    solvers = {name: lambda *_, vectors=vectors: Found(vectors, 7) for name, vectors in answers.items()}
    monkeypatch.setattr(eigenpairs, "SOLVERS", solvers)
    rows = {row.who: row for row in eigenpairs.compared(problem, Task(1, 1), repeats=1)}
    assert "residual too large" in rows["slanted"].mark
    assert rows["slanted"].residual == pytest.approx(0.04, rel=0.05)
    assert rows["another"].mark == "other eigenvalues"
    assert rows["right"].mark == rows[OURS].mark == ""
    assert eigenpairs.ratios(list(rows.values()))[0] == "right"


def rows_of(**seconds: list[float]) -> list[Row]:
    names = {"ours": OURS, "arpack": OUR_PRODUCT, "plain": PLAIN}
    return [Row(names.get(who, who), times, 10, 5e-4) for who, times in seconds.items()]


def test_ratios_are_those_of_the_repeats() -> None:
    rows = rows_of(ours=[1.0, 2.0, 1.0], arpack=[2.0, 2.0, 2.0], plain=[4.0, 5.0, 4.0], slow=[20.0])
    best, ratio, arpack = eigenpairs.ratios(rows)
    assert best == PLAIN
    assert ratio.values == (0.25, 0.4, 0.25)
    assert arpack.values == (0.5, 1.0, 0.5)


def test_arpack_on_our_product_and_what_is_inaccurate_are_no_best_peer() -> None:
    rows = rows_of(ours=[1.0], arpack=[0.5], plain=[0.8], other=[4.0])
    rows[2].residual = 2e-3
    best, ratio, _ = eigenpairs.ratios(rows)
    assert (best, ratio.values) == ("other", (0.25,))
    rows[0].is_complete = False
    assert eigenpairs.ratios(rows)[1].values == ()
    outcome = eigenpairs.outcome_of({"LeNet": {"1 + 1": rows}}, 1.0)
    assert outcome.figures[0].row[1:] == ["ours is not accurate", "", "≤ 0.35", "not measured"]


def test_who_is_slow_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, vectors = quadratic([5.0, 3.0, 1.0]), torch.eye(3)[:1]
    pace = {OURS: 1.0, "fast": 2.0, "slow": 20.0}
    monkeypatch.setattr(eigenpairs, "SOLVERS", {name: lambda *_, name=name: (name, Found(vectors, 1)) for name in pace})
    monkeypatch.setattr(eigenpairs, "timed", lambda task: (pace[task()[0]], task()[1]))
    rows = {row.who: len(row.seconds) for row in eigenpairs.compared(problem, Task(1, 0), repeats=3)}
    assert rows == {OURS: 3, "fast": 3, "slow": 1}


def test_a_package_that_cannot_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = quadratic([5.0, 3.0])

    def no_lower_end(*_: Any) -> Found:
        raise peers.UnableError("largest in modulus only")

    def broken(*_: Any) -> Found:
        raise RuntimeError("not for this version\nand more")

    solvers = {OURS: lambda *_: Found(torch.eye(2)[:1], 1), "unable": no_lower_end, "broken": broken}
    monkeypatch.setattr(eigenpairs, "SOLVERS", solvers)
    rows = eigenpairs.compared(problem, Task(1, 0), repeats=2)
    outcome = eigenpairs.outcome_of({"it": {"1 + 0": rows}}, 1.0)
    assert [row[-1] for row in outcome.tables[0].rows] == [
        "", "largest in modulus only", "failed: RuntimeError: not for this version"
    ]  # fmt: skip
    assert outcome.figures[0].missing == "no peer"


def test_targets_are_met_or_missed_by_the_median() -> None:
    assert Figure("a", Sample((1.0, 1.1, 9.0)), 1.1).is_met
    assert Figure("a", Sample((1.0, 1.2, 1.3)), 1.1).is_met is False
    assert Figure("a", Sample((1.6, 1.8, 1.9)), 1.7, at_least=True).is_met
    assert Figure("a", Sample((1.6, 1.65, 1.9)), 1.7, at_least=True).is_met is False
    assert Figure("a", Sample((1.0,))).is_met is None
    assert Figure("a", Sample(()), 1.0, missing="not installed").row[1] == "not installed"


def test_samples_know_their_quartiles() -> None:
    assert Sample((4.0, 1.0, 2.0, 3.0, 5.0)).quartiles == (2.0, 4.0)
    assert Sample((1.0, 2.0)).quartiles == (1.25, 1.75)
    assert Sample((2.0, 9.0)).over(Sample((1.0, 3.0))).values == (2.0, 3.0)


def test_an_exponent_is_that_of_a_power() -> None:
    assert exponent([1, 10, 100], [3, 3 * 10**1.5, 3 * 10**3]) == pytest.approx(1.5)
    curves = {"sizes": [1, 10, 100], "seconds": [[1.0, 2.0], [1.0, 2.0], [10.0, 200.0]]}
    assert growth.exponents(curves).values == pytest.approx((0.5, 1.0))
    assert growth.exponents(curves, last=2).values == pytest.approx((1.0, 2.0))


def test_repeats_are_interleaved() -> None:
    calls: list[str] = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3  # the first round is not counted
    assert all(len(sample.values) == 2 for sample in found.values())


def test_a_product_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "timed_problem", lambda *_: quadratic([5.0, 3.0]))
    wrong = {"double": lambda problem: lambda vector: 2 * problem.operator().matvec(vector)}
    monkeypatch.setattr(products, "PRODUCTS", wrong)
    assert products.work("", QUICK)["missing"] == {"double": "off by 1e+00 of its size"}


def test_products_of_several_batches_are_those_of_the_mean() -> None:
    problem = problems.mlp(None, 9, [3])
    (inputs, labels), vector = problem.batches[0], torch.randn(problem.size)
    expected = peers.plain_product(problem)(vector)
    problem.batches = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    for keep in (True, False):
        assert peers.plain_product(problem, keep=keep)(vector).allclose(expected, atol=1e-6)


def test_a_run_is_kept(tmp_path: Path) -> None:
    cells = {"sizes": [1, 10], "seconds": [[1.0, 1.1], [9.0, 10.0]], "products": [3, 4]}
    run = Run("somewhere", [growth.outcome_of({"batches": cells}, 2.0)])
    save(run, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == run


def test_every_section_has_a_panel() -> None:
    ratios = {"LeNet, batch 128": {"CurvatureProbe, every 10 steps": [1.5, 1.6]}}
    found: dict[str, Any] = {
        "eigenpairs": {"dots": [{"name": "LeNet, 1 + 1", "peer": [0.3], "arpack": []}]},
        "products": {"gradients": {"LeNet": {products.KEPT: [1.2, 1.3]}}},
        "training": {"ratios": ratios},
        "processes": {"speedups": {"LeNet": [1.8]}},
        "growth": {"curves": {"batches": {"sizes": [1, 10], "seconds": [[1.0], [9.0]], "products": [3, 4]}}},
    }
    run = Run("", [Outcome(name, name, "", plot=plot) for name, plot in found.items()])
    drawn = picture(run, {name: section.draw for name, section in command_line.SECTIONS.items()})
    assert sorted(panel.get_title(loc="left") for panel in drawn.axes) == sorted(found)
    assert all(panel.lines for panel in drawn.axes)
