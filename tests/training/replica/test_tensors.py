"""Copies of tensors and arrays have memory of their own, and share it as the originals do."""

import numpy as np
import pytest
import torch
from torch import nn

from lyapunov_lightning.training.replica import tensors
from lyapunov_lightning.training.replica.copier import Copier, Policy
from lyapunov_lightning.training.replica.memo import Limits


def test_a_view_of_a_parameter_leads_to_the_copy_of_the_parameter():
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    copied, row = Copier()([weight, weight[1]])
    (gradient,) = torch.autograd.grad(row.sum(), copied)
    assert gradient.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert copied.data_ptr() != weight.data_ptr()


def test_tensors_and_arrays_of_one_memory_go_on_sharing_it():
    array = np.zeros(4)
    for values in ([torch.from_numpy(array), array], [array, torch.from_numpy(array)], [array[::-1], array]):
        first, second = Copier()(values)
        first[0] = 5
        assert 5 in second.tolist()
        assert not array.any()


@pytest.mark.parametrize("limit", [16, 2**20])
def test_a_small_view_of_a_large_block_costs_what_it_shows(monkeypatch, limit):
    monkeypatch.setattr(tensors, "_WHOLE_BLOCK", limit)
    whole = torch.arange(1000.0)
    copied = Copier()(whole[2:4])
    assert copied.tolist() == [2, 3]
    assert copied.untyped_storage().nbytes() == (8 if limit == 16 else 4000)


def test_a_copy_is_of_the_kind_and_device_of_the_original():
    buffer = nn.Buffer(torch.ones(2), persistent=False)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    made = torch.ones(2, requires_grad=True) * 2
    for original in (buffer, frozen, made, torch.empty(2, device="meta"), torch.eye(2).to_sparse()):
        copied = Copier()(original)
        assert type(copied) is type(original)
        assert copied.layout == original.layout
        assert copied.device == original.device
        assert copied.requires_grad == (original.requires_grad and original.is_leaf)
    assert not Copier()(buffer).persistent


@pytest.mark.parametrize("reverse", [False, True])
def test_an_array_that_is_too_large_is_shared_and_not_written_to(reverse):
    array = np.arange(6.0)[::-1] if reverse else np.arange(6.0)
    limits = Limits(objects=10, num_bytes=8)
    copied = Copier(Policy(limits=limits))(array)
    with pytest.raises(ValueError, match="read-only"):
        copied[0] = 1
    start = (array[::-1] if reverse else array).ctypes.data
    assert limits.shared == [(start, start + 48)]


def test_a_tensor_that_is_too_large_is_shared_and_listed():
    limits = Limits(objects=10, num_bytes=8)
    tensor = torch.ones(6)
    copied = Copier(Policy(limits=limits))(tensor)
    assert copied.data_ptr() == tensor.data_ptr()
    assert limits.shared == [(tensor.data_ptr(), tensor.data_ptr() + 24)]
