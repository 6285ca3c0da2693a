"""Experiments are put together, run, kept, judged and told as the page says."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from examples.papers import experiments
from examples.papers.__main__ import main
from examples.papers.experiments import PAPERS, Claim, Run, has_own_setting, load, names
from examples.papers.record import Record
from examples.papers.verdicts import Outcome, judge, why_undecided
from lyapunov_lightning import callbacks  # noqa: F401  # known by their short names

ABOVE_ONE = Claim(claim="It is large.", quantity="its size", measure="size", above=1.0)
FIGURES = Path(experiments.__file__).parent / "figures"
PARTS = FIGURES.parent / "parts"


@pytest.mark.parametrize("scale", ["small", "medium", "full"])
@pytest.mark.parametrize("name", names())
def test_experiment_names_measures_and_drawings_that_take_its_options(name: str, scale: experiments.Scale) -> None:
    experiment = load(name, scale)
    assert experiment.paper in PAPERS
    assert len(set(experiment.seeds)) >= 2
    assert experiment.claims
    for function, options in (
        *((claim.measure, claim.options) for claim in experiment.claims),
        (experiment.draw, experiment.draw_options),
    ):
        inspect.signature(experiment.function(function)).bind({}, **options)


def test_names_in_options_are_those_of_runs() -> None:
    """A measure that compares runs is told their names; a run that was renamed would only be missed when it is run."""
    for name in names():
        experiment = load(name, "small")
        told = [text for claim in experiment.claims for text in _texts(claim.options) if " " in text]
        for text in told:
            assert any(text in run for run in experiment.runs), f"{name}: no run is called {text!r}"


def _texts(options: object) -> list[str]:
    if isinstance(options, str):
        return [options]
    if isinstance(options, dict):
        return [text for item in [*options, *options.values()] for text in _texts(item)]
    return [text for item in options for text in _texts(item)] if isinstance(options, list) else []


def test_every_part_is_used() -> None:
    used = {
        part
        for path in FIGURES.glob("*.yaml")
        for items in yaml.safe_load(path.read_text())["runs"].values()
        for part in items
        if isinstance(part, str)
    }
    assert used | {"base"} == {path.stem for path in PARTS.glob("*.yaml")}


def test_configurations_are_understood() -> None:
    """So many runs that each argument of each class is in one, with each word: the numbers in the others differ."""
    scales: tuple[experiments.Scale, ...] = ("small", "medium")
    configs = [config for name in names() for scale in scales for config in load(name, scale).runs.values()]
    seen: set[tuple[str, ...]] = set()
    chosen = []
    for config in sorted(configs, key=lambda config: -len({*_pieces(config)})):
        if new := {*_pieces(config)} - seen:
            seen |= new
            chosen.append(config)
    cli = LightningCLI(args=chosen[0], run=False, save_config_callback=None)
    for config in chosen:
        cli.parser.parse_object(config)


def _pieces(config: object, *place: str) -> Iterator[tuple[str, ...]]:
    """Words, and kinds of numbers, with where they stand: below which classes and arguments."""
    if isinstance(config, dict):
        place = (*place, config.get("class_path", ""))
        for key, value in config.items():
            yield from _pieces(value, *place, key)
    elif isinstance(config, list):
        for value in config:
            yield from _pieces(value, *place)
    else:
        yield (*place, type(config).__name__ if isinstance(config, (int, float)) else str(config))


@pytest.fixture
def own_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of experiments of the test's own; its parts are those of the real ones."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "parts").symlink_to(PARTS)
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    return tmp_path


DIGITS = {
    "data.class_path": "examples.data.Digits",
    "model.init_args.network": {
        "class_path": "examples.models.MLP",
        "init_args": {"in_features": 64, "hidden": [8]},
    },
    "trainer.max_steps": 12,
    "data.init_args.batch_size": 64,
}


def _write(folder: Path, name: str, **changes: object) -> None:
    content = {
        "title": "Digits",
        "source": "nowhere",
        "about": "A made-up experiment.",
        "runs": {"slow": [DIGITS], "fast": [DIGITS, {"model.init_args.optimizer.init_args.lr": 0.5}]},
        "claims": [
            {
                "claim": "The loss falls.",
                "quantity": "last over first",
                "measure": "loss_at_end",
                "below": 2.0,
            }
        ],
        "draw": "training_curves",
        "draw_options": {"columns": 2},
        **changes,
    }
    (folder / "figures" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def test_parts_are_merged_in_order_and_values_of_a_scale_count_at_that_scale(
    own_experiments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_experiments / "parts").unlink()
    (own_experiments / "parts").mkdir()
    parts = {
        "base": {"trainer": {"max_steps": 9, "callbacks": [{"class_path": "A"}]}, "small": {"trainer.max_steps": 3}},
        "more": {"trainer": {"callbacks": [{"class_path": "B", "init_args": {"k": 1}}], "devices": 1}},
    }
    for name, part in parts.items():
        (own_experiments / "parts" / f"{name}.yaml").write_text(yaml.safe_dump(part))
    runs = {"run": ["more", {"trainer.callbacks.1.init_args.k": 2}, {"small": {"trainer.devices": 5}}]}
    _write(own_experiments, "chaos-made", runs=runs)
    called = [{"class_path": "A"}, {"class_path": "B", "init_args": {"k": 2}}]
    assert load("chaos-made", "full").runs["run"] == {"trainer": {"max_steps": 9, "callbacks": called, "devices": 1}}
    small = {"trainer": {"max_steps": 3, "callbacks": called, "devices": 5}}
    assert load("chaos-made", "small").runs["run"] == load("chaos-made", "medium").runs["run"] == small
    assert not has_own_setting("chaos-made", "medium")
    assert has_own_setting("chaos-made", "full")

    runs["run"].append({"medium": {"trainer.devices": 6}})
    _write(own_experiments, "chaos-made", runs=runs, medium={"trainer.max_steps": 7})
    medium = {"trainer": {"max_steps": 7, "callbacks": called, "devices": 6}}
    assert load("chaos-made", "small").runs["run"] == small
    assert load("chaos-made", "medium").runs["run"] == medium
    assert load("chaos-made", "full").runs["run"] == {"trainer": {"max_steps": 9, "callbacks": called, "devices": 1}}
    assert has_own_setting("chaos-made", "medium")

    _write(own_experiments, "chaos-fig1", runs={"run": ["more"]})
    assert main(["--list", "--scale", "medium"]) == []
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["chaos-made"]


def test_equal_runs_of_different_figures_have_one_key() -> None:
    config = {"trainer": {"max_steps": 3}, "data": {"a": 1}}
    again = {"data": {"a": 1}, "trainer": {"max_steps": 3}}
    assert Run(config, 0).key == Run(again, 0).key
    assert len({Run(config, 0).key, Run(config, 1).key, Run({**config, "x": 1}, 0).key}) == 3


def test_runs_are_made_once_kept_and_told(
    own_experiments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(own_experiments, "chaos-fig1")
    broken = {"trainer.callbacks": [{"class_path": "NudgedSGDHook", "init_args": {"k": -1}}]}
    shared = {"slow": [DIGITS], "broken": [DIGITS, broken]}
    _write(own_experiments, "chaos-fig2", runs=shared)
    out = tmp_path / "out"
    first, second = main(["--out", str(out), "--jobs", "1"])

    assert first.claims[0].verdict == "holds"
    assert [set(numbers or {}) for numbers in first.claims[0].numbers] == [{"slow", "fast"}] * 2
    assert first.picture is not None
    assert Path(first.picture).stat().st_size > 10_000
    assert second.claims[0].verdict == "not decided at this scale"
    assert len(second.failures) == 2
    assert "`k` should be" in second.failures[0] + _log_of(second)
    assert second.picture is None
    told = capsys.readouterr().out
    assert "HOLDS: The loss falls." in told
    assert "broke off: broken, seed 0" in told

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("record.pkl")}
    assert len(kept) == 4  # two runs with two seeds; the broken one left nothing, and the shared one was made once
    record = Record.load(next(iter(kept)))
    assert len(record.steps) == len(record.losses) == len(record.learning_rates) == 12
    assert record.distance > 0
    again = main(["chaos-fig1", "--out", str(out), "--jobs", "1"])[0]
    assert again.claims == first.claims
    assert kept == {path: path.stat().st_mtime_ns for path in out.rglob("record.pkl")}

    page = tmp_path / "docs" / "experiments" / "papers.md"
    outcomes = main(["--out", str(out), "--page", str(page)])
    assert [outcome.name for outcome in outcomes] == ["chaos-fig1", "chaos-fig2"]
    text = page.read_text()
    assert "**holds**" in text
    assert "../images/papers/chaos-fig1.png" in text
    assert "Runs that broke off: 2 of 4" in text
    assert "| [chaos-fig2](#chaos-fig2) Digits |  |  | 1 |" in text
    assert "**not decided at this scale**: not run |" in text
    assert (page.parents[1] / "images" / "papers" / "chaos-fig1.png").exists()

    # The page has the largest scale of what was run, and keeps what it says of all else.
    (out / "medium" / "outcomes").mkdir(parents=True)
    replace(first, name="chaos-fig2", scale="medium").save(out / "medium" / "outcomes" / "chaos-fig2.json")
    (out / "small" / "outcomes" / "chaos-fig1.json").unlink()
    assert [outcome.scale for outcome in main(["--out", str(out), "--page", str(page)])] == ["medium"]
    later = page.read_text()
    assert text[text.index("### Digits { #chaos-fig1 }") : text.index("### Digits { #chaos-fig2 }")] in later
    assert "`chaos-fig2`: scale `medium`, 4 runs, 2 seeds." in later
    assert "Of 2 claims of the papers 2 hold, 0 do not, and 0 are not decided." in later


def _log_of(outcome: Outcome) -> str:
    return Path(outcome.failures[0].rsplit("(", 1)[1].rstrip(")")).read_text()


def test_unknown_names_are_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chaos-fig99"])
    assert "There is no chaos-fig99. What there is: chaos-" in capsys.readouterr().err


def test_list_says_what_there_is_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == []
    assert len(capsys.readouterr().out.splitlines()) == len(names())


@pytest.mark.parametrize(
    ("numbers", "share", "verdict"),
    [
        ([{"a": 2.0}, {"a": 3.0}], 1.0, "holds"),
        ([{"a": 2.0}, {"a": 0.5}], 1.0, "not decided at this scale"),
        ([{"a": 0.5}, {"a": 0.1}], 1.0, "does not hold"),
        ([{"a": 0.5}, None], 1.0, "not decided at this scale"),
        ([{"a": 2.0}, {"a": None}], 1.0, "not decided at this scale"),
        ([{"a": 0.5, "b": None}], 1.0, "does not hold"),  # whatever b is
        ([{"a": 2.0, "b": None}], 1.0, "not decided at this scale"),
        ([{"a": 2.0, "b": None}], 0.5, "holds"),
        ([{"a": 2.0, "b": 0.5}], 0.5, "holds"),
        ([{"a": 2.0, "b": 0.5, "c": 0.5}], 0.5, "does not hold"),
        ([{"a": math.nan}], 1.0, "not decided at this scale"),
        ([{"a": math.inf}], 1.0, "holds"),
        ([{}], 1.0, "not decided at this scale"),
    ],
)
def test_verdicts(numbers: list[dict[str, float | None] | None], share: float, verdict: str) -> None:
    claim = Claim(claim="It is large.", quantity="its size", measure="size", above=1.0, share=share)
    assert judge(claim, numbers) == verdict


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([{"a": 2.0}, {"a": 3.0}], ""),
        ([{"a": 0.5}, {"a": 0.1}], ""),
        ([{"a": 2.0}, {"a": 0.5}], "the seeds disagree"),
        ([{"a": 2.0}, {"a": None}], "the training did not come to it"),
        ([{"a": None}, None], "not run"),
    ],
)
def test_a_claim_that_is_not_decided_has_a_reason(numbers: list[dict[str, float | None] | None], reason: str) -> None:
    assert why_undecided(ABOVE_ONE, numbers) == reason


def test_a_claim_needs_a_threshold() -> None:
    with pytest.raises(ValueError, match="has no threshold"):
        Claim(claim="It is large.", quantity="its size", measure="size")
    with pytest.raises(ValueError, match="`share` should be"):
        Claim(claim="It is large.", quantity="its size", measure="size", above=1, share=0)


def test_thresholds_in_words() -> None:
    assert ABOVE_ONE.threshold == "above 1"
    assert Claim(claim="", quantity="", measure="", above=1, below=2, share=0.8).threshold == "1 to 2, in 80%"


def test_page_tells_every_experiment() -> None:
    page = Path(__file__).parents[2] / "docs" / "experiments" / "papers.md"
    text = page.read_text(encoding="utf-8")
    assert [name for name in names() if f"{{ #{name} }}" not in text] == []
