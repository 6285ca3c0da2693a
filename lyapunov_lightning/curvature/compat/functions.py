"""The functions in a loss that are not PyTorch's own, whose second derivatives nobody vouches for.

They are written in Python, as subclasses of `torch.autograd.Function`, or in C++. PyTorch takes their backward pass for
right: where it computes with numbers that were kept from the forward pass, these are constants to it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lyapunov_lightning.curvature.compat.operations import nodes, replaced


def check_twice_differentiable(loss: Tensor) -> bool:
    """Refuse a loss with functions in its graph whose backward pass autograd cannot see.

    PyTorch itself raises for functions that are marked with ``@once_differentiable``, and only where the way from the
    gradient to the parameters leads through such a function. What other functions hide, by computing in NumPy or in a
    kernel of their own, it takes for a constant; that is noticed while the gradient is taken.

    Returns:
        Whether there are functions that are written in Python or C++ and not in this package. The derivative of the
        loss with respect to itself, a one, has to require a gradient for what they hide to be noticed.

    Raises:
        RuntimeError: If there is one that is marked.

    """
    has_functions = False
    for node in nodes([loss]):
        function = getattr(node, "_forward_cls", None)
        # The decorator leaves no mark but the code of the function that it wraps around.
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE_DIFFERENTIABLE:
            raise RuntimeError(
                f"{name_of(node)} is marked with @once_differentiable: it cannot be differentiated twice."
            )
        if hasattr(node, "is_last"):
            node.is_last = True  # of cross-entropy: products need no further gradient than this one
        # Not for those of this package, which have their tests: with a one that requires a gradient, the graph would
        # hold what is needed for the derivative with respect to it.
        if (function is not None and not _is_ours(function)) or _is_of_an_extension(node):
            has_functions = True
            node.register_hook(partial(_check_visible, name_of(node)))
    return has_functions


def _check_visible(name: str, grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
    """Refuse a backward pass, in which a graph is recorded, that has cut the graph."""
    if torch.is_grad_enabled() and any(entry is not None and entry.requires_grad for entry in grad_outputs):
        for entry in grad_inputs:
            # A gradient that is zero everywhere, as that of an index, hides nothing.
            if entry is not None and not entry.requires_grad and bool(entry.any()):
                raise RuntimeError(f"{name} hides its backward pass from autograd: it cannot be differentiated twice.")


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def own_functions(tensors: Sequence[Tensor]) -> list[Any]:
    """The nodes behind some tensors that are neither PyTorch's nor this package's."""
    return [node for node in nodes(tensors) if _is_foreign(node)]


def name_of(node: Any) -> str:
    """What a user knows the function of a node by."""
    name = str(node.name())
    if name.startswith(_CPP_NODE):
        return name.removeprefix(_CPP_NODE).removesuffix(">")
    if getattr(node, "_forward_cls", None) is None:
        return name
    # The classes that PyTorch makes of the user's have a prefix.
    return name.removesuffix("Backward").removeprefix("Vmapped").removeprefix("GeneratedBackwardFor_")


def used_outputs(node: Any, tensors: Sequence[Tensor]) -> list[int]:
    """Which outputs of a node some tensors depend on; the others may be no tensors."""
    edges = [edge for other in nodes(tensors) for edge in other.next_functions]
    edges += [(tensor.grad_fn, tensor.output_nr) for tensor in tensors]
    return sorted({place for function, place in edges if function is node})


def _is_foreign(node: Any) -> bool:
    function = getattr(node, "_forward_cls", None)
    if function is None:
        return _is_of_an_extension(node)
    module = str(function.__module__)
    # PyTorch makes classes of its own from the user's for `torch.func` and for custom operators.
    is_made = module in ("torch._functorch.autograd_function", "torch._library.autograd")
    return is_made or (module.split(".")[0] != "torch" and not _is_ours(function))


def _is_ours(function: type) -> bool:
    return function.__module__.split(".")[0] == "lyapunov_lightning"


def _is_of_an_extension(node: Any) -> bool:
    name = str(node.name())
    return name.startswith(_CPP_NODE) and not name.startswith((_CPP_NODE + "at::", _CPP_NODE + "torch::"))


_CPP_NODE = "torch::autograd::CppNode<"


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a function in a loss.

    Attributes:
        function: The function.
        node: Its node in the graph.
        arguments: What it was called with; the tensors are those of the loss, and not copied.
        versions: How many writes there had been to each of these tensors.

    """

    function: type
    node: Any
    arguments: tuple[Any, ...]
    versions: tuple[int, ...]

    @property
    def is_repeatable(self) -> bool:
        """Whether the arguments still are what they were; functions that work in place have changed them."""
        return self.versions == _versions(self.arguments)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for calls that compute the same of other tensors, as far as the arguments tell."""
        return (self.function, *map(_kind_of, self.arguments))


@contextmanager
def recorded_calls(functions: Iterable[type]) -> Iterator[list[Call]]:
    """Record the calls of some functions of Python meanwhile, in their order."""
    calls: list[Call] = []
    with ExitStack() as stack:
        for function in functions:
            stack.enter_context(_recorded(function, calls))
        yield calls


@contextmanager
def _recorded(function: Any, calls: list[Call]) -> Iterator[None]:
    # In the class itself, where PyTorch looks it up at each call: `apply` is often kept under another name.
    forward: Callable[..., Any] = function.forward
    set_up: Callable[..., Any] = function.setup_context
    if set_up is not torch.autograd.Function.setup_context:

        def set_up_and_note(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(Call(function, node, inputs, _versions(inputs)))
            set_up(node, inputs, output)

        with replaced(function, "setup_context", staticmethod(set_up_and_note)):
            yield
        return

    def note_and_run(node: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(Call(function, node, arguments, _versions(arguments)))
        return forward(node, *arguments, **keywords)

    with replaced(function, "forward", staticmethod(note_and_run)):
        yield


def _versions(arguments: Sequence[Any]) -> tuple[int, ...]:
    return tuple(a._version for a in arguments if isinstance(a, Tensor) and not a.is_inference())


def _kind_of(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.requires_grad
    return argument if isinstance(argument, (bool, int, float, str, type(None))) else type(argument)
