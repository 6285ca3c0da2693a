"""What a generated module is put together from: named pieces of source text.

A case is a file of Python as a user would write it. Each ingredient contributes some lines to it, in which ``$`` stands
for a name that is the ingredient's own in this file, so that the same ingredient can be there twice.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ingredient:
    """A piece of a user's file.

    Attributes:
        name: How a case's description calls it.
        above: Lines at the file's top level.
        excludes: No two ingredients of a case share one of these tags.
        needs: Tags that some other ingredient of the case must provide.
        provides: Tags that others may need.
        measurable: ``False`` if a callback may refuse it before training, or warn and measure nothing.
        exact: ``False`` if the dense Hessian of the step's own loss is not what is to be measured.
        slow: Left out of the suite.
        reference: Text to replace, and what by, where the dense Hessian is computed.

    """

    name: str
    above: str = field(default="", kw_only=True)
    excludes: frozenset[str] = field(default=frozenset(), kw_only=True)
    needs: frozenset[str] = field(default=frozenset(), kw_only=True)
    provides: frozenset[str] = field(default=frozenset(), kw_only=True)
    measurable: bool = field(default=True, kw_only=True)
    exact: bool = field(default=True, kw_only=True)
    slow: bool = field(default=False, kw_only=True)
    reference: tuple[str, str] = field(default=("", ""), kw_only=True)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Layer(Ingredient):
    """A part of the network that maps `h`, of four columns, to `h` of the same shape.

    Attributes:
        forward: Lines of the network's ``forward``.
        init: Lines of the network's ``__init__``.
        after: Lines of the module's ``__init__`` once the network is there.

    """

    forward: str
    init: str = ""
    after: str = ""


@dataclass(frozen=True)
class State(Ingredient):
    """Something that a step keeps from one call to the next, or does beside computing a loss.

    Attributes:
        step: Lines of the step that see `x`, `y`, `out` and `loss`, and usually change `loss`.
        init: Lines of the module's ``__init__``.
        before: Lines of the step before the network is called, which may change `x`.
        methods: Further methods of the module.

    """

    step: str = ""
    init: str = ""
    before: str = ""
    methods: str = ""


@dataclass(frozen=True)
class Batch(Ingredient):
    """A kind of batch.

    Attributes:
        pack: What the collate function returns, from `x` and `y`; empty for PyTorch's own function.
        unpack: Lines that make `x` and `y` of `batch`.

    """

    pack: str = ""
    unpack: str = "x, y = batch"


@dataclass(frozen=True)
class Loader(Ingredient):
    """A way to the data.

    Attributes:
        build: Lines that return the loader; `POINTS` stands for the dataset, `COLLATE` for arguments of a DataLoader.
        dataset: Class of the dataset.
        unpack: Lines of the step that make `x` and `y` of `batch`.

    """

    build: str = "return DataLoader(POINTS, 6, shuffle=True, COLLATE)"
    dataset: str = "Points()"
    unpack: str = "x, y = unpack(batch)"


@dataclass(frozen=True)
class Optimizer(Ingredient):
    """An optimizer with its schedule.

    Attributes:
        build: Expression of the optimizer over `parameters`.
        scheduler: Expression of the scheduler over `optimizer`, or of a whole scheduler configuration.

    """

    build: str = "torch.optim.SGD(parameters, lr=0.1)"
    scheduler: str = ""


@dataclass(frozen=True)
class Option(Ingredient):
    """Settings of the trainer, or a callback of the user's own beside ours.

    Attributes:
        settings: Arguments of the Trainer.
        callback: Expression of a callback.

    """

    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    callback: str = ""


def tags(*names: str) -> frozenset[str]:
    """A set of tags, shorter to write."""
    return frozenset(names)
