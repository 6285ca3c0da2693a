"""Every configuration among the examples is understood, and names callbacks of this package; numbers are right."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, DistributedSampler

from examples import edge_under_noise
from examples.data import Digits
from examples.gauss_newton import drawn, half_squares, measured
from lyapunov_lightning import callbacks
from lyapunov_lightning.training.callback import CurvatureCallback

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_understood(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--config", str(config), f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
    assert any(isinstance(callback, CurvatureCallback) for callback in cli.trainer.callbacks)


def test_each_of_several_processes_gets_all_digits_for_a_step() -> None:
    data = Digits(steps_per_epoch=4)
    data.setup("fit")
    loader = data.train_dataloader()
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank)  # as Lightning puts it in, shuffled
        batches = list(DataLoader(loader.dataset, batch_size=None, sampler=sampler))
        assert len(batches) == 2
        for inputs, labels in batches:
            assert len(inputs) == len(labels) == len(data.train_set)
            assert inputs.equal(next(iter(loader))[0])


def test_ends_of_the_hessian_and_its_relatives_are_those_of_the_dense_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    batch = (torch.randn(12, 3, generator=generator, dtype=torch.float64), torch.arange(12) % 2)
    names, shapes = zip(*((name, parameter.shape) for name, parameter in network.named_parameters()), strict=True)

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(network, values, (batch[0],))

    flat = nn.utils.parameters_to_vector(network.parameters()).detach()
    hessian = torch.autograd.functional.hessian(lambda at: half_squares(outputs(at), batch[1]).mean(), flat)
    jacobian = torch.autograd.functional.jacobian(outputs, flat).flatten(0, 1)
    gauss_newton = jacobian.T @ jacobian / 12
    gradients = torch.autograd.functional.jacobian(lambda at: half_squares(outputs(at), batch[1]), flat)
    h, g, f, rest = (
        torch.linalg.eigvalsh(matrix)[[0, -1]].tolist()
        for matrix in (hessian, gauss_newton, gradients.T @ gradients / 12, hessian - gauss_newton)
    )
    found = measured(network, batch, step=3)
    assert [found.hessian_min, found.hessian] == pytest.approx(h, rel=1e-2)
    assert found.gauss_newton == pytest.approx(g[1], rel=1e-2)
    assert found.fisher == pytest.approx(f[1], rel=1e-2)
    assert [found.rest_min, found.rest] == pytest.approx(rest, rel=1e-2)
    assert found.rest_min < found.hessian_min < 0
    assert len(drawn([found, found], "Twice").axes) == 2


@pytest.mark.parametrize("agreement", edge_under_noise.AGREEMENTS)
def test_batches_agree_as_far_as_they_are_said_to_and_have_a_sharpness_of_one(agreement: float) -> None:
    data = edge_under_noise.batches(agreement)
    mean, square = data.probabilities @ data.curvatures, data.probabilities @ data.curvatures**2
    assert data.probabilities.sum() == pytest.approx(1)
    assert [mean**2 / square, square / mean] == pytest.approx([agreement, 1])


def test_runs_of_sgd_under_noise_grow_as_in_theory() -> None:
    data, rates = edge_under_noise.batches(0.3), np.array([0.15, 0.4])
    theory, runs = (growth(rates, 0.9, data) for growth in (edge_under_noise.in_theory, edge_under_noise.in_runs))
    assert runs.mean_square == pytest.approx(theory.mean_square, abs=6e-3)
    assert runs.single == pytest.approx(theory.single, abs=3e-3)
    assert [theory.mean_square[1] > 0 > theory.single[1], runs.mean_square[1] > 0 > runs.single[1]] == [True, True]
    calm, rare = edge_under_noise.carried_by_few(rates, 0.9, data)
    assert calm < 0.1 < 0.8 < rare
    panels = [
        edge_under_noise.Panel(momentum, agreement, 0.3, 0.6, theory, runs)
        for momentum in edge_under_noise.MOMENTA
        for agreement in edge_under_noise.AGREEMENTS
    ]
    assert len(edge_under_noise.drawn(panels).axes) == 6


def test_every_callback_has_a_configuration() -> None:
    texts = "".join(config.read_text() for config in CONFIGS)
    assert not [name for name in callbacks.__all__ if name not in texts]


def test_command_line_knows_the_callbacks_by_their_short_names() -> None:
    """In a process of its own: here they are imported already."""
    command = [sys.executable, "-W", "ignore", "-m", "lyapunov_lightning", "fit", "--config", str(CONFIGS[0])]
    done = subprocess.run([*command, "--print_config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CurvatureProbe" in done.stdout
