"""Data frames of pandas or polars: their columns as numbers, and copies with other values.

Neither library is imported: a frame is known by its methods. Shapes: N rows, D columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "column_names",
    "columns_of",
    "columns_trained_on",
    "filled",
    "frame_like",
    "has_numbers",
    "is_frame",
    "is_series",
    "note_columns",
    "numbers",
    "remember_columns",
    "require_columns",
    "series_values",
]

_NUMBERS = "biuf"  # kinds of types: booleans, integers, floats
_SHOWN = 5  # names in a message
_NAMES = "_columns_trained_on"  # an attribute that no module of a user has


def is_frame(data: Any) -> bool:
    """Return whether data are a data frame."""
    return hasattr(data, "columns") and (_is_pandas(data) or hasattr(data, "get_columns"))


def is_series(data: Any) -> bool:
    """Return whether data are one column of pandas."""
    return _is_pandas(data) and not hasattr(data, "columns")


def _is_pandas(data: Any) -> bool:
    return hasattr(data, "iloc") and hasattr(data, "to_numpy")


def columns_of(frame: Any) -> list[tuple[str, Any]]:
    """Return the columns by position, each with its name as text."""
    found = (
        [frame.iloc[:, place] for place in range(frame.shape[1])]
        if _is_pandas(frame)
        else frame.get_columns()
    )
    return [(str(name), column) for name, column in zip(frame.columns, found, strict=True)]


def column_names(data: Any) -> list[str] | None:
    """Return the names of the columns of a frame, None of other data."""
    return [name for name, _ in columns_of(data)] if is_frame(data) else None


def remember_columns(trained: Any, data: Any) -> None:
    """Note at what is trained the columns of a frame, which other frames must have; forget those before."""
    note_columns(trained, column_names(data))


def note_columns(trained: Any, names: list[str] | None) -> None:
    """Note names of columns at what was trained on them; forget those before."""
    if names is not None or hasattr(trained, _NAMES):
        setattr(trained, _NAMES, names)


def columns_trained_on(trained: Any) -> list[str] | None:
    """Return what `note_columns` noted, or None."""
    return getattr(trained, _NAMES, None)


def require_columns(expected: list[str] | None, data: Any) -> None:
    """Raise ValueError if data are a frame of other columns than those trained on, or in another order."""
    found = column_names(data)
    if expected is None or found is None or found == expected:
        return
    remedy = f"pass frame[{expected}]" if set(expected) <= set(found) else "pass a frame of these"
    raise ValueError(f"training was on the columns {expected}, in this order; got {found}: {remedy}")


def has_numbers(column: Any) -> bool:
    """Return whether the type of a column is that of numbers or booleans."""
    if _is_pandas(column):
        return getattr(column.dtype, "kind", "O") in _NUMBERS
    return column.dtype.is_numeric() or str(column.dtype) == "Boolean"


def numbers(frame: Any) -> NDArray[Any]:
    """Return the values of a frame, float64 (N, D), NaN where missing; of booleans 0 and 1.

    Raises:
        TypeError: If the columns of a frame are not numbers; the message names them.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"age": [31, 48], "wage": [2.5, None], "insured": [True, False]})
        >>> numbers(frame)
        array([[31. ,  2.5,  1. ],
               [48. ,  nan,  0. ]])
    """
    columns = columns_of(frame)
    others = {name: str(column.dtype) for name, column in columns if not has_numbers(column)}
    if others:
        names = [*others][:_SHOWN]
        more = ", …" * (len(others) > _SHOWN)
        listed = ", ".join(f"{name!r} ({others[name]})" for name in names) + more
        drop = f"frame.drop({'columns=' * _is_pandas(frame)}[{', '.join(map(repr, names))}{more}])"
        raise TypeError(
            f"data must be numbers; got the column{'s' * (len(others) > 1)} {listed}: pyro_vae.data.table "
            f"takes columns of any type; or leave out what is not numbers, by {drop}"
        )
    values = np.empty((len(frame), len(columns)))
    for place, (_, column) in enumerate(columns):
        values[:, place] = series_values(column, dtype=np.float64)
    return values


def series_values(column: Any, dtype: Any = None) -> NDArray[Any]:
    """Return the values of a column of numbers, (N,): of its own type if that has no missing ones.

    Raises:
        TypeError: If they are not numbers.
    """
    if not has_numbers(column):
        raise TypeError(
            f"data must be numbers; got a column of {column.dtype}: convert it, as to the codes of "
            "pandas.factorize(column)[0]"
        )
    if not _is_pandas(column):
        return np.asarray(column.to_numpy()).astype(np.float64)  # of objects, where booleans are missing
    if dtype is None and not isinstance(column.dtype, np.dtype):
        is_whole = column.dtype.kind != "f" and not column.isna().any()
        dtype = {"b": np.bool_, "i": np.int64, "u": np.uint64}[column.dtype.kind] if is_whole else np.float64
    return column.to_numpy(dtype=dtype, na_value=np.nan) if dtype == np.float64 else column.to_numpy(dtype)


def frame_like(frame: Any, values: NDArray[Any]) -> Any:
    """Return a frame of values (N, D) with the columns of another, and its index."""
    if _is_pandas(frame):
        return type(frame)(values, index=frame.index, columns=frame.columns)
    return type(frame)(values, schema=list(frame.columns))


def filled(frame: Any, values: NDArray[Any], positions: Sequence[int] | None = None) -> Any:
    """Return a copy of a frame with values (N, D) where it has holes; the rest is as it was, to the bit.

    Columns of integers or booleans become fractional where they have holes, and no others.

    Args:
        frame: The frame.
        values: (N, D), in the order of the columns, or of those at `positions` alone.
        positions: Of the columns to fill; by default all.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"age": [31, 48], "wage": [2.5, None]}, index=["Ann", "Bo"])
        >>> filled(frame, np.full((2, 2), 1.5))
             age  wage
        Ann   31   2.5
        Bo    48   1.5
    """
    found = frame.copy() if _is_pandas(frame) else frame.clone()
    columns = [column for _, column in columns_of(frame)]
    for place, filling in zip(range(len(columns)) if positions is None else positions, values.T, strict=True):
        column = columns[place]
        known = series_values(column, dtype=np.float64)
        holes = np.isnan(known)
        if not holes.any():
            continue
        dtype = np.float32 if str(column.dtype).lower() == "float32" else np.float64
        if _is_pandas(frame):
            fractional = column if column.dtype.kind == "f" else column.astype("Float64")
            found.isetitem(place, fractional.mask(holes, filling.astype(dtype)))
        else:
            whole = np.where(holes, filling, known).astype(dtype)
            found = found.with_columns(type(column)(column.name, whole))
    return found
