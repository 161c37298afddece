"""Tables of mixed columns as one tensor, and back: numbers, counts, categories, ordered levels, holes.

The family of a column (see `likelihoods.Columns`) is proposed from its values, by the first line that fits:

| values | family |
|---|---|
| booleans, or two different ones | binary |
| ordered categories | ordinal |
| text, other categories | categorical |
| whole numbers ≥ 0, with a 0 | poisson; negative-binomial if the variance is over twice the mean |
| positive, with a skewness over 1 that the logarithm makes smaller | log-normal |
| others, with an excess kurtosis over 3 | student-t |
| others | normal |

Whole numbers without a 0, such as ages, years and ratings, are thus taken for real ones, unless `families`
says otherwise. Shapes: N rows, D columns.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vae.data.images import DataError
from pyro_vae.data.table_rows import TableRows, import_pandas, rows_of
from pyro_vae.utils.columns import COUNTS, FAMILIES, LEVELS
from pyro_vae.utils.display import aligned
from pyro_vae.utils.frames import has_numbers, series_values

__all__ = ["Table", "TableColumn", "table"]

_OVERDISPERSED = 2  # variance over mean of counts
_SKEWED, _HEAVY = 1.0, 3.0  # skewness, excess kurtosis
_FEW = 10  # levels of text that are always categories
_REPEATS = 5  # pairs of equal numbers expected by chance, where none says that numbers identify rows
_LEVELLED = ("binary", *LEVELS)
_OF_A_FRAME = TableRows()

logger = logging.getLogger("pyro_vae")


@dataclass(frozen=True)
class TableColumn:
    """A column: its name, how it is modelled, and how its values become numbers.

    Attributes:
        name: Name in the table.
        dtype: Type in the data frame.
        family: Of `likelihoods.Columns`.
        reason: Why this family.
        levels: Values of the codes 0 … k − 1, of a column with levels.
        offset: Mean of x, or of log x for "log-normal"; 0 for levels and counts.
        scale: Standard deviation likewise; the mean of counts; 1 for levels.
        is_whole: Whether all values are whole numbers.
    """

    name: Any
    dtype: Any
    family: str
    reason: str
    levels: tuple[Any, ...] = ()
    offset: float = 0.0
    scale: float = 1.0
    is_whole: bool = False

    def codes(self, series: Any, rows: TableRows = _OF_A_FRAME) -> NDArray[Any]:
        """Return the values of a pandas column as numbers, float64 (N,), NaN where missing.

        Args:
            series: The column.
            rows: Name the rows in messages, by default counted from 0.

        Raises:
            DataError: If a value is not a number, or not one of the levels; the message names it.
        """
        if self.family in _LEVELLED:
            code = {level: number for number, level in enumerate(self.levels)}
            values = [np.nan if missing else code.get(value, -1) for value, missing in _pairs(series)]
            found = np.array(values, dtype=np.float64)
            unknown = np.flatnonzero(found < 0)
            if len(unknown):
                raise DataError(
                    f"column {self.name!r} has {series.iloc[unknown[0]]!r} in {rows.place(unknown[0])}, "
                    f"which is not among its {len(self.levels)} levels: leave it empty, or read all rows as "
                    "one table"
                )
            return found
        if not has_numbers(series):
            where = _first_text(series)
            first = (
                ""
                if where is None
                else f", and {series.iloc[where]!r} in {rows.place(where)} is not a number"
            )
            raise DataError(
                f"column {self.name!r} holds {series.dtype}, where {self.family} needs numbers{first}: "
                + rows.as_numbers(self.name)
            )
        found = series_values(series, dtype=np.float64)
        wrong = np.isinf(found)
        if self.family in COUNTS:
            wrong |= (found < 0) | (found != np.rint(found)) & ~np.isnan(found)
        elif self.family == "log-normal":
            wrong |= found <= 0
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            needed = {"log-normal": "positive numbers", **dict.fromkeys(COUNTS, "whole numbers ≥ 0")}
            raise DataError(
                f"column {self.name!r} has {found[row]:g} in {rows.place(row)}, where {self.family} "
                f"needs {needed.get(self.family, 'finite numbers')}: correct it, leave it empty, or choose "
                f"another family, by families={{{self.name!r}: ...}}"
            )
        return found

    def series(self, codes: NDArray[Any]) -> Any:
        """Return a pandas column of this column's type from numbers (N,), as `codes` gives them.

        Raises:
            DataError: If a number is not a code of a level.
        """
        pandas = import_pandas()
        missing = np.isnan(codes)
        if self.family not in _LEVELLED:
            numbers = pandas.Series(np.rint(codes) if self.is_whole else codes)
            if self.dtype.kind in "iu":  # which may have no mark for what is missing, and are bounded
                bits = 8 * self.dtype.itemsize - (self.dtype.kind == "i")
                least = 0 if self.dtype.kind == "u" else -(2**bits)
                is_inside = not missing.any() and numbers.between(least, 2**bits - 1).all()
                return numbers.astype(self.dtype if is_inside else "Int64")
            return numbers.astype(self.dtype)
        invalid = ~missing & ~np.isin(codes, range(len(self.levels)))
        if invalid.any():
            wrong = codes[invalid][0]
            raise DataError(
                f"column {self.name!r} has {wrong:g}, which is not a code of its {len(self.levels)} levels: "
                "pass draws, or all that impute returns, since a mean of codes is not a level"
            )
        categorical = pandas.Categorical.from_codes(
            np.where(missing, -1, codes).astype(int), list(self.levels)
        )
        if isinstance(self.dtype, pandas.CategoricalDtype):
            return pandas.Series(categorical.set_ordered(self.dtype.ordered))
        if missing.any() and self.dtype.kind in "biu":
            return pandas.Series(categorical).astype("boolean" if self.dtype.kind == "b" else "Int64")
        return pandas.Series(categorical).astype(self.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """N rows of D mixed columns as a tensor, with what turns them into a data frame again; see `table`.

    Attributes:
        values: float64 (N, D): numbers, codes of levels, NaN where missing.
        columns: The columns.
        index: Index of the rows.
    """

    values: Tensor
    columns: tuple[TableColumn, ...]
    index: Any

    @property
    def families(self) -> list[Any]:
        """The families, with numbers of levels, as `likelihoods.Columns` takes them."""
        return [(c.family, len(c.levels)) if c.family in LEVELS else c.family for c in self.columns]

    def tensor(self, rows: Any) -> Tensor:
        """Return other rows of the same columns, float64 (N, D), such as those of a test set.

        Args:
            rows: A data frame, or the path of a file, as for `table`; more columns than these play no role.

        Raises:
            DataError: If a column is not there, or a value is not valid in it.
        """
        found = rows_of(rows)
        frame = found.frame
        absent = [column.name for column in self.columns if column.name not in frame.columns]
        with found.named():
            if absent:
                raise DataError(
                    f"the table has no column {absent[0]!r}; it has {', '.join(map(str, frame.columns))}"
                )
            return torch.from_numpy(np.stack([c.codes(frame[c.name], found) for c in self.columns], 1))

    def frame(self, values: Any, *, index: Any = None) -> Any:
        """Return a data frame of pandas of the same columns and types from numbers.

        Args:
            values: (N, D), as `VAE.sample` draws them; NaN where missing. Or what `impute` returns: its means
                of numbers, rounded where the column holds whole ones, and the most frequent level among its
                draws.
            index: Index of the rows, such as that of this table; by default 0, 1, 2, ….

        Raises:
            DataError: If the shape is another, or a number is not a code of a level.
        """
        if hasattr(values, "draws"):
            has_levels = torch.tensor([column.family in _LEVELLED for column in self.columns])
            draws = values.draws.cpu()
            values = torch.where(has_levels, draws.mode(0).values, values.mean.cpu())
        numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
        if numbers.ndim != 2 or numbers.shape[1] != len(self.columns):
            raise DataError(f"values must have shape (N, {len(self.columns)}); got {numbers.shape}")
        parts = {c.name: c.series(numbers[:, place]) for place, c in enumerate(self.columns)}
        found = import_pandas().DataFrame(parts)
        return found if index is None else found.set_axis(index, axis=0)

    def __repr__(self) -> str:
        rows = []
        for place, column in enumerate(self.columns):
            levels = f" ({len(column.levels)})" if column.family in LEVELS else ""
            missing = int(self.values[:, place].isnan().sum())
            rows.append([str(column.name), column.family + levels, column.reason, str(missing)])
        title = f"Table of {len(self.values):,} rows and {len(self.columns)} columns"
        return "\n".join([title, *aligned(["column", "family", "because", "missing"], rows, left=3)])


def table(source: Any, *, families: Mapping[str, str] | None = None, drop: Sequence[str] = ()) -> Table:
    """Read a table of mixed columns: a data frame, or a .csv, .tsv or .parquet file.

    A printed table says which family each column was given, and why; the rule is that of this module.

    Args:
        source: A data frame of pandas or polars, or a path. In text files, empty fields, "?", "NA", "null"
            and the like are holes, and an unnamed first column is the index.
        families: Family by name of a column, where another than the proposed one is meant; "counts" chooses
            between Poisson and negative binomial.
        drop: Names of columns to leave out.

    Raises:
        DataError: If a file is damaged, a name is unknown, a column is empty, is text that hardly repeats, is
            numbers except for some entries, or has values that its family does not allow; the message names
            the column, and the entry.
        FileNotFoundError: If there is no such file.
        ImportError: If pandas is missing, or pyarrow for a .parquet file.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame(
        ...     {
        ...         "height": [1.70, 1.82, 1.64, None],
        ...         "children": [0, 2, 1, 0],
        ...         "eyes": ["blue", "brown", None, "green"],
        ...     }
        ... )
        >>> people = table(frame)
        >>> people
        Table of 4 rows and 3 columns
        column    family           because                                                 missing
        height    normal           numbers                                                       1
        children  poisson          whole numbers with a 0, of variance 0.9 times the mean        0
        eyes      categorical (3)  text of 3 values                                              1
        >>> people.values[1]
        tensor([1.8200, 2.0000, 1.0000], dtype=torch.float64)
        >>> bool(people.frame(people.values).equals(frame))
        True
    """
    rows = rows_of(source)
    with rows.named():
        return _table(rows, dict(families or {}), list(drop))


def _table(rows: TableRows, wanted: dict[str, str], drop: list[str]) -> Table:
    frame = rows.frame
    for name in (*wanted, *drop):
        if name not in frame.columns:
            raise DataError(f"the table has no column {name!r}; it has {', '.join(map(str, frame.columns))}")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise DataError(f"the table has two columns {twice[0]!r}: rename one")
    frame = frame.drop(columns=drop)
    if 0 in frame.shape:
        raise DataError(f"the table is empty: it has {frame.shape[0]} rows and {frame.shape[1]} columns")
    columns = tuple(_column(name, rows, wanted.get(name)) for name in frame.columns)
    values = np.stack([column.codes(frame[column.name], rows) for column in columns], 1)
    return Table(torch.from_numpy(values), columns, frame.index)


def _column(name: Any, rows: TableRows, asked: str | None) -> TableColumn:
    series = rows.frame[name]
    if asked not in (None, "counts", *FAMILIES):
        raise DataError(f"families[{name!r}] must be one of counts, {', '.join(FAMILIES)}; got {asked!r}")
    if series.isna().all():
        raise DataError(f"column {name!r} has no values: leave it out, by drop=[{name!r}]")
    kind = getattr(series.dtype, "kind", "O")
    if kind in "mMc":
        raise DataError(
            f"column {name!r} holds {series.dtype}: make it a number, such as a year, or leave it out, by "
            f"drop=[{name!r}]"
        )
    family, reason = (asked, "asked for") if asked is not None else _propose(name, rows)
    levels = _levels(series) if family in _LEVELLED else ()
    if len(levels) < {"ordinal": 2}.get(family, 0) or (family == "binary" and len(levels) != 2):
        raise DataError(
            f"column {name!r} has {len(levels)} different values, which {family} does not take: choose "
            "categorical, or normal for numbers"
        )
    column = TableColumn(name, series.dtype, "poisson" if family == "counts" else family, reason, levels)
    present = column.codes(series, rows)
    present = present[~np.isnan(present)]
    if family == "counts":
        family, reason = _of_counts(present)
    offset, scale = _units(family, present)
    is_whole = bool((present == np.rint(present)).all())
    return dataclasses.replace(
        column, family=family, reason=reason, offset=offset, scale=scale, is_whole=is_whole
    )


def _propose(name: Any, rows: TableRows) -> tuple[str, str]:
    """Return the family of a column, by the rule of this module, and the reason in words."""
    series = rows.frame[name]
    present = series.dropna()
    levels = _levels(series)
    if series.dtype.kind == "b":
        return "binary", "booleans"
    if len(levels) == 2:
        return "binary", f"two values, {levels[0]} and {levels[1]}"
    if not has_numbers(series):
        if hasattr(series, "cat"):
            ordered = series.cat.ordered
            return ("ordinal", "ordered categories") if ordered else ("categorical", "categories")
        _require_no_stray_text(name, rows)
        if len(levels) > max(_FEW, len(present) / 2):
            raise DataError(
                f"column {name!r} is text with {len(levels)} values in {len(present)} rows, such as "
                f"{levels[0]!r}: leave it out, by drop=[{name!r}], or say that it is meant, by "
                f"families={{{name!r}: 'categorical'}}"
            )
        return "categorical", f"text of {len(levels)} values"
    values = TableColumn(name, series.dtype, "normal", "").codes(series, rows)
    if _seem_to_identify_rows(values):
        logger.warning(
            "column %r holds whole numbers of which no two are the same, as those of rows, customers or "
            "orders: if these mean nothing else, leave it out, by drop=[%r]",
            name,
            name,
        )
    return _of_numbers(values[~np.isnan(values)])


def _require_no_stray_text(name: Any, rows: TableRows) -> None:
    """Raise if a column is one of numbers but for some entries, which would make categories of all numbers.

    Few numbers, such as 0, 1, 2 and "3+", may be meant as categories.
    """
    series = rows.frame[name]
    present = series.dropna()
    numbers = _parsed(present).dropna()
    many = len(numbers) > len(present) / 2 and numbers.nunique() > min(_FEW, len(present) / 2)
    if many and len(numbers) < len(present):
        where = _first_text(series)
        assert where is not None
        raise DataError(
            f"column {name!r} has {series.iloc[where]!r} in {rows.place(where)}, where {len(numbers)} of "
            f"its {len(present)} values are numbers: correct it, leave it empty, make holes of all such "
            f"values, by {rows.as_numbers(name)}, or say that text is meant, by "
            f"families={{{name!r}: 'categorical'}}"
        )


def _parsed(series: Any) -> Any:
    """Return a column of any values as numbers, NaN where they are not."""
    return import_pandas().to_numeric(series, errors="coerce")


def _first_text(series: Any) -> int | None:
    """Return the row of the first value that is neither missing nor a number."""
    rows = np.flatnonzero(series.notna() & _parsed(series).isna())
    return int(rows[0]) if len(rows) else None


def _seem_to_identify_rows(values: NDArray[Any]) -> bool:
    """Return whether numbers are like those that identify rows: whole, and no two the same.

    They ascend, or lie so densely that of as many numbers drawn from their range some would be the same.
    """
    if len(values) <= _FEW or not (values == np.rint(values)).all() or len(np.unique(values)) < len(values):
        return False
    ascend = bool((np.diff(values) > 0).all())
    return ascend or len(values) ** 2 / 2 > _REPEATS * (values.max() - values.min())


def _of_numbers(values: NDArray[Any]) -> tuple[str, str]:
    if (values == np.rint(values)).all() and values.min() == 0:
        return _of_counts(values)
    skewness, heavy = _moment(values, 3), _moment(values, 4) - 3
    if skewness > _SKEWED and values.min() > 0 and abs(_moment(np.log(values), 3)) < skewness:
        return "log-normal", f"positive, of skewness {skewness:.1f}"
    return ("student-t", f"of excess kurtosis {heavy:.1f}") if heavy > _HEAVY else ("normal", "numbers")


def _of_counts(values: NDArray[Any]) -> tuple[str, str]:
    dispersion = values.var() / max(values.mean(), 1e-12)
    family = "negative-binomial" if dispersion > _OVERDISPERSED else "poisson"
    zero = " with a 0" if values.min() == 0 else ""
    return family, f"whole numbers{zero}, of variance {dispersion:.1f} times the mean"


def _moment(values: NDArray[Any], power: int) -> float:
    """Return a standardised central moment, 0 of a constant."""
    spread = values.std()
    return float((((values - values.mean()) / spread) ** power).mean()) if spread > 0 else 0.0


def _levels(series: Any) -> tuple[Any, ...]:
    """Return the values of a column in order: of categories in theirs, of booleans both, of others sorted."""
    if hasattr(series, "cat"):
        return tuple(series.cat.categories.tolist())
    if series.dtype.kind == "b":
        return (False, True)
    found = series.dropna().unique().tolist()
    try:
        return tuple(sorted(found))
    except TypeError:  # of several types
        return tuple(sorted(found, key=str))


def _units(family: str, present: NDArray[Any]) -> tuple[float, float]:
    """Return offset and scale of a column, from its values that are not missing."""
    if family in COUNTS:
        return 0.0, max(float(present.mean()), 1e-3)
    if family in _LEVELLED:
        return 0.0, 1.0
    values = np.log(present) if family == "log-normal" else present
    spread = float(values.std())
    is_constant = spread <= 10 * np.finfo(np.float64).eps * abs(values.mean())
    return float(values.mean()), 1.0 if is_constant else spread


def _pairs(series: Any) -> Any:
    return zip(series.tolist(), series.isna().tolist(), strict=True)
