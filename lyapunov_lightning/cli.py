"""The command line: LightningCLI with this package's callbacks at hand by their short names."""

import os
import sys
import traceback
from typing import TYPE_CHECKING

from typing_extensions import override

import lyapunov_lightning.callbacks  # known by their short names once they are imported

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI


def main(args: list[str] | None = None) -> "LightningCLI":
    """Run ``lyapunov-lightning``, for instance ``lyapunov-lightning fit --config config.yaml``.

    Modules and data are named by their import path; the current directory is searched first. The arguments of a
    callback, with their documentation: ``lyapunov-lightning fit --trainer.callbacks.help CurvatureProbe``.

    Args:
        args: The command line's arguments; those of the process if None.

    Returns:
        The finished LightningCLI, with its ``trainer`` and ``model``.

    Raises:
        ModuleNotFoundError: If the extra ``cli`` is not installed.

    """
    try:
        from lightning.pytorch.cli import LightningCLI
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The command line needs jsonargparse. Install it with `pip install 'lyapunov_lightning[cli]'`."
        ) from error

    class CommandLine(LightningCLI):
        @override
        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                cause = _own_error(error)
                if cause is None:
                    raise
                self.parser.error(str(cause))

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return CommandLine(args=args, parser_kwargs={"prog": "lyapunov-lightning"})


def run() -> None:
    """The console script: `main` without its result, which the shell would take for an exit status."""
    main()


def _own_error(error: BaseException | None) -> BaseException | None:
    """The error among this one's causes that was raised by this package, about an argument of the user's."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.startswith(os.path.dirname(lyapunov_lightning.__file__)):
            return error
        error = error.__cause__ or error.__context__
    return None
