"""What the batches say: a loss that is not finite fails the mean, and numbers of samples that contradict are named."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import (
    CurvatureWarning,
    GaussNewtonOperator,
    HessianOperator,
    NonFiniteCurvatureError,
    lanczos,
)
from lyapunov_lightning.curvature.loss.fixed_batches import numbers_of_samples
from tests.curvature.helpers import METHODS, every_method, random_vectors, vector

# One batch has no label that counts: the mean over none is NaN, and its gradient is zero.

IGNORED = -100


def labelled() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    labels = torch.arange(4) % 3
    batches = [(random_vectors(4, 4, seed), labels) for seed in range(2)]
    return nn.Linear(4, 3).double(), [*batches, (batches[0][0], torch.full((4,), IGNORED))]


@every_method
def test_a_loss_that_is_not_finite_makes_products_and_gradients_nan(how: str) -> None:
    model, batches = labelled()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    gradient = torch.autograd.grad(loss(batches[2]), list(model.parameters()))
    assert all(bool(entry.isfinite().all()) for entry in gradient)  # so nothing else shows it
    options = METHODS[how] | ({"step": 1e-5} if how == "finite_difference" else {})
    whole = HessianOperator(loss, model.parameters(), batches, **options)
    for _ in range(2):
        assert whole.matvec(vector(whole.size)).isnan().all()
        assert whole.gradient().isnan().all()
    with pytest.raises(NonFiniteCurvatureError):
        lanczos(whole)
    assert math.isnan(whole.value())
    without = HessianOperator(loss, model.parameters(), batches[:2], **options)
    assert without.matvec(vector(whole.size)).isfinite().all()


def test_a_loss_that_is_not_finite_fails_gauss_newton() -> None:
    model, batches = labelled()
    operator = GaussNewtonOperator(
        lambda batch: model(batch[0]),
        lambda scores, batch: functional.cross_entropy(scores, batch[1]),
        model.parameters(),
        batches,
    )
    with pytest.raises(NonFiniteCurvatureError):
        lanczos(operator)
    assert operator.gradient().isnan().all()


# Numbers of samples.


def samples(count: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.ones(3), "y": torch.ones(())} for _ in range(count)]


CONTRADICTING: dict[str, list[Any]] = {
    "class weights first": [(torch.ones(3), torch.ones(n, 4), torch.ones(n)) for n in (20, 7)],
    "features first": [(torch.ones(4, n), torch.ones(n)) for n in (20, 7)],
    "detections": [(torch.ones(n, 3), [{"boxes": torch.ones(k, 4)} for k in range(2, 5)]) for n in (3, 5)],
    "a list of samples": [samples(20), samples(7)],
    "nodes and graphs": [{"x": torch.ones(n, 2), "edges": torch.ones(2, 9), "y": torch.ones(4)} for n in (30, 50)],
    "one sample first": [(torch.ones(1, 4), torch.ones(n)) for n in (20, 7)],
}


@pytest.mark.parametrize("name", CONTRADICTING)
def test_numbers_of_samples_that_contradict_each_other_are_named_with_the_remedy(name: str) -> None:
    weight = vector(2).requires_grad_()
    batches = CONTRADICTING[name]
    with pytest.warns(CurvatureWarning, match=r"contradict each other.*\d+, \d+.*Give `weights`"):
        HessianOperator(lambda batch: weight.square().sum(), [weight], batches)
    with pytest.warns(CurvatureWarning, match="contradict each other"):
        GaussNewtonOperator(lambda batch: weight, lambda z, batch: z.square().sum(), [weight], batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianOperator(lambda batch: weight.square().sum(), [weight], batches, weights=[20, 7])


@pytest.mark.parametrize(
    "batches",
    [
        [(torch.ones(n, 4), torch.ones(n)) for n in (20, 7)],
        [(torch.ones(n, 4), torch.ones(n), torch.ones(1), torch.ones(())) for n in (20, 7)],
        [(torch.ones(3), torch.ones(20, 4), torch.ones(20))] * 2,
        [{"x": torch.ones(n, 4), "names": ["a"] * n} for n in (20, 7)],
    ],
    ids=["pairs", "numbers for all samples", "equal batches", "texts"],
)
def test_numbers_of_samples_that_agree_or_do_not_matter_are_taken_without_a_word(batches: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(numbers_of_samples(batches)) == len(batches)
