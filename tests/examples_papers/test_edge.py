"""The measures of the edge of stochastic stability on made-up records whose answers are known."""

from collections.abc import Sequence

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from examples.models import MLP, Classifier
from examples.papers import edge
from examples.papers.edge import BatchesAtOnce, BatchesResult
from examples.papers.record import Record
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.figures.style import Picture
from lyapunov_lightning.training.results import Result
from tests.problems import whole_hessian
from tests.training_runs import train

STEPS = range(0, 100, 10)


def on_all(values: Sequence[float], converged: bool = True) -> list[Result]:
    return [
        ProbeResult(step=step, epoch=0.0, lambda_max=value, converged=converged)
        for step, value in zip(STEPS, values, strict=True)
    ]


def on_batch(eigenvalues: Sequence[float | None]) -> list[Result]:
    return [
        ProbeResult(step=step, epoch=0.0, lambda_max=eigenvalue, stability_limit=40.0, converged=True)
        for step, eigenvalue in zip(STEPS, eigenvalues, strict=True)
    ]


def along_gradients(sharpness: Sequence[float]) -> list[Result]:
    """Of two batches, one with a gradient three times as steep."""
    return [
        BatchesResult(step=step, epoch=0.0, slopes=(1.0, 3.0), curvatures=(0.0, 4.0 * value))
        for step, value in zip(STEPS, sharpness, strict=True)
    ]


def followed(eigenvalue: float) -> list[Result]:
    return [
        ProbeResult(step=step, epoch=0.0, inverse_h0=H0_CONVENTION / eigenvalue, exponent=1.0, converged=True)
        for step in STEPS
    ]


def record(*measured: list[Result], rate: float = 0.1) -> Record:
    """A run of a hundred steps."""
    return Record(steps=list(range(100)), losses=[1.0] * 100, learning_rates=[rate] * 100, measured=list(measured))


RUN = record(
    on_all([2.0] * 5 + [10.0] * 5),
    on_batch([None, 50.0] * 5),
    along_gradients([4.0] * 5 + [20.0] * 5),
    followed(12.0),
)


def test_each_curvature_counts_over_its_edge_in_the_second_half() -> None:
    runs = {"run": RUN}
    assert edge.over_edge(runs, "all", {"run": 2.0}) == {"run": pytest.approx(0.5)}
    assert edge.over_edge(runs, "sharpness", {"run": 0.2}) == {"run": pytest.approx(10.0)}
    assert edge.over_edge(runs, "batch", {"run": 2.0}) == {"run": pytest.approx(2.5)}
    assert edge.over_edge(runs, "algorithm", {"run": 2.0}) == {"run": pytest.approx(0.6)}
    assert edge.at_measured_edge(runs, ["run"]) == {"run": pytest.approx(0.5)}


def test_the_papers_number_is_in_its_own_convention() -> None:
    """With 1/h0 = (e − 1)/λ_max, an eigenvalue at 2/α is a 1/h0 at 0.86 α."""
    at_edge = record(on_all([20.0] * 10), on_batch([20.0] * 10), along_gradients([20.0] * 10), followed(20.0))
    assert edge.inverse_h0_over_rate({"run": at_edge}, ["run"]) == {"run": pytest.approx(H0_CONVENTION / 2)}


def test_growth_and_ratios() -> None:
    twice = record(on_all([20.0] * 10), on_batch([20.0] * 10), along_gradients([20.0] * 10), rate=0.2)
    runs = {"run": RUN, "twice": twice}
    assert edge.growth(runs, "sharpness", ["run", "twice"]) == {"run": pytest.approx(5.0), "twice": pytest.approx(1.0)}
    assert edge.ratios(runs, "all", [("run", "twice")]) == {"run / twice": pytest.approx(0.25)}
    assert edge.one_over_another(runs, "algorithm", "all", ["run"]) == {"run": pytest.approx(1.2)}


def test_what_was_not_measured_or_has_not_converged_is_not_known() -> None:
    runs = {"run": record(on_all([20.0] * 10, converged=False)), "other": RUN}
    assert edge.over_edge(runs, "all", {"run": 2.0}) == {"run": None}
    assert edge.inverse_h0_over_rate(runs, ["run"]) == {"run": None}
    assert edge.growth(runs, "sharpness", ["run"]) == {"run": None}
    assert edge.ratios(runs, "all", [("run", "other"), ("other", "run")]) == {"run / other": None, "other / run": None}
    assert edge.one_over_another(runs, "algorithm", "all", ["run"]) == {"run": None}


def test_only_many_values_are_smoothed() -> None:
    few = [1.0, 9.0, 1.0]
    assert edge.smooth(few) == few
    assert max(edge.smooth([1.0] * 60 + [9.0] + [1.0] * 60)) == 1.0


def test_courses_are_drawn() -> None:
    runs = {"with momentum": [RUN, RUN], "without": [RUN, RUN]}
    edges = {"with momentum": {"small batches": 0.2, "large batches": 3.8}}
    picture = edge.courses(runs, columns=2, edges=edges)
    assert isinstance(picture, Picture)


class FewImages(pl.LightningDataModule):
    """Twelve of them in batches of four, in memory as the examples' images are."""

    batch_size = 4

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        self.train_set = TensorDataset(images, torch.randint(3, (12,), generator=generator))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size)


@pytest.mark.filterwarnings("ignore:.*no logger")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_measured_curvatures_are_those_of_dense_hessians() -> None:
    torch.manual_seed(0)
    module = Classifier(MLP(in_features=5, hidden=[4], num_classes=3, activation="tanh"), num_classes=3).double()
    data = FewImages()
    data.setup("fit")
    images, labels = data.train_set.tensors
    shapes = {name: parameter.shape for name, parameter in module.network.named_parameters()}

    def gradient_and_hessian(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = parameters_to_vector(module.network.parameters()).detach().requires_grad_()
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        outputs = torch.func.functional_call(module.network, values, (images[chosen],))
        loss = torch.nn.functional.cross_entropy(outputs, labels[chosen])
        (gradient,) = torch.autograd.grad(loss, flat, retain_graph=True)
        return gradient, whole_hessian(loss, flat)[1]

    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    dense = [gradient_and_hessian(chosen) for chosen in order.split(4)]
    _, everything = gradient_and_hessian(torch.arange(12))
    before = parameters_to_vector(module.network.parameters()).clone()

    batches = BatchesAtOnce(every_n_steps=1)
    probe = CurvatureProbe(every_n_steps=1, tol=1e-9, hessian={"loss_fn": edge.loss_on_all_images})
    train(module, batches, probe, loader=data, max_steps=1)

    (measured,), (on_all,) = batches.results, probe.results
    assert measured.slopes == pytest.approx([float(gradient @ gradient) for gradient, _ in dense], rel=1e-9)
    assert measured.curvatures == pytest.approx([float(g @ hessian @ g) for g, hessian in dense], rel=1e-9)
    assert measured.sharpness == pytest.approx(sum(measured.curvatures) / sum(measured.slopes))
    assert on_all.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(everything)[-1]), rel=1e-6)
    assert not torch.equal(before, parameters_to_vector(module.network.parameters()))  # the run went on

    few = BatchesAtOnce(every_n_steps=1, num_batches=2)
    train(module, few, loader=data, max_steps=1)
    assert len(few.results[0].slopes) == 2


def test_batches_without_gradients_have_no_sharpness() -> None:
    assert BatchesResult(step=0, epoch=0.0, slopes=(0.0,), curvatures=(0.0,)).sharpness is None
