"""Where figures and texts go: to each logger in its own way, and figures to a file if no logger takes any."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyapunov_lightning.training.lightning_names import Trainer, either
from lyapunov_lightning.training.reporting.files import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 200
"""Resolution of the files."""

_FigureOutlet = Callable[[Any, str, "Figure", int], None]
Guard = Callable[[], AbstractContextManager[Any]]
_TextOutlet = Callable[[Any, str, str, int], None]


def show_figure(
    trainer: Trainer, tag: str, figure: "Figure", step: int, path: Path, guard: Guard = nullcontext
) -> bool:
    """Hand a figure to every logger that takes figures; write it to a file if no logger does, or all of them fail.

    Args:
        trainer: The trainer; only the first rank calls this.
        tag: Its name, ``group/name``.
        figure: The figure.
        step: The step at which it is shown.
        path: The file, which replaces that of an earlier step.
        guard: Makes a context in which each of the loggers may fail.

    Returns:
        Whether the file was written.

    """
    outlets = [(outlet, logger) for logger in trainer.loggers if (outlet := _outlet(logger, _FIGURES)) is not None]
    is_shown = False
    for outlet, logger in outlets:
        with guard():
            outlet(logger, tag, figure, step)
            is_shown = True
    if not is_shown:
        write_figure(figure, path)
    return not is_shown


def takes_figures(trainer: Trainer) -> bool:
    """Whether a logger shows figures."""
    return any(_outlet(logger, _FIGURES) is not None for logger in trainer.loggers)


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        figure.savefig(partial, dpi=_DPI, format=path.suffix.removeprefix("."))


def show_text(trainer: Trainer, tag: str, text: str, step: int, guard: Guard = nullcontext) -> None:
    """Hand a text to every logger that takes texts.

    Args:
        trainer: The trainer; only the first rank calls this.
        tag: Its name, ``group/name``.
        text: The text.
        step: The step at which it is shown.
        guard: Makes a context in which each of the loggers may fail.

    """
    for logger in trainer.loggers:
        outlet = _outlet(logger, _TEXTS)
        if outlet is not None:
            with guard():
                outlet(logger, tag, text, step)


def _outlet(logger: Any, outlets: dict[str, Any]) -> Any:
    """The function that hands something to a logger, if the logger takes such things."""
    for name, outlet in outlets.items():
        if isinstance(logger, either(f"loggers.{name}")):
            # By class and not by a method of the name `log_figure`: several loggers have one, with other arguments.
            return outlet
    return None


def _image(figure: "Figure") -> Any:
    """The figure as an image: Weights & Biases recognises figures by the name of their class, and ours has another."""
    # Only here: Weights & Biases is one of four loggers, and Pillow is there wherever Matplotlib is.
    from PIL import Image

    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=_DPI)
    return Image.open(written)


def _file_name(tag: str, step: int) -> str:
    # MLflow keeps each as a file and lists them by name: with leading zeros that is the order of the steps.
    return f"{tag}/step{step:08d}"


_FIGURES: dict[str, _FigureOutlet] = {
    "TensorBoardLogger": lambda logger, tag, figure, step: logger.experiment.add_figure(tag, figure, step),
    "WandbLogger": lambda logger, tag, figure, step: logger.log_image(tag, [_image(figure)], step=step),
    "MLFlowLogger": lambda logger, tag, figure, step: logger.experiment.log_figure(
        logger.run_id, figure, f"{_file_name(tag, step)}.png"
    ),
    "CometLogger": lambda logger, tag, figure, step: logger.experiment.log_figure(tag, figure, step=step),
}

_TEXTS: dict[str, _TextOutlet] = {
    "TensorBoardLogger": lambda logger, tag, text, step: logger.experiment.add_text(tag, text, step),
    "WandbLogger": lambda logger, tag, text, step: logger.log_text(tag, columns=["text"], data=[[text]], step=step),
    "MLFlowLogger": lambda logger, tag, text, step: logger.experiment.log_text(
        logger.run_id, text, f"{_file_name(tag, step)}.txt"
    ),
    "CometLogger": lambda logger, tag, text, step: logger.experiment.log_text(f"{tag}: {text}", step=step),
}
