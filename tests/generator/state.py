"""Places where a training step keeps state. Each of them goes into the loss, so that a lost or a doubled write shows.

What is written in a step changes the loss of this and the later steps: a callback that leaks changes the training, and
one that replays the step from another state measures another eigenvalue.
"""

from tests.generator.ingredients import State, tags

_COUNTED = "loss = loss * (1 + 0.1 * {})"


def _scaled(value: str, *lines: str) -> str:
    """Lines that write state, and then a loss that grows with it."""
    return "\n".join([*lines, _COUNTED.format(value)])


def _counter(name: str, init: str, write: str, read: str, **more: object) -> State:
    return State(name, _scaled(read, write), init, **more)  # type: ignore[arg-type]


_BOX = "class Box_$:\n    def __init__(self, **attributes):\n        vars(self).update(attributes)\n"

_TEACHER = """
class Teacher_$:
    def __init__(self, net):
        self.net = copy.deepcopy(net)

    @torch.no_grad()
    def follow(self, net):
        for mine, its in zip(self.net.parameters(), net.parameters()):
            mine.lerp_(its, 0.3)

    def __call__(self, x):
        with torch.no_grad():
            return self.net(x)
"""

ATTRIBUTES = [
    _counter("int attribute", "self.$ = 0", "self.$ += 1", "self.$"),
    _counter("list attribute", "self.$ = []", "self.$.append(loss.detach())", "len(self.$)"),
    _counter("dict attribute", "self.$ = {}", "self.$[len(self.$)] = float(loss)", "len(self.$)"),
    _counter("set attribute", "self.$ = set()", "self.$.add(len(self.$))", "len(self.$)"),
    _counter("Counter", "self.$ = collections.Counter()", "self.$['n'] += 1", "self.$['n']"),
    _counter("defaultdict of lists", "self.$ = collections.defaultdict(list)", "self.$[0].append(1)", "len(self.$[0])"),
    _counter(
        "deque of tensors",
        "self.$ = collections.deque(maxlen=3)",
        "self.$.append(loss.detach())",
        "torch.stack(list(self.$)).mean()",
    ),
    _counter(
        "nested containers",
        "self.$ = {'a': [{'n': torch.zeros(2)}, (torch.zeros(1),)]}",
        "self.$['a'][0]['n'].add_(1)\nself.$['a'][1][0].add_(1)",
        "self.$['a'][0]['n'].sum() + self.$['a'][1][0].sum()",
    ),
    _counter(
        "dict of over 1,000 lists", "self.$ = {i: [] for i in range(1001)}", "self.$[7].append(1)", "len(self.$[7])"
    ),
    _counter(
        "dict subclass",
        "self.$ = Dict_$(n=0)",
        "self.$['n'] += 1\nself.$.extra = self.$['n']",
        "(self.$['n'] + self.$.extra)",
        above="class Dict_$(dict):\n    extra = 0\n",
    ),
    _counter(
        "list subclass",
        "self.$ = List_$()",
        "self.$.append(1)",
        "len(self.$)",
        above="class List_$(collections.UserList):\n    pass\n",
    ),
    _counter("SimpleNamespace", "self.$ = types.SimpleNamespace(n=0)", "self.$.n += 1", "self.$.n"),
    _counter(
        "slots dataclass",
        "self.$ = Slots_$()",
        "self.$.n += 1\nself.$.seen.append(1)",
        "(self.$.n + len(self.$.seen))",
        above="@dataclasses.dataclass(slots=True)\nclass Slots_$:\n    n: int = 0\n"
        "    seen: list = dataclasses.field(default_factory=list)\n",
    ),
    _counter(
        "namedtuple replaced",
        "self.$ = Pair_$(0, 0)",
        "self.$ = self.$._replace(a=self.$.a + 1)",
        "self.$.a",
        above="Pair_$ = collections.namedtuple('Pair_$', 'a b')\n",
    ),
    _counter("object of the user's class", "self.$ = Box_$(n=0)", "self.$.n += 1", "self.$.n", above=_BOX),
    _counter(
        "two names for one object",
        "self.$ = Box_$(n=0)\nself.$2 = [self.$]",
        "self.$2[0].n += 1",
        "self.$.n",
        above=_BOX,
    ),
    _counter(
        "object that knows the module",
        "self.$ = Box_$(n=0, owner=weakref.ref(self))",
        "self.$.owner().$.n += 1",
        "self.$.n",
        above=_BOX,
    ),
    _counter(
        "object with __call__",
        "self.$ = Meter_$()",
        "self.$(loss.detach())",
        "self.$.total",
        above="class Meter_$:\n    total = 0.0\n\n    def __call__(self, value):\n"
        "        self.total = 0.5 * self.total + value\n",
    ),
    _counter(
        "property over a private attribute",
        "self._value_$ = 0",
        "self.value_$ += 1",
        "self._value_$",
        methods="@property\ndef value_$(self):\n    return self._value_$\n\n"
        "@value_$.setter\ndef value_$(self, value):\n    self._value_$ = value",
    ),
    _counter("attribute made in the first step", "", "self.$ = getattr(self, '$', 0) + 1", "self.$"),
    _counter(
        "attribute deleted and made again",
        "self.$ = 0",
        "n = self.$\ndel self.$\nself.$ = n + 1",
        "self.$",
    ),
    _counter("hparams", "self.save_hyperparameters({'$': 0})", "self.hparams['$'] += 1", "self.hparams['$']"),
    _counter(
        "attribute of a submodule",
        "self.net.first.count_$ = 0",
        "self.net.first.count_$ += 1",
        "self.net.first.count_$",
    ),
    _counter("NumPy array", "self.$ = np.zeros(2)", "self.$ += 1", "float(self.$.sum())"),
    _counter(
        "view of a NumPy array",
        "self.array_$ = np.zeros(2)\nself.$ = torch.from_numpy(self.array_$)",
        "self.array_$ += 1",
        "self.$.sum()",
    ),
    _counter(
        "lock",
        "self.$ = threading.RLock()\nself.n_$ = 0",
        "with self.$:\n    self.n_$ += 1",
        "self.n_$",
        excludes=tags("deepcopy"),
    ),
    _counter("hidden in __dict__", "vars(self)['$'] = nn.BatchNorm1d(4)", "self.$(x)", "self.$.running_mean.mean()"),
]

TENSORS = [
    _counter(
        "tensor attribute in place", "self.$ = torch.zeros(2)", "self.$.mul_(0.9).add_(loss.detach())", "self.$.mean()"
    ),
    _counter(
        "tensor attribute replaced", "self.$ = torch.zeros(2)", "self.$ = 0.9 * self.$ + loss.detach()", "self.$.mean()"
    ),
    _counter(
        "two views of one tensor",
        "self.$ = torch.zeros(4)\nself.view_$ = self.$[1:]",
        "self.$ += 1",
        "self.view_$.mean()",
    ),
    _counter(
        "tensor attribute that requires grad",
        "self.$ = torch.zeros(1, requires_grad=True)",
        "self.$.data.add_(1)",
        "self.$.detach().sum()",
    ),
    _counter("buffer in place", "self.register_buffer('$', torch.zeros(2))", "self.$ += 1", "self.$.mean()"),
    _counter(
        "buffer replaced",
        "self.register_buffer('$', torch.zeros(2), persistent=False)",
        "self.$ = self.$ + 1",
        "self.$.mean()",
    ),
    _counter(
        "frozen parameter written",
        "self.$ = nn.Parameter(torch.zeros(2), requires_grad=False)",
        "self.$.data += 1",
        "self.$.mean()",
    ),
    _counter(
        "loss with its graph kept",
        "self.$ = None",
        "last = 0.0 if self.$ is None else self.$.detach()\nself.$ = loss",
        "last",
    ),
    _counter(
        "memory bank with a pointer",
        "self.register_buffer('$', torch.zeros(12, 2))\nself.register_buffer('at_$', torch.zeros(1, dtype=torch.long))",
        "n, at = len(out), int(self.at_$)\nself.$[(torch.arange(n) + at) % 12] = out.detach().to(self.$)\n"
        "self.at_$[0] = (at + n) % 12",
        "self.$.square().mean()",
    ),
    _counter(
        "hidden state of a recurrent net",
        "self.$ = None\nself.cell_$ = nn.GRUCell(4, 2)",
        "state = self.cell_$(x.mean(0, keepdim=True), self.$)\nself.$ = state.detach()",
        "state.square().mean()",
    ),
    State(
        "EMA teacher, registered",
        "loss = loss + 0.3 * F.mse_loss(out, self.$(x).detach())\nfor mine, its in "
        "zip(self.$.parameters(), self.net.parameters()):\n    mine.data.lerp_(its.detach(), 0.3)",
        "self.$ = copy.deepcopy(self.net).requires_grad_(False)",
        excludes=tags("deepcopy net"),
    ),
    State(
        "EMA teacher in the user's object",
        "loss = loss + 0.3 * F.mse_loss(out, self.$(x))\nself.$.follow(self.net)",
        "self.$ = Teacher_$(self.net)",
        above=_TEACHER,
        excludes=tags("deepcopy net"),
    ),
    State(
        "copy of the network made anew in the step",
        "if batch_idx % 2 == 1 or self.$ is None:\n    self.$ = [copy.deepcopy(self.net)]\n"
        "loss = loss + 0.3 * F.mse_loss(out, self.$[0](x).detach())",
        "self.$ = None",
        excludes=tags("deepcopy net"),
    ),
    _counter("module in a tuple", "self.$ = (nn.BatchNorm1d(4),)", "self.$[0](x)", "self.$[0].running_mean.mean()"),
    _counter(
        "module in a dict subclass",
        "self.$ = collections.UserDict(a=nn.BatchNorm1d(4))",
        "self.$['a'](x)",
        "self.$['a'].running_mean.mean()",
    ),
]

CODE = [
    _counter("class attribute rebound", "", "type(self).count_$ += 1", "self.count_$", methods="count_$ = 0"),
    _counter("class-level list", "", "self.seen_$.append(1)", "len(self.seen_$)", methods="seen_$ = []"),
    _counter(
        "class-level dict of another class",
        "",
        "Registry_$.known[len(Registry_$.known)] = 1",
        "len(Registry_$.known)",
        above="class Registry_$:\n    known = {}\n",
    ),
    _counter(
        "class attribute of an object's class",
        "self.$ = Counted_$()",
        "self.$.tick()",
        "Counted_$.ticks",
        above="class Counted_$:\n    ticks = 0\n\n    @classmethod\n    def tick(cls):\n        cls.ticks += 1\n",
    ),
    _counter("global rebound", "", "global COUNT_$\nCOUNT_$ += 1", "COUNT_$", above="COUNT_$ = 0\n"),
    _counter("global list", "", "SEEN_$.append(1)", "len(SEEN_$)", above="SEEN_$ = []\n"),
    _counter("global tensor in place", "", "CENTRE_$.add_(1)", "CENTRE_$.mean()", above="CENTRE_$ = torch.zeros(2)\n"),
    _counter("global object", "", "BOX_$.n += 1", "BOX_$.n", above=_BOX + "\n\nBOX_$ = Box_$(n=0)\n"),
    _counter(
        "global of a helper function",
        "",
        "tick_$()",
        "TICKS_$['n']",
        above="TICKS_$ = {'n': 0}\n\n\ndef tick_$():\n    TICKS_$['n'] += 1\n",
    ),
    _counter(
        "closure",
        "self.$ = counter_$()",
        "n = self.$()",
        "n",
        above="def counter_$():\n    n = 0\n\n    def count():\n        nonlocal n\n        n += 1\n        return n\n"
        "\n    return count\n",
    ),
    _counter(
        "functools.partial",
        "self.$ = functools.partial(push_$, [])",
        "n = self.$(1)",
        "n",
        above="def push_$(kept, value):\n    kept.append(value)\n    return len(kept)\n",
    ),
    _counter(
        "default argument of a function",
        "",
        "n = remember_$(1)",
        "n",
        above="def remember_$(value, kept=[]):\n    kept.append(value)\n    return len(kept)\n",
    ),
    _counter(
        "default argument of a method",
        "",
        "n = self.remember_$(1)",
        "n",
        methods="def remember_$(self, value, kept=[]):\n    kept.append(value)\n    return len(kept)",
    ),
    _counter(
        "attribute of a function",
        "",
        "tick_$()",
        "tick_$.n",
        above="def tick_$():\n    tick_$.n += 1\n\n\ntick_$.n = 0\n",
    ),
    _counter(
        "bound method of a list", "kept = []\nself.$, self.kept_$ = kept.append, kept", "self.$(1)", "len(self.kept_$)"
    ),
    _counter(
        "lru_cache on a method",
        "self.n_$ = 0",
        "self.n_$ += 1",
        "self.table_$(self.n_$ % 3)",
        methods="@functools.lru_cache(maxsize=None)\ndef table_$(self, n):\n    return n",
    ),
    _counter(
        "cached function", "", "", "table_$(batch_idx)", above="@functools.cache\ndef table_$(n):\n    return n\n"
    ),
    _counter(
        "cached function that hands out a list",
        "",
        "kept_$().append(1)",
        "len(kept_$())",
        above="@functools.cache\ndef kept_$():\n    return []\n",
        exact=False,  # a replay calls the function anew, see docs/replay.md
    ),
    _counter(
        "cached_property",
        "",
        "self.kept_$.append(1)",
        "len(self.kept_$)",
        methods="@functools.cached_property\ndef kept_$(self):\n    return []",
    ),
]
