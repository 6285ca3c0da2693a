"""What is sharded, on how many ranks it may be, and the same model whole."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import TIMEOUT, WORLD_SIZE

VOCABULARY, WIDTH, LENGTH = 11, 6, 5


class Block(nn.Module):
    """Attention and a feed-forward layer of odd width, whose shards are uneven."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH + 1), nn.Linear(2 * WIDTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(x)
        heads = [layer(y)[:, None] for layer in (self.query, self.key, self.value)]
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[:, 0]
        x = x + self.dropout(self.out(attended))
        if self.checkpointed:
            return x + checkpoint(self.feed_forward, x, use_reentrant=False)
        return x + self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.second_norm(x))))


class Transformer(nn.Module):
    """A decoder of one block, which is sharded apart from the rest."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(**options)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Decoder(pl.LightningModule):
    """A language model of which each rank holds a part where the strategy asks for it.

    Args:
        optimizer: Makes the optimizer.
        lr: Its learning rate.
        dtype: That of the parameters.
        copies: How many copies of the whole model there are.
        sharding: Options of ``fully_shard``.
        options: Options of the blocks.

    """

    def __init__(
        self,
        optimizer: Any = torch.optim.SGD,
        lr: float = 0.1,
        dtype: torch.dtype = torch.float64,
        copies: int = 1,
        sharding: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.lr, self.wide, self.copies = optimizer, lr, dtype, copies
        self.sharding, self.options = sharding or {}, options
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = transformer(**self.options).to(self.wide)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            if self.copies > 1:
                mesh = init_device_mesh(
                    "cpu", (self.copies, WORLD_SIZE // self.copies), mesh_dim_names=("copies", "shards")
                )
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh, **self.sharding)
            fully_shard(self.net, mesh=mesh, **self.sharding)

    def loss(self, batch: Any) -> Tensor:
        return loss_of(self.net, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters(), lr=self.lr)


def transformer(**options: Any) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Transformer(**options)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.5)  # away from the flat beginning
    return net


def loss_of(net: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())


def texts(num_samples: int, seed: int = 0) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (num_samples, LENGTH + 1), generator=generator)
    return torch.utils.data.TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def sharded_strategy(**options: Any) -> ModelParallelStrategy:
    sizes = {"data_parallel_size": WORLD_SIZE, "tensor_parallel_size": 1}
    return ModelParallelStrategy(**{**sizes, **options}, process_group_backend="gloo", timeout=TIMEOUT)
