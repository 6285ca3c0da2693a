"""What the ranks of a distributed measurement do together: sum up, agree on numbers, and fail.

Each rank has to take part in each collective, and all of them in one order: a rank that leaves without a word lets the
others wait for it until the network gives up, after 10 to 30 minutes. So a rank that fails takes part once more, in the
collective that the others enter next, and says there that it has failed.

Which one they enter next it knows while the ranks are `together`, as in a solver: every sum is preceded by a short
message of a fixed length, and so is the end of the block. A rank that fails outside of a sum sends this message in
place of the one that was to come. It is the last one of the block, for all ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import PeerFailureError

_MESSAGE_LENGTH = 64
"""Numbers in a message. The first two count the ranks that failed and the ranks that did not."""


@dataclass(eq=False)
class _Block:
    """A block in which ranks are together.

    Attributes:
        ranks: The object that began it.
        num_failed: How many ranks have left it because they failed. Then the others have to leave it as well.

    """

    ranks: "Ranks"
    num_failed: int = 0


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("_blocks", default=())
"""The present blocks, the innermost one last. A second operator, whose products are part of the products of the first
one, has an object of its own for the same ranks: this is how it knows that a block has begun."""


class Ranks:
    """The ranks of a distributed measurement, or the one rank of any other.

    Objects with an equal `reduce` are the same ranks.

    Args:
        reduce: Sums a flat buffer over all ranks, in place; None for a single rank.
        device: Where buffers are to be; the CPU if None.

    Attributes:
        is_single: Whether there are no others.
        solver: Stands for the outermost block in which the ranks are `together` at present; None outside of one.

    """

    def __init__(self, reduce: Callable[[Tensor], None] | None = None, device: torch.device | None = None) -> None:
        self.is_single = reduce is None
        self.solver: object = None
        self._reduce = reduce
        if reduce is not None:
            device = device or torch.device("cpu")
            dtype = torch.float32 if device.type == "mps" else torch.float64
            with torch.inference_mode(False):
                # Made in advance, since a rank that has no memory left still has to say so.
                self._message = torch.zeros(_MESSAGE_LENGTH, dtype=dtype, device=device)

    @contextmanager
    def summing(self, buffer: Tensor) -> Iterator[None]:
        """Let a block fill a buffer, and sum it over all ranks.

        Args:
            buffer: A flat buffer, the last entry of which is left to count the ranks that failed.

        Raises:
            PeerFailureError: If the block failed on another rank; what failed on this one is raised as it is.

        """
        if self._reduce is None:
            yield
            return
        # A rank that failed before sends a message that is shorter than this buffer. What a sum of unequal lengths does
        # is not defined, so all have to know of the failure before anybody sends the buffer.
        self.meet()
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error  # raised below, once the other ranks know of it
            buffer.zero_()
            buffer[-1] = 1
        self._sum(buffer)
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # or this frame and the traceback keep each other, and a graph, alive
        failed = int(buffer[-1])
        if failed:
            raise PeerFailureError(failed)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what fails on one rank within a block end the block on all of them.

        All ranks have to enter it. Blocks may be nested: what was done in an inner one has been done by all ranks once
        it is left, and what failed has failed on all of them. An exception that all catch within a block does not end
        that block.

        Raises:
            PeerFailureError: If the block failed on another rank; what failed on this one is raised as it is.

        """
        before, self.solver = self.solver, self.solver or object()
        try:
            with self._block():
                yield
        finally:
            self.solver = before

    @contextmanager
    def _block(self) -> Iterator[None]:
        if self._reduce is None:
            yield
            return
        if self._present_blocks():
            # The other ranks may still be in the outer block, and one of them may fail there: a message has to belong
            # to one block.
            self._exchange([])
        outer, block = _blocks.get(), _Block(self)
        _blocks.set((*outer, block))
        try:
            yield
            self._exchange([])
        except Exception:
            if not block.num_failed:
                self._send([1.0])
            raise
        finally:
            _blocks.set(outer)

    def agreed(self, numbers: Tensor) -> Tensor:
        """The mean over the ranks of numbers that are equal but for rounding, or the numbers of a single rank.

        What is decided by them is decided alike on all ranks, also on unlike hardware: a residual of 0.99999 and one of
        1.00001 times the tolerance would let one rank stop and the other one wait. To be used where the ranks are
        `together`.

        Args:
            numbers: Shape ``(n,)``, on any device.

        Returns:
            Shape ``(n,)``, in float64 on the CPU.

        Raises:
            PeerFailureError: If another rank has failed.

        """
        numbers = numbers.to("cpu", torch.float64)
        if self._reduce is None:
            return numbers
        num_ranks, sums = self._exchange(numbers.tolist())
        return torch.tensor(sums, dtype=torch.float64, device="cpu") / num_ranks

    def summed(self, numbers: Tensor) -> Tensor:
        """The sums over the ranks of a few numbers, of which each rank has its part.

        Args:
            numbers: Shape ``(n,)``, on any device.

        Returns:
            Shape ``(n,)``, in float64 on the CPU, the same on all ranks.

        Raises:
            PeerFailureError: If another rank has failed.

        """
        numbers = numbers.to("cpu", torch.float64)
        if self._reduce is None:
            return numbers
        return torch.tensor(self._exchange(numbers.tolist())[1], dtype=torch.float64, device="cpu")

    def sum_of(self, number: float) -> float:
        """The sum of one number over the ranks, see `summed`."""
        return float(self.summed(torch.tensor([number], dtype=torch.float64, device="cpu")))

    def all_say(self, yes: bool) -> bool:
        """Whether all ranks say yes; to be asked by all of them where they are `together`."""
        return self.sum_of(float(not yes)) == 0

    def meet(self) -> None:
        """Make sure that no rank has failed, before a collective in which one that has could not say so.

        Raises:
            PeerFailureError: If one has, where the ranks are `together`.

        """
        if self._reduce is not None and self._present_blocks():
            self._exchange([])

    def joining(self, compute: Callable[[], None], collective: Callable[[bool], int]) -> None:
        """Compute something, and then take part in a collective whether that went well or not.

        Args:
            compute: What may fail on this rank alone.
            collective: Takes part in a collective in which failures are counted. It gets whether this rank has failed,
                and returns how many have.

        Raises:
            PeerFailureError: If another rank failed; what failed on this one is raised as it is.

        """
        failure: Exception | None = None
        try:
            compute()
        except Exception as error:
            failure = error  # raised below, once the other ranks know of it
        try:
            num_failed = collective(failure is not None)
        except Exception:
            self._give_up()
            raise
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # as in `summing`
        if num_failed:
            raise PeerFailureError(num_failed)

    def _present_blocks(self) -> list[_Block]:
        """The blocks in which these ranks are together, the innermost one last."""
        return [block for block in _blocks.get() if block.ranks._reduce == self._reduce]

    def _exchange(self, numbers: list[float]) -> tuple[float, list[float]]:
        """How many ranks there are, and the sums of some numbers over them, in as many messages as it takes."""
        blocks = self._present_blocks()
        room = _MESSAGE_LENGTH - 2
        all_sums: list[float] = []
        for start in range(0, max(len(numbers), 1), room):
            num_failed = blocks[-1].num_failed if blocks else 0
            if not num_failed:  # after a failure nobody answers any more in this block
                part = numbers[start : start + room]
                failed, present, *sums = self._send([0.0, 1.0, *part])
                num_failed = int(failed)
            if num_failed:
                if blocks:
                    blocks[-1].num_failed = num_failed
                raise PeerFailureError(num_failed)
            all_sums.extend(sums[: len(part)])
        return present, all_sums

    def _send(self, numbers: list[float]) -> list[float]:
        blocks = self._present_blocks()
        # Ranks have to send from devices of one kind. Objects for the same ranks may differ in it, on offloaded vectors
        # for example, so the outermost block decides.
        message = (blocks[0].ranks if blocks else self)._message
        padded = numbers + [0.0] * (_MESSAGE_LENGTH - len(numbers))
        message.copy_(torch.tensor(padded, dtype=message.dtype, device="cpu"))
        self._sum(message)
        received: list[float] = message.tolist()
        return received

    def _sum(self, buffer: Tensor) -> None:
        """Sum over the ranks."""
        assert self._reduce is not None
        try:
            self._reduce(buffer)
        except Exception:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Where a collective itself has failed nothing more is sent, since nobody knows who took part."""
        for block in self._present_blocks():
            block.num_failed = 1
