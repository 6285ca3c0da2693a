"""Lyapunov exponents along made-up steps, against dense eigenvalues and closed forms."""

import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lyapunov_lightning.callbacks.estimators import EstimatorSettings, LyapunovExponents
from tests.callbacks.estimators.made_up import MadeUpRun, Valley


def run_of(optimizer: Any = None, module: Any = None, **settings: Any) -> MadeUpRun:
    """A run at a learning rate at which the parameters stay where they are, unless an optimizer is given."""
    module = module or Valley()
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1e-9)
    return MadeUpRun(LyapunovExponents(EstimatorSettings(**settings)), module, optimizer)


def last_of(run: MadeUpRun, steps: int) -> Any:
    return [run.step() for _ in range(steps)][-1]


def test_the_exponent_of_ascent_settles_on_the_largest_eigenvalue() -> None:
    run = run_of(iterations=5, tol=1e-3, delta_q=1e-3)
    first, found = run.step(), last_of(run, 12)
    assert not first.converged
    assert found.converged
    assert found.lambda_max == pytest.approx(9.0, rel=1e-4)
    assert found.exponent == pytest.approx(1.0, abs=1e-2)
    assert found.inverse_h0 == pytest.approx((math.e - 1) / 9.0, rel=1e-2)
    assert found.residual <= 1e-3 * found.lambda_max
    assert found.matvecs == 5
    assert found.stability_ratio == pytest.approx(9.0 * 1e-9 / 2, rel=1e-4)


def test_the_perturbation_has_the_length_that_was_asked_for() -> None:
    # Along an axis the gradient of x² a/2 + c x⁴ is a x + 4c x³: over a distance d the curvature looks like a + 4c d².
    module = Valley(quartic=2.0, spectrum=[5.0, 1.0, 1.0, 1.0])
    module.matrix = torch.diag(torch.tensor([5.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        module.first.zero_()
        module.second.zero_()
    for length in (0.1, 0.5):
        found = run_of(torch.optim.SGD(module.parameters(), lr=1e-9), module, iterations=80, delta_q=length).step()
        assert found.lambda_max == pytest.approx(5 + 8 * length**2, rel=1e-3)


def test_the_steps_own_gradient_is_waited_for_until_it_turns_out_to_be_another_one() -> None:
    run = run_of()
    last_of(run, 3)
    assert run.moments == ["gradient"] * 3

    class Scaled(Valley):
        def loss(self, batch: Any = None) -> Any:
            # What the training differentiates is three times what is measured.
            return super().loss(batch) * (3 if batch is None else 1)

    run = run_of(module=Scaled(), iterations=60, delta_q=1e-3)
    found = last_of(run, 3)
    assert run.moments == ["gradient", "start", "start"]
    assert found.lambda_max == pytest.approx(9.0, rel=1e-3)


def test_fixed_data_and_several_processes_have_no_gradient_to_wait_for() -> None:
    run = run_of(own_batch=False)
    run.step()
    other = run_of()
    other._trainer.world_size = 2
    assert other._estimator.begin(other.at()) == "start"
    assert run.moments == ["start"]


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_the_training_map_has_the_smallest_eigenvalue_and_the_growth_of_heavy_ball(momentum: float) -> None:
    module, lr = Valley(), 0.1
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
    run = run_of(optimizer, module, end="smallest", iterations=60, tol=1e-3)
    found = run.step()
    assert found.lambda_min == pytest.approx(-6.0, rel=1e-3)
    assert found.lambda_max is None
    # the larger root of μ² - (1 + m - αh) μ + m = 0
    trace = 1 + momentum + lr * 6.0
    growth = (trace + math.sqrt(trace**2 - 4 * momentum)) / 2
    assert found.exponent == pytest.approx(math.log(growth), rel=1e-3)


def test_both_ends_are_followed_by_a_map_of_their_own() -> None:
    module = Valley()
    found = last_of(run_of(torch.optim.SGD(module.parameters(), lr=0.1), module, end="both", iterations=60), 2)
    dense = torch.linalg.eigvalsh(module.hessian())
    assert (found.lambda_max, found.lambda_min) == pytest.approx((float(dense[-1]), float(dense[0])), rel=1e-2)
    assert None not in (found.exponent, found.exponent_sgd, found.residual_min)
    assert found.matvecs == 120


def test_with_a_learning_rate_of_zero_the_training_map_moves_nothing() -> None:
    module = Valley()
    assert run_of(torch.optim.SGD(module.parameters(), lr=0.0), module, end="smallest").step() is None


def test_what_is_followed_goes_on_from_its_state() -> None:
    whole, part = run_of(iterations=2), run_of(iterations=2)
    last_of(whole, 3)
    last_of(part, 3)
    other = run_of(module=part.module, iterations=2)
    for name, kept in part._estimator.parts().items():
        other._estimator.parts()[name].load_state_dict(kept.state_dict())
    other._trainer.global_step = 3
    assert other.step() == whole.step()


def test_a_limit_on_what_is_not_measured_is_left_out() -> None:
    module = Valley()
    run = run_of(torch.optim.Adam(module.parameters(), lr=1e-9), module)
    found = last_of(run, 3)
    assert found.lambda_max is not None
    assert (found.learning_rate, found.stability_limit) == (1e-9, None)


def test_the_training_map_of_another_optimizer_is_refused_and_ascent_is_not() -> None:
    module = Valley()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for end in ("smallest", "both"):
        with pytest.raises(MisconfigurationException, match=r"`CurvatureProbe` follows the map of SGD"):
            run_of(optimizer, module, end=end)
    run_of(optimizer, module)
