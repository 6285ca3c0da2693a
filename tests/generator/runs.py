"""Running a case: without and with the callbacks under test, and once more for the dense Hessian of a step's own loss.

The dense Hessian comes from a third run, which trains like the first one up to a step, differentiates the very loss
that Lightning is about to run backward, and ends. Nothing is copied or replayed for it, so that it is true wherever
the step keeps its state.
"""

import contextlib
import hashlib
import linecache
import random
import re
import sys
import tempfile
import types
import unittest.mock
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyapunov_lightning.training.reporting.recording import Recorder
from tests.callbacks.identity import _bytes, _compare, _generators
from tests.generator.cases import Case
from tests.generator.snapshot import Snapshot
from tests.modules import MemoryLogger, Watcher

USER = "generated_module"
"""Name of the Python module that holds a case's code."""

OWN_TAGS = re.compile(r"(^|/)(curvature|spectrum|negative|scan|quasi_newton|nudge)(_details)?/")
"""The tags that the package's callbacks log, which a run without them lacks."""

TOLERANCE = {"float64": 1e-5, "float32": 2e-3}
"""Of eigenvalues, relative to the largest in size.

Ten times what the callbacks are asked for: their residual bounds the error, and in single precision the two Hessians
are sums in different order.
"""


def differences(name: str, expected: Any, actual: Any) -> list[str]:
    """All places where two notes of runs differ."""
    found: list[str] = []
    _compare(name, expected, actual, found)
    return found


@dataclass
class Outcome:
    """What a run leaves behind. Only `measured`, `warned` and `error` may depend on the callbacks under test."""

    steps: list[Any] = field(default_factory=list)
    """Right before each batch: the batch, generators, and everything that can be reached from the module."""
    gradients: list[Any] = field(default_factory=list)
    final: Any = None
    optimizers: Any = None
    logged: Any = None
    events: Any = None
    callback_metrics: Any = None
    callbacks: Any = None
    progress: Any = None
    generators: Any = None
    flags: Any = None
    measured: list[tuple[int | None, dict[str, float]]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    error: BaseException | None = None

    def differences(self, other: "Outcome") -> list[str]:
        """The first difference of each kind from another run."""
        lines: list[str] = []
        for each in fields(self):
            if each.name not in ("measured", "warned", "error"):
                lines += differences(each.name, getattr(self, each.name), getattr(other, each.name))[:1]
        return lines

    def curve(self, tag: str) -> dict[int | None, float]:
        """What the callbacks under test logged under one tag, by step."""
        return {step: metrics[tag] for step, metrics in self.measured if tag in metrics}


def run(case: Case, callbacks: Sequence[Callback] = (), *, reference: bool = False) -> Outcome:
    """Train a case's module from its fixed seed.

    No figures are drawn, which takes a tenth of the time and has nothing to do with the module;
    ``tests/callbacks/test_bit_identity.py`` draws them.

    Args:
        case: What to train.
        callbacks: The callbacks that must not show.
        reference: Whether to train the variant that plain autograd can differentiate twice.

    """
    outcome, logger = Outcome(), MemoryLogger()
    with _process_state(), _user_module(case.source(reference)) as user, tempfile.TemporaryDirectory() as root:
        torch.manual_seed(case.seed), np.random.seed(case.seed % 2**32), random.seed(case.seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module, loader, others = user.Module(), user.loader(), user.callbacks()
            witness = _Witness(outcome, user, module, loader)
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                logger=logger,
                callbacks=[*callbacks, *others, witness],
                default_root_dir=root,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                **user.TRAINER,
            )
            try:
                with unittest.mock.patch.object(Recorder, "draw", return_value=True):
                    if isinstance(loader, pl.LightningDataModule):
                        trainer.fit(module, datamodule=loader)
                    else:
                        trainer.fit(module, loader, user.val_loader() if trainer.limit_val_batches else None)
            except Exception as error:
                outcome.error = error
        outcome.warned = [str(each.message) for each in caught if "lyapunov" in each.category.__module__]
        _note_the_end(outcome, trainer, logger, others, witness)
    return outcome


def _note_the_end(outcome: Outcome, trainer: Any, logger: MemoryLogger, others: Any, witness: "_Witness") -> None:
    outcome.final = witness.everything()
    outcome.optimizers = Snapshot(USER)(
        [
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            [{name: value for name, value in vars(trainer).items() if name.startswith("user_")}],
        ]
    )
    split = [
        (step, {name: value for name, value in metrics.items() if bool(OWN_TAGS.search(name)) is own})
        for own in (False, True)
        for step, metrics in logger.history
    ]
    middle = len(logger.history)
    outcome.logged = Snapshot(USER)([entry for entry in split[:middle] if entry[1]])
    outcome.measured = [entry for entry in split[middle:] if entry[1]]
    outcome.events = Snapshot(USER)(logger.events)
    outcome.callback_metrics = Snapshot(USER)(
        {name: value for name, value in trainer.callback_metrics.items() if not OWN_TAGS.search(name)}
    )
    outcome.callbacks = Snapshot(USER)([[other.state_dict(), other] for other in others])
    outcome.progress = [trainer.global_step, trainer.current_epoch, trainer.should_stop, trainer.fit_loop.state_dict()]
    outcome.generators = _generators()
    outcome.flags = [torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.is_autocast_enabled("cpu")]
    outcome.flags += [torch.backends.cuda.math_sdp_enabled(), torch.backends.cudnn.enabled, torch.is_anomaly_enabled()]


class _Witness(Watcher):
    """The last callback, which notes everything right before each step and each update."""

    def __init__(self, outcome: Outcome, user: types.ModuleType, module: pl.LightningModule, loader: Any) -> None:
        self._outcome = outcome
        self._reachable = {"module": module, "loader": loader, "file": user}

    def everything(self) -> Any:
        snapshot = Snapshot(USER)
        code = {
            name: snapshot(value)
            for name, value in vars(self._reachable["file"]).items()
            if not name.startswith("__") and not (isinstance(value, types.ModuleType) and value.__spec__)
        }
        return {
            "module": snapshot(self._reachable["module"]),
            "loader": snapshot(self._reachable["loader"]),
            "file": code,
        }

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        generators = hashlib.sha256(repr(_generators()).encode()).hexdigest()
        versions = [tensor._version for tensor in (*pl_module.parameters(), *pl_module.buffers())]
        noted = {"index": batch_idx, "batch": Snapshot(USER)(batch), "generators": generators, "versions": versions}
        self._outcome.steps.append({**noted, **self.everything()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        content = b"".join(map(_bytes, gradients))
        self._outcome.gradients.append(hashlib.sha256(content).hexdigest())


class EnoughError(Exception):
    """Ends a run whose purpose is fulfilled."""


class DenseHessian(Watcher):
    """Computes all eigenvalues of the Hessian of one step's own loss, and ends the run.

    Args:
        step: Which one: so many batches ended in an optimizer step before.

    """

    def __init__(self, step: int) -> None:
        self._step = step
        self.eigenvalues: Tensor | None = None

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if trainer.fit_loop.epoch_loop._batches_that_stepped == self._step:
            parameters = [p for p in pl_module.parameters() if p.requires_grad]
            self.eigenvalues = torch.linalg.eigvalsh(_hessian(loss.sum() * trainer.accumulate_grad_batches, parameters))
            raise EnoughError


def _hessian(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, **options)
    rows = []
    for entry in torch.cat([part.reshape(-1) for part in gradient]):
        if entry.grad_fn is None:
            row = [torch.zeros_like(parameter) for parameter in parameters]
        else:
            row = torch.autograd.grad(entry, parameters, retain_graph=True, **options)
        rows.append(torch.cat([part.reshape(-1) for part in row]))
    dense = torch.stack(rows).detach().double()
    if (dense - dense.T).abs().max() > 1e-3 * dense.abs().max():
        raise RuntimeError("the dense Hessian is not symmetric: PyTorch has some second derivative wrong")
    return (dense + dense.T) / 2


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What ``torch._weight_norm`` computes, whose second derivative is not that of the first on a CPU."""
    return v * (g / v.square().sum([axis for axis in range(v.dim()) if axis != dim], keepdim=True).sqrt())


def eigenvalues_of_step(case: Case, step: int) -> Tensor:
    """All eigenvalues, ascending, of the Hessian of the loss of one step, on its first batch."""
    dense = DenseHessian(step)
    hook = sys.modules["torch.nn.utils.weight_norm"]
    with (
        sdpa_kernel(SDPBackend.MATH),  # the fused kernels of attention have one derivative only
        unittest.mock.patch.object(torch, "_weight_norm", _weight_norm),
        unittest.mock.patch.object(hook, "_weight_norm", _weight_norm),
    ):
        outcome = run(case, [dense], reference=True)
    if dense.eigenvalues is None:
        raise RuntimeError(f"no dense Hessian at step {step} of {case}") from outcome.error
    return dense.eigenvalues


@contextlib.contextmanager
def _user_module(source: str) -> Iterator[types.ModuleType]:
    """The user's file, loaded afresh."""
    user = types.ModuleType(USER)
    user.__file__ = f"<{USER}>"
    sys.modules[USER] = user
    linecache.cache[user.__file__] = (len(source), None, source.splitlines(keepends=True), user.__file__)
    try:
        exec(compile(source, user.__file__, "exec"), vars(user))
        yield user
    finally:
        del sys.modules[USER], linecache.cache[user.__file__]


@contextlib.contextmanager
def _process_state() -> Iterator[None]:
    """Leave the process as it was: precision, determinism, generators."""
    before, states = torch.get_default_dtype(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)
        torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    case: Case
    kind: str
    """``"exact"``, ``"identical"``, ``"refused"``, ``"not measured"``,
    ``"does not train"`` by itself, or ``"FAILED"``."""
    reasons: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a guarantee was broken."""
        return self.kind == "FAILED"

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind}: {self.case}", *self.reasons])


def check(case: Case) -> Verdict:
    """Whether the callbacks leave a case's training alone, and measure right."""
    try:
        without = run(case)
        error = without.error
    except Exception as its_own:  # ingredients that do not go together, such as a traced layer in a deep copy
        error = its_own
    if error is not None:
        return Verdict(case, "does not train", (f"by itself: {error!r}",))
    measured = run(case, [reader.make(reader.every) for reader in case.readers])
    warned = tuple(f"warned: {text}" for text in measured.warned)
    if isinstance(measured.error, MisconfigurationException) and not measured.steps:
        kind = "FAILED" if case.measurable else "refused"
        return Verdict(case, kind, (f"refused: {measured.error}",))
    if measured.error is not None:
        return Verdict(case, "FAILED", (f"ended the training: {measured.error!r}", *warned))
    if differences := without.differences(measured):
        return Verdict(case, "FAILED", (*differences, *warned))
    missing = _missing(case, measured, without.progress[0])
    if missing:
        told = bool(measured.warned) and not case.measurable
        return Verdict(case, "not measured" if told else "FAILED", (*missing, *warned))
    if not case.exact:
        return Verdict(case, "identical")
    wrong = _wrong_eigenvalues(case, measured)
    return Verdict(case, "FAILED", (*wrong, *warned)) if wrong else Verdict(case, "exact")


def _missing(case: Case, outcome: Outcome, steps: int) -> list[str]:
    """Which callbacks measured more seldom than they were asked to."""
    lines = []
    for reader in case.readers:
        found = [step for step, value in outcome.curve(reader.counts).items() if value == value]
        wanted = [step for step in range(0, steps, reader.every) if step >= reader.first]
        if len(found) < (len(wanted) if case.always_a_loss else 1):
            lines.append(f"{reader} measured at {found} of {steps} steps")
        lines += [f"{reader}: `{tag}` is missing" for tag in reader.eigenvalues if found and not outcome.curve(tag)]
    return lines


def _wrong_eigenvalues(case: Case, outcome: Outcome) -> list[str]:
    """Eigenvalues that differ from those of the dense Hessian, at the last step that was measured."""
    lines = []
    truths: dict[int, Tensor] = {}
    for reader in case.readers:
        for tag, place in reader.eigenvalues.items():
            step = max(outcome.curve(tag))  # type: ignore[type-var]
            if step not in truths:
                truths[step] = eigenvalues_of_step(case, step)
            value, truth = outcome.curve(tag)[step], float(truths[step][place])
            if not abs(value - truth) <= TOLERANCE[case.dtype] * max(float(truths[step].abs().max()), 1e-6):
                lines.append(f"`{tag}` at step {step}: {value:.8g}, truth {truth:.8g}")
    return lines


def shrink(case: Case) -> Verdict:
    """The smallest case that still fails in the same kind of way, and how."""
    verdict = check(case)
    for smaller in case.smaller():
        if smaller.readers and check(smaller).failed:
            return shrink(smaller)
    return verdict
