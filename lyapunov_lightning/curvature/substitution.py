"""A loss at other values of its parameters, without writing to the parameters.

Writing ``θ + v`` into the parameters and back is neither exact (rounding, unless copies are kept) nor invisible
(version counters, optimizers and data-parallel wrappers look at the same tensors). So the loss is evaluated with other
tensors in the parameters' place instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Protocol, runtime_checkable

from torch import Tensor
from torch.overrides import TorchFunctionMode


@runtime_checkable
class FunctionalLoss(Protocol):
    """A mean loss of a batch that can also be evaluated at other values of its parameters."""

    def __call__(self, batch: Any) -> Tensor:
        """The loss at the present parameters."""

    def at(self, values: Sequence[Tensor], batch: Any) -> Tensor:
        """The loss with `values` in place of the parameters, in their order."""


class SubstitutedLoss:
    """Gives a plain function ``loss(batch)`` the method ``at``.

    Every PyTorch operation that is called while the loss is evaluated gets the substitutes for those of its arguments
    that are parameters. What does not go through such an operation, a custom autograd function for example, still sees
    the parameters themselves; `HessianOperator` notices that and refuses.

    Args:
        loss: Maps a batch to its scalar mean loss.
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
        with _Substitution(dict(zip(map(id, self._parameters), values, strict=True))):
            return self._loss(batch)


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
