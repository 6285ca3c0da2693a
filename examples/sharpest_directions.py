"""The top eigenvalues of SimpleCNN on CIFAR-10 grow, then settle, lower for a larger learning rate.

    python -m examples.sharpest_directions --root data

Runs ``examples/configs/simplecnn_spectrum.yaml`` with several learning rates and draws the ten eigenvalues of each, as
in figures 2 and 4 of "On the relation between the sharpest directions of DNN loss and the SGD step length".
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from lyapunov_lightning.cli import main as run_cli

CONFIG = Path(__file__).parent / "configs" / "simplecnn_spectrum.yaml"


def run(lr: float, root: str, download: bool, save_dir: Path) -> pd.DataFrame:
    """Train once; the table of eigenvalues, one row a step and one column a rank."""
    run_cli(
        [
            "fit",
            *("--config", str(CONFIG)),
            *("--model.init_args.optimizer.init_args.lr", str(lr)),
            *("--data.root", root),
            *("--data.download", str(download).lower()),
            *("--trainer.callbacks.save_dir", str(save_dir)),
        ]
    )
    table = pd.read_csv(save_dir / "spectrum.csv").pivot(index="step", columns="name", values="value")
    return table[[f"spectrum/lambda_{rank}" for rank in range(1, 11)]]


def draw(tables: dict[float, pd.DataFrame]) -> Figure:
    """One panel for each learning rate, on a common axis."""
    figure = Figure(figsize=(3.4 * len(tables), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for panel, (lr, table) in zip(panels, tables.items(), strict=True):
        for rank, name in reversed(list(enumerate(table))):
            panel.plot(table.index, table[name], color=colormaps["plasma"](0.05 + 0.08 * rank), linewidth=1.2)
        panel.axhline(2 / lr, color="#333333", linestyle="--", linewidth=1)
        panel.text(table.index[-1], 2 / lr, f"2/η = {2 / lr:g}", ha="right", va="bottom", fontsize=9)
        panel.set_title(f"learning rate {lr:g}", fontsize=11)
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ten largest eigenvalues")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of CIFAR-10 in torchvision's layout")
    parser.add_argument("--no-download", action="store_true", help="the data are there already")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--out", type=Path, default=Path("logs/sharpest_directions"))
    arguments = parser.parse_args()
    tables = {
        lr: run(lr, arguments.root, not arguments.no_download, arguments.out / f"lr{lr:g}") for lr in arguments.lr
    }
    draw(tables).savefig(arguments.out / "spectrum.png", dpi=150)
    for lr, table in tables.items():
        top = table["spectrum/lambda_1"]
        print(
            f"learning rate {lr:g}: λ1 from {top.iloc[0]:.2f} to a peak of {top.max():.1f} at step {top.idxmax()},"
            f" {top.iloc[-1]:.1f} at the end; 2/η = {2 / lr:.0f}"
        )
    print(f"The picture: {arguments.out / 'spectrum.png'}")


if __name__ == "__main__":
    main()
