"""The correspondence between lists of tensors and flat vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature.vectors import FlatLayout, unique_tensors

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
    assert flat.shape == (layout.size,) == (sum(tensor.numel() for tensor in tensors),)
    assert flat.tolist() == [x for tensor in tensors for x in tensor.reshape(-1).tolist()]
    pieces = layout.split(flat)
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
    assert layout.flatten([None, torch.full((3,), 5.0), None]).tolist() == [0, 0, 5, 5, 5, 0]


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
