"""Data as symbols 0 … L − 1, and back, to the last bit."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.applications.codec.errors import CodecError
from pyro_vae.applications.codec.file import DTYPES
from pyro_vae.applications.codec.integer_probabilities import CountTables, LogisticTables
from pyro_vae.applications.codec.lattice_model import LatticeModel, symbol_type
from pyro_vae.data.images import Images
from pyro_vae.utils.validation import to_shape

__all__ = ["from_symbols", "row_size", "to_symbols"]


def to_symbols(model: LatticeModel, x: Any) -> tuple[np.ndarray, str]:
    """Return symbols (N, D) of data (N, *event_shape), and the name of the data's type.

    Floats are values of the likelihood's support: 0 and 1, counts, or grey levels k/255 in their type.
    Integers are symbols: bits, counts, or grey levels k.

    Raises:
        TypeError: If x is neither a tensor nor an array, nor images, or of a type that a file cannot name.
        ValueError: If x has another shape; a `CodecError` if the symbols do not give each value back exactly,
            as for NaN and values outside the support; the message names the first.
    """
    array = _array(x)
    if array.shape[1:] != model.event_shape or array.ndim == 0:
        raise ValueError(
            f"x must have shape (N, {', '.join(map(str, model.event_shape))}); got {array.shape}: "
            f"{to_shape('x', array.shape, model.event_shape, 'the model')}"
        )
    flat = array.reshape(len(array), model.size)
    is_grey = isinstance(model.tables, LogisticTables) and flat.dtype.kind == "f"
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.rint(flat.astype(np.float64) * 255) if is_grey else flat
        valid = (levels >= 0) & (levels < model.tables.levels)
        symbols = np.where(valid, levels, 0).astype(symbol_type(model.tables.levels))
    valid &= from_symbols(model, symbols, flat.dtype.name, (model.size,)) == flat
    if not valid.all():
        row, place = np.argwhere(~valid)[0]
        index = [int(row), *map(int, np.unravel_index(place, model.event_shape))]
        raise CodecError(
            f"x{index} = {flat[row, place]} cannot be coded exactly: expected "
            f"{_expected(model, is_grey)}; {(~valid).sum()} of {valid.size} values are others"
        )
    return symbols, flat.dtype.name


def from_symbols(model: LatticeModel, symbols: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return data (N, *shape) of a type from symbols (N, D); the inverse of `to_symbols`."""
    values = symbols.astype(dtype)
    if isinstance(model.tables, LogisticTables) and values.dtype.kind == "f":
        values /= values.dtype.type(255)
    return values.reshape(len(symbols), *shape)


def _array(x: Any) -> np.ndarray:
    if isinstance(x, Images):
        if x.binarize == "dynamic":
            raise ValueError(
                'images binarised dynamically are drawn at every access: use binarize="fixed" or "threshold"'
            )
        x = x[:]
    if isinstance(x, Tensor):
        if x.dtype == torch.bfloat16:
            raise TypeError("x is torch.bfloat16, which NumPy lacks: convert it by x.float()")
        x = x.detach().cpu().numpy()
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x must be a tensor, a NumPy array or pyro_vae.data.Images; got {type(x).__name__}")
    if x.dtype.name not in DTYPES:
        raise TypeError(f"x has type {x.dtype}; expected one of {', '.join(DTYPES)}")
    return x


def _expected(model: LatticeModel, is_grey: bool) -> str:
    if is_grey:
        return "grey levels k / 255, as pyro_vae.data.Images gives them"
    largest = model.tables.levels - 1
    advice = " (max_count= sets the largest)" if isinstance(model.tables, CountTables) else ""
    return f"whole numbers from 0 to {largest}{advice}"


def row_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an uncompressed row."""
    return np.dtype(dtype).itemsize * math.prod(shape)
