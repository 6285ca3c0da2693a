"""What a logger could not take waits and is not lost, and what it refuses for good does not stand in the way."""

import pytest

from lyapunov_lightning.training.reporting.backlog import _MOST_REFUSALS, Backlog


class Outlet:
    def __init__(self) -> None:
        self.taken: list[int] = []
        self.calls = 0
        self.is_open = True
        self.refused: set[int] = set()

    def take(self, entry: int) -> None:
        self.calls += 1
        if not self.is_open or entry in self.refused:
            raise ConnectionError(entry)
        self.taken.append(entry)


def test_what_waited_is_delivered_once_and_in_order_after_the_next_success():
    backlog, outlet = Backlog[int](), Outlet()
    outlet.is_open = False
    for entry in range(3):
        with pytest.raises(ConnectionError, match=str(entry)):
            backlog.deliver(outlet.take, entry)
    assert (backlog.num_waiting, outlet.calls) == (3, 3)  # one call each: one that hangs costs its time once
    outlet.is_open = True
    backlog.deliver(outlet.take, 3)
    assert outlet.taken == [3, 0, 1, 2]
    assert backlog.num_waiting == 0


def test_what_waits_is_tried_once_more_at_the_end():
    backlog, outlet = Backlog[int](), Outlet()
    outlet.is_open = False
    for entry in range(3):
        with pytest.raises(ConnectionError):
            backlog.deliver(outlet.take, entry)
    backlog.retry(outlet.take)
    assert (backlog.num_waiting, outlet.calls) == (3, 4)
    outlet.is_open = True
    backlog.retry(outlet.take)
    assert sorted(outlet.taken) == [0, 1, 2]


def test_an_entry_that_is_refused_for_good_holds_up_no_other():
    backlog, outlet = Backlog[int](), Outlet()
    outlet.refused = {0, 2}
    for entry in range(4 + 2 * _MOST_REFUSALS):
        if entry in outlet.refused:
            with pytest.raises(ConnectionError):
                backlog.deliver(outlet.take, entry)
        else:
            backlog.deliver(outlet.take, entry)
    assert outlet.taken == [entry for entry in range(4 + 2 * _MOST_REFUSALS) if entry not in outlet.refused]
    assert backlog.num_waiting == 0  # given up
