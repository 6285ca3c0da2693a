"""Draw the picture of the page "Which layer is the sharp one": eigenvalue and trace of every layer over a training.

``python -m examples.sharp_layers`` trains a network of six layers on handwritten digits by full-batch gradient descent,
up to the edge of stability and along it. About a minute on two cores.
"""

import argparse
from pathlib import Path

from examples.docs_pictures import descend
from lyapunov_lightning import HessianConfig, SpectrumTracker

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "sharp_layers.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800, help="length of the run")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="what to write")
    parser.add_argument("--log-dir", type=Path, default=Path("logs/sharp_layers"), help="where to log")
    options = parser.parse_args()

    tracker = SpectrumTracker(
        options.every,
        largest=1,
        groups="layers",
        random_vectors=10,
        tol=0.02,
        hessian=HessianConfig(num_batches=1),  # each of them is the whole training set
        save_dir=str(options.log_dir),
    )
    descend(tracker, [32] * 5, 0.4, options.steps, options.log_dir)
    tracker.plot("blocks").savefig(options.picture, dpi=130)  # `save` would write a larger one, and an SVG
    first, last = tracker.results[0], tracker.results[-1]
    print(f"products at first and at last: {first.block_matvecs} and {last.block_matvecs} of the layers")
    print(f"largest eigenvalue of all: {first.largest[0]:.3g} and {last.largest[0]:.3g}")
    for name in last.lambda_max_of:
        print(
            f"{name}: largest eigenvalue {first.lambda_max_of[name]:.3g} and {last.lambda_max_of[name]:.3g},"
            f" trace {last.trace_of[name]:.3g} ± {last.trace_error_of[name]:.2g}"
        )


if __name__ == "__main__":
    main()
