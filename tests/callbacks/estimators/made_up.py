"""A step that is made up: a loss with its Hessian at hand, an optimizer, and no Trainer."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lyapunov_lightning.callbacks.estimators import Estimator, MeasuredStep, Moment
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import lanczos
from lyapunov_lightning.training.sharing import Step
from tests.curvature.helpers import symmetric_matrix

SPECTRUM = [9.0, 4.0, 2.0, 1.0, 0.5, 0.2, -0.5, -6.0]
"""Both ends well apart from the rest, as after some training."""


class Valley(nn.Module):
    """``xᵀAx/2 + c Σx⁴`` over two tensors; a quadratic without `quartic`."""

    def __init__(self, quartic: float = 0.0, spectrum: Any = SPECTRUM, seed: int = 0) -> None:
        super().__init__()
        self.matrix = symmetric_matrix(spectrum, seed)
        self.quartic = quartic
        start = torch.randn(len(spectrum), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        self.first = nn.Parameter(start[:3].clone())
        self.second = nn.Parameter(start[3:].reshape(-1, 1).clone())

    @property
    def flat(self) -> Tensor:
        return torch.cat([self.first, self.second.reshape(-1)])

    def loss_at(self, x: Tensor) -> Tensor:
        return x @ self.matrix @ x / 2 + self.quartic * x.pow(4).sum()

    def loss(self, batch: Any = None) -> Tensor:
        return self.loss_at(self.flat)

    def hessian(self) -> Tensor:
        """By automatic differentiation, of nothing of the package's."""
        return torch.autograd.functional.hessian(self.loss_at, self.flat.detach())

    def gradient(self) -> Tensor:
        return torch.autograd.functional.jacobian(self.loss_at, self.flat.detach())


class MadeUpRun:
    """Takes the steps of an optimizer on a `Valley`, and lets an estimator measure them as the probe would.

    Attributes:
        warned: What the user was warned of.
        moments: The moments that the estimator has asked for.

    """

    def __init__(
        self, estimator: Estimator, module: Valley, *optimizers: torch.optim.Optimizer, **trainer: Any
    ) -> None:
        self.module = module
        self.warned: list[str] = []
        self.moments: list[Moment] = []
        self._estimator = estimator
        self._optimizers = list(optimizers)
        self._trainer = SimpleNamespace(
            optimizers=self._optimizers,
            world_size=1,
            accumulate_grad_batches=1,
            current_epoch=0,
            num_training_batches=100,
            global_step=0,
            progress_bar_callback=None,
        )
        estimator.start(self._trainer, "CurvatureProbe")

    def at(self) -> MeasuredStep:
        hessian = HessianOperator(self.module.loss, self.module.parameters(), [torch.zeros(1)])

        def eigenpairs() -> Eigenpairs:
            request = self._estimator.request
            assert request is not None
            return lanczos(
                hessian,
                largest=request.largest,
                smallest=request.smallest,
                value_tol=request.tol,
                start=self._estimator.search_start,
                seed=self._trainer.global_step,
            )

        index = self._trainer.global_step
        return MeasuredStep(
            hessian=hessian,
            step=Step(self._trainer, None, None, index),
            eigenpairs=eigenpairs,
            hessian_on=lambda config, batches: hessian,
            warn_once=lambda kind, message: self.warned.append(message),
            owner="CurvatureProbe",
        )

    def step(self, *, is_taken: bool = True) -> ProbeResult | None:
        """Measure a step, and take it."""
        at = self.at()
        moment = self._estimator.begin(at)
        at = replace(at, moment=moment)
        self.moments.append(moment)
        found = self._estimator.measure(at) if moment == "start" else None
        self.module.zero_grad()
        self.module.loss().backward()
        if moment == "gradient":
            found = self._estimator.measure(at)
        for optimizer in self._optimizers if is_taken else ():
            optimizer.step()
        if moment == "update":
            found = self._estimator.measure(at)
        self._trainer.global_step += 1
        return found
