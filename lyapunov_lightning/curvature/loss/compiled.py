"""Products of kept graphs, compiled.

The backward pass of a kept graph along a vector is a fixed list of operations on the vector and on tensors that the
graph has kept. It is traced once a graph; whatever does not depend on the vector is a tensor among its arguments by
then. PyTorch's Inductor fuses the rest, which saves most of the time that is spent between the matrix products.

Compiling takes tens of seconds and more, so a program is kept for all graphs that give the same list of operations on
tensors of the same shapes: those of later measurements, since the network is the same. That is found out by tracing
each of them, which takes as long as a few products of a large model, and hundreds of a tiny one.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from lyapunov_lightning.curvature.errors import CurvatureWarning

Derivative = Callable[[list[Tensor]], list[Tensor]]
"""Maps a cotangent for each output to the derivative with respect to each input; linear."""

_AGREEMENT = 0.6
"""The power of the unit of rounding by which a compiled product may differ from the plain one, relative to its size:
7e-5 in float32, where fused sums differ by 1e-7 to 1e-6 on the networks of the benchmarks, and 4e-10 in float64."""

_FIRST = 2
"""Which product of a graph is the first to be compiled: a graph that is made for one product is not worth a trace."""


_MOST = 8
"""Programs after which nothing is compiled any more. A loss whose shapes differ from batch to batch would compile for
the rest of the training; a last batch that is smaller is one kind more."""


class Programs:
    """Compiled products, for all graphs of a loss: those of one operator, and of later ones that are given it.

    Where tracing or compiling fails, or a compiled product is not the plain one, there is one warning with the reason,
    and no further attempt.

    Attributes:
        seconds: What tracing, compiling and checking have taken so far.
        num_compiled: How many programs there are.
        reason: Why nothing is compiled any more; None if it is.

    """

    def __init__(self) -> None:
        self._known: dict[Any, Callable[..., Sequence[Tensor]]] = {}
        self._derivatives: WeakKeyDictionary[Any, Derivative] = WeakKeyDictionary()
        self._counts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.seconds = 0.0
        self.reason: str | None = None

    @property
    def num_compiled(self) -> int:
        """How many programs there are."""
        return len(self._known)

    def derivative(self, graph: object, plain: Derivative, cotangents: list[Tensor]) -> list[Tensor]:
        """The derivative by a compiled program where there is one for this graph, else the plain one.

        Args:
            graph: The kept graph; what is compiled for it goes with it.
            plain: Differentiates it.
            cotangents: What with.

        """
        count = self._counts[graph] = self._counts.get(graph, 0) + 1
        if self.reason is None and count == _FIRST:
            began = time.perf_counter()
            try:
                self._derivatives[graph] = self._checked(plain, cotangents)
            except Exception as error:  # of a tracer, a compiler of C++ and its files: nothing that a product needs
                self._give_up(error)
            self.seconds += time.perf_counter() - began
        return self._derivatives.get(graph, plain)(cotangents)

    def _checked(self, plain: Derivative, cotangents: list[Tensor]) -> Derivative:
        """The compiled derivative, once it is that of a random vector."""
        compiled = self._compiled(plain, cotangents)
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(c.shape, generator=generator, dtype=c.dtype).to(c.device) for c in cotangents]
        expected, found = plain(drawn), compiled(drawn)
        difference = torch.stack([(a - b).double().norm() for a, b in zip(expected, found, strict=True)]).norm()
        size = torch.stack([a.double().norm() for a in expected]).norm()
        rounding = max(torch.finfo(a.dtype).eps for a in expected)
        if not bool(difference <= rounding**_AGREEMENT * size):
            raise ArithmeticError(f"the compiled product is off by {float(difference / size):.0e} of its size")
        return compiled

    def _compiled(self, plain: Derivative, cotangents: list[Tensor]) -> Derivative:
        traced, kept = _traced(plain, cotangents)
        # All numbers of the list of operations are in its code; tensors are arguments, and enter by their kind.
        key = traced.code, tuple((t.shape, t.stride(), t.dtype, t.device) for t in (*cotangents, *kept))
        if key not in self._known:
            if len(self._known) == _MOST:
                raise RuntimeError(
                    f"the graphs of this loss are of more than {_MOST} kinds, such as lengths of batches"
                )
            # Imported here, since it takes seconds and is no part of what every run needs.
            from torch import _inductor

            with torch.no_grad():
                self._known[key] = _inductor.compile(traced, [*cotangents, *kept])
        program = self._known[key]

        def derivative(cotangents: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return list(program(*cotangents, *kept))

        return derivative

    def _give_up(self, error: Exception) -> None:
        self.reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(": ")
        warnings.warn(
            "Products could not be compiled, and are computed as they are without `compile`, right and slower. The"
            f" reason: {self.reason}",
            CurvatureWarning,
            stacklevel=11,  # whoever asked for the product
        )


def _traced(plain: Derivative, cotangents: list[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The operations of a derivative, and the tensors that they take besides the cotangents, in this order."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced: fx.GraphModule = make_fx(lambda *given: plain(list(given)))(*cotangents)
    graph = traced.graph
    kept: dict[str, tuple[fx.Node, Tensor]] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in kept:
            with graph.inserting_after(last):
                last = graph.placeholder(f"kept_{len(kept)}")
            last.meta = dict(node.meta)
            kept[node.target] = last, getattr(traced, node.target).detach()
        node.replace_all_uses_with(kept[node.target][0])
        graph.erase_node(node)
    traced.recompile()
    tensors = [tensor for _, tensor in kept.values()]
    for name in kept:
        delattr(traced, name)  # the tensors go with their graph, the program stays
    return traced, tensors
