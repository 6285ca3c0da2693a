"""The loss along eigenvectors of the Hessian, compared with its quadratic model."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.results.scan import ScanResult
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.curvature.directions.landscape import LineScan, Window
from lyapunov_lightning.curvature.directions.plane import (
    Plane,
    PlaneDirections,
    ScannedPlane,
    as_plane,
    plane_axes,
    scan_plane,
)
from lyapunov_lightning.curvature.directions.scanning import (
    SURFACE,
    Direction,
    DirectionScan,
    StepScan,
    Units,
    batch_components,
    noisy_start,
    random_directions,
    scan_direction,
    scan_steps,
)
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.stability import learning_rate
from lyapunov_lightning.curvature.tracking.fixed_plane import FixedPlane
from lyapunov_lightning.figures import (
    curvature_fit_figure,
    expected_change_figure,
    improvement_figure,
    loss_profiles_figure,
    loss_surface_figure,
    optimal_step_figure,
    plane_contour_figure,
    plane_surface_figure,
)
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, non_default
from lyapunov_lightning.training.config import HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.lightning_names import optimizers_of
from lyapunov_lightning.training.reporting.recording import Charts
from lyapunov_lightning.training.results import Row, finite
from lyapunov_lightning.training.sharded.vector_states import Stateful
from lyapunov_lightning.training.sharing import EigenRequest, Step

_GRADIENT_BATCHES = 10
"""The number of mini-batch gradients over which the change of the loss is averaged."""

_MAX_BRACKET = 1000.0
"""How far to search for a minimum, in multiples of ``1/|λ|``: along directions of negative curvature it often lies
hundreds of these away (at 13 to 460 for a LeNet on MNIST)."""


class LossAlongEigvecScanner(CurvatureCallback):
    """Logs the loss along eigenvectors of the Hessian, and its quadratic model, while a module trains.

    For each of the `largest` and `smallest` eigenpairs (λᵢ, vᵢ), and for `random` directions as a baseline, the loss is
    evaluated along θ − α(gᵀvᵢ)vᵢ with the gradient g. A quadratic loss has the same curvature λᵢ at every scale and its
    minimum at α = 1/λᵢ. The loss of a network does so along directions of positive curvature, and often not along
    directions of negative curvature. Along the first direction the loss is also evaluated at multiples of SGD's steps.
    Everything is measured at the parameters before the step; the run is bit-identical to one without the scanner.

    Logged, with ``{i}`` the rank from 1 for the largest eigenvalues, ``min_1`` ... for the smallest and ``random_1``
    ... for random directions:

    - ``scan/optimal_step_{i}``: the α of the first minimum that a line search finds in the direction of descent, and
      ``scan/best_improvement_{i}``: how far the loss falls up to there. Left out if no minimum lies inside the searched
      range, or none is deeper than the rounding errors.
    - ``scan/expected_change_{alpha}``: mean over mini-batch gradients of L(θ − αηp) − L(θ) with p the gradient's part
      along the first direction and η the optimizer's learning rate (the highest one of its groups); for an optimizer
      other than SGD this is not the step that it takes.

    and in the group ``scan_details``, each explained at `ScanResult`, accuracy and cost: ``loss``,
    ``noise``, ``residual``, ``converged`` (0 where the measurement failed), ``sgd_step``, ``forward_passes``,
    ``matvecs`` and ``seconds``.

    The table in `save_dir` has these and, for each direction, ``scan/lambda_{i}``, ``scan/gradient_component_{i}``,
    ``scan/curvature_fit_{scale}_{i}`` with ``scan/curvature_fit_error_{scale}_{i}``, ``scan/model_gap_{scale}_{i}``,
    ``scan/bracketed_{i}`` (1 where a minimum was found) and ``scan/unit_step_{i}``, and ``scan/surface_{k}``: the loss
    at ``k`` SGD steps along the first direction, for ``k`` from -5 to 5. All of it is in ``scanner.results`` too,
    as `ScanResult`, which explains each number. Values that are not finite, such as a fit over a window in which the
    loss overflows, are left out everywhere.

    The figures ``scan/profiles`` (the loss and its model), ``scan/curvature_fit``, ``scan/optimal_step`` and
    ``scan/improvement`` (against the eigenvalues), ``scan/expected_change`` and ``scan/surface`` go to all loggers that
    take figures, and to files in the log folder if none does: at the end of the training, and at the end of epochs in
    which something was measured, as long as drawing takes little time.

    The loss is that of one fixed function: each evaluation sees the same dropout masks and augmentation. In mixed
    precision the rounding of the activations makes it a staircase; scan in ``precision="32-true"`` where small steps
    matter.

    Args:
        every_n_steps: Scan at the first opportunity after every n optimizer steps. Without it and `schedule` the
            scanner follows the trainer's ``log_every_n_steps``.
        largest: How many eigenvectors of the upper end.
        smallest: How many of the lower end.
        random: How many random directions, the same throughout the run.
        schedule: Any other schedule, such as ``Schedule(every_n_epochs=1)``.
        hessian: Which Hessian, and so which loss; by default that of fixed training data.
        scales: Half widths of the windows over which loss and model are compared.
        points: Evaluations in each window, at least 3.
        units: The unit of the scales: ``"gradient"`` for the gradient's component as in the paper, ``"norm"`` for
            distances in parameter space.
        sgd_steps: The multiples ``alpha`` of an SGD step; an empty list to leave out everything in this unit.
        plane: A plane to evaluate the loss on as well: ``"eigenvectors"``, ``"gradient"`` or ``"random"``, or a
            `Plane`, which explains them. Its axes are those of the first scan, so that the training leaves a path on
            it; of the parameters two coordinates a scan are kept.
        tol: Relative residual at which an eigenvalue counts as converged.
        save_dir: Where to write ``scan.csv``, if given.
        log_prefix: Put in front of every tag, so that several scanners live side by side.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the module or the strategy cannot be measured, or has fewer parameters than
            eigenvalues are asked for.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import LossAlongEigvecScanner
        >>> scanner = LossAlongEigvecScanner(every_n_steps=500, largest=3, smallest=3)
        >>> trainer = Trainer(callbacks=[scanner], max_epochs=1, logger=False)

    Reference:
        "Negative eigenvalues of the Hessian in deep neural networks", secs. 2.3 and 2.4, figs. 3 to 6;
        "On the relation between the sharpest directions of DNN loss and the SGD step length", sec. 3.2, fig. 6.

    """

    group = "scan"
    result_class = ScanResult
    moves_in_measurement = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        largest: int = 1,
        smallest: int = 1,
        random: int = 0,
        *,
        schedule: ScheduleLike | None = None,
        hessian: HessianLike = HessianConfig(),
        scales: Sequence[float] = (0.1, 1.0),
        points: int = 11,
        units: Units = "gradient",
        sgd_steps: Sequence[float] = (0.5, 1.0),
        plane: Plane | PlaneDirections | None = None,
        tol: float = 1e-3,
        save_dir: str | None = None,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(LossAlongEigvecScanner.__init__, locals())
        counts = {"largest": largest, "smallest": smallest, "random": random}
        for name, value in counts.items():
            check_int(name, value, least=0)
        if not any(counts.values()) and plane is None:
            raise ValueError("`largest`, `smallest` and `random` should not all be 0 where no `plane` is asked for.")
        if isinstance(points, bool) or not isinstance(points, int) or points < 3:
            raise ValueError(f"`points` should be an int of at least 3, got {points!r}.")
        check_choice("units", units, Units)
        check_positive("tol", tol)
        _check_multiples("scales", scales)
        _check_multiples("sgd_steps", sgd_steps)
        self._plane = as_plane(plane)
        if self._plane is not None:
            self._plane.check_eigenvectors(largest + smallest)
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            request=EigenRequest(largest, smallest, tol) if largest + smallest else None,
            save_dir=save_dir,
            arguments=arguments,
        )
        self._largest, self._smallest, self._random = largest, smallest, random
        self._scales = tuple(map(float, scales))
        self._points = points
        self._units: Units = units
        self._sgd_steps = tuple(map(float, sgd_steps))
        self._fixed_plane = FixedPlane()
        self._last: dict[str, DirectionScan] = {}  # for one figure; a resumed run has none before its first scan

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {
            "largest": self._largest,
            "smallest": self._smallest,
            "random": self._random,
            "scales": self._scales,
            "sgd_steps": self._sgd_steps,
            # Not where there is none: callbacks without a plane find the state that they had before there were any.
            **({} if self._plane is None else {"plane": self._plane}),
        }

    @override
    def charts(self) -> Charts:
        return {
            "optimal step": ["scan/optimal_step_"],
            "best improvement": ["scan/best_improvement_"],
            "expected change of the loss": ["scan/expected_change_"],
        }

    @override
    def figures(self) -> Figures:
        results: list[ScanResult] = self.results
        curvatures = _matrix(result.curvatures for result in results)
        steps = [result.step for result in results]
        # One of each kind: there is a row of panels for each, and twenty directions would make a picture of 54 inches.
        first_of_each = {name: self._last[name] for name in ("1", "min_1", "random_1") if name in self._last}
        figures: Figures = {}
        if self._largest + self._smallest + self._random:  # else there is a plane, and no line
            optimal, improvements = (
                _matrix(getattr(result, name) for result in results) for name in ("optimal_steps", "best_improvements")
            )
            figures["optimal_step"] = partial(optimal_step_figure, curvatures, optimal, steps=steps)
            figures["improvement"] = partial(improvement_figure, curvatures, improvements, steps=steps)
        if first_of_each:  # in a resumed run from its first scan on
            profiles = {f"{name}: λ = {scan.curvature:.3g}": scan.line.windows for name, scan in first_of_each.items()}
            figures = {"profiles": partial(loss_profiles_figure, profiles), **figures}
        if self._scales and figures:
            fits = torch.stack([_matrix(result.curvature_fits) for result in results])
            by_scale = {f"{scale:g}": fits[..., place] for place, scale in enumerate(self._scales)}
            figures["curvature_fit"] = partial(curvature_fit_figure, curvatures, by_scale, steps=steps)
        last = results[-1] if results else None
        if last is not None and last.plane_losses:
            coordinates = torch.tensor(last.plane_coordinates, dtype=torch.float64)
            losses, title = _matrix(last.plane_losses), f"Loss over a plane at step {last.step}"
            path = path_to(results)
            figures["plane"] = partial(plane_contour_figure, coordinates, losses, last.plane_axes, path, title=title)
            figures["plane_surface"] = partial(plane_surface_figure, coordinates, losses, last.plane_axes, title=title)
        # A scan without a learning rate has no surface, and a matrix of rows of two lengths cannot be made.
        with_steps = [result for result in results if result.surface]
        if with_steps:
            epochs = [result.epoch for result in with_steps]
            changes = _matrix(result.expected_changes for result in with_steps)
            by_multiple = {f"{alpha:g}": changes[:, place] for place, alpha in enumerate(self._sgd_steps)}
            figures["expected_change"] = partial(expected_change_figure, epochs, by_multiple)
            surface = _matrix(result.surface for result in with_steps)
            sharpness = _matrix(result.curvatures for result in with_steps)[:, 0]
            figures["surface"] = partial(loss_surface_figure, epochs, SURFACE, surface, sharpness)
        return figures

    @override
    def measure(self, hessian: LossHessian, step: Step) -> ScanResult:
        pairs = None if self.request is None else self.shared.eigenpairs(step, self)
        # After the eigenpairs: where their last product has kept its graph the gradient costs nothing.
        gradient = hessian.gradient()
        # Once for all directions: the noise is that of the loss, and its measurement takes nine evaluations.
        start = noisy_start(hessian, gradient)
        scans: dict[str, DirectionScan] = {}
        in_steps: StepScan | None = None
        for name, direction in self._directions(hessian, pairs):
            if not scans and self._sgd_steps:  # along the first direction, the sharpest one
                # Of one direction only, the sharpest: its mini-batch gradients and its surface take some 30 evaluations
                # more.
                in_steps = self._in_sgd_steps(hessian, step, direction.vector, start.value)
            scans[name] = scan_direction(
                hessian,
                direction,
                gradient,
                start,
                scales=self._scales,
                units=self._units,
                points=self._points,
                max_bracket=_MAX_BRACKET,
            )
        self._last = scans
        plane, position = self._on_plane(hessian, step, pairs, gradient)
        lines = [scan.line for scan in scans.values()]
        # A search that ran into the end of its range has found no minimum, however low the loss is there.
        minima = [line.search if line.search.bracketed else None for line in lines]
        passes = start.num_evaluations + sum(line.num_evaluations for line in lines)
        return ScanResult(
            step=step.index,
            epoch=step.epoch,
            directions=tuple(scans),
            curvatures=tuple(scan.curvature for scan in scans.values()),
            gradient_components=tuple(scan.slope for scan in scans.values()),
            unit_steps=tuple(finite(minimum.step) if minimum else None for minimum in minima),
            best_improvements=tuple(finite(minimum.improvement) if minimum else None for minimum in minima),
            scales=self._scales,
            curvature_fits=self._over_windows(lines, lambda window: window.fit.curvature),
            curvature_fit_errors=self._over_windows(lines, lambda window: window.fit.error),
            model_gaps=self._over_windows(lines, lambda window: window.gap),
            sgd_steps=self._sgd_steps,
            expected_changes=tuple(map(finite, in_steps.changes)) if in_steps else (),
            sgd_step=finite(in_steps.mean_length) if in_steps else None,
            surface=tuple(map(finite, in_steps.surface)) if in_steps else (),
            loss=start.value,
            noise=start.noise,
            residual=float(pairs.residuals.max()) if pairs else None,
            converged=float(pairs.converged.double().mean()) if pairs else None,
            plane_axes=plane.names if plane else (),
            plane_coordinates=tuple(plane.coordinates.tolist()) if plane else (),
            plane_losses=tuple(tuple(map(finite, row)) for row in plane.losses.tolist()) if plane else (),
            plane_step=self._fixed_plane.step,
            plane_position=position,
            forward_passes=passes
            + (in_steps.num_evaluations if in_steps else 0)
            + (plane.losses.numel() if plane else 0),
            # A random direction's curvature is one product; an eigenvector's is its eigenvalue.
            matvecs=self._random + (pairs.num_matvecs if pairs else 0),
        )

    def _directions(self, hessian: LossHessian, pairs: Eigenpairs | None) -> Iterator[tuple[str, Direction]]:
        """The directions to scan, by name, eigenvectors first."""
        if pairs is not None:
            yield from zip(self._eigenvector_names(), map(Direction, pairs.values.tolist(), pairs.vectors), strict=True)
        # The same ones at every scan, drawn from the configured seed: between two scans only the loss has changed.
        for i, direction in enumerate(random_directions(hessian, self._random, self.config.seed), 1):
            yield f"random_{i}", direction

    def _on_plane(
        self, hessian: LossHessian, step: Step, pairs: Eigenpairs | None, gradient: Tensor
    ) -> tuple[ScannedPlane | None, tuple[float, ...]]:
        """The loss over the plane, and where the parameters are on it; None and nothing if there is no plane."""
        plane = self._plane
        if plane is None:
            return None, ()
        axes = self._fixed_plane.axes(
            hessian,
            step.index,
            lambda: plane_axes(
                hessian,
                plane.directions,
                pairs=pairs,
                names=self._eigenvector_names(),
                gradient=gradient,
                seed=self.config.seed,
            ),
        )
        return scan_plane(hessian, axes, plane), axes.position(hessian)

    def _eigenvector_names(self) -> list[str]:
        return [*map(str, range(1, self._largest + 1)), *(f"min_{i}" for i in range(1, self._smallest + 1))]

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {**super()._stateful(), **({} if self._plane is None else {"plane": self._fixed_plane})}

    def _in_sgd_steps(self, hessian: LossHessian, step: Step, vector: Tensor, loss: float) -> StepScan | None:
        """The loss along a direction in steps of SGD; None if there is no learning rate."""
        trainer = step.trainer
        optimizers = optimizers_of(trainer)
        lr = learning_rate(optimizers[0]) if optimizers else math.nan
        if math.isnan(lr):
            self._recorder.warn_once(
                "no learning rate", "the optimizer has no learning rate, so `scan/expected_change_...` is left out."
            )
            return None
        # Of the ranks in turn: with two ranks five mini-batches of each, and not the same ten of the first one on both.
        components = batch_components(
            hessian, vector, _GRADIENT_BATCHES, rank=trainer.global_rank, world_size=trainer.world_size
        )
        return scan_steps(hessian, vector, loss, components, lr=lr, multiples=self._sgd_steps)

    def _over_windows(self, lines: Sequence[LineScan], read: Callable[[Window], float]) -> tuple[Row, ...]:
        """A number of the window of each scale, for each direction; None for a window that is missing."""
        # In units of the gradient's component a direction without slope has no windows, and its row is still as long.
        rows = ({window.scale: finite(read(window)) for window in line.windows} for line in lines)
        return tuple(tuple(row.get(scale) for scale in self._scales) for row in rows)


def path_to(results: Sequence[ScanResult]) -> list[tuple[float, float]]:
    """Where the training was on the plane of its last scan, in coordinates from the last parameters."""
    last = results[-1]
    x, y = last.plane_position
    on_it = [result.plane_position for result in results if result.plane_step == last.plane_step]
    return [(one - x, other - y) for one, other in on_it]


def _check_multiples(name: str, values: Sequence[float]) -> None:
    if len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
        raise ValueError(f"`{name}` should be different positive floats, got {list(values)}.")


def _matrix(rows: "Iterator[Row] | Sequence[Row]") -> Tensor:
    """The rows as a matrix, with NaN where there is no number."""
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows], dtype=torch.float64)
