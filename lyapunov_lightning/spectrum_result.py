"""The result of `measure`: eigenvalues, their density, and the loss along eigenvectors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from lyapunov_lightning.curvature.directions.plane import ScannedPlane
from lyapunov_lightning.curvature.stochastic.density import SpectralDensity
from lyapunov_lightning.training.reporting.files import read_tensors, replaced
from lyapunov_lightning.training.results import finite, known, pandas_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lyapunov_lightning.figures import Picture


@dataclass(frozen=True, eq=False)
class ScannedLine:
    """The loss along an eigenvector.

    Attributes:
        eigenvalue: The curvature along it.
        distances: Shape ``(m,)``: distances in parameter space, positive where the loss falls at first.
        losses: Shape ``(m,)``: the loss there.
        model: Shape ``(m,)``: the quadratic with the slope and the curvature of the loss at distance 0.
        minimum: The distance of the first minimum that a line search saw; None if it saw none.
        improvement: How far the loss falls on the way there.

    """

    eigenvalue: float
    distances: Tensor
    losses: Tensor
    model: Tensor
    minimum: float | None = None
    improvement: float | None = None


@dataclass(frozen=True, eq=False)
class MeasuredPlane(ScannedPlane):
    """The loss over a plane, with its numbers by tag and its picture.

    Attributes:
        names: The names of the axes: ``1``, ``min_1`` ... for eigenvectors, ``gradient``, ``random_1`` and
            ``random_2``.
        coordinates: Shape ``(m,)``: the coordinates on each axis, as shares of the norm of the parameters; 0 is where
            they are.
        losses: Shape ``(m, m)``: the loss, the row being the coordinate on the first axis. Infinite or NaN where it
            overflows.
        lengths: The norms of the axes in parameter space.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.spectrum_result import MeasuredPlane
        >>> t = torch.linspace(-1, 1, 5)
        >>> plane = MeasuredPlane(("1", "2"), t, 3 + t[:, None] ** 2 + t, (1.0, 1.0))
        >>> plane.scalars()
        {'scan/plane_improvement': 1.0, 'scan_details/loss': 3.0}

    """

    def scalars(self) -> dict[str, float]:
        """The numbers to log, under the tags of `LossAlongEigvecScanner`; without what is not finite."""
        middle = len(self.coordinates) // 2
        found = {
            "scan/plane_improvement": self.improvement,
            "scan_details/loss": float(self.losses[middle, middle]),
        }
        return known({tag: finite(value) for tag, value in found.items()})

    @overload
    def plot(self, *, surface: bool = False, title: str = ..., ax: None = None) -> "Picture": ...

    @overload
    def plot(self, *, surface: bool = False, title: str = ..., ax: "Axes") -> "Axes": ...

    def plot(
        self, *, surface: bool = False, title: str = "Loss over a plane", ax: "Axes | None" = None
    ) -> "Picture | Axes":
        """Draw the contours of the loss, or its surface.

        Args:
            surface: Whether to draw the surface.
            title: Title of the figure; empty for none.
            ax: Axes of Matplotlib on which to draw, of three dimensions for a surface; a new figure if None.

        Returns:
            The figure, or `ax`.

        """
        from lyapunov_lightning.figures import drawn_on, plane_contour_figure, plane_surface_figure

        draw = plane_surface_figure if surface else plane_contour_figure
        if ax is None:
            return draw(self.coordinates, self.losses, self.names, title=title)
        with drawn_on(ax):
            draw(self.coordinates, self.losses, self.names, title="")
        return ax


@dataclass(frozen=True, eq=False, kw_only=True)
class SpectrumResult:
    """What `lyapunov_lightning.measure` found.

    Attributes:
        values: Shape ``(k,)``: the eigenvalues, the largest ones descending, then the smallest ones ascending, in the
            unit of the loss's second derivative.
        vectors: Shape ``(k, n)``: the eigenvectors as rows, in the order of the module's trainable parameters, each
            flattened.
        residuals: Shape ``(k,)``: ``‖Hv − λv‖``; an eigenvalue of the Hessian lies within it of each value.
        value_errors: Shape ``(k,)``: how far each value is estimated to be from the true one.
        converged: Shape ``(k,)``: whether the tolerance was met.
        num_largest: How many of them belong to the upper end.
        module: The class of the module.
        mode: ``"train"`` or ``"eval"``.
        loss: The loss that was measured.
        gradient_norm: The norm of its gradient.
        num_parameters: The number n of trainable parameters.
        num_batches: On how many batches was measured, all ranks together.
        max_batches: How many batches were to be read at most: the first ones of the data; None for all.
        density: The distribution of all eigenvalues, if asked for.
        lines: The loss along eigenvectors: ``"1"`` ... of the upper end, ``"min_1"`` ... of the lower end.
        plane: The loss over a plane, if asked for.
        matvecs: Hessian-vector products spent, before a resumption too.
        seconds: Wall-clock time spent on all of it, before a resumption too.
        is_interrupted: Whether it was ended by Ctrl-C or a signal to terminate. What was found by then is in it; the
            values of a search that was not finished count as not converged.

    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    value_errors: Tensor
    converged: Tensor
    num_largest: int
    module: str
    mode: str
    loss: float
    gradient_norm: float
    num_parameters: int
    num_batches: int
    density: SpectralDensity | None = None
    lines: Mapping[str, ScannedLine] = field(default_factory=dict)
    plane: MeasuredPlane | None = None
    matvecs: int = 0
    seconds: float = 0.0
    max_batches: int | None = None
    is_interrupted: bool = False

    @property
    def largest(self) -> Tensor:
        """The upper end, the largest first."""
        return self.values[: self.num_largest]

    @property
    def smallest(self) -> Tensor:
        """The lower end, the smallest first."""
        return self.values[self.num_largest :]

    def __repr__(self) -> str:
        return f"SpectrumResult({self.module}, largest={_listed(self.largest)}, smallest={_listed(self.smallest)})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.plot()._repr_png_()

    def summary(self) -> str:
        """The result as a table in plain text."""
        first = "the first " if self.max_batches is not None else ""
        mode = "evaluation" if self.mode == "eval" else "training"
        lines = [
            f"Hessian of the training loss of {self.module}: {_counted(self.num_parameters, 'parameter')},"
            f" {first}{_counted(self.num_batches, 'batch', 'es')}, {mode} mode",
            f"loss {self.loss:.6g}, gradient norm {self.gradient_norm:.3g}",
        ]
        if len(self.values):
            lines += ["", f"{'':8}{'eigenvalue':>14}{'error':>11}{'residual':>11}  converged"]
        for name, row in zip(self._names(), self._rows(), strict=True):
            value, residual, error, is_converged = row
            lines.append(f"{name:8}{value:14.6g}{error:11.1e}{residual:11.1e}  {'yes' if is_converged else 'no'}")
        if self.density is not None:
            # The density is that of one eigenvalue drawn at random: its first moment is the mean of all n, the trace
            # divided by n.
            mean, size = self.density.moment(1), self.num_parameters
            negative = self.density.negative_mass()
            lines += [
                "",
                f"trace {mean.value * size:.4g}, standard error {mean.standard_error * size:.1g}; share of the negative"
                f" eigenvalues in the sum of all moduli {negative:.2%}",
            ]
        for name, line in self.lines.items():
            depth = "no minimum was found"
            if line.minimum is not None and line.improvement is not None:
                depth = f"a minimum lies {line.minimum:.3g} away, {line.improvement:.3g} below"
            lines += [*([""] if name == next(iter(self.lines)) else []), f"along {name}: {depth}"]
        if self.plane is not None:
            first, second = self.plane.names
            lines += [
                "",
                f"over the plane of {first} and {second}: the lowest loss lies {self.plane.improvement:.3g} below",
            ]
        if self.is_interrupted:
            is_found = bool(self.converged.any())
            lines += ["", f"interrupted {'after' if is_found else 'during'} the search for eigenvalues"]
        spent = f"{_counted(self.matvecs, 'Hessian-vector product')}, {self.seconds:.2g} seconds"
        return "\n".join([*lines, "", spent])

    @overload
    def plot(self, *, ax: None = None) -> "Picture": ...

    @overload
    def plot(self, *, ax: "Axes") -> "Axes": ...

    def plot(self, *, ax: "Axes | None" = None) -> "Picture | Axes":
        """Draw eigenvalues, density and loss along the eigenvectors, as far as they were measured.

        Args:
            ax: Axes of Matplotlib on which to draw the first of these alone; a new figure if None.

        Returns:
            The figure, or `ax`.

        """
        # Here and not above: Matplotlib takes longer to import than everything else in this file.
        from lyapunov_lightning.figures import drawn_on

        if ax is None:
            return self._overview()
        with drawn_on(ax):
            self._overview()
        return ax

    def _overview(self) -> "Picture":
        from lyapunov_lightning.figures import spectrum_overview_figure

        return spectrum_overview_figure(
            self.values,
            self.value_errors,
            self.num_largest,
            density=None if self.density is None else self.density.curve(),
            lines={name: (s.distances, s.losses, s.model, s.eigenvalue) for name, s in self.lines.items()} or None,
            title=f"{self.module}, loss {self.loss:.4g}",
        )

    def plot_plane(self, *, surface: bool = False) -> "Picture":
        """Draw the loss over the plane, as contours or as a surface.

        Raises:
            ValueError: If none was measured.

        """
        if self.plane is None:
            raise ValueError("No plane was measured. Ask for one, such as `measure(..., plane='random')`.")
        return self.plane.plot(surface=surface, title=f"{self.module}, loss over a plane")

    def to_pandas(self) -> Any:
        """The eigenvalues as a ``pandas.DataFrame`` with one row each, indexed by their names: ``1`` ..., ``min_1`` ...

        Raises:
            ModuleNotFoundError: If pandas is not installed.

        """
        pandas = pandas_for("SpectrumResult.to_pandas")
        columns = ["eigenvalue", "residual", "value_error", "converged"]
        return pandas.DataFrame(self._rows(), columns=columns, index=pandas.Index(self._names(), name="rank"))

    def save(self, path: str | Path) -> None:
        """Write all of it to a file that `load` reads. The file is a dictionary, which ``torch.load`` can read too."""
        # Plain dictionaries and tensors: ``torch.load(weights_only=True)`` refuses classes, and without it a file from
        # elsewhere could run code.
        state = {name: value for name, value in vars(self).items() if name not in ("density", "lines", "plane")}
        state["density"] = None if self.density is None else vars(self.density)
        state["lines"] = {name: asdict(line) for name, line in self.lines.items()}
        state["plane"] = None if self.plane is None else vars(self.plane)
        with replaced(Path(path)) as partial:
            torch.save(state, partial)

    @classmethod
    def load(cls, path: str | Path) -> "SpectrumResult":
        """Read what `save` wrote.

        Raises:
            ValueError: If the file was not written by `save`. It may come from anywhere: nothing in it is run, and it
                takes no more memory than its size.

        """
        try:
            state = read_tensors(path)
            density = None if state["density"] is None else SpectralDensity(**state["density"])
            lines = {name: ScannedLine(**line) for name, line in state["lines"].items()}
            kept = state.get("plane")  # which files of before there were planes lack
            plane = None if kept is None else MeasuredPlane(**kept)
            result = cls(**{**state, "density": density, "lines": lines, "plane": plane})
            result._check()
        except OSError:
            raise
        except Exception as error:  # of another program's file, or of another version's
            raise ValueError(
                f"{path} is no file that `SpectrumResult.save` of this version wrote ({type(error).__name__}: {error})."
                " Measure again, or read it with the version that wrote it."
            ) from error
        return result

    def _check(self) -> None:
        """Make sure that the fields belong together."""
        count = len(self.values)
        if not isinstance(self.num_largest, int) or not 0 <= self.num_largest <= count:
            raise ValueError(f"`num_largest` is {self.num_largest!r}, of {count} eigenvalues")
        for name in ("values", "residuals", "value_errors", "converged"):
            if getattr(self, name).shape != (count,):
                raise ValueError(f"`{name}` has the shape {tuple(getattr(self, name).shape)}, of {count} eigenvalues")
        if self.vectors.ndim != 2 or len(self.vectors) != count:
            raise ValueError(f"`vectors` has the shape {tuple(self.vectors.shape)}, of {count} eigenvalues")
        for line in self.lines.values():
            if not line.distances.ndim == 1 or not line.distances.shape == line.losses.shape == line.model.shape:
                raise ValueError("a line has unequal numbers of distances and losses")
        if self.plane is not None and self.plane.losses.shape != 2 * self.plane.coordinates.shape:
            raise ValueError("a plane has other numbers of coordinates and losses")

    def _names(self) -> list[str]:
        return direction_names(self.num_largest, len(self.values) - self.num_largest)

    def _rows(self) -> list[tuple[Any, ...]]:
        columns = (self.values, self.residuals, self.value_errors, self.converged)
        return list(zip(*(column.tolist() for column in columns), strict=True))


def direction_names(num_largest: int, num_smallest: int) -> list[str]:
    """The names of eigenpairs by rank: ``1``, ``2`` ... from the upper end, ``min_1`` ... from the lower one."""
    upper = [str(rank) for rank in range(1, num_largest + 1)]
    return upper + [f"min_{rank}" for rank in range(1, num_smallest + 1)]


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def _listed(values: Tensor) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values.tolist())}]"
