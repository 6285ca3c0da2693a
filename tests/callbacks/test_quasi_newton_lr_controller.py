"""The controller takes the step that it says, is right on quadratics, and does nothing rash."""

import copy
import itertools
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import HessianConfig, QuasiNewtonLRController
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.curvature.quasi_newton import LRBounds
from tests.callbacks.identity import train
from tests.callbacks.steering import OPTIMIZERS, RULES, assert_identical_but_for_writes, fit, seeded, weights
from tests.modules import BusyModule, dense_hessian, regression_data, regression_loader

# The step that is taken.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_training_is_that_of_the_optimizer_at_the_logged_learning_rates(name: str, rule: str) -> None:
    """An independent reference: PyTorch's own optimizer, told the learning rate of every step."""
    module = seeded(optimizer=OPTIMIZERS[name])
    reference = copy.deepcopy(module)
    _, logger = fit(QuasiNewtonLRController(rule=rule, bounds=LRBounds(max_lr=100.0)), module, steps=15)
    lrs = logger.curve("quasi_newton/learning_rate")
    assert list(lrs) == list(range(15))
    assert len(set(lrs.values())) > 5
    optimizer = OPTIMIZERS[name](reference.parameters())
    batches = itertools.cycle(regression_loader())
    for lr, (inputs, targets, _) in zip(lrs.values(), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        nn.functional.mse_loss(reference(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(reference), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["SGD", "decay"])
def test_learning_rate_along_the_gradient_is_that_of_the_dense_hessian(name: str) -> None:
    seen: list[tuple[float, float]] = []
    decay = 0.1 if name == "decay" else 0.0

    class Dense(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            theta = weights(pl_module)
            _, hessian = dense_hessian(pl_module, batch)
            hessian = hessian + decay * torch.eye(len(theta), dtype=torch.float64)
            loss = nn.functional.mse_loss(pl_module(batch[0]), batch[1]) + decay / 2 * sum(
                p.square().sum() for p in pl_module.parameters()
            )
            g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(pl_module.parameters()))])
            seen.append((float(g @ g), float(g @ hessian @ g)))

    controller = QuasiNewtonLRController(
        sigma=1.5, averaging=0.0, bounds=LRBounds(max_growth=1e9, max_lr=1e9, window=0)
    )
    _, logger = fit([Dense(), controller], seeded(optimizer=OPTIMIZERS[name]))
    proposed, used = logger.curve("quasi_newton_details/proposed"), logger.curve("quasi_newton/learning_rate")
    assert [logger.curve("quasi_newton/slope_along_update")[t] for t in range(12)] == pytest.approx(
        [slope for slope, _ in seen], rel=1e-9
    )
    curvatures = [logger.curve("quasi_newton/curvature_along_update")[t] for t in range(12)]
    assert curvatures == pytest.approx([curvature for _, curvature in seen], rel=1e-9)
    assert [proposed[t] for t in range(12)] == pytest.approx([1.5 * s / abs(c) for s, c in seen], rel=1e-9)
    trials = logger.curve("quasi_newton_details/trials")
    assert all(used[t] == proposed[t] for t in range(12) if trials[t] == 0)


def test_inverse_sharpness_on_a_quadratic_is_the_papers() -> None:
    module = seeded(linear=True)
    loader = DataLoader(regression_data(), 48)
    _, hessian = dense_hessian(module, next(iter(loader)))
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    controller = QuasiNewtonLRController(rule="inverse_sharpness", bounds=LRBounds(max_growth=100.0))
    _, logger = fit(controller, module, loader, steps=30)
    assert logger.curve("quasi_newton/learning_rate")[29] == pytest.approx((math.e - 1) / top, rel=1e-3)
    assert logger.curve("quasi_newton_details/inverse_h0")[29] == pytest.approx((math.e - 1) / top, rel=1e-3)
    assert logger.curve("quasi_newton_details/lambda_max")[0] == pytest.approx(
        top, rel=0.05
    )  # settled before the first step


@pytest.mark.parametrize("rule", RULES)
def test_parameter_groups_keep_their_ratios(rule: str) -> None:
    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": rest, "lr": 0.1}])

    trainer, logger = fit(QuasiNewtonLRController(rule=rule), seeded(optimizer=two_groups))
    low, high = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert low == pytest.approx(0.2 * high, rel=1e-12)
    assert high == list(logger.curve("quasi_newton/learning_rate").values())[-1]


def test_a_learning_rate_that_is_a_tensor_is_changed_in_place() -> None:
    lr = torch.tensor(0.1)
    trainer, logger = fit(
        QuasiNewtonLRController(), seeded(optimizer=lambda p: torch.optim.Adam(p, lr=lr, capturable=False))
    )
    assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], Tensor)
    assert float(trainer.optimizers[0].param_groups[0]["lr"]) == pytest.approx(
        logger.curve("quasi_newton/learning_rate")[11]
    )


def test_between_measurements_the_learning_rate_stays() -> None:
    class Rates(Callback):
        seen: list[float]

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    rates.seen = []
    _, logger = fit([QuasiNewtonLRController(every_n_steps=4), rates])
    measured = logger.curve("quasi_newton/learning_rate")
    assert list(measured) == [0, 4, 8]
    assert rates.seen == [measured[t - t % 4] for t in range(12)]


@pytest.mark.parametrize("rule", RULES)
def test_accumulated_clipped_and_half_precise_steps(rule: str) -> None:
    controller = QuasiNewtonLRController(rule=rule)
    outcome = train(controller, steps=20, accumulate=4, precision="bf16-mixed")  # clips too
    lrs = outcome.curve("quasi_newton/learning_rate")
    assert len(lrs) == 20
    assert all(1e-6 <= lr <= 10 for lr in lrs.values())


# Nothing rash.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"accumulate": 4}, {"precision": "bf16-mixed"}, {"adam": True}], ids=str)
def test_a_learning_rate_without_room_is_a_constant_one_bit_by_bit(rule: str, options: dict[str, Any]) -> None:
    """Measuring leaves no trace: what is left of the controller then is the constant learning rate."""
    lr = 0.01 if options.pop("adam", False) else 0.05
    module = (lambda: BusyModule("adam")) if lr == 0.01 else BusyModule
    controller = QuasiNewtonLRController(rule=rule, bounds=LRBounds(lr, math.nextafter(lr, 1)), sigma=1e-12)
    if rule == "inverse_sharpness":
        controller = QuasiNewtonLRController(rule=rule, bounds=LRBounds(math.nextafter(lr, 0), lr), delta_q=1e-3)
        controller._governor.lr = lr
    with_controller = train(controller, module=module, steps=30, **options)
    assert set(with_controller.curve("quasi_newton/learning_rate").values()) == {lr}
    assert_identical_but_for_writes(train(module=module, steps=30, **options), with_controller)


def raises(module: Any, batch: Any) -> Tensor:
    raise RuntimeError("not today")


def is_nan(module: Any, batch: Any) -> Tensor:
    return sum(parameter.sum() for parameter in module.parameters()) * math.nan


def is_flat(module: Any, batch: Any) -> Tensor:
    return sum(parameter.sum() for parameter in module.parameters())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("loss_fn", "message"), [(raises, "not today"), (is_nan, "not finite")])
def test_failed_measurements_leave_the_optimizers_own_steps(rule: str, loss_fn: Any, message: str) -> None:
    with pytest.warns(CurvatureWarning, match=message) as warned:
        with_controller = train(QuasiNewtonLRController(rule=rule, hessian=HessianConfig(loss_fn=loss_fn)), steps=20)
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert_identical_but_for_writes(train(steps=20), with_controller)
    assert set(with_controller.curve("quasi_newton_details/converged").values()) == {0.0}


def test_a_loss_without_curvature_leaves_the_optimizers_own_steps() -> None:
    module, plain = seeded(), seeded()
    fit(QuasiNewtonLRController(hessian=HessianConfig(loss_fn=is_flat)), module)
    fit([], plain)
    assert torch.equal(weights(module), weights(plain))


@pytest.mark.parametrize("rule", RULES)
def test_failures_in_mid_training_hold_the_last_learning_rate(rule: str) -> None:
    def fails_later(module: Any, batch: Any) -> Tensor:
        if module.trainer.global_step >= 6:
            raise RuntimeError("from now on")
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    controller = QuasiNewtonLRController(rule=rule, hessian=HessianConfig(loss_fn=fails_later))
    with pytest.warns(CurvatureWarning, match="from now on"):
        trainer, logger = fit(controller, seeded())
    assert trainer.global_step == 12
    assert trainer.optimizers[0].param_groups[0]["lr"] == logger.curve("quasi_newton/learning_rate")[5]


class TwoCurvatures(pl.LightningModule):
    """Algorithm 1's downfall in two dimensions: curvature 717 that the tracked vector does not see, beside 0.29."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (torch.tensor([717.0, 0.29], dtype=torch.float64) * self.theta.square()).sum() / 2 + 0 * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_tracked_vector_on_a_wrong_eigenvector_does_not_set_the_learning_rate() -> None:
    """Algorithm 1 alone asks for (e - 1) / 0.29 = 5.9 here, where 2 / 717 is the most that is stable."""
    controller = QuasiNewtonLRController(rule="inverse_sharpness", max_warmup=0, bounds=LRBounds(max_growth=1e9))
    controller._sharpness._iteration.restart(torch.tensor([0.0, 1.0], dtype=torch.float64))
    controller._sharpness._iteration.beta = (math.e - 1) / 0.29
    module = TwoCurvatures()
    _, logger = fit(controller, module, steps=300)
    assert logger.curve("quasi_newton_details/refuted")[0] == 1
    assert max(logger.curve("quasi_newton/learning_rate").values()) <= 1.01 * (math.e - 1) / (717 / 1.01)
    assert abs(float(module.theta[0].detach())) < 1e-6


class Images(pl.LightningModule):
    """LeNet1 on two classes of patterns, where Algorithm 1 alone took learning rates beyond all stability."""

    def __init__(self) -> None:
        super().__init__()
        from examples.models import LeNet1

        torch.manual_seed(0)
        self.network = LeNet1(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=5e-4)


@pytest.mark.parametrize("rule", RULES)
def test_lenet1_trains_and_its_loss_falls(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    patterns = torch.randn(2, 3, 32, 32, generator=generator)
    images = 0.5 * patterns[labels] + torch.randn(256, 3, 32, 32, generator=generator)
    loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    pl.seed_everything(0, verbose=False)
    _, logger = fit([QuasiNewtonLRController(rule=rule), Losses()], Images(), loader, steps=60)
    smoothed = torch.tensor(losses).unfold(0, 10, 10).mean(dim=1)
    assert smoothed[-1] < 0.2 * smoothed[0]
    assert (smoothed[1:] < smoothed[:-1] + 0.05 * smoothed[0]).all()
    assert max(logger.curve("quasi_newton/learning_rate").values()) <= 10


def test_a_growing_step_is_tried_on_the_loss_first() -> None:
    """The parabola's bottom lies beyond the wall of a valley that is flat inside."""

    class Walled(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.theta.sum()
            return 0.05 * (x - 1).square() + torch.relu(x - 1.2).pow(2) * 1e4 + 0 * batch[0].sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    controller = QuasiNewtonLRController(sigma=1.9, bounds=LRBounds(max_lr=1e3))
    _, logger = fit(controller, Walled(), steps=1)
    assert logger.curve("quasi_newton_details/proposed")[0] == pytest.approx(19.0)
    assert logger.curve("quasi_newton_details/trials")[0] == 1
    assert logger.curve("quasi_newton/learning_rate")[0] == pytest.approx(9.5)
