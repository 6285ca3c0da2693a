"""What there is to run: one experiment for each figure or table, read from YAML.

``figures/NAME.yaml`` says which runs there are, what the paper claims, and which number decides it. A run is put
together from ``parts``, pieces of a configuration as ``lyapunov-lightning fit`` takes them. They hold the paper's own
setting; what they put under ``small`` replaces values of it at that scale, and what they put under ``medium`` those of
``small``. Where nothing is under ``medium``, it is the same as ``small``.
"""

import copy
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

Scale = Literal["small", "medium", "full"]
"""What everybody can run in minutes, what it takes for a claim to come out, and the paper's own."""
Config = dict[str, Any]
"""What ``lyapunov-lightning fit --config`` takes."""

PAPERS = {
    "chaos": "A chaos theory approach to understand neural network optimization",
    "negative": "Negative eigenvalues of the Hessian in deep neural networks",
    "sharpest": "On the relation between the sharpest directions of DNN loss and the SGD step length",
    "edge": "Beside the three papers: the edge of stochastic stability",
}
"""By the first word of an experiment's name. The last are further experiments, of a question that came after them."""

HERE = Path(__file__).parent

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""To load all experiments is to read a thousand small files, in Python alone in seven times the time."""

_REPLACED_BY: dict[Scale, tuple[str, ...]] = {"small": ("small",), "medium": ("small", "medium"), "full": ()}
"""What replaces the paper's own values at each scale, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that a paper says, and what decides whether it is so.

    Args:
        claim: It, in one line.
        quantity: What is measured, in words.
        measure: The function that measures it, of the paper's module: records of one seed by name of the run ->
            numbers by name, None where the run cannot tell.
        options: Keyword arguments for it.
        above, below: The thresholds: numbers between them speak for the claim.
        share: Which share of the numbers has to lie there.

    """

    claim: str
    quantity: str
    measure: str
    options: Mapping[str, Any] = field(default_factory=dict)
    above: float | None = None
    below: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError(f"The claim {self.claim!r} has no threshold: give `above`, `below` or both.")
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` should be in (0, 1], got {self.share}.")

    @property
    def threshold(self) -> str:
        """The thresholds in words."""
        if self.above is None:
            words = f"below {self.below:g}"
        elif self.below is None:
            words = f"above {self.above:g}"
        else:
            words = f"{self.above:g} to {self.below:g}"
        return words if self.share == 1 else f"{words}, in {self.share:.0%}"


@dataclass(frozen=True)
class Run:
    """One training: a configuration and a seed."""

    config: Config
    seed: int

    @cached_property
    def key(self) -> str:
        """The same for the same training, whichever figures need it."""
        text = json.dumps([self.config, self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A figure or a table.

    Args:
        name: The paper and the place in it, such as ``chaos-fig4``.
        title: What it is about.
        source: Where it stands in the paper.
        about: What the paper shows, and what is different here.
        runs: Configurations by name.
        claims: What the paper concludes.
        draw: The function that draws it, of the paper's module: records of all seeds by name of the run -> picture.
        draw_options: Keyword arguments for it.
        seeds: Every run is made with each of them.

    """

    name: str
    title: str
    source: str
    about: str
    runs: Mapping[str, Config]
    claims: Sequence[Claim]
    draw: str
    draw_options: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1)

    @property
    def paper(self) -> str:
        """Which of the papers."""
        return self.name.split("-")[0]

    def function(self, name: str) -> Callable[..., Any]:
        """A measure or a drawing of this paper."""
        module: ModuleType = importlib.import_module(f"examples.papers.{self.paper}")
        return getattr(module, name)  # type: ignore[no-any-return]

    @cached_property
    def all_runs(self) -> dict[tuple[str, int], Run]:
        """Its runs, by name and seed."""
        return {(name, seed): Run(config, seed) for name, config in self.runs.items() for seed in self.seeds}


def names() -> list[str]:
    """All experiments, in the order of the papers and their figures."""
    found = [path.stem for path in (HERE / "figures").glob("*.yaml")]
    return sorted(found, key=_place)


def has_own_setting(name: str, scale: Scale) -> bool:
    """Whether an experiment is another one at this scale than at the small one."""
    return scale == "small" or load(name, scale).runs != load(name, "small").runs


def load(name: str, scale: Scale) -> Experiment:
    """Read an experiment.

    Args:
        name: One of `names`.
        scale: ``"small"``, ``"medium"``, or ``"full"``: the paper's own setting.

    Raises:
        FileNotFoundError: If there is no such experiment, or it names a part that is not there.
        ValueError: If a claim has no threshold.

    """
    content = _read(HERE / "figures" / f"{name}.yaml")
    last = [{"medium": content.pop("medium", {})}]
    content["runs"] = {run: _config([*items, *last], scale) for run, items in content["runs"].items()}
    content["claims"] = [Claim(**claim) for claim in content["claims"]]
    return Experiment(name=name, **content)


def _config(items: Sequence[str | Mapping[str, Any]], scale: Scale) -> Config:
    """A configuration, put together from names of parts and mappings of dotted keys."""
    config: Config = {}
    for item in ["base", *items]:
        if isinstance(item, str):
            part = _read(HERE / "parts" / f"{item}.yaml")
            scaled = {name: part.pop(name, {}) for name in ("small", "medium")}
            _merge(config, part)
        else:
            scaled = {name: item.get(name, {}) for name in ("small", "medium")}
            _set(config, {key: value for key, value in item.items() if key not in scaled})
        for name in _REPLACED_BY[scale]:
            _set(config, scaled[name])
    return config


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    return content


def _merge(config: Config, part: Mapping[str, Any], place: str = "") -> None:
    """Add what a part says: mappings deep, callbacks after those that are there, everything else in its place."""
    for name, value in part.items():
        there = config.get(name)
        if isinstance(value, Mapping) and isinstance(there, dict):
            _merge(there, value, f"{place}{name}.")
        elif f"{place}{name}" == "trainer.callbacks" and there is not None:
            there.extend(copy.deepcopy(value))
        else:
            config[name] = copy.deepcopy(value)


def _set(config: Config, values: Mapping[str, Any]) -> None:
    """Set values by their dotted keys, such as ``trainer.callbacks.0.init_args.largest``."""
    for key, value in values.items():
        *path, last = key.split(".")
        place: Any = config
        for name in path:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[int(last) if isinstance(place, list) else last] = copy.deepcopy(value)


def _place(name: str) -> tuple[int, int, int, str]:
    """For sorting: the papers in their order, figures before tables, and figure 10 after figure 9."""
    paper, _, place = name.partition("-")
    kind = place.rstrip("0123456789")
    number = int(place.removeprefix(kind) or 0)
    kinds = ("fig", "table")
    return list(PAPERS).index(paper), kinds.index(kind) if kind in kinds else len(kinds), number, kind
