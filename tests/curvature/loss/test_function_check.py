"""Functions that are not PyTorch's own are trusted where their derivatives are right, and measured otherwise if not.

Each function has a loss in plain PyTorch with the same values, whose dense Hessian in float64 is the reference; where
the backward pass is none of a forward pass by intention, it is the derivative of the gradients by central differences.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lyapunov_lightning.curvature import (
    CurvatureWarning,
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    MeasurementError,
    lanczos,
)
from tests.curvature.helpers import METHODS, Twin, random_vectors, relative_error, vector
from tests.problems import mlp


def function(forward: Callable[..., Any], backward: Callable[..., Any], name: str) -> Any:
    """A function of one forward and one backward pass."""
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def keeping(forward: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor], name: str) -> Any:
    """A function of single numbers that computes its derivative in the forward pass."""

    def keep(ctx: Any, x: Tensor) -> Tensor:
        ctx.derivative = derivative(x)
        return forward(x)

    return function(keep, lambda ctx, gradient: gradient * ctx.derivative, name)


def anew(forward: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor], name: str) -> Any:
    """A function of single numbers that computes its derivative in the backward pass, as it should."""

    def save(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return forward(x)

    return function(save, lambda ctx, gradient: gradient * derivative(ctx.saved_tensors[0]), name)


class KeptCrossEntropy(torch.autograd.Function):
    """The gradient made in the forward pass, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        gradient = scores.softmax(-1)
        gradient[range(len(labels)), labels] -= 1
        ctx.save_for_backward(gradient / len(labels))
        return functional.cross_entropy(scores, labels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(scores, labels)
        return functional.cross_entropy(scores, labels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scores, labels = ctx.saved_tensors
        one_hot = functional.one_hot(labels, scores.shape[-1])
        return gradient * (scores.softmax(-1) - one_hot) / len(labels), None


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Takes the weight of the last layer itself, and never holds the scores of all samples."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        of_hidden, of_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        loss = torch.zeros((), dtype=hidden.dtype)
        for rows, targets, slot in zip(hidden.split(2), labels.split(2), of_hidden.split(2), strict=True):
            scores = rows @ weight.T
            loss += functional.cross_entropy(scores, targets, reduction="sum") / len(labels)
            gradient = (scores.softmax(-1) - functional.one_hot(targets, len(weight))) / len(labels)
            slot.copy_(gradient @ weight)
            of_weight += gradient.T @ rows
        ctx.save_for_backward(of_hidden, of_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return gradient * of_hidden, gradient * of_weight, None


class LinearTanh(torch.autograd.Function):
    """Takes a weight itself, and keeps the derivative of the tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.tanh(x @ weight.T)
        ctx.save_for_backward(x, weight, 1 - y**2)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, derivative = ctx.saved_tensors
        return (gradient * derivative) @ weight, (gradient * derivative).T @ x


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


class TwoOutputs(torch.autograd.Function):
    """Has two outputs that are differentiated and one that is not; keeps the second as a plain number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, x.exp())
        places = x.argmax(-1)
        ctx.mark_non_differentiable(places)
        return x.sin(), x.exp(), places

    @staticmethod
    def backward(ctx: Any, of_sine: Tensor, of_exp: Tensor, _: Tensor) -> Tensor:
        x, exp = ctx.saved_tensors
        return of_sine * x.cos() + of_exp * exp


class Given(torch.autograd.Function):
    """Is handed its value and its gradient, which others have computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.gradient, None, None


class Sine(torch.autograd.Function):
    """Written for the transforms of `torch.func`, with a method of its own that saves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class DetachedSine(Sine):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0].detach())


class Doubled(torch.autograd.Function):
    """Calls another function in both of its passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * Sine.apply(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * Sine.apply(ctx.saved_tensors[0] + torch.pi / 2)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT


class Root(torch.autograd.Function):
    """The square root of symmetric matrices, whose backward pass is right for these alone."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return _root(matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(ctx.saved_tensors[0])
        roots = values.sqrt()
        inner = vectors.mT @ ((gradient + gradient.mT) / 2) @ vectors
        return vectors @ (inner / (roots.unsqueeze(-1) + roots.unsqueeze(-2))) @ vectors.mT


def sigmoid_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 - x.sigmoid())


KeptSigmoid = keeping(torch.sigmoid, sigmoid_slope, "KeptSigmoid")
Sigmoid = anew(torch.sigmoid, sigmoid_slope, "Sigmoid")
PartDetached = anew(lambda x: x * x.tanh(), lambda x: x.tanh() + x * (1 - x.detach().tanh() ** 2), "PartDetached")
Relu = anew(torch.relu, lambda x: (x > 0).to(x.dtype), "Relu")
StraightThrough = function(lambda ctx, x: (4 * x).round() / 4, lambda ctx, gradient: gradient, "StraightThrough")
Reversal = function(lambda ctx, x: x.view_as(x), lambda ctx, gradient: -gradient, "Reversal")
Scaling = function(lambda ctx, x: x.view_as(x), lambda ctx, gradient: 0.3 * gradient, "Scaling")


Weights = dict[str, Tensor]
Loss = Callable[[Weights, Tensor, Tensor], Tensor]


def network(
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    last: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    linear: Callable[[Tensor, Tensor], Tensor] = functional.linear,
) -> Loss:
    def loss(weights: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
        hidden = activation(linear(inputs, weights["first"]) + weights["bias"])
        hidden = activation(hidden @ weights["second"])
        return last(hidden @ weights["third"].T, labels)

    return loss


def of_matrices(root: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def activation(x: Tensor) -> Tensor:
        matrices = x.unsqueeze(-1) * x.unsqueeze(-2) + torch.diag(1 + torch.arange(x.shape[-1], dtype=x.dtype))
        return root(matrices).mean(-1)

    return activation


def handed(scores: Tensor, labels: Tensor) -> Tensor:
    apart = scores.detach().requires_grad_()
    value = functional.cross_entropy(apart, labels)
    return Given.apply(scores, value.detach(), torch.autograd.grad(value, apart)[0])


def chunked(weights: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
    hidden = torch.tanh(inputs @ weights["first"].T + weights["bias"])
    return ChunkedLinearCrossEntropy.apply(torch.tanh(hidden @ weights["second"]), weights["third"], labels)


class Case(NamedTuple):
    loss: Loss
    plain: Loss


def outputs_of(two: tuple[Tensor, ...]) -> Tensor:
    return two[0] + 0.1 * two[1]


WRONG = {
    "KeptCrossEntropy": Case(network(last=KeptCrossEntropy.apply), network()),
    "KeptCrossEntropy after ReLU": Case(network(torch.relu, KeptCrossEntropy.apply), network(torch.relu)),
    "ChunkedLinearCrossEntropy": Case(chunked, network()),
    "LinearTanh": Case(network(linear=LinearTanh.apply), network(linear=lambda x, w: torch.tanh(x @ w.T))),
    "KeptSigmoid": Case(network(KeptSigmoid.apply), network(torch.sigmoid)),
    "KeptSigmoid in a checkpoint": Case(
        network(lambda x: checkpoint(KeptSigmoid.apply, x, use_reentrant=False)), network(torch.sigmoid)
    ),
    "PartDetached": Case(network(PartDetached.apply), network(lambda x: x * x.tanh())),
    "TwoOutputs": Case(
        network(lambda x: outputs_of(TwoOutputs.apply(x))), network(lambda x: outputs_of((x.sin(), x.exp())))
    ),
    "DetachedSine": Case(network(DetachedSine.apply), network(torch.sin)),
    "DetachedSine in vmap": Case(network(torch.func.vmap(DetachedSine.apply)), network(torch.sin)),
    "Given": Case(network(last=handed), network()),
}
"""The first word of each is the function that is to be named."""

RIGHT = {
    "CrossEntropy": Case(network(last=CrossEntropy.apply), network()),
    "CrossEntropy after ReLU": Case(network(torch.relu, CrossEntropy.apply), network(torch.relu)),
    "Sigmoid": Case(network(Sigmoid.apply), network(torch.sigmoid)),
    "Sigmoid, checkpointed": Case(
        network(lambda x: checkpoint(Sigmoid.apply, x, use_reentrant=False)), network(torch.sigmoid)
    ),
    "Relu": Case(network(Relu.apply), network(torch.relu)),
    "Linear": Case(network(torch.relu, linear=Linear.apply), network(torch.relu)),
    "Sine": Case(network(Sine.apply), network(torch.sin)),
    "Sine, vmap": Case(network(torch.func.vmap(Sine.apply)), network(torch.sin)),
    "Doubled": Case(network(Doubled.apply), network(lambda x: 2 * x.sin())),
    "Root": Case(network(of_matrices(Root.apply)), network(of_matrices(_root))),
}


class Setting:
    """A loss on weights and data, of a width and a dtype."""

    def __init__(self, width: int = 5, samples: int = 6, dtype: torch.dtype = torch.float64) -> None:
        shapes = {"first": (width, 4), "bias": (width,), "second": (width, width), "third": (3, width)}
        self.weights = {
            name: (random_vectors(1, torch.Size(shape).numel(), seed)[0].view(shape) / width**0.5).to(dtype)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        for weight in self.weights.values():
            weight.requires_grad_()
        inputs = random_vectors(samples, 4, seed=9).to(dtype)
        self.batch = inputs, torch.arange(samples) % 3

    def operator(self, loss: Loss, **options: Any) -> HessianOperator:
        return HessianOperator(lambda batch: loss(self.weights, *batch), self.weights, [self.batch], **options)

    def hessian(self, plain: Loss) -> Tensor:
        """The dense Hessian of a loss in plain PyTorch, in float64."""
        inputs, labels = self.batch
        sizes = [weight.numel() for weight in self.weights.values()]

        def at(flat: Tensor) -> Tensor:
            pieces = zip(self.weights.items(), flat.split(sizes), strict=True)
            return plain({name: piece.view(w.shape) for (name, w), piece in pieces}, inputs.double(), labels)

        flat = torch.cat([weight.detach().double().reshape(-1) for weight in self.weights.values()])
        return torch.autograd.functional.hessian(at, flat)

    def derivative_of_gradients(self, loss: Loss) -> Tensor:
        """How the gradients of a loss change, by central differences: its columns."""
        leaves = list(self.weights.values())
        columns = []
        for weight in leaves:
            for place in range(weight.numel()):
                sides = []
                for way in (1e-5, -1e-5):
                    with torch.no_grad():
                        weight.view(-1)[place] += way
                    gradient = torch.autograd.grad(loss(self.weights, *self.batch), leaves)
                    sides.append(torch.cat([entry.reshape(-1) for entry in gradient]))
                    with torch.no_grad():
                        weight.view(-1)[place] -= way
                columns.append((sides[0] - sides[1]) / 2e-5)
        return torch.stack(columns, dim=1)


@pytest.mark.parametrize("name", WRONG)
def test_what_a_function_hides_of_its_derivative_is_measured_by_differences(name: str) -> None:
    setting, case = Setting(), WRONG[name]
    operator = setting.operator(case.loss)
    direction = vector(operator.size)
    with pytest.warns(CurvatureWarning, match=rf"finite differences.*{name.split()[0]} uses numbers that were kept"):
        product = operator.matvec(direction)
    assert operator.method == "finite_difference"
    assert relative_error(product, setting.hessian(case.plain) @ direction) <= 1e-5
    with pytest.raises(
        MeasurementError, match=rf"'finite_difference'.*{name.split()[0]} uses numbers.*from the inputs"
    ):
        setting.operator(case.loss, method="double_backward").matvec(direction)


@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("name", ["KeptCrossEntropy", "KeptCrossEntropy after ReLU", "KeptSigmoid", "TwoOutputs"])
def test_what_a_function_hides_is_found_in_float32(name: str, width: int) -> None:
    operator = Setting(width, 4 * width, torch.float32).operator(WRONG[name].loss)
    with pytest.warns(CurvatureWarning, match="uses numbers that were kept"):
        operator.matvec(vector(operator.size))
    assert operator.method == "finite_difference"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [5, 24])
@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_are_trusted(name: str, width: int, dtype: torch.dtype) -> None:
    setting, case = Setting(width, 2 * width, dtype), RIGHT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = setting.operator(case.loss)
        direction = vector(operator.size)
        product = operator.matvec(direction)
    assert operator.method == "double_backward"
    if width == 5:
        error = relative_error(product, setting.hessian(case.plain) @ direction)
        assert error <= (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_functions_are_trusted_in_large_networks_with_kinks(dtype: torch.dtype) -> None:
    """Where the difference of gradients of the whole loss is off by more than wrong functions are."""
    setting = Setting(256, 512, dtype)
    operator = setting.operator(network(torch.relu, CrossEntropy.apply))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.matvec(vector(operator.size).to(dtype))
    assert operator.method == "double_backward"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_right_functions_of_small_and_large_numbers_are_trusted(scale: float, dtype: torch.dtype) -> None:
    setting = Setting(dtype=dtype)
    operator = setting.operator(network(lambda x: Sigmoid.apply(scale * x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.matvec(vector(operator.size).to(dtype))


def test_a_part_that_the_loss_holds_constant_is_no_fault_of_a_function() -> None:
    """Another network's output, say, without its gradient."""
    setting = Setting()
    dot = function(
        lambda ctx, x, t: (ctx.save_for_backward(x, t), (x * t).sum().sin())[1],
        lambda ctx, gradient: ((gradient * (x_t := ctx.saved_tensors)[0].mul(x_t[1]).sum().cos()) * x_t[1], None),
        "Dot",
    )

    def loss(weights: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ weights["first"].T + weights["bias"])
        return dot.apply(hidden, hidden.flip(0).detach())

    operator = setting.operator(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.matvec(vector(operator.size))


def test_straight_through_layers_are_trusted() -> None:
    """Their forward pass is constant nearly everywhere; what is meant is what their backward pass says."""
    setting = Setting()
    operator = setting.operator(network(lambda x: StraightThrough.apply(x.tanh())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.matvec(vector(operator.size))
    assert operator.method == "double_backward"


@pytest.mark.parametrize("layer", [Reversal, Scaling], ids=lambda layer: layer.__name__)
def test_layers_that_change_the_gradient_are_measured_as_the_gradients_that_the_training_follows(layer: Any) -> None:
    setting = Setting()
    loss = network(lambda x: torch.tanh(layer.apply(x)))
    operator = setting.operator(loss)
    direction = vector(operator.size)
    with pytest.warns(
        CurvatureWarning, match=rf"{layer.__name__} is not the derivative.*gradients change that the training follows"
    ):
        product = operator.matvec(direction)
    assert relative_error(product, setting.derivative_of_gradients(loss) @ direction) <= 1e-5
    with pytest.raises(MeasurementError, match=rf"{layer.__name__} is not the derivative"):
        setting.operator(loss, method="double_backward").matvec(direction)


def test_the_check_comes_before_the_first_eigenvalue() -> None:
    setting, case = Setting(), WRONG["KeptCrossEntropy"]
    operator = setting.operator(case.loss)
    with pytest.warns(CurvatureWarning, match="KeptCrossEntropy"):
        found = lanczos(operator, largest=1, smallest=1)
    exact = torch.linalg.eigvalsh(setting.hessian(case.plain))
    assert torch.allclose(found.values, exact[[-1, 0]], rtol=1e-3)


@pytest.mark.parametrize("how", ["rebuilt", "kept"])
def test_the_check_is_made_once_an_operator_and_not_at_all_of_pytorchs_own(how: str) -> None:
    setting = Setting()
    evaluations = 0

    def counted(loss: Loss) -> Loss:
        def count(*arguments: Any) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return loss(*arguments)

        return count

    counts = {}
    for name, loss in (("own", network(last=CrossEntropy.apply)), ("pytorch", network())):
        operator = setting.operator(counted(loss), **METHODS[how])
        direction = vector(operator.size)
        counts[name] = []
        for _ in range(3):
            evaluations = 0
            operator.matvec(direction)
            counts[name].append(evaluations)
    assert counts["pytorch"] == ([1, 0, 0] if how == "kept" else [1, 1, 1])
    assert counts["own"] == [counts["pytorch"][0] + 1, *counts["pytorch"][1:]]


def test_nothing_is_left_of_a_check() -> None:
    setting = Setting()
    before = dict(vars(CrossEntropy)), dict(vars(Sine)), torch.get_rng_state()
    operator = setting.operator(network(Sine.apply, CrossEntropy.apply))
    operator.matvec(vector(operator.size))
    assert (dict(vars(CrossEntropy)), dict(vars(Sine))) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(weight.grad is None for weight in setting.weights.values())


def test_a_loss_on_a_copy_of_the_model_is_checked_as_well() -> None:
    problem = mlp()
    keep = KeptSigmoid.apply
    operator = Twin(problem, extra=lambda model: keep(next(model.parameters())).sum()).operator()
    with pytest.warns(CurvatureWarning, match="KeptSigmoid uses numbers"):
        operator.matvec(vector(operator.size))


# Gauss–Newton and the empirical Fisher.


def through_outputs(activation: Callable[[Tensor], Tensor], last: Any) -> tuple[GaussNewtonOperator, Tensor]:
    """The operator, and the dense matrix of a network with a plain tanh and cross-entropy."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
    parameters = [*first.parameters(), *second.parameters()]
    inputs, labels = random_vectors(6, 4), torch.arange(6) % 3
    operator = GaussNewtonOperator(
        lambda batch: second(activation(first(batch))), lambda scores, _: last(scores, labels), parameters, [inputs]
    )
    scores = second(torch.tanh(first(inputs)))
    rows = [torch.autograd.grad(score, parameters, retain_graph=True) for score in scores.reshape(-1)]
    jacobian = torch.stack([torch.cat([entry.reshape(-1) for entry in row]) for row in rows])
    inner = torch.autograd.functional.hessian(
        lambda z: functional.cross_entropy(z.view(6, 3), labels), scores.detach().reshape(-1)
    )
    return operator, jacobian.T @ inner @ jacobian


def test_gauss_newton_refuses_a_loss_that_hides_its_own_curvature() -> None:
    operator, _ = through_outputs(torch.tanh, KeptCrossEntropy.apply)
    with pytest.raises(MeasurementError, match=r"HessianOperator.*KeptCrossEntropy uses numbers"):
        operator.matvec(vector(operator.size))


def test_gauss_newton_needs_one_derivative_of_the_model_only() -> None:
    keeps = keeping(torch.tanh, lambda x: 1 - x.tanh() ** 2, "KeptTanh")
    operator, exact = through_outputs(keeps.apply, CrossEntropy.apply)
    assert relative_error(operator.to_dense(), exact) <= 1e-12


def test_gauss_newton_and_fisher_refuse_layers_that_change_the_gradient() -> None:
    operator, _ = through_outputs(Reversal.apply, functional.cross_entropy)
    weight = vector(3).requires_grad_()
    fisher = EmpiricalFisherOperator(
        lambda batch: Reversal.apply(batch @ weight) ** 2, [weight], [random_vectors(4, 3)]
    )
    for measured in (operator, fisher):
        with pytest.raises(MeasurementError, match="Reversal is not the derivative"):
            measured.matvec(vector(measured.size))
