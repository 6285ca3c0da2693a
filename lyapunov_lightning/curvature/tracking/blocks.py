"""Diagonal blocks of a Hessian: which parameters each consists of, and its largest eigenvalue during a training.

A block is the Hessian with respect to its own parameters only, so its largest eigenvalue is at most that of the whole.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker

Groups: TypeAlias = Literal["modules", "layers"] | int | Mapping[str, str] | None
"""How parameters form blocks, see `parameter_blocks`."""


def parameter_blocks(names: Iterable[str], groups: Groups) -> dict[str, list[str]]:
    """The names of the parameters of each block.

    Args:
        names: The names of all parameters, with dots between the modules.
        groups: ``"layers"`` for one block for each module that has parameters of its own, such as weight and bias;
            ``"modules"`` for one for each top-level module; a number for one for each module at that depth, where 1 is
            ``"modules"``; names of blocks, each with a pattern of parameter names; or None for no blocks. A parameter
            that lies in no module is a block by itself.

    Returns:
        The names by block; an empty list for a pattern that matches none.

    Example::

        >>> from lyapunov_lightning.curvature.tracking.blocks import parameter_blocks
        >>> names = ["net.0.weight", "net.0.bias", "head.weight"]
        >>> parameter_blocks(names, "modules")
        {'net': ['net.0.weight', 'net.0.bias'], 'head': ['head.weight']}
        >>> parameter_blocks(names, "layers")
        {'net.0': ['net.0.weight', 'net.0.bias'], 'head': ['head.weight']}
        >>> parameter_blocks(names, {"weights": "*.weight"})
        {'weights': ['net.0.weight', 'head.weight']}

    """
    names = list(names)
    if groups is None:
        return {}
    if not isinstance(groups, Mapping):
        depth = {"modules": 1, "layers": None}[groups] if isinstance(groups, str) else groups
        blocks: dict[str, list[str]] = {}
        for name in names:
            modules = name.split(".")[:-1]
            blocks.setdefault(".".join(modules[:depth]) or name, []).append(name)
        return blocks
    return {block: [name for name in names if fnmatchcase(name, pattern)] for block, pattern in groups.items()}


def check_groups(groups: Any) -> None:
    """Make sure that they are what `parameter_blocks` takes.

    Raises:
        ValueError: If they are not.

    """
    if groups is None or isinstance(groups, Mapping) or groups in ("modules", "layers"):
        return
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(
            "`groups` should be 'layers', 'modules', the depth of the modules, or a dict of names and patterns, got"
            f" {groups!r}."
        )


class BlockTrackers:
    """The largest eigenvalues of several blocks, each tracked with a start of its own.

    Args:
        tol: Relative tolerance of the residuals.
        seed: Seed of the first vectors.

    """

    def __init__(self, tol: float, seed: int = 0) -> None:
        self._tol = tol
        self._seed = seed
        self._trackers: dict[str, ExtremeTracker] = {}

    def measure(self, block: str, operator: LinearOperator) -> Eigenpairs:
        """The largest eigenpair of a block at present."""
        return self._tracker(block).measure(operator)

    def state_dict(self) -> dict[str, Any]:
        """The state of each tracker, by block."""
        return {block: tracker.state_dict() for block, tracker in self._trackers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._trackers = {}
        for block, tracker_state in state.items():
            self._tracker(block).load_state_dict(tracker_state)

    def _tracker(self, block: str) -> ExtremeTracker:
        # Made at first use, since a state is loaded before the module, and so its blocks, are known.
        return self._trackers.setdefault(block, ExtremeTracker("lanczos", "largest", self._tol, self._seed))
