"""A file of results may come from anywhere: it is read as a whole or refused, within the memory of its size."""

import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from lyapunov_lightning import SpectrumResult
from lyapunov_lightning.spectrum_result import MeasuredPlane


def saved_with(path: Path, **changes: Any) -> None:
    """A file as somebody else may have made it."""
    count, size = 3, 4
    numbers = torch.arange(float(count))
    state = {
        **dict.fromkeys(("values", "residuals", "value_errors"), numbers),
        **{
            "converged": numbers > 0,
            "vectors": torch.ones(count, size),
            "num_largest": 2,
            "module": "M",
            "mode": "eval",
        },
        **{"loss": 1.0, "gradient_norm": 1.0, "num_parameters": size, "num_batches": 1, "density": None, "lines": {}},
    }
    torch.save({name: value for name, value in {**state, **changes}.items() if value is not ...}, path)


def test_a_file_of_plain_tensors_is_a_result(tmp_path: Path) -> None:
    saved_with(tmp_path / "found.pt")
    assert SpectrumResult.load(tmp_path / "found.pt").num_largest == 2


def test_what_is_counted_once_is_in_the_singular(tmp_path: Path) -> None:
    saved_with(tmp_path / "found.pt", matvecs=1)
    text = SpectrumResult.load(tmp_path / "found.pt").summary()
    assert "M: 4 parameters, 1 batch, evaluation mode" in text
    assert "\n1 Hessian-vector product, " in text


@pytest.mark.filterwarnings("error:Adding colorbar")
def test_a_plane_has_its_numbers_by_tag_and_its_picture() -> None:
    t = torch.linspace(-0.2, 0.2, 5, dtype=torch.float64)
    plane = MeasuredPlane(("1", "gradient"), t, 3 + t[:, None] ** 2 + t, (1.0, 1.0))
    assert plane.scalars() == pytest.approx({"scan/plane_improvement": 0.2, "scan_details/loss": 3.0})
    assert plane.plot().axes[0].get_xlabel() == "along eigenvector 1, share of ‖θ‖"
    for surface in (False, True):
        ax = Figure().add_subplot(projection="3d" if surface else None)
        assert plane.plot(surface=surface, ax=ax) is ax
        assert ax.get_ylabel() == "along the gradient, share of ‖θ‖"
    with pytest.raises(ValueError, match="three dimensions"):
        plane.plot(surface=True, ax=Figure().add_subplot())
    lost = MeasuredPlane(("1", "2"), t, torch.full((5, 5), math.nan), (1.0, 1.0))
    assert lost.scalars() == {"scan/plane_improvement": 0.0}


HUGE = torch.zeros(1).expand(2**33)

HOSTILE: dict[str, dict[str, Any]] = {
    "more of the upper end than there are": {"num_largest": 10**9},
    "a negative number": {"num_largest": -1},
    "a tensor of one number that says it has many": {"values": HUGE},
    "all tensors likewise": dict.fromkeys(("values", "residuals", "value_errors", "converged"), HUGE),
    "within a line": {"lines": {"1": {"eigenvalue": 1.0, "distances": HUGE, "losses": HUGE, "model": HUGE}}},
    "vectors likewise": {"vectors": torch.zeros(1, 1).expand(3, 2**33)},
    "a sparse tensor": {"values": torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0), (2**33,))},
    "a tensor without numbers": {"values": torch.empty(2**33, device="meta")},
    "unequal lengths": {"residuals": torch.zeros(2)},
    "a field that nobody knows": {"another": 1},
    "a field is missing": {"loss": ...},
    "no density": {"density": {"nodes": 1}},
    "lines are a list": {"lines": [1, 2]},
    "a plane with other numbers": {
        "plane": {
            "names": ("1", "2"),
            "coordinates": torch.zeros(3),
            "losses": torch.zeros(3, 2),
            "lengths": (1.0, 1.0),
        }
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_takes_no_memory(tmp_path: Path, name: str) -> None:
    saved_with(tmp_path / "found.pt", **HOSTILE[name])
    with pytest.raises(ValueError, match=r"found.pt is no file that `SpectrumResult.save` .* Measure again"):
        SpectrumResult.load(tmp_path / "found.pt")


def test_an_archive_that_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    saved_with(tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "found.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ValueError, match="it is compressed"):
        SpectrumResult.load(tmp_path / "found.pt")


def test_a_result_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_with(tmp_path / "found.pt")
    before, result = (tmp_path / "found.pt").read_bytes(), SpectrumResult.load(tmp_path / "found.pt")

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        result.save(tmp_path / "found.pt")
    assert (tmp_path / "found.pt").read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 1
