"""Extreme eigenvalues of a made-up step, against dense ones."""

import math
from typing import Any

import pytest
import torch

from lyapunov_lightning.callbacks.estimators import ESTIMATORS, EstimatorSettings
from tests.callbacks.estimators.made_up import SPECTRUM, MadeUpRun, Valley

EIGENVALUES = ["lanczos", "power"]


def run_of(name: Any, optimizer: Any, module: Valley, **settings: Any) -> MadeUpRun:
    estimator = ESTIMATORS[name](EstimatorSettings(**settings))
    return MadeUpRun(estimator, module, *([] if optimizer is None else [optimizer]))


@pytest.mark.parametrize("name", EIGENVALUES)
@pytest.mark.parametrize("end", ["largest", "smallest", "both"])
def test_eigenvalues_are_those_of_the_dense_hessian_at_each_step(name: str, end: Any) -> None:
    module = Valley(quartic=0.05)
    run = run_of(name, torch.optim.SGD(module.parameters(), lr=0.05), module, end=end, tol=1e-4)
    for index in range(4):
        dense = torch.linalg.eigvalsh(module.hessian())
        found = run.step()
        assert (found.step, found.learning_rate, found.stability_limit) == (index, 0.05, 2 / 0.05)
        if end != "smallest":
            assert found.lambda_max == pytest.approx(float(dense[-1]), rel=1e-4)
            assert found.inverse_h0 == pytest.approx((math.e - 1) / found.lambda_max)
            assert found.stability_ratio == pytest.approx(found.lambda_max * 0.05 / 2)
        if end != "largest":
            assert found.lambda_min == pytest.approx(float(dense[0]), rel=1e-4)
        assert (found.lambda_max is None, found.lambda_min is None) == (end == "smallest", end == "largest")
        assert (found.residual_min is not None, found.value_error_min is not None) == (end == "both", end == "both")
        assert found.converged
    assert run.moments == ["start"] * 4
    assert not run.warned


@pytest.mark.parametrize("name", EIGENVALUES)
def test_of_an_adaptive_optimizer_the_preconditioned_eigenvalue_counts(name: str) -> None:
    module = Valley(quartic=0.05)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    run = run_of(name, optimizer, module, tol=1e-5)
    for count in range(1, 5):
        # The moments in which the gradient of the step is counted, as the optimizer is about to divide by them.
        kept = [optimizer.state.get(p, {}).get("exp_avg_sq", torch.zeros_like(p)) for p in module.parameters()]
        moments = 0.99 * torch.cat([part.reshape(-1) for part in kept]) + 0.01 * module.gradient().square()
        scale = ((moments / (1 - 0.99**count)).sqrt() + 1e-8).rsqrt()
        dense = module.hessian()
        found = run.step()
        expected = float(torch.linalg.eigvalsh(scale[:, None] * dense * scale)[-1])
        assert found.preconditioned_lambda_max == pytest.approx(expected, rel=1e-4)
        assert found.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
        assert found.stability_limit == pytest.approx(2 * 1.9 / (0.1 * 0.01))
        assert found.stability_ratio == pytest.approx(expected / found.stability_limit, rel=1e-4)


@pytest.mark.parametrize("name", EIGENVALUES)
def test_a_later_search_starts_from_what_was_kept(name: str) -> None:
    # Larger than a Krylov space that settles, with parameters that stay where they are.
    module = Valley(spectrum=[*SPECTRUM, *torch.linspace(-1, 1, 52).tolist()])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-12)
    run = run_of(name, optimizer, module)
    first = run.step()
    resumed = run_of(name, optimizer, module)
    for part, kept in run._estimator.parts().items():
        resumed._estimator.parts()[part].load_state_dict(kept.state_dict())
    resumed._trainer.global_step = 1
    later = run.step()
    assert resumed.step() == later
    assert later.matvecs < first.matvecs


@pytest.mark.parametrize("name", EIGENVALUES)
def test_without_an_optimizer_whose_limit_is_known_there_is_none(name: str) -> None:
    found = run_of(name, None, Valley()).step()
    assert (found.learning_rate, found.stability_limit, found.stability_ratio) == (None, None, None)
    assert found.lambda_max == pytest.approx(9.0, rel=2e-2)
    module = Valley()
    run = run_of(name, torch.optim.Adadelta(module.parameters(), lr=0.1), module)
    found = run.step()
    assert (found.learning_rate, found.stability_limit) == (0.1, None)
    [warned] = run.warned
    assert "the stability limit of Adadelta is not known" in warned


@pytest.mark.parametrize("name", EIGENVALUES)
def test_a_negative_largest_eigenvalue_has_no_learning_rate(name: str) -> None:
    module = Valley(spectrum=[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -12.0])
    found = run_of(name, torch.optim.SGD(module.parameters(), lr=0.1), module, tol=1e-4).step()
    assert found.lambda_max == pytest.approx(-1.0, rel=1e-3)
    assert found.inverse_h0 is None
