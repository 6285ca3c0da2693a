"""Spectra, and what eigenpairs found by a solver have to satisfy."""

import torch
from torch import Tensor

from lyapunov_lightning.curvature import Eigenpairs
from tests.curvature.helpers import both_ends, random_vectors


def uniform(count: int, low: float, high: float, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low).tolist()


def normal(count: int, seed: int = 0) -> list[float]:
    return random_vectors(1, count, seed)[0].tolist()


def rounding(matrix: Tensor) -> float:
    """What a dense solver, a dense product and an eigenpair in this dtype may be off by."""
    return 10 * len(matrix) ** 0.5 * torch.finfo(matrix.dtype).eps * float(torch.linalg.matrix_norm(matrix.double(), 2))


def assert_honest(pairs: Eigenpairs, matrix: Tensor, tol: float) -> None:
    """The vectors are orthonormal, the residuals true bounds, and `converged` says what it should.

    The norms drift from 1 by some rounding at each restart, of which there may be hundreds.
    """
    vectors = pairs.vectors.double()
    eye = torch.eye(len(vectors), dtype=torch.float64)
    assert float((vectors @ vectors.T - eye).abs().max()) <= 5000 * torch.finfo(matrix.dtype).eps
    residuals = torch.linalg.vector_norm(matrix.double() @ vectors.T - vectors.T * pairs.values, dim=0)
    slack = rounding(matrix)
    assert bool((residuals <= pairs.residuals + slack).all())
    negligible = min(1e-8, tol / 100) * float(torch.linalg.matrix_norm(matrix.double(), 2))  # as documented
    wanted = (tol * pairs.values.abs()).clamp_min(negligible) + slack
    assert bool((residuals <= wanted)[pairs.converged].all())
    assert bool((pairs.largest.diff() <= slack).all())
    assert bool((pairs.smallest.diff() >= -slack).all())
    assert pairs.values.dtype == pairs.residuals.dtype == torch.float64


def assert_right(pairs: Eigenpairs, matrix: Tensor, tol: float) -> None:
    """All that, and each value is the one of its rank, counted with multiplicity."""
    assert_honest(pairs, matrix, tol)
    assert bool(pairs.converged.all())
    expected = both_ends(matrix, len(pairs.largest), len(pairs.smallest))
    # A residual bounds the distance to an eigenvalue; those that are nearer to each other than the tolerance, it
    # cannot tell apart.
    allowed = pairs.residuals + tol * expected.abs() + rounding(matrix)
    assert bool(((pairs.values - expected).abs() <= allowed).all()), (pairs.values, expected)
