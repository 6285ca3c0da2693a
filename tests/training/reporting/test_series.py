"""The table loses no row, has none twice, and none that is not whole, whatever was done to it."""

import math

import pandas as pd
import pytest

from lyapunov_lightning.training.reporting.series import SeriesFile

UNWRITABLE = (OSError,)

HEADER = "step,epoch,name,value\r\n"
ROWS = [(0, 0, "spectrum/a", 1.5), (0, 0, "spectrum/b", -2.0), (1, 0, "spectrum/a", 0.1 + 0.2), (2, 1, "spectrum/a", 3)]


def text_of(rows, header=HEADER):
    return header + "".join(f"{step},{epoch},{name},{value!r}\r\n" for step, epoch, name, value in rows)


def rows_in(path):
    return [tuple(row) for row in pd.read_csv(path, float_precision="round_trip").itertuples(index=False)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "spectrum.csv"


def written(path, rows):
    file = SeriesFile(path)
    file.begin(0)
    for step, epoch, name, value in rows:
        file.append(step, epoch, {name: value})
    return file


def test_rows_are_on_disk_at_once(path):
    written(path, ROWS)
    assert path.read_bytes().decode() == text_of([(*row[:3], float(row[3])) for row in ROWS])


def test_a_resumed_run_goes_on_before_its_step(path):
    written(path, ROWS)
    file = SeriesFile(path)
    assert file.begin(1) is None
    file.append(1, 0, {"spectrum/a": 7.0})
    assert rows_in(path) == [*ROWS[:2], (1, 0, "spectrum/a", 7.0)]
    assert [*path.parent.iterdir()] == [path]


def test_what_a_run_has_left_that_was_killed_while_it_wrote_is_swept_away(path):
    written(path, ROWS)
    (path.parent / "spectrum.csv.0123abcd.partial").touch()
    (path.parent / "another.csv.0123abcd.partial").touch()
    SeriesFile(path).begin(1)
    assert sorted(found.name for found in path.parent.iterdir()) == ["another.csv.0123abcd.partial", "spectrum.csv"]


def test_a_new_run_puts_the_table_of_an_earlier_one_aside(path):
    for value in (1.0, 2.0, 3.0):
        written(path, [(0, 0, "a", value)])
    assert [rows_in(path.with_name(name))[0][3] for name in ("spectrum.1.csv", "spectrum.2.csv", "spectrum.csv")] == [
        1.0,
        2.0,
        3.0,
    ]


WHOLE = text_of(ROWS)

BROKEN = {
    "NUL tail": (WHOLE.encode() + b"\0" * 200, ROWS),
    "NULs in the midst": (WHOLE.encode().replace(b"1.5", b"\0.5"), ROWS[1:]),
    "foreign row": ((WHOLE + "Here I stopped.\r\n").encode(), ROWS),
    "extra column in a row": ((WHOLE + "2,1,spectrum/b,1,5\r\n").encode(), ROWS),
    "latin-1": ((WHOLE + "2,1,spectrum/größe,1.0\r\n").encode("latin-1"), ROWS),
    "UTF-16": (WHOLE.encode("utf-16"), []),
    "row cut in the midst of the file": (text_of(ROWS[:1]).encode() + b"1,0,spec\r\n" + b"2,1,spectrum/a,3\r\n", None),
    "value is a word": ((WHOLE + "2,1,spectrum/b,much\r\n").encode(), ROWS),
    "no header": (WHOLE.removeprefix(HEADER).encode() + b"x\r\n", ROWS),
    "not closed quotes": ((WHOLE + '2,1,"spectrum/b,1.0\r\n').encode(), ROWS),
    "another program's file": (bytes(range(256)) * 1000, []),
    "of a step that is not measured again, cut": (text_of(ROWS[:2]).encode() + b"1,0,spectrum/a,0.3", ROWS[:2]),
}

CHANGED = {
    "BOM": (WHOLE.encode("utf-8-sig"), ROWS),
    "3.0": (WHOLE.replace("\n1,0,", "\n1.0,0.0,").encode(), ROWS),
    "semicolons": (WHOLE.replace(",", ";").encode(), ROWS),
    "extra column": ("\n".join(f"{i},{line}" for i, line in enumerate(WHOLE.splitlines())).encode() + b"\n", ROWS),
    "other order": (b"name,value,epoch,step\nspectrum/a,1.5,0,0\n", ROWS[:1]),
    "no line end that Windows knows": (WHOLE.replace("\r", "").encode(), ROWS),
    "empty": (b"", []),
    "empty lines": (WHOLE.replace("\r\n", "\r\n\r\n").encode(), ROWS),
    "row cut inside its number": (WHOLE.encode() + b"3,1,spectrum/a,3.14159", ROWS),
    "row cut inside its step": (WHOLE.encode() + b"3", ROWS),
}


@pytest.mark.parametrize("name", [*BROKEN, *CHANGED])
def test_a_run_goes_on_with_what_is_whole(path, name):
    content, whole = {**BROKEN, **CHANGED}[name]
    whole = [ROWS[0], ROWS[3]] if whole is None else whole
    path.parent.mkdir()
    path.write_bytes(content)
    file = SeriesFile(path)
    told = file.begin(3)
    file.append(3, 1, {"spectrum/a": math.pi})
    assert rows_in(path) == [*whole, (3, 1, "spectrum/a", math.pi)]
    kept = path.with_name("spectrum.1.csv")
    assert kept.exists() == (name in BROKEN)
    if name in BROKEN:  # nothing is thrown away, and the user is told which file, what is wrong and what to do
        assert kept.read_bytes() == content
        assert told is not None
        assert str(path) in told
        assert str(kept) in told
    else:
        assert told is None
    again = SeriesFile(path)
    assert again.begin(4) is None


def test_a_step_that_is_measured_again_may_be_cut(path):
    path.parent.mkdir()
    path.write_bytes(text_of(ROWS[:3]).encode() + b"2,1,spectrum/a,3.1")
    assert SeriesFile(path).begin(2) is None
    assert rows_in(path) == ROWS[:3]


def in_the_way(folder):
    folder.rename(folder.with_name("moved"))
    folder.touch()


def out_of_the_way(folder):
    folder.unlink()
    folder.with_name("moved").rename(folder)


def test_rows_wait_while_the_folder_is_away(path):
    file = written(path, ROWS[:1])
    in_the_way(path.parent)
    for step, epoch, name, value in ROWS[1:3]:
        with pytest.raises(UNWRITABLE):
            file.append(step, epoch, {name: value})
    assert file.num_waiting == 2
    out_of_the_way(path.parent)
    file.append(2, 1, {"spectrum/a": 3})
    assert rows_in(path) == ROWS
    assert file.num_waiting == 0


def test_a_table_that_cannot_be_begun_begins_later(path):
    path.parent.touch()  # a file where the folder is to be
    file = SeriesFile(path)
    with pytest.raises(UNWRITABLE):
        file.begin(0)
    with pytest.raises(UNWRITABLE):
        file.append(0, 0, {"spectrum/a": 1.5})
    path.parent.unlink()
    file.flush()
    assert rows_in(path) == ROWS[:1]


def test_a_table_that_was_removed_is_begun_again(path):
    file = written(path, ROWS[:2])
    path.unlink()
    path.parent.rmdir()
    file.append(1, 0, {"spectrum/a": 0.1 + 0.2})
    assert rows_in(path) == ROWS[2:3]


def test_a_full_disk_leaves_whole_rows_and_none_twice(path):
    """A limit on the size of files, in a process of its own, cuts a row as a full disk does."""
    import multiprocessing
    import resource

    file = written(path, ROWS[:1])

    def fill() -> None:
        size = path.stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        with pytest.raises(UNWRITABLE):
            file.append(0, 0, {"spectrum/b": -2.0})
        assert path.stat().st_size == size
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        file.append(1, 0, {"spectrum/a": 0.1 + 0.2})

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert rows_in(path) == ROWS[:3]
