"""The command line: LightningCLI with this package's callbacks at hand, `measure`, and the example configurations.

``lyapunov-lightning --help`` and ``lyapunov-lightning examples`` answer at once: Lightning is imported when a command
needs it.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from lyapunov_lightning import __version__
from lyapunov_lightning.cli.errors import PROGRAM, fail, own_error
from lyapunov_lightning.cli.examples import write_examples

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

_DESCRIPTION = "The curvature of a network's training loss, measured while it trains or at a checkpoint."

_EPILOG = f"""\
start here:
  pip install 'lyapunov_lightning[examples]'
  {PROGRAM} examples
  {PROGRAM} fit --config examples/configs/quickstart.yaml

what a callback measures, logs and takes:
  {PROGRAM} fit --trainer.callbacks.help CurvatureProbe

A configuration names modules and data by their import path; the current directory is searched first. All arguments of
a command: {PROGRAM} fit --help."""

TRAINER_COMMANDS = {
    "fit": "train, with the callbacks that the configuration names",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run the model on the prediction data",
    "measure": "the spectrum of the Hessian at a checkpoint, as a table and a picture",
}
"""The commands that need the Trainer, the model and the data of a configuration."""


def main(args: list[str] | None = None) -> "LightningCLI | None":
    """Run ``lyapunov-lightning``, for instance ``lyapunov-lightning fit --config config.yaml``.

    Modules and data are named by their import path; the current directory is searched first. What a callback logs and
    takes: ``lyapunov-lightning fit --trainer.callbacks.help CurvatureProbe``.

    Args:
        args: The command line's arguments; those of the process if None.

    Returns:
        The finished LightningCLI, with its ``trainer`` and ``model``; None for the commands that need none.

    Raises:
        SystemExit: After ``--help`` and ``--version``, and for every error raised by this package, which is reported
            in one line on the error stream.

    """
    given = sys.argv[1:] if args is None else args
    try:
        # LightningCLI takes `--config` in front of the subcommand too. Everything else is answered without importing
        # Lightning, which takes seconds.
        if given and (given[0] in TRAINER_COMMANDS or given[0].startswith("--config") or given[0] == "-c"):
            return _run_lightning(given, args)
        options = _parser().parse_args(given)
        write_examples(options.dest, everything=options.all)
    except Exception as error:
        cause = own_error(error)
        if cause is None:
            raise
        fail(cause)
    return None


def run() -> None:
    """The console script: `main` without its result, which the shell would take for an exit status."""
    main()


def _run_lightning(given: list[str], args: list[str] | None) -> "LightningCLI":
    try:
        from lyapunov_lightning.cli.command_line import CommandLine
    except ModuleNotFoundError as error:
        # A module that the user's own code lacks is no reason to install ours.
        if error.name not in ("jsonargparse", "docstring_parser"):
            raise
        raise ModuleNotFoundError(
            "The command line needs jsonargparse. Install it with `pip install 'lyapunov_lightning[cli]'`."
        ) from error
    from lyapunov_lightning.cli.help import print_callback_help

    # `python -m` has the current directory on its path, a console script has not: `examples.models...` of a
    # configuration would not be found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    print_callback_help(given)
    parser_kwargs = {name: {"description": does} for name, does in TRAINER_COMMANDS.items()}
    return CommandLine(args=args, parser_kwargs={"prog": PROGRAM, "description": _DESCRIPTION, **parser_kwargs})


def _parser() -> argparse.ArgumentParser:
    """The parser behind ``--help``, and for all commands that are not for LightningCLI."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, does in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=does)
    does = "write six example configurations, one for each callback, with their models and data, into a folder"
    examples = commands.add_parser("examples", help=does, description=does)
    examples.add_argument("dest", nargs="?", default=".", help="where to make the folder `examples`; here by default")
    examples.add_argument("--all", action="store_true", help="all examples, with the papers' figures and tables")
    return parser
