"""A loss at other values of its parameters, without writing to the parameters.

Writing ``θ + v`` into the parameters and back is neither exact (rounding, unless copies are kept) nor invisible
(version counters, optimizers and data-parallel wrappers look at the same tensors). So the loss is evaluated with other
tensors in the parameters' place instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Protocol, TypeVar, runtime_checkable

from torch import Tensor
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")


@runtime_checkable
class FunctionalLoss(Protocol):
    """A mean loss of a batch that can also be evaluated at other values of its parameters."""

    def __call__(self, batch: Any) -> Tensor:
        """The loss at the present parameters."""

    def at(self, values: Sequence[Tensor], batch: Any) -> Tensor:
        """The loss with `values` in place of the parameters, in their order."""


@runtime_checkable
class ScopedLoss(Protocol):
    """A loss that can be differentiated where it is evaluated.

    Checkpointed layers are evaluated again while their loss is differentiated, and have to find the same values and the
    same surroundings there.
    """

    def within(self, values: Optional[Sequence[Tensor]], batch: Any, consume: Callable[[Tensor], Result]) -> Result:
        """What `consume` makes of the loss, with `values`, if any, in place of the parameters also while it does."""


class SubstitutedLoss:
    """Evaluates a plain function ``loss(batch)`` at other values of its parameters.

    Every PyTorch operation that is called while the loss is evaluated gets the substitutes for those of its arguments
    that are parameters. What does not go through such an operation, a custom autograd function for example, still sees
    the parameters themselves; `HessianOperator` notices that and refuses.

    Args:
        loss: Maps a batch to its scalar mean loss; if it is a `FunctionalLoss`, its own method ``at`` is used instead.
        parameters: The parameters that it is a function of.

    """

    def __init__(self, loss: Callable[[Any], Tensor], parameters: Sequence[Tensor]) -> None:
        self._loss = loss
        self._parameters = parameters

    def __call__(self, batch: Any) -> Tensor:
        """The loss at the present parameters."""
        return self._loss(batch)

    def at(self, values: Sequence[Tensor], batch: Any) -> Tensor:
        """The loss with `values` in place of the parameters."""
        return self.within(values, batch, lambda loss: loss)

    def within(self, values: Optional[Sequence[Tensor]], batch: Any, consume: Callable[[Tensor], Result]) -> Result:
        """What `consume` makes of the loss."""
        if values is None:
            return consume(self._loss(batch))
        if isinstance(self._loss, FunctionalLoss):
            return consume(self._loss.at(values, batch))
        with _Substitution(dict(zip(map(id, self._parameters), values, strict=True))):
            return consume(self._loss(batch))


class _Substitution(TorchFunctionMode):
    def __init__(self, substitutes: dict[int, Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
    ) -> Any:
        keywords = {name: self._substitute(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._substitute, args), **keywords)

    def _substitute(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._substitutes.get(id(argument), argument)
        if type(argument) in (list, tuple):
            return type(argument)(map(self._substitute, argument))
        return argument
