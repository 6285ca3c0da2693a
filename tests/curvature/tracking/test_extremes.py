"""Eigenvalues that are followed from one operator to the next similar one."""

import io

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker
from tests.curvature.helpers import DenseOperator, both_ends, relative_error, rng_state, symmetric_matrix

SIZE = 60


def drifting(steps: int, size: int = SIZE) -> list[Tensor]:
    """Matrices that change slowly, with both ends well apart from the rest."""
    start = symmetric_matrix([10.0, 7.0, *torch.linspace(-1, 1, size - 3).tolist(), -4.0], seed=0)
    change = symmetric_matrix(torch.linspace(-1, 1, size), seed=1)
    return [start + 0.02 * step * change for step in range(steps)]


@pytest.mark.parametrize("solver", ["lanczos", "power"])
@pytest.mark.parametrize(("end", "counts"), [("largest", (1, 0)), ("smallest", (0, 1)), ("both", (1, 1))])
def test_follows_the_ends_that_were_asked_for(solver: str, end: str, counts: tuple[int, int]) -> None:
    tracker = ExtremeTracker(solver, end, tol=1e-4)
    for matrix in drifting(4):
        pairs = tracker.measure(DenseOperator(matrix))
        assert relative_error(pairs.values, both_ends(matrix, *counts)) <= 1e-5
        assert (len(pairs.largest), len(pairs.smallest)) == counts
        assert bool(pairs.converged.all())
        residuals = matrix @ pairs.vectors.T - pairs.vectors.T * pairs.values
        assert (torch.linalg.vector_norm(residuals, dim=0) <= pairs.residuals * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("solver", ["lanczos", "power"])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_later_measurements_need_fewer_products(solver: str, end: str) -> None:
    tracker = ExtremeTracker(solver, end)
    operators = [DenseOperator(matrix) for matrix in drifting(5)]
    counts = [tracker.measure(operator).num_matvecs for operator in operators]
    assert counts == [operator.num_matvecs for operator in operators]
    assert max(counts[1:]) <= counts[0]
    assert min(counts[1:]) < counts[0]


@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_result_does_not_hang_on_an_old_direction(solver: str) -> None:
    # The old eigenvector is an exact one of the new matrix, of an eigenvalue that has become a small one.
    vectors = torch.linalg.qr(
        torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    values = torch.linspace(0.1, 1, SIZE, dtype=torch.float64)
    tracker = ExtremeTracker(solver, tol=1e-6)
    values[0] = 5.0
    tracker.measure(DenseOperator((vectors * values) @ vectors.T))
    values[0], values[1] = 0.05, 3.0
    pairs = tracker.measure(DenseOperator((vectors * values) @ vectors.T))
    assert float(pairs.largest) == pytest.approx(3.0)


@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_operator_may_change_its_size(solver: str) -> None:
    tracker = ExtremeTracker(solver, "both", tol=1e-4)
    for size in (SIZE, 20, 40):
        matrix = drifting(1, size)[0]
        pairs = tracker.measure(DenseOperator(matrix))
        assert relative_error(pairs.values, both_ends(matrix, 1, 1)) <= 1e-5


@pytest.mark.parametrize("solver", ["lanczos", "power"])
@pytest.mark.parametrize("measured", [0, 2])
def test_goes_on_from_its_state_bit_by_bit(solver: str, measured: int) -> None:
    matrices = drifting(4)
    straight = ExtremeTracker(solver, "both")
    for matrix in matrices[:measured]:
        straight.measure(DenseOperator(matrix))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = ExtremeTracker(solver, "both")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for matrix in matrices[measured:]:
        one, other = straight.measure(DenseOperator(matrix)), resumed.measure(DenseOperator(matrix))
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.vectors, other.vectors)
        assert one.num_matvecs == other.num_matvecs


@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_state_does_not_change_with_later_measurements(solver: str) -> None:
    tracker = ExtremeTracker(solver)
    first, second = drifting(2)
    tracker.measure(DenseOperator(first))
    state = tracker.state_dict()["start"]
    before = state.clone()
    tracker.measure(DenseOperator(second))
    assert torch.equal(state, before)


@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_random_numbers_are_its_own(solver: str) -> None:
    matrix = drifting(1)[0]
    before = rng_state()
    one = ExtremeTracker(solver, seed=3).measure(DenseOperator(matrix))
    assert rng_state() == before
    torch.manual_seed(99)
    other = ExtremeTracker(solver, seed=3).measure(DenseOperator(matrix))
    third = ExtremeTracker(solver, seed=4).measure(DenseOperator(matrix))
    assert torch.equal(one.vectors, other.vectors)
    assert not torch.equal(one.vectors, third.vectors)


def test_single_number_has_no_two_ends() -> None:
    operator = DenseOperator(torch.tensor([[3.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="size 1 has one eigenvalue: ask for the largest or the smallest"):
        ExtremeTracker(end="both").measure(operator)
    assert float(ExtremeTracker(end="smallest").measure(operator).values) == pytest.approx(3.0)
