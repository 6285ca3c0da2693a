"""The global generators: kept, put back and replayed."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from tests.curvature.helpers import rng_state


def draws() -> list[float]:
    """One number of each generator; torch's normal and NumPy's integers use more than one word of theirs."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_a_block_leaves_no_trace_in_any_generator() -> None:
    before = rng_state()
    with preserved_randomness():
        draws()
        assert rng_state() != before
    assert rng_state() == before


def test_a_block_that_raises_leaves_no_trace_either() -> None:
    before = rng_state()

    @preserved_randomness()
    def block() -> None:
        draws()
        raise KeyError

    with pytest.raises(KeyError):
        block()
    assert rng_state() == before


def test_seeding_within_a_block_leaves_no_trace() -> None:
    before = rng_state()
    with preserved_randomness():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
    assert rng_state() == before


def test_a_block_draws_what_the_run_would_have_drawn() -> None:
    with preserved_randomness():
        first = draws()
    assert draws() == first


def test_a_block_starts_from_the_given_state() -> None:
    state = RandomState.capture()
    first = draws()
    before = rng_state()
    assert draws() != first
    for _ in range(2):
        with preserved_randomness(state):
            assert draws() == first
    state.restore()
    assert draws() == first
    assert rng_state() == before


def test_a_captured_state_does_not_move_on_with_the_generators() -> None:
    state = RandomState.capture()
    first = draws()
    for _ in range(1000):  # NumPy's and PyTorch's 624 words are drawn anew in between
        draws()
    state.restore()
    assert draws() == first


def test_blocks_nest() -> None:
    before = rng_state()
    state = RandomState.capture()
    with preserved_randomness(state):
        first = draws()
        inner = rng_state()
        with preserved_randomness(state):
            assert draws() == first
        assert rng_state() == inner
    assert rng_state() == before


def accelerator(num_devices: int, **attributes: bool) -> SimpleNamespace:
    """As PyTorch knows it, with a number for the state of each device's generator."""
    states = [torch.tensor(index) for index in range(num_devices)]
    return SimpleNamespace(
        states=states,
        device_count=lambda: num_devices,
        get_rng_state=lambda device: states[device].clone(),
        set_rng_state=lambda state, device: states[device].copy_(state),
        **{name: lambda value=value: value for name, value in attributes.items()},
    )


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "privateuseone"])
def test_generators_of_every_accelerator_are_put_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = accelerator(2, is_initialized=True) if kind != "mps" else accelerator(1)
    monkeypatch.setattr(torch, kind, module, raising=False)
    start = RandomState.capture()
    for state in module.states:
        state.add_(5)
    with preserved_randomness(start):
        assert [int(state) for state in module.states] == list(range(len(module.states)))
        for state in module.states:
            state.add_(7)
    assert [int(state) for state in module.states] == [5 + index for index in range(len(module.states))]


def test_an_accelerator_that_comes_to_be_used_or_registered_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [False]
    monkeypatch.setattr(torch, "xpu", accelerator(1))
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: used[0], raising=False)
    assert "xpu" not in RandomState.capture().accelerators
    used[0] = True
    assert "xpu" in RandomState.capture().accelerators
    monkeypatch.setattr(torch, "novel", accelerator(1), raising=False)
    assert "novel" not in RandomState.capture().accelerators
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "novel")
    assert "novel" in RandomState.capture().accelerators


def test_accelerators_that_are_not_in_use_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    module = accelerator(1, is_initialized=False)
    monkeypatch.setattr(torch, "xpu", module)
    assert "xpu" not in RandomState.capture().accelerators


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_a_state_is_the_same_object_unless_something_was_drawn(draw):
    state = RandomState.capture()
    assert state.unless_changed() is state
    draw()
    changed = state.unless_changed()
    assert changed is not state
    assert changed.unless_changed() is changed
    state.restore()
    assert state.unless_changed() is state
