"""Every configuration among the examples is understood, and names callbacks of this package; numbers are right."""

import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from examples import edge_under_noise, edge_whatever_the_batch, influence, stories
from examples.data import Cifar10, Digits
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


def test_the_influence_of_a_sample_is_that_of_retraining_without_it() -> None:
    """Ridge regression: without sample i the minimum moves by its influence over 1 - hᵢ, hᵢ being its leverage."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (4, 1))
    test = (torch.randn(9, 4, generator=generator, dtype=torch.float64), torch.zeros(9, 1, dtype=torch.float64))
    objective = influence.Objective(
        lambda weights, samples: (samples[0] @ weights - samples[1]).square().sum(dim=1) / 2, (inputs, targets), 0.1
    )

    def minimum(without: int | None = None) -> torch.Tensor:
        kept = torch.ones(40, 1, dtype=torch.float64)
        kept[without if without is not None else [], 0] = 0
        matrix = inputs.T @ (kept * inputs) / 40 + 0.1 * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(matrix, inputs.T @ (kept * targets) / 40)

    weights = objective.fitted(torch.zeros(4, 1, dtype=torch.float64))
    assert torch.allclose(weights, minimum(), atol=1e-9)
    rises, found = influence.influences(objective, weights, test)
    assert found.converged
    inverse = torch.linalg.inv(inputs.T @ inputs / 40 + 0.1 * torch.eye(4, dtype=torch.float64))
    leverages = ((inputs @ inverse) * inputs).sum(dim=1) / 40
    slope = test[0].T @ (test[0] @ minimum()) / 9
    moves = torch.cat([minimum(index) - minimum() for index in range(40)], dim=1)
    assert torch.allclose(rises / (1 - leverages), (slope.T @ moves)[0], rtol=1e-6, atol=1e-12)
    # The fit without a sample comes to the closed form, and the test loss moves as was predicted, but for the leverage.
    few = range(6)
    changes = influence.retrained(objective, weights, test, few)
    before, *after = (float(objective.losses(minimum(index), test).mean()) for index in (None, *few))
    assert changes == pytest.approx([loss - before for loss in after], abs=1e-9)
    assert changes == pytest.approx(rises[:6].tolist(), rel=0.2, abs=0.1 * float(rises.abs().max()))


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


def made_up_images(number: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(number, 3, 8, 8, generator=generator), torch.arange(number) % 10)


def test_a_run_sees_every_image_once_before_one_again() -> None:
    images = TensorDataset(torch.arange(12))
    seen = [batch[0].tolist() for batch in edge_whatever_the_batch.batches(images, 4, num_steps=6)]
    assert [len(batch) for batch in seen] == [4] * 6
    assert sorted(chain(*seen[:3])) == sorted(chain(*seen[3:])) == list(range(12))
    [everything] = edge_whatever_the_batch.batches(images, 999, num_steps=1)
    assert sorted(everything[0].tolist()) == list(range(12))


@pytest.mark.filterwarnings("ignore:.*the Trainer has no logger")
@pytest.mark.parametrize("name", edge_whatever_the_batch.FAMILIES)
def test_with_all_images_both_ratios_are_that_of_full_batch_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family, images = edge_whatever_the_batch.FAMILIES[name], made_up_images(32)
    run = edge_whatever_the_batch.measured(images, family, family.first, batch_size=32, num_steps=40)
    assert run.agreement == pytest.approx(1, abs=1e-3)
    assert len(run.shares) == len(run.ratios) == len(run.classical) >= 20
    for ratio, classical in zip(run.ratios, run.classical, strict=True):
        assert classical is not None
        assert ratio >= 0.999 * classical
    assert min(ratio / classical for ratio, classical in zip(run.ratios, run.classical, strict=True)) < 1.1
    assert f"η = {family.first:g}" in edge_whatever_the_batch.told(run)


def test_the_largest_usable_rate_is_between_one_that_trains_and_one_that_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    family = replace(edge_whatever_the_batch.FAMILIES["SGD"], first=0.1)
    images = made_up_images(32)
    usable = edge_whatever_the_batch.largest_usable(images, family, batch_size=32, num_steps=60)
    final = {
        rate: edge_whatever_the_batch.train(images, family, rate, 32, 60).final
        for rate in (usable / 2, usable, 8 * usable)
    }
    assert final[usable] < 1.25 * final[usable / 2] < final[8 * usable]
    assert f"{usable:g}: {final[usable]:.4f}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*the Trainer has no logger")
def test_the_edge_whatever_the_batch_is_drawn_again_from_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edge_whatever_the_batch, "STEPS", {4: 6, 16: 6})
    families = {
        name: replace(family, rates=(family.first, family.first))
        for name, family in edge_whatever_the_batch.FAMILIES.items()
        if name != "AdamW"  # has not settled by then
    }
    monkeypatch.setattr(edge_whatever_the_batch, "FAMILIES", families)
    monkeypatch.setattr(edge_whatever_the_batch, "images", lambda root: made_up_images(16))
    arguments = [f"--out={tmp_path / 'edge.png'}", f"--cache={tmp_path / 'kept' / 'runs.json'}"]
    edge_whatever_the_batch.main(arguments)
    first = (tmp_path / "edge.svg").read_text()
    monkeypatch.delattr(edge_whatever_the_batch, "measured")
    edge_whatever_the_batch.main(arguments)
    assert (tmp_path / "edge.svg").read_text() == first


def test_examples_say_where_data_are_missing(tmp_path: Path) -> None:
    for program, arguments in ((edge_whatever_the_batch, []), (stories, ["rate"]), (stories, ["room"])):
        with pytest.raises(SystemExit, match=f"in {tmp_path}: give the folder"):
            program.main([*arguments, f"--root={tmp_path}", f"--out={tmp_path}", *options_of(program, tmp_path)])


def options_of(program: Any, path: Path) -> list[str]:
    return [f"--cache={path / 'none.json'}"] if program is edge_whatever_the_batch else []


def test_unscaled_batches_are_as_in_the_files() -> None:
    raw = torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (Cifar10.mean, Cifar10.std))
    images = TensorDataset((raw / 255 - mean) / std, torch.arange(8))
    run = stories.Unscaled(edge_whatever_the_batch.batches(images, 4, num_steps=4), steps=[1])
    assert len(run) == 4
    for step in range(4):
        inputs, labels = run[step]
        torch.testing.assert_close(inputs, raw[labels] if step == 1 else images.tensors[0][labels])


@pytest.mark.filterwarnings("ignore::lyapunov_lightning.curvature.errors.CurvatureWarning")
@pytest.mark.parametrize("story", stories.STORIES)
def test_a_story_is_told(
    story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(stories.VOCABULARY, (40, 6), generator=generator)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stories, "images", lambda root: made_up_images(40))
    monkeypatch.setattr(stories, "words", lambda root: TensorDataset(rows[:, :-1], rows[:, 1:]))
    stories.main([story, "--scale=0.1", "--out=."])
    told = capsys.readouterr().out
    setting, _ = stories.STORIES[story]
    assert told.startswith(f"η = {setting.rate:g}")
    assert told.count("said (") >= 2
    assert {path.name for path in tmp_path.glob("*.png")} == {f"story_{story}.png", f"story_{story}_probe.png"}


def test_every_callback_has_a_configuration() -> None:
    texts = "".join(config.read_text() for config in CONFIGS)
    assert not [name for name in callbacks.__all__ if name not in texts]


def test_command_line_knows_the_callbacks_by_their_short_names() -> None:
    """In a process of its own: here they are imported already."""
    command = [sys.executable, "-W", "ignore", "-m", "lyapunov_lightning", "fit", "--config", str(CONFIGS[0])]
    done = subprocess.run([*command, "--print_config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CurvatureProbe" in done.stdout
