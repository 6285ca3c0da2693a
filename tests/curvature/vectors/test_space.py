"""What is computed with vectors, and the correspondence between lists of tensors and flat vectors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature.vectors import space as vectors
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, unique_tensors
from lyapunov_lightning.curvature.vectors.space import RandomNumbers, VectorSpace

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def integers(shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
    """Small whole numbers, which every dtype holds exactly."""
    size = torch.Size(shape).numel()
    return (torch.arange(start, start + size) % 97).to(dtype).reshape(shape)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=5))
def test_splitting_undoes_flattening(specs: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = [integers(shape, dtype, 7 * index) for index, (shape, dtype) in enumerate(specs)]
    if not any(tensor.numel() for tensor in tensors):
        with pytest.raises(ValueError, match="only empty tensors"):
            FlatLayout(tensors)
        return
    layout = FlatLayout(tensors)
    flat = layout.flatten(tensors)
    given_list = [*tensors]
    assert torch.equal(layout.moved(given_list), flat)
    assert not given_list
    assert flat.shape == (layout.size,) == (sum(tensor.numel() for tensor in tensors),)
    assert flat.tolist() == [x for tensor in tensors for x in tensor.reshape(-1).tolist()]
    pieces = layout.split(flat)
    assert [flat[place].tolist() for place in layout.slices()] == [piece.reshape(-1).tolist() for piece in pieces]
    for piece, tensor in zip(pieces, tensors, strict=True):
        assert piece.dtype == tensor.dtype
        assert piece.shape == tensor.shape
        assert torch.equal(piece, tensor)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.float64, torch.bfloat16], torch.float64),
    ],
)
def test_vectors_have_the_widest_dtype_and_at_least_float32(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    layout = FlatLayout([torch.zeros(2, dtype=dtype) for dtype in dtypes])
    assert layout.dtype == expected
    assert layout.zeros().dtype == expected
    assert layout.zeros().tolist() == [0.0] * (2 * len(dtypes))


def test_missing_tensors_are_zeros() -> None:
    layout = FlatLayout([torch.ones(2), torch.ones(3), torch.ones(1)])
    for flatten in (layout.flatten, layout.moved):
        assert flatten([None, torch.full((3,), 5.0), None]).tolist() == [0, 0, 5, 5, 5, 0]


def test_tensors_that_are_not_contiguous_are_flattened_row_by_row() -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert FlatLayout([transposed]).flatten([transposed]).tolist() == [0, 3, 1, 4, 2, 5]


def test_sparse_gradients_are_flattened() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    (gradient,) = torch.autograd.grad(embedding(torch.tensor([1, 1, 3])).sum(), embedding.weight)
    assert gradient.is_sparse
    assert FlatLayout([embedding.weight]).flatten([gradient]).tolist() == [0, 0, 2, 2, 0, 0, 1, 1]


def test_flattening_copies_and_carries_no_graph() -> None:
    tensor = torch.ones(3, requires_grad=True)
    flat = FlatLayout([tensor]).flatten([tensor * 2])
    assert not flat.requires_grad
    source = torch.ones(3)
    FlatLayout([source]).flatten([source]).zero_()
    assert source.tolist() == [1, 1, 1]


def test_splitting_does_not_copy_what_has_the_right_dtype() -> None:
    layout = FlatLayout([torch.zeros(2, 2), torch.zeros(3)])
    flat = layout.zeros()
    for number, piece in enumerate(layout.split(flat), start=1):
        piece.fill_(number)
    assert flat.tolist() == [1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("shape", [(4,), (6,), (1, 5), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    layout = FlatLayout([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"`vector` should have shape \(5,\), got \("):
        layout.split(torch.zeros(shape))


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        FlatLayout([torch.zeros(2), torch.zeros(3)]).flatten([torch.zeros(2)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_not_real_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"`parameters`.*{dtype}"):
        FlatLayout([torch.zeros(2), torch.zeros(2, dtype=dtype)])


def test_no_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="`parameters` should hold at least one tensor"):
        FlatLayout([])


def test_each_object_counts_once_in_the_order_of_its_first_place() -> None:
    a, b, c = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    unique = unique_tensors(iter([b, a, b, c, a]))
    assert [id(tensor) for tensor in unique] == [id(b), id(a), id(c)]


# The space.


def space(size: int, dtype: torch.dtype = torch.float32) -> VectorSpace:
    return VectorSpace(size, dtype, torch.device("cpu"))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


@pytest.mark.parametrize("entry", [1e-38, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("size", [1, 5, 2**18, 2**18 + 1])
def test_the_norm_neither_overflows_nor_vanishes(size: int, entry: float) -> None:
    vector = torch.full((size,), entry)
    norm = space(size).norm(vector)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(float(vector[0]) * size**0.5, rel=1e-12)


def test_the_norm_of_a_long_vector_is_exact() -> None:
    size = 2_000_000
    vector = torch.full((size,), 0.1)
    assert float(space(size).norm(vector)) == pytest.approx(float(vector[0]) * size**0.5, rel=1e-12)
    vector[::2].neg_()
    assert float(space(size).norm(vector)) == pytest.approx(float(vector[0].abs()) * size**0.5, rel=1e-12)


def test_the_norm_of_what_is_not_finite_is_not_finite() -> None:
    for entry in (float("nan"), float("inf")):
        vector = torch.ones(2**18 + 3)
        vector[-1] = entry
        assert not torch.isfinite(space(len(vector)).norm(vector))


def few_large_numbers(count: int, size: int, seed: int) -> Tensor:
    """Unit vectors that are as good as all in their first numbers, as those beside a large null space are."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1e-5 * torch.randn(count, size, generator=generator)
    rows[:, :40] = torch.randn(count, 40, generator=generator)
    return torch.linalg.qr(rows.double().T).Q.T.float().contiguous()


@pytest.mark.parametrize("size", [1_000, 70_000, 400_000])
@pytest.mark.parametrize("seed", range(3))
def test_tiny_numbers_are_not_lost_beside_large_ones(size: int, seed: int) -> None:
    """Where one sum takes up all numbers, what is left of a component is 1e-5 and more of the larger sizes."""
    rows = few_large_numbers(9, size, seed)
    vector = few_large_numbers(1, size, seed + 10)[0]
    exact = rows.double() @ vector.double()
    assert float((space(size).inner(rows, vector) - exact).abs().max()) <= 1e-6
    assert float(space(size).inner(rows[0], vector) - exact[0]) == pytest.approx(0, abs=1e-6)
    components, norm = space(size).orthogonalise(vector, [rows[:8], rows[8:]])
    assert float((components - exact).abs().max()) <= 1e-6
    assert float((rows.double() @ vector.double()).abs().max()) <= 3e-7
    assert float(norm) == pytest.approx(float(vector.double().norm()), rel=1e-7)


@contextmanager
def low_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def half_precision() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


SURROUNDINGS = {"autocast": half_precision, "medium": low_precision}
SIZE = 3000


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_vectors_keep_their_precision_whatever_is_in_force(name: str) -> None:
    rows, vector = normal(7, SIZE), normal(SIZE)
    exact = rows.double(), vector.double()
    coefficients = exact[0] @ exact[1] / SIZE
    with SURROUNDINGS[name]():
        inner = space(SIZE).inner(rows, vector)
        single = space(SIZE).inner(rows[0], vector)
        rest = vector.clone()
        space(SIZE).subtract(rest, coefficients, rows)
        out = torch.empty(2, SIZE)
        space(SIZE).combine(torch.stack([coefficients, -coefficients]), [rows[:4], rows[4:]], [out])
    assert inner.dtype == rest.dtype == torch.float32
    assert torch.allclose(inner.double(), exact[0] @ exact[1], rtol=0, atol=2e-7 * SIZE)
    assert torch.allclose(single.double(), exact[0][0] @ exact[1], rtol=0, atol=2e-7 * SIZE)
    assert torch.allclose(rest.double(), exact[1] - coefficients @ exact[0], rtol=0, atol=2e-6)
    assert torch.allclose(out[0].double(), coefficients @ exact[0], rtol=1e-6, atol=1e-8)
    assert torch.equal(out[1], -out[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 63, 64, 1000])
def test_combinations_may_be_written_over_what_is_combined(size: int, dtype: torch.dtype) -> None:
    """In blocks of any size, and of fewer vectors than there are."""
    rows, coefficients = normal(6, size, dtype=dtype), normal(4, 5, dtype=torch.float64)
    expected = (coefficients @ rows[:5].double()).to(dtype)
    last = rows[4:].clone()
    space(size, dtype).combine(coefficients, [rows[:2], rows[2:6]], [rows[:1], rows[1:4]])
    assert torch.allclose(rows[:4], expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-7)
    assert torch.equal(rows[4:], last)


def test_random_vectors_are_those_of_their_seed() -> None:
    def drawn(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [space(100).random(generator), space(100).random_signs(generator), space(100).random(generator)]

    state = torch.get_rng_state()
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(torch.get_rng_state(), state)
    for one, same, another in zip(first, again, other, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, same)
        assert not torch.equal(one, another)
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_signs_are_both_signs_alike(dtype: torch.dtype) -> None:
    signs = space(10_000, dtype).random_signs(torch.Generator().manual_seed(0))
    assert signs.dtype == dtype
    assert signs.unique().tolist() == [-1, 1]
    assert abs(float(signs.mean())) < 0.05


def test_vectors_of_any_dtype_are_adopted_as_rows() -> None:
    whole = torch.arange(3)
    assert torch.equal(space(3).adopt(whole, "start"), torch.tensor([[0.0, 1.0, 2.0]]))
    rows = normal(2, 3, dtype=torch.float64).requires_grad_()
    adopted = space(3).adopt(rows, "start")
    assert adopted.dtype == torch.float32
    assert not adopted.requires_grad
    same = torch.ones(2, 3)
    assert space(3).adopt(same, "start").data_ptr() == same.data_ptr()


@pytest.mark.parametrize("shape", [(4,), (3, 2), (1, 1, 3), ()])
def test_vectors_of_another_length_are_not_adopted(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`start` should have rows of length 3, got shape \("):
        space(3).adopt(torch.zeros(shape), "start")


@pytest.mark.parametrize("entries", [[1.0, float("nan"), 0.0], [float("inf"), 0.0, -float("inf")], [1e300, 0.0, 0.0]])
def test_vectors_that_are_not_finite_are_not_adopted(entries: list[float]) -> None:
    """Nor those that are not so in the precision of the space."""
    with pytest.raises(ValueError, match="`known` should be finite"):
        space(3).adopt(torch.tensor(entries, dtype=torch.float64), "known")


def test_finite_vectors_are_adopted_although_their_sum_overflows() -> None:
    assert space(3).adopt(torch.full((3,), 3e38), "start").shape == (1, 3)


# Random numbers.


@settings(deadline=None, max_examples=60, derandomize=True)
@given(parts=st.lists(st.integers(0, 40), max_size=8), drawn=st.integers(1, 50))
def test_random_numbers_are_the_same_in_any_pieces(parts: list[int], drawn: int) -> None:
    """Also where more of them are asked for than are drawn at a time."""
    total = sum(parts)

    def numbers() -> RandomNumbers:
        generator = torch.Generator().manual_seed(3)
        return RandomNumbers(lambda count: torch.randn(count, generator=generator, dtype=torch.float64), total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_DRAWN_AT_ONCE", drawn)
        whole = numbers().take(total)
        one_by_one = numbers()
        pieces = [one_by_one.take(part) for part in parts]
    assert len(whole) == total
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.float64), *pieces]), whole)


def test_a_few_digits_are_right_where_they_will_do() -> None:
    """Once through a few vectors, and combinations in float32: a millionth, not the last digit."""
    size = 100_000
    rows = torch.linalg.qr(normal(6, size).double().T).Q.T.float().contiguous()
    vector = normal(size) + 3 * rows[4] + 200 * rows[5]
    exact = rows.double() @ vector.double()
    left = vector.double() - exact @ rows.double()
    components, norm = space(size).orthogonalise(vector, [rows[:4], rows[4:]], once=True)
    assert torch.allclose(components.double(), exact, rtol=0, atol=1e-2)
    assert float(norm) == pytest.approx(float(left.norm()), rel=1e-5)
    assert float((rows.double() @ vector.double()).abs().max()) <= 1e-4 * float(left.norm())
    coefficients = normal(2, 6, dtype=torch.float64)
    out = torch.empty(2, size)
    space(size).combine_roughly(coefficients, [rows[:4], rows[4:]], out)
    assert torch.allclose(out.double(), coefficients @ rows.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_rough_norms_neither_overflow_nor_vanish(scale: float) -> None:
    vector = scale * normal(5000)
    assert float(space(5000)._rough_norm(vector)) == pytest.approx(float(vector.double().norm()), rel=1e-6)
