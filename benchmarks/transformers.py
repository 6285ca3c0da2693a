"""Two language models as they are built today, and small ones with weights large enough for a sharp loss.

They are those of GPT-2 (learned positions, LayerNorm before each block, GELU, tied embeddings) and of Llama (rotary
positions, RMSNorm, a gated SiLU, no biases, an output layer of its own) in all that matters to a second derivative, and
written in PyTorch alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems import Problem, sentences


class _Attention(nn.Module):
    """Causal attention of several heads.

    Args:
        width: Width of the layer.
        heads: Number of heads.
        bias: Whether the projections have a bias.
        rotary: Whether queries and keys are turned by their positions.

    """

    def __init__(self, width: int, heads: int, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.inputs, self.outputs = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The sum over the positions so far."""
        batch, length, width = hidden.shape
        shape = batch, length, 3, self.heads, width // self.heads
        queries, keys, values = self.inputs(hidden).view(shape).permute(2, 0, 3, 1, 4)
        if self.rotary:
            queries, keys = _turned(queries), _turned(keys)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.outputs(mixed.transpose(1, 2).reshape(batch, length, width))


def _turned(vectors: Tensor) -> Tensor:
    """Rotary embedding: pairs of entries turned by angles that grow with the position."""
    length, width = vectors.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=vectors.dtype, device=vectors.device) / width)
    angles = torch.arange(length, dtype=vectors.dtype, device=vectors.device)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _GeluLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(hidden), approximate="tanh"))


class _GatedLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, llama: bool) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = nn.RMSNorm if llama else nn.LayerNorm
        self.norms = nn.ModuleList([norm(width), norm(width)])
        self.attention = _Attention(width, heads, bias=not llama, rotary=llama)
        self.layer = _GatedLayer(width) if llama else _GeluLayer(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norms[0](hidden))
        return hidden + self.layer(self.norms[1](hidden))


class LanguageModel(nn.Module):
    """A language model that scores the next words.

    Args:
        llama: Whether it is built like Llama; else like GPT-2.
        words: Size of the vocabulary.
        width: Width of the layers.
        layers: Their number.
        length: The longest sequence.
        heads: Number of heads of the attention.
        scale: By how much all matrices are larger than in a fresh model. The more, the sharper the loss.

    """

    def __init__(
        self,
        llama: bool,
        words: int = 40,
        width: int = 16,
        layers: int = 2,
        length: int = 16,
        heads: int = 2,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = None if llama else nn.Parameter(torch.empty(length, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, llama) for _ in range(layers)))
        self.norm = nn.RMSNorm(width) if llama else nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if not llama:
            self.head.weight = self.embedding.weight
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.02 * scale)

    def forward(self, words: Tensor) -> Tensor:
        """The scores of the next words, of shape ``(sequence, word, position)``."""
        hidden = self.embedding(words)
        if self.positions is not None:
            hidden = hidden + self.positions[: words.shape[1]]
        return self.head(self.norm(self.blocks(hidden))).transpose(1, 2)


def gpt2_like(scale: float = 30.0, count: int = 8, width: int = 16) -> Problem:
    """A sharp GPT-2 of a few thousand parameters."""
    return _problem("GPT-2-like", False, scale, count, width)


def llama_like(scale: float = 20.0, count: int = 8, width: int = 16) -> Problem:
    """A sharp Llama of a few thousand parameters."""
    return _problem("Llama-like", True, scale, count, width)


def _problem(name: str, llama: bool, scale: float, count: int, width: int) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel(llama, width=width, scale=scale)
    return Problem(name, model, [sentences(count, 16, 40)])
