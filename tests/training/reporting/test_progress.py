"""A long measurement shows a bar beside the trainer's own, whichever that is, and no bar can end a measurement."""

import io
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.curvature.operators.watched import WatchedOperator
from lyapunov_lightning.training.lightning_names import Callback
from lyapunov_lightning.training.reporting import progress as progress_module
from lyapunov_lightning.training.reporting.progress import lone_bar, progress


class InsideTheStep(Callback):
    """Runs a check where the package measures, in ``on_train_batch_start``."""

    def __init__(self, check: Any) -> None:
        self.check = check
        self.num_calls = 0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.check(trainer)
        self.num_calls += 1


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def library(request):
    return pytest.importorskip(request.param, reason="the second name is not installed")


@pytest.fixture
def fit(library, tmp_path):
    """Fits a module for three batches an epoch with a check in every step; returns how often that was passed."""

    class Learner(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(check: Any, bar: Any = None, **settings: Any) -> int:
        inside = InsideTheStep(check)
        trainer = library.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=bar is not None,
            logger=False,
            callbacks=[inside] if bar is None else [bar, inside],
            **{"max_epochs": 1, **settings},
        )
        trainer.fit(Learner(), DataLoader(torch.randn(3, 2)), DataLoader(torch.randn(3, 2)))
        return inside.num_calls

    return run


@pytest.fixture
def at_once(monkeypatch):
    """Bars are shown from the first product on."""
    monkeypatch.setattr(progress_module, "_SHOWN_AFTER_SECONDS", -1.0)


@pytest.fixture
def rich_bar(library):
    """The trainer's bar, and what it draws on."""
    terminal = io.StringIO()
    console = {"file": terminal, "force_terminal": True, "width": 160, "height": 20}
    return library.callbacks.RichProgressBar(refresh_rate=10, console_kwargs=console), terminal


def interrupted(trainer: Any) -> None:
    """A measurement that fails after its bar has come up."""
    with progress(trainer, "CurvatureProbe") as report:
        report()
        raise ArithmeticError


def open_tqdm_bars() -> list[Any]:
    """From the top of the terminal to the bottom. All kinds of tqdm bars keep one set of their instances."""
    return sorted((bar for bar in Tqdm._instances if not bar.disable), key=lambda bar: abs(bar.pos))


@pytest.mark.parametrize(("after", "reported"), [(-1.0, [1, 2, 3, 4]), (3600.0, [])])
def test_a_watched_operator_counts_its_products_and_reports_them_once_they_take_a_while(after, reported):
    class Twice:
        size, dtype, device = 3, torch.float64, torch.device("cpu")

        def matvec(self, vector: Tensor) -> Tensor:
            return 2 * vector

    reports = []
    watched = WatchedOperator(Twice(), reports.append, after)
    assert (watched.size, watched.dtype, watched.device) == (3, torch.float64, torch.device("cpu"))
    for _ in range(4):
        assert torch.equal(watched.matvec(torch.ones(3)), torch.full((3,), 2.0))
    assert reports == reported
    assert watched.num_matvecs == 4


@pytest.mark.usefixtures("at_once")
def test_rich_bar_is_a_task_in_the_display_of_the_trainer(fit, rich_bar):
    bar, terminal = rich_bar

    def described() -> list[str]:
        return [task.description for task in bar.progress.tasks]

    def check(trainer: Any) -> None:
        before = described()
        with progress(trainer, "CurvatureProbe") as report:
            assert described() == before
            for count in (1, 2, 3):
                report()
                task = bar.progress.tasks[-1]
                assert task.description == "CurvatureProbe"
                assert task.completed == count
        assert described() == before

    assert fit(check, bar, max_epochs=2) == 6
    assert "CurvatureProbe" in terminal.getvalue()


@pytest.mark.usefixtures("at_once")
def test_rich_bars_of_the_trainer_go_on_after_ours(fit, rich_bar):
    bar, terminal = rich_bar

    def check(trainer: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            report()

    assert fit(check, bar, max_epochs=2) == 6
    for text in ("Epoch 0/1", "Epoch 1/1", "3/3", "CurvatureProbe"):
        assert text in terminal.getvalue()


@pytest.mark.usefixtures("at_once")
def test_rich_task_is_removed_when_the_measurement_fails(fit, rich_bar):
    bar, _ = rich_bar

    def check(trainer: Any) -> None:
        before = len(bar.progress.tasks)
        with pytest.raises(ArithmeticError):
            interrupted(trainer)
        assert len(bar.progress.tasks) == before

    assert fit(check, bar) == 3


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("process_position", [0, 2])
def test_tqdm_bar_is_the_line_below_that_of_the_trainer(fit, library, capsys, process_position):
    def check(trainer: Any) -> None:
        [own] = open_tqdm_bars()
        with progress(trainer, "CurvatureProbe") as report:
            assert open_tqdm_bars() == [own]
            for count in (1, 2, 3):
                report()
                first, second = open_tqdm_bars()
                assert first is own
                assert type(second) is type(own)
                assert second.n == count
                assert second.desc.startswith("CurvatureProbe")
                assert abs(second.pos) == 2 * process_position + 1
        assert open_tqdm_bars() == [own]

    bar = library.callbacks.TQDMProgressBar(process_position=process_position)
    assert fit(check, bar, num_sanity_val_steps=0) == 3
    captured = capsys.readouterr()
    assert "CurvatureProbe" in captured.out
    assert "CurvatureProbe" not in captured.err


@pytest.mark.usefixtures("at_once")
def test_tqdm_bar_is_closed_when_the_measurement_fails(fit, library):
    def check(trainer: Any) -> None:
        with pytest.raises(ArithmeticError):
            interrupted(trainer)
        assert len(open_tqdm_bars()) == 1

    assert fit(check, library.callbacks.TQDMProgressBar(), num_sanity_val_steps=0) == 3


class BrokenBar:
    """A bar on a terminal that goes away: at its opening, while it counts, or when it is closed."""

    def __init__(self, broken: str) -> None:
        self._broken = broken
        self._does("open")

    def _does(self, what: str) -> None:
        if what == self._broken:
            raise BrokenPipeError(what)

    def show(self, count: int, note: str = "") -> None:
        self._does("show")

    def close(self) -> None:
        self._does("close")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("broken", ["open", "show", "close"])
def test_a_bar_that_cannot_be_drawn_does_not_end_the_measurement(fit, monkeypatch, broken):
    """There is a bar on the first rank only: if it gave up, the others would wait for it in their next product."""
    monkeypatch.setattr(progress_module, "_open_bar", lambda *_: BrokenBar(broken))

    def check(trainer: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            report()
            report()

    with pytest.warns(CurvatureWarning, match=f"progress bar .* cannot be drawn: BrokenPipeError: {broken}"):
        assert fit(check) == 3


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_disabled", [False, True], ids=["no-bar", "disabled"])
def test_nothing_is_shown_where_the_trainer_shows_nothing(fit, library, capsys, is_disabled):
    def check(trainer: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            report()
            assert not open_tqdm_bars()

    assert fit(check, library.callbacks.TQDMProgressBar(refresh_rate=0) if is_disabled else None) == 3
    captured = capsys.readouterr()
    assert "CurvatureProbe" not in captured.out + captured.err


@pytest.mark.parametrize("kind", ["rich", "tqdm"])
def test_nothing_is_shown_in_the_first_two_seconds(fit, library, rich_bar, monkeypatch, capsys, kind):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    bar = rich_bar[0] if kind == "rich" else library.callbacks.TQDMProgressBar()

    def count() -> int:
        return len(bar.progress.tasks) if kind == "rich" else len(open_tqdm_bars())

    def check(trainer: Any) -> None:
        clock.now, own = 0.0, count()
        with progress(trainer, "CurvatureProbe") as report:
            for clock.now, expected in ((0.0, 0), (1.0, 0), (2.0, 0), (2.1, 1), (9.0, 1)):
                report()
                assert count() - own == expected

    assert fit(check, bar, num_sanity_val_steps=0) == 3
    capsys.readouterr()


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("alone", [False, True])
def test_a_bar_goes_to_the_stream_of_the_moment(library, monkeypatch, alone):
    """Beside the trainer's own to the output, as they do, and without one to the error stream."""
    streams = {"stdout": Terminal(), "stderr": Terminal()}
    for name, stream in streams.items():  # a bar that is bound to the stream of import time would escape redirection
        monkeypatch.setattr(sys, name, stream)
    own = [] if alone else [library.callbacks.TQDMProgressBar()]
    trainer = library.Trainer(
        accelerator="cpu", logger=False, callbacks=own, enable_progress_bar=not alone, enable_model_summary=False
    )
    bar = progress_module._open_bar(trainer, "CurvatureProbe", alone)
    bar.show(1)
    bar.close()
    assert [name for name, stream in streams.items() if "CurvatureProbe" in stream.getvalue()] == [
        "stderr" if alone else "stdout"
    ]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (Terminal, False), (io.StringIO, True)])
def test_a_lone_bar_with_its_note_is_shown_on_a_terminal_and_nowhere_else(library, monkeypatch, stream, shown):
    monkeypatch.setattr(progress_module, "_LOOKS_APART_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", stream())
    trainer = library.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with lone_bar(trainer, "Products", unit="products", shown=shown) as report:
        report(3, "at most 7 more")
        report(4, "at most 6 more")
    text = sys.stderr.getvalue()
    is_seen = shown and stream is Terminal
    assert ("Products: 4 products, at most 6 more" in text) == is_seen
    assert ("at most 6 more" in text) == is_seen
    assert bool(text) == is_seen
