"""Trace, Frobenius norm and diagonal from random vectors, against the dense matrix."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import (
    Eigenpairs,
    NonFiniteCurvatureError,
    lanczos,
    spectral_density,
    stochastic_diagonal,
    stochastic_moments,
)
from tests.curvature.helpers import DenseOperator, symmetric_matrix


class DiagonalOperator(DenseOperator):
    """A diagonal matrix; to Gaussian vectors it is like any other of the same spectrum."""

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        return self._matrix * vector


def spectrum(outliers: list[float], seed: int = 0, size: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bulk = 0.2 * torch.rand(size - len(outliers), generator=generator, dtype=torch.float64).log().neg() - 0.1
    return torch.cat([torch.tensor(outliers, dtype=torch.float64), bulk])


def exact(diagonal: Tensor) -> Eigenpairs:
    """The eigenpairs of the first two entries."""
    pairs = lanczos(DiagonalOperator(diagonal), largest=2, max_matvecs=2)
    vectors = torch.eye(len(diagonal), dtype=torch.float64)[:2]
    return replace(pairs, values=diagonal[:2], vectors=vectors, converged=torch.ones(2, dtype=torch.bool))


def unconverged(diagonal: Tensor, seed: int) -> Eigenpairs:
    """Ritz pairs of a few products only."""
    pairs = lanczos(DiagonalOperator(diagonal), largest=2, max_matvecs=4, seed=seed)
    assert not bool(pairs.converged.all())
    return pairs


def wrong(diagonal: Tensor, seed: int) -> Eigenpairs:
    """Vectors beside the eigenvectors, and values that are not even theirs."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.eye(len(diagonal), dtype=torch.float64)[:2]
    vectors = vectors + 0.03 * torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(vectors.T).Q.T
    pairs = lanczos(DiagonalOperator(diagonal), largest=2, max_matvecs=4)
    return replace(pairs, values=1.2 * diagonal[:2], vectors=vectors, converged=torch.zeros(2, dtype=torch.bool))


KNOWN: dict[str, Callable[[Tensor, int], dict[str, Any]]] = {
    "blind": lambda diagonal, seed: {},
    "converged": lambda diagonal, seed: {"known": exact(diagonal)},
    "unconverged": lambda diagonal, seed: {"known": unconverged(diagonal, seed)},
    "wrong": lambda diagonal, seed: {"known": wrong(diagonal, seed)},
    "sketched": lambda diagonal, seed: {"sketch": 1},
}


@functools.cache
def case(known: str, outliers: tuple[float, ...], seed: int) -> tuple[Tensor, dict[str, Any]]:
    """A spectrum and what is known of it: the same for all numbers of probes, and dearer than the probes are."""
    diagonal = spectrum([*outliers], seed)
    return diagonal, KNOWN[known](diagonal, seed)


@pytest.mark.parametrize(
    ("num_probes", "known"),
    [*itertools.product((2, 20), KNOWN), *itertools.product((3,), ("blind", "unconverged"))],
)
@pytest.mark.parametrize("outliers", [[], [50.0], [50.0, 30.0, 10.0], [20.0, -30.0]], ids=["none", "one", "3", "both"])
def test_intervals_cover_trace_and_norm_in_92_of_100_cases(num_probes: int, known: str, outliers: list[float]) -> None:
    covered = {"trace": 0, "norm": 0}
    for seed in range(100):
        diagonal, options = case(known, tuple(outliers), seed)
        operator = DiagonalOperator(diagonal)
        moments = stochastic_moments(operator, num_probes=num_probes, seed=seed + 1000, **options)
        for name, estimate, value in (
            ("trace", moments.trace, float(diagonal.sum())),
            ("norm", moments.frobenius_norm, float(diagonal.norm())),
        ):
            low, high = estimate.interval
            covered[name] += low <= value <= high
        assert moments.num_matvecs == operator.num_matvecs
    assert min(covered.values()) >= 92, covered


def test_the_intervals_of_signs_cover_where_nothing_is_diagonal() -> None:
    covered = 0
    for seed in range(100):
        values = spectrum([50.0], seed, 60)
        moments = stochastic_moments(
            DenseOperator(symmetric_matrix(values, seed)), num_probes=8, seed=seed, probes="signs"
        )
        low, high = moments.trace.interval
        covered += low <= float(values.sum()) <= high
    assert covered >= 92


def test_signs_know_the_trace_of_a_diagonal_at_once() -> None:
    diagonal = spectrum([50.0, -3.0])
    found = stochastic_moments(DiagonalOperator(diagonal), num_probes=2, probes="signs")
    assert found.trace.value == pytest.approx(float(diagonal.sum()))
    assert found.trace.standard_error <= 1e-12


@pytest.mark.parametrize("how", ["known", "sketch"])
def test_outliers_that_are_known_or_sketched_reduce_the_error_by_much(how: str) -> None:
    matrix = symmetric_matrix(spectrum([50.0, 30.0, 10.0]))
    options: dict[str, Any] = {"sketch": 5} if how == "sketch" else {"known": lanczos(DenseOperator(matrix), largest=3)}
    blind = stochastic_moments(DenseOperator(matrix))
    found = stochastic_moments(DenseOperator(matrix), **options)
    assert found.trace.standard_error < 0.15 * blind.trace.standard_error
    assert found.frobenius_norm.standard_error < 0.1 * blind.frobenius_norm.standard_error
    assert blind.num_matvecs == 10
    assert found.num_matvecs == (20 if how == "sketch" else 10)


def test_a_sketch_of_the_whole_space_leaves_nothing_to_chance() -> None:
    diagonal = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    found = stochastic_moments(DiagonalOperator(diagonal), num_probes=2, sketch=10)
    assert found.trace.value == pytest.approx(2)
    assert found.frobenius_norm.value == pytest.approx(math.sqrt(14))
    assert found.trace.standard_error <= 1e-12


# Diagonal blocks.

BLOCKS = {"first": [slice(0, 30), slice(50, 70)], "rest": [slice(30, 50), slice(70, 200)], "none": []}


@pytest.mark.parametrize("known", ["blind", "converged", "unconverged", "wrong", "sketched"])
def test_intervals_cover_the_traces_of_blocks_and_these_add_up_to_the_trace(known: str) -> None:
    matrix, covered = symmetric_matrix(spectrum([50.0, 30.0, 10.0])), 0
    options: dict[str, Any] = {"sketch": 2} if known == "sketched" else {}
    if known in ("converged", "unconverged", "wrong"):
        bound = {"tol": 1e-9} if known == "converged" else {"max_matvecs": 3}
        options["known"] = lanczos(DenseOperator(matrix), largest=2, **bound)
        if known == "wrong":
            options["known"] = replace(options["known"], values=1.2 * options["known"].values)
    for seed in range(100):
        operator = DenseOperator(matrix)
        moments = stochastic_moments(operator, num_probes=5, seed=seed, blocks=BLOCKS, **options)
        assert sum(found.value for found in moments.trace_of.values()) == pytest.approx(moments.trace.value, rel=1e-8)
        assert moments.trace_of["none"].value == moments.trace_of["none"].standard_error == 0
        assert (
            moments.num_matvecs == operator.num_matvecs == 5 + {"sketched": 4, "blind": 0, "converged": 0}.get(known, 2)
        )
        for name in ("first", "rest"):
            low, high = moments.trace_of[name].interval
            covered += low <= sum(float(matrix.diagonal()[place].sum()) for place in BLOCKS[name]) <= high
    assert covered >= 184


def test_a_sketch_of_the_whole_space_leaves_nothing_of_the_blocks_to_chance() -> None:
    matrix = symmetric_matrix(torch.tensor([3.0, 1.0, -2.0, 0.5], dtype=torch.float64))
    blocks = {"first": [slice(0, 1)], "last": [slice(1, 4)]}
    found = stochastic_moments(DenseOperator(matrix), num_probes=2, sketch=10, blocks=blocks).trace_of
    assert found["first"].value == pytest.approx(float(matrix[0, 0]))
    assert found["last"].value == pytest.approx(float(matrix.diagonal()[1:].sum()))
    assert found["last"].standard_error <= 1e-12


# The diagonal.


def test_the_diagonal_is_within_its_errors() -> None:
    matrix = symmetric_matrix(spectrum([50.0, 30.0, 10.0]))
    found = stochastic_diagonal(DenseOperator(matrix), num_probes=60)
    errors = (found.value - matrix.diagonal()) / found.standard_error
    assert float(errors.square().mean().sqrt()) == pytest.approx(1, abs=0.15)
    assert found.num_samples == 60


def test_known_eigenpairs_make_the_diagonal_exact_but_for_the_bulk() -> None:
    matrix = symmetric_matrix(spectrum([50.0, 30.0, 10.0]))
    pairs = lanczos(DenseOperator(matrix), largest=3, tol=1e-8)
    blind, found = (stochastic_diagonal(DenseOperator(matrix), known=known) for known in (None, pairs))
    assert float((found.value - matrix.diagonal()).norm()) < 0.2 * float((blind.value - matrix.diagonal()).norm())
    assert float(found.standard_error.mean()) < 0.2 * float(blind.standard_error.mean())
    ignored = stochastic_diagonal(DenseOperator(matrix), known=replace(pairs, converged=torch.zeros(3).bool()))
    torch.testing.assert_close(ignored.value, blind.value)


def test_a_diagonal_matrix_is_known_from_two_products() -> None:
    diagonal = spectrum([50.0, -3.0]).float()
    found = stochastic_diagonal(DiagonalOperator(diagonal), num_probes=2)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, diagonal)
    assert float(found.standard_error.max()) == 0


# Together.

ESTIMATES: dict[str, Callable[[Any], Any]] = {
    "moments": lambda operator: stochastic_moments(operator, num_probes=6),
    "sketched": lambda operator: stochastic_moments(operator, num_probes=6, sketch=3),
    "diagonal": lambda operator: stochastic_diagonal(operator, num_probes=6),
    "density": lambda operator: spectral_density(operator, num_probes=3, num_steps=4),
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_product_that_is_not_finite_is_an_error(name: str, value: float) -> None:
    diagonal = spectrum([])
    diagonal[3] = value
    with pytest.raises(NonFiniteCurvatureError, match="not finite"):
        ESTIMATES[name](DiagonalOperator(diagonal))


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ESTIMATES)
def test_nothing_is_read_from_the_device_between_products(name: str) -> None:
    with Reads() as reads:
        at: list[int] = []

        class Watched(DiagonalOperator):
            def matvec(self, vector: Tensor) -> Tensor:
                at.append(reads.count)
                return super().matvec(vector)

        ESTIMATES[name](Watched(spectrum([])))
    assert len(at) >= 6
    assert at[-1] == at[0]


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_seed_determines_the_estimate_and_no_global_generator_is_used(name: str) -> None:
    before = torch.get_rng_state()
    first, second = (ESTIMATES[name](DiagonalOperator(spectrum([5.0]))) for _ in range(2))
    assert str(first) == str(second)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_operator_that_returns_its_own_storage_is_left_alone() -> None:
    class Lazy(DiagonalOperator):
        def matvec(self, vector: Tensor) -> Tensor:
            return self._matrix

    diagonal = spectrum([3.0])
    for estimated in ESTIMATES.values():
        operator = Lazy(diagonal.clone())
        estimated(operator)
        assert torch.equal(operator._matrix, diagonal)


def test_bad_arguments_are_named() -> None:
    operator = DiagonalOperator(spectrum([]))
    for estimated in (stochastic_moments, stochastic_diagonal):
        with pytest.raises(ValueError, match="`num_probes` should be an int of at least 2, got 1"):
            estimated(operator, num_probes=1)
    with pytest.raises(ValueError, match="`sketch` should be a non-negative int, got -1"):
        stochastic_moments(operator, sketch=-1)
    with pytest.raises(ValueError, match="`probes` should be one of gaussian, signs, got 'rademacher'"):
        stochastic_moments(operator, probes="rademacher")
