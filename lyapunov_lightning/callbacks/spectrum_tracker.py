"""The spectrum of the training loss's Hessian over the training."""

from functools import partial
from typing import Any, Literal

import torch
from typing_extensions import override

from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive, made_of
from lyapunov_lightning.curvature.directions.alignment import gradient_alignment
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lyapunov import LyapunovSpectrum, LyapunovSpectrumEstimate
from lyapunov_lightning.curvature.stochastic.density import SpectralDensity, spectral_density
from lyapunov_lightning.curvature.stochastic.trace import stochastic_moments
from lyapunov_lightning.curvature.tracking.blocks import BlockTrackers, check_groups, parameter_blocks
from lyapunov_lightning.curvature.tracking.subspace import KeptSubspace
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.figures import alignment_figure, blocks_figure, density_figure, eigenvalues_figure
from lyapunov_lightning.figures.style import MOST_NAMES
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.checks import check_size
from lyapunov_lightning.training.config import HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.lightning_names import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    optimizers_of,
)
from lyapunov_lightning.training.optimizers.requirements import check_training_map
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.eigenvectors import EigenvectorFiles, check_safetensors
from lyapunov_lightning.training.reporting.progress import watched
from lyapunov_lightning.training.reporting.recording import Charts
from lyapunov_lightning.training.schedule import Schedule, ScheduleState
from lyapunov_lightning.training.sharing import EigenRequest, Step

Estimator = Literal["lanczos", "benettin"]

_GRADIENT_BATCHES = 10
"""The number of mini-batches of the data over which the gradient's alignment is averaged."""


class SpectrumTracker(CurvatureCallback):
    r"""Logs the ends of the Hessian's spectrum, and what else is asked for, while a module trains.

    At every step of the schedule the `largest` and `smallest` eigenvalues and their eigenvectors are computed on fixed
    training data, both ends from one Krylov space. They are then related to the training: how far the mini-batch
    gradients lie along the sharpest directions, and how far these have turned since the last measurement. The run is
    bit-identical to one without the tracker. Callbacks of this package that ask for the same Hessian at the same step
    share one computation.

    Logged:

    - ``spectrum/lambda_1`` ... ``lambda_k``, the largest first; ``spectrum/lambda_min_1`` ..., the smallest first.
    - ``spectrum/gradient_in_top_subspace``: the share of the mini-batch gradients in the span of the upper end's
      eigenvectors; ``spectrum/subspace_overlap``: the overlap of that span with the one of the last measurement.
    - ``spectrum/trace`` and ``spectrum/frobenius_norm`` of the whole Hessian, estimated, if `random_vectors`.
    - ``spectrum/lambda_max_{group}`` for each of `groups`: the largest eigenvalue of that diagonal block. Of more than
      six layers they are in the figure ``spectrum/blocks`` and in the table, and not curves.

    and in the group ``spectrum_details``, each explained at `TrackedSpectrum`:

    - ``residual``, ``converged``, ``matvecs``, ``block_converged``, ``block_matvecs`` and ``seconds``: accuracy and
      cost.
    - ``trace_{group}``: the trace of that diagonal block, estimated, if `random_vectors`.
    - ``gradient_cosine_1`` ... (``gradient_cosine_min_1`` ... for the lower end), ``gradient_in_random_subspace``,
      ``subspace_overlap_first``, ``tracked_norm``, ``negative_mass``, ``trace_error``, ``frobenius_norm_error``.
    - ``lyapunov_exponent_1`` ... and ``paper_lambda_1`` ... (``..._min_1`` ...), and ``from_other_end``, for
      ``estimator="benettin"``.

    The figures ``spectrum/eigenvalues``, ``spectrum/density``, ``spectrum/gradient_alignment`` and ``spectrum/blocks``,
    a map of the blocks over the training, go to all loggers that take figures (TensorBoard, Weights & Biases, MLflow,
    Comet), and to files in the log folder if none does: at the end of the training, and at the end of epochs in which
    something was measured, as long as drawing takes little time. In TensorBoard the tab "Custom scalars" has all
    eigenvalues on one chart. All results are in ``tracker.results`` as `TrackedSpectrum`, and the last density is
    ``tracker.density``.

    The Krylov basis takes the memory of ``max_basis_vectors + 1`` vectors of the model's size.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps. Without it and `schedule` the
            tracker follows the trainer's ``log_every_n_steps``.
        largest: How many eigenvalues of the upper end.
        smallest: How many of the lower end.
        schedule: Any other schedule. The papers measure every step early on and every epoch later:
            ``Schedule(first_n_steps=100, every_n_epochs=1)``.
        hessian: Which Hessian; by default that of the same 5 % of the training data throughout.
        estimator: ``"lanczos"``, or ``"benettin"``: perturbations that are evolved and orthogonalised along the real
            training, with one iteration at every step on its batch. The schedule then only says when to log. The
            largest end follows gradient ascent, the smallest the map of plain SGD. The perturbation that grows fastest
            comes first, so a negative eigenvalue far beyond the positive ones takes a place among the largest, and is
            counted in ``from_other_end``. It converges no faster than power iteration: look at the residuals.
        tol: Relative residual at which an eigenvalue counts as converged.
        random_vectors: Random vectors for estimates over the whole spectrum (trace and Frobenius norm), with one
            product each; 0 for no estimates, else at least 2.
        density_steps: Products for each random vector for the spectral density; 0 for no density. 40 show the shape of
            the bulk.
        groups: Blocks of parameters to measure on their own: ``"layers"`` for each module that has parameters of its
            own, such as weight and bias; ``"modules"`` for each top-level submodule, a number for each submodule at
            that depth; or names with a pattern of parameter names each, such as ``{"head": "network.head.*"}``. Each
            takes a search of its own, with products that are derivatives with respect to the block alone; with
            `random_vectors` their traces come out of the products for the whole trace. A weight that several modules
            share belongs to the first of them.
        max_basis_vectors: Bound on the Krylov basis, as for `lanczos`.
        save_dir: Where to write ``spectrum.csv``, a table of all that is logged, if given.
        save_vectors: Whether to write the eigenvectors there too, one safetensors file a measurement.
        log_prefix: Put in front of every tag, so that several trackers live side by side.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the module or the strategy cannot be measured, or a group matches no parameter.
        ModuleNotFoundError: If `save_vectors` is asked for and the package safetensors is not installed.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import Schedule, SpectrumTracker
        >>> tracker = SpectrumTracker(largest=10, smallest=3, schedule=Schedule(first_n_steps=50, every_n_epochs=1))
        >>> trainer = Trainer(callbacks=[tracker], max_epochs=1, logger=False)

    Reference:
        "On the relation between the sharpest directions of DNN loss and the SGD step length", secs. 2 and 3;
        "Negative eigenvalues of the Hessian in deep neural networks", fig. 1; "A chaos theory approach to understand
        neural network optimization", appendix C.

    """

    group = "spectrum"
    result_class = TrackedSpectrum

    def __init__(
        self,
        every_n_steps: int | None = None,
        largest: int = 4,
        smallest: int = 0,
        *,
        schedule: ScheduleLike | None = None,
        hessian: HessianLike = HessianConfig(),
        estimator: Estimator = "lanczos",
        tol: float = 1e-3,
        random_vectors: int = 0,
        density_steps: int = 0,
        groups: Literal["modules", "layers"] | int | dict[str, str] | None = None,
        max_basis_vectors: int | None = None,
        save_dir: str | None = None,
        save_vectors: bool = False,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(SpectrumTracker.__init__, locals())
        counts = {"largest": largest, "smallest": smallest, "random_vectors": random_vectors}
        for name, value in {**counts, "density_steps": density_steps}.items():
            check_int(name, value, least=0)
        if largest + smallest == 0:
            raise ValueError("`largest` and `smallest` should not both be 0.")
        if random_vectors == 1 or (density_steps and not random_vectors):
            raise ValueError(
                "`random_vectors` should be 0 or at least 2, and not 0 where `density_steps` are asked for, got"
                f" {random_vectors}."
            )
        check_choice("estimator", estimator, Estimator)
        check_positive("tol", tol)
        check_groups(groups)
        if max_basis_vectors is not None and max_basis_vectors < largest + smallest + 2:
            raise ValueError(
                f"`max_basis_vectors` should be at least `largest + smallest + 2` = {largest + smallest + 2},"
                f" got {max_basis_vectors!r}."
            )
        if save_vectors and save_dir is None:
            raise ValueError("`save_vectors` needs `save_dir`, the folder to write to, got None.")
        if save_vectors:
            check_safetensors(type(self).__name__)
        self._along_training = estimator == "benettin"
        if schedule is not None:
            schedule = made_of(Schedule, "schedule", schedule)
        hessian = made_of(HessianConfig, "hessian", hessian)
        if self._along_training and schedule is not None and schedule.max_overhead is not None:
            raise ValueError(
                "`schedule` should have no `max_overhead` with `estimator='benettin'`, which measures at every step,"
                f" got {schedule.max_overhead!r}."
            )
        estimates: dict[str, Any] = {"random_vectors": random_vectors, "density_steps": density_steps}
        for name, value in {**estimates, "groups": groups, "save_vectors": save_vectors}.items():
            if self._along_training and value:
                raise ValueError(
                    f"`{name}` should be left out with `estimator='benettin'`, which measures exponents and nothing"
                    f" else, got {value!r}."
                )
        # Perturbations evolve under the training's own map, which is another one for each batch (chaos-theory paper,
        # appendix C).
        if self._along_training and hessian.data not in (None, "batch"):
            of = "`data='fixed'`" if hessian.data == "fixed" else "data of its own"
            raise ValueError(f"`hessian` should not have {of} with `estimator='benettin'`, which follows the steps.")
        for name in ("num_batches", "fraction"):
            if self._along_training and getattr(hessian, name) is not None:
                raise ValueError(
                    f"`hessian` should not have `{name}` with `estimator='benettin'`, which follows the steps, each on"
                    " its own batch."
                )
        self._vectors = EigenvectorFiles(save_dir) if save_dir is not None and save_vectors else None
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            data="batch" if self._along_training else "fixed",
            method="finite_difference" if self._along_training else None,
            request=None if self._along_training else EigenRequest(largest, smallest, tol, max_basis_vectors),
            save_dir=save_dir,
            files=[] if self._vectors is None else [self._vectors],
            arguments=arguments,
        )
        seed = self.config.seed
        self._estimator = estimator
        self._largest, self._smallest = largest, smallest
        self._tol = tol
        self._random_vectors, self._density_steps = random_vectors, density_steps
        self._groups = groups
        self._ascent = LyapunovSpectrum(largest, map="ascent", seed=seed) if largest else None
        self._training = LyapunovSpectrum(smallest, map="sgd", seed=seed) if smallest else None
        self._every_step = ScheduleState(Schedule(every_n_steps=1))
        self._is_logged = True  # with "benettin" there is an iteration at every step, and a result at some
        self._last, self._first = KeptSubspace(), KeptSubspace(moves_on=False)
        self._blocks = BlockTrackers(tol, seed)
        self.density: SpectralDensity | None = None

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {"estimator": self._estimator, "largest": self._largest, "smallest": self._smallest}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        owner = type(self).__name__
        self._every_step.start()
        if self._along_training:
            check_size(owner, pl_module, self._largest + self._smallest)
            if self._training is not None:
                check_training_map(owner, trainer.optimizers, momentum=False)
        names = trainable_parameters(pl_module)
        # At the start, when the names of the parameters are known: a misspelt pattern would else be missing in the log
        # without a word.
        for block, members in parameter_blocks(names, self._groups).items():
            if not members:
                raise MisconfigurationException(
                    f"`{owner}`: the group {block!r} matches no trainable parameter of {type(pl_module).__name__}. Its"
                    f" parameters are {', '.join(names)}."
                )

    @override
    def charts(self) -> Charts:
        return {
            "largest eigenvalues": [r"spectrum/lambda_\d+$"],
            "smallest eigenvalues": [r"spectrum/lambda_min_\d+$"],
            "gradient alignment": [r"spectrum_details/gradient_cosine_\d+$"],
        }

    @override
    def figures(self) -> Figures:
        results, last = self.results, self.results[-1]
        steps = [result.step for result in results]
        largest, smallest, cosines = (
            torch.tensor([getattr(result, name) for result in results], dtype=torch.float64)
            for name in ("largest", "smallest", "cosines_largest")
        )
        figures: Figures = {"eigenvalues": partial(eigenvalues_figure, steps, largest, smallest)}
        if last.gradient_in_top_subspace is not None:
            inside = [result.gradient_in_top_subspace for result in results]
            baseline = last.gradient_in_random_subspace
            figures["gradient_alignment"] = partial(alignment_figure, steps, cosines, inside, baseline)
        if last.lambda_max_of:
            names = ("lambda_max_of", "trace_of", "trace_error_of")
            of_blocks = [[getattr(result, name) for result in results] for name in names]
            figures["blocks"] = partial(blocks_figure, steps, *of_blocks)
        if self.density is not None:
            # Those that enter the density exactly; all others in it are estimated.
            known = torch.cat([largest[-1], smallest[-1]])
            figures["density"] = partial(
                density_figure,
                *self.density.curve(),
                known,
                title=f"Spectral density of the Hessian at step {last.step}",
            )
        return figures

    @override
    def advance(self, trainer: Trainer, batch_idx: int) -> bool:
        is_due = super().advance(trainer, batch_idx)
        if not self._along_training:
            return is_due
        self._is_logged = is_due
        # In this order, since each schedule has to see every batch.
        return self._every_step.advance(trainer, batch_idx) or is_due

    @override
    def measure(self, hessian: LossHessian, step: Step) -> TrackedSpectrum | None:
        if self._along_training:
            result = self._exponents(hessian, step)
            return result if self._is_logged else None
        pairs = self.shared.eigenpairs(step, self)
        top = pairs.vectors[: pairs.num_largest]
        if self._vectors is not None:
            self._save(self._vectors, step, pairs, hessian.space)
        # Of mini-batches and not of the whole gradient, since a mini-batch's is what SGD steps along.
        alignment = gradient_alignment(hessian, pairs, _GRADIENT_BATCHES)
        estimates = {"matvecs": pairs.num_matvecs, "negative_mass": pairs.negative_mass}
        return TrackedSpectrum(
            step=step.index,
            epoch=step.epoch,
            largest=tuple(pairs.largest.tolist()),
            smallest=tuple(pairs.smallest.tolist()),
            residual=float(pairs.residuals.max()),
            converged=float(pairs.converged.double().mean()),
            cosines_largest=alignment.largest,
            cosines_smallest=alignment.smallest,
            gradient_in_top_subspace=alignment.in_top_subspace,
            gradient_in_random_subspace=alignment.in_random_subspace,
            subspace_overlap=self._last.compare(top, hessian.space),
            subspace_overlap_first=self._first.compare(top, hessian.space),
            **self._block_sharpness(step),
            **(estimates | self._estimates(hessian, step, pairs)),
            has_block_curves=self._has_block_curves(step),
        )

    @override
    def _stateful(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful | None] = {"last": self._last, "first": self._first, "blocks": self._blocks}
        if self._along_training:
            parts = {"ascent": self._ascent, "training": self._training, "every_step": self._every_step}
        return {**super()._stateful(), **{name: part for name, part in parts.items() if part is not None}}

    def _save(self, files: EigenvectorFiles, step: Step, pairs: Eigenpairs, space: VectorSpace) -> None:
        # On all ranks: of a sharded model `whole` gathers, although the first rank alone writes.
        vectors = torch.stack([space.whole(row).cpu() for row in pairs.vectors])
        metadata = {"num_largest": str(pairs.num_largest)}
        self._recorder.write(step.trainer, partial(files.add, step.index, pairs.values, vectors, metadata))

    def _block_sharpness(self, step: Step) -> dict[str, Any]:
        """The largest eigenvalue of each diagonal block: a Hessian with respect to the block's parameters only."""
        found: dict[str, Eigenpairs] = {}
        for name, members in self._parameter_blocks(step).items():
            # An operator of its own: a diagonal block has derivatives with respect to its parameters only, and so costs
            # less than a product of the whole Hessian of which most is thrown away.
            block = self.shared.block(step, self.config, members) if members else None
            if block is not None:
                with watched(block, step.trainer, f"{type(self).__name__} {name}") as operator:
                    found[name] = self._blocks.measure(name, operator)
        if not found:
            return {}
        return {
            "lambda_max_of": {name: float(pairs.largest) for name, pairs in found.items()},
            "lambda_max_error_of": {name: float(pairs.value_errors[0]) for name, pairs in found.items()},
            "block_converged": sum(bool(pairs.converged.all()) for pairs in found.values()) / len(found),
            "block_matvecs": sum(pairs.num_matvecs for pairs in found.values()),
        }

    def _parameter_blocks(self, step: Step) -> dict[str, list[str]]:
        return parameter_blocks(trainable_parameters(step.pl_module), self._groups)

    def _has_block_curves(self, step: Step) -> bool:
        """Whether each block is a curve: those that the user has named are, and a few layers."""
        is_named = self._groups == "modules" or isinstance(self._groups, dict)
        return is_named or len(self._parameter_blocks(step)) <= MOST_NAMES

    def _estimates(self, hessian: LossHessian, step: Step, pairs: Eigenpairs) -> dict[str, Any]:
        """Estimates over the whole spectrum. The eigenpairs enter exactly, and only the rest is estimated."""
        if not self._random_vectors:
            return {}
        # With the same random vectors at every step the noise of the estimates is the same too, and their changes are
        # those of the Hessian.
        options: dict[str, Any] = {"num_probes": self._random_vectors, "known": pairs, "seed": self.config.seed}
        places = dict(zip(trainable_parameters(step.pl_module), hessian.layout.slices(), strict=True))
        blocks = {block: [places[name] for name in members] for block, members in self._parameter_blocks(step).items()}
        with watched(hessian, step.trainer, type(self).__name__) as operator:
            moments = stochastic_moments(operator, blocks=blocks, **options)
            if self._density_steps:
                self.density = spectral_density(operator, num_steps=self._density_steps, **options)
        estimates: dict[str, Any] = {
            "matvecs": pairs.num_matvecs + moments.num_matvecs,
            "trace": moments.trace.value,
            "trace_error": moments.trace.standard_error,
            "frobenius_norm": moments.frobenius_norm.value,
            "frobenius_norm_error": moments.frobenius_norm.standard_error,
            "trace_of": {block: trace.value for block, trace in moments.trace_of.items()},
            "trace_error_of": {block: trace.standard_error for block, trace in moments.trace_of.items()},
        }
        if self.density is not None:
            estimates["matvecs"] += self.density.num_matvecs
            estimates["negative_mass"] = self.density.negative_mass()  # of all eigenvalues, and not of the tracked ones
        return estimates

    def _exponents(self, hessian: LossHessian, step: Step) -> TrackedSpectrum:
        """One iteration of the perturbations of both ends."""
        # One learning rate for all parameters: `check_training_map` has refused everything else.
        optimizers = optimizers_of(step.trainer)
        lr = float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
        here = hessian.gradient()
        fields: dict[str, Any] = {}
        estimates: list[LyapunovSpectrumEstimate] = []
        from_other_end = 0
        for end, spectrum in (("largest", self._ascent), ("smallest", self._training)):
            if spectrum is not None:
                estimate = spectrum.step(hessian.gradient, here, lr=lr, space=hessian.space)
                estimates.append(estimate)
                from_other_end += sum(found != end for found in estimate.ends)
                fields[end] = tuple(estimate.eigenvalues.tolist())
                fields[f"exponents_{end}"] = tuple(estimate.exponents.tolist())
                fields[f"paper_{end}"] = tuple(estimate.paper_eigenvalues.tolist())
        return TrackedSpectrum(
            step=step.index,
            epoch=step.epoch,
            residual=max(float(estimate.residuals.max()) for estimate in estimates),
            converged=float(torch.cat([estimate.converged(self._tol) for estimate in estimates]).double().mean()),
            from_other_end=from_other_end,
            matvecs=sum(estimate.num_gradients for estimate in estimates),
            **fields,
        )
