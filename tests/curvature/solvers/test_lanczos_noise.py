"""What is reported of operators that are not quite symmetric, or not quite the same at every product."""

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import Eigenpairs, HessianOperator, LinearOperator, lanczos
from tests.curvature.helpers import DenseOperator, symmetric_matrix
from tests.curvature.spectra import uniform


def digits(activation: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network, with the images and labels that it knows."""
    data = load_digits()
    images = torch.tensor(data.data[:200] / 16, dtype=torch.float32)
    labels = torch.tensor(data.target[:200])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.to(dtype), images.to(dtype), labels


def differences(activation: type[nn.Module]) -> HessianOperator:
    model, images, labels = digits(activation)
    return HessianOperator(
        lambda batch: functional.cross_entropy(model(batch), labels),
        model.parameters(),
        [images],
        method="finite_difference",
    )


def half_precision(activation: type[nn.Module]) -> HessianOperator:
    model, images, labels = digits(activation)

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch)
        return functional.cross_entropy(outputs.float(), labels)

    return HessianOperator(loss, model.parameters(), [images])


def half_parameters(activation: type[nn.Module]) -> HessianOperator:
    model, images, labels = digits(activation, torch.bfloat16)
    return HessianOperator(
        lambda batch: functional.cross_entropy(model(batch).float(), labels), model.parameters(), [images]
    )


def own_generator(activation: type[nn.Module]) -> HessianOperator:
    model, images, labels = digits(activation)
    generator = torch.Generator().manual_seed(0)

    def loss(batch: Tensor) -> Tensor:
        mask = torch.rand(batch.shape, generator=generator) > 0.3
        return functional.cross_entropy(model(batch * mask), labels)

    return HessianOperator(loss, model.parameters(), [images], max_graph_bytes=0)


def own_residuals(operator: LinearOperator, pairs: Eigenpairs) -> Tensor:
    products = [operator.matvec(vector) for vector in pairs.vectors]
    values = pairs.values.to(pairs.vectors)
    residuals = [p - v * x for p, v, x in zip(products, values, pairs.vectors, strict=True)]
    return torch.stack([torch.linalg.vector_norm(residual).double() for residual in residuals])


@pytest.mark.parametrize(("count", "tol"), [(1, 1e-2), (2, 1e-3)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("noisy", [differences, half_precision, half_parameters, own_generator])
def test_residuals_are_those_of_the_products_or_the_pair_has_not_converged(
    noisy: Callable[[type[nn.Module]], HessianOperator], activation: type[nn.Module], count: int, tol: float
) -> None:
    operator = noisy(activation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = lanczos(operator, largest=count, smallest=count, tol=tol, max_matvecs=150)
        own = own_residuals(operator, pairs)
    assert bool(((pairs.residuals >= own / 3) | ~pairs.converged).all()), (pairs.residuals, own)


def test_the_noise_of_the_products_bounds_what_is_claimed_of_the_values() -> None:
    generator = torch.Generator().manual_seed(0)

    class Noisy(DenseOperator):
        def matvec(self, vector: Tensor) -> Tensor:
            product = super().matvec(vector)
            noise = torch.randn(len(vector), generator=generator, dtype=vector.dtype) / len(vector) ** 0.5
            return product + 1e-2 * noise

    spectrum = [5.0, 4.0, *uniform(396, -1, 1), -2.0, -3.0]
    pairs = lanczos(Noisy(symmetric_matrix(spectrum)), largest=1, smallest=1, tol=1e-6, max_matvecs=400)
    assert not bool(pairs.converged.any())
    assert bool((pairs.residuals >= 3e-3).all())
    pairs = lanczos(Noisy(symmetric_matrix(spectrum)), largest=1, smallest=1, tol=1e-2)
    assert bool(pairs.converged.all())
    assert bool((pairs.residuals >= 2.5e-3).all())


def test_an_asymmetric_matrix_has_its_own_residuals() -> None:
    matrix = symmetric_matrix([5.0, 4.0, *uniform(296, -1, 1), -2.0, -3.0])
    skew = torch.randn(300, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = matrix + 0.02 * (skew - skew.T) / 300**0.5
    operator = DenseOperator(matrix)
    pairs = lanczos(operator, largest=2, smallest=2, tol=1e-4, max_matvecs=300)
    own = own_residuals(operator, pairs)
    assert bool((pairs.residuals >= 0.9 * own).all())
    assert not bool(pairs.converged.any())


def test_products_of_symmetric_matrices_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[lanczos.__module__], "_measured", None)
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        operator = DenseOperator(symmetric_matrix([5.0, 4.0, *uniform(296, -1, 1), -2.0, -3.0]).to(dtype))
        pairs = lanczos(operator, tol=tol)
        own = own_residuals(operator, pairs)
        assert bool((own <= 1.001 * pairs.residuals + torch.finfo(dtype).eps).all())
