"""Data by path: arrays, tables, folders of images, names of published sets; as a VAE takes them."""

import argparse
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vae.applications.commands.model_file import Model
from pyro_vae.applications.commands.tables import ARRAYS, TABLES, Table, read_table
from pyro_vae.data import Images, from_array, load
from pyro_vae.utils.serialization import replacing

__all__ = [
    "Data",
    "fill",
    "for_model",
    "load_array",
    "numbers",
    "open_arrays",
    "read_data",
    "require_complete",
]

_ARRAYS_OF_IMAGES = ("x", "images", "train", "x_train", "data")  # names of arrays in .npz files


@dataclass(frozen=True)
class Data:
    """Examples from a file, a folder or a published set.

    Attributes:
        name: What the user calls them.
        values: `Images`, or an array (N, ...) of numbers.
        grey: Whether the values are grey levels in [0, 1].
        table: The table that an array comes from.
        positions: Of the columns in it.
        array: Name of the array in a .npz file.
    """

    name: str
    values: Images | NDArray[Any]
    grey: bool = False
    table: Table | None = None
    positions: list[int] = field(default_factory=list)
    array: str = ""

    @property
    def columns(self) -> list[str] | None:
        """Names of the columns, if they have any."""
        if self.table is None or self.table.names is None:
            return None
        return [self.table.names[position] for position in self.positions]

    def place(self, index: tuple[int, ...]) -> str:
        """Return how messages call a value."""
        if self.table is not None:
            return self.table.place(index[0], self.positions[index[1]])
        return f"the value at {list(index)} of {self.name} (counted from 0)"


def read_data(
    name: str,
    args: argparse.Namespace,
    *,
    split: str | None = None,
    model: Model | None = None,
    columns: list[str] | None = None,
) -> Data:
    """Read data by path or name: the columns of a model, or others by their names, or all but --drop.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the data are damaged, unknown, or of another kind.
        ImportError: If a file needs a package that is not installed.
    """
    suffix = Path(name).suffix.lower()
    if suffix in TABLES:
        known = columns if model is None else model.kind.columns
        table = read_table(Path(name))
        positions = table.select(None if table.names is None else known, args.drop)
        return _of_table(table, name, positions, empty=_empty_cells(args, model))
    if args.drop:
        raise ValueError(f"--drop is for tables with named columns; {name} is not one")
    if suffix in ARRAYS:
        key, array = load_array(Path(name), args.array)
        return _of_array(name, array, key, counts=_are_counts(args, model))
    images = load(name, split=split or args.split, size=args.size, mode=args.mode)
    return Data(name, images, grey=True)


def _are_counts(args: argparse.Namespace, model: Model | None) -> bool:
    if model is not None:
        return model.counts
    return getattr(args, "likelihood", None) in ("poisson", "negative-binomial")


def _empty_cells(args: argparse.Namespace, model: Model | None) -> str:
    """Return how a cell may be left empty, for messages: "" under a command that takes complete rows."""
    if hasattr(args, "reference"):
        return ""
    known = getattr(args, "missing", "nan") or (model is not None and model.kind.missing)
    return "leave the cell empty" + ("" if known else " and add --missing nan")


def _of_table(table: Table, name: str, positions: list[int], *, empty: str) -> Data:
    if not positions:
        raise ValueError(f"{name} has no columns left")
    values = np.stack([table.numbers(column, empty=empty) for column in positions], 1)
    data = Data(name, values, table=table, positions=positions)
    _require_not_infinite(data, empty)
    return data


def _require_not_infinite(data: Data, empty: str = "") -> None:
    infinite = np.argwhere(np.isinf(np.asarray(data.values)))
    if len(infinite):
        remedy = "correct it" + f", or {empty}" * bool(empty)
        raise ValueError(f"{data.place(tuple(infinite[0]))} is infinite: {remedy}")


def load_array(path: Path, wanted: str = "") -> tuple[str, NDArray[Any]]:
    """Return an array of a .npz file with its name, or that of a .npy file, mapped into memory.

    Raises:
        ValueError: If the file holds no array of numbers, or several and none is named.
    """
    found = open_arrays(path)
    if isinstance(found, np.ndarray):
        key, array = "", found
    else:
        with found:
            key = _key(path, found.files, wanted)
            array = _reading(path, lambda: found[key])
    if array.dtype.kind not in "biuf" or array.ndim == 0 or 0 in array.shape:
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; expected numbers, (N, ...)")
    return key, array


def open_arrays(path: Path) -> Any:
    """Return the array of a .npy file, mapped into memory, or NumPy's reader of a .npz file.

    Raises:
        ValueError: If it is neither.
    """

    def read() -> Any:
        with path.open("rb") as file:
            if file.read(2) == b"PK" and not zipfile.is_zipfile(file):
                raise ValueError("it is cut short")  # NumPy would leave it open
        return np.load(path, mmap_mode="r", allow_pickle=False)

    return _reading(path, read)


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error) or "it is empty"
        raise ValueError(f"{path} is not a {path.suffix} file of numbers: {reason}") from error


def _key(path: Path, names: list[str], wanted: str) -> str:
    if wanted in names:
        return wanted
    known = [name for name in _ARRAYS_OF_IMAGES if name in names]
    if not wanted and (len(names) == 1 or known):
        return (known or names)[0]
    said = f"no array {wanted!r}, but " if wanted else ""
    raise ValueError(f"{path} holds {said}the arrays {', '.join(names)}: choose one by --array NAME")


def _of_array(name: str, array: NDArray[Any], key: str, *, counts: bool) -> Data:
    """Return an array as data; unsigned bytes with values above 1 are grey levels k/255."""
    if array.ndim == 1:
        raise ValueError(f"{name} holds one number per example, {array.shape}; expected (N, D) or more")
    if array.dtype == np.uint8 and not counts:
        if array.ndim in (3, 4):
            return Data(name, from_array(array, name=name), grey=True, array=key)
        if array.max() > 1:
            return Data(name, array / np.float32(255), grey=True, array=key)
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    data = Data(name, array, grey=_in_unit_interval(array), array=key)
    _require_not_infinite(data)
    return data


def _in_unit_interval(array: NDArray[Any]) -> bool:
    present = array[~np.isnan(array)]
    return len(present) > 0 and bool(present.min() >= 0 and present.max() <= 1)


def require_complete(data: Data, remedy: str) -> None:
    """Raise if a value is NaN."""
    if isinstance(data.values, Images):
        return
    missing = np.argwhere(np.isnan(data.values))
    if len(missing):
        raise ValueError(f"{data.place(tuple(missing[0]))} is missing: {remedy}")


def numbers(data: Data, dtype: torch.dtype) -> Tensor | Images:
    """Return data as `fit` takes them."""
    if isinstance(data.values, Images):
        return data.values
    return torch.as_tensor(np.array(data.values), dtype=dtype)


def for_model(data: Data, model: Model) -> Any:
    """Return data in the shape, the type and on the device of a model.

    Raises:
        ValueError: If an example has another size.
    """
    x = numbers(data, model.dtype)
    if math.prod(x.shape[1:]) != math.prod(model.event_shape):
        found = f"{x.shape[1]} columns" if data.table is not None else f"examples of {tuple(x.shape[1:])}"
        raise ValueError(f"{data.name} has {found}; the model {model.path} takes {model.event_shape}")
    if isinstance(x, Images):
        if tuple(x.shape[1:]) == model.event_shape:
            return x.to(model.device)
        x = x[:].to(model.dtype)
    return x.reshape(len(x), *model.event_shape).to(model.device)


def fill(data: Data, path: Path, filled: NDArray[Any]) -> None:
    """Write data with values (N, ...) in the place of NaN, in the format that they were read in."""
    if data.table is not None:
        data.table.write_filled(path, data.positions, filled)
        return
    source = data.values
    assert not isinstance(source, Images)
    whole = np.where(np.isnan(source), filled.reshape(source.shape).astype(source.dtype), source)
    with replacing(path) as partial, partial.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, whole)
        else:
            with np.load(data.name, allow_pickle=False) as arrays:
                np.savez(file, **{**arrays, data.array: whole})
