"""Rows of a table: of a data frame, or of a .csv, .tsv or .parquet file; and how messages name them.

A row of a text file is named by its line, as an editor counts it, and any other by its position from 0.
"""

import csv
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pyro_vae.data.images import DataError
from pyro_vae.utils.frames import is_frame

__all__ = ["MISSING", "TableRows", "delimiter_of", "import_pandas", "is_header", "records", "rows_of"]

MISSING = ("", "?", "n/a", "na", "nan", "none", "null")  # how files mark holes, in any case


@dataclass(frozen=True)
class TableRows:
    """The rows of a table.

    Attributes:
        frame: A data frame of pandas.
        path: The file that it comes from, if it comes from one.
        read: Call of pandas that reads the file so.
        delimiter: What separates the fields of a text file, or "".
    """

    frame: Any = None
    path: Path | None = None
    read: str = ""
    delimiter: str = ""

    def place(self, row: int) -> str:
        """Return how messages call a row."""
        if self.path is not None and self.delimiter:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                lines = [line for line, _ in records(file, self.delimiter, skipinitialspace=True)]
            if len(lines) == len(self.frame) + 1:  # else pandas reads it otherwise
                return f"line {lines[row + 1]}"
        return f"row {row} (counted from 0)"

    def as_numbers(self, name: Any) -> str:
        """Return how to make numbers of a column, and holes of what is not a number."""
        convert = f"frame[{name!r}] = pandas.to_numeric(frame[{name!r}], errors='coerce')"
        return convert if self.path is None else f"frame = {self.read}; {convert}; table(frame)"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Begin the messages of errors in a block with the file, if there is one."""
        try:
            yield
        except DataError as error:
            if self.path is None:
                raise
            raise DataError(f"{self.path}: {error}") from error


def rows_of(source: Any) -> TableRows:
    """Return the rows of a data frame, as one of pandas, or of a file."""
    if isinstance(source, str | os.PathLike):
        return _read(Path(source))
    if not is_frame(source):
        raise TypeError(f"a table is a data frame, or the path of a file; got {type(source).__name__}")
    return TableRows(source.to_pandas() if hasattr(source, "to_pandas") else source)


def _read(path: Path) -> TableRows:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"{path} must end in .csv, .tsv or .parquet, which says how it is read")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    pandas = import_pandas()
    try:
        if suffix == ".parquet":
            frame = pandas.read_parquet(path, engine="pyarrow")
            return TableRows(frame, path, f"pandas.read_parquet({str(path)!r})")
        with path.open(newline="", encoding="utf-8-sig") as file:
            line = file.readline()
        delimiter = delimiter_of(line)
        names = next(csv.reader([line], delimiter=delimiter), [])
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # which pandas would rename
            raise ValueError(f"two columns are called {twice!r}: rename one")
        if not is_header(names):
            raise ValueError("its first line holds numbers, where the names of the columns should stand")
        marks = [form for mark in MISSING for form in (mark, mark.upper(), mark.capitalize())]
        options = {"sep": delimiter, "na_values": marks, "skipinitialspace": True, "encoding": "utf-8-sig"}
        if tuple(map(int, pandas.__version__.split(".")[:2])) < (3, 1):
            options["float_precision"] = "round_trip"  # later the default, and deprecated as an option
        found = pandas.read_csv(path, **options)
        if not isinstance(found.index, pandas.RangeIndex):  # pandas takes values without a name for an index
            raise ValueError("its rows have more values than its first line has names")
    except (ValueError, OSError) as error:  # pandas' errors of parsing are ValueErrors
        raise DataError(f"{path} is not a readable {suffix} file: {error}") from error
    first = str(found.columns[0])
    has_index = first.startswith("Unnamed: 0")
    if has_index:
        found = found.set_index(first, drop=True).rename_axis(None)
    others = f", sep={delimiter!r}" * (delimiter != ",") + ", index_col=0" * has_index
    return TableRows(found, path, f"pandas.read_csv({str(path)!r}{others})", delimiter)


def records(
    file: TextIO, delimiter: str, *, skipinitialspace: bool = False
) -> Iterator[tuple[int, list[str]]]:
    r"""Yield the rows of a text table, each with the line in which it begins, as an editor counts lines.

    Blank lines are skipped; a quoted field may go over several lines. The header is the first row.

    Example:
        >>> import io
        >>> list(records(io.StringIO('a,b\n\n1,"x\ny"\n2,z\n'), ","))
        [(1, ['a', 'b']), (3, ['1', 'x\ny']), (5, ['2', 'z'])]
    """
    lines = file.readlines()
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skipinitialspace)
    line = 1
    for row in reader:
        if len(row) > 1 or lines[line - 1].strip():
            yield line, row
        line = reader.line_num + 1


def is_header(row: list[str]) -> bool:
    """Return whether a first line holds names: words, or the numbers 0, 1, 2, … of an array's columns."""
    if row == [str(column) for column in range(len(row))] and len(row) > 1:
        return True
    return not all(_is_number(text) for text in row)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip() != "" and text.strip().lower() in MISSING
    return True


def delimiter_of(line: str) -> str:
    """Return what separates the fields of a line: comma, semicolon or tabulator."""
    return max(",;\t", key=line.count)


def import_pandas() -> Any:
    """Return the module pandas; raise ImportError that says how to install it."""
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("tables of mixed columns need pandas: pip install pandas") from error
