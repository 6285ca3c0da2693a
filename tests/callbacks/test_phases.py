"""From one phase of a step to the next."""

from typing import Any

import pytest
import torch
from torch import nn

from lyapunov_lightning.callbacks.phases import FirstStepDue, OnTrial, Seen, Stepping
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.training.optimizers.learning_rates import LearningRates
from lyapunov_lightning.training.optimizers.updates import SeenOnDevice


@pytest.mark.parametrize(("own", "tried_at"), [(0.1, 0.1), (1e-3, 1e-3), (1e-9, 1.0)])
def test_the_first_step_is_tried_where_it_can_be_seen(own: float, tried_at: float) -> None:
    x = nn.Parameter(torch.ones(2))
    hessian = HessianOperator(lambda batch: (x**2).sum(), [x], [torch.zeros(1)])
    optimizer = torch.optim.SGD([x], lr=own)
    rates = LearningRates()
    rates.start(optimizer)
    step: Any = object()
    phase = FirstStepDue(hessian, step).step_on_trial(rates)
    assert isinstance(phase, OnTrial)
    assert phase.step is step
    assert rates.highest == tried_at
    assert phase.own_lr == own
    x.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(phase.observed.rewind() / rates.highest, -torch.ones(2), rtol=1e-4, atol=0)
    assert torch.equal(x.detach(), torch.ones(2))


def test_what_the_gradient_of_a_batch_has_seen_counts_once_the_optimizer_steps() -> None:
    update = SeenOnDevice(*torch.ones(4))
    stepping = Seen(update, 0.3).step()
    assert isinstance(stepping, Stepping)
    assert stepping.update is update
    assert stepping.lr == 0.3
