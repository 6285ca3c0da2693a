"""What reaches the optimizer of a proposal: bounded, annealed, and halved when the losses say so."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lyapunov_lightning.curvature.acting.loss_watch import Verdict
from lyapunov_lightning.curvature.acting.pace import LRBounds
from lyapunov_lightning.training.optimizers.steering import Steering, StepLengths


class Run:
    """Ten steps of SGD at 0.5, and what warnings came."""

    def __init__(self, *, annealing: float = 0.0, keeps_copies: bool = True, **bounds: float) -> None:
        self.module = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.5)
        self.trainer: Any = SimpleNamespace(optimizers=[self.optimizer], global_step=0, estimated_stepping_batches=10)
        self.steering = Steering(LRBounds(**bounds), annealing, keeps_copies)  # type: ignore[arg-type]
        self.steering.start(self.trainer, self.optimizer)
        self.warned: list[tuple[str, str]] = []

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, loss: float) -> Verdict:
        self.steering.safeguard.before_batch(self.trainer, self.module)
        self.steering.set(self.trainer)
        self.trainer.global_step += 1
        return self.steering.see_loss(self.trainer, loss, lambda kind, text: self.warned.append((kind, text)))


def test_the_optimizer_keeps_its_own_learning_rate_until_there_is_a_proposal() -> None:
    run = Run()
    run.step(1.0)
    assert not run.steering.has_begun
    assert run.lr == run.steering.lr(run.trainer) == 0.5
    run.steering.approach(0.2)
    assert run.steering.has_begun
    run.step(1.0)
    assert run.lr == run.steering.lr(run.trainer) == 0.2


def test_a_learning_rate_falls_to_zero_at_the_end_and_not_below_its_floor() -> None:
    for floor, last in ((0.0, 0.1), (0.3, 0.3)):
        run = Run(annealing=0.5, min_lr=floor)
        run.steering.begin(0.5)
        lrs = []
        for _ in range(10):
            run.step(1.0)
            lrs.append(run.lr)
        assert lrs[:5] == [0.5] * 5
        assert lrs[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    ("lengths", "factor"),
    [
        (StepLengths(0.1, 0.1, 3.0, may_grow=True), 1.07),
        (StepLengths(0.1, 0.1, 3.0, may_grow=False), 1.0),
        (StepLengths(10.0, 10.0, 3.0, may_grow=True), 1 / 1.25),
        (StepLengths(10.0, 1.0, 3.0, may_grow=True), 1.0),
    ],
)
def test_short_steps_grow_and_long_ones_shrink(lengths: StepLengths, factor: float) -> None:
    run = Run()
    run.steering.begin(0.5)
    run.steering.follow(run.trainer, lengths)
    assert run.steering.lr(run.trainer) == pytest.approx(0.5 * factor, rel=0.02 if factor < 1 else 1e-9)


def test_steps_do_not_grow_while_the_end_shortens_them() -> None:
    run = Run(annealing=1.0)
    run.steering.begin(0.5)
    run.trainer.global_step = 1
    run.steering.follow(run.trainer, StepLengths(0.1, 0.1, 3.0, may_grow=True))
    assert run.steering.pace.lr == 0.5


def test_after_nan_the_learning_rate_is_halved_at_once() -> None:
    run = Run()
    run.step(1.0)  # at the optimizer's own learning rate
    assert run.step(math.nan) is Verdict.LOST
    assert run.lr == 0.25
    assert [kind for kind, _ in run.warned] == ["went back"]
    assert "brought back to step 0" in run.warned[0][1]


def test_without_a_copy_nan_stops_the_steering_for_good() -> None:
    run = Run(keeps_copies=False)
    run.steering.begin(0.5)
    assert run.step(math.nan) is Verdict.LOST
    run.steering.approach(0.4)
    run.step(1.0)
    assert run.step(math.nan) is Verdict.LOST
    assert run.lr == pytest.approx(0.5 / 2 / 100)
    assert [kind for kind, _ in run.warned] == ["stopped"]


def test_what_a_checkpoint_keeps_is_named() -> None:
    one, other = Run(), Run()
    one.steering.begin(0.3)
    one.step(1.0)
    one.step(math.nan)
    for name, part in other.steering.parts().items():
        part.load_state_dict(one.steering.parts()[name].state_dict())
    assert set(one.steering.parts()) == {"pace", "safeguard", "rates", "annealing"}
    assert other.steering.lr(other.trainer) == one.steering.lr(one.trainer)
    assert other.steering.safeguard.num_restored == 1
