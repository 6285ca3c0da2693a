"""Cross-entropy equals PyTorch's in value and in every derivative, in half of the memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.compat.cross_entropy import cross_entropy
from lyapunov_lightning.curvature.compat.functions import check_twice_differentiable
from tests.curvature.helpers import relative_error, vector
from tests.curvature.memory import PeakMemory

CLASSES = 4
SHAPES = {"rows": (5, CLASSES), "sequences": (3, CLASSES, 6), "a single row": (CLASSES,)}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alone": lambda loss, _: loss.sum(),
    "not linear": lambda loss, _: loss.square().sum() + loss.sum(),
    "some times zero": lambda loss, _: (loss * torch.arange(loss.numel()).view(loss.shape)).sum(),
    "with its gradient": lambda loss, scores: (
        2 * loss.sum() + torch.autograd.grad(loss.sum(), scores, create_graph=True)[0].square().sum()
    ),
    "with some of its gradient": lambda loss, scores: (
        loss.sum() + torch.autograd.grad(loss.reshape(-1)[0], scores, create_graph=True)[0].square().sum()
    ),
}


def problem(shape: tuple[int, ...], seed: int, ignored: int) -> tuple[Tensor, Tensor]:
    """Scores, with the classes next to each other in memory, and labels of which one is ignored if there are more."""
    rows = [*shape[:1], *shape[2:]] if len(shape) > 1 else []
    scores = 3 * vector(int(torch.tensor([*rows, CLASSES]).prod()), seed).view(*rows, CLASSES)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, rows, generator=generator)
    if rows:
        labels.view(-1)[1] = ignored
    else:
        labels.fill_(1)
    return scores.movedim(-1, 1) if rows else scores, labels


def derivatives(function: Any, loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, *args: Any, **options: Any):
    """Value, gradient, a product, the gradient of a product, and a product of the kept graph once more."""
    scores = scores.clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(scores, *args, **options)
    total = loss(value, scores)
    assert not check_twice_differentiable(total)  # which tells it that this gradient is the one to keep
    (gradient,) = torch.autograd.grad(total, scores, create_graph=True)
    along = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view(scores.shape)
    (second,) = torch.autograd.grad((gradient * along).sum(), scores, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), scores, retain_graph=True)
    (again,) = torch.autograd.grad((gradient * along).sum(), scores)
    return [tensor.detach() for tensor in (value, gradient, second, third, again)]


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    loss=st.sampled_from(sorted(LOSSES)),
    weighted=st.booleans(),
    ignored=st.sampled_from([-100, 2]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 9),
)
def test_equals_pytorch_up_to_the_third_derivative(
    shape: str, loss: str, weighted: bool, ignored: int, reduction: str, smoothing: float, seed: int
) -> None:
    scores, labels = problem(SHAPES[shape], seed, ignored)
    options: dict[str, Any] = {"ignore_index": ignored, "reduction": reduction, "label_smoothing": smoothing}
    if weighted:  # one class not at all
        options["weight"] = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    ours, theirs = (
        derivatives(function, LOSSES[loss], scores, labels, **options)
        for function in (cross_entropy, functional.cross_entropy)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_scores_of_any_size_have_a_finite_loss() -> None:
    """Of which the probability of the label, and so its logarithm by itself, has underflown."""
    scores = torch.tensor([[0.0, 500.0, -2000.0]], requires_grad=True)
    for label in range(3):
        target = torch.tensor([label])
        assert torch.equal(cross_entropy(scores, target), functional.cross_entropy(scores, target))


def test_the_mean_over_no_labels_is_nan() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    assert cross_entropy(scores, torch.tensor([-100, -100])).isnan()


def of_pytorch(scores: Tensor, target: Tensor, **options: Any) -> bool:
    loss = cross_entropy(scores, target, **options)
    return type(loss.grad_fn) is type(functional.cross_entropy(scores, target, **options).grad_fn)


def test_what_is_left_to_pytorch() -> None:
    scores, labels = vector(12).view(3, 4).requires_grad_(), torch.tensor([0, 1, 3])
    assert not of_pytorch(scores, labels, reduction="sum")
    assert of_pytorch(scores, torch.softmax(scores.detach(), 1))
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        cross_entropy(scores, labels, weight=torch.ones(4, dtype=torch.float64, requires_grad=True))
    assert of_pytorch(scores.bfloat16(), labels)
    images = vector(24).view(2, 3, 2, 2).requires_grad_()
    assert of_pytorch(images, torch.zeros(2, 2, 2, dtype=torch.long))
    with pytest.warns(UserWarning, match="size_average"):
        assert of_pytorch(scores, labels, size_average=True)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(scores.detach(), torch.tensor([0, 1, 4]))
    transformed = torch.func.jacrev(torch.func.grad(lambda z: cross_entropy(z, labels)))(scores.detach())
    expected = torch.func.jacrev(torch.func.grad(lambda z: functional.cross_entropy(z, labels)))(scores.detach())
    assert torch.equal(transformed, expected)


def test_autocast_widens_the_scores() -> None:
    weight = vector(12).view(3, 4).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            f(torch.ones(2, 3) @ weight, torch.tensor([0, 3])) for f in (cross_entropy, functional.cross_entropy)
        )
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_products_of_a_network_are_exact(scale: float | None, options: dict[str, Any]) -> None:
    """Also where the loss is multiplied by a parameter, zero among them, as in weights of several losses."""
    inputs, labels = vector(15).view(5, 3), torch.tensor([0, 3, 1, -100, 2])
    parameters = [vector(12, 1).view(3, 4).requires_grad_()]
    if scale is not None:
        parameters.append(torch.zeros(1, dtype=torch.float64, requires_grad=True))

    def loss(weight: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        return (factor * functional.cross_entropy(torch.tanh(inputs @ weight), labels, **options)).sum()

    operator = HessianOperator(lambda _: loss(*parameters), parameters, [inputs], method="double_backward")
    size = operator.size

    def by_flat(flat: Tensor) -> Tensor:
        return loss(flat[:12].view(3, 4), *([flat[12:]] if scale is not None else []))

    dense = torch.autograd.functional.hessian(by_flat, torch.cat([p.detach().reshape(-1) for p in parameters]))
    for _ in range(2):
        assert relative_error(operator.matvec(vector(size, 3)), dense @ vector(size, 3)) <= 1e-12


@pytest.mark.parametrize(("keep", "share"), [(True, 0.52), (False, 0.6)])
def test_half_of_the_memory_of_double_backward_is_enough(keep: bool, share: float) -> None:
    """By what operations return. What PyTorch's kernels take besides is not seen: of the process it is 45 and 51 %."""
    rows, words, width = 256, 2000, 4
    inputs, labels = torch.ones(rows, width), torch.arange(rows)
    parameters = [torch.eye(width, requires_grad=True), torch.ones(words, width, requires_grad=True)]

    def loss(_: object = None) -> Tensor:
        return functional.cross_entropy(torch.tanh(inputs @ parameters[0]) @ parameters[1].T, labels)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), parameters, create_graph=True)

    ones = [torch.ones_like(parameter) for parameter in parameters]
    operator = HessianOperator(
        loss, parameters, [inputs], method="double_backward", max_graph_bytes=2**40 if keep else 0
    )
    flat = torch.ones(operator.size)
    peaks = []
    with PeakMemory() as memory:
        kept = gradient() if keep else None
        for _ in range(2):
            torch.autograd.grad(kept or gradient(), parameters, ones, retain_graph=keep)
    peaks.append(memory.num_bytes)
    with PeakMemory() as memory:
        for _ in range(2):
            operator.matvec(flat)
    peaks.append(memory.num_bytes)
    assert peaks[1] <= share * peaks[0]
    # The gradient, which the layer below keeps, two that this layer adds up, and their sum.
    assert peaks[1] <= 4.3 * 4 * rows * words
