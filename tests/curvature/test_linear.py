"""What an operator is to others: its products by `@`, its matrix, SciPy's operator; and the scaled operator."""

import builtins
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg, eigsh, lobpcg
from torch import Tensor, nn

from lyapunov_lightning.curvature import HessianOperator, ScaledOperator, SymmetricOperator, lanczos
from lyapunov_lightning.curvature.linear import parameters_of
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from tests.curvature.helpers import DenseOperator, random_vectors, relative_error, symmetric_matrix
from tests.problems import mlp


class Matrix(SymmetricOperator):
    """The least that an operator has to do for all the rest."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(VectorSpace(len(matrix), matrix.dtype, matrix.device))
        self._matrix = matrix

    def matvec(self, vector: Tensor) -> Tensor:
        return self._matrix @ vector


def named_hessian(parameters: Any = None) -> HessianOperator:
    problem = mlp()
    return HessianOperator(problem.loss, parameters or problem.model.named_parameters(), problem.batches)


# Products.


def test_it_tells_its_shape_dtype_and_device() -> None:
    operator = Matrix(symmetric_matrix(range(20)).float())
    assert (operator.shape, operator.size, operator.dtype) == ((20, 20), 20, torch.float32)
    assert operator.device == torch.device("cpu")
    assert operator.T is operator


def test_it_multiplies_vectors_and_blocks_of_columns_from_both_sides() -> None:
    matrix = symmetric_matrix(range(-5, 15))
    operator = Matrix(matrix)
    block = random_vectors(3, 20).T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (block[:, 0], block, block.float()):
            given = factor.clone()
            assert relative_error(operator @ factor, matrix @ factor.double()) < 1e-14
            assert torch.equal(factor, given)
        for factor in (block[:, 0], block.T):
            assert relative_error(factor @ operator, factor @ matrix) < 1e-14
        assert abs(float(block[:, 0] @ operator @ block[:, 0] - block[:, 0] @ matrix @ block[:, 0])) < 1e-12
        assert (operator @ block[:, :0]).shape == (20, 0)


def test_numpy_arrays_give_numpy_arrays() -> None:
    matrix = symmetric_matrix(range(-5, 15))
    operator, block = Matrix(matrix), random_vectors(3, 20).T.numpy()
    read_only = block[:, 0].copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (read_only, block, block[::-1], block[::-1, 1].astype(np.float32), np.arange(20)):
            product = operator @ factor
            assert isinstance(product, np.ndarray)
            assert product.dtype == np.float64
            assert np.allclose(product, matrix.numpy() @ factor, rtol=1e-13, atol=1e-13)
        assert np.allclose(block.T @ operator, block.T @ matrix.numpy(), rtol=1e-13, atol=1e-13)
        assert np.allclose(block[:, 0] @ operator, block[:, 0] @ matrix.numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", [list, tuple])
def test_tensors_in_the_shapes_of_the_parameters_give_such(kind: type) -> None:
    problem = mlp()
    operator = problem.operator()
    pieces = kind(torch.randn(p.shape, dtype=torch.float64) for p in problem.parameters)
    expected = operator.matvec(torch.cat([piece.reshape(-1) for piece in pieces]))
    for product in (operator @ pieces, pieces @ operator):
        assert type(product) is kind
        assert [piece.shape for piece in product] == [p.shape for p in problem.parameters]
        assert torch.equal(torch.cat([piece.reshape(-1) for piece in product]), expected)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_dictionaries_are_read_by_the_names_of_the_parameters(kind: type) -> None:
    problem = mlp()
    named = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in problem.model.named_parameters()}
    expected = problem.operator() @ list(named.values())
    for parameters in (problem.model.named_parameters(), dict(problem.model.named_parameters())):
        operator = HessianOperator(problem.loss, parameters, problem.batches)
        product = operator @ kind(reversed(named.items()))
        assert list(product) == list(named)
        assert all(map(torch.equal, product.values(), expected))


def test_products_in_half_precision_shapes_are_in_their_precision() -> None:
    problem = mlp().to(torch.bfloat16)
    operator = problem.operator()
    product = operator @ [torch.ones_like(p) for p in problem.parameters]
    assert {piece.dtype for piece in product} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.ones(19), r"\(20, 20\).*got torch.float32 of shape \(19,\)"),
        (torch.ones(19, 20), r"shape \(19, 20\)"),
        (torch.ones(20, 1, 1), r"shape \(20, 1, 1\)"),
        (torch.ones(()), r"shape \(\)"),
        (torch.ones(20, dtype=torch.complex64), "complex64"),
        (np.ones(19), r"shape \(19,\)"),
        (np.ones(20) * 1j, "complex128"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(factor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matrix(symmetric_matrix(range(20))) @ factor


@pytest.mark.parametrize("factor", [[torch.ones(20)], {"x": torch.ones(20)}, "x", 2.0])
def test_what_is_no_vector_is_refused_by_python(factor: Any) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        Matrix(symmetric_matrix(range(20))) @ factor


def test_structures_that_are_not_those_of_the_parameters_are_refused() -> None:
    problem = mlp()
    pieces = [torch.ones_like(p) for p in problem.parameters]
    named = dict(zip("abcd", pieces, strict=True))
    with pytest.raises(ValueError, match=r"shapes of the parameters.*\(6, 4\).*got.*\(4, 6\)"):
        problem.operator() @ [pieces[0].T, *pieces[1:]]
    with pytest.raises(ValueError, match="shapes of the parameters"):
        problem.operator() @ pieces[1:]
    with pytest.raises(ValueError, match="named_parameters"):
        problem.operator() @ named
    with pytest.raises(ValueError, match=r"named \['0.weight', .*got \['a', 'b', 'c', 'd'\]"):
        named_hessian() @ named


# The matrix.


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40])
def test_its_matrix_is_what_the_products_give(size: int) -> None:
    matrix = random_vectors(size, size)  # not symmetric, which should be seen
    dense = Matrix(matrix).to_dense()
    assert torch.equal(dense, matrix)


def test_a_matrix_that_is_too_large_is_refused_with_its_size_and_the_remedy() -> None:
    operator = mlp().operator()
    size = 51 * 51 * 8
    assert relative_error(operator.to_dense(max_bytes=size), mlp().dense_hessian()) < 1e-10
    calls = operator.num_matvecs
    with pytest.raises(ValueError, match=r"\(51, 51\) takes .* MiB.*`max_bytes`.*`lanczos`"):
        operator.to_dense(max_bytes=size - 1)
    assert operator.num_matvecs == calls
    large = torch.zeros(10**5, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(100000, 100000\) takes 38,147 MiB.*1,024 MiB"):
        HessianOperator(lambda batch: large.square().sum(), [large], [0.0], weights=[1]).to_dense()


# SciPy.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_takes_it(dtype: torch.dtype) -> None:
    matrix = symmetric_matrix([*torch.linspace(1, 2, 37).tolist(), 5.0, 8.0, 11.0]).to(dtype)
    operator = Matrix(matrix).to_scipy()
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    start = np.random.default_rng(0).standard_normal((40, 3)).astype(operator.dtype)
    assert (operator.shape, operator.dtype) == ((40, 40), matrix.numpy().dtype)
    values, vectors = eigsh(operator, k=3, v0=start[:, 0])
    assert np.allclose(values, [5, 8, 11], rtol=tol)
    assert vectors.dtype == operator.dtype
    assert np.allclose(lobpcg(operator, start, tol=tol, maxiter=100)[0], [11, 8, 5], rtol=10 * tol)
    solution, failed = cg(operator, start[:, 0], rtol=tol)
    assert not failed
    assert np.allclose(matrix.numpy() @ solution, start[:, 0], atol=100 * tol)
    assert np.array_equal(operator.rmatvec(start[:, 0]), operator.matvec(start[:, 0]))
    assert operator.matvec(start[:, :1]).shape == (40, 1)
    assert np.allclose((operator.T @ start), operator @ start)


def test_scipy_finds_both_ends_of_a_hessian() -> None:
    problem = mlp()
    expected = torch.linalg.eigvalsh(problem.dense_hessian())[[0, 1, -2, -1]]
    values = eigsh(problem.operator().to_scipy(), k=4, which="BE", return_eigenvectors=False)
    assert np.allclose(sorted(values), expected.numpy(), rtol=1e-8)


def test_without_scipy_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match="pip install scipy"):
        mlp().operator().to_scipy()


# Parameters.


def test_parameters_come_as_tensors_pairs_dictionaries_or_one_tensor() -> None:
    model = mlp().model
    tensors, names = parameters_of(model.parameters())
    assert (tensors, names) == (tuple(model.parameters()), ())
    for given in (model.named_parameters(), dict(model.named_parameters()), iter(list(model.named_parameters()))):
        tensors, names = parameters_of(given)
        assert all(tensor is p for tensor, p in zip(tensors, model.parameters(), strict=True))
        assert names == ("0.weight", "0.bias", "3.weight", "3.bias")
    tensors, _ = parameters_of(tensors[0])
    assert len(tensors) == 1
    assert tensors[0] is next(model.parameters())
    assert parameters_of([]) == ((), ())


def test_a_tied_parameter_has_its_first_name() -> None:
    tied, other = torch.ones(2), torch.ones(3)
    tensors, names = parameters_of({"embedding": tied, "hidden": other, "output": tied})
    assert names == ("embedding", "hidden")
    assert tensors[0] is tied
    assert tensors[1] is other
    assert len(parameters_of([tied, other, tied])[0]) == 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (nn.Linear(2, 2), r"module of type Linear.*`named_parameters\(\)`"),
        ([torch.ones(2), "weight"], "`parameters`.*got str"),
        ([("weight", torch.ones(2)), torch.ones(2)], "`parameters`.*got tuple"),
        ([("weight", 1.0)], "`parameters`.*got float"),
        ({"weight": None}, "`parameters`.*got NoneType"),
    ],
)
def test_what_is_no_parameter_is_refused(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameters_of(parameters)


# The scaled operator.


def test_products_are_those_of_the_scaled_matrix() -> None:
    matrix = symmetric_matrix(range(-5, 15))
    scale = random_vectors(1, 20)[0].exp()
    direction = random_vectors(1, 20, seed=1)[0]
    given = direction.clone()
    operator = ScaledOperator(DenseOperator(matrix), scale)
    assert (
        relative_error(operator.matvec(direction), torch.diag(scale) @ matrix @ torch.diag(scale) @ direction) < 1e-14
    )
    assert torch.equal(direction, given)
    assert (operator.size, operator.dtype, operator.device) == (20, torch.float64, matrix.device)


def test_it_has_the_eigenvalues_of_the_preconditioned_hessian() -> None:
    """Those of ``P^{-1}H``, which is not symmetric, by a general dense solver."""
    problem = mlp()
    divisor = random_vectors(1, 51)[0].exp()
    preconditioned = problem.dense_hessian() / divisor[:, None]
    expected = torch.linalg.eigvals(preconditioned).real.sort(descending=True).values
    operator = ScaledOperator(problem.operator(), divisor.rsqrt())
    pairs = lanczos(operator, largest=3, smallest=2, tol=1e-8)
    assert torch.allclose(pairs.largest, expected[:3], rtol=1e-8)
    assert torch.allclose(pairs.smallest, expected.flip(0)[:2], rtol=1e-8)


@pytest.mark.parametrize("shape", [(19,), (21,), (1, 20), ()])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`scale` should have shape \(20,\), got \("):
        ScaledOperator(DenseOperator(symmetric_matrix(range(20))), torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.25, -3, torch.tensor(0.25), random_vectors(1, 20, seed=5)[0]])
def test_a_shift_is_added_to_the_diagonal(shift: Any) -> None:
    matrix = symmetric_matrix(range(-5, 15))
    scale = random_vectors(1, 20)[0].exp()
    expected = torch.diag(scale) @ matrix @ torch.diag(scale) + torch.diag(torch.ones(20).double() * shift)
    for operator in (DenseOperator(matrix), Matrix(matrix)):
        scaled = ScaledOperator(operator, scale, shift=shift)
        block = random_vectors(3, 20, seed=1).T
        given = block.clone()
        assert relative_error(scaled @ block, expected @ block) < 1e-14
        assert relative_error(scaled @ block[:, 0], expected @ block[:, 0]) < 1e-14
        assert torch.equal(block, given)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
def test_the_sign_is_that_of_the_matrix_and_not_of_the_shift(sign: float, with_scale: bool, with_shift: bool) -> None:
    matrix = symmetric_matrix(range(-5, 15))
    scale = random_vectors(1, 20)[0].exp() if with_scale else None
    shift = random_vectors(1, 20, seed=5)[0] if with_shift else None
    factor = torch.ones(20, dtype=torch.float64) if scale is None else scale
    expected = sign * factor[:, None] * matrix * factor
    if shift is not None:
        expected = expected + torch.diag(shift)
    for operator in (DenseOperator(matrix), Matrix(matrix)):
        scaled = ScaledOperator(operator, scale, shift, sign=sign)
        block = random_vectors(3, 20, seed=1).T
        assert relative_error(scaled @ block, expected @ block) < 1e-14
        assert relative_error(scaled @ block[:, 0], expected @ block[:, 0]) < 1e-14


def test_it_has_the_dtype_of_the_operator_whatever_those_of_scale_and_shift() -> None:
    matrix = symmetric_matrix(range(20)).float()
    scaled = ScaledOperator(Matrix(matrix), torch.ones(20, dtype=torch.float64), torch.ones(20, dtype=torch.bfloat16))
    assert (scaled @ torch.ones(20)).dtype == torch.float32
    assert scaled.to_dense().dtype == torch.float32


def test_it_knows_the_parameters_of_what_it_scales() -> None:
    problem = mlp()
    operator = named_hessian(dict(problem.model.named_parameters()))
    scaled = ScaledOperator(operator, torch.full((51,), 2.0))
    pieces = {name: torch.ones_like(p) for name, p in problem.model.named_parameters()}
    product, expected = scaled @ pieces, operator @ pieces
    assert all(torch.equal(product[name], 4 * expected[name]) for name in pieces)


@pytest.mark.parametrize("shape", [(19,), (1,), (1, 20)])
def test_a_shift_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    operator = DenseOperator(symmetric_matrix(range(20)))
    with pytest.raises(ValueError, match=r"`shift` should be a number or have shape \(20,\), got \("):
        ScaledOperator(operator, torch.ones(20), torch.ones(shape))
