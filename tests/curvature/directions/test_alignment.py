"""Gradient alignment and subspace overlap against dense linear algebra."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import Eigenpairs, HessianOperator, lanczos
from lyapunov_lightning.curvature.directions.alignment import gradient_alignment, subspace_overlap
from lyapunov_lightning.curvature.tracking.subspace import KeptSubspace
from tests.curvature.helpers import random_vectors

SIZE = 12


def orthonormal(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random_vectors(count, size, seed).T).Q.T.contiguous()


def quartic(batches: list[Tensor]) -> tuple[HessianOperator, list[Tensor]]:
    """The Hessian of a loss with a gradient of its own in each batch, and these gradients."""
    parameter = torch.linspace(-1, 1, SIZE, dtype=torch.float64).requires_grad_()

    def loss(batch: Tensor) -> Tensor:
        return ((batch * parameter).sum(dim=1) ** 4 + (batch * parameter**2).sum(dim=1)).mean()

    gradients = [torch.autograd.grad(loss(batch), parameter)[0] for batch in batches]
    return HessianOperator(loss, [parameter], batches), gradients


@pytest.mark.parametrize(("largest", "smallest"), [(3, 0), (2, 2), (0, 3)])
@pytest.mark.parametrize("max_batches", [None, 2], ids=["all", "two"])
def test_alignment_is_the_mean_over_the_batches(largest: int, smallest: int, max_batches: int | None) -> None:
    batches = [random_vectors(count, SIZE, seed=count) for count in (5, 3, 7, 1)]  # each counts once, whatever its size
    operator, gradients = quartic(batches)
    pairs = lanczos(operator, largest=largest, smallest=smallest)
    alignment = gradient_alignment(operator, pairs, max_batches)
    unit = torch.stack([gradient / gradient.norm() for gradient in gradients[:max_batches]])
    cosines = (unit @ pairs.vectors.T).abs()
    assert alignment.largest == pytest.approx(cosines[:, :largest].mean(dim=0).tolist(), rel=1e-12)
    assert alignment.smallest == pytest.approx(cosines[:, largest:].mean(dim=0).tolist(), rel=1e-12)
    if largest:
        inside = float(cosines[:, :largest].square().sum(dim=1).mean())
        assert alignment.in_top_subspace == pytest.approx(inside, rel=1e-12)
        assert alignment.in_random_subspace == largest / SIZE
    else:
        assert alignment.in_top_subspace is alignment.in_random_subspace is None


def test_a_gradient_inside_of_the_span_has_all_of_its_norm_there() -> None:
    operator, gradients = quartic([random_vectors(4, SIZE)])
    others = orthonormal(SIZE - 1, seed=3)
    basis = torch.linalg.qr(torch.cat([gradients[0][None], others]).T).Q.T
    alignment = gradient_alignment(operator, pairs_of(basis[:2]))
    assert alignment.in_top_subspace == pytest.approx(1)
    assert alignment.largest == pytest.approx((1, 0), abs=1e-12)
    beside = gradient_alignment(operator, pairs_of(basis[2:4]))
    assert beside.in_top_subspace == pytest.approx(0, abs=1e-12)


def test_a_gradient_of_zero_has_cosines_of_zero() -> None:
    parameter = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(lambda batch: (batch * parameter**2).sum(), [parameter], [torch.ones(1, SIZE)])
    alignment = gradient_alignment(operator, pairs_of(orthonormal(2)))
    assert alignment.largest == (0, 0)
    assert alignment.in_top_subspace == 0


def pairs_of(vectors: Tensor) -> Eigenpairs:
    zeros = torch.zeros(len(vectors), dtype=torch.float64)
    return Eigenpairs(zeros, vectors, zeros, zeros, zeros, zeros == 0, 0, len(vectors), vectors[0])


@pytest.mark.parametrize(("num_old", "num_new"), [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(num_old: int, num_new: int) -> None:
    old, new = orthonormal(num_old, seed=1), orthonormal(num_new, seed=2)
    cosines = torch.linalg.svdvals(old @ new.T)
    assert len(cosines) == min(num_old, num_new)
    assert subspace_overlap(old, new) == pytest.approx(float(cosines.square().mean()), rel=1e-12)
    assert subspace_overlap(new, old) == pytest.approx(subspace_overlap(old, new), rel=1e-12)


def test_overlap_knows_subspaces_and_not_bases() -> None:
    vectors = orthonormal(6)
    rotation = orthonormal(3, 3)
    assert subspace_overlap(vectors[:3], rotation @ vectors[:3]) == pytest.approx(1)
    assert subspace_overlap(vectors[:3], vectors[:5]) == pytest.approx(1)  # one holds the other
    assert subspace_overlap(vectors[:3], vectors[3:]) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(vectors[:4], vectors[3:5]) == pytest.approx(0.5)


def test_overlap_of_random_subspaces_is_the_dimension_over_the_size() -> None:
    found = [subspace_overlap(orthonormal(5, 200, seed), orthonormal(5, 200, 1000 + seed)) for seed in range(50)]
    assert sum(found) / 50 == pytest.approx(5 / 200, rel=0.1)


@pytest.mark.parametrize(
    ("old", "new", "shapes"),
    [((0, 4), (2, 4), r"\(0, 4\) and \(2, 4\)"), ((2, 4), (0, 4), r"\(0, 4\)"), ((2, 4), (2, 5), r"\(2, 5\)")],
)
def test_overlap_names_shapes_that_do_not_fit(old: Any, new: Any, shapes: str) -> None:
    with pytest.raises(ValueError, match=shapes):
        subspace_overlap(torch.ones(old), torch.ones(new))


def test_kept_subspace_moves_on_or_stays() -> None:
    spans = [orthonormal(3, seed=seed) for seed in range(4)]
    last, first = KeptSubspace(), KeptSubspace(moves_on=False)
    for index, span in enumerate(spans):
        overlaps = last.compare(span), first.compare(span)
        if index == 0:
            assert overlaps == (None, None)
        else:
            assert overlaps[0] == pytest.approx(subspace_overlap(spans[index - 1], span), abs=1e-2)  # half precision
            assert overlaps[1] == pytest.approx(subspace_overlap(spans[0], span), abs=1e-2)


@pytest.mark.parametrize("moves_on", [True, False])
def test_kept_subspace_begins_anew_with_other_parameters(moves_on: bool) -> None:
    kept, span = KeptSubspace(moves_on=moves_on), orthonormal(3, size=9)
    kept.compare(orthonormal(3))
    assert kept.compare(span) is None
    assert kept.compare(span) == pytest.approx(1, abs=1e-2)
    assert kept.compare(span[:0]) is None  # and keeps what there was
    assert kept.compare(span[:2]) == pytest.approx(1, abs=1e-2)


def test_kept_subspace_goes_on_from_its_state() -> None:
    kept, restored = KeptSubspace(), KeptSubspace()
    restored.load_state_dict(kept.state_dict())
    assert restored.compare(orthonormal(3)) is None
    kept.compare(orthonormal(3).float())
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["vectors"].dtype is torch.bfloat16  # no burden on the checkpoint
    restored.load_state_dict(state)
    later = orthonormal(3, seed=1).float()
    assert restored.compare(later) == kept.compare(later)
