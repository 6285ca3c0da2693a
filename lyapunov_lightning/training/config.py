"""What is measured and when: values that can be compared, shared and written in YAML."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch.utils.data import DataLoader

from lyapunov_lightning.curvature.arguments import check_choice, check_int
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.training.schedule import Schedule

__all__ = ["Data", "HessianConfig", "HessianLike", "LossFn", "Mode", "Schedule", "ScheduleLike"]

Data = Literal["batch", "fixed"]
Mode = Literal["train", "eval"]
LossFn = Callable[[Any, Any], Any]

if TYPE_CHECKING:
    DataLike: TypeAlias = Data | DataLoader[Any]
else:
    # A command line reads the annotations, and would take a configuration's `data` for the arguments of a DataLoader.
    DataLike = Data


@dataclass(frozen=True)
class HessianConfig:
    """Which Hessian a callback measures: of what loss, on what data, computed how.

    Callbacks with equal configurations share one operator at a step.

    Args:
        data: A ``DataLoader`` of data of your own, such as held-out data or those of another task, all of it unless
            `num_batches` or `fraction` says otherwise; its batches have to be such as the loss understands. Or
            ``"batch"`` for the step's own batch (with gradient accumulation the first one of the step; for
            `CurvatureProbe` all of them), ``"fixed"`` for the first batches of an epoch as the training dataloader
            gives them, the same throughout. None is the callback's default: ``"batch"`` for `CurvatureProbe` and
            `QuasiNewtonLRController`, ``"fixed"`` for the others.
        num_batches: Size of the fixed data, or of those of a DataLoader, in batches, for each rank.
        fraction: Size of the fixed data as a share of an epoch's batches, in place of `num_batches`. If neither is
            given it is 0.05 for the callbacks and 1, all of the data, for `lyapunov_lightning.measure` and for a
            DataLoader.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss. None is ``"train"`` for the
            callbacks and ``"eval"`` for `lyapunov_lightning.measure`.
        method: How Hessian-vector products are computed: ``"double_backward"`` and ``"forward_over_reverse"`` are
            exact, ``"finite_difference"`` works with any model, ``"auto"`` is double backward, and finite differences
            with a warning where PyTorch cannot differentiate twice.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
            A module can define a method ``curvature_loss(batch)`` to the same end.
        batch_size_fn: Maps a batch to the number of its samples, by which batches and ranks are weighted. By default
            the ``batch_size`` that the step passes to ``self.log``, else the batch as Lightning reads it.
        seed: Seed of everything random in the measurement.
        max_gather_bytes: For a model that is sharded over the ranks (FSDP2), how much memory each rank may spend on
            gathered parameters and vectors. Products on gathered parameters take eight times the memory of the
            parameters, products through one layer after the other five times; with less, products are finite
            differences of sharded gradients. By default half of the memory that is free at the first measurement.
        offload: Whether Krylov bases and eigenvectors are kept in the CPU's memory, for models that leave the device no
            room for them. Every product then moves a vector there and back.
        compile: Whether products are compiled by PyTorch's Inductor (needs a compiler of C++, on a GPU Triton): 1.2
            gradients in place of 2.0 on a small transformer, after a minute or more of compiling at the first
            measurement and some seconds of tracing at each later one: for long runs of large models. Where it fails
            there is one warning with the reason, and products are plain. For exact products whose graphs are kept.

    Raises:
        ValueError: If an argument is out of its range, or contradicts another one.

    Example::

        >>> from lyapunov_lightning import HessianConfig
        >>> HessianConfig(data="fixed", num_batches=4, mode="eval") == HessianConfig("fixed", 4, mode="eval")
        True

    """

    # None is "the callback's own default" and not a value: in YAML a mapping that names one field is to leave all
    # others as they are. All fields can be hashed, since configurations are the keys under which operators are shared.
    data: DataLike | None = None
    num_batches: int | None = None
    fraction: float | None = None
    mode: Mode | None = None
    method: Method = "auto"
    loss_fn: LossFn | None = None
    batch_size_fn: Callable[[Any], int] | None = None
    seed: int = 0
    max_gather_bytes: int | None = None
    offload: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            check_choice("data", self.data, Data)
        elif self.data is not None and not isinstance(self.data, DataLoader):
            raise ValueError(f"`data` should be 'batch', 'fixed' or a DataLoader, got {self.data!r}.")
        if self.mode is not None:
            check_choice("mode", self.mode, Mode)
        check_choice("method", self.method, Method)
        if self.num_batches is not None:
            check_int("num_batches", self.num_batches, least=1)
        # A bool is an int to Python: `fraction=True` would be all of the data, and `seed=True` the seed 1.
        if self.fraction is not None and (
            isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1
        ):
            raise ValueError(f"`fraction` should be in (0, 1], got {self.fraction!r}.")
        self._check_size()
        for name in ("loss_fn", "batch_size_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise ValueError(f"`{name}` should be a function, got {function!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"`seed` should be an int, got {self.seed!r}.")
        if self.max_gather_bytes is not None:
            check_int("max_gather_bytes", self.max_gather_bytes, least=0)
        for name in ("offload", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` should be a bool, got {getattr(self, name)!r}.")

    def filled(self, *, data: DataLike, fraction: float, mode: Mode, method: Method | None = None) -> "HessianConfig":
        """The same configuration with values for what the user left open.

        Args:
            data: On which data, if that is open.
            fraction: On how much of the data, if that is open.
            mode: In which mode, if that is open.
            method: How products are computed, whatever the user chose; no change if None.

        """
        data = data if self.data is None else self.data  # a DataLoader without batches is false
        has_size = self.num_batches is not None or self.fraction is not None
        return replace(
            self,
            data=data,
            fraction=self.fraction if has_size or data == "batch" else fraction if data == "fixed" else 1.0,
            mode=self.mode or mode,
            method=method or self.method,
        )

    def _check_size(self) -> None:
        """Make sure that there is one size of the data at most, and that it is of data that have one."""
        given = {"num_batches": self.num_batches, "fraction": self.fraction}
        sizes = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(sizes) == 2:
            raise ValueError(f"`num_batches` and `fraction` are two sizes of the same data, got {' and '.join(sizes)}.")
        if sizes and self.data == "batch":
            raise ValueError(
                f"`{sizes[0]}` is a size of fixed data, and `data='batch'` is the batch of the step. Use"
                " `data='fixed'`, or leave the size out."
            )


if TYPE_CHECKING:
    HessianLike: TypeAlias = HessianConfig | Mapping[str, Any]
    ScheduleLike: TypeAlias = Schedule | Mapping[str, Any]
else:
    # A command line reads the annotations: of a dataclass it knows the fields, and names a misspelt one.
    HessianLike, ScheduleLike = HessianConfig, Schedule
