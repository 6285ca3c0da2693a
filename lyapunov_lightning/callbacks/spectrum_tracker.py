"""The spectrum of the training loss's Hessian over the training."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.callbacks.base import CurvatureCallback, Stateful
from lyapunov_lightning.curvature.density import SpectralDensity, spectral_density, stochastic_moments
from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.lyapunov import LyapunovSpectrum
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.curvature.tracking import ExtremeTracker
from lyapunov_lightning.figures import alignment_figure, density_figure, eigenvalues_figure
from lyapunov_lightning.training.batches import Data, ProbeData
from lyapunov_lightning.training.objective import trainable_parameters
from lyapunov_lightning.training.optimizers import check_training_map
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.recording import WatchedOperator, progress
from lyapunov_lightning.training.sandbox import Mode
from lyapunov_lightning.training.schedule import Schedule, Timetable
from lyapunov_lightning.training.series import SeriesFile, check_safetensors, save_vectors
from lyapunov_lightning.training.sharing import EigenRequest, Measurement, Subscription

Estimator = Literal["lanczos", "benettin"]


class SpectrumTracker(CurvatureCallback):
    r"""Logs the ends of the Hessian's spectrum, and what else is asked for, while a module trains.

    At every step of the schedule the `largest` and `smallest` eigenvalues with their vectors are computed on fixed
    training data, both ends from one Krylov space, and set in relation to the training: how far the mini-batch
    gradients lie in the sharpest directions, and how far these turned since the last measurement. The run is
    bit-identical to one without the tracker. Callbacks of this package that ask for the same Hessian at the same step
    share one computation.

    Logged:

    - ``spectrum/lambda_1`` ... ``lambda_k``, the largest first; ``spectrum/lambda_min_1`` ..., the smallest first.
    - ``spectrum/residual``: the largest residual ``‖Hv − λv‖`` among them; ``spectrum/converged``: the share of them
      that met `tol`.
    - ``spectrum/frobenius_norm``: of the tracked eigenvalues, as in the sharpest-directions paper.
    - ``spectrum/negative_mass``: share of the negative ones in the sum of the moduli of the tracked eigenvalues, or of
      all eigenvalues where the density is measured.
    - ``spectrum/gradient_cosine_1`` ... ``k``: absolute cosine of the mini-batch gradients with the eigenvectors of the
      upper end (``gradient_cosine_min_1`` ... for the lower), averaged over `gradient_batches`.
    - ``spectrum/gradient_in_top_subspace``: share of the gradients' squared norm inside the span of the upper end's
      eigenvectors; ``spectrum/gradient_in_random_subspace`` is what a random vector would have there.
    - ``spectrum/subspace_overlap`` and ``subspace_overlap_first``: ``‖V_old V_newᵀ‖²_F / k`` with the last and with the
      first measurement's upper end; 1 for the same subspace.
    - ``spectrum/trace``, ``trace_error``, ``frobenius_norm_estimate``, ``frobenius_norm_error`` if `random_vectors`:
      stochastic estimates over the whole spectrum with their standard errors.
    - ``spectrum/lambda_max_{group}`` for each of `groups`: the largest eigenvalue of that diagonal block.
    - ``spectrum/lyapunov_exponent_1`` ... and ``spectrum/paper_lambda_1`` ... (``..._min_1`` ...) for
      ``estimator="benettin"``.
    - ``spectrum/matvecs`` and ``spectrum/seconds``: products and wall-clock time spent.

    At the end of every epoch in which something was measured the loggers that can show figures (TensorBoard, Weights &
    Biases) get ``spectrum/eigenvalues``, ``spectrum/density`` and ``spectrum/gradient_alignment``; in TensorBoard the
    tab "Custom scalars" has all eigenvalues on one chart.

    The Krylov basis takes the memory of ``max_basis_vectors + 1`` vectors of the model's size.

    Args:
        largest: How many eigenvalues of the upper end.
        smallest: How many of the lower end.
        schedule: When to measure; before the first step of every epoch if not given. The papers measure every step
            early on and every epoch later: ``Schedule(first_n_steps=100, every_n_epochs=1)``.
        data: ``"fixed"`` for the same samples of the training set throughout, ``"batch"`` for the step's own batch.
        num_batches: Size of the fixed data in batches for each process.
        fraction: Size of the fixed data as a share of the training set, if `num_batches` is not given; 5 % as in the
            papers.
        estimator: ``"lanczos"``, or ``"benettin"``: perturbations that are evolved and orthogonalised along the real
            training steps, one iteration at every step on its batch whatever the schedule, which then only says when
            to log. The largest end follows gradient ascent, the smallest the map of plain SGD. What grows fastest
            comes first, so a negative eigenvalue far beyond the positive ones takes a place among the largest.
        method: How products are computed, as for `CurvatureProbe`.
        tol: Relative residual at which an eigenvalue counts as converged.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
        gradient_batches: Over how many mini-batches of the data the gradient's alignment is averaged; 0 for none.
        random_vectors: Random vectors for estimates over the whole spectrum, trace and Frobenius norm, at one product
            each; 0 for none, else at least 2.
        density_steps: Products for each random vector, if the spectral density is wanted too; 0 if not. 40 show the
            shape of the bulk.
        groups: Blocks of parameters to measure on their own: ``"modules"`` for each top-level submodule, or names with
            a pattern of parameter names each, such as ``{"head": "network.head.*"}``.
        max_basis_vectors: Bound on the Krylov basis, as for `lanczos`.
        delta_q: Length of the perturbations of ``"benettin"``, in parameter space.
        save_dir: Where to write ``spectrum.csv``, a table of all that is logged, if given.
        save_vectors: Whether to write the eigenvectors there too, one safetensors file a measurement.
        log_prefix: Put in front of every tag, so that several trackers live side by side.
        seed: Seed of everything random in the measurement.

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

    def __init__(
        self,
        largest: int = 10,
        smallest: int = 0,
        schedule: Optional[Schedule] = None,
        data: Data = "fixed",
        *,
        num_batches: Optional[int] = None,
        fraction: float = 0.05,
        estimator: Estimator = "lanczos",
        method: Method = "auto",
        tol: float = 1e-3,
        mode: Mode = "train",
        loss_fn: Optional[Callable[[pl.LightningModule, Any], Any]] = None,
        gradient_batches: int = 10,
        random_vectors: int = 0,
        density_steps: int = 0,
        groups: Optional[Union[Literal["modules"], dict[str, str]]] = None,
        max_basis_vectors: Optional[int] = None,
        delta_q: float = 5e-2,
        save_dir: Optional[str] = None,
        save_vectors: bool = False,
        log_prefix: Optional[str] = None,
        seed: int = 0,
    ) -> None:
        owner = type(self).__name__
        counts = {
            "largest": largest,
            "smallest": smallest,
            "gradient_batches": gradient_batches,
            "random_vectors": random_vectors,
            "density_steps": density_steps,
        }
        for name, value in counts.items():
            check_int(name, value, least=0)
        if largest + smallest == 0:
            raise ValueError("`largest` and `smallest` should not both be 0.")
        if random_vectors == 1 or (density_steps and not random_vectors):
            raise ValueError(
                "`random_vectors` should be 0 or at least 2, and not 0 where `density_steps` are asked for, got"
                f" {random_vectors}."
            )
        check_choice("estimator", estimator, Estimator)
        check_choice("method", method, Method)
        check_positive("tol", tol)
        if groups is not None and groups != "modules" and not isinstance(groups, dict):
            raise ValueError(f"`groups` should be 'modules' or a dict of names and patterns, got {groups!r}.")
        if max_basis_vectors is not None and max_basis_vectors < largest + smallest + 2:
            raise ValueError(
                f"`max_basis_vectors` should be at least `largest + smallest + 2` = {largest + smallest + 2},"
                f" got {max_basis_vectors}."
            )
        if save_vectors and save_dir is None:
            raise ValueError("`save_vectors` needs `save_dir`, the folder to write to, got None.")
        if save_vectors:
            check_safetensors(owner)
        along_training = estimator == "benettin"
        problem = CurvatureProblem(
            owner,
            ProbeData("batch" if along_training else data, num_batches=num_batches, fraction=fraction, seed=seed),
            mode=mode,
            method="finite_difference" if along_training else method,
            loss_fn=loss_fn,
        )
        request = EigenRequest(largest, smallest, tol, seed, max_basis_vectors)
        timetable = Timetable(schedule if schedule is not None else Schedule(every_n_epochs=1))
        super().__init__(
            Subscription(problem, timetable, None if along_training else request),
            log_prefix,
            None if save_dir is None else SeriesFile(Path(save_dir) / "spectrum.csv"),
        )
        self._estimator = estimator
        self._largest, self._smallest = largest, smallest
        self._tol, self._seed = tol, seed
        self._gradient_batches = gradient_batches
        self._random_vectors, self._density_steps = random_vectors, density_steps
        self._groups = groups
        self._save_dir = None if save_dir is None else Path(save_dir)
        self._save_vectors = save_vectors
        self._ascent = LyapunovSpectrum(largest, map="ascent", delta_q=delta_q, seed=seed) if largest else None
        self._descent = LyapunovSpectrum(smallest, map="sgd", delta_q=delta_q, seed=seed) if smallest else None
        self._every_step = Timetable(Schedule(every_n_steps=1))
        self._blocks = _BlockTrackers(tol, seed)
        self._subspace = _Subspace()
        self._history = _History()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            estimator=self._estimator, largest=self._largest, smallest=self._smallest, log_prefix=self._log_prefix
        )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        self._every_step.start()
        self._check_size(pl_module, self._largest + self._smallest)
        if self._estimator == "benettin" and self._descent is not None:
            check_training_map(type(self).__name__, trainer.optimizers, momentum=False)
        self._check_groups(pl_module)

    @override
    def charts(self) -> dict[str, dict[str, list[str]]]:
        charts = {
            "largest eigenvalues": [r"spectrum/lambda_\d+$"],
            "smallest eigenvalues": [r"spectrum/lambda_min_\d+$"],
            "gradient alignment": [r"spectrum/gradient_cosine_\d+$"],
        }
        return {"spectrum": {name: self._recorder.patterns(tags) for name, tags in charts.items()}}

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.subscription.problem.observe(trainer, batch, batch_idx)
        is_due = self.subscription.timetable.is_due(trainer, batch_idx)
        evolves = self._estimator == "benettin" and self._every_step.is_due(trainer, batch_idx)
        if not (is_due or evolves):
            return
        with self._recorder.measurement(trainer, "spectrum") as scalars:
            measurement = self.subscription.take(trainer, pl_module, batch, batch_idx)
            if measurement is None:
                return
            if self._estimator == "benettin":
                measured = self._exponents(trainer, measurement.operator)
                scalars.update(measured if is_due else {})
            else:
                scalars.update(self._spectrum(trainer, measurement))
                scalars.update(self._block_sharpness(trainer, pl_module, batch, batch_idx))
        self.subscription.timetable.record(scalars.get("spectrum/seconds", 0.0))

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for name, figure in self._history.new_figures().items():
            self._recorder.figure(trainer, f"spectrum/{name}", figure)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        parts: dict[str, Optional[Stateful]] = {
            "timetable": self.subscription.timetable,
            "history": self._history,
            "subspace": self._subspace,
            "blocks": self._blocks,
        }
        if self._estimator == "benettin":
            parts.update(ascent=self._ascent, descent=self._descent, every_step=self._every_step)
        return {name: part for name, part in parts.items() if part is not None}

    def _spectrum(self, trainer: "pl.Trainer", measurement: Measurement) -> dict[str, float]:
        """All scalars of the Hessian as a whole."""
        request = self.subscription.request
        assert request is not None
        pairs = measurement.eigenpairs(request, type(self).__name__)
        scalars = {f"spectrum/lambda_{i}": float(value) for i, value in enumerate(pairs.largest, 1)}
        scalars |= {f"spectrum/lambda_min_{i}": float(value) for i, value in enumerate(pairs.smallest, 1)}
        scalars["spectrum/residual"] = float(pairs.residuals.max())
        scalars["spectrum/converged"] = float(pairs.converged.double().mean())
        scalars["spectrum/frobenius_norm"] = float(pairs.values.norm())
        scalars["spectrum/negative_mass"] = pairs.negative_mass
        scalars |= self._alignment(measurement.operator, pairs)
        if pairs.num_largest:
            scalars |= self._subspace.turn(pairs.vectors[: pairs.num_largest])
        matvecs, density = pairs.num_matvecs, None
        if self._random_vectors:
            with progress(trainer, type(self).__name__) as report:
                watched = WatchedOperator(measurement.operator, report)
                estimates, density, spent = self._stochastic(watched, pairs)
            scalars |= estimates
            matvecs += spent
        scalars["spectrum/matvecs"] = float(matvecs)
        self._history.add(trainer.global_step, pairs, scalars, measurement.operator.size, density)
        if self._save_dir is not None and self._save_vectors and trainer.is_global_zero:
            path = self._save_dir / f"eigenvectors-step{trainer.global_step:08d}.safetensors"
            save_vectors(path, pairs.values, pairs.vectors, {"num_largest": str(pairs.num_largest)})
        return scalars

    def _alignment(self, operator: HessianOperator, pairs: Eigenpairs) -> dict[str, float]:
        """How far the mini-batch gradients lie along the eigenvectors."""
        if not self._gradient_batches:
            return {}
        vectors, count = pairs.vectors, pairs.num_largest

        def statistic(gradient: Tensor) -> Tensor:
            norm = torch.linalg.vector_norm(gradient)
            cosines = (vectors @ gradient) / norm if norm > 0 else torch.zeros_like(vectors[:, 0])
            return torch.cat([cosines.abs(), cosines[:count].square().sum().reshape(1)])

        size = len(vectors) + 1
        *cosines, inside = operator.mean_over_batches(statistic, size, self._gradient_batches).tolist()
        scalars = {f"spectrum/gradient_cosine_{i}": cosine for i, cosine in enumerate(cosines[:count], 1)}
        scalars |= {f"spectrum/gradient_cosine_min_{i}": cosine for i, cosine in enumerate(cosines[count:], 1)}
        if count:
            scalars["spectrum/gradient_in_top_subspace"] = inside
            scalars["spectrum/gradient_in_random_subspace"] = count / operator.size
        return scalars

    def _stochastic(
        self, operator: LinearOperator, pairs: Eigenpairs
    ) -> tuple[dict[str, float], Optional[SpectralDensity], int]:
        """Estimates over the whole spectrum, in which the eigenpairs enter exactly."""
        moments = stochastic_moments(operator, num_probes=self._random_vectors, known=pairs, seed=self._seed)
        scalars = {
            "spectrum/trace": moments.trace.value,
            "spectrum/trace_error": moments.trace.standard_error,
            "spectrum/frobenius_norm_estimate": moments.frobenius_norm.value,
            "spectrum/frobenius_norm_error": moments.frobenius_norm.standard_error,
        }
        if not self._density_steps:
            return scalars, None, moments.num_matvecs
        density = spectral_density(
            operator,
            num_probes=self._random_vectors,
            num_steps=self._density_steps,
            known=pairs,
            seed=self._seed,
        )
        scalars["spectrum/negative_mass"] = density.negative_mass()
        return scalars, density, moments.num_matvecs + density.num_matvecs

    def _exponents(self, trainer: "pl.Trainer", operator: HessianOperator) -> dict[str, float]:
        """One iteration of the perturbations of both ends."""
        here = operator.gradient()
        scalars: dict[str, float] = {}
        matvecs = 0
        lr = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else 0.0
        for spectrum, suffix in ((self._ascent, ""), (self._descent, "min_")):
            if spectrum is not None:
                estimate = spectrum.step(operator.gradient, here, lr=lr)
                matvecs += estimate.num_gradients
                for rank in range(len(estimate.exponents)):
                    scalars[f"spectrum/lambda_{suffix}{rank + 1}"] = float(estimate.eigenvalues[rank])
                    scalars[f"spectrum/paper_lambda_{suffix}{rank + 1}"] = float(estimate.paper_eigenvalues[rank])
                    scalars[f"spectrum/lyapunov_exponent_{suffix}{rank + 1}"] = float(estimate.exponents[rank])
        return {**scalars, "spectrum/matvecs": float(matvecs)}

    def _block_sharpness(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> dict[str, float]:
        """The largest eigenvalue of each diagonal block, by differentiating with respect to its parameters alone."""
        scalars: dict[str, float] = {}
        matvecs = 0
        for name, members in self._members(pl_module).items():
            operator = self.subscription.problem.operator(trainer, pl_module, batch, batch_idx, names=members)
            if operator is not None:
                with progress(trainer, f"{type(self).__name__} {name}") as report:
                    pairs = self._blocks.tracker(name).measure(WatchedOperator(operator, report))
                scalars[f"spectrum/lambda_max_{name}"] = float(pairs.largest)
                matvecs += pairs.num_matvecs
        return {**scalars, "spectrum/block_matvecs": float(matvecs)} if scalars else {}

    def _members(self, pl_module: "pl.LightningModule") -> dict[str, list[str]]:
        """The names of the trainable parameters of each group."""
        names = list(trainable_parameters(pl_module))
        if self._groups is None:
            return {}
        if self._groups == "modules":
            tops = dict.fromkeys(name.partition(".")[0] for name in names)
            return {top: [name for name in names if name.partition(".")[0] == top] for top in tops}
        groups = dict(self._groups)
        return {group: [name for name in names if fnmatchcase(name, pattern)] for group, pattern in groups.items()}

    def _check_groups(self, pl_module: "pl.LightningModule") -> None:
        for group, members in self._members(pl_module).items():
            if not members:
                raise MisconfigurationException(
                    f"`{type(self).__name__}`: the group {group!r} matches no trainable parameter of"
                    f" {type(pl_module).__name__}. Its parameters are {', '.join(trainable_parameters(pl_module))}."
                )


class _BlockTrackers:
    """The trackers of the groups, made when they are first asked for: a run's groups are not known when it resumes."""

    def __init__(self, tol: float, seed: int) -> None:
        self._tol = tol
        self._seed = seed
        self._trackers: dict[str, ExtremeTracker] = {}

    def tracker(self, group: str) -> ExtremeTracker:
        return self._trackers.setdefault(group, ExtremeTracker("lanczos", "largest", self._tol, self._seed))

    def state_dict(self) -> dict[str, Any]:
        return {group: tracker.state_dict() for group, tracker in self._trackers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for group, tracker_state in state.items():
            self.tracker(group).load_state_dict(tracker_state)


class _Subspace:
    """The span of the upper end's eigenvectors at the last and at the first measurement.

    Kept in half precision, which is exact enough for an overlap and no burden on the checkpoint.
    """

    def __init__(self) -> None:
        self._last: Optional[Tensor] = None
        self._first: Optional[Tensor] = None

    def turn(self, vectors: Tensor) -> dict[str, float]:
        """Overlaps of the present eigenvectors, one row each, with those kept, and keep them."""
        scalars: dict[str, float] = {}
        for tag, kept in (("subspace_overlap", self._last), ("subspace_overlap_first", self._first)):
            if kept is not None and kept.shape == vectors.shape:
                overlap = sum(
                    float((vectors @ row.to(vectors)).square().sum()) for row in kept
                )  # row by row, to need no second copy in full precision
                scalars[f"spectrum/{tag}"] = overlap / len(vectors)
        self._last = vectors.to(torch.bfloat16)
        if self._first is None or self._first.shape != vectors.shape:
            self._first = self._last
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": None if self._last is None else self._last.cpu(),
            "first": None if self._first is None else self._first.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._first = state["last"], state["first"]


class _History:
    """What the figures show: the series of a run so far."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: dict[str, list[Tensor]] = {"largest": [], "smallest": [], "cosines": [], "inside": []}
        self._baseline = 0.0
        self._density: Optional[SpectralDensity] = None
        self._known: Optional[Tensor] = None
        self._is_new = False

    def add(
        self,
        step: int,
        pairs: Eigenpairs,
        scalars: dict[str, float],
        size: int,
        density: Optional[SpectralDensity],
    ) -> None:
        self._steps.append(step)
        self._rows["largest"].append(pairs.largest)
        self._rows["smallest"].append(pairs.smallest)
        if "spectrum/gradient_in_top_subspace" in scalars:
            cosines = [scalars[f"spectrum/gradient_cosine_{i}"] for i in range(1, pairs.num_largest + 1)]
            self._rows["cosines"].append(torch.tensor(cosines, dtype=torch.float64))
            self._rows["inside"].append(torch.tensor(scalars["spectrum/gradient_in_top_subspace"]))
        self._baseline = pairs.num_largest / size
        self._density, self._known = density, pairs.values
        self._is_new = True

    def new_figures(self) -> dict[str, Figure]:
        """The figures, if something was added since they were last drawn."""
        if not self._is_new:
            return {}
        self._is_new = False
        rows = {name: torch.stack(row) for name, row in self._rows.items() if row}
        figures = {"eigenvalues": eigenvalues_figure(self._steps, rows["largest"], rows["smallest"])}
        if "cosines" in rows:
            inside = rows["inside"].tolist()
            figures["gradient_alignment"] = alignment_figure(self._steps, rows["cosines"], inside, self._baseline)
        if self._density is not None:
            figures["density"] = density_figure(*self._density.curve(), self._known, title=f"step {self._steps[-1]}")
        return figures

    def state_dict(self) -> dict[str, Any]:
        rows = {name: torch.stack(row) for name, row in self._rows.items() if row}
        return {"steps": list(self._steps), "rows": rows, "baseline": self._baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = list(state["steps"])
        for name in self._rows:
            self._rows[name] = list(state["rows"].get(name, ()))
        self._baseline = state["baseline"]
