"""Ctrl-C, and a signal to terminate, that wait until nothing is half done."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lyapunov_lightning.curvature.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the user, or the system, has asked for an end.

    Attributes:
        is_asked: Whether so.

    """

    def __init__(self) -> None:
        self.is_asked = False

    def check(self) -> None:
        """Raise it, where nothing is half done.

        Raises:
            Interrupted: If an end was asked for.

        """
        if self.is_asked:
            raise Interrupted


@contextmanager
def interruptible(what: str) -> Iterator[Interruption]:
    """A block that Ctrl-C and SIGTERM do not break off: it asks for itself whether to end. Ctrl-C twice does break it.

    In a thread other than the main one, and where these signals are ignored, they stay as they are.

    Args:
        what: What ends, for the line that is written at the first Ctrl-C.

    """
    interruption = Interruption()

    def note(number: int, frame: FrameType | None) -> None:
        if interruption.is_asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        interruption.is_asked = True
        sys.stderr.write(
            f"\n{what} ends at the next batch, with what it has found. Ctrl-C once more ends it at once.\n"
        )

    # Lightning's own handlers among them, which would end the process at Ctrl-C, and take no notice of SIGTERM here.
    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, note)
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
