"""Measured series as one tidy table."""

import csv
import io
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from lyapunov_lightning.training.reporting.files import free_name, replaced, sweep

_COLUMNS = ("step", "epoch", "name", "value")

_Row = tuple[int, int, str, str]

_LONGEST_LINE = 2**16
"""Bytes of a line that is read in one piece: a file without line ends, such as another program's, is not one row."""

_MOST_WAITING = 100_000
"""Rows that wait at most, some 20 MB, while the file cannot be written."""


class SeriesFile:
    """A CSV file with the columns ``step, epoch, name, value``, one row for each number; ``pandas.read_csv`` reads it.

    Rows are on disk once `append` returns, so an interrupted run leaves all that it measured. A resumed run continues
    the same file, without the rows of the steps that it repeats. A new run renames the file of an earlier one
    (``NAME.1.csv``, ...). Rows that cannot be written wait for the next time.

    Args:
        path: The path of the file.

    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._waiting: deque[_Row] = deque(maxlen=_MOST_WAITING)
        self._begins_at: int | None = None

    @property
    def pattern(self) -> Path:
        """The path, whatever links lead to it."""
        return self._path.absolute().parent.resolve() / self._path.name

    @property
    def num_waiting(self) -> int:
        """The number of rows that are not in the file yet."""
        return len(self._waiting)

    def begin(self, step: int) -> str | None:
        """Open the file for a run that begins, or is resumed, before this step.

        Returns:
            What is wrong with the file of the run that is resumed, if anything is.

        Raises:
            OSError: If the file cannot be written. Its rows then wait, and the next `flush` begins it.

        """
        self._waiting.clear()
        self._begins_at = step  # until it has begun
        return self._begin(step)

    def append(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Add the numbers measured at a step.

        Raises:
            OSError: If the file cannot be written. The rows then wait for the next `append` or `flush`.

        """
        self._waiting.extend((step, epoch, name, repr(float(value))) for name, value in values.items())
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait; all of them or none.

        Raises:
            OSError: If the file cannot be written.

        """
        if not self._waiting:
            return
        if self._begins_at is not None:
            self._begin(self._begins_at)
        if not self._path.exists():  # somebody has moved or removed it since
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._make_new()
        with self._path.open("a+b", buffering=0) as file:
            _append(file, _as_csv(self._waiting))
        self._waiting.clear()

    def _begin(self, step: int) -> str | None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        sweep(self._path.parent, self._path.name)
        # A resumed run repeats the steps after its checkpoint. With their old rows in the file every curve would double
        # back.
        note = None
        if step > 0 and self._path.exists():
            note = self._continue_before(step)
        else:
            self._make_new()
        self._begins_at = None
        return note

    def _make_new(self) -> None:
        if self._path.exists() or self._path.is_symlink():
            self._path.rename(free_name(self._path))
        with replaced(self._path) as partial, partial.open("xb") as file:
            file.write(_as_csv([_COLUMNS]))

    def _continue_before(self, step: int) -> str | None:
        """Take over the rows of the steps before the checkpoint, as far as they are whole."""
        num_broken = 0
        with replaced(self._path) as partial:
            with self._path.open("rb") as before, partial.open("xb") as file:
                file.write(_as_csv([_COLUMNS]))
                for row in _rows_in(before, step):
                    if row is None:
                        num_broken += 1
                    elif row[0] < step:
                        file.write(_as_csv([row]))
            if not num_broken:
                return None
            # A copy, and not the file itself under another name: a run that is killed here has to find its table.
            kept = free_name(self._path)
            shutil.copyfile(self._path, kept)
        return (
            f"{num_broken} of the lines of {self._path} are not rows of `step,epoch,name,value`, and are left out of"
            f" the table that goes on. The file as it was is kept as {kept}. Look there if another program has written"
            " to it; nothing has to be done otherwise."
        )


def _append(file: BinaryIO | io.FileIO, data: bytes) -> None:
    """Write data at the end of a file, all of it or nothing."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # what a full disk has cut, where cutting it off failed as well
            data = b"\r\n" + data
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) or 0 :]
    except BaseException:
        file.truncate(size)  # or the first half of a number would stay, to be read as another number
        raise


def _as_csv(rows: Iterable[tuple[object, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _rows_in(file: BinaryIO, step: int) -> Iterator[_Row | None]:
    """The rows of a table, in the order of our columns; None for each line that is none."""
    header = file.readline(_LONGEST_LINE)
    text = header.decode("utf-8-sig", errors="replace").strip()
    delimiter = max(",;\t", key=text.count)  # of a spreadsheet that has saved it
    columns = [name.strip().strip('"') for name in text.split(delimiter)]
    if not {*columns} >= {*_COLUMNS}:
        columns = [*_COLUMNS]
        if header:  # else the file is empty
            yield _row_of(header, delimiter, columns)  # its first line may be a row
    while line := file.readline(_LONGEST_LINE):
        row = _row_of(line, delimiter, columns)
        is_cut = not line.endswith(b"\n") and len(line) < _LONGEST_LINE and b"\0" not in line
        if is_cut and (row is None or row[0] >= step):
            return  # of a run that was killed while it wrote; the run that goes on measures it again
        if line.strip():
            yield None if is_cut else row


def _row_of(line: bytes, delimiter: str, columns: list[str]) -> _Row | None:
    try:
        [fields] = csv.reader([line.decode()], delimiter=delimiter, strict=True)
        step, epoch, name, value = (fields[columns.index(column)].strip() for column in _COLUMNS)
        # Of more fields than columns one may be the decimals of another: 1,5 is 1.5 in half of the world.
        if not name or len(fields) != len(columns):
            return None
        return _whole(step), _whole(epoch), name, repr(float(value))
    except (ValueError, IndexError, csv.Error):  # a UnicodeDecodeError is a ValueError
        return None


def _whole(text: str) -> int:
    """A count, also where a spreadsheet or pandas has made ``3.0`` of it."""
    number = float(text)
    if not 0 <= number < 2**53 or not number.is_integer():
        raise ValueError(f"{text} is no count.")
    return int(number)
