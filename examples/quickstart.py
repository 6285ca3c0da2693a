"""Train a small network on handwritten digits, draw its sharpness, and say what was seen.

Run by ``make demo``, or ``python -m examples.quickstart``. The training is that of the command
``lyapunov-lightning fit --config examples/configs/quickstart.yaml``.
"""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.cli import main as run_cli
from lyapunov_lightning.figures import sharpness_figure

CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"


def read_curve(log_dir: str, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a scalar that the module logged, from TensorBoard's event files."""
    events = EventAccumulator(log_dir, size_guidance={"scalars": 0}).Reload().Scalars(tag)
    return np.array([event.step for event in events]), np.array([event.value for event in events])


def main() -> None:
    trainer = run_cli(["fit", "--config", str(CONFIG)]).trainer
    probe = next(callback for callback in trainer.callbacks if isinstance(callback, CurvatureProbe))
    loss_steps, loss = read_curve(trainer.logger.log_dir, "train/loss")
    last = probe.results[-1]
    figure = sharpness_figure(
        [result.step for result in probe.results],
        [result.lambda_max for result in probe.results],
        [result.stability_limit for result in probe.results],
        loss_steps=loss_steps,
        loss=loss,
        title=f"Handwritten digits, gradient descent at learning rate {last.learning_rate:g}",
    )
    picture = Path(trainer.logger.log_dir) / "sharpness.png"
    figure.savefig(picture, dpi=150)

    above = next((result.step for result in probe.results if result.stability_ratio >= 1), None)
    reached = "did not reach it" if above is None else f"reached it at step {above}"
    late = np.mean([result.stability_ratio for result in probe.results if result.step >= last.step / 2])
    print(
        f"\nSharpness began at {probe.results[0].lambda_max:.2f}; 2/η = {last.stability_limit:.2f}: it {reached}, and"
        f" over the second half of the run it stayed at {late:.2f} times that, while the loss fell to {loss[-1]:.4f}."
    )
    print(f"The curves: {picture}")
    print("In TensorBoard: .venv/bin/tensorboard --logdir logs")


if __name__ == "__main__":
    main()
