"""One edge, five optimizers: how far the sharpness of each is from the limit that its own learning rate sets.

``python -m examples.edge_of_stability`` trains the quick start's network on all handwritten digits at once, with SGD,
momentum, Nesterov's momentum, Adam and RMSprop, and draws ``stability_ratio``: it rises to 1 and stays there, whatever
the optimizer. A minute and a half on two cores.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from examples.data import Digits
from examples.models import MLP, Classifier
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.figures import stability_ratio_figure

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.4),
    "momentum 0.9": partial(torch.optim.SGD, lr=0.4, momentum=0.9),
    "Nesterov 0.9": partial(torch.optim.SGD, lr=0.15, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=2e-3),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-4),
}


def train(
    optimizer: partial[torch.optim.Optimizer], max_steps: int, *callbacks: Callback, progress_bar: bool = True
) -> None:
    """Train a small network on the digits with an optimizer, the same one every time."""
    seed_everything(0, verbose=False)
    network = MLP(in_features=64, hidden=[64, 64], activation="tanh")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        logger=False,
        default_root_dir="logs",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
        callbacks=list(callbacks),
    )
    trainer.fit(Classifier(network, loss="squared_error", optimizer=optimizer), Digits())


def ratios(optimizer: partial[torch.optim.Optimizer], max_steps: int) -> tuple[list[int], list[float]]:
    """Train with an optimizer; the steps that were measured, and the stability ratio at each."""
    probe = CurvatureProbe(every_n_steps=10)
    train(optimizer, max_steps, probe)
    known = [result for result in probe.results if result.stability_ratio is not None]  # Adam has no scales at step 0
    return [result.step for result in known], [result.stability_ratio for result in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=1500, help="steps with each optimizer")
    parser.add_argument("--out", type=Path, default=Path("logs/edge_of_stability.png"), help="the picture to draw")
    options = parser.parse_args()
    curves = {}
    for name, optimizer in OPTIMIZERS.items():
        steps, values = curves[f"{name}, η = {optimizer.keywords['lr']:g}"] = ratios(optimizer, options.max_steps)
        late = sorted(value for step, value in zip(steps, values, strict=True) if step >= options.max_steps * 2 / 3)
        reached = next((step for step, value in zip(steps, values, strict=True) if value >= 1), None)
        print(f"{name}: 1 reached at step {reached}; {late[0]:.2f} to {late[-1]:.2f} over the last third")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    stability_ratio_figure(curves, title="One edge, five optimizers").save(options.out)
    print(f"The picture: {options.out}")


if __name__ == "__main__":
    main()
