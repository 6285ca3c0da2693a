"""Ranks that sum, agree and fail in one order, whoever fails where: threads, each of them a rank."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature.errors import PeerFailureError
from lyapunov_lightning.curvature.vectors.ranks import Ranks

COUNT = 3


class OutOfStepError(Exception):
    """The ranks are in different collectives, or one waits for ever."""


class PlannedError(RuntimeError):
    """The fault that a test provokes."""


class Network:
    """Sums over ranks that are threads; what is wrong on a real network is an error here."""

    def __init__(self) -> None:
        self._sent: list[Tensor] = [torch.zeros(0)] * COUNT
        self._barrier = threading.Barrier(COUNT, timeout=120)
        self.lengths: list[list[int]] = [[] for _ in range(COUNT)]

    def of(self, rank: int) -> Callable[[Tensor], None]:
        def reduce(buffer: Tensor) -> None:
            self.lengths[rank].append(len(buffer))
            self._sent[rank] = buffer.clone()
            try:
                self._barrier.wait()
                sent = list(self._sent)
                self._barrier.wait()
            except threading.BrokenBarrierError as error:
                raise OutOfStepError from error
            if len({(len(part), part.dtype) for part in sent}) > 1:
                raise OutOfStepError
            buffer.copy_(torch.stack(sent).sum(dim=0))

        return reduce

    def leave(self) -> None:
        """Of a rank that is done: nobody may still wait for it."""
        if self._barrier.n_waiting:
            self._barrier.abort()


def on_all_ranks(function: Callable[[int, Ranks], Any]) -> tuple[list[Any], Network]:
    """What a function returns or raises on each rank."""
    network = Network()
    outcomes: list[Any] = [None] * COUNT
    done = threading.Barrier(COUNT, timeout=120)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = function(rank, Ranks(network.of(rank)))
        except Exception as error:
            outcomes[rank] = error
        network.leave()
        done.wait()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, network


def summed(ranks: Ranks, fail: bool = False, length: int = 5) -> Tensor:
    """What a product does."""
    buffer = torch.zeros(length + 1)
    with ranks.summing(buffer):
        if fail:
            raise PlannedError
        buffer[:-1] = 1
    assert buffer[:-1].eq(COUNT).all()
    return buffer[:-1]


# Programs.


@dataclass(frozen=True)
class Action:
    """What the ranks do in a block, one action after the other.

    Attributes:
        kind: ``"sum"``, ``"agree"``, ``"local"`` or ``"block"``.
        failing: Who of the ranks fails in it.
        caught: Whether the exception that comes of it is caught, by all of them.
        parts: What is done in a block.

    """

    kind: str
    failing: frozenset[int] = frozenset()
    caught: bool = False
    parts: tuple["Action", ...] = ()


some_ranks = st.sets(st.integers(0, COUNT - 1), min_size=1).map(frozenset)
harmless = st.sampled_from([Action("sum"), Action("agree"), Action("local"), Action("block", parts=(Action("sum"),))])
fault = st.builds(Action, st.sampled_from(["sum", "agree", "local"]), some_ranks)


def around(before: list[Action], fault: Action, after: list[Action]) -> tuple[Action, ...]:
    return (*before, fault, *after)


few = st.lists(harmless, max_size=2)
failing_block = st.builds(lambda parts: Action("block", parts=parts), st.builds(around, few, fault, few))
caught = st.one_of(
    st.builds(Action, st.just("sum"), some_ranks, st.just(True)),
    st.builds(lambda block: replace(block, caught=True), failing_block),
)


def perform(action: Action, rank: int, ranks: Ranks) -> None:
    fails = rank in action.failing
    try:
        if action.kind == "sum":
            summed(ranks, fails)
            return
        if fails:
            raise PlannedError
        if action.kind == "agree":
            numbers = torch.arange(100.0)  # more than fit into a message
            assert torch.equal(ranks.agreed(numbers), numbers.double())
        if action.kind == "block":
            inner = Ranks(ranks._reduce)  # another object for the same ranks
            with inner.together():
                for part in action.parts:
                    perform(part, rank, inner)
    except (PlannedError, PeerFailureError):
        if not action.caught:
            raise


def failing_in(action: Action) -> frozenset[int]:
    """Who fails in an action."""
    return action.failing.union(*map(failing_in, action.parts))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.one_of(harmless, caught), max_size=4), st.one_of(fault, failing_block), few)
def test_a_failure_ends_a_block_on_all_ranks_and_leaves_them_in_step(before, fault, after) -> None:
    """In and outside of sums, in inner blocks, and after failures that were caught."""

    def run(rank: int, ranks: Ranks) -> Any:
        try:
            with ranks.together():
                for action in around(before, fault, after):
                    perform(action, rank, ranks)
            outcome: Any = "nothing"
        except (PlannedError, PeerFailureError) as error:
            outcome = type(error)
        summed(ranks, length=3)
        return outcome

    outcomes, network = on_all_ranks(run)
    assert outcomes == [PlannedError if rank in failing_in(fault) else PeerFailureError for rank in range(COUNT)]
    assert network.lengths[0] == network.lengths[1] == network.lengths[2]
    assert network.lengths[0][-1] == 4  # the sum at the end is not preceded by a message any more


sums_that_fail = st.builds(Action, st.just("sum"), some_ranks, st.just(True))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.one_of(harmless, sums_that_fail), max_size=6))
def test_a_sum_the_end_and_either_end_of_an_inner_block_take_one_message(program) -> None:
    def run(rank: int, ranks: Ranks) -> None:
        with ranks.together():
            for action in program:
                perform(action, rank, ranks)

    outcomes, network = on_all_ranks(run)
    assert outcomes == [None] * COUNT
    expected: list[int] = []
    for action in program:
        expected += {"sum": [64, 6], "agree": [64, 64], "local": [], "block": [64, 64, 6, 64]}[action.kind]
    assert network.lengths == [[*expected, 64]] * COUNT


# Single cases.


def test_what_follows_an_inner_block_is_done_by_all_ranks_or_by_none() -> None:
    """Such as to keep what a solver found, for what comes next."""
    kept: list[int] = []

    def run(rank: int, ranks: Ranks) -> None:
        with ranks.together():
            with ranks.together():
                summed(ranks)
                if rank == 1:
                    raise PlannedError
            kept.append(rank)

    on_all_ranks(run)
    assert not kept


def test_a_failure_that_some_ranks_catch_and_others_leave_by_ends_the_block_for_all() -> None:
    def run(rank: int, ranks: Ranks) -> None:
        with ranks.together():
            try:
                summed(ranks, fail=rank == 1)
            except PeerFailureError:
                if rank == 2:
                    raise
            summed(ranks)

    outcomes, network = on_all_ranks(run)
    assert [type(outcome) for outcome in outcomes] == [PeerFailureError, PlannedError, PeerFailureError]
    assert network.lengths == [[64, 6, 64]] * COUNT


def test_who_catches_that_another_rank_left_gets_no_further() -> None:
    def run(rank: int, ranks: Ranks) -> Any:
        with ranks.together():
            if rank == 0:
                raise PlannedError
            for _ in range(3):
                with pytest.raises(PeerFailureError):
                    summed(ranks)
            with pytest.raises(PeerFailureError):
                ranks.agreed(torch.ones(2))

    outcomes, network = on_all_ranks(run)
    assert [type(outcome) for outcome in outcomes] == [PlannedError, PeerFailureError, PeerFailureError]
    assert network.lengths == [[64]] * COUNT


def test_a_block_that_failed_is_forgotten_by_the_next_one() -> None:
    def run(rank: int, ranks: Ranks) -> list[str]:
        found = []
        for failing in (0, None, 2, None):
            try:
                with ranks.together():
                    summed(ranks)
                    if rank == failing:
                        raise PlannedError
                found.append("nothing")
            except Exception as error:
                found.append(type(error).__name__)
            assert ranks.agreed(torch.tensor([2.0])).tolist() == [2]
        return found

    outcomes, _ = on_all_ranks(run)
    assert outcomes[1] == ["PeerFailureError", "nothing", "PeerFailureError", "nothing"]
    assert outcomes[2] == ["PeerFailureError", "nothing", "PlannedError", "nothing"]


def test_products_of_a_second_operator_within_a_block_are_part_of_it() -> None:
    """Such as those of the sum of two matrices."""

    def run(rank: int, ranks: Ranks) -> None:
        second = Ranks(ranks._reduce)
        with ranks.together():
            summed(ranks)
            if rank == 2:
                raise PlannedError
            summed(second)

    outcomes, network = on_all_ranks(run)
    assert [type(outcome) for outcome in outcomes] == [PeerFailureError, PeerFailureError, PlannedError]
    assert network.lengths == [[64, 6, 64]] * COUNT


def test_other_ranks_are_no_part_of_a_block() -> None:
    group, others = Network(), Network()

    def run(rank: int, ranks: Ranks) -> None:
        with Ranks(group.of(rank)).together():
            summed(Ranks(others.of(rank)))

    on_all_ranks(run)
    assert group.lengths == [[64]] * COUNT
    assert others.lengths == [[6]] * COUNT


def test_what_is_agreed_is_the_mean_bit_by_bit_the_same_on_all_ranks() -> None:
    def run(rank: int, ranks: Ranks) -> Tensor:
        return ranks.agreed(torch.arange(130.0) * (1 + 1e-6 * rank))

    outcomes, _ = on_all_ranks(run)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.allclose(outcomes[0], torch.arange(130.0).double(), rtol=2e-6)
    assert outcomes[0].dtype == torch.float64


def test_what_is_not_finite_on_one_rank_is_agreed_upon_and_is_no_failure() -> None:
    def run(rank: int, ranks: Ranks) -> list[float]:
        with ranks.together():
            return ranks.agreed(torch.tensor([float("nan") if rank == 1 else 1.0, 2.0])).tolist()

    outcomes, _ = on_all_ranks(run)
    for outcome in outcomes:
        assert outcome[0] != outcome[0]
        assert outcome[1] == 2


@pytest.mark.parametrize("against", [None, 1])
def test_all_say_yes_or_one_does_not(against: int | None) -> None:
    def run(rank: int, ranks: Ranks) -> bool:
        with ranks.together():
            return ranks.all_say(rank != against)

    outcomes, _ = on_all_ranks(run)
    assert outcomes == [against is None] * COUNT
    assert Ranks().all_say(True)
    assert not Ranks().all_say(False)


def test_where_the_network_fails_nothing_more_is_sent() -> None:
    sent: list[int] = []

    def reduce(buffer: Tensor) -> None:
        sent.append(len(buffer))
        raise PlannedError

    ranks = Ranks(reduce)
    for _ in range(2):
        with pytest.raises(PlannedError), ranks.together():
            summed(ranks)
    assert sent == [64, 64]
    with pytest.raises(PlannedError):
        summed(ranks)
    with pytest.raises(PlannedError):
        ranks.agreed(torch.ones(1))


def test_an_interrupted_rank_sends_nothing() -> None:
    sent: list[int] = []
    ranks = Ranks(lambda buffer: sent.append(len(buffer)))
    with pytest.raises(KeyboardInterrupt), ranks.together():
        raise KeyboardInterrupt
    assert sent == []


def test_a_rank_without_memory_can_say_so() -> None:
    """Messages use memory that was there before."""
    addresses: list[int] = []
    ranks = Ranks(lambda buffer: addresses.append(buffer.data_ptr()))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError), ranks.together():
            raise torch.OutOfMemoryError
    assert len(addresses) == 2
    assert len(set(addresses)) == 1


@contextmanager
def only_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("surroundings", [torch.inference_mode, torch.no_grad, only_meta])
def test_messages_are_independent_of_what_is_in_force_around_them(surroundings) -> None:
    def run(rank: int, ranks: Ranks) -> list[list[float]]:
        numbers = torch.ones(2)
        with surroundings():
            inner = Ranks(ranks._reduce)
            found = [inner.agreed(numbers), ranks.agreed(numbers)]
        return [numbers.tolist() for numbers in (*found, inner.agreed(numbers))]

    outcomes, _ = on_all_ranks(run)
    assert outcomes == [[[1, 1]] * 3] * COUNT


def test_a_single_rank_sends_nothing_and_copies_nothing() -> None:
    ranks = Ranks()
    assert ranks.is_single
    numbers, buffer = torch.rand(3, dtype=torch.float64), torch.ones(4)
    with ranks.together(), ranks.together():
        assert ranks.agreed(numbers) is numbers
        with ranks.summing(buffer):
            buffer[-1] = 7  # which nobody reads
    assert buffer.tolist() == [1, 1, 1, 7]
    with pytest.raises(PlannedError), ranks.together(), ranks.summing(buffer):
        raise PlannedError
    assert buffer.tolist() == [1, 1, 1, 7]
