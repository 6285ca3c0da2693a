"""SGD with another learning rate along the sharpest directions of the loss."""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.results.nudge import NudgeResult
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.curvature.directions.alignment import subspace_overlap
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import lanczos
from lyapunov_lightning.figures import subspace_figure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.checks import check_size
from lyapunov_lightning.training.config import HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer, log_interval
from lyapunov_lightning.training.optimizers.moves import scale_gradients
from lyapunov_lightning.training.optimizers.requirements import check_uniform_sgd, check_unscaled
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.progress import watched
from lyapunov_lightning.training.reporting.recording import Charts
from lyapunov_lightning.training.schedule import Schedule
from lyapunov_lightning.training.sharing import Step

Variant = Literal["nudge", "top_only", "no_top"]


class NudgedSGDHook(CurvatureCallback):
    """Gives SGD another learning rate along the sharpest directions of the loss: Nudged-SGD and its relatives.

    The `k` eigenvectors of the largest Hessian eigenvalues are measured on fixed training data, again before every
    epoch, and each update is changed in their span, the rows of V. Let u be the gradient that SGD takes its step from:

    - ``"nudge"``: learning rate γη along the eigenvectors, u − (1 − γ)VᵀVu. With `gamma` below 1 the training goes to
      sharper regions, and is faster early on. With `gamma` 1 the gradients are left as they are, and the run is
      bit-identical to plain SGD, with the same measurements.
    - ``"top_only"``: VᵀVu, the update follows the sharpest directions only.
    - ``"no_top"``: u − VᵀVu, the update leaves them out.

    `frozen` keeps the eigenvectors of the first measurement for the whole run, the paper's constant direction.

    **Where it acts.** In ``on_before_optimizer_step``: after the backward pass, the accumulation over batches, the mean
    over ranks and the unscaling of half precision; before gradient clipping, and before the optimizer's weight decay
    and momentum. So the order is: unscale, nudge, clip, step. Momentum then sums changed gradients. A weight decay
    w of the optimizer is part of the gradient that SGD uses, u = g + wθ, so ``.grad`` becomes P(u) − wθ, to which the
    optimizer adds wθ again; clipping sees it in this form too. In a module with manual optimization, whatever the
    module itself does to the gradients comes first.

    Parameters whose ``.grad`` is None keep it, and count as zeros. A gradient that is not finite is left alone, for
    the loss scaler to skip.

    Only eigenpairs that met `tol` are acted upon. If none did, or the measurement failed, the last good ones stay in
    use, and as long as there are none the gradient is left alone. If parameters are frozen or unfrozen during the run,
    the eigenvectors do not fit them any more, and the gradient is left alone until they are measured anew. Each of
    these cases is warned of once. What it does depends on its own measurement only, whatever other callbacks measure;
    callbacks that measure the same Hessian at the same step share the operator.

    Logged:

    - ``nudge/removed_fraction``: share of the squared norm of the gradient that was taken out,
      ``‖u − P(u)‖² / ‖u‖²``, at every ``log_every_n_steps``-th step; above 1 for `gamma` above 2.
    - At each measurement ``nudge/lambda_1`` ... ``lambda_k``, the largest first; ``nudge_details/subspace_overlap``,
      ``‖V_old V_newᵀ‖²_F / k`` with the last measurement, 1 for the same subspace.
    - In the group ``nudge_details``: ``residual``, the largest ``‖Hv − λv‖`` among them; ``converged``, the share of
      them that met `tol`; ``matvecs`` and ``seconds``, products and wall-clock time spent.

    The measurements are in ``hook.results`` too, as `NudgeResult`, and the figure ``nudge/eigenvalues`` shows them.

    It holds `k` vectors of the model's size, in float32 or wider, and so does the checkpoint; a resumed run continues
    bit by bit. A measurement takes the memory of its Krylov basis, ``max(32, 2k + 16) + 1`` vectors at most, and an
    update the memory of about four vectors.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps. Without it and `schedule` the
            eigenvectors are measured before the first step of every epoch.
        k: How many of the sharpest directions.
        gamma: Factor of the learning rate along them, for ``"nudge"``.
        schedule: Any other schedule.
        hessian: Which Hessian; by default on fixed data, 5 % of the training data as in the paper.
        variant: ``"nudge"``, ``"top_only"`` or ``"no_top"``, see above.
        frozen: Whether to measure only once, and keep the eigenvectors.
        tol: Relative residual at which an eigenpair counts as converged.
        log_prefix: Put in front of every tag.

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

    group = "nudge"
    result_class = NudgeResult

    def __init__(
        self,
        every_n_steps: int | None = None,
        k: int = 5,
        gamma: float = 0.01,
        *,
        schedule: ScheduleLike | None = None,
        hessian: HessianLike = HessianConfig(),
        variant: Variant = "nudge",
        frozen: bool = False,
        tol: float = 1e-2,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(NudgedSGDHook.__init__, locals())
        check_int("k", k, least=1)
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma < math.inf:
            raise ValueError(f"`gamma` should be a finite non-negative float, got {gamma!r}.")
        check_choice("variant", variant, Variant)
        if not isinstance(frozen, bool):
            raise ValueError(f"`frozen` should be a bool, got {frozen!r}.")
        check_positive("tol", tol)
        # No eigenpairs are asked for together with other callbacks: theirs would change ours, and so the training.
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            default=Schedule(every_n_epochs=1),
            arguments=arguments,
        )
        self._k = k
        self._variant = variant
        self._frozen = frozen
        self._tol = tol
        self._inside, self._outside = {"nudge": (gamma, 1.0), "top_only": (1.0, 0.0), "no_top": (0.0, 1.0)}[variant]
        self._directions = _Directions()

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {"k": self._k, "variant": self._variant}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._check_alone(trainer, "what two of them do to the same gradient depends on their order")
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        check_size(type(self).__name__, pl_module, self._k)
        self._check_optimizer(trainer, pl_module)
        assert self._space is not None  # since the line above
        self._directions.start(list(trainable_parameters(pl_module)), self._space.length)

    @override
    def charts(self) -> Charts:
        return {"largest eigenvalues": [r"nudge/lambda_\d+$"], "removed fraction": ["nudge/removed_fraction$"]}

    @override
    def figures(self) -> Figures:
        results: list[NudgeResult] = self.results
        eigenvalues = torch.tensor([result.eigenvalues for result in results], dtype=torch.float64)
        overlaps = [result.subspace_overlap for result in results]
        return {"eigenvalues": partial(subspace_figure, [result.step for result in results], eigenvalues, overlaps)}

    @override
    def advance(self, trainer: Trainer, batch_idx: int) -> bool:
        # The schedule is asked in any case, and first: it has to see every batch to know which steps have passed.
        is_done = self._frozen and self._directions.vectors is not None
        return super().advance(trainer, batch_idx) and not is_done

    @override
    def measure(self, hessian: LossHessian, step: Step) -> NudgeResult:
        names = list(trainable_parameters(step.pl_module))
        # Names and not lengths: where one layer was frozen and another one unfrozen, the length may be the same.
        kept = self._directions.matching(names)
        pairs = self._eigenpairs(hessian, step.trainer, start=kept)
        # A vector that has not converged is a mixture of eigenvectors, and a small learning rate along it would slow
        # the training down in flat directions too.
        count, overlap = int(pairs.converged.sum()), None
        if count:
            vectors = pairs.vectors[pairs.converged.to(pairs.vectors.device)]
            overlap = None if kept is None else subspace_overlap(kept, vectors, hessian.space)
            self._directions.turn(vectors, names)
        if count < self._k:
            consequence = "these alone are acted upon" if count else "the last good ones are kept, if there are any"
            self._recorder.warn_once(
                f"converged {bool(count)}",
                f"{count} of {self._k} eigenpairs converged at step {step.index}, and {consequence}. Ask for fewer, or"
                " raise `tol`, unless a second warning says that the products are at fault.",
            )
        return NudgeResult(
            step=step.index,
            epoch=step.epoch,
            eigenvalues=tuple(pairs.values.tolist()),
            residual=float(pairs.residuals.max()),
            num_converged=count,
            matvecs=pairs.num_matvecs,
            subspace_overlap=overlap,
        )

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._check_optimizer(trainer, pl_module)  # again, since parameter groups may change during a run
        if self._directions.vectors is None:
            return
        named = trainable_parameters(pl_module)
        if self._directions.matching(list(named)) is None:
            self._recorder.warn_once(
                "other parameters",
                "the trainable parameters are not those whose eigenvectors were measured, so the gradient is left alone"
                f" {'from now on' if self._frozen else 'until the next measurement'}.",
            )
            return
        removed: float | Tensor = 0.0
        # With both factors 1 the projection would give the same gradient but for its last digits, and another run.
        if not self._inside == self._outside == 1:
            parameters = list(named.values())
            vectors = self._directions.on(parameters[0].device)
            assert self._space is not None  # since the start of the training
            removed = scale_gradients(
                optimizer, parameters, vectors, self._space, inside=self._inside, outside=self._outside
            )
        # At the logger's interval and not at every step: reading the number waits until the GPU has finished.
        every = log_interval(trainer)
        if every and trainer.global_step % every == 0 and math.isfinite(removed):
            self._recorder.log(trainer, {"nudge/removed_fraction": float(removed)})

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {**super()._stateful(), "directions": self._directions}

    def _eigenpairs(self, hessian: LossHessian, trainer: Trainer, start: Tensor | None) -> Eigenpairs:
        """The eigenpairs, on every rank or on none: with different ones the parameters would drift apart."""
        with failing_together(trainer), watched(hessian, trainer, type(self).__name__) as operator:
            # A start without a component along an eigenvector never finds it, however long the search. With another
            # seed at each step, what one search overlooks the next one sees.
            seed = self.config.seed + trainer.global_step
            return lanczos(operator, largest=self._k, tol=self._tol, start=start, seed=seed)

    def _check_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an optimizer for which changing the gradient is not the same as changing the learning rate."""
        check_uniform_sgd(type(self).__name__, trainer.optimizers, trainable_parameters(pl_module))
        check_unscaled(type(self).__name__, trainer)


class _Directions:
    """The eigenvectors that are acted upon, and the parameters that they belong to."""

    def __init__(self) -> None:
        self.vectors: Tensor | None = None
        self._names: list[str] = []
        self._is_restored = False

    def start(self, names: list[str], length: int) -> None:
        """Begin a run: without eigenvectors, unless they come whole from the checkpoint that it resumes."""
        kept = self.matching(names)
        is_broken = kept is not None and (kept.ndim != 2 or kept.shape[-1] != length)
        if is_broken or not self._is_restored:
            self.vectors, self._names = None, []
        self._is_restored = False

    def matching(self, names: list[str]) -> Tensor | None:
        """The eigenvectors, if they belong to these parameters; else None."""
        return self.vectors if self._names == names else None

    def on(self, device: torch.device) -> Tensor:
        """The eigenvectors, moved to this device once: those of a checkpoint are on the CPU."""
        assert self.vectors is not None  # by the caller
        self.vectors = self.vectors.to(device)
        return self.vectors

    def turn(self, vectors: Tensor, names: list[str]) -> None:
        """Replace the eigenvectors."""
        self.vectors, self._names = vectors, names

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": None if self.vectors is None else self.vectors.cpu(), "names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vectors, self._names = state["vectors"], list(state["names"])
        self._is_restored = True
