"""Train a small network on handwritten digits, draw its sharpness, and say what was seen.

Run by ``make demo``, or ``python -m examples.quickstart``. The training is that of the command
``lyapunov-lightning fit --config examples/configs/quickstart.yaml``.
"""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lyapunov_lightning.cli import main as run_cli
from lyapunov_lightning.figures import sharpness_figure

CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"


def read_curve(log_dir: str, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a scalar in TensorBoard's event files."""
    events = EventAccumulator(log_dir, size_guidance={"scalars": 0}).Reload().Scalars(tag)
    return np.array([event.step for event in events]), np.array([event.value for event in events])


def main() -> None:
    trainer = run_cli(["fit", "--config", str(CONFIG)]).trainer
    log_dir = trainer.logger.log_dir

    steps, sharpness = read_curve(log_dir, "curvature/lambda_max")
    _, limit = read_curve(log_dir, "curvature/stability_limit")
    loss_steps, loss = read_curve(log_dir, "train/loss")
    learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
    figure = sharpness_figure(
        steps,
        sharpness,
        limit,
        loss_steps=loss_steps,
        loss=loss,
        title=f"Handwritten digits, gradient descent at learning rate {learning_rate:g}",
    )
    picture = Path(log_dir) / "sharpness.png"
    figure.savefig(picture, dpi=150)

    edge = limit[-1]
    above = np.flatnonzero(sharpness >= edge)
    reached = f"reached it at step {steps[above[0]]}" if above.size else "did not reach it"
    late = sharpness[steps >= steps[-1] / 2].mean()
    print(
        f"\nSharpness began at {sharpness[0]:.2f}; 2/η = {edge:.2f}: it {reached}, and over the second half of the run"
        f" it stayed at {late / edge:.2f} times that, while the loss fell to {loss[-1]:.4f}."
    )
    print(f"The curves: {picture}")
    print("In TensorBoard: .venv/bin/tensorboard --logdir logs")


if __name__ == "__main__":
    main()
