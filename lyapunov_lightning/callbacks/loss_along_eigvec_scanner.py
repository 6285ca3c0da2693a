"""The loss along eigenvectors of the Hessian, beside what its quadratic model promises."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.callbacks.base import CurvatureCallback, Stateful
from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.krylov import random_vector
from lyapunov_lightning.curvature.landscape import LineScan, NoisyLoss, noisy_loss, scan_line
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.curvature.stability import learning_rate
from lyapunov_lightning.figures import (
    curvature_fit_figure,
    expected_change_figure,
    improvement_figure,
    loss_profiles_figure,
    loss_surface_figure,
    optimal_step_figure,
)
from lyapunov_lightning.training.batches import Data, ProbeData
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.sandbox import Mode
from lyapunov_lightning.training.schedule import Schedule, Timetable
from lyapunov_lightning.training.series import SeriesFile
from lyapunov_lightning.training.sharing import EigenRequest, Measurement, Subscription

Units = Literal["gradient", "norm"]

_NEARBY = 1e-5
"""The distance, in relation to the norm of the parameters, between the points at which the rounding is measured."""

_REACH = 5
"""How many SGD steps the surface reaches to both sides."""


class LossAlongEigvecScanner(CurvatureCallback):
    r"""Logs the loss along eigenvectors of the Hessian, beside its quadratic model, while a module trains.

    For each of the `largest` and `smallest` eigenpairs :math:`(\lambda_i, v_i)`, and for `random` directions as a
    baseline, the loss is evaluated along :math:`\theta - \alpha(g^\top v_i)v_i` with the gradient :math:`g`. A
    quadratic loss has the same curvature :math:`\lambda_i` at every scale and its minimum at
    :math:`\alpha = 1/\lambda_i`; that of a network does along directions of positive curvature, and often does not
    along those of negative curvature. Along the first direction the loss is also looked at in units of the steps of
    SGD. The run is bit-identical to one without the scanner: the loss is evaluated at displaced copies of the
    parameters. Callbacks of this package that ask for the same Hessian at the same step share one computation.

    Logged, with ``{i}`` the rank from 1 for the largest eigenvalues, ``min_1`` ... for the smallest and ``random_1``
    ... for random directions:

    - ``scan/lambda_{i}``: the curvature along the direction; ``scan/gradient_component_{i}``: :math:`|g^\top v_i|`.
    - ``scan/curvature_fit_{scale}_{i}``: the second derivative of a quadratic fitted to the loss over
      :math:`|\alpha|\le` ``scale``, in the unit of the eigenvalue. ``scan/curvature_fit_error_{scale}_{i}`` is its
      standard error due to rounding: where the gradient's component is tiny the window is so, too, and in float32 the
      fit then says nothing.
    - ``scan/model_gap_{scale}_{i}``: largest distance between the loss and its quadratic model over the window.
    - ``scan/bracketed_{i}``: 1 if a minimum was found along the direction of descent, 0 if none lies inside the
      searched range or none deep enough to stand out of the rounding. Only if there is one:
      ``scan/optimal_step_{i}``, the first :math:`\alpha` that a greedy line search finds to be a minimum;
      ``scan/unit_step_{i}``, the same as a distance, :math:`\alpha|g^\top v_i|`; ``scan/best_improvement_{i}``, how
      far the loss falls on the way.
    - ``scan/expected_change_{alpha}``: mean over mini-batch gradients of :math:`L(\theta-\alpha\eta\tilde g)-L(\theta)`
      with :math:`\tilde g` the gradient's part along the first direction and :math:`\eta` the optimizer's learning
      rate (the highest one of its groups); for an optimizer other than SGD this is not the step that it takes.
    - ``scan/sgd_step``: mean length :math:`E|\eta\tilde g|` of that step. ``scan/surface_{k}``: the loss at ``k`` of
      these steps to both sides, for ``k`` from -5 to 5.
    - ``scan/loss``: the loss of the measured data; ``scan/noise``: the standard deviation of its rounding errors; the
      search takes losses within four of these for equal. ``scan/residual`` and ``scan/converged``: as for
      `SpectrumTracker`; an eigenvalue is the second derivative along its vector whether or not that has converged.
    - ``scan/forward_passes``: evaluations of the loss on the measured data, each a forward pass for every batch of
      them. A direction takes `points` for each of `scales`, and 5 to 30 for the line search; `sgd_steps` take
      `gradient_batches` each, and the surface 11. ``scan/matvecs`` and ``scan/seconds``: products and time spent.

    At the end of every epoch in which something was measured, the loggers that can show figures (TensorBoard, Weights &
    Biases) get ``scan/profiles`` (the loss against its model), ``scan/curvature_fit``, ``scan/optimal_step`` and
    ``scan/improvement`` (against the eigenvalues), ``scan/expected_change`` and ``scan/surface``.

    What is not finite, such as a fit over a window in which the loss overflows, is left out.

    The loss is that of one fixed function: each evaluation sees the same dropout masks and augmentation. In mixed
    precision the rounding of the activations makes it a staircase; scan in ``precision="32-true"`` where small steps
    matter.

    Args:
        largest: How many eigenvectors of the upper end.
        smallest: How many of the lower end.
        random: How many random directions, the same throughout the run.
        schedule: When to scan; before the first step of every epoch if not given.
        data: ``"fixed"`` for the same samples of the training set throughout, ``"batch"`` for the step's own batch.
        num_batches: Size of the fixed data in batches for each process.
        fraction: Size of the fixed data as a share of the training set, if `num_batches` is not given.
        scales: Half widths of the windows over which loss and model are compared.
        points: Evaluations in each window, at least 3.
        units: What a scale is a multiple of: ``"gradient"`` for the gradient's component as in the paper, ``"norm"``
            for distances in parameter space.
        sgd_steps: The multiples ``alpha`` of an SGD step; none to leave out all that is in these units.
        gradient_batches: Over how many mini-batch gradients the change is averaged.
        max_bracket: How far to search for a minimum, as a multiple of ``1/|λ|``. Along directions of negative curvature
            it often lies hundreds of these away.
        method: How products are computed, as for `CurvatureProbe`.
        tol: Relative residual at which an eigenvalue counts as converged.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
        save_dir: Where to write ``scan.csv``, a table of all that is logged, if given.
        log_prefix: Put in front of every tag, so that several scanners live side by side.
        seed: Seed of everything random in the measurement.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the module or the strategy cannot be measured, or has fewer parameters than
            eigenvalues are asked for.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import LossAlongEigvecScanner, Schedule
        >>> scanner = LossAlongEigvecScanner(largest=3, smallest=3, schedule=Schedule(every_n_steps=500))
        >>> trainer = Trainer(callbacks=[scanner], max_epochs=1, logger=False)

    Reference:
        "Negative eigenvalues of the Hessian in deep neural networks", secs. 2.3 and 2.4, figs. 3 to 6;
        "On the relation between the sharpest directions of DNN loss and the SGD step length", sec. 3.2, fig. 6.

    """

    def __init__(
        self,
        largest: int = 1,
        smallest: int = 1,
        random: int = 0,
        schedule: Optional[Schedule] = None,
        data: Data = "fixed",
        *,
        num_batches: Optional[int] = None,
        fraction: float = 0.05,
        scales: Sequence[float] = (0.1, 1.0),
        points: int = 11,
        units: Units = "gradient",
        sgd_steps: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
        gradient_batches: int = 10,
        max_bracket: float = 1000.0,
        method: Method = "auto",
        tol: float = 1e-3,
        mode: Mode = "train",
        loss_fn: Optional[Callable[[pl.LightningModule, Any], Any]] = None,
        save_dir: Optional[str] = None,
        log_prefix: Optional[str] = None,
        seed: int = 0,
    ) -> None:
        counts = {"largest": largest, "smallest": smallest, "random": random}
        for name, value in counts.items():
            check_int(name, value, least=0)
        if not any(counts.values()):
            raise ValueError("`largest`, `smallest` and `random` should not all be 0.")
        check_int("gradient_batches", gradient_batches, least=1)
        if isinstance(points, bool) or not isinstance(points, int) or points < 3:
            raise ValueError(f"`points` should be an int of at least 3, got {points}.")
        check_choice("units", units, Units)
        check_choice("method", method, Method)
        check_positive("tol", tol)
        _check_multiples("scales", scales)
        _check_multiples("sgd_steps", sgd_steps)
        if not 1 <= max_bracket < math.inf:
            raise ValueError(f"`max_bracket` should be a finite float of at least 1, got {max_bracket}.")
        problem = CurvatureProblem(
            type(self).__name__,
            ProbeData(data, num_batches=num_batches, fraction=fraction, seed=seed),
            mode=mode,
            method=method,
            loss_fn=loss_fn,
        )
        super().__init__(
            Subscription(
                problem,
                Timetable(schedule if schedule is not None else Schedule(every_n_epochs=1)),
                EigenRequest(largest, smallest, tol, seed) if largest + smallest else None,
            ),
            log_prefix,
            None if save_dir is None else SeriesFile(Path(save_dir) / "scan.csv"),
        )
        self._largest, self._smallest, self._random = largest, smallest, random
        self._scales = tuple(map(float, scales))
        self._points = points
        self._units = units
        self._sgd_steps = tuple(map(float, sgd_steps))
        self._gradient_batches = gradient_batches
        self._max_bracket = max_bracket
        self._seed = seed
        self._history = _History()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            largest=self._largest,
            smallest=self._smallest,
            random=self._random,
            scales=self._scales,
            sgd_steps=self._sgd_steps,
            log_prefix=self._log_prefix,
        )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        self._check_size(pl_module, self._largest + self._smallest)

    @override
    def charts(self) -> dict[str, dict[str, list[str]]]:
        charts = {
            "curvature along eigenvectors": [r"scan/lambda_"],
            "optimal distance": [r"scan/unit_step_"],
            "best improvement": [r"scan/best_improvement_"],
            "expected change of the loss": [r"scan/expected_change_"],
        }
        return {"scan": {name: self._recorder.patterns(tags) for name, tags in charts.items()}}

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.subscription.problem.observe(trainer, batch, batch_idx)
        if not self.subscription.timetable.is_due(trainer, batch_idx):
            return
        with self._recorder.measurement(trainer, "scan") as scalars:
            measurement = self.subscription.take(trainer, pl_module, batch, batch_idx)
            if measurement is None:
                return
            scalars.update(self._scan(trainer, measurement, batch_idx))
        self.subscription.timetable.record(scalars.get("scan/seconds", 0.0))

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for name, figure in self._history.new_figures().items():
            self._recorder.figure(trainer, f"scan/{name}", figure)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {"timetable": self.subscription.timetable, "history": self._history}

    def _scan(self, trainer: "pl.Trainer", measurement: Measurement, batch_idx: int) -> dict[str, float]:
        """All scalars of one scan, but for the time."""
        operator, request = measurement.operator, self.subscription.request
        pairs = None if request is None else measurement.eigenpairs(request, type(self).__name__)
        gradient = operator.gradient()
        start = self._start(operator, gradient)
        scalars = {"scan/loss": start.value, "scan/noise": start.noise}
        passes, matvecs = start.num_evaluations, self._random
        if pairs is not None:
            scalars["scan/residual"] = float(pairs.residuals.max())
            scalars["scan/converged"] = float(pairs.converged.double().mean())
            matvecs += pairs.num_matvecs
        scans: list[_Scan] = []
        for direction in self._directions(operator, pairs):
            scan = self._scan_along(operator, direction, gradient, start)
            scalars |= scan.scalars
            passes += scan.line.num_evaluations
            if not scans and self._sgd_steps:
                in_steps, evaluations = self._in_sgd_steps(trainer, operator, direction.vector, start.value)
                scalars |= in_steps
                passes += evaluations
            scans.append(scan)
        scalars["scan/matvecs"] = float(matvecs)
        scalars["scan/forward_passes"] = float(passes)
        scalars = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
        epoch = trainer.current_epoch + batch_idx / trainer.num_training_batches
        self._history.add(epoch, scans, scalars)
        return scalars

    def _directions(self, operator: HessianOperator, pairs: Optional[Eigenpairs]) -> "Iterator[_Direction]":
        """What is scanned, the eigenvectors first; one random vector at a time, to spare memory."""
        if pairs is not None:
            names = [*map(str, range(1, self._largest + 1)), *(f"min_{i}" for i in range(1, self._smallest + 1))]
            yield from map(_Direction, names, pairs.values.tolist(), pairs.vectors)
        generator = torch.Generator().manual_seed(self._seed)
        for i in range(1, self._random + 1):
            vector = random_vector(operator, generator)
            vector /= torch.linalg.vector_norm(vector)
            curvature = float(vector @ operator.matvec(vector))
            if not math.isfinite(curvature):
                raise NonFiniteCurvatureError("The curvature along a random direction is not finite.")
            yield _Direction(f"random_{i}", curvature, vector)

    def _start(self, operator: HessianOperator, gradient: Tensor) -> NoisyLoss:
        """The loss at the present parameters and its rounding, along a line on which the parameters hardly change."""
        norm = float(torch.linalg.vector_norm(gradient))
        size = math.hypot(*(float(torch.linalg.vector_norm(p.detach())) for p in operator.parameters))
        scale = _NEARBY * size / norm if norm else 0.0
        start = noisy_loss(
            lambda distances: operator.values_along(gradient, distances),
            scale,
            precision=torch.finfo(operator.dtype).eps,
        )
        if not math.isfinite(start.value + norm):
            raise NonFiniteCurvatureError("The loss or its gradient is not finite at the present parameters.")
        return start

    def _scan_along(
        self, operator: HessianOperator, direction: "_Direction", gradient: Tensor, start: NoisyLoss
    ) -> "_Scan":
        component = float(gradient @ direction.vector)
        slope, downhill = abs(component), -1.0 if component > 0 else 1.0

        def loss_along(distances: Sequence[float]) -> Tensor:
            return operator.values_along(direction.vector, [downhill * distance for distance in distances])

        line = scan_line(
            loss_along,
            start,
            slope,
            direction.curvature,
            scales=self._scales,
            unit=slope if self._units == "gradient" else 1.0,
            points=self._points,
            max_bracket=self._max_bracket,
        )
        name = direction.name
        scalars = {f"scan/lambda_{name}": direction.curvature, f"scan/gradient_component_{name}": slope}
        for window in line.windows:
            place = f"{window.scale:g}_{name}"
            scalars[f"scan/curvature_fit_{place}"] = window.fit.curvature
            scalars[f"scan/curvature_fit_error_{place}"] = window.fit.error
            scalars[f"scan/model_gap_{place}"] = window.gap
        search = line.search
        scalars[f"scan/bracketed_{name}"] = float(search.bracketed)
        if search.bracketed:
            scalars[f"scan/optimal_step_{name}"] = search.step / slope
            scalars[f"scan/unit_step_{name}"] = search.step
            scalars[f"scan/best_improvement_{name}"] = search.improvement
        return _Scan(name, direction.curvature, line, scalars)

    def _in_sgd_steps(
        self, trainer: "pl.Trainer", operator: HessianOperator, vector: Tensor, start_loss: float
    ) -> tuple[dict[str, float], int]:
        """The change of the loss by steps of SGD along one direction, with the evaluations that it took."""
        lr = learning_rate(trainer.optimizers[0]) if trainer.optimizers else math.nan
        if math.isnan(lr):
            self._recorder.warn_once(
                "no learning rate", "the optimizer has no learning rate, so `scan/expected_change_...` is left out."
            )
            return {}, 0
        steps = [-lr * component for component in self._batch_components(trainer, operator, vector)]
        mean_length = sum(map(abs, steps)) / len(steps)
        ticks = range(-_REACH, _REACH + 1)
        distances = [alpha * step for alpha in self._sgd_steps for step in steps]
        distances += [tick * mean_length for tick in ticks]
        losses = operator.values_along(vector, distances)
        changes = losses[: -len(ticks)].view(len(self._sgd_steps), -1).mean(dim=1) - start_loss
        tags = [f"scan/expected_change_{alpha:g}" for alpha in self._sgd_steps]
        scalars = dict(zip(tags, changes.tolist(), strict=True))
        scalars["scan/sgd_step"] = mean_length
        scalars |= {f"scan/surface_{k}": float(loss) for k, loss in zip(ticks, losses[-len(ticks) :], strict=True)}
        return scalars, len(distances)

    def _batch_components(self, trainer: "pl.Trainer", operator: HessianOperator, vector: Tensor) -> list[float]:
        """The mini-batch gradients' components along a vector, those of all processes in turn, up to so many."""
        rank, world_size = trainer.global_rank, trainer.world_size
        slots = self._gradient_batches * world_size
        number = 0

        def in_own_slot(gradient: Tensor) -> Tensor:
            nonlocal number
            entries = torch.zeros(2, slots, dtype=gradient.dtype, device=gradient.device)
            slot = number * world_size + rank
            entries[0, slot], entries[1, slot] = gradient @ vector, 1.0
            number += 1
            return entries.view(-1)

        means = operator.mean_over_batches(in_own_slot, 2 * slots, self._gradient_batches).view(2, slots).cpu().double()
        taken = means[1] > 0  # the mean of a slot is its entry over the number of all batches
        components: list[float] = (means[0, taken] / means[1, taken]).tolist()
        return components[: self._gradient_batches]


def _check_multiples(name: str, values: Sequence[float]) -> None:
    if len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
        raise ValueError(f"`{name}` should be different positive floats, got {list(values)}.")


@dataclass(frozen=True)
class _Direction:
    """A unit vector with the curvature along it; the name is that in the tags."""

    name: str
    curvature: float
    vector: Tensor


@dataclass(frozen=True)
class _Scan:
    """What was found along a direction, without its vector."""

    name: str
    curvature: float
    line: LineScan
    scalars: dict[str, float]

    def value(self, tag: str) -> float:
        """What was logged under a tag for this direction; NaN if nothing was."""
        return self.scalars.get(f"scan/{tag}_{self.name}", math.nan)


class _History:
    """What the figures show: the series of a run so far, and the last scan."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}
        self._last: list[_Scan] = []

    def add(self, epoch: float, scans: list[_Scan], scalars: dict[str, float]) -> None:
        """Take note of a scan: one number for each direction, or for each step, where there is one."""
        rows = {"epoch": [epoch]}
        rows |= {tag: [scan.value(tag) for scan in scans] for tag in ("lambda", "optimal_step", "best_improvement")}
        for scale in {window.scale for scan in scans for window in scan.line.windows}:
            rows[f"curvature_fit_{scale:g}"] = [scan.value(f"curvature_fit_{scale:g}") for scan in scans]
        for group in ("expected_change", "surface"):
            found = {tag: value for tag, value in scalars.items() if tag.startswith(f"scan/{group}_")}
            rows |= {tag.removeprefix("scan/"): [value] for tag, value in found.items()}
        earlier = len(self._rows.get("epoch", ()))
        for name, values in rows.items():
            missing = [torch.full((len(values),), math.nan, dtype=torch.float64)] * earlier
            self._rows.setdefault(name, missing).append(torch.tensor(values, dtype=torch.float64))
        for name, column in self._rows.items():
            if name not in rows:
                column.append(torch.full_like(column[-1], math.nan))
        self._last = scans

    def new_figures(self) -> dict[str, Figure]:
        """The figures, if something was added since they were last drawn."""
        if not self._last:
            return {}
        series = {name: torch.stack(column) for name, column in self._rows.items()}
        curvatures, epochs = series["lambda"], series["epoch"][:, 0].tolist()
        fits = {name.removeprefix("curvature_fit_"): y for name, y in series.items() if name.startswith("curvature_")}
        changes = {name.removeprefix("expected_change_"): y[:, 0] for name, y in series.items() if "change_" in name}
        figures = {
            "profiles": loss_profiles_figure(
                {f"{scan.name}: λ = {scan.curvature:.3g}": scan.line.windows for scan in _outermost(self._last)}
            ),
            "optimal_step": optimal_step_figure(curvatures, series["optimal_step"]),
            "improvement": improvement_figure(curvatures, series["best_improvement"]),
        }
        if fits:
            figures["curvature_fit"] = curvature_fit_figure(curvatures, fits)
        if changes:
            figures["expected_change"] = expected_change_figure(epochs, changes)
            ticks = range(-_REACH, _REACH + 1)
            surface = torch.cat([series[f"surface_{k}"] for k in ticks], dim=1)
            figures["surface"] = loss_surface_figure(epochs, ticks, surface, curvatures[:, 0])
        self._last = []
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {name: torch.stack(column) for name, column in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = {name: list(column) for name, column in state.items()}


def _outermost(scans: list[_Scan]) -> list[_Scan]:
    """The first direction of each kind."""
    return [scan for scan in scans if scan.name in ("1", "min_1", "random_1")]
