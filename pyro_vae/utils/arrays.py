"""Arrays, sparse matrices, data frames and image sets as tensors: the same ones wherever data are taken."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.utils.frames import is_frame, is_series, numbers, series_values

__all__ = ["as_tensor", "tensor_of_rows"]


def as_tensor(value: Any, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Return data that have a shape and rows as a tensor, (N, ...), and anything else as it is.

    Args:
        value: An array of NumPy, h5py or zarr, a sparse matrix, a data frame or one of its columns, `Images`.
        dtype: Of floating-point numbers, and of data frames; integers and booleans keep their type.
        device: Of the tensor.

    Raises:
        TypeError: If the data are not numbers.

    Example:
        >>> as_tensor(np.eye(2), dtype=torch.float32)
        tensor([[1., 0.],
                [0., 1.]])
        >>> as_tensor(None, dtype=torch.float32), as_tensor(2.5, dtype=torch.float32)
        (None, 2.5)
    """
    if isinstance(value, Tensor):
        return value
    if is_frame(value):
        rows = numbers(value)
    elif is_series(value):
        rows = series_values(value)
    elif hasattr(value, "__getitem__") and len(getattr(value, "shape", ())) > 0:
        rows = value[:]
    else:
        return value
    return tensor_of_rows(rows, dtype).to(device)


def tensor_of_rows(rows: Any, dtype: torch.dtype) -> Tensor:
    """Return rows that were read, dense or sparse, as a tensor of its own memory.

    Args:
        rows: (N, ...).
        dtype: Of floating-point numbers; others keep their type.

    Raises:
        TypeError: If they are not numbers.
    """
    if not isinstance(rows, Tensor):
        rows = rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows)
        if rows.dtype.kind not in "bfiu":
            raise TypeError(f"data must be numbers; got {rows.dtype}: select or convert columns")
        rows = torch.from_numpy(np.array(rows, dtype=rows.dtype.newbyteorder("="), order="C"))
    return rows.to(dtype) if rows.is_floating_point() else rows
