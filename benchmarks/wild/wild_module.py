"""What is known of a module of other people."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WildModule:
    """A module of another package.

    Attributes:
        package: Where it comes from, under its name in the package index.
        name: What it is called in the table.
        build: Makes the module, and what its trainer is to be fitted on.
        library: The name under which the package imports Lightning.

    """

    package: str
    name: str
    build: Callable[[], tuple[Any, Any]]
    library: str = "lightning.pytorch"
