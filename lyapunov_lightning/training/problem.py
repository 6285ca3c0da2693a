"""From a LightningModule in a Trainer to the operator of a measurement."""

from collections.abc import Collection, Hashable
from typing import Any, Optional

import lightning.pytorch as pl
import torch

from lyapunov_lightning.curvature.errors import PeerFailureError
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.training.batches import ProbeData
from lyapunov_lightning.training.distributed import sum_over_processes
from lyapunov_lightning.training.objective import (
    LossFn,
    TrainingObjective,
    check_objective,
    check_parameters,
)
from lyapunov_lightning.training.sandbox import Mode


class CurvatureProblem:
    """Which Hessian a callback measures: of what loss, on what data, computed how.

    Args:
        owner: The callback's class, named in errors.
        data: The batches.
        mode: Whether dropout and BatchNorm act as in training or as in evaluation.
        method: How products are computed.
        loss_fn: Maps the module and a batch to the loss, in place of ``training_step``.
        step: Length of the finite-difference step.

    Raises:
        ValueError: If `mode` is not known.

    """

    def __init__(
        self,
        owner: str,
        data: ProbeData,
        *,
        mode: Mode = "train",
        method: Method = "auto",
        loss_fn: Optional[LossFn] = None,
        step: Optional[float] = None,
    ) -> None:
        if mode not in ("train", "eval"):
            raise ValueError(f"`mode` should be 'train' or 'eval', got {mode!r}.")
        self._owner = owner
        self._data = data
        self._mode: Mode = mode
        self._method: Method = method
        self._loss_fn = loss_fn
        self._step = step
        self._fell_back = False

    @property
    def key(self) -> Hashable:
        """Equal for problems that are the same at the same step."""
        return self._data.key, self._mode, self._method, self._loss_fn, self._step

    def check_setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse what is known to be impossible before anything runs; for the hook ``setup``."""
        check_objective(self._owner, trainer, pl_module, mode=self._mode, loss_fn=self._loss_fn)

    def check_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse what can be told once model and data are there; for the hook ``on_train_start``.

        The module is looked at again, since Lightning may have converted its layers since ``setup``.

        """
        check_objective(self._owner, trainer, pl_module, mode=self._mode, loss_fn=self._loss_fn)
        check_parameters(self._owner, pl_module)
        self._data.check(self._owner, trainer)

    def observe(self, trainer: "pl.Trainer", batch: Any, batch_idx: int) -> None:
        """Let a training batch pass; for the hook ``on_train_batch_start``, at every step."""
        self._data.observe(trainer, batch, batch_idx)

    def operator(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        names: Optional[Collection[str]] = None,
    ) -> Optional[HessianOperator]:
        """The Hessian at the present parameters, or None while the fixed data are not complete.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch of the present step.
            batch_idx: Its index.
            names: The parameters whose diagonal block of the Hessian is meant; all trainable ones if None.

        Raises:
            PeerFailureError: If another process cannot build its part; what was wrong in this one is raised as it is.

        """
        reduce = sum_over_processes(trainer)
        operator: Optional[HessianOperator] = None
        failure: Optional[Exception] = None
        try:
            batches = self._data.batches(trainer, batch, batch_idx)
            if batches is not None:
                objective = TrainingObjective(trainer, pl_module, mode=self._mode, loss_fn=self._loss_fn, names=names)
                with self._data.randomness(trainer.global_rank):
                    operator = HessianOperator(
                        objective,
                        objective.parameters,
                        batches,
                        method="finite_difference" if self._fell_back else self._method,
                        step=self._step,
                        reduce=reduce,
                        on_fallback=self._remember_fallback,
                    )
        except Exception as error:  # handed on below, once the other processes know of it
            failure = error
        if reduce is not None:
            flags = torch.tensor([failure is not None, operator is None], dtype=torch.float32)
            flags = flags.to(trainer.strategy.root_device)
            reduce(flags)
            failures, missing = flags.tolist()
            if failure is None and failures:
                raise PeerFailureError(int(failures))
            if missing:
                operator = None
        if failure is not None:
            raise failure
        return operator

    def _remember_fallback(self) -> None:
        """What cannot be differentiated twice at one step cannot at the next."""
        self._fell_back = True
