"""SGD with another learning rate along the sharpest directions of the loss."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.callbacks.base import CurvatureCallback, Stateful
from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import PeerFailureError
from lyapunov_lightning.curvature.lanczos import lanczos
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.curvature.vectors import FlatLayout
from lyapunov_lightning.training.batches import Data, ProbeData
from lyapunov_lightning.training.distributed import sum_over_processes
from lyapunov_lightning.training.objective import trainable_parameters
from lyapunov_lightning.training.optimizers import check_uniform_sgd
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.recording import WatchedOperator, progress
from lyapunov_lightning.training.sandbox import Mode
from lyapunov_lightning.training.schedule import Schedule, Timetable
from lyapunov_lightning.training.sharing import Subscription

Variant = Literal["nudge", "top_only", "no_top"]


class NudgedSGDHook(CurvatureCallback):
    r"""Gives SGD another learning rate along the sharpest directions of the loss: Nudged-SGD and its relatives.

    The `k` eigenvectors of the largest Hessian eigenvalues are measured on fixed training data, again before every
    epoch, and each update is changed in their span, the rows of :math:`V`. With :math:`u` for the gradient that SGD
    takes its step from:

    - ``"nudge"``: learning rate :math:`\gamma\eta` along the eigenvectors, :math:`u - (1 - \gamma)V^\top V u`. With
      `gamma` below 1 the training goes to sharper regions, faster early on. With `gamma` 1 nothing is touched: the run
      is bit-identical to plain SGD, with the same measurements.
    - ``"top_only"``: :math:`V^\top V u`, the update follows the sharpest directions alone.
    - ``"no_top"``: :math:`u - V^\top V u`, the update leaves them out.

    `frozen` keeps the eigenvectors of the first measurement for the whole run, the paper's constant direction.

    **Where it acts.** In ``on_before_optimizer_step``: after the backward pass, the accumulation over batches, the mean
    over processes and the unscaling of half precision; before gradient clipping, and before the optimizer's weight
    decay and momentum. So the order is: unscale, nudge, clip, step. Momentum then sums changed gradients. A weight
    decay :math:`w` of the optimizer belongs to the gradient of SGD, :math:`u = g + w\theta`, so ``.grad`` becomes
    :math:`P(u) - w\theta`, to which the optimizer adds :math:`w\theta` again; that is also what clipping sees. In a
    module with manual optimization it is what the module itself did to the gradients that comes first.

    Parameters whose ``.grad`` is None keep it, and count as zeros. A gradient that is not finite is left alone, for
    the loss scaler to skip.

    Only the eigenpairs that met `tol` are acted upon. If none did, or the measurement failed, the last good ones stay,
    and before the first good ones the gradient is left alone. Where parameters are frozen or unfrozen in mid-run, the
    eigenvectors do not fit them any more, and the gradient is left alone until they are measured anew. Each is warned
    of once. What it does depends on its own measurement alone, whatever other callbacks measure; callbacks that measure
    the same Hessian at the same step share the operator.

    Logged:

    - ``nudge/removed_fraction``: share of the squared norm of the gradient that was taken out,
      ``‖u − P(u)‖² / ‖u‖²``, at every ``log_every_n_steps``-th step; above 1 for `gamma` above 2.
    - At each measurement ``nudge/lambda_1`` ... ``lambda_k``, the largest first; ``nudge/residual``, the largest
      residual ``‖Hv − λv‖`` among them; ``nudge/converged``, the share of them that met `tol`;
      ``nudge/subspace_overlap``, ``‖V_old V_newᵀ‖²_F / k`` with the last measurement, 1 for the same subspace;
      ``nudge/matvecs`` and ``nudge/seconds``, products and wall-clock time spent.

    It holds `k` vectors of the model's size, in float32 or wider, and so does the checkpoint; a resumed run goes on bit
    by bit. A measurement takes the memory of its Krylov basis, ``max(32, 2k + 16) + 1`` vectors at most, and an update
    that of about four.

    Args:
        k: How many of the sharpest directions.
        gamma: Factor of the learning rate along them, for ``"nudge"``.
        refresh: When to measure: ``"epoch"`` for before the first step of every epoch, or a schedule.
        variant: ``"nudge"``, ``"top_only"`` or ``"no_top"``, see above.
        frozen: Whether to measure only once, and keep the eigenvectors.
        data: ``"fixed"`` for the same samples of the training set throughout, ``"batch"`` for the step's own batch.
        num_batches: Size of the fixed data in batches for each process.
        fraction: Size of the fixed data as a share of the training set, if `num_batches` is not given; 5 % as in the
            paper.
        method: How products are computed, as for `CurvatureProbe`.
        tol: Relative residual at which an eigenpair counts as converged.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
        log_prefix: Put in front of every tag.
        seed: Seed of the solver and of the choice of fixed data.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the optimizer is not ``torch.optim.SGD`` with one learning rate for all trainable
            parameters, also in mid-run; if a fused optimizer unscales gradients itself; if there are two of this
            callback; if the module or the strategy cannot be measured.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import NudgedSGDHook
        >>> trainer = Trainer(callbacks=[NudgedSGDHook(k=5, gamma=0.01)], max_epochs=1, logger=False)

    Reference:
        "On the relation between the sharpest directions of DNN loss and the SGD step length", secs. 3.3 and 4,
        appendices C and E.

    """

    def __init__(
        self,
        k: int = 5,
        gamma: float = 0.01,
        refresh: Union[Literal["epoch"], Schedule] = "epoch",
        variant: Variant = "nudge",
        frozen: bool = False,
        *,
        data: Data = "fixed",
        num_batches: Optional[int] = None,
        fraction: float = 0.05,
        method: Method = "auto",
        tol: float = 1e-2,
        mode: Mode = "train",
        loss_fn: Optional[Callable[[pl.LightningModule, Any], Any]] = None,
        log_prefix: Optional[str] = None,
        seed: int = 0,
    ) -> None:
        check_int("k", k, least=1)
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma < math.inf:
            raise ValueError(f"`gamma` should be a finite non-negative float, got {gamma}.")
        if refresh != "epoch" and not isinstance(refresh, Schedule):
            raise ValueError(f"`refresh` should be 'epoch' or a `Schedule`, got {refresh!r}.")
        check_choice("variant", variant, Variant)
        if not isinstance(frozen, bool):
            raise ValueError(f"`frozen` should be a bool, got {frozen!r}.")
        check_choice("method", method, Method)
        check_positive("tol", tol)
        problem = CurvatureProblem(
            type(self).__name__,
            ProbeData(data, num_batches=num_batches, fraction=fraction, seed=seed),
            mode=mode,
            method=method,
            loss_fn=loss_fn,
        )
        schedule = refresh if isinstance(refresh, Schedule) else Schedule(every_n_epochs=1)
        # No eigenpairs are asked for together with other callbacks: theirs would change ours, and so the training.
        super().__init__(Subscription(problem, Timetable(schedule), None), log_prefix)
        self._k = k
        self._variant = variant
        self._frozen = frozen
        self._tol, self._seed = tol, seed
        self._inside, self._outside = {"nudge": (gamma, 1.0), "top_only": (1.0, 0.0), "no_top": (0.0, 1.0)}[variant]
        self._directions = _Directions()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(k=self._k, variant=self._variant, log_prefix=self._log_prefix)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._check_alone(trainer, "what two of them do to the same gradient depends on their order")

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        self._check_size(pl_module, self._k)
        self._check_optimizer(trainer, pl_module)
        self._directions.start()

    @override
    def charts(self) -> dict[str, dict[str, list[str]]]:
        charts = {"largest eigenvalues": [r"nudge/lambda_\d+$"], "removed fraction": ["nudge/removed_fraction$"]}
        return {"nudge": {name: self._recorder.patterns(tags) for name, tags in charts.items()}}

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.subscription.problem.observe(trainer, batch, batch_idx)
        if not self.subscription.timetable.is_due(trainer, batch_idx):
            return
        with self._recorder.measurement(trainer, "nudge") as scalars:
            measurement = self.subscription.take(trainer, pl_module, batch, batch_idx)
            if measurement is None or (self._frozen and self._directions.vectors is not None):
                return
            scalars.update(self._measure(trainer, list(trainable_parameters(pl_module)), measurement.operator))
        self.subscription.timetable.record(scalars.get("nudge/seconds", 0.0))

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        self._check_optimizer(trainer, pl_module)
        if self._directions.vectors is None:
            return
        named = trainable_parameters(pl_module)
        if self._directions.names != list(named):
            self._recorder.warn_once(
                "other parameters",
                "the trainable parameters are not those whose eigenvectors were measured, so the gradient is left alone"
                f" {'from now on' if self._frozen else 'until the next measurement'}.",
            )
            return
        is_untouched = self._inside == self._outside == 1
        removed = 0.0 if is_untouched else self._change_gradient(optimizer, list(named.values()))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            fraction = float(removed)
            if math.isfinite(fraction):
                self._recorder.log(trainer, {"nudge/removed_fraction": fraction})

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {"timetable": self.subscription.timetable, "directions": self._directions}

    def _measure(self, trainer: "pl.Trainer", names: list[str], operator: HessianOperator) -> dict[str, float]:
        """Measure the eigenpairs anew, and keep the vectors of those that converged."""
        pairs = self._eigenpairs(trainer, operator, self._directions.matching(names))
        count = int(pairs.converged.sum())
        scalars = {f"nudge/lambda_{i}": float(value) for i, value in enumerate(pairs.values, 1)}
        scalars["nudge/residual"] = float(pairs.residuals.max())
        scalars["nudge/converged"] = count / self._k
        scalars["nudge/matvecs"] = float(pairs.num_matvecs)
        if count < self._k:
            consequence = "these alone are acted upon" if count else "the last good ones are kept, if there are any"
            self._recorder.warn_once(
                f"converged {bool(count)}",
                f"{count} of {self._k} eigenpairs converged at step {trainer.global_step}, and {consequence}. Ask for"
                " fewer, or raise `tol`.",
            )
        if count:
            converged = pairs.converged.to(pairs.vectors.device)
            scalars |= self._directions.turn(pairs.vectors[converged], names)
        return scalars

    def _eigenpairs(self, trainer: "pl.Trainer", operator: HessianOperator, start: Optional[Tensor]) -> Eigenpairs:
        """The eigenpairs, in every process or in none: with different ones the parameters would drift apart."""
        failure: Optional[Exception] = None
        try:
            with progress(trainer, type(self).__name__) as report:
                watched = WatchedOperator(operator, report)
                pairs = lanczos(watched, largest=self._k, tol=self._tol, start=start, seed=self._seed)
        except Exception as error:  # handed on below, once the other processes know of it
            failure = error
        reduce = sum_over_processes(trainer)
        failures = torch.tensor([float(failure is not None)], device=trainer.strategy.root_device)
        if reduce is not None:
            reduce(failures)
        if failure is not None:
            raise failure
        if failures:
            raise PeerFailureError(int(failures))
        return pairs

    def _change_gradient(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
        """Scale the gradient inside and outside of the eigenvectors' span; returns the share that was taken out."""
        layout = FlatLayout(parameters)
        gradient = layout.flatten([parameter.grad for parameter in parameters])
        decayed = _weight_decay(optimizer, layout, parameters)
        whole = gradient if decayed is None else gradient + decayed
        vectors = self._directions.at(whole)
        coefficients = vectors @ whole
        changed = whole * self._outside + (self._inside - self._outside) * (coefficients @ vectors)
        if decayed is not None:
            changed -= decayed
        changed = torch.where(coefficients.isfinite().all(), changed, gradient)
        for parameter, piece in zip(parameters, layout.split(changed), strict=True):
            if parameter.grad is not None:
                if parameter.grad.layout is not torch.strided:
                    parameter.grad = parameter.grad.to_dense()  # what is projected is not sparse any more
                parameter.grad.copy_(piece)
        total, inside = whole.square().sum(), coefficients.square().sum()
        removed = (1 - self._inside) ** 2 * inside + (1 - self._outside) ** 2 * (total - inside).clamp_min(0)
        return removed / total.clamp_min(torch.finfo(total.dtype).tiny)

    def _check_optimizer(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse an optimizer with which the change of the gradient is not that of the learning rate."""
        check_uniform_sgd(type(self).__name__, trainer.optimizers, trainable_parameters(pl_module))
        is_fused = any(group.get("fused") for group in trainer.optimizers[0].param_groups)
        if is_fused and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"`{type(self).__name__}` needs the gradients unscaled, which a fused optimizer does only in its step."
                " Use `fused=False`, or `precision='bf16-mixed'`."
            )


class _Directions:
    """The eigenvectors that are acted upon, and the parameters that they belong to."""

    def __init__(self) -> None:
        self.vectors: Optional[Tensor] = None
        self.names: list[str] = []
        self._is_restored = False

    def start(self) -> None:
        """Begin a run: without eigenvectors, except for those of the checkpoint that it goes on from."""
        if not self._is_restored:
            self.vectors, self.names = None, []
        self._is_restored = False

    def matching(self, names: list[str]) -> Optional[Tensor]:
        """The eigenvectors, if they belong to these parameters."""
        return self.vectors if self.names == names else None

    def at(self, gradient: Tensor) -> Tensor:
        """The eigenvectors on the device of the gradient."""
        assert self.vectors is not None  # by the caller
        self.vectors = self.vectors.to(gradient)
        return self.vectors

    def turn(self, vectors: Tensor, names: list[str]) -> dict[str, float]:
        """Overlap of new eigenvectors with those kept, and keep the new ones."""
        kept = self.matching(names)
        scalars: dict[str, float] = {}
        if kept is not None:
            overlap = float((vectors @ kept.to(vectors).T).square().sum())
            scalars["nudge/subspace_overlap"] = overlap / min(len(vectors), len(kept))
        self.vectors, self.names = vectors, names
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": None if self.vectors is None else self.vectors.cpu(), "names": list(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vectors, self.names = state["vectors"], list(state["names"])
        self._is_restored = True


def _weight_decay(
    optimizer: torch.optim.Optimizer, layout: FlatLayout, parameters: Sequence[Tensor]
) -> Optional[Tensor]:
    """What the optimizer will add to the gradient as weight decay, as a flat vector; None if there is none."""
    factors = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    if not any(factors.values()):
        return None
    # The optimizer passes over parameters without gradient, and does not decay them.
    return layout.flatten([None if p.grad is None else factors[id(p)] * p for p in parameters])
