"""What a message says to do, done on the case that brings it up: the numerical core."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lyapunov_lightning.curvature import (
    Eigenpairs,
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    LyapunovIteration,
    LyapunovSpectrum,
    MeasurementError,
    OnlineEigenpair,
    ScaledOperator,
    conjugate_gradient,
    lanczos,
    power_iteration,
    spectral_density,
    stochastic_moments,
)
from lyapunov_lightning.curvature.acting.pace import LRBounds
from lyapunov_lightning.curvature.directions.alignment import subspace_overlap
from lyapunov_lightning.curvature.directions.plane import Plane, plane_axes
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation
from lyapunov_lightning.curvature.stability import stability_of
from lyapunov_lightning.curvature.stability.random_map import mean_square_edge
from lyapunov_lightning.curvature.stability.step_map import StepMap
from lyapunov_lightning.curvature.tracking.blocks import check_groups
from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker
from tests.problems import whole_hessian
from tests.remedies import Row, check

CURVATURES = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
X = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def near(found: object, expected: object, rel: float = 1e-6) -> None:
    """Fail where numbers are not those that are expected."""
    np.testing.assert_allclose(np.asarray(found, dtype=float), np.asarray(expected, dtype=float), rtol=rel, atol=1e-9)


def ones(dtype: torch.dtype = torch.float64, size: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.ones(size, dtype=dtype))


def diagonal(weight: nn.Parameter | None = None, **options: Any) -> HessianOperator:
    """Of the Hessian with `CURVATURES` on its diagonal."""
    w = ones() if weight is None else weight
    return HessianOperator(lambda batch: (batch.to(w) * w.square()).sum() / 2, [w], [CURVATURES], **options)


def of(loss: Callable[[Tensor, Tensor], Any], dtype: torch.dtype = torch.float64, **options: Any) -> HessianOperator:
    """The Hessian of a loss of three parameters at (0.3, 0.8, 1.1) and of the batch `X`."""
    weight = nn.Parameter(torch.tensor([0.3, 0.8, 1.1], dtype=dtype))
    return HessianOperator(lambda batch: loss(weight, batch), [weight], [X.to(dtype)], **options)


def dense(loss: Callable[[Tensor, Tensor], Any]) -> float:
    """The largest eigenvalue that `of` is to have, by PyTorch's plain derivatives."""
    weight = torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64, requires_grad=True)
    return float(torch.linalg.eigvalsh(whole_hessian(loss(weight, X), weight)[1])[-1])


def has(operator: Any, expected: float, rel: float = 1e-4) -> None:
    """The largest eigenvalue of an operator is the one that is expected."""
    near(lanczos(operator).values[0], expected, rel)


def sines(weight: Tensor, x: Tensor) -> Tensor:
    return (weight * x).sin().square().sum()


# Functions of other people's, each with what keeps it from being differentiated.


class Adjoint(torch.autograd.Function):
    """Takes a parameter in directly and has one derivative only, as the adjoint method of an ODE solver."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return (weight * x).sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, x = ctx.saved_tensors
        return gradient * x * (weight * x).cos(), None


class Twice(Adjoint):
    """The same, with a backward pass that can be differentiated; in forward mode it has no derivative."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, x = ctx.saved_tensors
        return gradient * x * (weight * x).cos(), None


class Fused(torch.autograd.Function):
    """Computes its gradient in the forward pass, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * (weight * x).cos())
        return (weight * x).sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class Numpy(torch.autograd.Function):
    """Computes its gradient outside of PyTorch."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return (weight * x).sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, x = (tensor.detach().numpy() for tensor in ctx.saved_tensors)
        return torch.from_numpy(gradient.detach().numpy() * x * np.cos(weight * x)), None


class Halved(torch.autograd.Function):
    """Passes half of its gradient on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


class WrongForward(Twice):
    """Has a wrong derivative in forward mode."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return 3 * tangent


class OwnBackward(torch.autograd.Function):
    """Checkpointing by a backward pass within the backward pass, which fills ``.grad``."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, inputs: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs)
        with torch.no_grad():
            return layer(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        inputs = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(inputs), gradient)
        return None, inputs.grad


class Detached(torch.autograd.Function):
    """Detaches the gradient that comes in from above."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.detach() * ctx.saved_tensors[0].cos()


class Kept:
    """A loss that puts the values into the parameter itself."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight

    @contextmanager
    def evaluated(self, batch: Tensor, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        weight = self._weight.detach().clone() if values is None else values[0].detach().clone()
        leaf = weight.requires_grad_()
        yield Evaluation(by_function(Adjoint)(leaf, batch), [leaf], lambda: 1.0, owner=self)


class Forgetful(Kept):
    """The same, but the function is still given the parameter."""

    @contextmanager
    def evaluated(self, batch: Tensor, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        with super().evaluated(batch, values) as evaluation:
            loss = by_function(Adjoint)(self._weight, batch)
            yield Evaluation(loss, [self._weight] if values is None else evaluation.leaves, lambda: 1.0, owner=self)


def by_function(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of squares of a sine, through a function that takes the parameter itself."""
    return lambda weight, x: function.apply(weight, x).square().sum()


def wrong_forward(weight: Tensor, x: Tensor) -> Tensor:
    """Through a function that does not take the parameter itself, which in forward mode cannot be substituted."""
    return WrongForward.apply(1 * weight, x).square().sum()


def checkpointed(layer: Callable[[nn.Module, Tensor], Tensor]) -> HessianOperator:
    """Of a network of which the last layer is evaluated in another way."""
    torch.manual_seed(0)
    net, inputs = _net(), torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    return HessianOperator(
        lambda batch: layer(net[2], net[1](net[0](batch))).square().mean(), net.parameters(), [inputs]
    )


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def without_checkpoint() -> float:
    return float(lanczos(checkpointed(lambda layer, x: layer(x))).values[0])


DERIVATIVES = [
    Row(
        "method='double_backward' cannot differentiate this loss twice.",
        lambda: lanczos(of(by_function(Adjoint), method="double_backward")),
        {
            "method='auto'": lambda: has(of(by_function(Adjoint)), dense(sines)),
            "'finite_difference', which needs one derivative only": lambda: has(
                of(by_function(Adjoint), method="finite_difference"), dense(sines)
            ),
        },
        also=("so its curvature is taken from finite differences",),
    ),
    Row(
        "method='forward_over_reverse' cannot differentiate this loss twice. … The loss has a forward derivative of",
        lambda: lanczos(of(wrong_forward, method="forward_over_reverse")),
        {
            "method='auto'": lambda: has(of(wrong_forward), dense(sines)),
            'method="double_backward"': lambda: has(of(wrong_forward, method="double_backward"), dense(sines)),
        },
    ),
    Row(
        "so its curvature is taken from finite differences … is marked with @once_differentiable: it cannot be",
        lambda: lanczos(of(by_function(Adjoint))),
        {
            'HessianConfig(method="finite_difference")': lambda: has(
                of(by_function(Adjoint), method="finite_difference"), dense(sines)
            ),
            "Switch the fused kernel off": lambda: has(of(sines), dense(sines)),
        },
    ),
    Row(
        "hides its backward pass from autograd",
        lambda: lanczos(of(by_function(Numpy), method="double_backward")),
        {"method='auto'": lambda: has(of(by_function(Numpy)), dense(sines))},
        also=("so its curvature is taken from finite differences",),
    ),
    Row(
        "The backward pass of Fused uses numbers that were kept from its forward pass",
        lambda: lanczos(of(by_function(Fused), method="double_backward")),
        {
            "method='auto'": lambda: has(of(by_function(Fused)), dense(sines)),
            "'finite_difference'": lambda: has(of(by_function(Fused), method="finite_difference"), dense(sines)),
            "compute them anew from the inputs": lambda: has(
                of(by_function(Twice), method="double_backward"), dense(sines)
            ),
        },
        also=("so its curvature is taken from finite differences",),
    ),
    Row(
        "The backward pass of Halved is not the derivative of its forward pass",
        lambda: lanczos(of(lambda w, x: sines(Halved.apply(w), x), method="double_backward")),
        # of every layer behind it the training follows half the gradient
        {
            "Finite differences measure how the gradients change": lambda: has(
                of(lambda w, x: sines(Halved.apply(w), x), method="finite_difference"), dense(sines) / 2
            )
        },
    ),
    Row(
        "Finite differences are lost in the rounding of half precision: … or use method='double_backward'.",
        lambda: lanczos(of(lambda w, x: sines(w, x).bfloat16(), torch.float32, method="finite_difference")),
        {
            "Compute it in float32": lambda: has(
                of(sines, torch.float32, method="finite_difference"), dense(sines), 0.02
            ),
            "method='double_backward'": lambda: has(
                of(lambda w, x: sines(w, x).bfloat16(), torch.float32, method="double_backward"), dense(sines), 0.02
            ),
        },
    ),
    *(
        Row(
            "Compute it in float32, without autocast, since the loss cannot be differentiated twice.",
            lambda method=method: lanczos(
                of(lambda w, x: by_function(Adjoint)(w, x).bfloat16(), torch.float32, method=method)
            ),
            {"Compute it in float32": lambda: has(of(by_function(Adjoint), torch.float32), dense(sines), 0.02)},
            also=("so its curvature is taken from finite differences",),
        )
        for method in ("auto", "double_backward")
    ),
    Row(
        "Finite differences, and the loss at nearby parameters, … or use method='double_backward'.",
        lambda: lanczos(of(sines, torch.bfloat16, method="finite_difference")),
        {
            "Keep the parameters in float32": lambda: has(
                of(sines, torch.float32, method="finite_difference"), dense(sines), 0.02
            ),
            "method='double_backward'": lambda: has(
                of(sines, torch.bfloat16, method="double_backward"), dense(sines), 0.05
            ),
        },
    ),
    Row(
        "Finite differences, and the loss at nearby parameters, … since the loss cannot be differentiated twice.",
        lambda: lanczos(of(by_function(Adjoint), torch.bfloat16)),
        {"Keep the parameters in float32": lambda: has(of(by_function(Adjoint), torch.float32), dense(sines), 0.02)},
        also=("so its curvature is taken from finite differences",),
    ),
    Row(
        "the loss at nearby parameters, … Keep the parameters in float32 (mixed precision does).",
        lambda: of(sines, torch.bfloat16).values_along(torch.ones(3), [0.1]),
        {
            "Keep the parameters in float32": lambda: near(
                of(sines, torch.float32).values_along(torch.ones(3), [0.1])[0],
                sines(torch.tensor([0.4, 0.9, 1.2], dtype=torch.float64), X),
            )
        },
    ),
    Row(
        "The loss reaches a parameter in a way that cannot be substituted",
        lambda: lanczos(of(by_function(Twice), method="forward_over_reverse")),
        {
            "method='double_backward'": lambda: has(of(by_function(Twice), method="double_backward"), dense(sines)),
            "compute it without that function": lambda: has(of(sines, method="forward_over_reverse"), dense(sines)),
        },
    ),
    Row(
        "The loss reaches a parameter … where that refuses the loss as well",
        lambda: lanczos(_given_values(Forgetful)),
        {
            "compute it without that function": lambda: has(of(sines), dense(sines)),
            "evaluated(batch, values)": lambda: has(_given_values(Kept), dense(sines)),
        },
        also=("so its curvature is taken from finite differences",),
    ),
    Row(
        "A layer of the model runs a backward pass of its own",
        lambda: lanczos(checkpointed(OwnBackward.apply)),
        {
            "torch.utils.checkpoint": lambda: has(
                checkpointed(lambda layer, x: checkpoint(layer, x, use_reentrant=False)), without_checkpoint()
            )
        },
    ),
    *(
        Row(
            "A Hessian-vector product is not finite",
            lambda loss=loss: lanczos(_at_zero(loss)),
            {
                'method="finite_difference"': lambda loss=loss, expected=expected: has(
                    _at_zero(loss, method="finite_difference"), expected, 2e-3
                )
            },
        )
        for loss, expected in [
            (lambda w: torch.sinc(w).sum() + w.square().sum(), 2 - torch.pi**2 / 3),
            (lambda w: w.norm() ** 2 + (CURVATURES * w.square()).sum(), 8.0),
            (lambda w: torch.exp(-w.norm().square()) + (CURVATURES * w.square()).sum(), 4.0),
        ]
    ),
]


def _at_zero(loss: Callable[[Tensor], Tensor], **options: Any) -> HessianOperator:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert bool(torch.isfinite(torch.autograd.grad(loss(weight), weight)[0]).all())
    return HessianOperator(lambda batch: loss(weight), [weight], [weight.detach()], **options)


def _given_values(kind: type[Kept]) -> HessianOperator:
    weight = nn.Parameter(torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64))
    return HessianOperator(kind(weight), [weight], [X])


# Losses and batches


def of_two_batches(make: Callable[[Tensor], Any], **options: Any) -> HessianOperator:
    """Of wᵀw/2 times a number of each batch, 1 and 4, which have one and three samples."""
    w = ones()
    batches = [make(torch.full((size, 2), scale, dtype=torch.float64)) for size, scale in ((1, 1.0), (3, 4.0))]
    return HessianOperator(lambda b: _numbers(b).mean() * w.square().sum() / 2, [w], batches, **options)


def _numbers(batch: Any) -> Tensor:
    return torch.as_tensor(batch[-1] if isinstance(batch, tuple) else batch)


def mean_of(x: Tensor) -> float:
    """A batch that does not tell its size."""
    return float(x.mean())


def loss_is(reduce: Callable[[Tensor], Any]) -> HessianOperator:
    w = ones()
    return HessianOperator(lambda batch: reduce(batch * w.square() / 2), [w], [CURVATURES])


LOSSES = [
    Row(
        "The loss should be a scalar, got a tensor of shape (3,)",
        lambda: lanczos(loss_is(lambda losses: losses)),
        {".mean()": lambda: has(loss_is(lambda losses: losses.mean()), 1.0)},
    ),
    Row(
        "The loss should be a scalar tensor, got float",
        lambda: lanczos(loss_is(lambda losses: float(losses.sum()))),
        {"a scalar tensor": lambda: has(loss_is(lambda losses: losses.sum()), 3.0)},
    ),
    Row(
        "contradict each other on its number of samples",
        lambda: lanczos(of_two_batches(lambda x: (torch.zeros(2), x))),
        {"Give weights": lambda: has(of_two_batches(lambda x: (torch.zeros(2), x), weights=[1, 3]), (1 + 3 * 4) / 4)},
    ),
    Row(
        "The number of samples of a batch of type float is not known",
        lambda: lanczos(of_two_batches(mean_of)),
        {"Give weights": lambda: has(of_two_batches(mean_of, weights=[1, 3]), (1 + 3 * 4) / 4)},
    ),
    Row(
        "weights should hold one number for each of 2 batches, got 1.",
        lambda: of_two_batches(mean_of, weights=[1]),
        {"one number for each of 2 batches": lambda: has(of_two_batches(mean_of, weights=[1, 1]), 2.5)},
    ),
    Row(
        "weights should be positive",
        lambda: of_two_batches(mean_of, weights=[0, 1]),
        {"positive": lambda: has(of_two_batches(mean_of, weights=[1e-9, 1]), 4.0)},
    ),
    Row(
        "batches should hold at least one batch, got none.",
        lambda: HessianOperator(lambda batch: ones().sum(), [ones()], []),
        {"at least one batch": lambda: has(diagonal(), 3.0)},
    ),
    Row(
        "The products are random",
        lambda: _says_its_fault(_noisy(torch.Generator().manual_seed(0))),
        {"Draw them from PyTorch's global generators": lambda: _says_its_fault(_noisy(None))},
    ),
    Row(
        "The products are not those of a symmetric matrix",
        lambda: _says_its_fault(of(lambda w, x: _stopped(w, w.detach()), method="finite_difference")),
        {"if there is a loss": lambda: _says_its_fault(of(lambda w, x: _stopped(w, w), method="finite_difference"))},
    ),
]


def _noisy(generator: torch.Generator | None) -> HessianOperator:
    return of(lambda w, x: (torch.randn(3, generator=generator, dtype=torch.float64) * w.square()).sum())


def _stopped(weight: Tensor, target: Tensor) -> Tensor:
    return (weight[0] * target[1:].square().sum() + weight.square().sum()) / 2


def _says_its_fault(operator: HessianOperator) -> None:
    fault = operator.check().fault
    if fault is not None:
        raise MeasurementError(fault)


# Gauss–Newton


def gauss_newton(
    outputs: Callable[[Tensor, Tensor], Any], loss: Callable[[Any, Tensor, Tensor], Tensor], expected: float | None
) -> None:
    weight = nn.Parameter(torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64))
    operator = GaussNewtonOperator(
        lambda batch: outputs(weight, batch), lambda out, batch: loss(out, weight, batch), [weight], [X]
    )
    found = float(lanczos(operator).values[0])
    if expected is not None:
        near(found, expected, 1e-4)


def squares(out: Any, weight: Tensor, x: Tensor) -> Tensor:
    return out.square().sum() / 2


def of_sines() -> float:
    """The largest entry of JᵀJ for outputs sin(wx)."""
    w = torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64)
    return float((X * (w * X).cos()).square().max())


def fisher(losses: Callable[[Tensor, Tensor], Any], expected: float | None) -> None:
    weight = nn.Parameter(torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64))
    operator = EmpiricalFisherOperator(lambda batch: losses(weight, batch), [weight], [X])
    found = float(lanczos(operator).values[0])
    if expected is not None:
        near(found, expected, 1e-4)


GAUSS_NEWTON = [
    Row(
        "The loss depends on the parameters in other ways than through the outputs",
        lambda: gauss_newton(lambda w, x: (w * x).sin(), lambda out, w, x: squares(out, w, x) + w.square().sum(), None),
        {
            "Let outputs return all that the loss takes": lambda: gauss_newton(
                lambda w, x: ((w * x).sin(), 2**0.5 * w),
                lambda out, w, x: squares(out[0], w, x) + squares(out[1], w, x),
                of_sines() + 2,
            ),
            "or these themselves": lambda: gauss_newton(
                lambda w, x: {"sines": (w * x).sin(), "weights": [w]},
                lambda out, w, x: squares(out["sines"], w, x) + out["weights"][0].square().sum(),
                of_sines() + 2,
            ),
        },
    ),
    Row(
        "The outputs should be real, got a complex tensor.",
        lambda: gauss_newton(lambda w, x: torch.complex(w * x, w), lambda out, w, x: out.abs().square().sum(), None),
        {
            "Use torch.view_as_real": lambda: gauss_newton(
                lambda w, x: torch.view_as_real(torch.complex(w * x, w)),
                lambda out, w, x: torch.view_as_complex(out).abs().square().sum(),
                float(2 * (X.square() + 1).max()),
            )
        },
    ),
    Row(
        "losses should return one number for each sample, a tensor of shape (n,)",
        lambda: fisher(lambda w, x: functional.mse_loss(w, x), None),
        {
            "reduction='none'": lambda: fisher(
                lambda w, x: functional.mse_loss(w, x, reduction="none"),
                float((2 * (torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64) - X)).square().max() / 3),
            )
        },
    ),
    Row(
        "A layer's backward pass cannot be differentiated in the gradient that comes in from above",
        lambda: gauss_newton(lambda w, x: Detached.apply(w * x), squares, None),
        {
            "whose backward pass consists of differentiable operations": lambda: gauss_newton(
                lambda w, x: (w * x).sin(), squares, of_sines()
            )
        },
    ),
    Row(
        "The backward pass of this model or loss cannot be differentiated, which Gauss–Newton and the empirical Fisher",
        lambda: gauss_newton(lambda w, x: Adjoint.apply(w, x), squares, None),
        {
            "HessianOperator with method='finite_difference'": lambda: has(
                of(by_function(Adjoint), method="finite_difference"), dense(sines)
            )
        },
    ),
]


# Planes


def plane_over(directions: Any, *shape: int, largest: int = 1, start: Sequence[float] = (1.0, 0.0, 0.0)) -> None:
    """Its axes are orthogonal, and both there."""
    Plane(directions).check_eigenvectors(largest)
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float64).view(shape or 3))
    operator = HessianOperator(lambda batch: (batch * weight.flatten().square()).sum() / 2, [weight], [CURVATURES])
    pairs = lanczos(operator, largest=largest)
    names = list(map(str, range(largest)))
    axes = plane_axes(operator, directions, pairs=pairs, names=names, gradient=operator.gradient())
    assert bool((axes.vectors.norm(dim=1) > 0).all())


PLANES = [
    Row(
        "The gradient lies along the first eigenvector, and the two span no plane.",
        lambda: plane_over("gradient"),
        {"Use plane='eigenvectors', which takes two of them": lambda: plane_over("eigenvectors", largest=2)},
    ),
    Row(
        "plane='random' scales random directions filter by filter, and no parameter here has filters",
        lambda: plane_over("random"),
        {"Use plane='eigenvectors', which takes two of them": lambda: plane_over("eigenvectors", largest=2)},
    ),
    Row(
        "plane='eigenvectors' takes 2 eigenvectors, and largest + smallest is 1. Ask for more, or use plane='random'.",
        lambda: plane_over("eigenvectors"),
        {
            "Ask for more": lambda: plane_over("eigenvectors", largest=2),
            "plane='random'": lambda: plane_over("random", 1, 3),
        },
    ),
    Row(
        "plane.points should be an odd int of at least 3",
        lambda: Plane(points=2),
        {"an odd int of at least 3": lambda: near(Plane(points=3, reach=1.0).coordinates, [-1, 0, 1])},
    ),
]


# Operators as matrices


def with_a_matrix() -> dict[str, Tensor]:
    return {"weight": ones(size=6).detach().view(2, 3)}


def named(given: Any) -> HessianOperator:
    layer = nn.Linear(3, 2, bias=False).double()
    return HessianOperator(lambda batch: (batch * layer.weight.square()).sum() / 2, given(layer), [CURVATURES])


def with_names_multiplies(operator: HessianOperator) -> None:
    near((operator @ with_a_matrix())["weight"][0], CURVATURES)


MATRICES = [
    Row(
        "parameters should be tensors, got a module of type Linear.",
        lambda: named(lambda layer: layer),
        {
            "parameters()": lambda: has(named(lambda layer: layer.parameters()), 3.0),
            "named_parameters()": lambda: with_names_multiplies(named(lambda layer: layer.named_parameters())),
        },
    ),
    Row(
        "parameters should hold tensors, or pairs of a name and a tensor, got str.",
        lambda: named(lambda layer: ["weight"]),
        {"tensors": lambda: has(named(lambda layer: [layer.weight]), 3.0)},
    ),
    Row(
        "parameters should hold at least one tensor, got none.",
        lambda: named(lambda layer: []),
        {"at least one tensor": lambda: has(named(lambda layer: [layer.weight]), 3.0)},
    ),
    Row(
        "parameters should hold at least one number, got only empty tensors.",
        lambda: named(lambda layer: [torch.zeros(0)]),
        {"at least one number": lambda: has(named(lambda layer: [torch.zeros(0), layer.weight]), 3.0)},
    ),
    Row(
        "parameters should be real floating-point tensors, got torch.complex128.",
        lambda: named(lambda layer: [layer.weight.to(torch.complex128)]),
        {"real": lambda: has(named(lambda layer: [layer.weight]), 3.0)},
    ),
    Row(
        "A dictionary of tensors needs parameters with names.",
        lambda: with_names_multiplies(named(lambda layer: layer.parameters())),
        {
            "model.named_parameters()": lambda: with_names_multiplies(named(lambda layer: layer.named_parameters())),
            "multiply a list": lambda: near(
                (named(lambda layer: layer.parameters()) @ [with_a_matrix()["weight"]])[0][0], CURVATURES
            ),
        },
    ),
    Row(
        "The tensors should be named ['weight'], got ['bias'].",
        lambda: named(lambda layer: layer.named_parameters()) @ {"bias": with_a_matrix()["weight"]},
        {"['weight']": lambda: with_names_multiplies(named(lambda layer: layer.named_parameters()))},
    ),
    Row(
        "The tensors should have the shapes of the parameters",
        lambda: named(lambda layer: layer.named_parameters()) @ {"weight": torch.ones(6)},
        {"[(2, 3)]": lambda: with_names_multiplies(named(lambda layer: layer.named_parameters()))},
    ),
    Row(
        "A matrix of shape (3, 3) takes … MiB, and max_bytes allows for",
        lambda: diagonal().to_dense(max_bytes=10),
        {
            "Use products (lanczos, spectral_density)": lambda: (
                has(diagonal(), 3.0),
                near(spectral_density(diagonal(), num_probes=2).nodes.max(), 3.0),
            ),
            "fewer parameters": lambda: near(
                diagonal(ones(size=1)).to_dense(max_bytes=10), [[float(CURVATURES.sum())]]
            ),
            "a larger max_bytes": lambda: near(diagonal().to_dense(max_bytes=100), CURVATURES.diag()),
        },
    ),
    Row(
        "An operator of shape (3, 3) multiplies real vectors of shape (3,) and blocks of columns of shape (3, k)",
        lambda: diagonal() @ torch.ones(4, dtype=torch.float64),
        {
            "(3,)": lambda: near(diagonal() @ torch.ones(3, dtype=torch.float64), CURVATURES),
            "(3, k)": lambda: near(diagonal() @ torch.eye(3, dtype=torch.float64), CURVATURES.diag()),
        },
    ),
    *(
        Row(
            f"{name} should have shape (3",
            lambda act=act: act(torch.ones(2, dtype=torch.float64)),
            {"(3": lambda act=act: near(act(torch.ones(3, dtype=torch.float64)), CURVATURES)},
        )
        for name, act in [
            ("vector", lambda v: diagonal().matvec(v)),
            ("block", lambda v: diagonal().matmat(v[:, None])[:, 0]),
            ("scale", lambda v: ScaledOperator(diagonal(), v).matvec(torch.ones(3, dtype=torch.float64))),
            ("vector", lambda v: CURVATURES * diagonal().layout.split(v)[0]),
        ]
    ),
    Row(
        "shift should be a number or have shape (3,), got (2,).",
        lambda: ScaledOperator(diagonal(), shift=torch.ones(2)),
        {
            "a number": lambda: has(ScaledOperator(diagonal(), shift=2.0), 5.0),
            "shape (3,)": lambda: has(ScaledOperator(diagonal(), shift=torch.tensor([0.0, 5.0, 0.0])), 7.0),
        },
    ),
]


# Arguments: the message names the nearest value that is right


def argument(says: str, act: Callable[[Any], object], wrong: Any, right: dict[str, Any]) -> Row:
    """A value that is refused, and for each of the values that the message names one that is tried."""
    return Row(says, lambda: act(wrong), {named: lambda value=value: act(value) for named, value in right.items()})


def finds(*expected: float) -> Callable[..., None]:
    """Lanczos's method with some arguments, which finds the largest eigenvalues."""

    def search(**options: Any) -> None:
        near(lanczos(diagonal(), largest=len(expected), **options).values, expected, 1e-4)

    return search


def followed(map: Any = "ascent", lr: float = 0.1, delta_q: float = 1e-3, count: int | None = None) -> None:
    """Some steps of the iteration of one perturbation, or of several, on the diagonal Hessian."""
    near_zero = torch.zeros(3, dtype=torch.float64)
    kwargs = {"map": map, "delta_q": delta_q}
    iteration: Any = LyapunovIteration(**kwargs) if count is None else LyapunovSpectrum(count, **kwargs)
    for _ in range(3):
        found = iteration.step(lambda q: CURVATURES * q, near_zero, lr=lr)
    assert bool(torch.isfinite(torch.as_tensor(found.eigenvalue if count is None else found.eigenvalues)).all())


def resumed(largest: int, of: int) -> None:
    """A search for some eigenvalues that goes on with the state of a search for so many."""
    states: list[Any] = []
    lanczos(diagonal(), largest=of, watch=lambda search: states.append(search.state_dict()))
    near(lanczos(diagonal(), largest=largest, resume=states[1]).values, CURVATURES[:largest], 1e-4)


def solved(b: Tensor, **options: Any) -> None:
    near(conjugate_gradient(diagonal(), b, tol=1e-9, **options).solution, b / (CURVATURES + options.get("damping", 0)))


def all_pairs() -> Eigenpairs:
    """With which an estimate is exact."""
    return lanczos(diagonal(), largest=3, tol=1e-9)


def edge(curvatures: Any, probabilities: Any) -> None:
    # of one curvature h the limit of plain gradient descent with learning rate 1 is 2
    near(mean_square_edge(StepMap(1.0), curvatures, probabilities), 2 / np.max(curvatures))


B = torch.ones(3, dtype=torch.float64)
START = "start should have rows of length 3, got shape (4,)."

ARGUMENTS = [
    argument(
        "largest and smallest should be non-negative ints, not both 0",
        lambda n: lanczos(diagonal(), largest=n),
        0,
        {"non-negative": 1},
    ),
    argument(
        "largest + smallest should be at most the operator's size 3",
        lambda n: near(lanczos(diagonal(), largest=n).values, CURVATURES, 1e-4),
        4,
        {"size 3": 3},
    ),
    argument(
        "max_matvecs should be at least largest + smallest = 2, got 1.",
        lambda n: lanczos(diagonal(), largest=2, max_matvecs=n),
        1,
        {"2": 2},
    ),
    argument(
        "max_basis_vectors should be at least largest + smallest + 2 = 3, got 2.",
        lambda n: finds(3.0)(max_basis_vectors=n),
        2,
        {"3": 3},
    ),
    argument("tol should be a positive float", lambda tol: finds(3.0)(tol=tol), 0.0, {"positive": 1e-6}),
    argument("resume is the state of another search: of largest 2", lambda n: resumed(n, of=2), 1, {"largest 2": 2}),
    argument(START, lambda n: finds(3.0)(start=torch.ones(n)), 4, {"3": 3}),
    argument("start should be finite.", lambda x: finds(3.0)(start=x * torch.ones(3)), torch.nan, {"finite": 1.0}),
    argument("damping should be a non-negative float", lambda d: solved(B, damping=d), -1.0, {"non-negative": 0.0}),
    argument(
        "max_matvecs should be at least 2, one product being kept for the residual",
        lambda n: conjugate_gradient(diagonal(), B, max_matvecs=n),
        1,
        {"at least 2": 2},
    ),
    Row(
        "b should be one vector, got shape (2, 3).",
        lambda: solved(torch.stack([B, B])),
        {"Solve for one after the other": lambda: [solved(b) for b in (B, 2 * B)]},
    ),
    argument(
        "map should be 'ascent' or 'sgd'", lambda m: followed(m), "descent", {"'ascent'": "ascent", "'sgd'": "sgd"}
    ),
    argument("delta_q should be a positive float", lambda d: followed(delta_q=d), 0.0, {"positive": 1e-2}),
    argument(
        "lr should be a positive float for the map 'sgd'",
        lambda given: followed(lr=0.0, **given),
        {"map": "sgd"},
        {"for the map 'sgd'": {"map": "ascent"}},
    ),
    argument(
        "lr should be a positive float for the map 'sgd'",
        lambda lr: followed("sgd", lr, count=2),
        0.0,
        {"a positive float": 0.1},
    ),
    argument("num_perturbations should be a positive int", lambda n: followed(count=n), 0, {"positive": 1}),
    argument(
        "num_perturbations should be at most the number of parameters 3", lambda n: followed(count=n), 4, {"3": 3}
    ),
    argument(
        "end should be 'largest' or 'smallest'",
        lambda end: near(power_iteration(diagonal(), end=end).values[0], {"largest": 3, "smallest": 1}[end], 0.02),
        "both",
        {"'largest'": "largest", "'smallest'": "smallest"},
    ),
    argument(
        "num_steps should be a positive int",
        lambda n: spectral_density(diagonal(), num_probes=2, num_steps=n),
        0,
        {"positive": 1},
    ),
    argument(
        "num_points should be an int of at least 4",
        lambda n: spectral_density(diagonal(), num_probes=2, num_steps=3).curve(n),
        3,
        {"4": 4},
    ),
    argument(
        "width should be a positive float",
        lambda width: spectral_density(diagonal(), num_probes=2, num_steps=3).curve(20, width),
        0.0,
        {"positive": 0.1},
    ),
    argument(
        "num_probes should be an int of at least 2",
        lambda n: near(
            stochastic_moments(diagonal(), num_probes=n, known=lanczos(diagonal(), largest=3)).trace.value, 6
        ),
        1,
        {"2": 2},
    ),
    argument("curvatures should be positive on average", lambda h: edge([h], [1.0]), -1.0, {"positive": 1.0}),
    argument("curvatures should be finite, one for each of", lambda h: edge(h, [1.0]), [1.0, 2.0], {"one": [1.0]}),
    argument("probabilities should be shares that add up to 1", lambda p: edge([1.0], [p]), 0.5, {"add up to 1": 1.0}),
    argument("agreement should be in (0, 1]", lambda p: _limit(p), 0.0, {"(0, 1]": 1.0}),
    argument(
        "min_lr should be a finite non-negative float", lambda lr: LRBounds(min_lr=lr), -1.0, {"non-negative": 0.0}
    ),
    argument("min_lr should be below max_lr", lambda lr: LRBounds(min_lr=lr, max_lr=0.1), 0.1, {"below max_lr": 0.05}),
    argument("max_growth should be above 1", lambda by: LRBounds(max_growth=by), 1.0, {"above 1": 1.01}),
    argument(
        "old and new should each hold at least one vector, all of one length",
        lambda n: near(subspace_overlap(torch.eye(3)[:1], torch.eye(n)[:1]), 1.0),
        2,
        {"all of one length": 3},
    ),
    argument(
        "groups should be 'layers', 'modules', the depth of the modules, or a dict of names and patterns",
        check_groups,
        "blocks",
        {"'layers'": "layers", "'modules'": "modules", "the depth": 2, "a dict": {"head": "net.*"}},
    ),
    argument(
        "An operator of size 1 has one eigenvalue: ask for the largest or the smallest, not both.",
        lambda end: near(ExtremeTracker("lanczos", end).measure(diagonal(ones(size=1))).values[0], 6.0),
        "both",
        {"the largest": "largest", "the smallest": "smallest"},
    ),
    argument("cycle should be an int of at least 4", lambda n: _online(n), 3, {"4": 4}),
    argument(
        "method should be one of",
        lambda method: has(diagonal(method=method), 3.0),
        "exact",
        {name: name for name in ("auto", "double_backward", "forward_over_reverse", "finite_difference")},
    ),
    argument(
        "step should be a positive float",
        lambda step: has(diagonal(step=step, method="finite_difference"), 3.0),
        0.0,
        {"positive": 1e-4},
    ),
    argument(
        "max_graph_bytes should be a non-negative int",
        lambda n: has(diagonal(max_graph_bytes=n), 3.0),
        -1,
        {"non-negative": 0},
    ),
]


def _limit(agreement: float) -> None:
    weight = ones()
    stability = stability_of(torch.optim.SGD([weight], lr=0.1), [weight])
    assert stability is not None
    near(stability.limit_at(agreement), 20.0)


def _online(cycle: int) -> None:
    estimate, pair = OnlineEigenpair(cycle=cycle), None
    for _ in range(60):
        pair = estimate.step(diagonal())
    assert pair is not None
    near(pair.value, 1.0, 1e-2)


ROWS = [*DERIVATIVES, *LOSSES, *GAUSS_NEWTON, *PLANES, *MATRICES, *ARGUMENTS]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_what_the_message_says_to_do_helps(row: Row) -> None:
    check(row)


def test_a_row_that_does_not_help_is_noticed() -> None:
    refused = lambda: lanczos(diagonal(), largest=4)  # noqa: E731
    wrong = [
        Row("at most the operator's size", lambda: None, {"3": lambda: None}),
        Row("at most the operator's size", refused, {"3": refused}),
        Row("at most the operator's size", refused, {"Ask for fewer": lambda: None}),
    ]
    for row, reason in zip(wrong, ("was not said", "leads to", "is not what"), strict=True):
        with pytest.raises(AssertionError, match=reason):
            check(row)


def test_grid_sample_has_a_second_derivative() -> None:
    grid = nn.Parameter(torch.full((1, 2, 2, 2), 0.2, dtype=torch.float64))
    image = torch.arange(9.0, dtype=torch.float64).view(1, 1, 3, 3).sin()
    operator = HessianOperator(
        lambda batch: functional.grid_sample(batch, grid, align_corners=True).square().sum(), [grid], [image]
    )
    found = operator.check(finite_difference=True)
    assert operator.method == "double_backward"
    assert found.inexactness is not None
    assert found.inexactness < 1e-5
