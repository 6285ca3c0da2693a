"""State in objects that are hard to copy, in what refers to parameters, and in what the interpreter keeps."""

from tests.generator.ingredients import State, tags
from tests.generator.state import _BOX, _counter, _scaled

_PROXY = """
class Proxy_$:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)
"""

_HIDING = """
class Hiding_$:
    def __init__(self):
        self.n = 0

    def __getstate__(self):
        return {}
"""

_REFUSING = """
class Refusing_$:
    def __init__(self):
        self.n = 0

    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")

    def __reduce_ex__(self, protocol):
        raise TypeError("not to be pickled")
"""

_EQUAL = """
class Equal_$:
    def __init__(self):
        self.n = torch.zeros(2)

    def __eq__(self, other):
        return self.n == other.n

    def __bool__(self):
        raise TypeError("neither true nor false")

    __hash__ = None
"""

_DESCRIPTOR = """
class Kept_$:
    def __init__(self):
        self.values = weakref.WeakKeyDictionary()

    def __get__(self, owner, kind):
        return self if owner is None else self.values.get(owner, 0)

    def __set__(self, owner, value):
        self.values[owner] = value
"""

_OTHER_FILE = """
helpers_$ = types.ModuleType("helpers_$")
exec("N = 0\\n\\ndef tick():\\n    global N\\n    N += 1\\n", vars(helpers_$))
"""

_LIBRARY = """
import sys, sysconfig

library_$ = types.ModuleType("library_$")
library_$.__file__ = sysconfig.get_path("purelib") + "/library_$.py"  # as if it were installed
sys.modules["library_$"] = library_$
exec("STORE, LIST, KEYED = {}, [], __import__('weakref').WeakKeyDictionary()", vars(library_$))
"""

OBJECTS = [
    _counter(
        "object that forwards attributes",
        "self.$ = Proxy_$(Box_$(n=0))",
        "self.$.inner.n += 1",
        "self.$.n",
        above=_BOX + _PROXY,
        excludes=tags("deepcopy"),
    ),
    _counter("object whose state hides everything", "self.$ = Hiding_$()", "self.$.n += 1", "self.$.n", above=_HIDING),
    _counter(
        "object that refuses to be copied",
        "self.$ = Refusing_$()",
        "self.$.n += 1",
        "self.$.n",
        above=_REFUSING,
        excludes=tags("deepcopy"),
    ),
    _counter(
        "object that compares as a tensor",
        "self.$ = [Equal_$()]",
        "self.$[0].n += 1",
        "self.$[0].n.mean()",
        above=_EQUAL,
    ),
    _counter(
        "frozen dataclass around a list",
        "self.$ = Frozen_$([])",
        "self.$.kept.append(1)",
        "len(self.$.kept)",
        above="@dataclasses.dataclass(frozen=True)\nclass Frozen_$:\n    kept: list\n",
    ),
    _counter(
        "descriptor with weak references",
        "",
        "self.n_$ += 1",
        "self.n_$",
        above=_DESCRIPTOR,
        methods="n_$ = Kept_$()",
        excludes=tags("deepcopy"),
    ),
    _counter("bytearray", "self.$ = bytearray(2)", "self.$[0] += 1", "self.$[0]"),
    _counter("array of Python's", "self.$ = array.array('d', [0.0])", "self.$[0] += 1", "self.$[0]"),
    _counter(
        "memoryview",
        "self.array_$ = np.zeros(2)\nself.$ = memoryview(self.array_$)",
        "self.$[0] += 1",
        "float(self.array_$[0])",
        excludes=tags("deepcopy"),
    ),
    _counter(
        "OrderedDict in another order",
        "self.$ = collections.OrderedDict(a=0, b=1)",
        "self.$.move_to_end(next(iter(self.$)))",
        "next(iter(self.$.values()))",
    ),
    _counter("ChainMap", "self.$ = collections.ChainMap({}, {'n': 0})", "self.$['n'] = self.$['n'] + 1", "self.$['n']"),
    _counter(
        "view of a dict",
        "self.kept_$ = {}\nself.$ = self.kept_$.values()",
        "self.kept_$[len(self.kept_$)] = 1",
        "len(self.$)",
        excludes=tags("deepcopy"),
    ),
    _counter(
        "thread-local object",
        "self.$ = threading.local()\nself.$.n = 0",
        "self.$.n += 1",
        "self.$.n",
        excludes=tags("deepcopy"),
    ),
    _counter("StringIO", "self.$ = io.StringIO()", "self.$.write('x')", "len(self.$.getvalue())"),
    _counter(
        "context variable",
        "self.$ = contextvars.ContextVar('n', default=0)",
        "self.$.set(self.$.get() + 1)",
        "self.$.get()",
        excludes=tags("deepcopy"),
        measurable=False,
    ),
    _counter(
        "global generator of NumPy", "", "n = RNG_$.uniform(0, 5)", "n", above="RNG_$ = np.random.default_rng(1)\n"
    ),
    _counter("global of another file of the user's", "", "helpers_$.tick()", "helpers_$.N", above=_OTHER_FILE),
    _counter(
        "class attribute of a base class",
        "",
        "Base_$.n += 1",
        "Child_$.n",
        above="class Base_$:\n    n = 0\n\n\nclass Child_$(Base_$):\n    pass\n",
    ),
    _counter("class-level tensor", "", "self.mean_$.add_(1)", "self.mean_$.mean()", methods="mean_$ = torch.zeros(2)"),
    _counter(
        "own scheduler of a temperature",
        "self.w_$ = nn.Parameter(torch.zeros(1), requires_grad=False)\nself.o_$ = torch.optim.SGD([self.w_$], lr=1.0)\n"
        "self.$ = torch.optim.lr_scheduler.ExponentialLR(self.o_$, 0.7)",
        "self.$.step()",
        "self.o_$.param_groups[0]['lr']",
    ),
    _counter(
        "loader that is iterated anew",
        "self.$ = DataLoader(TensorDataset(torch.rand(8, 2)), 4, shuffle=True)",
        "z = next(iter(self.$))[0]",
        "z.square().mean()",
    ),
]

REFERENCES = [
    _counter(
        "dict keyed by parameters",
        "self.$ = {p: torch.zeros_like(p) for p in self.net.parameters()}",
        "for p in self.net.parameters():\n    self.$[p] += p.detach().abs()",
        "sum(v.mean() for v in self.$.values())",
        excludes=tags("lazy"),
    ),
    _counter(
        "dict keyed by id",
        "self.$ = {id(p): 0 for p in self.net.parameters()}",
        "for p in self.net.parameters():\n    self.$[id(p)] += 1",
        "max(self.$.values())",
        excludes=tags("lazy", "deepcopy net"),
        measurable=False,
    ),
    State(
        "list of parameters",
        "loss = loss + 0.1 * sum(p.square().sum() for p in self.$)",
        "self.$ = list(self.net.last.parameters())",
    ),
    State(
        "view of a parameter",
        "loss = loss + 0.1 * self.$.square().square().sum()",
        "self.$ = self.net.last.weight.view(-1)",
        excludes=tags("deepcopy", "precision"),
    ),
    State("alias of a parameter's memory", _scaled("self.$.square().mean()"), "self.$ = self.net.last.weight.detach()"),
    State(
        "closure over a parameter",
        "loss = loss + 0.1 * self.$().square().square().sum()",
        "weight = self.net.last.weight\nself.$ = lambda: weight",
        excludes=tags("deepcopy"),
    ),
    State(
        "partial over a parameter",
        "loss = loss + 0.1 * self.$().square()",
        "self.$ = functools.partial(torch.linalg.norm, self.net.last.weight)",
    ),
    State(
        "bound method of a layer",
        "loss = loss + 0.1 * self.$(torch.tanh(x)).square().mean()",
        "self.$ = self.net.last.forward",
    ),
    State(
        "weak proxy of the network",
        "loss = loss + 0.1 * self.$[0].last.weight.square().square().sum()",
        "self.$ = [weakref.proxy(self.net)]",
        excludes=tags("deepcopy"),
    ),
    State(
        "parameter outside of the modules",
        "loss = loss + 0.1 * (self.$[0] * out).square().mean()",
        "self.$ = [nn.Parameter(torch.ones(2))]",
    ),
]

LIBRARIES = [
    _counter(
        "object in a dictionary of a library",
        "self.$ = Box_$(n=0)",
        "library_$.STORE.setdefault('box', self.$).n += 1",
        "library_$.STORE['box'].n",
        above=_BOX + _LIBRARY,
        slow=True,
    ),
    _counter(
        "objects in a list of a library",
        "self.$ = Box_$(n=0)",
        "library_$.LIST.append((self.$, self.log))\nself.$.n += 1",
        "library_$.LIST[0][0].n + len(library_$.LIST)",
        above=_BOX + _LIBRARY,
        slow=True,
        excludes=tags("deepcopy"),
    ),
    _counter(
        "objects in a list that the step makes in a library",
        "self.$ = Box_$(n=0)",
        "library_$.STORE.setdefault('boxes', []).append(self.$)\nself.$.n += 1",
        "len(library_$.STORE['boxes'])",
        above=_BOX + _LIBRARY,
        slow=True,
    ),
    _counter(
        "object handed to a library in a later step",
        "self.$ = Box_$(n=0)",
        "if self.global_step == 2:\n    library_$.LIST.append(self.$)\nself.$.n += 1",
        "(self.$.n + len(library_$.LIST))",
        above=_BOX + _LIBRARY,
        slow=True,
    ),
    _counter(
        "state of a library by a weak key",
        "self.$ = Box_$(n=0)",
        "library_$.KEYED[self.$] = library_$.KEYED.get(self.$, 0) + 1",
        "library_$.KEYED[self.$]",
        above=_BOX + _LIBRARY,
        slow=True,
    ),
    State(
        "parameter in the store of a library",
        "loss = loss + 0.1 * (library_$.STORE.setdefault('w', self.$) * out).square().mean()",
        "self.$ = nn.Parameter(torch.ones(2))",
        above=_LIBRARY,
        slow=True,
    ),
]
"""What a step hands to an installed package that keeps it. Slow, since the first replay looks for who holds it."""
