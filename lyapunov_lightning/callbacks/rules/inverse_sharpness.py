"""The learning rate of the chaos-theory paper: the inverse of the largest eigenvalue, followed by Algorithm 1."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.rules.base import Proposal, Rule, Situation
from lyapunov_lightning.curvature.acting.step_length import CheckedSharpness
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.optimizers.requirements import gain_of_momentum

_DELTA_Q = 5e-2
"""Length of the perturbation of Algorithm 1, in parameter space."""

_MAX_WARMUP = 50
"""The most iterations of Algorithm 1 at the initial point."""


class InverseSharpness(Rule):
    """The paper's ``1/h0``, where every estimate is compared with the curvature along the gradient.

    "A chaos theory approach to understand neural network optimization", sec. 3.1 and Algorithm 1.
    """

    method: ClassVar[Method | None] = "finite_difference"  # the algorithm is one of gradients at two places

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._sharpness = CheckedSharpness(_DELTA_Q, seed)

    @override
    def check(self, owner: str, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise MisconfigurationException(
                f"`{owner}(rule='inverse_sharpness')` is the paper's rule for SGD: the largest eigenvalue of the"
                f" Hessian says nothing of the steps of {type(optimizer).__name__}. Use `rule='along_update'`, or"
                " `force=True` to see what comes of it."
            )

    @override
    def measure(self, given: Situation) -> Proposal:
        hessian = given.hessian
        with given.progress() as report:

            def gradient(displacement: Tensor) -> Tensor:
                there = hessian.gradient(displacement)
                report()
                return there

            # One tracked vector starts at random: at the initial point, where no step waits for it, it may settle.
            max_iterations = _MAX_WARMUP if given.is_first else 0
            sharpness = self._sharpness.settle(gradient, hessian.gradient(), max_iterations, hessian.space)
        if sharpness is None:
            # No positive curvature. At the first step there is no learning rate yet, which is a failure; later the one
            # that was found before stays in use.
            return Proposal(None, {"converged": not given.is_first})
        inverse_h0 = H0_CONVENTION / sharpness.value
        # With momentum m a lasting gradient moves the parameters 1/(1 − m) times as far: the paper's rate is for plain
        # SGD.
        lr = inverse_h0 / gain_of_momentum(given.optimizer)
        return Proposal(
            lr,
            {
                "proposed": lr,
                "lambda_max": sharpness.value,
                "inverse_h0": inverse_h0,
                "exponent": sharpness.exponent,
                "curvature_along_gradient": sharpness.along_gradient,
                "refuted": sharpness.was_refuted,
            },
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._sharpness.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._sharpness.load_state_dict(state)
