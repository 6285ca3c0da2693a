"""A function that is called right after an optimizer's steps."""

from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle


class StepHook:
    """Calls a function right after each step of an optimizer, for as long as it is attached.

    Lightning's next hook is ``on_train_batch_end``. By then schedules have set the learning rate of the step that
    follows, and other callbacks may have moved the parameters: what the step itself did can be seen here only.

    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    @property
    def is_attached(self) -> bool:
        """Whether it calls."""
        return self._handle is not None

    def attach(self, optimizer: torch.optim.Optimizer, call: Callable[[], None]) -> None:
        """Call a function after every step of this optimizer from now on, and of no other one."""
        self.release()
        self._handle = optimizer.register_step_post_hook(lambda *_: call())

    def release(self) -> None:
        """Call it no more. The optimizer outlives the run, and would keep alive what the function holds."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
