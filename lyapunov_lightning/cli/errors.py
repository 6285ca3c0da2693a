"""Errors on the command line: one line for an error of this package, the whole traceback for any other."""

import difflib
import os
import re
import sys
import traceback
from typing import NoReturn

import lyapunov_lightning

PROGRAM = "lyapunov-lightning"

_PROBLEM = re.compile(r"Problem with given class_path 'lyapunov_lightning\.(?:\w+\.)*(\w+)':\n((?: {8,}.*\n?)+)")

_TYPES = (ValueError, FileExistsError, FileNotFoundError, ModuleNotFoundError)
"""The built-in errors that the package raises for the user to read."""

_FOLDER = os.path.dirname(os.path.abspath(lyapunov_lightning.__file__)) + os.sep


def fail(error: BaseException | str) -> NoReturn:
    """End the program with one line on the error stream.

    Args:
        error: What went wrong.

    Raises:
        SystemExit: With exit status 2.

    """
    # Lightning starts the other ranks as processes of this same command, and each reports its error to one terminal.
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = f" (rank {rank})" if rank else ""
    sys.stderr.write(f"{PROGRAM}{where}: error: {' '.join(str(error).split())}\n")
    raise SystemExit(2)


def own_error(error: BaseException | None) -> BaseException | None:
    """The error among this one and its causes that this package raised for the user to read; None if there is none.

    It is of one of the types that the package raises with a message which names the cause and the remedy, and was
    raised in a file of the package. All others keep their traceback: an error in the user's module or in Lightning, and
    errors that are no message to the user, such as an AttributeError in our own code.
    """
    own_types = _own_types()
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        # Where it was raised is the last frame. Without that, a ValueError of the user's `__init__`, which our callback
        # runs on the way, would lose the traceback that leads to it.
        if isinstance(error, own_types) and frames and frames[-1].filename.startswith(_FOLDER):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _own_types() -> tuple[type[BaseException], ...]:
    # MisconfigurationException is of the classes of Lightning, which takes seconds to import. Where it has not been
    # imported, nothing has raised one.
    loaded = "lyapunov_lightning.training.lightning_names" in sys.modules
    if not loaded:
        return _TYPES
    from lyapunov_lightning.curvature.errors import MeasurementError
    from lyapunov_lightning.training.lightning_names import MisconfigurationException

    return (*_TYPES, MeasurementError, MisconfigurationException)


def explained(message: str) -> str:
    """An error message of jsonargparse, in one line where it concerns the callbacks of this package.

    Its own message gives, for each type that the Trainer takes as callbacks, why the value is not of that type.

    Args:
        message: As jsonargparse made it.

    Returns:
        One line that names the callbacks there are and the one that was probably meant, or the argument that is wrong;
        any other message unchanged.

    """
    if "trainer.callbacks" not in message:
        return message
    name = _unknown_callback(message)
    if name is not None:
        return _no_such_callback(name)
    problem = _PROBLEM.search(message)
    if problem is None:
        return message
    callback, cause = problem[1], " ".join(problem[2].split()).rstrip(".")
    return f"{callback}: {cause}. Its arguments: {PROGRAM} fit --trainer.callbacks.help {callback}"


def _unknown_callback(message: str) -> str | None:
    """The short name, or the name in this package, that was meant for a callback and is none."""
    for pattern in (
        r"Expected a dot import path string: ([\w.]+)",
        r"module 'lyapunov_lightning[\w.]*' has no attribute '(\w+)'",
    ):
        for name in re.findall(pattern, message):
            if "." not in name and name not in _known_callbacks():
                return str(name)
    return None


def _no_such_callback(name: str) -> str:
    from lyapunov_lightning import callbacks

    near = difflib.get_close_matches(name, _known_callbacks(), n=1, cutoff=0)
    return (
        f"There is no callback {name!r}. Did you mean {near[0]}? This package has"
        f" {', '.join(callbacks.__all__)}; others are named by their import path, such as"
        " lightning.pytorch.callbacks.EarlyStopping."
    )


def _known_callbacks() -> list[str]:
    """All callbacks that can be named without their module, those of this package first."""
    from lightning.pytorch import callbacks as of_lightning

    from lyapunov_lightning import callbacks

    return [*callbacks.__all__, *of_lightning.__all__]
