"""A training that is lost goes on from where it was well; one that cannot be helped is told from it."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lyapunov_lightning.curvature.acting.loss_watch import Verdict
from lyapunov_lightning.training.optimizers.safeguard import Safeguard


class Training:
    """Batches whose losses a test says; every step adds one to the parameter."""

    def __init__(self, **options: Any) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        self.module.weight.data.zero_()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0, momentum=0.5)
        self.trainer = SimpleNamespace(global_step=0, optimizers=[self.optimizer])
        self.safeguard = Safeguard(**options)

    def step(self, loss: float) -> tuple[Verdict, int | None]:
        self.safeguard.before_batch(self.trainer, self.module)
        self.module.weight.data += 1
        self.trainer.global_step += 1
        return self.safeguard.after_batch(loss, self.optimizer)

    @property
    def place(self) -> float:
        return float(self.module.weight.detach())


def test_the_training_goes_back_to_the_copy_that_the_losses_since_have_proven() -> None:
    training = Training()
    for _ in range(45):
        assert training.step(1.0) == (Verdict.WELL, None)
    assert training.place == 45
    assert training.step(math.nan) == (Verdict.LOST, 21)
    assert training.place == 21
    assert training.safeguard.num_restored == 1


def test_the_first_copy_counts_until_another_one_is_proven() -> None:
    training = Training()
    for _ in range(20):
        training.step(1.0)
    assert training.step(math.nan) == (Verdict.LOST, 0)
    assert training.place == 0


def test_a_copy_after_which_losses_were_higher_does_not_count() -> None:
    """Each single loss is well: between the noise of those before, and slowly higher."""
    training = Training()
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    for sample in noise[:22]:
        training.step(2.0 + 0.2 * sample)
    verdicts = [training.step(2.2 + 0.02 * step + 0.2 * noise[30 + step])[0] for step in range(25)]
    assert set(verdicts) <= {Verdict.WELL, Verdict.SUSPECT, Verdict.RISING}
    assert verdicts.count(Verdict.WELL) >= 20
    assert training.step(math.nan) == (Verdict.LOST, 1)  # and not 21


def test_without_copies_there_is_nothing_to_go_back_to() -> None:
    training = Training(keeps_copies=False)
    training.step(1.0)
    assert training.step(math.inf) == (Verdict.LOST, None)
    assert training.place == 2
    assert training.safeguard.is_hopeless(math.inf, None)
    assert not training.safeguard.is_hopeless(5.0, None)


def test_ten_attempts_in_a_row_are_enough() -> None:
    training = Training()
    training.step(1.0)
    for attempt in range(1, 11):
        verdict, restored = training.step(math.nan)
        assert (verdict, restored) == (Verdict.LOST, 0)
        assert training.safeguard.is_hopeless(math.nan, restored) == (attempt == 10)
    training.step(1.0)
    assert not training.safeguard.is_hopeless(math.nan, 0)


def test_a_new_run_does_not_go_back_to_an_old_one() -> None:
    training = Training()
    training.step(1.0)
    training.safeguard.start()
    training.trainer.global_step = 5
    assert training.step(math.nan) == (Verdict.LOST, None)


def test_it_goes_on_where_it_was() -> None:
    one, other = Training(), Training()
    for loss in (*[1.0] * 12, math.nan, 1.0, math.nan):
        one.step(loss)
    other.safeguard.load_state_dict(one.safeguard.state_dict())
    assert other.safeguard.num_restored == 2
    assert other.safeguard.state_dict() == one.safeguard.state_dict()
