"""Kinds of batches, and kinds of datasets, samplers and loaders that bring them."""

from tests.generator.ingredients import Batch, Loader, tags

_LOGS_SIZE = tags("collated")

BATCHES = [
    Batch("tuple"),
    Batch("list", pack="[x, y]"),
    Batch("dict", pack="{'x': x, 'y': y}", unpack="x, y = batch['x'], batch['y']"),
    Batch("nested", pack="{'in': [{'x': x}], 'out': (y, None)}", unpack="x, y = batch['in'][0]['x'], batch['out'][0]"),
    Batch("one tensor", pack="torch.cat([x, y], dim=1)", unpack="x, y = batch[:, :4], batch[:, 4:]"),
    Batch(
        "namedtuple",
        above="Sample = collections.namedtuple('Sample', 'x y')\n",
        pack="Sample(x, y)",
        unpack="x, y = batch.x, batch.y",
    ),
    Batch(
        "dataclass",
        above="@dataclasses.dataclass\nclass Sample:\n    x: torch.Tensor\n    y: torch.Tensor\n    n: int = 3\n",
        pack="Sample(x, y)",
        unpack="x, y = batch.x, batch.y",
    ),
    Batch(
        "user's class with to()",
        above="class Sample:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n\n"
        "    def to(self, device, **kwargs):\n        return Sample(self.x.to(device), self.y.to(device))\n",
        pack="Sample(x, y)",
        unpack="x, y = batch.x, batch.y",
    ),
    Batch(
        "user's class with slots",
        above="class Sample:\n    __slots__ = ('x', 'y')\n\n"
        "    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
        pack="Sample(x, y)",
        unpack="x, y = batch.x, batch.y",
    ),
    Batch(
        "user's class that is written to",
        above="class Sample:\n    def __init__(self, x, y):\n        self.x, self.y, self.uses = x, y, 0\n",
        pack="Sample(x, y)",
        unpack="batch.uses += 1\nx, y = batch.x * batch.uses, batch.y",
    ),
    Batch(
        "dict that is popped from",
        pack="{'x': x, 'y': y}",
        unpack="x = batch.pop('x')\ny = batch['y']\nbatch['x'] = 0.95 * x",
    ),
    Batch(
        "list that grows",
        pack="[x, y]",
        unpack="batch.append(len(batch))\nx, y = batch[0] * (1 + 0.05 * len(batch)), batch[1]",
    ),
    Batch(
        "NumPy arrays",
        pack="(x.numpy(), y.numpy())",
        unpack="x, y = torch.as_tensor(batch[0]), torch.as_tensor(batch[1])",
    ),
    Batch(
        "NumPy arrays in a dict, written to",
        pack="{'x': x.numpy(), 'y': y}",
        unpack="batch['x'] *= 0.9\nx, y = torch.as_tensor(batch['x']), batch['y']",
    ),
    Batch(
        "with ints and strings", pack="(x, y, 7, 'train', len(x))", unpack="x, y = batch[0], batch[1] * (batch[2] / 7)"
    ),
    Batch(
        "packed sequence",
        pack="(nn.utils.rnn.pack_sequence([row[: 1 + i % 4] for i, row in enumerate(x)], enforce_sorted=False), y)",
        unpack="x, lengths = nn.utils.rnn.pad_packed_sequence(batch[0], batch_first=True, total_length=4)\n"
        "y = batch[1]",
    ),
    Batch(
        "UserDict",
        above="class Encoding(collections.UserDict):\n    def to(self, device, **kwargs):\n        return self\n",
        pack="Encoding(x=x, y=y)",
        unpack="x, y = batch['x'], batch['y']",
    ),
    Batch("SimpleNamespace", pack="types.SimpleNamespace(x=x, y=y)", unpack="x, y = batch.x, batch.y"),
    Batch("list of samples", pack="list(zip(x, y))", unpack="x, y = map(torch.stack, zip(*batch))"),
    Batch(
        "tensor subclass",
        above="class Marked(torch.Tensor):\n    pass\n",
        pack="(x.as_subclass(Marked), y)",
        unpack="x, y = batch[0].as_subclass(torch.Tensor), batch[1]",
    ),
    Batch("sparse inputs", pack="(x.to_sparse(), y)", unpack="x, y = batch[0].to_dense(), batch[1]"),
    Batch(
        "views of one tensor, which is written to",
        pack="(lambda z: (z[:, :4], z[:, 4:], z))(torch.cat([x, y], dim=1))",
        unpack="batch[2].mul_(0.9)\nx, y = batch[:2]",
    ),
    Batch(
        "nested tensor",
        pack="(torch.nested.nested_tensor([row[: 1 + i % 4] for i, row in enumerate(x)], layout=torch.jagged), y)",
        unpack="x, y = batch[0].to_padded_tensor(0.0, (len(batch[1]), 4)), batch[1]",
        excludes=tags("not sliced"),
    ),
    Batch("expanded targets", pack="(x, y.mean(dim=1, keepdim=True).expand(-1, 2))", unpack="x, y = batch"),
    Batch("integer targets beside", pack="(x, y, (y > 0).long())", unpack="x, y, labels = batch\ny = y + 0.1 * labels"),
]

_LOADER_CLASS = """
class Scaling(DataLoader):
    def __iter__(self):
        for n, batch in enumerate(super().__iter__()):
            x, y = unpack(batch)
            yield pack(x * (0.5 + 0.1 * n), y)
"""

_OWN_BATCH_SAMPLER = """
class Pairs:
    def __init__(self, size):
        self.size, self.epoch = size, 0

    def __iter__(self):
        self.epoch += 1
        order = torch.randperm(self.size).tolist()
        return iter([order[i : i + 6] for i in range(0, self.size, 6)])

    def __len__(self):
        return self.size // 6
"""

_EPOCH_SAMPLER = """
class ByEpoch(torch.utils.data.Sampler):
    def __init__(self, size):
        self.size, self.draws = size, 0

    def __iter__(self):
        self.draws += 1
        return iter([(i * self.draws) % self.size for i in range(self.size)])

    def __len__(self):
        return self.size
"""


def _points(name: str, init: str = "", item: str = "", methods: str = "") -> str:
    """A dataset class that extends `Points`, with other lines before a sample is returned."""
    lines = [f"class {name}(Points):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in init.splitlines()]
    lines += ["", "    def __getitem__(self, i):", "        x, y = super().__getitem__(i)"]
    lines += [f"        {line}" for line in item.splitlines()]
    lines += ["        return x, y", *[f"    {line}" for line in methods.splitlines()]]
    return "\n".join(lines)


_STREAM = """
class Stream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.points, self.n = Points(), 0

    def __iter__(self):
        for i in torch.randperm(18).tolist():
            self.n += 1
            x, y = self.points[i]
            yield x * (1 + 0.01 * self.n), y
"""

LOADERS = [
    Loader("in order", "return DataLoader(POINTS, 6, COLLATE)"),
    Loader("shuffled"),
    Loader("shuffled, the last batch smaller", "return DataLoader(POINTS, 7, shuffle=True, COLLATE)"),
    Loader("shuffled, the last batch dropped", "return DataLoader(POINTS, 5, shuffle=True, drop_last=True, COLLATE)"),
    Loader(
        "shuffled by its own generator",
        "return DataLoader(POINTS, 6, shuffle=True, generator=torch.Generator().manual_seed(5), COLLATE)",
    ),
    Loader(
        "SubsetRandomSampler",
        "return DataLoader(POINTS, 6, sampler=torch.utils.data.SubsetRandomSampler(range(14)), COLLATE)",
    ),
    Loader(
        "WeightedRandomSampler",
        "weights = torch.arange(18.0)\n"
        "return DataLoader(POINTS, 6, sampler=torch.utils.data.WeightedRandomSampler(weights, 18), COLLATE)",
    ),
    Loader("Subset", "return DataLoader(torch.utils.data.Subset(POINTS, range(2, 17)), 6, shuffle=True, COLLATE)"),
    Loader(
        "list as batch sampler",
        "return DataLoader(POINTS, batch_sampler=[[i, i + 1, i + 7, i + 9] for i in range(9)], COLLATE)",
        excludes=tags("overfit"),
    ),
    Loader(
        "BatchSampler",
        "sampler = torch.utils.data.RandomSampler(range(18))\n"
        "return DataLoader(POINTS, batch_sampler=torch.utils.data.BatchSampler(sampler, 6, False), COLLATE)",
    ),
    Loader(
        "batch sampler of the user's class",
        "return DataLoader(POINTS, batch_sampler=Pairs(18), COLLATE)",
        above=_OWN_BATCH_SAMPLER,
        excludes=tags("overfit"),
    ),
    Loader(
        "sampler with a state of its own",
        "return DataLoader(POINTS, 6, sampler=ByEpoch(18), COLLATE)",
        above=_EPOCH_SAMPLER,
    ),
    Loader("IterableDataset with a counter", "return DataLoader(POINTS, 6, COLLATE)", "Stream()", above=_STREAM),
    Loader(
        "loader subclass with its own iteration",
        "return Scaling(POINTS, 6, shuffle=True, COLLATE)",
        above=_LOADER_CLASS,
    ),
    Loader(
        "values of a dict of batches",
        "batches = [default_collate([POINTS[i] for i in range(n, n + 6)]) for n in range(0, 18, 6)]\n"
        "return {n: pack(x, y) for n, (x, y) in enumerate(batches)}.values()",
        excludes=tags("overfit", "loader without attributes"),
    ),
    Loader(
        "user's iterable",
        "return Repeated([pack(*default_collate([POINTS[i] for i in range(n, n + 6)])) for n in range(0, 18, 6)])",
        above="class Repeated:\n    def __init__(self, batches):\n        self.batches, self.epoch = batches, 0\n\n"
        "    def __iter__(self):\n        self.epoch += 1\n        return iter(self.batches[:: (-1) ** self.epoch])\n\n"
        "    def __len__(self):\n        return len(self.batches)\n",
        excludes=tags("overfit"),
    ),
    Loader(
        "dict of loaders",
        "return {'a': DataLoader(POINTS, 3, shuffle=True, COLLATE), 'b': DataLoader(POINTS, 3, COLLATE)}",
        unpack="parts = [unpack(batch['a']), unpack(batch['b'])]\nx, y = (torch.cat(both) for both in zip(*parts))",
        excludes=tags("loaders of loaders"),
    ),
    Loader(
        "CombinedLoader",
        "loaders = [DataLoader(POINTS, 3, shuffle=True, COLLATE), DataLoader(POINTS, 2, COLLATE)]\n"
        "return CombinedLoader(loaders, 'min_size')",
        unpack="parts = [unpack(batch[0]), unpack(batch[1])]\nx, y = (torch.cat(both) for both in zip(*parts))",
        excludes=tags("loaders of loaders"),
    ),
    Loader(
        "dataset of whole batches",
        "return DataLoader(POINTS, batch_size=None, shuffle=True)",
        "Batches()",
        above="class Batches(torch.utils.data.Dataset):\n    def __len__(self):\n        return 3\n\n"
        "    def __getitem__(self, i):\n        points = Points()\n"
        "        return pack(*default_collate([points[j] for j in range(6 * i, 6 * i + 6)]))\n",
        excludes=tags("packed", "not convertible"),
    ),
    Loader(
        "dataset with a generator of its own",
        dataset="Noisy()",
        above=_points(
            "Noisy",
            "self.rng = np.random.default_rng(0)",
            "x = x + 0.1 * torch.as_tensor(self.rng.normal(size=4)).to(x)",
        ),
    ),
    Loader(
        "dataset with a counter and a cache",
        dataset="Cached()",
        above=_points(
            "Cached",
            "self.n, self.cache = 0, {}",
            "self.n += 1\nself.cache[i] = x = self.cache.get(i, x) * (1 + 0.01 * self.n)",
        ),
    ),
    Loader(
        "dataset that fetches lists of indices",
        dataset="Fetching()",
        above=_points(
            "Fetching",
            "self.calls = 0",
            methods="def __getitems__(self, indices):\n    self.calls += 1\n"
            "    return [(x * (1 + 0.1 * self.calls), y) for x, y in map(self.__getitem__, indices)]",
        ),
    ),
    Loader(
        "augmentation by the global generators",
        dataset="Augmented()",
        above=_points(
            "Augmented",
            "",
            "x = x + 0.1 * torch.randn(4)\nif random.random() < 0.5:\n    x = -x\n"
            "x = x * float(np.random.uniform(0.8, 1.2))",
        ),
    ),
    Loader(
        "collate function with a state",
        "return DataLoader(POINTS, 6, shuffle=True, collate_fn=Collate())",
        above="class Collate:\n    n = 0\n\n    def __call__(self, samples):\n        self.n += 1\n"
        "        x, y = default_collate(samples)\n"
        "        return pack(x * (1 + 0.02 * self.n), y)\n",
    ),
    Loader(
        "data module",
        "return Data()",
        above="class Data(pl.LightningDataModule):\n    def train_dataloader(self):\n"
        "        return DataLoader(Points(), 6, shuffle=True, collate_fn=collate)\n",
        provides=tags("data module"),
    ),
]
