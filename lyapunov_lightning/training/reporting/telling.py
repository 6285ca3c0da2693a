"""Telling the user that something went wrong. Nothing here raises: it is what a run falls back on when all else has.

Where memory has run out, the next allocation may fail too; where an exception is the user's own, its message may be
broken; and a filter that makes errors of warnings is for the user's own code: an error raised from here would end the
training that the warning says goes on.
"""

import sys
import warnings
from contextlib import suppress

from lyapunov_lightning.curvature.errors import CurvatureWarning


def warn(message: str, *, stacklevel: int = 4) -> None:
    """Warn, by the console where the warning itself is made an error."""
    try:
        warnings.warn(message, CurvatureWarning, stacklevel=stacklevel)
    except Exception:
        with suppress(Exception):  # a console that is closed, or a file on the full disk that is being warned of
            print_instead(message)


def print_instead(message: str) -> None:
    """Say on the console what cannot be a warning."""
    sys.stderr.write(f"CurvatureWarning: {message}\n")


def described(error: BaseException, *, with_place: bool = False) -> str:
    """The type and the message of an exception, and where it was raised."""
    kind = type(error).__name__
    try:
        said = f"{error}"
    except Exception:  # of a class of the user's
        said = "its message cannot be shown"
    return f"{kind}{_place_of(error) if with_place else ''}: {said}"


def _place_of(error: BaseException) -> str:
    # By hand and not by `traceback.extract_tb`, which reads the source files for it, and so fails where there is no
    # memory. The last frame is where it happened.
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else f" at {last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
