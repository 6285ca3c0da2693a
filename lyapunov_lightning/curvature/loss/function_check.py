"""Whether the functions in a loss that are not PyTorch's own have the derivatives that products take them to have.

A product uses two derivatives of each function: that of its outputs, which its backward pass is to be, and that of its
backward pass, which autograd takes from the operations in it. The first is wrong by intention where a layer reverses or
scales gradients. The second is wrong where the backward pass uses numbers that were kept from the forward pass, as
fused losses do.

Both are held against central differences of the function by itself, at the inputs that the loss gives it. A difference
of gradients of the whole loss would have to tell a wrong function from a kink of ReLU elsewhere in the network, which
in float32 it cannot. What is here compared element by element has the function's own kinks only, and these show: at a
kink the difference to one side is another one than to the other.

A function that computes from more than its arguments, and one in C++ whose arguments are not known, is looked at from
outside: its backward pass, with a fixed cotangent, as a function of the parameters, again by differences. That too is
free of the kinks of the other layers, whose outputs are continuous.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lyapunov_lightning.curvature.compat.functions import (
    Call,
    name_of,
    own_functions,
    recorded_calls,
    used_outputs,
)
from lyapunov_lightning.curvature.compat.operations import differentiated
from lyapunov_lightning.curvature.loss.difference_step import first_step
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness

_STEPS = (1e-3, 2.5e-4)
"""Two steps to either side in float64, in units of each input's size. A central difference errs by the square of it."""

_NARROW_STEPS = (5e-2, 1.25e-2)
"""The same in float32, where the rounding of a matrix product in TF32, 1e-3, is to be small beside the difference."""

_TOLERANCE = 0.02
"""How far a derivative may be from the difference, relative to it: more than the error of the longer step, and than the
approximations that a function may make by intention; wrong derivatives miss a part of another size."""

_BEND = 0.25
"""How different the differences to the two sides may be, relative to both together, where a difference is believed."""

_ROUNDING = 1e3
"""Units of rounding below which nothing is a difference."""

_SHARE = 0.5
"""How much of the derivative has to be where the difference is believed."""


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a function."""

    name: str
    is_first: bool

    def __str__(self) -> str:
        if self.is_first:
            return (
                f"The backward pass of {self.name} is not the derivative of its forward pass, as in layers that reverse"
                " or scale gradients, so that the loss cannot be differentiated twice. Finite differences measure how"
                " the gradients change that the training follows."
            )
        return (
            f"The backward pass of {self.name} uses numbers that were kept from its forward pass, or were computed"
            " elsewhere, which autograd takes for constants: it cannot be differentiated twice. Its backward pass would"
            " have to compute them anew from the inputs that it has saved."
        )


class FunctionCheck:
    """Holds the derivatives of the functions in a loss that are not PyTorch's own against differences.

    It costs one evaluation of the loss without its gradient, and for each of these functions what a few calls of it
    cost; where these leave a doubt, or the function is in C++, four evaluations and two gradients more.

    Args:
        loss: The mean loss.
        is_movable: Whether the loss can be evaluated at other values of the parameters.

    """

    def __init__(self, loss: MeanLoss, *, is_movable: bool) -> None:
        self._loss = loss
        self._is_movable = is_movable
        # Ranks have to make the same evaluations: with others, none is made for what only one of them has found.
        self._is_alone = loss.batches.is_alone

    def check(self, index: int) -> None:
        """Check the functions in the loss of a batch.

        Raises:
            RuntimeError: If one of them has not the derivatives that products take it to have.

        """
        if not self._loss.functions:
            return
        doubted: list[tuple[Call, _Fault]] = []
        unknown: set[str] = set()
        with self._recorded() as calls:
            with self._loss.batches.evaluated(index) as evaluation:
                twice, once = (own_functions(tensors) for tensors in evaluation.differentiated)
                recorded = {id(call.node): call for call in calls}
                kinds: set[object] = set()
                for nodes, needs_second in ((twice, True), (once, False)):
                    for node in nodes:
                        call = recorded.get(id(node))
                        if call is None or not call.is_repeatable:
                            if needs_second:
                                unknown.add(name_of(node))
                            continue
                        if (call.kind, needs_second) in kinds:
                            continue
                        kinds.add((call.kind, needs_second))
                        found = _Repeated(call).fault(needs_second, is_thorough=not self._is_alone)
                        if isinstance(found, _Fault):
                            doubted.append((call, found))
                        elif not found and needs_second and self._is_alone:
                            unknown.add(name_of(node))
                places = [calls.index(call) for call, _ in doubted]
            del evaluation
        if doubted and (not self._is_movable or not self._is_alone):
            raise RuntimeError(str(doubted[0][1]))
        if doubted:
            self._confirm(index, [call for call, _ in doubted], places)
        if unknown and self._is_movable:
            self._check_from_outside(index, unknown)

    def _confirm(self, index: int, calls: Sequence[Call], places: Sequence[int]) -> None:
        """Look again at functions that seem to be wrong, now along a way that the loss itself takes.

        A function may be right only on what it is meant for: matrices of one kind, numbers with a given sum.
        """
        along = self._displacement(index)
        # Within the evaluation: what a function writes to when it is called is then a copy, if anything is.
        with self._recorded() as moved, self._loss.batches.evaluated(index, self._loss.displaced(along)):
            for call, place in zip(calls, places, strict=True):
                there = moved[place] if place < len(moved) and moved[place].kind == call.kind else None
                found = _Repeated(call, there).fault(needs_second=True)
                if isinstance(found, _Fault):
                    raise RuntimeError(str(found))

    def _check_from_outside(self, index: int, names: set[str]) -> None:
        """Check the backward passes of some functions as functions of the parameters.

        Raises:
            RuntimeError: If one has another derivative than autograd takes it to have.

        """
        along = self._displacement(index)
        ahead, behind = (
            [
                [entry.detach() for entry in pulled]
                for _, pulled in self._pulled(index, names, self._loss.displaced(side))
            ]
            for side in (along, -along)
        )
        for place, (name, pulled) in enumerate(self._pulled(index, names, None)):
            if place >= min(len(ahead), len(behind)):
                return
            claimed = actual = total = 0.0
            weights: list[Tensor] = []
            for entry, forth, back in zip(pulled, ahead[place], behind[place], strict=True):
                difference = _Difference.of(forth, entry.detach(), back, 1.0)
                believed = difference.slope * difference.is_believed
                actual += float(_inner(believed, believed))
                total += float(_inner(difference.slope, difference.slope))
                weights.append(_as(entry, believed))
            active = [(entry, weight) for entry, weight in zip(pulled, weights, strict=True) if entry.requires_grad]
            if active:
                outputs, cotangents = zip(*active, strict=True)
                trainable = [leaf for leaf in self._leaves if leaf.requires_grad]
                entries = iter(differentiated(outputs, cotangents, trainable, retain_graph=True))
                gradient = [next(entries) if leaf.requires_grad else None for leaf in self._leaves]
                claimed = float(self._loss.layout.flatten(gradient) @ along)
            if actual > _SHARE * total and abs(claimed - actual) > _OUTSIDE_TOLERANCE * actual:
                raise RuntimeError(str(_Fault(name, is_first=False)))

    def _pulled(
        self, index: int, names: set[str], values: Sequence[Tensor] | None
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """What the backward passes of some functions make of fixed cotangents, with a graph at the present values."""
        with self._loss.batches.evaluated(index, values) as evaluation:
            self._leaves = evaluation.leaves
            seen: set[str] = set()
            for node in own_functions(evaluation.differentiated[0]):
                name = name_of(node)
                if name not in names or name in seen:
                    continue
                seen.add(name)
                generator = torch.Generator().manual_seed(0)
                inputs = [GradientEdge(*edge) for edge in node.next_functions if edge[0] is not None]
                outputs, cotangents = [], []
                for place in used_outputs(node, evaluation.differentiated[0]):
                    kind = node._input_metadata[place]
                    outputs.append(GradientEdge(node, place))
                    drawn = torch.randn(kind.shape, generator=generator, dtype=kind.dtype)
                    cotangents.append(drawn.to(kind.device))
                with torch.enable_grad():
                    found = torch.autograd.grad(
                        outputs, inputs, cotangents, retain_graph=True, create_graph=values is None, allow_unused=True
                    )
                yield name, [entry for entry in found if entry is not None]

    def _displacement(self, index: int) -> Tensor:
        """A short way along the gradient, where the curvature is large, or a random one where there is no gradient."""
        space = self._loss.layout.space()  # without other ranks, whose batches have nothing to do with this one
        gradient = self._loss.batch_gradient(index)
        if not bool(space.norm(gradient) > 0):
            gradient = space.random(torch.Generator().manual_seed(0))
        return gradient * (first_step(self._loss.parameters, space) / 4 / space.norm(gradient))

    def _recorded(self) -> AbstractContextManager[list[Call]]:
        return recorded_calls(function for function in self._loss.functions or () if function is not None)


_OUTSIDE_TOLERANCE = 0.05
"""As `_TOLERANCE`, for a single number that comes through the other layers of the network."""


class _Repeated:
    """A function at the inputs of one call, and near to these.

    Args:
        call: The call.
        moved: The same call in a loss at other parameters, whose inputs are the direction in which to move; a random
            direction if None.

    """

    def __init__(self, call: Call, moved: Call | None = None) -> None:
        self._call = call
        self._places = [p for p, a in enumerate(call.arguments) if isinstance(a, Tensor) and a.requires_grad]
        self._inputs = [_widened(call.arguments[place].detach()) for place in self._places]
        self._randomness = RandomState.capture()
        is_wide = all(x.dtype in (torch.float64, torch.complex128) for x in self._inputs)
        self._steps = _STEPS if is_wide else _NARROW_STEPS
        generator = torch.Generator().manual_seed(0)
        self._along = [_random_direction(x, generator) for x in self._inputs]
        if moved is not None:
            for place, x in enumerate(self._inputs):
                there = moved.arguments[self._places[place]]
                if isinstance(there, Tensor) and there.shape == x.shape:
                    self._along[place] = _rescaled(_widened(there.detach()) - x, self._along[place])

    def fault(self, needs_second: bool, is_thorough: bool = False) -> _Fault | bool:
        """What is wrong with the function; else whether that could be seen.

        Args:
            needs_second: Whether the derivative of the backward pass counts.
            is_thorough: Whether to take both steps where the first one leaves no doubt, too.

        """
        try:
            self._claim()
            found = self._compared(self._steps[0], needs_second)
            if not (is_thorough or found.first is not None or found.second is not None):
                return found.is_seen
            again = self._compared(self._steps[1], needs_second)
        except Exception:  # of a function that has to be called in another place; it is looked at from outside
            return False
        for is_first, errors in ((True, (found.first, again.first)), (False, (found.second, again.second))):
            if _is_same(*errors):
                return _Fault(name_of(self._call.node), is_first)
        return found.is_seen

    def _claim(self) -> None:
        """What autograd takes the two derivatives along the direction to be."""
        leaves, outputs = self._run(self._inputs)
        generator = torch.Generator().manual_seed(1)
        self._cotangents = [_like(output.detach(), generator).requires_grad_() for output in outputs]
        gradients = self._pulled_back(leaves, outputs, create_graph=True)
        self._outputs, self._gradients = [output.detach() for output in outputs], [g.detach() for g in gradients]
        pairs = [(g, w) for g, w in zip(gradients, self._along, strict=True) if g.requires_grad]
        variables = [*leaves, *self._cotangents]
        if pairs:
            slope = torch.stack([_inner(g, w) for g, w in pairs]).sum()
            found = differentiated((slope,), (torch.ones_like(slope),), variables, retain_graph=False)
        else:
            found = (None,) * len(variables)
        claimed = [torch.zeros_like(v) if entry is None else entry for v, entry in zip(variables, found, strict=True)]
        self._claimed_gradients, self._claimed_outputs = claimed[: len(leaves)], claimed[len(leaves) :]

    def _compared(self, step: float, needs_second: bool) -> "_Comparison":
        """The two derivatives, held against central differences over a step."""
        sides = []
        for way in (step, -step):
            leaves, outputs = self._run([x + way * w for x, w in zip(self._inputs, self._along, strict=True)])
            gradients = self._pulled_back(leaves, outputs) if needs_second else []
            sides.append(([output.detach() for output in outputs], gradients))
        (outputs_ahead, ahead), (outputs_behind, behind) = sides
        of_outputs = [
            _Difference.of(*entries, step) for entries in zip(outputs_ahead, self._outputs, outputs_behind, strict=True)
        ]
        of_gradients = (
            [_Difference.of(*entries, step) for entries in zip(ahead, self._gradients, behind, strict=True)]
            if needs_second
            else []
        )
        return _Comparison(
            first=_error(of_outputs, self._claimed_outputs),
            second=_error(of_gradients, self._claimed_gradients[: len(of_gradients)]),
            is_seen=not any(
                difference.is_constant(claimed)
                for difference, claimed in zip(of_outputs, self._claimed_outputs, strict=True)
            ),
        )

    def _run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The differentiable outputs at some inputs, with the random numbers of every other run."""
        arguments = [_widened(a.detach().clone()) if isinstance(a, Tensor) else a for a in self._call.arguments]
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        for place, leaf in zip(self._places, leaves, strict=True):
            arguments[place] = leaf
        with preserved_randomness(self._randomness), torch.enable_grad():
            result = self._call.function.apply(*arguments)  # type: ignore[attr-defined]
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        return leaves, [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]

    def _pulled_back(
        self, leaves: Sequence[Tensor], outputs: Sequence[Tensor], create_graph: bool = False
    ) -> list[Tensor]:
        """What the backward pass makes of the cotangents."""
        cotangents = self._cotangents if create_graph else [cotangent.detach() for cotangent in self._cotangents]
        found = differentiated(outputs, cotangents, leaves, retain_graph=create_graph, create_graph=create_graph)
        return [torch.zeros_like(leaf) if entry is None else entry for leaf, entry in zip(leaves, found, strict=True)]


@dataclass(frozen=True)
class _Comparison:
    """How far the derivatives of a function are from differences over one step.

    Attributes:
        first: The error of the derivative of the outputs; None if it is right, or if that cannot be told.
        second: The error of the derivative of the backward pass, likewise.
        is_seen: Whether the outputs depend on the inputs. Those of a rounding do not, nor those of a function that is
            handed its result.

    """

    first: Tensor | None
    second: Tensor | None
    is_seen: bool


@dataclass(frozen=True)
class _Difference:
    """The central difference of a tensor, by its real numbers.

    Attributes:
        slope: The difference, divided by the distance.
        is_finite: Where it is finite.
        is_believed: Where it is a derivative: above rounding, and much the same to both sides.
        rounding: What is nothing but rounding.

    """

    slope: Tensor
    is_finite: Tensor
    is_believed: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, ahead: Tensor, here: Tensor, behind: Tensor, step: float) -> "_Difference":
        ahead, here, behind = map(_real, (ahead, here, behind))
        slope, bend = (ahead - behind) / (2 * step), (ahead - 2 * here + behind) / (2 * step)
        is_finite = slope.isfinite() & bend.isfinite()
        size = torch.where(is_finite, here, 0).square().mean().sqrt()
        rounding = _ROUNDING * torch.finfo(here.dtype).eps * size / (2 * step)
        is_believed = is_finite & (slope.abs() > rounding) & (bend.abs() <= _BEND * slope.abs())
        return cls(torch.where(is_finite, slope, 0), is_finite, is_believed, rounding)

    def error(self, claimed: Tensor) -> Tensor:
        """How far a derivative is from it, where it is believed; zeros where the two agree, or nothing can be told."""
        claimed = torch.where(self.is_finite, _real(claimed), 0)
        size = torch.maximum(claimed.abs(), self.slope.abs())
        believed = torch.linalg.vector_norm(size * self.is_believed)
        error: Tensor = (claimed - self.slope) * self.is_believed
        is_wrong = (believed.square() >= _SHARE * torch.linalg.vector_norm(size).square()) & (
            torch.linalg.vector_norm(error) > _TOLERANCE * believed
        )
        return torch.where(is_wrong, error, 0)

    def is_constant(self, claimed: Tensor) -> bool:
        """Whether nothing changes for the most part where a derivative says that it does."""
        claimed = torch.where(self.is_finite, _real(claimed), 0).abs()
        size = torch.maximum(claimed, self.slope.abs())
        still = claimed * (self.slope.abs() <= self.rounding) * (claimed > self.rounding)
        return bool(torch.linalg.vector_norm(still).square() > _SHARE * torch.linalg.vector_norm(size).square())


def _error(differences: Sequence[_Difference], claimed: Sequence[Tensor]) -> Tensor | None:
    """The errors of several tensors in a row; None if there are none."""
    errors = [difference.error(tensor) for difference, tensor in zip(differences, claimed, strict=True)]
    if not any(bool(error.any()) for error in errors):
        return None
    return torch.cat([error.to(errors[0]) for error in errors])


def _is_same(error: Tensor | None, again: Tensor | None) -> bool:
    """Whether the errors over two steps are one and the same, and not the rounding of either or the length of one."""
    if error is None or again is None:
        return False
    both = (error != 0) & (again != 0)
    distance = torch.linalg.vector_norm((error - again) * both)
    return bool(both.any()) and bool(distance <= 0.5 * torch.linalg.vector_norm(error * both))


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def _as(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Real numbers as a tensor like this one; undoes `_real`."""
    return torch.view_as_complex(numbers.view(*tensor.shape, 2)) if tensor.is_complex() else numbers.view(tensor.shape)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = (a.conj() * b).sum().real
    return product


def _widened(tensor: Tensor) -> Tensor:
    """A tensor in which a difference is not lost in rounding."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers for a tensor, symmetric where that is: the functions of matrices are right for those alone."""
    found = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
    is_square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] > 1
    return (found + found.mT) / 2 if is_square and torch.equal(tensor, tensor.mT) else found


def _random_direction(x: Tensor, generator: torch.Generator) -> Tensor:
    """A direction in which to move an input: numbers keep their signs, zeros stay zero, and nothing moves by much."""
    size = torch.where(x.isfinite(), x.abs().clamp(max=1), 0)
    return _like(x, generator) * (size if bool(size.any()) else torch.ones_like(size))


def _rescaled(change: Tensor, like: Tensor) -> Tensor:
    """A change of an input as a direction, of the length of another one, which is taken where there is no change."""
    change = torch.where(change.isfinite(), change, 0)
    norm = torch.linalg.vector_norm(change)
    return change * (torch.linalg.vector_norm(like) / norm) if bool(norm > 0) else like
