"""What the products are worth for each kind of kernel, wrapper and optimizer, and the page that says so.

    python -m tests.test_support_matrix         # writes the table of docs/support.md anew

Every case trains a small network twice, without callbacks and with a `CurvatureProbe`, and compares the runs bit by
bit. In the second run the products and the eigenvalue are held against the dense Hessian, which PyTorch alone computes
in float64 from a plain network with the same weights.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import Dataset, TensorDataset

from lyapunov_lightning import CurvatureProbe, HessianConfig
from lyapunov_lightning.curvature import CurvatureWarning
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.curvature.helpers import OnceDifferentiableTanh
from tests.modules import Watcher
from tests.problems import whole_hessian
from tests.training.live import flat, hessian_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
FEATURES, POSITIONS, CLASSES = 4, 3, 2
NEEDS_2_15 = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)

Claim = Literal["exact", "rounded", "differences", "refused"]
CLAIMS: dict[Claim, str] = {
    "exact": "exact",
    "rounded": "exact but for the rounding of half precision",
    "differences": "finite differences, with a warning",
    "refused": "no measurement, with the reason",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of network or of training, and what is claimed of its curvature.

    Attributes:
        group: Where it is in the table.
        name: What it is.
        claim: What its products are.
        build: Makes the network as it is trained.
        plain: Makes a network of the same parameters and buffers, in their order, that PyTorch differentiates twice.
        optimizer: Makes the optimizer.
        precision: The trainer's.
        wrapped: Makes of the whole module what is trained.
        method: How products are asked for.
        says: What the warning says, of differences and where a measurement is refused.
        skipped: Whether the version of PyTorch does not have it.
        held_by: The test that holds it, in place of the one of this file.

    """

    group: str
    name: str
    claim: Claim
    build: Callable[[], nn.Module] = lambda: layers()
    plain: Callable[[], nn.Module] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    precision: str = "64-true"
    wrapped: Callable[[Any], Any] = lambda module: module
    method: Any = "auto"
    says: str = ""
    skipped: bool = False
    held_by: str = ""


# The networks. All map (batch, positions, features) to (batch, classes).


def layers(activation: Callable[[], nn.Module] = nn.Tanh, norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    middle = [activation(), *([norm(4)] if norm else [])]
    return nn.Sequential(nn.Flatten(), nn.Linear(POSITIONS * FEATURES, 4), *middle, nn.Linear(4, CLASSES))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], parts: bool = False) -> None:
        super().__init__()
        self.cells, self.head, self.parts = kind(FEATURES, 3, batch_first=True), nn.Linear(3, CLASSES), parts

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=not self.parts):
            return self.head(self.cells(inputs)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, kernel: SDPBackend | None) -> None:
        super().__init__()
        self.kernel = kernel
        self.inputs, self.head = nn.Linear(FEATURES, 12), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        queries, keys, values = self.inputs(inputs)[:, None].chunk(3, dim=-1)
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.head(mixed[:, 0].mean(dim=1))


class Checkpointed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(12, 4), layers_of_four(), nn.Linear(4, CLASSES)
        self.options = options

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1))
        return self.head(checkpoint(self.inner, hidden, **self.options) if self.options else self.inner(hidden))


def layers_of_four() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh())


def checkpoint_wrapped(implementation: CheckpointImpl) -> nn.Module:
    network = Checkpointed()
    network.inner = checkpoint_wrapper(network.inner, checkpoint_impl=implementation)
    return network


def selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


class LowRank(nn.Module):
    """A frozen layer, in full or quantised to eight bits, and a trained one of low rank beside it."""

    def __init__(self, is_quantised: bool, compute: torch.dtype | None = None) -> None:
        super().__init__()
        weight = torch.randn(4, 12)
        if is_quantised:
            self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
            self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.head, self.compute = nn.Linear(4, CLASSES), compute
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        weight = self.weight.to(inputs.dtype) * self.scale if hasattr(self, "scale") else self.weight
        narrow = self.compute or inputs.dtype
        base = functional.linear(inputs.to(narrow), weight.to(narrow)).to(inputs.dtype)
        return self.head(torch.tanh(base + self.up(self.down(inputs))))


class InAutocast(nn.Module):
    """Enters autocast itself, or leaves that of the training."""

    def __init__(self, enabled: bool, inner: Callable[[], nn.Module] = layers) -> None:
        super().__init__()
        self.network, self.enabled = inner(), enabled

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.network(inputs)


class OnceTanh(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return OnceDifferentiableTanh.apply(inputs)


class OnlyHalf(nn.Module):
    """A kernel that knows half precision only."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.bfloat16:
            raise RuntimeError(f"expected scalar type BFloat16 but found {inputs.dtype}")
        return inputs.tanh()


def compiled(network: nn.Module, in_place: bool = False) -> nn.Module:
    torch._dynamo.reset()
    if not in_place:
        return torch.compile(network, backend="eager")
    network.compile(backend="eager")
    return network


class Supported(pl.LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.network = case, case.build()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        scores = self(inputs)
        loss = functional.cross_entropy(scores.float() if scores.dtype.itemsize < 4 else scores, labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.case.optimizer([p for p in self.parameters() if p.requires_grad])


_COMPILED, _ATTENTION, _RECURRENT = "`torch.compile`", "Attention", "Recurrent layers"
_NORM, _MEMORY, _ADAPTERS = "Normalisation", "Activation checkpointing", "Adapters"
_OPTIMIZERS, _PRECISION, _OWN = "Optimizers", "Precision", "Functions of your own"
_INT8 = partial(LowRank, True)
_CHECKPOINTED = {"plain": Checkpointed, "skipped": NEEDS_2_15}

CASES = [
    Case(_COMPILED, "of the whole LightningModule", "exact", wrapped=compiled),
    Case(_COMPILED, "of a layer", "exact", lambda: compiled(layers()), layers),
    Case(_COMPILED, "`.compile()` of a layer", "exact", lambda: compiled(layers(), in_place=True), layers),
    Case(_ATTENTION, "SDPA, the kernel chosen by PyTorch", "exact", partial(Attention, None)),
    Case(_ATTENTION, "SDPA, math", "exact", partial(Attention, SDPBackend.MATH)),
    Case(
        _ATTENTION,
        "SDPA, flash, chosen by the module",
        "differences",
        partial(Attention, SDPBackend.FLASH_ATTENTION),
        partial(Attention, SDPBackend.MATH),
        says="attention",
    ),
    Case(_RECURRENT, "LSTM", "exact", partial(Recurrent, nn.LSTM), partial(Recurrent, nn.LSTM, True)),
    Case(
        _RECURRENT,
        "LSTM, a fused kernel (oneDNN, cuDNN)",
        "exact",
        partial(Recurrent, nn.LSTM),
        partial(Recurrent, nn.LSTM, True),
        precision="32-true",
    ),
    Case(_RECURRENT, "GRU", "exact", partial(Recurrent, nn.GRU), partial(Recurrent, nn.GRU, True)),
    Case(
        _NORM,
        "SyncBatchNorm, one process, training",
        "exact",
        partial(layers, norm=nn.SyncBatchNorm),
        partial(layers, norm=nn.BatchNorm1d),
    ),
    Case(
        _NORM,
        "SyncBatchNorm, evaluation",
        "exact",
        lambda: layers(norm=nn.SyncBatchNorm).eval(),
        lambda: layers(norm=nn.BatchNorm1d).eval(),
    ),
    Case(
        _NORM,
        "SyncBatchNorm, several processes, training",
        "refused",
        held_by="tests/training/test_checks.py",
        says="SyncBatchNorm",
    ),
    Case(_MEMORY, "non-reentrant", "exact", partial(Checkpointed, use_reentrant=False), **_CHECKPOINTED),
    Case(_MEMORY, "reentrant", "exact", partial(Checkpointed, use_reentrant=True), **_CHECKPOINTED),
    Case(
        _MEMORY,
        "selective",
        "exact",
        partial(Checkpointed, use_reentrant=False, context_fn=selective),
        **_CHECKPOINTED,
    ),
    Case(
        _MEMORY,
        "`checkpoint_wrapper`, non-reentrant",
        "exact",
        partial(checkpoint_wrapped, CheckpointImpl.NO_REENTRANT),
        **_CHECKPOINTED,
    ),
    Case(
        _MEMORY,
        "`checkpoint_wrapper`, reentrant",
        "exact",
        partial(checkpoint_wrapped, CheckpointImpl.REENTRANT),
        **_CHECKPOINTED,
    ),
    Case(_ADAPTERS, "LoRA: frozen weights and trained ones of low rank", "exact", partial(LowRank, False)),
    Case(_ADAPTERS, "QLoRA: frozen weights of 8 bits", "exact", _INT8),
    Case(
        _ADAPTERS,
        "QLoRA, the frozen layers computed in bfloat16",
        "rounded",
        partial(LowRank, True, torch.bfloat16),
        _INT8,
        precision="32-true",
    ),
    Case(_OPTIMIZERS, "SGD, fused", "exact", optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)),
    Case(_OPTIMIZERS, "SGD, foreach", "exact", optimizer=partial(torch.optim.SGD, lr=0.1, foreach=True)),
    Case(_OPTIMIZERS, "AdamW, fused", "exact", optimizer=partial(torch.optim.AdamW, fused=True)),
    Case(_OPTIMIZERS, "AdamW, foreach", "exact", optimizer=partial(torch.optim.AdamW, foreach=True)),
    Case(_PRECISION, "32-true", "exact", precision="32-true"),
    Case(_PRECISION, "64-true", "exact"),
    Case(_PRECISION, "bf16-mixed, measured in float32", "exact", precision="bf16-mixed"),
    Case(_PRECISION, "16-mixed, measured in float32", "exact", precision="16-mixed"),
    Case(_PRECISION, "bf16-true", "rounded", precision="bf16-true"),
    Case(
        _PRECISION,
        "autocast of the module's own, in 32-true",
        "rounded",
        partial(InAutocast, True),
        partial(InAutocast, False),
        precision="32-true",
    ),
    Case(
        _PRECISION,
        "autocast switched off in a part, in bf16-mixed",
        "exact",
        partial(InAutocast, False),
        precision="bf16-mixed",
    ),
    Case(
        _PRECISION,
        "a kernel for half precision only, in bf16-mixed",
        "rounded",
        partial(layers, OnlyHalf),
        layers,
        precision="bf16-mixed",
        says="cannot be computed in float32",
    ),
    Case(
        _PRECISION,
        "finite differences of a loss in half precision",
        "refused",
        partial(InAutocast, True),
        precision="32-true",
        method="finite_difference",
        says="rounding of half precision",
    ),
    Case(
        _OWN,
        "`autograd.Function` marked `@once_differentiable`",
        "differences",
        partial(layers, OnceTanh),
        layers,
        says="once_differentiable",
    ),
    Case(
        _OWN,
        "the same, the loss in half precision",
        "refused",
        partial(InAutocast, True, partial(layers, OnceTanh)),
        precision="32-true",
        says="rounding of half precision",
    ),
]
OWN_CASES = [case for case in CASES if not case.held_by]


def data() -> Dataset[Any]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(18, POSITIONS, FEATURES, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0, 0] > 0).long())


class Checking(Watcher):
    """Holds a product against the dense Hessian, in the second step.

    Attributes:
        error: The relative error of a product.
        method: How it was computed.
        largest: The largest eigenvalue of the dense Hessian.

    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.error, self.method, self.largest = float("nan"), "", float("nan")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        dense = dense_hessian(self.case, pl_module, batch)
        self.largest = float(torch.linalg.eigvalsh(dense)[-1])
        operator = hessian_of(trainer, pl_module, batch, batch_idx, method=self.case.method)
        direction = torch.randn(len(dense), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        product = operator.matvec(direction.to(operator.dtype)).double()
        expected = dense @ direction
        self.error, self.method = float((product - expected).norm() / expected.norm()), operator.method


def dense_hessian(case: Case, module: Supported, batch: Any) -> Tensor:
    """Of the plain network with the weights of the one that is trained, by PyTorch alone and in float64."""
    with torch.random.fork_rng(devices=[]):
        plain = (case.plain or case.build)()
    for mine, other in zip(
        [*plain.parameters(), *plain.buffers()], [*module.network.parameters(), *module.network.buffers()], strict=True
    ):
        mine.data = other.detach().clone().double() if other.is_floating_point() else other.detach().clone()
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    inputs, labels = batch

    def loss(values: Tensor) -> Tensor:
        pieces = values.split([p.numel() for p in trained.values()])
        named = {name: piece.view_as(p) for (name, p), piece in zip(trained.items(), pieces, strict=True)}
        return functional.cross_entropy(functional_call(plain, named, (inputs.double(),)), labels)

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        at = flat(trained.values()).requires_grad_()
        return whole_hessian(loss(at), at)[1]


def run(case: Case, *callbacks: Callback) -> Outcome:
    options: dict[str, Any] = {"precision": case.precision}
    if case.precision == "16-mixed":  # for which Lightning takes bfloat16 on the CPU
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    return train(callbacks, module=lambda: case.wrapped(Supported(case)), dataset=data, steps=3, **options)


@pytest.mark.parametrize("case", OWN_CASES, ids=lambda case: f"{case.group}, {case.name}".replace("`", ""))
def test_the_matrix_holds(case: Case) -> None:
    if case.skipped:
        pytest.skip("PyTorch differentiates this twice from 2.15 on")
    checking = Checking(case)
    probe = CurvatureProbe(every_n_steps=1, tol=1e-3, eigenvalue_every=1, hessian=HessianConfig(method=case.method))
    others: Sequence[Callback] = () if case.claim == "refused" else (checking,)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = run(case, probe, *others)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, CurvatureWarning)]
    assert all(case.says and case.says in message for message in said), said
    assert bool(said) == bool(case.says)
    assert_identical(run(case), outcome)
    curve = outcome.curve("curvature/lambda_max")
    if case.claim == "refused":
        assert not curve
        return
    is_wide = case.precision == "64-true"
    most = {"exact": 1e-6 if is_wide else 2e-5, "rounded": 0.05, "differences": 0.05}[case.claim]
    assert checking.error <= most
    assert checking.method == ("finite_difference" if case.claim == "differences" else "double_backward")
    assert curve[1] == pytest.approx(checking.largest, rel=max(most, 1e-3))


@pytest.mark.parametrize("case", [case for case in CASES if case.held_by], ids=lambda case: case.name)
def test_what_is_held_by_other_tests_is_held(case: Case) -> None:
    assert case.says in (ROOT / case.held_by).read_text()


# The page.

_BEGIN, _END = (
    "<!-- The table is written by `python -m tests.test_support_matrix`. -->\n",
    "<!-- end of the table -->\n",
)


def table() -> str:
    lines = ["| | | second derivatives |", "|---|---|---|"]
    before = ""
    for case in CASES:
        lines.append(f"| {case.group if case.group != before else ''} | {case.name} | {CLAIMS[case.claim]} |")
        before = case.group
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """The page with the present table."""
    head, rest = page.split(_BEGIN)
    _, tail = rest.split(_END)
    return f"{head}{_BEGIN}\n{table()}\n{_END}{tail}"


def test_the_page_says_what_the_tests_hold() -> None:
    page = PAGE.read_text()
    assert page == rewritten(page), "Run `python -m tests.test_support_matrix`."


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
