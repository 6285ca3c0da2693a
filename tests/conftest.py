"""What all tests have in common: one thread for each test process, and a quiet Lightning."""

import logging
import os
import random
import signal
from collections.abc import Iterator

# Lightning takes what is set here for the user's choice. Without it a test that trains with DDP makes all later tests
# of its process wait for threads that the other test process keeps from running.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy
import pytest
import torch

from lyapunov_lightning.training.reporting import recording, telling
from lyapunov_lightning.training.reporting.outlets import takes_figures

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


NOT_BEFORE_TORCH_2_15 = (
    "test_exact_products_are_right_or_refused[loss-pdist]",
    "test_exact_products_are_right_or_refused[inner-pdist]",
    "test_exact_products_are_right_or_refused[function-aminmax]",
    "test_exact_products_are_right_or_refused[function-bessel_j0]",
    "test_exact_products_are_right_or_refused[function-cdist",
    "test_exact_products_are_right_or_refused[function-grid_sample",
    "test_products_through_checkpoints_are_those_of_the_plain_model[nested",
    "test_products_through_checkpoints_are_those_of_the_plain_model[reentrant",
    "test_products_through_checkpoints_are_those_of_the_plain_model[selective",
    "test_gradients_through_checkpoints_are_those_at_the_displaced_parameters",
    "test_pytorch_differentiates_selective_checkpoints_once",
    "test_reentrant_checkpointing_is_one_function",
    "test_a_graph_tells_its_functions_leaves_and_what_they_keep",
)
"""Tests of second derivatives that older versions of PyTorch do not have, and refuse with an error."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        skipped = pytest.mark.skip(reason="PyTorch differentiates this twice from 2.15 on")
        for item in items:
            if item.name.startswith(NOT_BEFORE_TORCH_2_15):
                item.add_marker(skipped)


@pytest.fixture(autouse=True)
def _drawn_anew() -> None:
    """A test that seeds nothing draws the same whichever tests ran before it in its process."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heeded() -> None:
    """Not so in a suite that a shell has put in the background, nor after a run that Lightning has ended by it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures are drawn for files, which takes longer than most runs here and of which few tests see anything.

    Those that do are marked ``pictures``; figures for a logger are drawn in any test.

    """
    if request.node.get_closest_marker("pictures") is None:
        draw = recording.Recorder.draw
        monkeypatch.setattr(
            recording.Recorder,
            "draw",
            lambda self, trainer, figures: not takes_figures(trainer) or draw(self, trainer, figures),
        )


@pytest.fixture(autouse=True)
def said_in_place_of_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Our warnings are errors here, which the package says on the console in place of ending the run: then the test
    fails at its end."""
    said: list[str] = []
    monkeypatch.setattr(telling, "print_instead", said.append)
    yield said
    assert not said
