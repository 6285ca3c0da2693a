"""Eigenvectors of one run only, and none that is not whole."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lyapunov_lightning.training.reporting import eigenvectors
from lyapunov_lightning.training.reporting.eigenvectors import EigenvectorFiles

UNWRITABLE = (OSError,)

VECTORS = torch.arange(6.0).reshape(2, 3)


def add(files, step, value=1.0):
    files.add(step, torch.tensor([value, 0.0]), VECTORS * value, {"num_largest": "1"})


def steps_in(folder):
    return sorted(int(path.stem.removeprefix("eigenvectors-step")) for path in folder.glob("*.safetensors"))


def begun(folder, step=0):
    files = EigenvectorFiles(folder)
    files.begin(step)
    return files


def test_a_file_has_values_vectors_and_what_they_are(tmp_path):
    add(begun(tmp_path), 3, 2.0)
    path = tmp_path / "eigenvectors-step00000003.safetensors"
    saved = load_file(path)
    torch.testing.assert_close(saved["vectors"], 2 * VECTORS)
    torch.testing.assert_close(saved["values"], torch.tensor([2.0, 0.0], dtype=torch.float64))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"num_largest": "1"}
    assert [*tmp_path.iterdir()] == [path]


def test_a_new_run_moves_the_files_of_an_earlier_one_aside(tmp_path):
    for value, steps in ((1.0, (0, 2, 4)), (2.0, (0, 3)), (3.0, (1,))):
        files = begun(tmp_path)
        for step in steps:
            add(files, step, value)
    assert steps_in(tmp_path) == [1]
    assert steps_in(tmp_path / "eigenvectors.1") == [0, 2, 4]
    assert steps_in(tmp_path / "eigenvectors.2") == [0, 3]


def test_a_resumed_run_has_no_files_of_the_steps_that_it_repeats(tmp_path):
    files = begun(tmp_path)
    for step in (0, 2, 4, 6):
        add(files, step)
    (tmp_path / "eigenvectors-step00000006.safetensors.0123abcd.partial").touch()
    add(begun(tmp_path, 4), 5)
    assert not [*tmp_path.glob("*.partial")]  # of a run that was killed while it wrote
    assert steps_in(tmp_path) == [0, 2, 5]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_without_memory_a_file_waits_where_its_writer_would_end_the_process(tmp_path, monkeypatch):
    files = begun(tmp_path)
    monkeypatch.setattr(eigenvectors, "_ROOM_TO_WRITE", 2**62)
    with pytest.raises(MemoryError):
        add(files, 0)
    assert (steps_in(tmp_path), files.num_waiting) == ([], 1)
    monkeypatch.undo()
    files.flush()
    assert steps_in(tmp_path) == [0]


def test_files_wait_while_the_folder_is_away_and_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(eigenvectors, "_MOST_WAITING", 2 * VECTORS.nbytes)
    folder = tmp_path / "out"
    folder.touch()
    files = EigenvectorFiles(folder)
    with pytest.raises(UNWRITABLE):
        files.begin(0)
    for step in range(3):
        with pytest.raises(UNWRITABLE):
            add(files, step)
    assert files.num_waiting == 2
    folder.unlink()
    files.flush()
    assert steps_in(folder) == [1, 2]
    assert files.num_waiting == 0
