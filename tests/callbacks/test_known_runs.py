"""Trainings of which the cause is known: a few of those of `benchmarks/known_runs`, each with what shows the cause."""

import warnings
from dataclasses import replace

import pytest

from benchmarks.known_runs.training import ALL, Fault, Run, eigenvalue_over_limit, train
from benchmarks.known_runs.watching import watch

RAISED = Run("digits as numbers", "momentum", 32, 3, rate=0.05, steps=120, raised=(100, 100), resumed=50)
SHIFTED = Run("clusters", "momentum", 32, 3, rate=0.01, steps=100, fault=Fault("shifted", 61, 3, 10.0))
CLIPPED = Run("diabetes", "SGD", 32, 3, rate=1.5, steps=80, clip=0.1)
ACCUMULATED = Run("diabetes", "SGD", 8, 3, rate=0.9, steps=80, accumulate=4)
ANNEALED = Run("diabetes", "SGD", 32, 3, rate=0.02, steps=100, is_annealed=True)
ADAM = Run("digits", "AdamW", 32, 3, rate=0.001, steps=100)
RUNS = [
    # The kind, the run, and the same without the cause, or at a learning rate that the diagnosis would recommend.
    ("too_fast", ACCUMULATED, replace(ACCUMULATED, rate=0.3)),
    ("too_fast_later", RAISED, replace(RAISED, raised=None)),
    ("data_fault", SHIFTED, replace(SHIFTED, fault=None)),
    ("clipped", CLIPPED, replace(CLIPPED, rate=0.3)),
    ("room", ANNEALED, replace(ANNEALED, rate=0.06)),
    ("room", ADAM, replace(ADAM, rate=0.004)),
]


@pytest.mark.parametrize(("kind", "run", "better"), RUNS, ids=[f"{kind}-{run.optimizer}" for kind, run, _ in RUNS])
def test_the_sentence_names_the_cause(kind: str, run: Run, better: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = watch(run).diagnosis()
    assert found.kind == kind
    # That it is the cause: without it the run gets further, or as far where it has recovered.
    assert train(better)[1] < (1.1 if kind == "clipped" else 1.0) * train(run)[1]
    if kind == "clipped":
        assert train(replace(run, clip=None))[1] > train(run)[0][0]


def test_what_makes_a_run_one_at_the_edge_is_the_largest_eigenvalue_over_the_limit():
    """Where a network hardly moves its curvature stays, and the limit is in inverse proportion to the rate."""
    run = Run("diabetes", "SGD", ALL, 3, rate=1e-6, steps=80)
    slow, fast = (eigenvalue_over_limit(replace(run, rate=rate)) for rate in (1e-6, 3e-6))
    assert 0 < slow == pytest.approx(fast / 3, rel=1e-3)
