"""Whether a callback changes the run that it watches: train with it and without it, and compare everything.

`train` runs a module and notes all that a reading callback must leave alone; `assert_identical` compares two such
notes bit by bit. A new option of a callback is one more line in a parametrisation::

    assert_identical(train(), train(CurvatureProbe(every_n_steps=1)))
"""

import dataclasses
import hashlib
import random
import re
import tempfile
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Optional

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.modules import AugmentedClusters, BusyModule, MemoryLogger, Watcher

_OWN_TAGS = re.compile(r"(^|/)(curvature|spectrum|negative|scan|quasi_newton|nudge)(_details)?/")
"""The tags that the package's callbacks log, which a run without them lacks."""

_NOT_STATE = re.compile(
    r"_trainer|_fabric|_metric_attributes|_jit|_compiler_ctx|_parameters|_buffers|_modules|.*hooks.*|_example_input.*"
    r"|_torchdynamo_wrapper_id"
)
"""Attributes of modules that are the frameworks' own, or are compared elsewhere."""


@dataclasses.dataclass(repr=False)
class Outcome:
    """All that a run leaves behind. Only what `measured` holds may depend on the callbacks."""

    parameters: dict[str, Any]
    gradients: dict[str, Any]
    buffers: dict[str, Any]
    optimizers: Any
    attributes: dict[str, Any]
    """What the modules keep outside of parameters and buffers: modes, the state of metrics, lists, counters."""
    logged: list[Any]
    events: list[Any]
    callback_metrics: dict[str, Any]
    user_callbacks: list[Any]
    generators: dict[str, Any]
    data_seen: list[Any]
    versions: list[Any]
    """The version counters of parameters and buffers at every step, which count writes in place."""
    generators_at_steps: list[Any]
    step_gradients: list[Any]
    progress: dict[str, Any]
    measured: list[tuple[Optional[int], dict[str, float]]]

    def curve(self, tag: str) -> dict[Optional[int], float]:
        """What the callbacks logged under one tag, by step."""
        return {step: metrics[tag] for step, metrics in self.measured if tag in metrics}


def few_clusters() -> AugmentedClusters:
    """Epochs of nine batches, the last of which is smaller, so that a short run sees more than one of them."""
    return AugmentedClusters(8 * 9 + 4)


def train(
    callbacks: Callback | Sequence[Callback] = (),
    *,
    module: Callable[[], pl.LightningModule] = BusyModule,
    dataset: Callable[[], Any] = few_clusters,
    batch_size: int = 9,
    steps: int = 14,
    accumulate: int = 1,
    clip: Optional[float] = 0.5,
    clip_by: Optional[str] = None,
    precision: str = "32-true",
    validate: bool = False,
    user_callbacks: Callable[[], Sequence[Callback]] = list,
    plugins: Sequence[Any] = (),
) -> Outcome:
    """Train a fresh module from a fixed seed.

    Args:
        callbacks: The callbacks that must not show.
        module: Makes the module.
        dataset: Makes the training data, which a shuffling loader draws from.
        batch_size: Of the training batches. The last one of an epoch is smaller.
        steps: Optimizer steps.
        accumulate: Batches for each of them.
        clip: The trainer's ``gradient_clip_val``.
        clip_by: The trainer's ``gradient_clip_algorithm``.
        precision: The trainer's.
        validate: Whether to validate in the midst of the epochs.
        user_callbacks: Makes further callbacks, whose state is compared.
        plugins: The trainer's; one for the precision goes before `precision`.

    """
    pl.seed_everything(7, verbose=False)
    fresh, data, others = module(), dataset(), list(user_callbacks())
    witness, logger = _Witness(), MemoryLogger()
    under_test = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            precision=None if plugins else precision,
            plugins=list(plugins) or None,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            gradient_clip_algorithm=clip_by,
            log_every_n_steps=3,
            val_check_interval=7 if validate else None,
            num_sanity_val_steps=1 if validate else 0,
            limit_val_batches=3 if validate else 0,
            logger=logger,
            callbacks=[*under_test, *others, witness],
            default_root_dir=root,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(other, pl.callbacks.Checkpoint) for other in others),
        )
        trainer.fit(fresh, DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size))
        user_state = [_plain(other.state_dict(), root) for other in others]
    return Outcome(
        parameters=_plain(dict(fresh.named_parameters())),
        gradients=_plain({name: parameter.grad for name, parameter in fresh.named_parameters()}),
        buffers=_plain(dict(fresh.named_buffers())),
        optimizers=_plain([optimizer.state_dict() for optimizer in trainer.optimizers]),
        attributes={name: _attributes(inner) for name, inner in fresh.named_modules()},
        logged=_plain([(step, kept) for step, metrics in logger.history if (kept := _select(metrics, own=False))]),
        events=list(logger.events),
        callback_metrics=_plain(_select(trainer.callback_metrics, own=False)),
        user_callbacks=user_state,
        generators=_generators(),
        data_seen=witness.data_seen,
        versions=witness.versions,
        generators_at_steps=witness.generators,
        step_gradients=witness.gradients,
        progress={"step": trainer.global_step, "epoch": trainer.current_epoch, "stopped": trainer.should_stop},
        measured=[(step, kept) for step, metrics in logger.history if (kept := _select(metrics, own=True))],
    )


def assert_identical(expected: Outcome, actual: Outcome) -> None:
    """Fail, naming the first difference of each kind, unless both runs were the same but for what was measured."""
    __tracebackhide__ = True
    lines: list[str] = []
    for field in dataclasses.fields(Outcome):
        if field.name != "measured":
            differences: list[str] = []
            _compare(field.name, getattr(expected, field.name), getattr(actual, field.name), differences)
            more = f" ({len(differences) - 1} more)" if len(differences) > 1 else ""
            lines += [f"{first}{more}" for first in differences[:1]]
    assert not lines, "\n".join(["The callback changed the run:", *lines])


class _Witness(Watcher):
    """The last callback, which notes the state of the run right before each step and each update."""

    def __init__(self) -> None:
        self.data_seen: list[Any] = []
        self.versions: list[Any] = []
        self.generators: list[str] = []
        self.gradients: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.data_seen.append((batch_idx, _plain(batch)))
        tensors = [*pl_module.parameters(), *pl_module.buffers()]
        self.versions.append([tensor._version for tensor in tensors])
        self.generators.append(hashlib.sha256(repr(_generators()).encode()).hexdigest())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        content = b"".join(_bytes(p.grad) for p in pl_module.parameters() if p.grad is not None)
        self.gradients.append(hashlib.sha256(content).hexdigest())


def _select(metrics: Mapping[str, Any], own: bool) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if bool(_OWN_TAGS.search(name)) is own}


def _generators() -> dict[str, Any]:
    return {
        "torch": _bytes(torch.get_rng_state()),
        "numpy": _plain(np.random.get_state(legacy=False)),
        "python": random.getstate(),
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(module).items() if not _NOT_STATE.fullmatch(name)}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _hashable(key: Any) -> Any:
    return key if isinstance(key, Hashable) and not isinstance(key, tuple) else repr(key)


def _plain(value: Any, root: str = "") -> Any:
    """A copy that `==` compares bit by bit, with the type's name for what holds no state of interest."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), _bytes(value))
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, np.random.Generator):
        return _plain(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return _bytes(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Mapping):
        return {_hashable(_plain(key, root)): _plain(inner, root) for key, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(inner, root) for inner in value]
    if isinstance(value, nn.Module):
        return [_plain(dict(value.state_dict(keep_vars=True))), _attributes(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)})
    if isinstance(value, str):
        return value.replace(root, "") if root else value
    if isinstance(value, float):
        return value.hex()
    if value is None or isinstance(value, (bool, int, bytes, set, frozenset)):
        return value
    return type(value).__name__


def _compare(path: str, expected: Any, actual: Any, differences: list[str]) -> None:
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        for key in expected:
            _compare(f"{path}[{key!r}]", expected[key], actual[key], differences)
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
            _compare(f"{path}[{index}]", one, other, differences)
    elif expected != actual:
        differences.append(f"{path}: {_brief(expected)} without, {_brief(actual)} with the callback")


def _brief(value: Any) -> str:
    return repr(value) if len(repr(value)) < 100 else f"{repr(value)[:60]}..."
