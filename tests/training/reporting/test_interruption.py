"""Ctrl-C waits until nothing is half done; a second one does not."""

import os
import signal
import threading

import pytest

from lyapunov_lightning.curvature.errors import Interrupted
from lyapunov_lightning.training.reporting.interruption import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_told_and_the_handlers_are_put_back(number, capsys):
    before = signal.getsignal(number)
    with interruptible("The search") as interruption:
        interruption.check()
        os.kill(os.getpid(), number)
        assert interruption.is_asked
        assert capsys.readouterr().err == (
            "\nThe search ends at the next batch, with what it has found. Ctrl-C once more ends it at once.\n"
        )
        with pytest.raises(Interrupted):
            interruption.check()
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that repeats itself
    assert signal.getsignal(number) == before
    assert not capsys.readouterr().err


def test_ctrl_c_twice_is_at_once():
    with interruptible("The search"):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as raised:
            os.kill(os.getpid(), signal.SIGINT)
    assert raised.type is KeyboardInterrupt


def test_a_signal_that_is_ignored_and_another_thread_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible("The search") as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not interruption.is_asked
    finally:
        signal.signal(signal.SIGTERM, before)
    seen = []

    def elsewhere() -> None:
        with interruptible("The search"):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
