"""The controller takes the step that it says, is right on quadratics, and does nothing rash."""

import copy
import functools
import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import HessianConfig, QuasiNewtonLRController
from lyapunov_lightning.curvature.acting.pace import LRBounds
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks.identity import Outcome, train
from tests.callbacks.steering import OPTIMIZERS, RULES, assert_identical_but_for_writes, fit, seeded, weights
from tests.modules import BusyModule, SmallRegressor, Watcher, dense_hessian, regression_data, regression_loader

# The step that is taken.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_training_is_that_of_the_optimizer_at_the_logged_learning_rates(name: str, rule: str) -> None:
    """An independent reference: PyTorch's own optimizer, told the learning rate of every step."""
    module = seeded(optimizer=OPTIMIZERS[name])
    reference = copy.deepcopy(module)
    _, logger = fit(QuasiNewtonLRController(rule=rule, annealing=0.4, force=True), module, steps=15)
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


class Dense(Watcher):
    """Slope and curvature along the last update, by the dense Hessian of the batch that comes next."""

    def __init__(self, decay: float = 0.0) -> None:
        self.decay = decay
        self.seen: dict[int, tuple[float, float, float]] = {}
        self.before: Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        theta = weights(pl_module)
        _, hessian = dense_hessian(pl_module, batch)
        hessian = hessian + self.decay * torch.eye(len(theta), dtype=torch.float64)
        loss = nn.functional.mse_loss(pl_module(batch[0]), batch[1])
        loss = loss + self.decay / 2 * sum(p.square().sum() for p in pl_module.parameters())
        g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(pl_module.parameters()))])
        if self.before is not None:
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            u = (theta - self.before) / lr
            curvature = float(u @ hessian @ u)
            self.seen[trainer.global_step] = (-float(g @ u) + lr * abs(curvature), curvature, float(u @ u))
        self.before = theta.clone()


@pytest.mark.parametrize("name", ["SGD", "decay", "Adam"])
def test_slope_and_curvature_are_those_of_the_last_update_seen_by_the_next_batch(name: str) -> None:
    dense = Dense(0.1 if name == "decay" else 0.0)
    _, logger = fit([dense, QuasiNewtonLRController(1, "along_update")], seeded(optimizer=OPTIMIZERS[name]), steps=15)
    slopes, curvatures, lengths, proposed = (
        logger.curve(f"quasi_newton{tag}")
        for tag in ("/slope_along_update", "/curvature_along_update", "/step_length", "_details/proposed")
    )
    assert set(dense.seen) == set(range(1, 15))
    for step, (slope, curvature, _) in dense.seen.items():
        assert curvatures[step] == pytest.approx(curvature, rel=1e-7)
        assert slopes[step] == pytest.approx(slope, rel=1e-7, abs=1e-12)
    # An independent account of the averages: the curvature per squared length of measurements, slopes of all steps.
    rayleigh, averages, rates = None, [0.0, 0.0], logger.curve("quasi_newton/learning_rate")
    for count, (step, (slope, curvature, squared)) in enumerate(dense.seen.items()):
        if averages[1] and averages[0] > 0:
            best = averages[0] / averages[1]
            assert proposed[step] == pytest.approx(best, rel=1e-6)
            assert lengths[step] == pytest.approx(min(rates[step - 1] / best, 10), rel=1e-6)
        newest = abs(curvature) / squared
        rayleigh = newest if rayleigh is None else math.sqrt(rayleigh * newest)
        at_end = slope - rates[step - 1] * abs(curvature)
        weight = 1 / max(3, count / 2)
        for place, value in enumerate((at_end + rates[step - 1] * rayleigh * squared, rayleigh * squared)):
            averages[place] += weight * (value - averages[place])


def test_the_first_learning_rate_is_found_whatever_the_optimizer_starts_with() -> None:
    for lr in (1e-9, 1e-3, 1.0, 1e4):
        for momentum in (0.0, 0.9):
            module = seeded(optimizer=lambda p, lr=lr, m=momentum: torch.optim.SGD(p, lr=lr, momentum=m))  # type: ignore[misc]
            batch = next(iter(regression_loader()))
            _, hessian = dense_hessian(module, batch)
            loss = nn.functional.mse_loss(module(batch[0]), batch[1])
            g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(module.parameters()))])
            _, logger = fit(QuasiNewtonLRController(), module, steps=1)
            halved = 2.0 ** -logger.curve("quasi_newton_details/trials")[0]
            bottom = float(g @ g) / abs(float(g @ hessian @ g)) * halved
            found = logger.curve("quasi_newton/learning_rate")[0]
            assert found == pytest.approx(0.2 * (1 - momentum) * bottom, rel=1e-6)


def test_the_first_steps_and_every_nth_are_measured() -> None:
    _, logger = fit(QuasiNewtonLRController(), steps=45)
    assert list(logger.curve("quasi_newton/learning_rate")) == [*range(20), 20, 30, 40]
    _, logger = fit(QuasiNewtonLRController(7), steps=30)
    assert list(logger.curve("quasi_newton/learning_rate")) == [*range(20), 21, 28]


def test_the_learning_rate_falls_to_zero_at_the_end_where_that_is_known() -> None:
    for annealing in (None, 0.5):
        controller = QuasiNewtonLRController(1, annealing=annealing)
        fit(controller, seeded(), steps=50)
        share = annealing or 0.4
        assert [result.annealing for result in controller.results] == pytest.approx(
            [min(1, (50 - step) / (share * 50)) for step in range(50)]
        )
        rates = [result.learning_rate for result in controller.results]
        assert rates[-1] < 0.1 * max(rates)
    stopped = Callback()
    stopped.on_train_batch_end = lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == 30)  # type: ignore[method-assign]
    controller = QuasiNewtonLRController(1)
    fit([controller, stopped], seeded(), steps=-1)
    assert {result.annealing for result in controller.results} == {1.0}


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


@pytest.mark.parametrize("rule", RULES)
def test_accumulated_clipped_and_half_precise_steps(rule: str) -> None:
    controller = QuasiNewtonLRController(rule=rule)
    outcome = train(controller, steps=8, accumulate=4, precision="bf16-mixed")  # clips too
    lrs = outcome.curve("quasi_newton/learning_rate")
    assert len(lrs) == 8
    assert all(0 < lr < math.inf for lr in lrs.values())


# Nothing rash.


@functools.cache
def plain_run(optimizer: str, steps: int, **options: Any) -> Outcome:
    """At a constant learning rate, the same for all rules."""
    return train(module=functools.partial(BusyModule, optimizer, use_metrics=False), steps=steps, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 4}, {"precision": "bf16-mixed"}, {"optimizer": "adam"}], ids=str
)
def test_a_learning_rate_that_stays_is_a_constant_one_bit_by_bit(rule: str, options: dict[str, Any]) -> None:
    """Measuring and keeping copies leave no trace: what is left of the controller is the constant learning rate."""
    optimizer, settings = options.get("optimizer", "sgd"), {key: options[key] for key in {*options} - {"optimizer"}}
    lr = 0.01 if optimizer == "adam" else 0.05
    controller = QuasiNewtonLRController(rule=rule, annealing=0, force=True)
    controller._steering.pace.lr, controller._steering.pace.is_stopped = lr, True
    # Beyond the first 20 steps, each of which is measured, where that takes few batches.
    steps = 8 if "accumulate" in options else 22
    module = functools.partial(BusyModule, optimizer, use_metrics=False)
    with_controller = train(controller, module=module, steps=steps, **settings)
    assert set(with_controller.curve("quasi_newton/learning_rate").values()) == {lr}
    assert_identical_but_for_writes(plain_run(optimizer, steps, **settings), with_controller)


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
        with_controller = train(QuasiNewtonLRController(rule=rule, hessian=HessianConfig(loss_fn=loss_fn)), steps=8)
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert_identical_but_for_writes(train(steps=8), with_controller)
    assert set(with_controller.curve("quasi_newton_details/converged").values()) == {0.0}


@pytest.mark.parametrize(("lr", "tolerance"), [(0.1, 0.0), (1e-4, 1e-12)])  # the second one is first tried at 1
def test_a_loss_without_curvature_leaves_the_optimizers_own_steps(lr: float, tolerance: float) -> None:
    module, plain = (seeded(optimizer=lambda p: torch.optim.SGD(p, lr=lr)) for _ in range(2))
    controller = QuasiNewtonLRController(hessian=HessianConfig(loss_fn=is_flat))
    fit(controller, module)
    fit([], plain)
    torch.testing.assert_close(weights(module), weights(plain), rtol=tolerance, atol=tolerance)
    assert {result.learning_rate for result in controller.results} == {lr}


@pytest.mark.parametrize("rule", RULES)
def test_failures_in_mid_training_hold_the_last_learning_rate(rule: str) -> None:
    def fails_later(module: Any, batch: Any) -> Tensor:
        if module.trainer.global_step >= 6:
            raise RuntimeError("from now on")
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    controller = QuasiNewtonLRController(1, rule, hessian=HessianConfig(loss_fn=fails_later), annealing=0)
    with pytest.warns(CurvatureWarning, match="from now on"):
        trainer, logger = fit(controller, seeded())
    assert trainer.global_step == 12
    held = trainer.optimizers[0].param_groups[0]["lr"]
    assert held == pytest.approx(logger.curve("quasi_newton/learning_rate")[5], rel=0.0701)
    assert held == controller._steering.pace.lr
    assert rule != "along_update" or not controller._rule._length._is_known
    assert controller._rule.edge_ratio() is None


class TwoCurvatures(pl.LightningModule):
    """Algorithm 1's downfall in two dimensions: curvature 717 that the tracked vector does not see, beside 0.29."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (torch.tensor([717.0, 0.29], dtype=torch.float64) * self.theta.square()).sum() / 2 + 0 * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_tracked_vector_on_a_wrong_eigenvector_does_not_set_the_learning_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Algorithm 1 alone asks for (e - 1) / 0.29 = 5.9 here, where 2 / 717 is the most that is stable."""
    monkeypatch.setattr("lyapunov_lightning.callbacks.rules.inverse_sharpness._MAX_WARMUP", 0)
    controller = QuasiNewtonLRController(rule="inverse_sharpness", bounds=LRBounds(max_growth=1e9))
    controller._rule._sharpness._iteration.restart(torch.tensor([0.0, 1.0], dtype=torch.float64))
    controller._rule._sharpness._iteration.beta = (math.e - 1) / 0.29
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

    class Losses(Watcher):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    pl.seed_everything(0, verbose=False)
    # Where noise hides the edge, steps cross it now and then: the loss jumps, and the training is brought back.
    with pytest.warns(CurvatureWarning) if rule == "batch_sharpness" else nullcontext():
        _, logger = fit([QuasiNewtonLRController(rule=rule), Losses()], Images(), loader, steps=100)
    smoothed = torch.tensor(losses).unfold(0, 10, 10).mean(dim=1)
    assert smoothed[-1] < 0.2 * smoothed[0]
    if rule != "batch_sharpness":
        assert (smoothed[1:] < smoothed[:-1] + 0.05 * smoothed[0]).all()
    assert max(logger.curve("quasi_newton/learning_rate").values()) <= 10


def test_the_first_step_is_tried_on_the_loss() -> None:
    """The parabola's bottom lies beyond the wall of a valley that is flat inside."""

    class Walled(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.theta.sum()
            return 0.05 * (x - 1).square() + torch.relu(x - 0.7).pow(2) * 1e4 + 0 * batch[0].sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    _, logger = fit(QuasiNewtonLRController(), Walled(), steps=1)
    assert logger.curve("quasi_newton_details/proposed")[0] == pytest.approx(5.0)
    assert logger.curve("quasi_newton_details/trials")[0] == 1
    assert logger.curve("quasi_newton/learning_rate")[0] == pytest.approx(0.2 * 5.0)


# First, do no harm.


class Bumpy(SmallRegressor):
    """Whose loss is what a test says at some of its batches."""

    def __init__(self, losses: dict[int, float], **options: Any) -> None:
        super().__init__(**options)
        self.losses, self.count = losses, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        factor = self.losses.get(self.count, 1.0)
        self.count += 1
        return loss * factor


def bumpy(losses: dict[int, float], **options: Any) -> Bumpy:
    torch.manual_seed(3)
    return Bumpy(losses, **options)


@contextmanager
def warned_of(*messages: str) -> Iterator[None]:
    """The warnings of this package that come, in their order."""
    with pytest.warns(CurvatureWarning) as seen:
        yield
    own = [str(warning.message) for warning in seen if issubclass(warning.category, CurvatureWarning)]
    assert len(own) == len(messages)
    assert all(re.search(message, text) for message, text in zip(messages, own, strict=True))


class States(Watcher):
    """The parameters and the optimizer's state after every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.momenta: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module).clone())
        state = trainer.optimizers[0].state
        self.momenta.append(torch.cat([state[p]["momentum_buffer"].reshape(-1) for p in pl_module.parameters()]))

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_after_nan_the_training_goes_on_from_where_it_was_well(rule: str, factor: float) -> None:
    states = States()
    module = bumpy({35: factor}, optimizer=OPTIMIZERS["momentum"])
    controller = QuasiNewtonLRController(rule=rule, annealing=0)
    failed = ["the measurement at step 35 failed"] * (rule == "inverse_sharpness")
    with warned_of(*failed, "at step 36 the loss was (nan|inf).*brought back to step 1,.*halved"):
        fit([controller, states], module, steps=60)
    # The copy that the 20 losses since have proven: what was there after the batch before it.
    assert torch.equal(states.weights[35], states.weights[0])
    assert torch.equal(states.momenta[35], states.momenta[0])
    assert states.rates[36] <= states.rates[35] / 2 * 1.07
    assert torch.isfinite(states.weights[-1]).all()
    assert controller.results[-1].restored == 1


def test_a_spike_ends_where_it_began_and_the_first_batch_that_stands_out_is_let_pass() -> None:
    states = States()
    module = bumpy({35: 4.5, **dict.fromkeys((43, 44, 45), 5.5)}, optimizer=OPTIMIZERS["momentum"])
    with warned_of("brought back to step 21"):
        fit([QuasiNewtonLRController(annealing=0), states], module, regression_loader(batch_size=48), steps=60)
    assert not torch.equal(states.weights[35], states.weights[29])
    assert torch.equal(states.weights[45], states.weights[20])


def test_without_the_safeguard_nan_stops_the_controller_at_a_small_rate() -> None:
    states = States()
    module = bumpy({35: math.nan}, optimizer=OPTIMIZERS["momentum"])
    with warned_of("no copy to go back to. The learning rate stays at", "the measurement at step 40 failed"):
        fit([QuasiNewtonLRController(safeguard=False, annealing=0), states], module, steps=45)
    assert len(set(states.rates[37:])) == 1
    assert states.rates[37] == pytest.approx(states.rates[35] / 2 / 100, rel=0.1)


def test_a_training_that_cannot_be_helped_is_let_be() -> None:
    module = bumpy(dict.fromkeys(range(35, 1000), math.nan), optimizer=OPTIMIZERS["momentum"])
    controller = QuasiNewtonLRController(annealing=0)
    with warned_of(
        "brought back to step 1,", "the measurement at step .* failed", "going back again and again did not help"
    ):
        fit(controller, module, steps=80)
    assert controller._steering.pace.is_stopped
    assert torch.isfinite(weights(module)).all()  # it is brought back all the same


def test_batch_statistics_are_brought_back_too() -> None:
    class Normalised(Bumpy):
        def __init__(self, losses: dict[int, float]) -> None:
            super().__init__(losses)
            self.norm = nn.BatchNorm1d(3).double()

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(self.norm(inputs))

    torch.manual_seed(0)
    module = Normalised({25: math.nan})
    counts: list[int] = []

    class Counts(Watcher):
        def on_train_batch_end(self, *args: Any) -> None:
            counts.append(int(module.norm.num_batches_tracked))

    with warned_of("brought back to step 1,"):
        fit([QuasiNewtonLRController(), Counts()], module, steps=30)
    assert counts[24:27] == [25, 1, 2]


@pytest.mark.parametrize(("every", "rule"), [(3, "along_update"), (1, "inverse_sharpness")])
def test_momentum_on_the_digits_of_the_quick_start_trains(rule: str, every: int) -> None:
    """Both rules once ended in NaN here, after 110 to 283 steps."""
    from examples.data import Digits
    from examples.models import MLP, Classifier

    pl.seed_everything(0, verbose=False)
    module = Classifier(MLP(64, [32], activation="relu"), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    data = Digits(batch_size=50)
    data.setup("fit")
    losses: list[float] = []

    class Losses(Watcher):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    fit([QuasiNewtonLRController(every, rule), Losses()], module, DataLoader(data.train_set, 50), steps=300)
    assert max(losses) < 1.5 * losses[0]
    assert sum(losses[-30:]) / 30 < 0.03 * losses[0]
