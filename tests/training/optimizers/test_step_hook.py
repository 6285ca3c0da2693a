"""The hook on an optimizer's steps."""

import gc
import weakref

import torch

from lyapunov_lightning.training.optimizers.step_hook import StepHook


def optimizer_of(parameter: torch.Tensor) -> torch.optim.Optimizer:
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.SGD([parameter], lr=0.5)


def test_it_is_called_after_each_step_while_it_is_attached() -> None:
    parameter, seen = torch.zeros(1, requires_grad=True), []
    optimizer, hook = optimizer_of(parameter), StepHook()
    hook.release()
    hook.attach(optimizer, lambda: seen.append(parameter.item()))
    optimizer.step()
    optimizer.step()
    hook.release()
    hook.release()
    optimizer.step()
    assert seen == [-0.5, -1.0]


def test_it_is_on_one_optimizer_at_a_time() -> None:
    seen: list[str] = []
    first, second = (optimizer_of(torch.zeros(1, requires_grad=True)) for _ in range(2))
    hook = StepHook()
    hook.attach(first, lambda: seen.append("first"))
    hook.attach(second, lambda: seen.append("second"))
    first.step()
    second.step()
    assert seen == ["second"]


def test_a_released_hook_holds_nothing() -> None:
    class Held:
        def see(self) -> None:
            pass

    held, optimizer, hook = Held(), optimizer_of(torch.zeros(1, requires_grad=True)), StepHook()
    hook.attach(optimizer, held.see)
    reference = weakref.ref(held)
    hook.release()
    del held
    gc.collect()
    assert reference() is None
