"""The first learning rate: how far the loss falls along the first update."""

from lyapunov_lightning.callbacks.rules.base import Proposal, Situation
from lyapunov_lightning.curvature.acting.step_length import longest_descent
from lyapunov_lightning.training.optimizers.requirements import gain_of_momentum
from lyapunov_lightning.training.optimizers.updates import slope_and_curvature


def first_rate(given: Situation, share: float) -> Proposal:
    """The first learning rate, from slope and curvature along the first update, tried on the loss.

    Args:
        given: With the update that the optimizer makes in this step.
        share: The learning rate, as a share of the longest step along the first update at which the loss falls.

    """
    update, hessian = given.update, given.hessian
    assert update is not None
    slope, curvature = slope_and_curvature(hessian, update.vector, given.optimizer)
    longest, trials = longest_descent(
        lambda lr: hessian.value(update.vector * lr), hessian.value(), slope=slope, curvature=curvature
    )
    # An update uphill, or a loss that rises however short the step: the optimizer's own learning rate stays, and the
    # next measured step is tried.
    if longest is None:
        return Proposal(None, {"converged": False, "trials": trials})
    # With momentum m the steps grow to 1 / (1 - m) times the first one while the gradient lasts.
    return Proposal(
        share * longest / gain_of_momentum(given.optimizer),
        {
            "proposed": longest,
            "slope_along_update": slope,
            "curvature_along_update": curvature,
            "trials": trials,
        },
    )
