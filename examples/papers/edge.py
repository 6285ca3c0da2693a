"""Measures and drawings for the edge of stochastic stability, beside the three papers.

Three curvatures are held against the edge: the largest eigenvalue on all of the images, the same on the batch of the
step, and the batch sharpness, the curvature of a batch along the step that its own gradient asks for. Where Algorithm 1
of the chaos-theory paper runs beside them, the eigenvalue that it sees is the fourth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from typing_extensions import override

from examples.papers.common import median, one_key, with_strength
from examples.papers.record import Record
from examples.papers.verdicts import Numbers
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.figures.style import BLUE, INK, OCHRE, RED, Picture, curve, new_picture
from lyapunov_lightning.figures.ticks import linear_axis, log_axis
from lyapunov_lightning.training.callback import CurvatureCallback
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.replica.objective import ProbeBatch
from lyapunov_lightning.training.results import Result
from lyapunov_lightning.training.sharing import Step

Curvature = Literal["all", "batch", "sharpness", "limit", "algorithm"]
Pairs = Sequence[tuple[str, str]]
"""Names of runs that are compared: the number is that of the first over that of the second."""

_ON_ALL, _ON_BATCH, _FOLLOWED = 0, 1, 2
"""The probes of the part ``edge_probes`` in this order, and that of ``edge_algorithm``."""

_LABELS: dict[Curvature, str] = {
    "batch": "λ_max of the batch",
    "algorithm": "λ_max by Algorithm 1",
    "sharpness": "batch sharpness",
    "all": "λ_max of all images",
}
_COLOURS: dict[Curvature, str] = {"batch": OCHRE, "algorithm": RED, "sharpness": BLUE, "all": INK}


def loss_on_all_images(module: pl.LightningModule, batch: object) -> Tensor:
    """The training loss on all images at once: a product on a hundred small batches takes ten times as long.

    Args:
        module: In training with a datamodule that keeps its images as tensors.
        batch: That of the step, which does not matter.

    """
    loss: Tensor = module.training_step(module.trainer.datamodule.train_set.tensors, 0)
    return loss


@dataclass(frozen=True, kw_only=True)
class BatchesResult(Result):
    """What many batches see along their own gradients, at the same parameters.

    Attributes:
        slopes: ``gᵀg`` of each.
        curvatures: ``gᵀHg`` of each, by its own Hessian.
    """

    slopes: tuple[float, ...]
    curvatures: tuple[float, ...]

    @property
    def sharpness(self) -> float | None:
        """The batch sharpness, ``E[gᵀHg] / E[gᵀg]``."""
        return sum(self.curvatures) / sum(self.slopes) if sum(self.slopes) > 0 else None

    @override
    def scalars(self) -> dict[str, float]:
        return {}


class BatchesAtOnce(CurvatureCallback):
    """Measures batches at the same parameters.

    `CurvatureProbe` averages over the batches of the training's own steps, which cost nothing. At the edge of stability
    the loss shoots up now and then, and the few steps with large gradients then count for all; the definition is one at
    fixed parameters.

    Args:
        every_n_steps: How often.
        num_batches: How many batches of the training's size, drawn without putting back; at most all.
    """

    group = "batches"
    result_class = BatchesResult

    def __init__(self, every_n_steps: int, num_batches: int = 32) -> None:
        super().__init__(every_n_steps, None, HessianConfig(data="batch"), None, arguments={})
        self._num_batches = num_batches

    @override
    def measure(self, hessian: HessianOperator, step: Step) -> BatchesResult:
        data: Any = step.trainer.datamodule  # type: ignore[attr-defined]
        images, labels = data.train_set.tensors
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step.index))
        slopes, curvatures = [], []
        for chosen in order.split(data.batch_size)[: self._num_batches]:
            own = self.shared.on_batches(step, self.config, [ProbeBatch([images[chosen], labels[chosen]], 0, False)])
            gradient = own.gradient(keep_graph=True)
            slopes.append(float(gradient @ gradient))
            curvatures.append(float(gradient @ own.matvec(gradient)))
            own.reset()
        return BatchesResult(step=step.index, epoch=step.epoch, slopes=tuple(slopes), curvatures=tuple(curvatures))


# Measures


def over_edge(runs: Mapping[str, Record], of: Curvature, edges: Mapping[str, float]) -> Numbers:
    """The median of a curvature over its edge in the second half of each run.

    Args:
        runs: The records.
        of: Which curvature.
        edges: For each run by its name, the curvature times the learning rate at its edge: 2 for plain SGD.

    """
    found: Numbers = {}
    for name, edge in edges.items():
        level, rate = _level(runs[name], of), max(runs[name].learning_rates)
        found[name] = None if level is None else level * rate / edge
    return found


def ratios(runs: Mapping[str, Record], of: Curvature, pairs: Pairs) -> Numbers:
    """The median of a curvature in the second half of one run over that of another, both times their rates."""
    found: Numbers = {}
    for first, second in pairs:
        levels = over_edge(runs, of, {first: 1.0, second: 1.0})
        above, below = levels[first], levels[second]
        found[f"{first} / {second}"] = None if above is None or not below else above / below
    return found


def at_measured_edge(runs: Mapping[str, Record], names: Sequence[str]) -> Numbers:
    """The batch sharpness over the limit at the agreement of batches that the probe measured; medians as above."""
    return one_over_another(runs, "sharpness", "limit", names)


def growth(runs: Mapping[str, Record], of: Curvature, names: Sequence[str]) -> Numbers:
    """The median of a curvature in the second half of each run over its first value."""
    found: Numbers = {}
    for name in names:
        values = [value for _, value in series(runs[name], of)]
        level = _level(runs[name], of)
        found[name] = level / values[0] if values and level is not None else None
    return found


def one_over_another(runs: Mapping[str, Record], of: Curvature, over: Curvature, names: Sequence[str]) -> Numbers:
    """The medians of two curvatures in the second half of the same run, one over the other."""
    found: Numbers = {}
    for name in names:
        above, below = _level(runs[name], of), _level(runs[name], over)
        found[name] = None if above is None or not below else above / below
    return found


def inverse_h0_over_rate(runs: Mapping[str, Record], names: Sequence[str]) -> Numbers:
    """The median over the second half of the paper's ``1/h0`` over the learning rate."""
    levels = over_edge(runs, "algorithm", dict.fromkeys(names, H0_CONVENTION))
    return {name: None if not level else 1 / level for name, level in levels.items()}


# Drawings


def courses(
    runs: Mapping[str, Sequence[Record]], columns: int, edges: Mapping[str, Mapping[str, float]] | None = None
) -> Picture:
    """Every curvature times the learning rate by step, a panel for each run; later seeds faint.

    Args:
        runs: The records.
        columns: Panels in a row.
        edges: For runs whose edge is not 2, the edges by what they are called.

    """
    rows = -(-len(runs) // columns)
    picture = new_picture(8.0, 2.2 * rows + 0.4)
    panels: list[Axes] = picture.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    for panel, (name, records) in zip(panels, runs.items(), strict=False):
        for record, strength in with_strength(records):
            rate = max(record.learning_rates)
            for of, label in _LABELS.items():
                points = series(record, of)
                if not points:
                    continue
                steps, values = [step for step, _ in points], smooth([rate * value for _, value in points])
                curve(panel, steps, values, color=_COLOURS[of], alpha=strength, label=label, linewidth=1.1)
        for edge in (edges or {}).get(name, {"2/η": 2.0}).values():
            panel.axhline(edge, color=INK, linewidth=0.9, linestyle="--", zorder=1)
        log_axis(panel, "y")
        linear_axis(panel, "x")
        panel.set_title(name)
        panel.set_xlabel("step")
    for panel in panels[::columns]:
        panel.set_ylabel("curvature × rate")
    one_key(picture, *panels[: len(runs)])
    return picture


# What they share


def series(record: Record, of: Curvature) -> list[tuple[int, float]]:
    """The steps at which a curvature was measured, and its values."""
    kind, index, value_of = _SOURCES[of]
    points = [(result.step, value_of(result)) for result in record.results(kind, index)]
    return [(step, value) for step, value in points if value is not None]


def smooth(values: Sequence[float]) -> list[float]:
    """The running median of a tenth of the values, where there are a hundred: one a step hides all other curves."""
    reach = len(values) // 20 if len(values) >= 100 else 0
    return [float(np.median(values[max(0, place - reach) : place + reach + 1])) for place in range(len(values))]


def _level(record: Record, of: Curvature) -> float | None:
    """The median of a curvature in the second half of a run."""
    half = (record.steps[-1] + 1) / 2 if record.steps else 0.0
    return median([value for step, value in series(record, of) if step >= half])


def _exact(result: ProbeResult) -> float | None:
    return result.lambda_max if result.converged else None


def _of_algorithm(result: ProbeResult) -> float | None:
    return H0_CONVENTION / result.inverse_h0 if result.inverse_h0 else None


def _sharpness(result: BatchesResult) -> float | None:
    return result.sharpness


def _limit(result: ProbeResult) -> float | None:
    return result.stability_limit


_SOURCES: dict[Curvature, tuple[type[Result], int, Callable[[Any], float | None]]] = {
    "all": (ProbeResult, _ON_ALL, _exact),
    "batch": (ProbeResult, _ON_BATCH, _exact),
    "sharpness": (BatchesResult, 0, _sharpness),
    "limit": (ProbeResult, _ON_BATCH, _limit),
    "algorithm": (ProbeResult, _FOLLOWED, _of_algorithm),
}
