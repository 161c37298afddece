"""Sources of data: whatever has a length and returns rows by position, in memory or not.

Tensors, `Images`, NumPy arrays and memory maps, h5py and zarr arrays, SciPy sparse matrices, data frames and
map-style torch data sets. Nothing is copied but the rows of a batch.
"""

import math
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pyro_vae.data.images import Images
from pyro_vae.utils.validation import require_floating

__all__ = ["SMALL", "Source", "as_source", "fingerprint", "nbytes"]

SMALL = 2**30  # bytes up to which all of a source is checked and fingerprinted
_BLOCKS = 64  # of a larger one, at fixed places
_CHUNK = 2**24  # bytes


class Source(Protocol):
    """N examples, from which batches are taken by position."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, *event_shape)."""

    @property
    def binarize(self) -> str | None:
        """How grey levels become bits; None if they do not."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the examples at positions (B,), (B, *event_shape); `generator` draws dynamic bits."""


def as_source(data: Any, *, binarize: str | None, seed: int, dtype: torch.dtype) -> Source:
    """Return a source of any supported data.

    Args:
        data: See the module.
        binarize: None, "dynamic", "fixed" or "threshold", as for `Images`; for grey levels in [0, 1].
        seed: Of "fixed" binarisation, which holds all data in memory.
        dtype: Floating-point type of batches from data other than tensors and images.

    Raises:
        TypeError: If the data are of another kind; the message says which way works.
        ValueError: If they have no rows, or `binarize` is unknown or its data lie outside [0, 1].
    """
    if isinstance(data, Images):
        return data if binarize is None else data.binarized(binarize, seed=seed)
    rows = _rows(data, dtype)
    if len(rows) == 0:
        raise ValueError("the data are empty: there must be at least one datum")
    if binarize is None:
        return rows
    if binarize not in ("dynamic", "fixed", "threshold"):
        raise ValueError(f"binarize must be 'dynamic', 'fixed', 'threshold' or None; got {binarize!r}")
    return _Binarised(rows, binarize, seed)


def _rows(data: Any, dtype: torch.dtype) -> "_Rows":
    if isinstance(data, Tensor):
        if data.dim() == 0 or data.layout != torch.strided:
            raise ValueError(
                f"data must be a dense tensor (N, *event_shape); got {data.layout} {tuple(data.shape)}"
            )
        return _TensorRows(data.detach())
    if isinstance(data, DataLoader):
        raise TypeError("data is a DataLoader: pass its dataset (loader.dataset), the batches are made here")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return _DatasetRows(data, dtype)
    if isinstance(data, np.ndarray) and data.ndim > 0 and _is_direct(data, dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of memory that may not be written, nor is
            return _TensorRows(torch.from_numpy(data))
    if len(getattr(data, "shape", ())) > 0 and (hasattr(data, "__getitem__") or hasattr(data, "iloc")):
        return _ArrayRows(data, dtype)
    raise TypeError(
        "data must be a tensor (N, *event_shape), pyro_vae.data.Images, or have a length and return rows by "
        "position (an array, a memory map, h5py, zarr, a sparse matrix, a data frame, a map-style torch "
        f"Dataset); got {type(data).__name__}"
        + (": convert with torch.as_tensor" if isinstance(data, list | tuple) else "")
    )


def _is_direct(array: np.ndarray, dtype: torch.dtype) -> bool:
    """Return whether torch can use the memory of an array as it is."""
    expected = torch.empty((), dtype=dtype).numpy().dtype if dtype != torch.bfloat16 else None
    return array.dtype == expected and array.dtype.isnative and all(step >= 0 for step in array.strides)


class _Rows:
    """Base of all sources but `Images`."""

    shape: Sequence[int]
    binarize: str | None = None
    itemsize = 4  # bytes

    def __len__(self) -> int:
        return self.shape[0]

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError


class _TensorRows(_Rows):
    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.itemsize = tensor, tensor.shape, tensor.dtype.itemsize

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.tensor.index_select(0, index.to(self.tensor.device))


class _ArrayRows(_Rows):
    """Rows of an array that need not be in memory, read in increasing order, as files want it."""

    def __init__(self, array: Any, dtype: torch.dtype):
        self.array, self.dtype, self.shape = array, dtype, tuple(array.shape)
        self.rows = getattr(array, "iloc", getattr(array, "oindex", array))  # of a data frame, of zarr

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        positions, inverse = np.unique(index.numpy(), return_inverse=True)
        rows = self.rows[positions]
        rows = rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows)
        if rows.dtype.kind not in "bfiu":
            raise TypeError(f"data must be numbers; got {rows.dtype}: select or convert columns")
        batch = torch.from_numpy(np.array(rows[inverse], dtype=rows.dtype.newbyteorder("=")))
        return batch.to(self.dtype) if batch.is_floating_point() else batch


class _DatasetRows(_Rows):
    """Items of a map-style torch data set: tensors, or tuples of one."""

    def __init__(self, dataset: Any, dtype: torch.dtype):
        self.dataset, self.dtype = dataset, dtype
        self.shape = (len(dataset), *(self.batch(torch.tensor([0])).shape[1:] if len(dataset) else ()))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        positions = index.tolist()
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(positions)
        else:
            items = [self.dataset[position] for position in positions]
        batch = default_collate(items)
        if isinstance(batch, list | tuple) and len(batch) == 1:
            batch = batch[0]
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"the data set returns {type(items[0]).__name__}s, expected one tensor x per example: wrap "
                "it so that an item is x alone"
            )
        return batch.to(self.dtype) if batch.is_floating_point() else batch


class _Binarised(_Rows):
    """Grey levels in [0, 1] of another source, as bits."""

    def __init__(self, rows: _Rows, mode: str, seed: int):
        self.rows, self.shape, self.binarize, self.itemsize = rows, rows.shape, mode, rows.itemsize
        if mode == "fixed":
            grey = rows.batch(torch.arange(len(rows)))
            self._require_grey(grey)
            generator = torch.Generator(grey.device).manual_seed(seed)
            self.rows = _TensorRows(torch.bernoulli(grey, generator=generator))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        batch = self.rows.batch(index)
        if self.binarize == "fixed":
            return batch
        if self.binarize == "threshold":
            self._require_grey(batch)
            return (batch >= 0.5).to(batch.dtype)
        try:
            return torch.bernoulli(batch, generator=generator)
        except (RuntimeError, NotImplementedError):
            self._require_grey(batch)
            raise

    def _require_grey(self, grey: Tensor) -> None:
        require_floating("data", grey)
        if not ((grey >= 0) & (grey <= 1)).all():
            raise ValueError(
                f"binarize={self.binarize!r} needs grey levels in [0, 1]; got {grey.min():.6g} to "
                f"{grey.max():.6g}: divide those of 0..255 by 255"
            )


def nbytes(source: Source) -> int:
    """Return the number of bytes that all of a source takes."""
    return math.prod(source.shape) * getattr(source, "itemsize", 1)


def fingerprint(source: Source) -> dict[str, Any]:
    """Return plain values that tell a source from others: shape, binarisation and a check sum.

    Up to 1 GiB the check sum is of all rows before dynamic binarisation, above that of 64 blocks of them.
    """
    raw = source.rows if isinstance(source, _Binarised) else source
    row_bytes = max(1, nbytes(source) // len(source))
    size = max(1, _CHUNK // row_bytes)
    starts = range(0, len(source), size)
    if nbytes(source) > SMALL:
        starts = range(0, len(source), -(-len(source) // _BLOCKS))
        size = max(1, min(size, SMALL // (_BLOCKS * row_bytes)))
    checksum = 0
    for start in starts:
        index = torch.arange(start, min(start + size, len(source)))
        rows = raw.pixels[index] if isinstance(raw, Images) else raw.batch(index)
        checksum = zlib.crc32(rows.cpu().contiguous().view(torch.uint8).numpy().data, checksum)
    return {"shape": list(source.shape), "binarize": source.binarize, "checksum": checksum}
