"""Runs that went wrong or could go faster, what the probe said of each, and what happened when it was followed.

``python -m examples.stories rate --root data`` trains a network on CIFAR-10 whose loss spikes because of its learning
rate, and again at the rate that the probe names, as long as it says that the rate is what limits the run. ``stuck``
does the same with one that does not spike, and does not get on. ``data`` has a few batches that nobody has scaled, and
trains again without them. ``room`` trains a language model on the Penn Treebank, again at five times the rate, and at
the one that the probe names, if it names one. Each prints what ``probe.diagnosis()`` said of all runs, and draws the
probe's own figure and the runs side by side. A minute or two.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.data import Cifar10, PennTreebank
from examples.edge_whatever_the_batch import Losses, batches, images
from examples.models import MLP, Classifier, LanguageModel
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.curvature.diagnosis import Diagnosis, loss_spikes
from lyapunov_lightning.figures import Picture, stability_ratio_figure

PICTURES = Path(__file__).parents[1] / "docs" / "images"
VOCABULARY = 1000


@dataclass(frozen=True)
class Setting:
    """A training.

    Attributes:
        images: Whether it is that of a network on images of CIFAR-10, and not of a language model on the Penn Treebank.
        optimizer: Makes the optimizer, but for the learning rate.
        rate: The learning rate.
        batch_size: Images, or rows of words, in a batch.
        num_steps: Its length.
        unscaled: Steps whose images are as they stand in the files, from 0 to 255.

    """

    images: bool
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    batch_size: int
    num_steps: int
    unscaled: tuple[int, ...] = ()


Advice = Callable[[Setting, CurvatureProbe], list[Setting]]
"""What is trained next, after a run that a probe has watched."""


def at_the_suggested_rate(setting: Setting, probe: CurvatureProbe) -> list[Setting]:
    suggestion = probe.suggestion()
    return [] if suggestion is None else [replace(setting, rate=float(f"{suggestion:.2g}"))]


def without_the_unscaled(setting: Setting, probe: CurvatureProbe) -> list[Setting]:
    return [replace(setting, unscaled=())]


def faster(setting: Setting, probe: CurvatureProbe) -> list[Setting]:
    """At five times the rate, and at the limit that the probe names, to see whether it is one."""
    return [replace(setting, rate=5 * setting.rate), *at_the_suggested_rate(setting, probe)]


MOST_RUNS = 4
"""How many runs a story has at most, where each is limited by its rate and the next one has the rate that is named."""

STORIES: dict[str, tuple[Setting, Advice]] = {
    "rate": (Setting(True, torch.optim.SGD, 1.5, 512, 400), at_the_suggested_rate),
    "stuck": (Setting(True, partial(torch.optim.SGD, momentum=0.9), 0.2, 128, 1200), at_the_suggested_rate),
    "data": (Setting(True, torch.optim.AdamW, 1e-3, 128, 1200, unscaled=(600, 601, 602, 603)), without_the_unscaled),
    "room": (Setting(False, torch.optim.AdamW, 1e-4, 20, 600), faster),
}


class Unscaled(Dataset):
    """The batches of a run, of which some are as they stand in the files.

    Args:
        loader: All batches of the run.
        steps: Those of the unscaled ones.

    """

    def __init__(self, loader: DataLoader, steps: Sequence[int]) -> None:
        self.dataset, self.order, self.steps = loader.dataset, list(loader.sampler), frozenset(steps)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.dataset[self.order[step]]
        if step in self.steps:
            mean, std = (torch.tensor(values)[:, None, None] for values in (Cifar10.mean, Cifar10.std))
            inputs = 255 * (inputs * std + mean)
        return inputs, labels


def words(root: str) -> Dataset:
    """Rows of words of the Penn Treebank, and of those that follow them."""
    if not Path(root, "ptb").is_dir():
        raise SystemExit(f"There is no Penn Treebank in {root}: give the folder that holds `ptb` by --root.")
    data = PennTreebank(root, vocabulary=VOCABULARY, sequence_length=20, num_tokens=200_000, download=False)
    data.setup("fit")
    return data.train_set


def train(setting: Setting, root: str) -> tuple[CurvatureProbe, Losses]:
    """One training, with the probe that watched it; the same network and the same batches every time."""
    pl.seed_everything(0, verbose=False)
    if setting.images:
        dataset, network, num_classes = images(root), MLP(in_features=3 * 8 * 8, hidden=[64, 64]), 10
    else:
        dataset, network, num_classes = (
            words(root),
            LanguageModel(VOCABULARY, width=32, layers=1, dropout=0.0),
            VOCABULARY,
        )
    loader = DataLoader(
        Unscaled(batches(dataset, setting.batch_size, setting.num_steps), setting.unscaled), batch_size=None
    )
    probe, losses = CurvatureProbe(), Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=setting.num_steps,
        logger=False,
        default_root_dir="logs",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[losses, probe],
    )
    trainer.fit(Classifier(network, num_classes, optimizer=partial(setting.optimizer, lr=setting.rate)), loader)
    return probe, losses


def told(name: str, probe: CurvatureProbe, losses: Losses) -> str:
    """What the probe said of a run, and how the run ended."""
    diagnosis: Diagnosis = probe.diagnosis()
    spikes = loss_spikes(range(len(losses.values)), losses.values)
    last = losses.values[-max(1, len(losses.values) // 10) :]
    return (
        f"{name}\n  said ({diagnosis.kind}): {diagnosis}\n  suggestion: {probe.suggestion()}\n"
        f"  loss over the last tenth: mean {np.mean(last):.4g}, median {np.median(last):.4g}, highest {max(last):.4g}; "
        f"spikes at {spikes}"
    )


def side_by_side(runs: dict[str, tuple[CurvatureProbe, Losses]], title: str) -> Picture:
    """Stability ratio and loss of all runs."""
    curves, courses = {}, {}
    for name, (probe, losses) in runs.items():
        known = [result for result in probe.results if result.stability_ratio is not None and result.is_settled]
        curves[name] = ([result.step for result in known], [result.stability_ratio for result in known])
        courses[name] = (range(len(losses.values)), losses.values)
    return stability_ratio_figure(curves, losses=courses, title=title)


def name_of(setting: Setting) -> str:
    return f"η = {setting.rate:g}" + (", with the unscaled batches" if setting.unscaled else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("story", nargs="+", choices=STORIES, help="which of them")
    parser.add_argument("--root", default="data", help="folder that holds `cifar-10-batches-py` and `ptb`")
    parser.add_argument("--out", type=Path, default=PICTURES, help="the folder to draw in")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to make, for a quick look")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for story in options.story:
        setting, advice = STORIES[story]
        setting = replace(
            setting,
            num_steps=round(options.scale * setting.num_steps),
            unscaled=tuple(round(options.scale * step) for step in setting.unscaled),
        )
        runs = {name_of(setting): train(setting, options.root)}
        [(probe, losses)] = runs.values()
        print(told(name_of(setting), probe, losses), flush=True)
        probe.plot().savefig(options.out / f"story_{story}_probe.png", dpi=130)
        following = advice(setting, probe)
        while following:
            followed = following.pop(0)
            probe, losses = runs[name_of(followed)] = train(followed, options.root)
            print(told(name_of(followed), probe, losses), flush=True)
            if probe.diagnosis().kind == "limited" and len(runs) < MOST_RUNS:
                following += at_the_suggested_rate(followed, probe)
        side_by_side(runs, "").savefig(options.out / f"story_{story}.png", dpi=130)


if __name__ == "__main__":
    main()
