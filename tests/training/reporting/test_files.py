"""Files that are written as a whole or not at all, and never through a link that somebody has put in the way."""

import pytest
import torch

from lyapunov_lightning.training.reporting.files import free_name, read_tensors, replaced


def test_a_file_is_replaced_once_all_is_written(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with replaced(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_an_interruption_leaves_the_file_as_it_was_and_nothing_else(tmp_path, interruption):
    path = tmp_path / "table.csv"
    path.write_text("before")

    def write_half() -> None:
        with replaced(path) as partial:
            partial.write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(20):
        with replaced(tmp_path / "table.csv") as partial:
            partial.touch()
        names.add(partial.name)
    assert len(names) == 20
    assert all(len(name) > len("table.csv..partial") + 12 for name in names)


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("of somebody else")
    (tmp_path / "table.csv").symlink_to(tmp_path / "elsewhere")
    with replaced(tmp_path / "table.csv") as partial:
        partial.write_text("ours")
    assert (tmp_path / "elsewhere").read_text() == "of somebody else"
    assert (tmp_path / "table.csv").read_text() == "ours"


def test_a_free_name_is_none_that_is_taken_even_by_a_link_that_leads_nowhere(tmp_path):
    path = tmp_path / "table.csv"
    assert free_name(path) == tmp_path / "table.1.csv"
    (tmp_path / "table.1.csv").touch()
    (tmp_path / "table.2.csv").symlink_to(tmp_path / "nowhere")
    assert free_name(path) == tmp_path / "table.3.csv"


@pytest.mark.parametrize("hide", [lambda t: {"a": t}, lambda t: [1, [t]], lambda t: {"a": [{"b": (t,)}]}])
def test_a_tensor_that_is_not_in_the_file_is_refused_wherever_it_is(hide, tmp_path):
    state = hide(torch.ones(3))
    torch.save(state, tmp_path / "whole.pt")
    assert str(read_tensors(tmp_path / "whole.pt")) == str(state)
    torch.save(hide(torch.ones(1).expand(10**12)), tmp_path / "huge.pt")
    with pytest.raises(ValueError, match="is not in it"):
        read_tensors(tmp_path / "huge.pt")
