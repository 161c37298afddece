"""Columns of a table: the family of each, and the values that it can have.

| family | values |
|---|---|
| normal, student-t | real |
| log-normal | positive |
| poisson, negative-binomial | 0, 1, 2, … |
| binary | 0, 1 |
| categorical, ordinal | the codes 0 … k − 1 of k levels |
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.utils.validation import require_count

__all__ = ["COUNTS", "FAMILIES", "LEVELS", "REAL", "Column", "ColumnValues", "parse_columns", "parse_units"]

REAL = ("normal", "log-normal", "student-t")
COUNTS = ("poisson", "negative-binomial")
LEVELS = ("categorical", "ordinal")
FAMILIES = (*REAL, *COUNTS, "binary", *LEVELS)


class Column(NamedTuple):
    """Family of a column, and its number of levels k, or 0."""

    family: str
    levels: int = 0

    @property
    def values(self) -> str:
        """The values that it can have, in words."""
        if self.family in REAL:
            return "a positive number" if self.family == "log-normal" else "a finite number"
        if self.family in COUNTS:
            return "a whole number ≥ 0"
        return "0 or 1" if self.family == "binary" else f"a code 0 … {self.levels - 1}"


def parse_columns(columns: Any) -> list[Column]:
    """Return columns from names of families, and (name, k) where there are levels.

    Raises:
        TypeError: If an entry is neither.
        ValueError: If there are none, a family is unknown, or the number of levels is missing or unwanted.

    Example:
        >>> parse_columns(["normal", ("categorical", 3)])[1]
        Column(family='categorical', levels=3)
    """
    if isinstance(columns, str) or not isinstance(columns, Sequence):
        raise TypeError(f'columns must be a list such as ["normal", ("categorical", 3)]; got {columns!r}')
    if not columns:
        raise ValueError("columns is empty: name the family of at least one column")
    return [_parse(f"columns[{place}]", entry) for place, entry in enumerate(columns)]


def _parse(name: str, entry: Any) -> Column:
    given = (entry,) if isinstance(entry, str) else entry
    if not (isinstance(given, tuple | list) and len(given) in (1, 2) and isinstance(given[0], str)):
        raise TypeError(f"{name} must be the name of a family, or (name, number of levels); got {entry!r}")
    family, *levels = given
    if family not in FAMILIES:
        raise ValueError(f"{name} must be one of {', '.join(FAMILIES)}; got {family!r}")
    if (family in LEVELS) != (len(levels) == 1):
        cure = f"write ({family!r}, k)" if family in LEVELS else f"write {family!r}"
        raise ValueError(f"{name} = {entry!r}: categorical and ordinal columns have levels, no other: {cure}")
    if levels:
        require_count(f"the number of levels of {name}", levels[0], minimum=2 if family == "ordinal" else 1)
    return Column(family, *levels)


def parse_units(columns: Sequence[Column], offset: Any, scale: Any) -> tuple[Tensor, Tensor]:
    """Return offset and scale of each column, float64 (D,); by default 0 and 1.

    Raises:
        ValueError: If there is not one number per column, one is not finite, or a scale is not positive.
    """
    found = []
    for name, values, default in (("offset", offset, 0.0), ("scale", scale, 1.0)):
        numbers = torch.as_tensor([default] * len(columns) if values is None else values, dtype=torch.float64)
        if numbers.shape != (len(columns),):
            raise ValueError(f"{name} must have {len(columns)} numbers, one per column; got {values!r}")
        if not numbers.isfinite().all() or (name == "scale" and not (numbers > 0).all()):
            raise ValueError(f"{name} must be finite{', and positive' * (name == 'scale')}; got {values!r}")
        found.append(numbers)
    return found[0], found[1]


class ColumnValues(constraints.Constraint):
    """The values that D columns can have.

    Args:
        columns: The columns.
        names: Their names, for messages; by default their positions.

    Example:
        >>> support = ColumnValues([Column("normal"), Column("categorical", 3)])
        >>> support.check(torch.tensor([[-1.5, 2.0], [torch.nan, 3.0]]))
        tensor([[ True,  True],
                [False, False]])
    """

    def __init__(self, columns: Sequence[Column], names: Sequence[str] | None = None):
        self.columns = tuple(columns)
        self.names = tuple(names or map(str, range(len(columns))))
        families = [column.family for column in columns]
        most = {"binary": 1.0, **dict.fromkeys(LEVELS, 0.0)}
        self.least = torch.tensor([-torch.inf if family in REAL else 0.0 for family in families])
        self.most = torch.tensor([most.get(c.family, torch.inf) + max(0, c.levels - 1) for c in columns])
        self.is_whole = torch.tensor([family not in REAL for family in families])
        self.is_positive = torch.tensor([family == "log-normal" for family in families])
        self.is_discrete = bool(self.is_whole.all())
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return for each value (*, D) whether it is possible; a number alone is checked for every column."""
        least, most, is_whole, is_positive = (
            part.to(value.device) for part in (self.least, self.most, self.is_whole, self.is_positive)
        )
        inside = value.isfinite() & (value >= least) & (value <= most)
        return inside & (~is_whole | (value == value.round())) & (~is_positive | (value > 0))

    def at(self, index: Sequence[int]) -> str:
        """Return in words which values there can be at an index (…, column)."""
        column = self.columns[index[-1]]
        return f"{column.values}, as column {self.names[index[-1]]!r} is {column.family}"
