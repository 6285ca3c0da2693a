"""Changes of memory are noticed however it is laid out, and nothing else is taken for one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature.loss.freshness import Contents
from tests.curvature.helpers import vector


def numbers(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=count))


def other(number: Tensor) -> Tensor:
    return torch.where(number == 1, torch.zeros_like(number), torch.ones_like(number))


LARGE = 2**18 + 5

TENSORS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: numbers(5),
    "float32": lambda: numbers(5).float(),
    "bfloat16": lambda: numbers(7).bfloat16(),
    "bool": lambda: numbers(9) > 0,
    "int64": lambda: torch.arange(5),
    "uint8": lambda: torch.arange(11, dtype=torch.uint8),
    "complex": lambda: torch.complex(numbers(5), numbers(5)),
    "conjugate": lambda: torch.complex(numbers(5), numbers(5)).conj(),
    "scalar": lambda: numbers(1)[0],
    "large": lambda: numbers(LARGE),
    "large_float32": lambda: numbers(LARGE).float(),
    "large_uint8": lambda: (100 * numbers(LARGE * 5)).to(torch.uint8),
    "large_and_misaligned": lambda: numbers(LARGE).float()[1:],
    "transposed": lambda: numbers(6).view(2, 3).T,
    "channels_last": lambda: numbers(48).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "view_with_gaps": lambda: numbers(12)[::3],
    "single_number_with_a_stride": lambda: numbers(4).view(2, 2)[:1, 1],
    "large_view_with_gaps": lambda: numbers(2 * LARGE)[::2],
    "expanded": lambda: numbers(3)[:, None].expand(3, 4),
    "with_gradients": lambda: numbers(5).requires_grad_(),
    "not_a_number": lambda: torch.full((5,), torch.nan),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_write_that_pytorch_does_not_count_is_noticed_wherever_it_is(name: str) -> None:
    tensor = TENSORS[name]()
    contents = Contents([tensor, numbers(3)])
    for _ in range(2):
        assert not contents.is_changed()
    places = tensor.data.view(-1) if tensor.is_contiguous() else tensor.data
    if name == "expanded":
        places = places[:, 0]
    for place in {0, len(places) // 2, len(places) - 1}:
        before = places[place].clone()
        places[place] = ~before if before.dtype == torch.bool else other(before)
        assert tensor._version == 0
        assert contents.is_changed()
        places[place] = before
        assert not contents.is_changed()


@pytest.mark.parametrize("change", [torch.neg_, lambda x: x.mul_(2), lambda x: x.copy_(x.flip(0)), torch.zero_])
@pytest.mark.parametrize("name", ["small", "large", "large_float32", "large_and_misaligned", "view_with_gaps"])
def test_changes_of_the_whole_are_noticed(name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensor = TENSORS[name]()
    contents = Contents([tensor])
    change(tensor.data)
    assert contents.is_changed()


def test_rows_that_change_places_are_noticed() -> None:
    """Sums of the whole are blind to it."""
    array = np.random.default_rng(0).normal(size=(4096, 64))
    contents = Contents([torch.from_numpy(array)])
    array[[5, 4000]] = array[[4000, 5]]
    assert contents.is_changed()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.detach().add_(1),
        lambda x: setattr(x, "data", x.data.clone()),
        lambda x: x.requires_grad_(False),
        lambda x: x.detach().resize_(2),
    ],
)
def test_other_memory_and_counted_writes_are_noticed(change: Callable[[Tensor], object]) -> None:
    tensor = vector(5).requires_grad_()
    contents = Contents([tensor])
    change(tensor)
    assert contents.is_changed()


def test_tensors_without_memory_of_their_own_are_let_be() -> None:
    with torch.inference_mode():
        made_in_inference = torch.ones(3)
    tensors = [
        torch.zeros(0),
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        made_in_inference,
    ]
    contents = Contents(tensors)
    assert not contents.is_changed()
    with torch.inference_mode():
        made_in_inference.add_(1)
    assert contents.is_changed()


def test_the_numbers_of_sparse_tensors_are_read() -> None:
    for tensor in (torch.eye(3).to_sparse().coalesce(), torch.eye(3).to_sparse_csr()):
        contents = Contents([tensor])
        tensor.values().data.mul_(2)
        assert contents.is_changed()


def test_a_contents_needs_little_memory() -> None:
    contents = Contents([torch.zeros(2**22)])
    assert sum(numbers.nbytes for numbers in contents._numbers) <= 2**24 / 60
