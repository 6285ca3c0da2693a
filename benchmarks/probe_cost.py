"""What a product, a probe and a step of the learning rate controller cost, in gradients of the same batch.

    python -m benchmarks.probe_cost

All timings are medians of repeats that are interleaved, so that a change in the machine's load hits all alike; the
table gives ratios within the run. The networks make a few SGD steps between two repeats, so that warm starts meet a
changed matrix.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.models import MLP, LeNet
from lyapunov_lightning.curvature import HessianOperator, LyapunovIteration
from lyapunov_lightning.curvature.quasi_newton import CheckedSharpness
from lyapunov_lightning.curvature.tracking import ExtremeTracker


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks with a batch of inputs each."""
    return {
        "MLP 3072-200-200-200-10, batch 512": (MLP(3072, [200, 200, 200]), torch.randn(512, 3, 32, 32)),
        "LeNet, batch 512": (LeNet(), torch.randn(512, 3, 32, 32)),
        "LeNet, batch 64": (LeNet(), torch.randn(64, 3, 32, 32)),
    }


def measure(network: nn.Module, inputs: Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and median number of products of each task."""
    labels = torch.randint(0, 10, (len(inputs),))
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    tracker, iteration, sharpness = ExtremeTracker(tol=1e-2), LyapunovIteration(), CheckedSharpness()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(network(batch[0]), batch[1])

    def operator(**options: object) -> HessianOperator:
        return HessianOperator(loss, parameters, [(inputs, labels)], **options)  # type: ignore[arg-type]

    kept, rebuilt = operator(), operator(max_graph_bytes=0)
    forward = operator(method="forward_over_reverse")
    vector = torch.randn(kept.size)

    def gradient() -> None:
        torch.autograd.grad(loss((inputs, labels)), parameters)

    def lyapunov() -> None:
        iteration.step(operator(method="finite_difference").gradient, own)

    def along_update() -> None:
        hessian = operator()
        hessian.matvec(vector)
        hessian.gradient()

    def inverse_sharpness() -> None:
        differences = operator(method="finite_difference")
        sharpness.step(differences.gradient, differences.gradient())

    tasks: dict[str, Callable[[], object]] = {
        "gradient": gradient,
        "product, graph kept": lambda: kept.matvec(vector),
        "product, graph rebuilt": lambda: rebuilt.matvec(vector),
        "product, forward over reverse": lambda: forward.matvec(vector),
        "probe, Lanczos (warm)": lambda: tracker.measure(operator()),
        "probe, Lyapunov (own gradient)": lyapunov,
        "controller, along the update": along_update,
        "controller, inverse sharpness": inverse_sharpness,
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    products: dict[str, list[int]] = {name: [] for name in tasks}
    for repeat in range(repeats + 2):
        for _ in range(5):
            optimizer.zero_grad()
            loss((inputs, labels)).backward()
            optimizer.step()
        kept = operator()
        kept.matvec(vector)  # builds the graph
        own = operator().gradient()
        for name, task in tasks.items():
            started = time.perf_counter()
            result = task()
            if repeat >= 2:  # the first ones warm up
                seconds[name].append(time.perf_counter() - started)
                products[name].append(getattr(result, "num_matvecs", 1))
    return {name: (median(seconds[name]), median(products[name])) for name in tasks}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    for title, (network, inputs) in networks().items():
        results = measure(network, inputs, arguments.repeats)
        unit = results["gradient"][0]
        print(f"\n{title}: a gradient takes {1e3 * unit:.2f} ms")
        for name, (seconds, products) in results.items():
            print(f"  {name:32s} {seconds / unit:6.2f} gradients, {products:g} product(s)")


if __name__ == "__main__":
    main()
