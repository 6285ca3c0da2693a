"""The largest eigenvalues of SimpleCNN on CIFAR-10 at several learning rates, and their picture.

``python -m examples.sharpest_directions --root data``: figures 2 and 4 of the sharpest-directions paper on a part of
the data, with the training and the measurement of ``examples/configs/simplecnn_spectrum.yaml``.
"""

import argparse
from pathlib import Path

import yaml
from matplotlib import colormaps
from matplotlib.figure import Figure

from lyapunov_lightning import SpectrumTracker
from lyapunov_lightning.cli import main as run_cli

CONFIG = Path(__file__).parent / "configs" / "simplecnn_spectrum.yaml"

Series = dict[int, tuple[float, ...]]
"""The largest eigenvalues by step."""


def run(lr: float, root: str, folder: Path) -> Series:
    """Train at one learning rate; the eigenvalues that were measured."""
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = lr
    config["trainer"]["callbacks"][0]["init_args"]["save_dir"] = str(folder)
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    config["data"]["init_args"]["root"] = root
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    trainer = run_cli(["fit", "--config", str(path)]).trainer
    tracker = next(callback for callback in trainer.callbacks if isinstance(callback, SpectrumTracker))
    return {result.step: result.largest for result in tracker.results}


def draw(runs: dict[float, Series], shown: float) -> Figure:
    """All ten eigenvalues at one learning rate, and the two largest ones at each of them."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shades = colormaps["plasma"]([0.85 - 0.08 * rank for rank in range(10)][::-1])
    for rank in reversed(range(10)):
        values = [largest[rank] for largest in runs[shown].values()]
        left.plot(list(runs[shown]), values, color=shades[rank], linewidth=1.2)
    left.axhline(2 / shown, color="#333333", linewidth=1, linestyle=":")
    left.set_title(f"the ten largest, η = {shown:g} (dotted: 2/η)", fontsize=11)
    left.set_ylabel("eigenvalue")
    for colour, (lr, series) in zip(("#2f6f9f", "#4c9a5b", "#c1432e"), sorted(runs.items()), strict=False):
        for rank, style in enumerate(("-", "--")):
            values = [largest[rank] for largest in series.values()]
            label = None if rank else f"η = {lr:g}"
            right.plot(list(series), values, style, color=colour, linewidth=1.4, label=label)
    right.set_title("λ₁ (solid) and λ₂ (dashed) by learning rate", fontsize=11)
    right.legend(frameon=False)
    for panel in (left, right):
        panel.set_yscale("log")
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py, or is to hold it")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.05, 0.1], help="up to three learning rates")
    parser.add_argument("--out", type=Path, default=Path("logs/sharpest_directions"), help="folder for tables, picture")
    args = parser.parse_args()
    runs = {lr: run(lr, args.root, args.out / f"lr{lr:g}") for lr in args.lrs}
    for lr, series in runs.items():
        sharpness = {step: largest[0] for step, largest in series.items()}
        peak = max(sharpness, key=sharpness.__getitem__)
        print(
            f"η = {lr:g} (2/η = {2 / lr:g}): λ₁ from {sharpness[0]:.2f} to its peak of {sharpness[peak]:.1f} at step"
            f" {peak}; at the end {list(sharpness.values())[-1]:.1f}"
        )
    picture = args.out / "sharpest_directions.png"
    draw(runs, args.lrs[len(args.lrs) // 2]).savefig(picture, dpi=150)
    print(f"The picture: {picture}")


if __name__ == "__main__":
    main()
