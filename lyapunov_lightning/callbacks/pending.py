"""A measurement that a step begins and that later moments of the same step complete."""

from collections.abc import Sequence
from dataclasses import replace

from lyapunov_lightning.callbacks.estimators import MeasuredStep, Moment
from lyapunov_lightning.callbacks.gauges import Gauged
from lyapunov_lightning.callbacks.results.probe import ProbeResult


class PendingResult:
    """A measurement that goes on in later moments of its step.

    Args:
        at: The step.

    Attributes:
        step: Its index.
        awaited: The moments that are still to come.
        later: The step as the estimator is to measure it at one of these moments, until it has. It holds the operator
            after the shared one is dropped, since one that is made later has other random numbers.
        glanced: The step with the Hessian on its own data, where values of the loss are to be taken after its gradient.
        result: What the estimator found, once it has.
        gauged: What the gauges found.
        gradient_norm: The length of the gradient before clipping.

    """

    def __init__(self, at: MeasuredStep) -> None:
        self.step = at.step.index
        self.awaited: list[Moment] = []
        self.later: MeasuredStep | None = None
        self.glanced: MeasuredStep | None = None
        self.result: ProbeResult | None = None
        self.gauged: Gauged = {}
        self.gradient_norm: float | None = None
        self._clipping: float | None = None
        # Not the operator, whose kept graphs would take their memory from the step.
        self._parameters, self._layout, self._space = at.hessian.parameters, at.hessian.layout, at.hessian.space

    def await_moment(self, moment: Moment) -> None:
        """Go on at a moment of the step, for one reason more."""
        if moment not in self.awaited:
            self.awaited.append(moment)

    def norm_of_gradient(self) -> float:
        """The length of the gradient in ``.grad``."""
        return float(self._space.norm(self._layout.flatten([parameter.grad for parameter in self._parameters])))

    def see_clipping(self) -> None:
        """Compare the gradient that the optimizer has used with that before clipping."""
        if self.gradient_norm:
            self._clipping = self.norm_of_gradient() / self.gradient_norm

    def complete(self, earlier: Sequence[ProbeResult], held: int) -> ProbeResult | None:
        """The result, with what the gauges found.

        Args:
            earlier: The results so far, of which the last has the eigenvalue that stands until the next one.
            held: For how many measurements it stands.

        """
        if self.result is None:
            return None
        found = replace(self.result, **self.gauged, clipping=self._clipping)
        # Not across the step at which an Adam's moments settle: before it they are those of another metric.
        is_alike = bool(earlier) and earlier[-1].is_settled == found.is_settled
        stands = is_alike and any(result.has_eigenvalue for result in earlier[-held:])
        if found.decisive_eigenvalue is None and stands:
            found = replace(found, decisive_eigenvalue=earlier[-1].decisive_eigenvalue)
        if found.noise_ratio is not None and self._clipping is not None:  # a shorter step is a less noisy one
            found = replace(found, noise_ratio=found.noise_ratio * self._clipping)
        return found
