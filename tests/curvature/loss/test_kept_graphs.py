"""Kept gradient graphs follow whatever their loss is computed from, however that is changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lyapunov_lightning.curvature import HessianOperator, lanczos
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.curvature.loss.fixed_batches import ReadBatches
from lyapunov_lightning.curvature.loss.freshness import Contents
from tests.curvature.helpers import TOLERANCE, relative_error, vector

Batch = dict[str, Any]


class Model(nn.Module):
    """With a buffer that is used as it is, one that is used in a formula, BatchNorm and Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(5, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5))
        self.temperature = torch.tensor(0.7)  # no buffer, nor anything else that is registered

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(inputs)) * self.scale) / (1 + self.temperature**2)
        return self.last(self.dropout(hidden))


class Setting:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model().double().eval()
        self.model.temperature = self.model.temperature.double()
        self.array = np.random.default_rng(0).normal(size=(12, 4))
        data = torch.from_numpy(self.array)
        labels = torch.randint(3, (12,))
        self.batches = [{"x": data[i : i + 6], "y": labels[i : i + 6], "w": np.linspace(1, 2, 6)} for i in (0, 6)]
        self.operator, self.rebuilt = self.build(), self.build(max_graph_bytes=0)

    def build(self, **options: Any) -> HessianOperator:
        torch.manual_seed(1)
        return HessianOperator(self.loss, self.model.parameters(), self.batches, **options)

    def loss(self, batch: Batch) -> Tensor:
        losses = functional.cross_entropy(self.model(batch["x"]), batch["y"], reduction="none")
        return (losses * torch.as_tensor(batch["w"])).mean()


def moved(setting: Setting) -> Tensor:
    flat = parameters_to_vector(setting.model.parameters()).detach()
    return flat + 0.3 * vector(len(flat), seed=5)


def by_numpy(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def shuffle(setting: Setting) -> None:
    np.random.default_rng(1).shuffle(setting.array)


def freeze(setting: Setting) -> None:
    setting.model.last.weight.requires_grad_(False)


def new_memory(setting: Setting) -> None:
    setting.model.first.weight.data = setting.model.first.weight.data * 1.5


CHANGES: dict[str, Callable[[Setting], Any]] = {
    "in_place": lambda s: s.model.first.weight.detach().mul_(1.5),
    "optimizer": lambda s: torch.no_grad()(lambda: s.model.first.weight.add_(0.3))(),
    "vector_to_parameters": lambda s: vector_to_parameters(moved(s), s.model.parameters()),
    "load_state_dict": lambda s: s.model.load_state_dict(
        {name: value + 0.1 * torch.ones_like(value) for name, value in s.model.state_dict().items()}
    ),
    "new_memory": new_memory,
    "data_in_place": lambda s: s.model.first.weight.data.mul_(1.5),
    "data_of_the_sign": lambda s: s.model.last.weight.data.neg_(),
    "one_number_of_the_data": lambda s: s.model.last.bias.data[1].fill_(2.0),
    "parameter_by_numpy": lambda s: by_numpy(s.model.first.bias).fill(0.4),
    "freezing": freeze,
    "inputs_in_place": lambda s: s.batches[1]["x"].mul_(1.5),
    "inputs_by_numpy": lambda s: s.array.__setitem__((7, 2), 3.0),
    "order_of_inputs_by_numpy": shuffle,
    "labels_in_place": lambda s: s.batches[0]["y"].copy_(s.batches[0]["y"].roll(1)),
    "array_in_the_batch": lambda s: s.batches[1]["w"].__setitem__(3, 5.0),
    "buffer_in_place": lambda s: s.model.scale.mul_(1.5),
    "buffer_by_data": lambda s: s.model.scale.data.mul_(1.5),
    "statistics": lambda s: s.model.norm.running_var.mul_(1.5),
    "statistics_by_numpy": lambda s: by_numpy(s.model.norm.running_mean).fill(0.2),
    "tensor_of_the_module": lambda s: s.model.temperature.data.fill_(1.3),
    "training": lambda s: s.model.train(),
    "training_of_one_layer": lambda s: s.model.dropout.train(),
}


@pytest.mark.parametrize("of", ["product", "gradient", "statistic"])
@pytest.mark.parametrize("name", CHANGES)
def test_graphs_follow_what_the_loss_is_computed_from(name: str, of: str) -> None:
    setting = Setting()
    direction = vector(setting.operator.size)

    def measured(operator: HessianOperator) -> Tensor:
        if of == "product":
            return operator.matvec(direction)
        if of == "gradient":
            return operator.gradient()
        rows = torch.eye(operator.size, dtype=operator.dtype)
        return operator.mean_over_batches(rows, lambda components, _: components.sin(), operator.size)

    setting.rebuilt.matvec(direction)
    for _ in range(2):  # the second one by the graph that the first has kept
        setting.operator.matvec(direction)
    assert setting.operator.graph_bytes > 0
    before = measured(setting.operator)
    CHANGES[name](setting)
    after = measured(setting.operator)
    expected = measured(setting.rebuilt)
    assert relative_error(after, expected) <= TOLERANCE["kept"]
    assert relative_error(before, expected) > 1e-3 or name == "freezing"
    if of == "product":
        assert setting.operator.graph_bytes > 0  # those of the present loss


class Calls:
    def __init__(self, loss: Callable[[Any], Tensor]) -> None:
        self._loss = loss
        self.number = 0

    def __call__(self, batch: Any) -> Tensor:
        self.number += 1
        return self._loss(batch)


@pytest.mark.parametrize("is_training", [False, True])
def test_graphs_are_kept_where_nothing_changes_but_what_the_loss_itself_writes(is_training: bool) -> None:
    """Such as the statistics of BatchNorm, which each evaluation in train mode moves on."""
    setting = Setting()
    setting.model.train(is_training)
    calls = Calls(setting.loss)
    operator = HessianOperator(calls, setting.model.parameters(), setting.batches)
    direction = vector(operator.size)
    for _ in range(3):
        operator.matvec(direction)
        operator.gradient()
    assert calls.number == 2
    operator.value()
    operator.gradient(direction)
    operator.matvec(direction)
    assert calls.number == 2 + 2 + 2


def test_a_solver_builds_each_graph_once() -> None:
    setting = Setting()
    calls = Calls(setting.loss)
    operator = HessianOperator(calls, setting.model.parameters(), setting.batches)
    lanczos(operator, largest=2, smallest=1)
    assert operator.num_matvecs > 10
    assert calls.number == 2


def test_a_gradient_builds_the_graphs_of_the_products_that_follow() -> None:
    setting = Setting()
    calls = Calls(setting.loss)
    operator = HessianOperator(calls, setting.model.parameters(), setting.batches)
    direction = vector(operator.size)
    expected = setting.rebuilt.gradient(), setting.rebuilt.matvec(direction)
    found = operator.gradient(keep_graph=True), operator.matvec(direction)
    assert all(relative_error(*pair) <= 1e-12 for pair in zip(found, expected, strict=True))
    assert not found[0].requires_grad
    operator.gradient(keep_graph=True)
    assert calls.number == 2


def test_a_gradient_whose_graph_does_not_fit_or_cannot_be_built_is_the_gradient() -> None:
    setting = Setting()
    calls = Calls(setting.loss)
    small = HessianOperator(calls, setting.model.parameters(), setting.batches, max_graph_bytes=1)
    assert relative_error(small.gradient(keep_graph=True), setting.operator.gradient()) <= 1e-12
    assert (calls.number, small.graph_bytes) == (2, 0)

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    x = vector(3).requires_grad_()
    weights = torch.ones(2, 3, dtype=torch.float64)
    once = HessianOperator(lambda batch: Cube.apply(batch * x).sum(), [x], [weights])
    assert relative_error(once.gradient(keep_graph=True), 6 * x.detach() ** 2) <= 1e-12
    with pytest.warns(CurvatureWarning, match="finite differences"):
        product = once.matvec(torch.ones(3, dtype=torch.float64))
    assert relative_error(product, 12 * x.detach()) <= 1e-6


def test_what_is_not_noticed_is_read_again_after_a_reset() -> None:
    """A number of Python's that the loss reads, for example."""
    x = vector(3).requires_grad_()
    factor = 1.0
    operator = HessianOperator(lambda batch: factor * (batch * x**3).sum(), [x], [torch.ones(3, dtype=torch.float64)])
    direction = vector(3, seed=1)
    expected = 6 * x.detach() * direction
    assert relative_error(operator.matvec(direction), expected) <= 1e-12
    factor = 2.0
    assert relative_error(operator.matvec(direction), expected) <= 1e-12  # this is what it is about
    operator.reset()
    assert operator.graph_bytes == 0
    assert relative_error(operator.matvec(direction), 2 * expected) <= 1e-12


def test_a_reset_keeps_the_random_numbers_and_reads_the_number_of_samples_again() -> None:
    setting = Setting()
    setting.model.train()
    direction = vector(setting.operator.size)
    before = setting.operator.matvec(direction)
    torch.rand(3)
    setting.operator.reset()
    assert relative_error(setting.operator.matvec(direction), before) <= 1e-12
    assert setting.operator.num_matvecs == 2


def test_graphs_belong_to_the_precision_in_which_they_were_built() -> None:
    weight = (0.1 * vector(64)).view(8, 8).float().requires_grad_()
    inputs = vector(80, seed=1).view(10, 8).float()

    def operator() -> HessianOperator:
        return HessianOperator(lambda batch: (batch @ weight).exp().mean(), [weight], [inputs])

    direction = vector(64, seed=2).float()
    both, exact = operator(), operator().matvec(direction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = operator().matvec(direction)
    assert relative_error(rounded, exact.double()) > 1e-4
    for _ in range(2):
        assert torch.equal(both.matvec(direction), exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(both.matvec(direction), rounded)


def test_a_solver_looks_for_changes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can change anything while it is at work, and looking is a part of what a product of few samples costs."""
    looks: list[int] = []
    is_changed = Contents.is_changed
    monkeypatch.setattr(Contents, "is_changed", lambda self: looks.append(1) or is_changed(self))
    setting = Setting()
    direction = vector(setting.operator.size)
    setting.operator.matvec(direction)
    looks.clear()
    with setting.operator.space.together():
        for _ in range(5):
            setting.operator.matvec(direction)
            setting.operator.gradient()
    in_solver = len(looks)
    assert 0 < in_solver <= 4  # of two batches, and of what they have been computed from
    setting.operator.matvec(direction)
    assert len(looks) > in_solver
    setting.model.first.weight.data.mul_(1.5)
    with setting.operator.space.together():
        product = setting.operator.matvec(direction)
    assert relative_error(product, setting.rebuilt.matvec(direction)) <= TOLERANCE["kept"]


def test_batches_that_are_read_are_not_held_and_count_where_a_graph_keeps_them() -> None:
    class Read(ReadBatches):
        reads = 0

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: Any) -> Tensor:
            if not -3 <= index < 3:
                raise IndexError
            Read.reads += 1
            return torch.full((4, 5), float(index + 1))

    torch.manual_seed(0)
    model = nn.Linear(5, 2)

    def loss(batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    direction = vector(12).float()
    held = HessianOperator(loss, model.parameters(), list(Read()))
    read = HessianOperator(loss, model.parameters(), Read())
    rebuilt = HessianOperator(loss, model.parameters(), Read(), max_graph_bytes=0)
    assert torch.equal(read.matvec(direction), held.matvec(direction))
    assert torch.equal(rebuilt.matvec(direction), held.matvec(direction))
    assert read.graph_bytes >= held.graph_bytes + 3 * 4 * 5 * 4
    Read.reads = 0
    read.matvec(direction)
    assert Read.reads == 0
    rebuilt.matvec(direction)
    assert Read.reads == 3
