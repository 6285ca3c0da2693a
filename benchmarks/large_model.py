"""What the sharpness of a transformer of 23 million parameters costs, beside its training, in its first steps.

    python -m benchmarks.large_model

Six layers of width 512, 8,000 tied embeddings, dropout 0.1, AdamW, batches of 4 x 64 tokens. Each measurement is a cold
one, at an accuracy of 2 %. Times are in training steps, measured beside each of them; memory is the most that the
process has held so far, so that each row shows what it adds to those before it.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import Eigenpairs, HessianOperator, lanczos
from lyapunov_lightning.curvature.stability import Stability, stability_of

WORDS, WIDTH, LAYERS, LENGTH, BATCH = 8000, 512, 6, 64, 4


class Transformer(nn.Module):
    """A language model with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        """The scores of the next words."""
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        hidden = self.body(self.embedding(words) + self.positions, mask=mask, is_causal=True)
        return self.norm(hidden) @ self.embedding.weight.T


def seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """The least time of three calls."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - started)
    return min(times)


def search(name: str, hessian: HessianOperator, stability: Stability, tol: float) -> Eigenpairs:
    """One of the measurements."""
    if name == "preconditioned":
        return lanczos(stability.matrix(hessian), value_tol=tol)
    return lanczos(hessian, smallest=int(name == "both"), value_tol=tol)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tol", type=float, default=0.02)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def batch() -> Tensor:
        start, stride = torch.randint(WORDS, (BATCH, 1)), torch.randint(1, 50, (BATCH, 1))
        return (start + stride * torch.arange(LENGTH + 1)) % WORDS

    def loss(words: Tensor) -> Tensor:
        return functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())

    def train() -> None:
        optimizer.zero_grad()
        loss(batch()).backward()
        optimizer.step()

    def gradient_of(words: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(words), list(model.parameters()))

    def gibibytes() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    for _ in range(3):
        train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; training {gibibytes():.2f} GiB", flush=True)
    for after in (3, 10, 20):
        while int(optimizer.state[model.positions]["step"]) < after:
            train()
        words = batch()
        optimizer.zero_grad()
        operator = HessianOperator(loss, model.parameters(), [words])
        vector = torch.randn(operator.size)
        operator.matvec(vector)
        product = seconds_of(operator.matvec, vector)
        gradient = seconds_of(gradient_of, words)
        print(f"after {after} steps: a product takes {product / gradient:.1f} gradients", flush=True)
        stability = stability_of(optimizer, operator.parameters, operator.layout)
        assert stability is not None
        del operator
        for name in ("largest", "both", "preconditioned"):
            started = time.perf_counter()
            pairs = search(name, HessianOperator(loss, model.parameters(), [words]), stability, arguments.tol)
            seconds = time.perf_counter() - started
            found = ", ".join(f"{value:.4g}" for value in pairs.values.tolist())
            print(
                f"  {name:15s} {pairs.num_matvecs:3d} products in the time of {seconds / seconds_of(train):5.1f} steps:"
                f" {found} (converged: {bool(pairs.converged.all())}); {gibibytes():.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
