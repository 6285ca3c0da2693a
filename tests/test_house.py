"""The structure of the package, read from its sources: floors, rooms, public paths, and a test for each module."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lyapunov_lightning"

FLOORS = (
    ("curvature/errors", "curvature/arguments", "curvature/diagnosis"),
    ("curvature/compat", "curvature/vectors"),
    ("curvature/linear",),
    ("curvature/loss", "curvature/solvers", "curvature/stability"),
    ("curvature/operators", "curvature/stochastic", "curvature/acting"),
    ("curvature/directions", "curvature/sharded"),
    ("curvature/tracking",),
    ("curvature",),
    ("figures", "training/lightning_names", "training/results"),
    ("training/distributed", "training/agreement", "callbacks/results"),
    ("training/spacing", "training/fsdp"),
    ("training/schedule",),
    ("training/config",),
    ("training/replica", "training/reporting"),
    ("training/checks", "training/data", "training/sharded"),
    ("training/operators",),
    ("training/sharing",),
    ("training/optimizers",),
    ("training",),
    ("callbacks/gauges",),
    ("callbacks/estimators", "callbacks/rules"),
    ("callbacks",),
    ("spectrum_result", "kept_search"),
    ("search_under_way",),
    ("one_shot",),
    ("",),
    ("cli",),
    ("__main__",),
)
"""From the ground up: what a room, or a module that is its own room, may import stands below it. The name of a folder
stands for what of it is not listed; those on one floor do not import each other."""

MOST = 12
"""Modules in a room, without its ``__init__``."""

NO_ROOMS = {
    "": "loads each public name when it is first asked for",
    "cli": "is what the console script calls, and loads Lightning when a command needs it",
    "_examples": "is empty: the wheel has the examples in its place",
}
"""Folders whose ``__init__`` is not that of a room, and why."""


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its path below the package without suffix."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in paths}


def module_of(dotted: str) -> str | None:
    """The module of the package that a dotted name is, or is in; None for those of others."""
    first, *parts = dotted.split(".")
    if first != PACKAGE.name:
        return None
    for end in range(len(parts), -1, -1):
        path = "/".join(parts[:end])
        for candidate in (path, f"{path}/__init__".lstrip("/")):
            if candidate in sources():
                return candidate
    raise AssertionError(f"{dotted} is imported and does not exist")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported, wherever in the file and whether or not for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def arrows() -> dict[str, frozenset[str]]:
    """Which modules of the package each module imports."""
    found = {}
    for module, tree in sources().items():
        targets = {module_of(name) for name in imported(tree)} - {None, module}
        found[module] = frozenset(targets)
    return found


def room_of(module: str) -> str:
    """The entry of `FLOORS` to which a module belongs."""
    listed = {room for floor in FLOORS for room in floor}
    parts = module.removesuffix("__init__").strip("/").split("/")
    return next(room for end in range(len(parts), -1, -1) if (room := "/".join(parts[:end])) in listed)


def circle(graph: dict[str, frozenset[str]]) -> list[str]:
    """A way along the arrows back to where it begins, if there is one."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := walk(target, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def rooms() -> dict[str, list[str]]:
    """The modules of each folder."""
    folders = [module.removesuffix("__init__").rstrip("/") for module in sources() if module.endswith("__init__")]
    return {
        folder: [m for m in sources() if not m.endswith("__init__") and m.rpartition("/")[0] == folder]
        for folder in folders
    }


# Arrows.


def test_a_circle_is_noticed():
    assert circle({"a": frozenset("b"), "b": frozenset("cd"), "c": frozenset(), "d": frozenset("a")}) == list("abda")
    assert not circle({"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()})


def test_no_import_of_files_goes_in_a_circle():
    assert not circle(arrows())


def test_no_import_of_rooms_goes_in_a_circle_or_to_a_higher_floor():
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = {
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if room_of(module) != room_of(target) and level[room_of(target)] >= level[room_of(module)]
    }
    assert not wrong


def test_every_floor_has_what_stands_on_it():
    missing = {room for floor in FLOORS for room in floor} - {room_of(module) for module in sources()}
    assert missing <= {"callbacks/estimators", "callbacks/rules"}


def test_the_core_knows_nothing_of_lightning():
    for module, tree in sources().items():
        if module.startswith("curvature"):
            names = {name.split(".")[0] for name in imported(tree)}
            assert not names & {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}, module
    program = (
        "import sys, pkgutil, importlib, lyapunov_lightning.curvature as core\n"
        "for found in pkgutil.walk_packages(core.__path__, core.__name__ + '.'): importlib.import_module(found.name)\n"
        "print([name for name in sys.modules if name.startswith(('lightning', 'pytorch_lightning', 'scipy'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Rooms.


@pytest.mark.parametrize("folder", [folder for folder in rooms() if folder not in NO_ROOMS])
def test_a_room_is_small_and_says_what_lives_in_it(folder):
    assert len(rooms()[folder]) <= MOST
    tree = sources()[f"{folder}/__init__"]
    docstring = ast.get_docstring(tree) or ""
    assert len(re.findall(r"\.(?:\s|$)", docstring)) >= 2, "says in a few sentences what lives here and what may not"
    for node in tree.body[1:]:
        assert is_list_of_contents(node), f"line {node.lineno} is code"


def is_list_of_contents(node: ast.stmt) -> bool:
    """Whether a statement re-exports a name, says what is exported, or is a table of what the room holds, by name."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith(PACKAGE.name) or node.module == "typing"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # the docstring of a table
    if isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]:
        return True
    names = isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and node.value.value.id == "Literal"
    return names or (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict))


# Public paths.

PUBLIC = {
    "": "CurvatureProbe HessianConfig LossAlongEigvecScanner NegativeCurvatureTracker NudgedSGDHook"
    " QuasiNewtonLRController Schedule SpectrumTracker measure",
    "callbacks": "CurvatureProbe LossAlongEigvecScanner NegativeCurvatureTracker NudgedSGDHook QuasiNewtonLRController"
    " SpectrumTracker",
    "callbacks.negative_curvature_tracker": "Descent",
    "callbacks.results": "LearningRateResult NegativeResult NudgeResult ProbeResult ScanResult TrackedSpectrum",
    "curvature": "CurvatureWarning Eigenpairs EmpiricalFisherOperator Estimate GaussNewtonOperator HessianOperator"
    " LineScan LineSearch LinearOperator LyapunovEstimate LyapunovIteration LyapunovSpectrum"
    " LyapunovSpectrumEstimate MeasurementError Moments NonFiniteCurvatureError OnlineEigenpair"
    " OnlineEstimate OperatorCheck PeerFailureError QuadraticFit SpectralDensity SymmetricOperator Window"
    " check_operator conjugate_gradient first_minimum lanczos power_iteration quadratic_fit scan_line spectral_density"
    " stochastic_moments",
    "curvature.diagnosis": "Diagnosis Reading diagnose loss_spikes",
    "curvature.errors": "CurvatureWarning MeasurementError NonFiniteCurvatureError",
    "curvature.solvers": "InverseProduct NonPositiveDirection conjugate_gradient",
    "curvature.stability": "Stability stability_of",
    "curvature.tracking": "ExtremeTracker",
    "figures": "Picture alignment_figure blocks_figure curvature_fit_figure density_figure eigenvalues_figure"
    " expected_change_figure frozen_figure improvement_figure learning_rate_figure loss_profiles_figure"
    " loss_surface_figure negative_figure optimal_step_figure plane_contour_figure plane_surface_figure"
    " sharpness_figure spectrum_overview_figure"
    " stability_ratio_figure subspace_figure",
    "training.callback": "CurvatureCallback",
    "training.config": "HessianConfig Schedule",
    "training.results": "Result",
}
"""What users import, by module."""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_paths_lead_somewhere(module):
    there = import_module(".".join(filter(None, [PACKAGE.name, module])))
    for name in [*PUBLIC[module].split(), *getattr(there, "__all__", [])]:
        assert hasattr(there, name), name


# Dependencies.


def packages_in(node: ast.AST, *, at_once: bool) -> Iterator[str]:
    """The packages that a module imports: with itself, or at any time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and not child.level:
            yield (child.module or "").partition(".")[0]
        elif isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from packages_in(ast.Module(child.orelse, []), at_once=at_once)
        elif not (at_once and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from packages_in(child, at_once=at_once)


def foreign(*, at_once: bool, without: str = "?") -> set[str]:
    """The packages of others that are imported, by the names under which they are installed."""
    names: set[str] = set()
    for module, tree in sources().items():
        if not module.startswith(without):
            names |= set(packages_in(tree, at_once=at_once)) - {PACKAGE.name, *sys.stdlib_module_names}
    return {{"PIL": "pillow"}.get(name, name).replace("_", "-") for name in names}


def test_what_is_imported_is_declared_and_one_name_of_lightning_is_enough():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def declared(section: str, option: str) -> set[str]:
        return {name.replace("_", "-") for name in re.findall(r"^[\w-]+", setup[section][option], re.MULTILINE)}

    required = declared("options", "install_requires")
    assert "lightning-utilities" in required  # of which `lightning_names` asks `sys.modules`
    assert {"lightning", "pytorch-lightning"} & required == {"lightning"}
    assert not foreign(at_once=True, without="cli/") - required
    extras = set().union(*(declared("options.extras_require", name) for name in ("cli", "vectors", "test")))
    assert not foreign(at_once=False) - required - extras - {"lightning-fabric"}  # a part of both names


# Tests.


@cache
def rows_of_the_table() -> dict[str, list[str]]:
    """The table of CONTRIBUTING.md: the files that test a module without a test file of its name."""
    rows = re.findall(r"^\| `(\S+?)\.py` \| (`tests/.+`) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {module: re.findall(r"`(\S+?)`", files) for module, files in rows}


def own_test(module: str) -> Path:
    folder, _, name = module.rpartition("/")
    return ROOT / "tests" / folder / f"test_{name}.py"


@pytest.mark.parametrize("module", [module for module in sources() if not module.endswith("__init__")])
def test_a_module_has_a_test_file_of_its_name_or_is_in_the_table(module):
    listed = rows_of_the_table().get(module, [])
    assert own_test(module).exists() != bool(listed), "a test file of its name, or a row in CONTRIBUTING.md; not both"
    for file in listed:
        assert (ROOT / file).exists(), file


def test_the_table_lists_no_other_modules():
    assert len(rows_of_the_table()) >= 10
    assert not {*rows_of_the_table()} - {*sources()}
