"""A loss at other values of its parameters, without writing to the parameters.

Writing ``θ + v`` into the parameters and back is neither exact (rounding, unless copies are kept) nor invisible
(version counters, optimizers and data-parallel wrappers look at the same tensors). So a plain function of tensors is
evaluated with other tensors in the parameters' place instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation, num_samples


class SubstitutedLoss:
    """Evaluates a plain function ``loss(batch)`` at other values of its parameters.

    While the loss is evaluated, every PyTorch operation gets substitutes in place of the parameters among its
    arguments. What does not go through such an operation, a custom autograd function for example, still sees the
    parameters themselves; `HessianOperator` notices that and refuses.

    Args:
        loss: Maps a batch to its scalar mean loss.
        parameters: The parameters that it is a function of.

    """

    def __init__(self, loss: Callable[[Any], Tensor], parameters: Sequence[Tensor]) -> None:
        self._loss = loss
        self._parameters = parameters

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the loss, with `values`, if any, in place of the parameters as long as the block lasts."""
        if values is None:
            yield Evaluation(self._loss(batch), self._parameters, lambda: num_samples(batch))
            return
        # By identity: two parameters with equal numbers are two sets of coordinates.
        with _Substitution(dict(zip(map(id, self._parameters), values, strict=True))):
            yield Evaluation(self._loss(batch), values, lambda: num_samples(batch))


class _Substitution(TorchFunctionMode):
    def __init__(self, substitutes: dict[int, Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # No result is looked at: what an operation returns is computed from substitutes already.
        keywords = {name: self._substitute(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._substitute, args), **keywords)

    def _substitute(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._substitutes.get(id(argument), argument)
        if type(argument) in (list, tuple):  # named tuples take their members one by one, and hold no parameters
            return type(argument)(map(self._substitute, argument))
        return argument
