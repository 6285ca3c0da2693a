"""What the products of all layers take, one layer after the other, in products of the whole Hessian.

    python -m benchmarks.layer_products        # half a minute on one core; nothing is downloaded

Chains of equal linear layers with tanh between them. A product of a layer goes back through the layers above it alone.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from benchmarks.timing import Sample
from lyapunov_lightning.curvature import HessianOperator

WIDTH, BATCH_SIZE = 256, 256


def seconds_of(operator: HessianOperator, repeats: int) -> float:
    """CPU time of a product, its graph being there."""
    vector = torch.randn(operator.size)
    operator.matvec(vector)
    began = time.process_time()
    for _ in range(repeats):
        operator.matvec(vector)
    return (time.process_time() - began) / repeats


def ratio(depth: int, repeats: int) -> float:
    """The products of all layers over one of the whole."""
    torch.manual_seed(0)
    chain = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    batch = torch.randn(BATCH_SIZE, WIDTH), torch.randn(BATCH_SIZE, WIDTH)

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return (chain(pair[0]) - pair[1]).square().mean()

    layers = [[*layer.parameters()] for layer in chain if isinstance(layer, nn.Linear)]
    whole = seconds_of(HessianOperator(loss, [*chain.parameters()], [batch]), repeats)
    return sum(seconds_of(HessianOperator(loss, layer, [batch]), repeats) for layer in layers) / whole


def main() -> None:
    """Measure, and print a line for each depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for depth in (8, 16):
        sample = Sample(tuple(ratio(depth, 20) for _ in range(args.repeats)))
        low, high = sample.quartiles
        print(f"{depth} layers: {sample.median:.2f} ({low:.2f} to {high:.2f}) products of the whole", flush=True)


if __name__ == "__main__":
    main()
