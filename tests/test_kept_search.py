"""A measurement that is interrupted gives what it has, and goes on from its file to the same values."""

import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig, SpectrumResult, kept_search, measure, one_shot
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.replica.objective import TrainingObjective
from tests.modules import dense_hessian, regression_data, regression_loader

WANTED: dict[str, Any] = {"largest": 3, "smallest": 2}


class Wide(pl.LightningModule):
    """Of 242 parameters, so that no basis spans the space."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Evaluations:
    """Counts the evaluations of the loss, and sends this process a signal at one of them.

    Not in the module, of which every evaluation has a copy.

    """

    def __init__(self) -> None:
        self.count, self.at, self.number = 0, math.inf, signal.SIGINT
        self._evaluated = TrainingObjective.evaluated
        # No graphs are kept, and the search is written before every product.
        HessianOperator.__init__.__kwdefaults__["max_graph_bytes"] = 0
        kept_search._EVERY_SECONDS, kept_search._SHARE_OF_TIME = 0.0, 1e9
        TrainingObjective.evaluated = lambda *args, **options: self._noted(*args, **options)

    def _noted(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
        return self._evaluated(*args, **options)

    def stop(self, product: int, number: int = signal.SIGINT) -> None:
        """Send the signal in a product, counted from 1, after the loss and its gradient, at the second of its three
        batches.
        """
        self.count, self.at, self.number = 0, 3 + 3 + 3 * (product - 1) + 2, number

    def begin(self) -> None:
        self.count, self.at = 0, math.inf


@pytest.fixture(autouse=True)
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    defaults = HessianOperator.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_graph_bytes", defaults["max_graph_bytes"])  # to be put back
    for owner, name in (
        (kept_search, "_EVERY_SECONDS"),
        (kept_search, "_SHARE_OF_TIME"),
        (TrainingObjective, "evaluated"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return Evaluations()


def assert_equal(one: SpectrumResult, other: SpectrumResult) -> None:
    for name in ("values", "vectors", "residuals", "value_errors", "converged"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.loss, one.matvecs) == (other.loss, other.matvecs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_search_with_what_it_has_and_the_same_call_goes_on(number, tmp_path, capsys, evaluations):
    file = tmp_path / "search.pt"
    handler = signal.getsignal(number)
    whole = measure(Wide(), regression_loader(batch_size=16), **WANTED)
    evaluations.stop(12, number)
    with pytest.warns(CurvatureWarning, match=r"interrupted after 11 products of its search\. The same call goes on"):
        early = measure(Wide(), regression_loader(batch_size=16), resume=file, **WANTED)
    assert signal.getsignal(number) == handler
    assert "ends at the next batch" in capsys.readouterr().err
    assert early.is_interrupted
    assert early.matvecs == 11
    assert "interrupted during the search" in early.summary()
    assert not early.converged.any()
    inputs, targets, _ = regression_data().tensors
    _, dense = dense_hessian(Wide(), (inputs, targets))
    rest = early.vectors @ dense - early.values[:, None] * early.vectors
    assert (torch.linalg.vector_norm(rest, dim=1) <= 1.001 * early.residuals + 1e-12).all()
    assert file.exists()
    evaluations.begin()
    again = measure(Wide(), regression_loader(batch_size=16), resume=file, **WANTED)
    assert evaluations.count == 3 * (2 + whole.matvecs - 11)
    assert_equal(again, whole)
    assert again.seconds > early.seconds
    assert not again.is_interrupted
    assert not list(tmp_path.iterdir())
    exact = torch.linalg.eigvalsh(dense)
    assert again.values.numpy() == pytest.approx(torch.cat([exact.flip(0)[:3], exact[:2]]).numpy(), rel=1e-5)


def test_an_end_before_there_are_as_many_pairs_as_are_wanted_is_a_keyboard_interrupt(tmp_path, evaluations):
    evaluations.stop(3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # which Lightning makes of one
        measure(Wide(), regression_loader(batch_size=16), resume=tmp_path / "search.pt", **WANTED)
    evaluations.begin()
    again = measure(Wide(), regression_loader(batch_size=16), resume=tmp_path / "search.pt", **WANTED)
    assert_equal(again, measure(Wide(), regression_loader(batch_size=16), **WANTED))


SCRIPT = """
import signal
import sys
import torch
from lyapunov_lightning import measure
from tests.modules import regression_loader
from tests.test_kept_search import WANTED, Evaluations, Wide

torch.set_num_threads(1)
Evaluations().stop(14, signal.SIGKILL)
measure(Wide(), regression_loader(batch_size=16), resume=sys.argv[1], max_batch_bytes=0, **WANTED)
"""


@pytest.fixture
def killed(tmp_path):
    """The file of a process that was killed in its 14th product, while it read its data anew."""
    root = Path(__file__).parents[1]
    file = tmp_path / "search.pt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return file


@pytest.mark.timeout(func_only=True)
def test_a_killed_process_is_gone_on_with(killed, evaluations):
    expected = measure(Wide(), regression_loader(batch_size=16), **WANTED)
    evaluations.begin()
    # Held and not read anew this time: the data are the same.
    again = measure(Wide(), regression_loader(batch_size=16), resume=killed, **WANTED)
    assert evaluations.count == 3 * (2 + expected.matvecs - 13)
    assert_equal(again, expected)


def interrupted(evaluations: Evaluations, file: Path) -> None:
    evaluations.stop(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(Wide(), regression_loader(batch_size=16), resume=file, **WANTED)
    evaluations.begin()


def test_the_file_of_another_measurement_is_refused_and_left(tmp_path, evaluations):
    file = tmp_path / "search.pt"
    interrupted(evaluations, file)
    content = file.read_bytes()
    other = Wide()
    with torch.no_grad():
        other.net[0].bias[0] += 1e-9

    class Renamed(Wide):
        pass

    class Rewritten(Wide):
        __module__, __qualname__ = Wide.__module__, Wide.__qualname__

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 1.01 * super().training_step(batch, batch_idx)

    for module, data, options, differs in (
        (other, regression_loader(batch_size=16), {}, "the weights"),
        (Wide(), regression_loader(40, 16), {}, "the data"),
        (Wide(), regression_loader(batch_size=16), {"smallest": 1}, "the options"),
        (Wide(), regression_loader(batch_size=16), {"hessian": HessianConfig(mode="train")}, "the options"),
        (Wide(), regression_loader(batch_size=16), {"max_batches": 2}, "the data"),
        (Renamed(), regression_loader(batch_size=16), {}, "the module"),
        (Rewritten(), regression_loader(batch_size=16), {}, r"the loss \(\S+ in the file, \S+ now\)"),
    ):
        with pytest.raises(ValueError, match=f"keeps the search of another measurement, which differs in {differs}"):
            measure(module, data, resume=file, **{**WANTED, **options})
        assert file.read_bytes() == content


def test_what_follows_the_search_does_not_repeat_it(tmp_path, evaluations, monkeypatch):
    monkeypatch.setattr(one_shot, "_DENSITY_VECTORS", 2)
    monkeypatch.setattr(one_shot, "_DENSITY_STEPS", 5)
    file = tmp_path / "search.pt"
    whole = measure(Wide(), regression_loader(batch_size=16), **WANTED)
    evaluations.stop(whole.matvecs + 5)
    with pytest.warns(CurvatureWarning, match="The same call goes on"):
        early = measure(Wide(), regression_loader(batch_size=16), resume=file, density=True, **WANTED)
    assert early.is_interrupted
    assert early.density is None
    assert early.converged.all()
    assert "interrupted after the search" in early.summary()
    evaluations.begin()
    again = measure(Wide(), regression_loader(batch_size=16), resume=file, density=True, **WANTED)
    assert evaluations.count == 3 * (2 + 10)
    assert again.matvecs == whole.matvecs + 10
    for name in ("values", "vectors", "residuals", "value_errors", "converged"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert not file.exists()


def test_ctrl_c_without_a_file_says_what_would_have_kept_the_search(evaluations):
    evaluations.stop(9)
    with pytest.warns(CurvatureWarning, match="Give a file to `resume`"):
        assert measure(Wide(), regression_loader(batch_size=16), **WANTED).is_interrupted


@pytest.mark.parametrize("content", [b"", b"a text", "a result", "a version"])
def test_another_file_is_refused_before_anything_is_measured(content, tmp_path, evaluations):
    file = tmp_path / "search.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        states = {"a result": {"values": torch.zeros(3)}, "a version": {"version": 0}}
        torch.save(states[content], file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="`resume` should be a file that `measure` keeps a search in"):
        measure(Wide(), regression_loader(batch_size=16), resume=file)
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="`resume` should be a file in a folder that is there"):
        measure(Wide(), regression_loader(batch_size=16), resume=tmp_path / "nowhere" / "search.pt")
    assert evaluations.count == 0


def test_a_full_disk_is_told_and_does_not_end_the_search(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(CurvatureWarning, match="cannot keep its search in .*No space left"):
        found = measure(Wide(), regression_loader(batch_size=16), resume=tmp_path / "search.pt", **WANTED)
    assert found.converged.all()
    assert not list(tmp_path.iterdir())


def test_the_search_is_written_seldom(tmp_path, monkeypatch, evaluations):
    monkeypatch.setattr(kept_search, "_EVERY_SECONDS", 3600.0)
    written: list[Any] = []
    monkeypatch.setattr(torch, "save", lambda state, path: (written.append(state), Path(path).touch()))
    measure(Wide(), regression_loader(batch_size=16), resume=tmp_path / "search.pt", **WANTED)
    assert not written
    interrupted(evaluations, tmp_path / "search.pt")
    assert [state["search"]["num_matvecs"] for state in written] == [8]


def test_several_processes_keep_no_search():
    trainer = pl.Trainer(accelerator="cpu", devices=2, logger=False, enable_progress_bar=False)
    with pytest.raises(MisconfigurationException, match=r"keeps the search of one process, and the trainer has 2"):
        measure(Wide(), regression_loader(batch_size=16), resume="search.pt", trainer=trainer)
