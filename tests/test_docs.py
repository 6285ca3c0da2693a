"""The pages of `docs` and the README: their programs run, their links lead somewhere, and nothing is missing."""

import ast
import contextlib
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning.training.callback import CurvatureCallback

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
_NOT_RUN = {"bash", "bibtex", "console", "text"}


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(PAGES[page]) if kind == language]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


# What the pages call the reader's own: a small classifier, its data and a checkpoint, and a Trainer that soon ends.


class YourModule(pl.LightningModule):
    def __init__(self, lr: float = 0.1, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.lr, self.optimizer = lr, optimizer
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return functional.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.lr)


class YourData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        inputs = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=8)


_TRAINER = pl.Trainer


def short_trainer(most: int) -> type[pl.Trainer]:
    """A Trainer that leaves out what the reader would see, and ends after so many steps."""

    class ShortTrainer(_TRAINER):
        def __init__(self, *, max_steps: int = most, **options: Any) -> None:
            quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
            super().__init__(max_steps=min(max_steps, most), **{**quiet, **options})

    return ShortTrainer


@pytest.fixture
def readers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", short_trainer(12))
    package = types.ModuleType("your_package")
    package.YourModule, package.YourData = YourModule, YourData
    monkeypatch.setitem(sys.modules, "your_package", package)
    monkeypatch.setattr(YourModule, "__module__", "your_package")
    monkeypatch.setattr(YourData, "__module__", "your_package")
    torch.manual_seed(0)
    module = YourModule()
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}
    torch.save(checkpoint, tmp_path / "your.ckpt")
    with warnings.catch_warnings():  # a page may set filters
        yield {
            "YourModule": YourModule,
            "your_lightning_module": module,
            "your_data": YourData(),
            "your_checkpoint": str(tmp_path / "your.ckpt"),
        }


@pytest.mark.parametrize("page", [page for page in pages_with("python") if not page.endswith("without_lightning.md")])
def test_programs_run(page: str, readers_own: dict[str, Any]) -> None:
    namespace = {"__name__": "page", **readers_own}
    for text in blocks(page, "python"):
        exec(compile(text, page, "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_configurations_are_understood(page: str, readers_own: dict[str, Any], tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        config = tmp_path / "config.yaml"
        config.write_text(text)
        arguments = ["--config", str(config), f"--trainer.default_root_dir={tmp_path}"]
        cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
        assert any(isinstance(callback, CurvatureCallback) for callback in cli.trainer.callbacks)


def test_every_block_says_what_it_is() -> None:
    unknown = {(page, kind) for page in PAGES for kind, _ in _BLOCK.findall(PAGES[page])}
    assert not {(page, kind) for page, kind in unknown if kind not in {"python", "yaml", *_NOT_RUN}}
    for page, text in PAGES.items():
        assert text.count("```") == 2 * len(_BLOCK.findall(text)), f"{page} has a block that is not found here."


def test_the_first_program_draws_a_curve(readers_own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program, other = (blocks(page, "python")[0] for page in ("README.md", "docs/index.md"))
    assert ast.dump(ast.parse(program)) == ast.dump(ast.parse(other))
    monkeypatch.setattr(pl, "Trainer", short_trainer(400))
    namespace = {"__name__": "page", **readers_own}
    exec(compile(program, "README.md", "exec"), namespace)
    measured = [result.step for result in namespace["probe"].results if result.stability_ratio is not None]
    assert len(measured) >= 20
    assert sum(step < 200 for step in measured) >= 6
    assert Path("sharpness.png").stat().st_size > 10_000
    assert Path("sharpness.svg").exists()


def test_the_recipe_for_the_name_of_a_checkpoint_makes_a_file_and_no_folder(readers_own: dict[str, Any]) -> None:
    (program,) = [block for block in blocks("docs/recipes.md", "python") if "auto_insert_metric_name" in block]
    names = "from lightning.pytorch import Trainer\nfrom lyapunov_lightning import CurvatureProbe\n"
    exec(names + program, dict(readers_own))  # a page's own program
    (file,) = Path("kept").iterdir()
    assert re.fullmatch(r"step=10-sharpness=\d+\.\d\d\.ckpt", file.name)


def test_the_recipe_for_the_flattest_weights_saves_those_that_were_measured(readers_own: dict[str, Any]) -> None:
    [recipe] = [text for text in blocks("docs/recipes.md", "python") if "KeepFlattest" in text]
    probe_and_fit = (
        "from lightning.pytorch import Trainer\nfrom lyapunov_lightning import CurvatureProbe, HessianConfig\n"
    )
    namespace = {"__name__": "page", **readers_own, "your_lightning_module": YourModule(lr=2.0)}
    exec(compile(probe_and_fit + recipe, "recipes", "exec"), namespace)
    found = [result.lambda_max for result in namespace["probe"].results]
    assert len(found) == 3
    flattest = YourModule()
    flattest.load_state_dict(torch.load("flattest.ckpt", weights_only=True)["state_dict"])
    again = namespace["CurvatureProbe"](
        every_n_steps=1, hessian=namespace["HessianConfig"](data="fixed", num_batches=2)
    )
    pl.Trainer(callbacks=[again], max_steps=1).fit(flattest, YourData())
    assert again.results[0].lambda_max == pytest.approx(
        min(found), rel=1e-2
    )  # each is known to 2 %, mostly to much less
    assert sorted(found)[1] > 1.03 * min(found)  # so that other weights would be seen


# Links


def _links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(_BLOCK, "", text))


def _anchors(text: str) -> set[str]:
    """The anchors of the headings as the site makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(_BLOCK, "", text), re.MULTILINE)
    named = {name for title in titles for name in re.findall(r"\{ #(\S+) \}$", title)}
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)) for title in titles]
    # The site leaves out what is not ASCII.
    return named | {re.sub(r"[-\s]+", "-", title.encode("ascii", "ignore").decode().strip().lower()) for title in plain}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_links_within_the_site_lead_somewhere(page: str) -> None:
    for link in _links(PAGES[page]):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page} links to {link}"
            if anchor:
                assert anchor in _anchors(target.read_text()), f"{page} links to {link}"


def test_links_of_the_readme_are_absolute_and_lead_somewhere() -> None:
    project = "lyapunov-lightning/lyapunov-lightning"
    places = {
        f"https://github.com/{project}/blob/main/": ROOT,
        f"https://github.com/{project}/tree/main/": ROOT,
        f"https://raw.githubusercontent.com/{project}/main/": ROOT,
        "https://lyapunov-lightning.github.io/lyapunov-lightning/": DOCS,
    }
    links = _links(PAGES["README.md"])
    assert len(links) >= 10
    for link in links:
        place = next((place for place in places if link.startswith(place)), None)
        if place is None:
            assert link.startswith("https://"), link
        else:
            path = places[place] / link.removeprefix(place).partition("#")[0].rstrip("/")
            assert path.exists() or path.with_suffix(".md").exists(), link


# Completeness


def _template(node: ast.expr) -> str:
    """A message of the source as it is written, with … for what it fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return "…"


def _messages() -> dict[str, str]:
    """What the package warns of, refuses, and fails with, by place."""
    told = {"warn_once": 1, "warn": 0, "MisconfigurationException": 0, "MeasurementError": 0, "ModuleNotFoundError": 0}
    told |= {"NonFiniteCurvatureError": 0, "RuntimeError": 0, "guarded": 1}
    found = {}
    for path in sorted((ROOT / "lyapunov_lightning").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in told and len(node.args) > told[name]:
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found[place] = " ".join(_template(node.args[told[name]]).replace("`", "").split())
    return found


_PUT_TOGETHER = {
    "lyapunov_lightning/callbacks/curvature_probe.py": [
        "the sharpness has been above the stability limit since step …"
    ],
    "lyapunov_lightning/curvature/loss/function_check.py": [
        "The backward pass of … is not the derivative of its forward pass",
        "The backward pass of … uses numbers that were kept from its forward pass",
    ],
    "lyapunov_lightning/curvature/loss/mean_loss.py": [
        "The loss reaches a parameter in a way that cannot be substituted"
    ],
    "lyapunov_lightning/training/callback.py": [
        "The fixed data of … are the … of this training, kept on the way, since …",
        "the training data are a …, of which only a single DataLoader can be read twice",
        "an IterableDataset, …, cannot be read a second time",
    ],
    "lyapunov_lightning/training/reporting/recording.py": [],  # hands on what the others say
    "lyapunov_lightning/training/reporting/telling.py": [],  # and so does this
}
"""What is said by messages whose text is not where they are raised, by the file in which they are."""


def _entries() -> list[str]:
    bold = re.findall(r"\*\*(.+?)\*\*", re.sub(_BLOCK, "", PAGES["docs/troubleshooting.md"]), re.DOTALL)
    return [" ".join(entry.replace("`", "").split()) for entry in bold]


def _is_about(entry: str, message: str) -> bool:
    # Part after part, and no regular expression: where one part is missing, that tries all places of all others.
    place = 0
    for part in entry.split("…"):
        found = message.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


def test_troubleshooting_has_every_message() -> None:
    messages, entries = _messages(), _entries()
    assert len(messages) >= 50
    put_together = {place for place, text in messages.items() if not re.search(r"\w", text)}
    assert {place.rpartition(":")[0] for place in put_together} == {*_PUT_TOGETHER}, "Where is their text?"
    missing = {
        place: text
        for place, text in messages.items()
        if place not in put_together and not any(_is_about(entry, text) for entry in entries)
    }
    assert not missing
    for path, told in _PUT_TOGETHER.items():
        assert all(any(text in entry for entry in entries) for text in told), path


def test_troubleshooting_has_no_other_messages() -> None:
    source = " ".join(
        " ".join(_template(node).replace("`", "").split())
        for path in sorted((ROOT / "lyapunov_lightning").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp))
    )
    assert not [entry for entry in _entries() if not _is_about(entry, source)]


def test_troubleshooting_notices_what_is_missing() -> None:
    assert _is_about("the group … matches no parameter", "…: the group … matches no parameter of …. Its are …")
    assert not _is_about("the group … matches no layer", "…: the group … matches no parameter of …. Its are …")


_TAG = re.compile(r"(curvature|spectrum|negative|scan|quasi_newton|nudge)(?:_details)?/(\w*[a-z0-9])")


def test_every_tag_is_on_its_page() -> None:
    owners = {
        "curvature": "curvature_probe",
        "spectrum": "spectrum_tracker",
        "negative": "negative_curvature_tracker",
        "scan": "loss_along_eigvec_scanner",
        "quasi_newton": "quasi_newton_lr_controller",
        "nudge": "nudged_sgd_hook",
    }
    sources = (ROOT / "lyapunov_lightning" / "callbacks" / "results").glob("*.py")
    tags = {tag for path in sources for tag in _TAG.findall(path.read_text())}
    assert len(tags) >= 60
    for group, name in sorted(tags):
        page = f"docs/callbacks/{owners[group]}.md"
        assert re.search(rf"\b{name}(_|\b)", PAGES[page]), f"{group}/{name} is not on {page}"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert {f"docs/{page}" for page in re.findall(r"(\S+\.md)$", menu, re.MULTILINE)} == {*PAGES} - {"README.md"}


# The page that is one program, and prints what it says


def assert_same_text(printed: str, stated: str) -> None:
    """The same words, and the same numbers to 2 % or one unit of the last digit shown."""
    words = ["".join(_NUMBER.sub("#", text).split()) for text in (printed, stated)]
    assert words[0] == words[1], f"{printed!r} is not {stated!r}"
    for found, expected in zip(_NUMBER.findall(printed), _NUMBER.findall(stated), strict=True):
        digits = len(expected.partition("e")[0].partition(".")[2])
        unit = 0.0 if "e" in expected else 1.01 * 10.0**-digits if digits else 0.0
        assert float(found) == pytest.approx(float(expected), rel=0.02, abs=unit), f"{printed!r} is not {stated!r}"


def test_the_comparison_of_texts_sees_words_and_numbers() -> None:
    assert_same_text("tensor([ 1.2345, -0.0101])\n3 of 7", "tensor([1.2344, -0.0100]) 3 of 7")
    for printed in ("tensor([1.2345, -0.0200]) 3 of 7", "tensor([1.2345, -0.0101]) 3 of 8", "1.2345, -0.0101 3 of 7"):
        with pytest.raises(AssertionError):
            assert_same_text(printed, "tensor([1.2344, -0.0100]) 3 of 7")


def test_without_lightning_runs_and_prints_what_it_says() -> None:
    page = "docs/without_lightning.md"
    namespace: dict[str, object] = {"__name__": "without_lightning"}
    printed = ""
    num_compared = 0
    for language, text in [*_BLOCK.findall(PAGES[page]), ("python", "")]:
        if language == "text":
            assert_same_text(printed, text)
            num_compared += 1
            printed = ""
        elif language == "python":
            assert not printed, f"The page does not say that it prints {printed!r}."
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(text, page, "exec"), namespace)
            printed = stream.getvalue()
    assert num_compared >= 8
