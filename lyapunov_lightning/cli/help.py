"""The help of a callback in the terminal: its docstring, which says all, without the markup."""

import argparse
import inspect
import re
import shutil
import textwrap

from jsonargparse import ArgumentParser

from lyapunov_lightning import callbacks
from lyapunov_lightning.cli.errors import PROGRAM

_OPTION = "--trainer.callbacks.help"


def print_callback_help(args: list[str]) -> None:
    """Answer ``--trainer.callbacks.help NAME`` for the callbacks of this package, and end the program.

    Does nothing if `args` end with anything else: other callbacks, and the help of an argument's own arguments, are
    left to jsonargparse.

    Args:
        args: The command line's arguments.

    Raises:
        SystemExit: With status 0, after the help was printed.

    """
    if args[-1] == _OPTION:
        print(f"The callbacks; more about one: {PROGRAM} fit {_OPTION} NAME")
        for name in callbacks.__all__:
            summary = reflowed(_description(name).split("\n\n")[0], _width() - 4)
            print(f"\n  {name}\n{textwrap.indent(summary, '    ')}")
        raise SystemExit(0)
    # `--option=NAME` and `--option NAME` are the same to argparse, and so to whoever types them.
    option, _, name = args[-1].partition("=") if "=" in args[-1] else (args[-2:][0], "", args[-1])
    name = name.removeprefix("lyapunov_lightning.").removeprefix("callbacks.")
    if option == _OPTION and name in callbacks.__all__:
        print(callback_help(name))
        raise SystemExit(0)


def callback_help(name: str) -> str:
    """What the callback does and logs, and all its arguments, as text.

    Args:
        name: One of `lyapunov_lightning.callbacks`.

    """
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    # By jsonargparse, which reads types, defaults and descriptions from the signature and the docstring: the help
    # cannot differ from what is parsed.
    parser.add_class_arguments(getattr(callbacks, name), "trainer.callbacks", as_group=False)
    arguments = plain(parser.format_help()).replace("options:", "Arguments:", 1)
    return f"{name}\n\n{reflowed(_description(name), _width())}\n\n{arguments}"


def plain(text: str) -> str:
    """The text without the markup of code and emphasis."""
    text = re.sub(r"``(.+?)``", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"`([\w.]+)`", r"\1", text)
    return re.sub(r"(?<![\w*])(\*{1,2})(\w[^*\n]*)\1(?![\w*])", r"\2", text)


def reflowed(text: str, width: int) -> str:
    """The paragraphs and lists of a docstring, filled to a width."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        # A list keeps its lines, each filled for itself: as one paragraph the tags of `CurvatureProbe` would run
        # together.
        items = re.split(r"\n(?=- )", block)
        blocks.append("\n".join(_filled(item, width) for item in items))
    return "\n\n".join(blocks)


def _description(name: str) -> str:
    """All of a callback's docstring that comes before its arguments."""
    docstring = inspect.getdoc(getattr(callbacks, name)) or ""
    return plain(docstring.partition("\nArgs:\n")[0].strip())


def _filled(item: str, width: int) -> str:
    if item.startswith(" "):  # a formula, which has its own line
        return textwrap.indent(textwrap.dedent(item), "  ")
    indent = "  " if item.startswith("- ") else ""
    return textwrap.fill(
        " ".join(item.split()), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100) - 2
