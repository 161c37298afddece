"""Tables in files: .csv, .tsv and .parquet, read as columns of numbers, written back with holes filled."""

import csv
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vae.data.table_rows import MISSING, delimiter_of, is_header, records
from pyro_vae.utils.frames import filled, has_numbers, series_values
from pyro_vae.utils.serialization import replacing

__all__ = ["ARRAYS", "TABLES", "Table", "read_table", "require_writable", "write_columns"]

TABLES = (".csv", ".tsv", ".parquet")
ARRAYS = (".npy", ".npz")


class Table(ABC):
    """Columns of a file by position, some of them numbers.

    Attributes:
        path: The file.
        names: Of all columns, or None for a file without a header.
        lines: In which the rows begin, as an editor counts them, or None for a file without lines.
    """

    path: Path
    names: list[str] | None
    lines: list[int] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """Number of columns."""

    @abstractmethod
    def numbers(self, column: int, *, empty: str = "") -> NDArray[Any]:
        """Return a column, float64 (N,), NaN where missing.

        Args:
            column: Its position.
            empty: What to do about a cell, for messages: leave it empty; "" where the command takes no holes.

        Raises:
            ValueError: If a value is not a number; the message names the place.
        """

    @abstractmethod
    def write_filled(self, path: Path, columns: Sequence[int], values: NDArray[Any]) -> None:
        """Write the table with values (N, len(columns)) where those columns have holes, the rest as it is."""

    def label(self, column: int) -> str:
        """Return how messages call a column."""
        return f"column {column + 1}" if self.names is None else f"column {self.names[column]!r}"

    def place(self, row: int, column: int) -> str:
        """Return how messages call a value."""
        where = f"row {row} (counted from 0)" if self.lines is None else f"line {self.lines[row]}"
        return f"{where}, {self.label(column)} of {self.path}"

    def select(self, wanted: Sequence[str] | None, drop: Sequence[str]) -> list[int]:
        """Return the positions of columns by name, or of all but some; an unnamed first one is an index.

        Raises:
            ValueError: If a name is not there, or stands twice.
        """
        if self.names is None:
            if drop:
                raise ValueError(f"{self.path} has no header, so that no column is called {drop[0]!r}")
            return list(range(self.num_columns))
        twice = next((name for name in self.names if name and self.names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{self.path} has two columns {twice!r}: rename one")
        for name in drop if wanted is None else wanted:
            if name not in self.names:
                raise ValueError(f"{self.path} has no column {name!r}; it has {', '.join(self.names)}")
        if wanted is not None:
            return [self.names.index(name) for name in wanted]
        first = int(self.names[0] == "")
        return [c for c, name in enumerate(self.names) if c >= first and name not in drop]


class _Csv(Table):
    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                first = file.readline()
                self.line_end = "\r\n" if first.endswith("\r\n") else "\n"
                self.delimiter = delimiter_of(first)
                file.seek(0)
                found = list(records(file, self.delimiter))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a text table in UTF-8: {error}") from error
        if not found:
            raise ValueError(f"{path} is empty")
        width = len(found[0][1])
        for line, row in found:
            if len(row) != width:
                raise ValueError(
                    f"line {line} of {path} has {len(row)} values; line {found[0][0]} has {width}"
                )
        has_header = is_header(found[0][1])
        self.first_line = [row for _, row in found[:has_header]]
        self.names = [name.strip() for name in found[0][1]] if has_header else None
        self.lines, self.rows = (
            [line for line, _ in found[has_header:]],
            [row for _, row in found[has_header:]],
        )
        if not self.rows:
            raise ValueError(f"{path} has a header and no rows")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_columns(self) -> int:
        return len(self.rows[0])

    def numbers(self, column: int, *, empty: str = "") -> NDArray[Any]:
        found = np.empty(len(self.rows))
        for number, row in enumerate(self.rows):
            text = row[column].strip()
            try:
                found[number] = np.nan if text.lower() in MISSING else float(text)
            except ValueError:
                raise ValueError(
                    f"{self.place(number, column)} is {text!r}, which is not a number: "
                    f"{self._remedy(column, empty)}"
                ) from None
        return found

    def _remedy(self, column: int, empty: str) -> str:
        drop = "leave the column out" + (f", by --drop {self.names[column]!r}" if self.names else "")
        return ", ".join(filter(None, ["write numbers", empty, f"or {drop}"]))

    def write_filled(self, path: Path, columns: Sequence[int], values: NDArray[Any]) -> None:
        rows = [list(row) for row in self.rows]
        for place, column in enumerate(columns):
            for number in np.flatnonzero(np.isnan(self.numbers(column))):
                rows[number][column] = repr(float(values[number, place]))
        delimiter = "\t" if path.suffix == ".tsv" else self.delimiter
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter, lineterminator=self.line_end).writerows(
                [*self.first_line, *rows]
            )


class _Parquet(Table):
    def __init__(self, path: Path):
        pandas = _pandas(path)
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            self.frame = pandas.read_parquet(path, engine="pyarrow")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a .parquet file: {error}") from error
        self.names = [str(name) for name in self.frame.columns]
        if len(self.frame) == 0:
            raise ValueError(f"{path} has no rows")

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def num_columns(self) -> int:
        return self.frame.shape[1]

    def numbers(self, column: int, *, empty: str = "") -> NDArray[Any]:
        series = self.frame.iloc[:, column]
        assert self.names is not None
        if not has_numbers(series):
            raise ValueError(
                f"{self.label(column)} of {self.path} holds {series.dtype}, not numbers: write its values as "
                f"numbers, or leave it out (--drop {self.names[column]!r})"
            )
        return series_values(series, dtype=np.float64)

    def write_filled(self, path: Path, columns: Sequence[int], values: NDArray[Any]) -> None:
        frame = filled(self.frame, values, columns)
        with replacing(path) as partial:
            frame.to_parquet(partial, engine="pyarrow")


def read_table(path: Path) -> Table:
    """Read a .csv, .tsv or .parquet file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, empty or ragged.
        ImportError: If a .parquet file needs a package.
    """
    if path.suffix.lower() == ".parquet":
        return _Parquet(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _Csv(path)


def _pandas(path: Path) -> Any:
    try:
        importlib.import_module("pyarrow")
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(
            f"{path}: files of .parquet are read and written by pandas and pyarrow, which are missing: "
            "pip install pandas pyarrow"
        ) from error


def require_writable(path: Path, suffixes: Sequence[str]) -> None:
    """Raise, before anything is computed, if a file cannot be written where and as its name says."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}, which says how it is written")
    if path.suffix == ".parquet":
        _pandas(path)


def write_columns(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write columns of equal length: named in .csv, .tsv and .parquet, as an array (N, D) in .npy."""
    with replacing(path) as partial:
        if path.suffix == ".parquet":
            _pandas(path).DataFrame(columns).to_parquet(partial, engine="pyarrow")
        elif path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, np.stack(list(columns.values()), 1))
        else:
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(
                    file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n"
                )
                writer.writerow(columns)
                writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
