"""A loss at other values of its parameters, without writing to the parameters.

Writing ``θ + v`` into the parameters and back is neither exact (rounding, unless copies are kept) nor invisible
(version counters, optimizers and data-parallel wrappers look at the same tensors). So a plain function of tensors is
evaluated with other tensors in the parameters' place instead. Only where a function is handed a parameter in a way that
nobody can come between, the parameter shows another tensor's memory for as long as the loss is evaluated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lyapunov_lightning.curvature.compat.operations import nodes
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation, num_samples
from lyapunov_lightning.curvature.loss.randomness import RandomState


class SubstitutedLoss:
    """Evaluates a plain function ``loss(batch)`` at other values of its parameters.

    While the loss is evaluated, every PyTorch operation gets substitutes in place of the parameters among its
    arguments. A function that is no such operation, of Python or C++, is handed the parameters themselves; where a loss
    has one, the parameters show the other values' memory meanwhile.

    Args:
        loss: Maps a batch to its scalar mean loss.
        parameters: The parameters that it is a function of.

    """

    def __init__(self, loss: Callable[[Any], Tensor], parameters: Sequence[Tensor]) -> None:
        self._loss = loss
        self._parameters = parameters
        self._is_direct: bool | None = None

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the loss, with `values`, if any, in place of the parameters as long as the block lasts."""
        if values is None:
            yield Evaluation(self._loss(batch), self._parameters, lambda: num_samples(batch))
            return
        if not self._is_direct:
            start = RandomState.capture()
            # By identity: two parameters with equal numbers are two sets of coordinates.
            with _Substitution(dict(zip(map(id, self._parameters), values, strict=True))):
                loss = self._loss(batch)
                if self._is_direct is None and isinstance(loss, Tensor) and loss.grad_fn is not None:
                    self._is_direct = self._reaches_parameters(loss) and not _has_duals(values)
                if not self._is_direct:
                    yield Evaluation(loss, values, lambda: num_samples(batch))
                    return
                del loss
            start.restore()  # the second evaluation is to be the same as a first one
        with _shown(self._parameters, values):
            yield Evaluation(self._loss(batch), self._parameters, lambda: num_samples(batch))

    def _reaches_parameters(self, loss: Tensor) -> bool:
        """Whether the graph of a loss ends at a parameter in whose place there should be another tensor."""
        with torch._C.DisableTorchFunction():
            own = set(map(id, self._parameters))
            return any(id(getattr(node, "variable", None)) in own for node in nodes([loss]))


@contextmanager
def _shown(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters show the memory of other tensors meanwhile. Their own memory is not written to."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.detach()
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.data = own


def _has_duals(values: Sequence[Tensor]) -> bool:
    """Whether tensors carry forward derivatives, which their memory alone has not."""
    return any(forward_ad.unpack_dual(value).tangent is not None for value in values)


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
