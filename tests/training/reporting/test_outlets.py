"""Figures and texts reach every logger that takes them, and a file where none does."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lyapunov_lightning.training.reporting.outlets import show_figure, show_text
from tests.training.live import RememberingLogger


class Calls:
    """Stands for the client of a service: notes what it is asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.made.append((name, args, kwargs))


def without_service(kind: type) -> Any:
    """A logger of this class whose experiment is a stand-in for the client, which needs a package and a network."""

    class Offline(kind):
        def __init__(self) -> None:
            self.client = Calls()

        @property
        def experiment(self) -> Calls:
            return self.client

        @property
        def run_id(self) -> str:
            return "the run"

        def log_image(self, *args: Any, **kwargs: Any) -> None:
            self.client.made.append(("log_image", args, kwargs))

        def log_text(self, *args: Any, **kwargs: Any) -> None:
            self.client.made.append(("log_text", args, kwargs))

    return Offline()


def picture() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure


@pytest.fixture
def trainer() -> Any:
    return SimpleNamespace(loggers=[])


def test_tensorboard_shows_both(trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer.loggers = [logger]
    assert show_figure(trainer, "curvature/at_a_glance", picture(), 7, tmp_path / "files" / "one.png") is False
    show_text(trainer, "curvature/summary", "All is well.", 8)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, {"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Images("curvature/at_a_glance")] == [7]
    [text] = events.Tensors("curvature/summary/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (8, [b"All is well."])
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize(
    ("kind", "figure_call", "text_call"),
    [
        (
            WandbLogger,
            ("log_image", ("curvature/at_a_glance", "an image"), {"step": 7}),
            ("log_text", ("curvature/summary",), {"columns": ["text"], "data": [["All is well."]], "step": 8}),
        ),
        (
            MLFlowLogger,
            ("log_figure", ("the run", "the figure", "curvature/at_a_glance/step00000007.png"), {}),
            ("log_text", ("the run", "All is well.", "curvature/summary/step00000008.txt"), {}),
        ),
        (
            CometLogger,
            ("log_figure", ("curvature/at_a_glance", "the figure"), {"step": 7}),
            ("log_text", ("curvature/summary: All is well.",), {"step": 8}),
        ),
    ],
)
def test_services_get_both_in_their_own_way(trainer, tmp_path, kind, figure_call, text_call):
    logger = without_service(kind)
    trainer.loggers = [logger]
    figure = picture()
    assert show_figure(trainer, "curvature/at_a_glance", figure, 7, tmp_path / "one.png") is False
    show_text(trainer, "curvature/summary", "All is well.", 8)
    (name, arguments, options), said = logger.client.made
    shown = tuple("the figure" if argument is figure else argument for argument in arguments)
    if kind is WandbLogger:
        [image] = shown[1]
        assert image.size == (1280, 960)
        shown = (shown[0], "an image")
    assert ((name, shown, options), said) == (figure_call, text_call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loggers", ["none", "csv", "unknown"])
@pytest.mark.pictures
def test_a_file_is_written_where_no_logger_takes_figures(trainer, tmp_path, loggers):
    folder = tmp_path / "run"
    trainer.loggers = {"none": [], "csv": [CSVLogger(tmp_path)], "unknown": [RememberingLogger()]}[loggers]
    path = folder / "curvature-at_a_glance.png"
    assert show_figure(trainer, "curvature/at_a_glance", picture(), 7, path) is True
    assert show_figure(trainer, "curvature/at_a_glance", picture(), 9, path) is True
    assert list(folder.iterdir()) == [path]
    assert path.read_bytes().startswith(b"\x89PNG")
    show_text(trainer, "curvature/summary", "All is well.", 8)  # has no place to go, and is said on the console


@pytest.mark.pictures
def test_a_logger_that_takes_figures_leaves_no_file_beside_one_that_does_not(trainer, tmp_path):
    service = without_service(CometLogger)
    trainer.loggers = [CSVLogger(tmp_path), service]
    assert show_figure(trainer, "a/b", picture(), 0, tmp_path / "files" / "one.png") is False
    assert len(service.client.made) == 1
    assert not (tmp_path / "files").exists()
