"""Sources of data: whatever has a shape and returns rows by position, in memory or not.

Tensors, `Images`, NumPy arrays and memory maps, h5py and zarr arrays, SciPy sparse matrices, data frames and
map-style torch data sets; and tuples or dicts of these, for programs of several arguments. Nothing is copied
but the rows of a batch, and data frames, which become floating-point numbers once.
"""

import inspect
import math
import random
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pyro_vae.data.images import BINARIZE_MODES, Images
from pyro_vae.data.tables import Table
from pyro_vae.utils.arrays import as_tensor, tensor_of_rows
from pyro_vae.utils.frames import is_frame, is_series, series_values
from pyro_vae.utils.isolation import (
    isolated_generators,
    python_noise,
    restore_python_noise,
    without_autocast,
)
from pyro_vae.utils.validation import require_floating

__all__ = ["CHECKED_IN_FULL", "Batch", "Source", "arguments", "as_source", "check_arguments", "num_rows"]

# of one argument, of several by position, of several by name
Batch = Tensor | tuple[Any, ...] | dict[str, Any]

CHECKED_IN_FULL = 2**30  # bytes up to which all of a source is checked and fingerprinted
_BLOCKS = 64  # of a larger one, at fixed places
_BLOCK_BYTES, _FULL_BLOCK_BYTES = 2**20, 2**24  # of these; of those of a source that is read in full
_MIXED_BYTES, _LEAST_MIXED = 2**25, 4  # of the chunks of a large file that are mixed, and their least number


def as_source(data: Any, *, binarize: str | None, seed: int, dtype: torch.dtype) -> "Source":
    """Return a source of any supported data.

    Args:
        data: See the module.
        binarize: None, "dynamic", "fixed" or "threshold", as for `Images`; for grey levels in [0, 1]. "fixed"
            draws all bits at once and holds them in memory.
        seed: Of "fixed".
        dtype: Floating-point type of batches from data other than tensors and images.

    Raises:
        TypeError: If the data are of another kind; the message says which way works.
        ValueError: If they have no rows, or `binarize` is unknown.
    """
    if isinstance(data, Images):
        return _ImageRows(data if binarize is None else data.binarized(binarize, seed=seed))
    if isinstance(data, tuple | dict) and not hasattr(data, "shape"):
        if binarize is not None:
            raise ValueError(
                f"binarize={binarize!r} goes with data of one argument: give the images among several as "
                f"images.binarized({binarize!r}), or pyro_vae.data.from_array(array).binarized({binarize!r})"
            )
        return _Several(data, dtype, seed)
    source = _rows(data, dtype)
    if len(source) == 0:
        raise ValueError("the data are empty: there must be at least one datum")
    if binarize is None:
        return source
    if binarize not in BINARIZE_MODES:
        raise ValueError(f"binarize must be None or one of {BINARIZE_MODES}; got {binarize!r}")
    return _Binarised(source, binarize, seed)


def _rows(data: Any, dtype: torch.dtype) -> "Source":
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
    if is_frame(data):
        return _TensorRows(as_tensor(data, dtype=dtype))
    if is_series(data):
        data = series_values(data)
    if isinstance(data, np.ndarray) and data.ndim > 0 and _is_direct(data, dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of memory that may not be written, nor is
            return _TensorRows(torch.from_numpy(data))
    if len(getattr(data, "shape", ())) > 0 and hasattr(data, "__getitem__"):
        rows = _ArrayRows(data, dtype)
        chunks = getattr(data, "chunks", None)  # of h5py and zarr; dask has a tuple for each dimension
        stored_by = chunks[0] if isinstance(chunks, tuple) and isinstance(chunks[0], int) else 1
        return _ChunkRows(data, dtype, stored_by) if rows.is_large and stored_by > 1 else rows
    raise TypeError(
        "data must be a tensor (N, *event_shape), pyro_vae.data.Images, or have a shape and return rows by "
        "position (an array, a memory map, h5py, zarr, a sparse matrix, a data frame), or be a map-style "
        f"torch Dataset; got {type(data).__name__}" + _remedy(data)
    )


def _remedy(data: Any) -> str:
    if isinstance(data, Table):
        return ": pass its tensor, table.values"
    if isinstance(data, Real):
        return ": convert lists of numbers with torch.as_tensor"
    if not isinstance(data, list | tuple):
        return ""
    if any(hasattr(item, "shape") for item in data):
        return ": several arguments of a model go in a tuple or a dict"
    return ": convert with torch.as_tensor"


def _is_direct(array: np.ndarray, dtype: torch.dtype) -> bool:
    """Return whether torch can use the memory of an array as it is."""
    expected = torch.empty((), dtype=dtype).numpy().dtype if dtype != torch.bfloat16 else None
    return array.dtype == expected and array.dtype.isnative and all(step >= 0 for step in array.strides)


class Chunks(NamedTuple):
    """How a large file stores its rows: `rows` of them together; and how many chunks an epoch mixes."""

    rows: int
    mixed: int


class Source(ABC):
    """N examples, from which batches are taken by position."""

    shape: Sequence[int]
    """(N, *event_shape)."""
    binarize: str | None = None
    """How grey levels become bits; None if they do not."""
    device = torch.device("cpu")
    """Device of positions and batches."""
    itemsize = 4
    """Bytes of an element."""
    in_memory = False
    """Whether reading a batch takes no time."""
    is_random = False
    """Whether batches depend on the generator."""
    runs_user_code = False
    """Whether reading must not happen in another thread."""
    chunks: Chunks | None = None
    """How rows are stored, where an order must heed it: single rows would each cost a chunk."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of an example."""
        return max(1, math.prod(self.shape[1:]) * self.itemsize)

    @property
    def is_large(self) -> bool:
        """Whether not all of it is read before the first step."""
        return len(self) * self.row_bytes > CHECKED_IN_FULL

    @abstractmethod
    def batch(self, index: Tensor, generator: torch.Generator) -> Any:
        """Return the examples at positions (B,), a `Batch` of tensors (B, *event_shape)."""

    def raw(self, index: Tensor) -> Any:
        """Return the examples as they are stored, for the fingerprint."""
        return self.batch(index, torch.Generator(self.device).manual_seed(0))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell a source from others: shape, binarisation and a check sum.

        Up to 1 GiB the check sum is of all rows before dynamic binarisation, above that of 64 blocks of them.
        """
        size = max(1, (_BLOCK_BYTES if self.is_large else _FULL_BLOCK_BYTES) // self.row_bytes)
        step = -(-len(self) // _BLOCKS) if self.is_large else size
        checksum = 0
        for start in range(0, len(self), step):
            rows = self.raw(torch.arange(start, min(start + size, len(self)), device=self.device))
            for leaf in tree_leaves(rows):
                if isinstance(leaf, Tensor):
                    plain = leaf.cpu().contiguous().flatten().view(torch.uint8)
                    checksum = zlib.crc32(plain.numpy().data, checksum)
        found = {"shape": list(self.shape), "binarize": self.binarize, "checksum": checksum}
        return found if self.chunks is None else {**found, "chunks": list(self.chunks)}


class _ImageRows(Source):
    itemsize = 1

    def __init__(self, images: Images):
        self.images, self.shape, self.device = images, images.shape, images.pixels.device
        # a large one may be a file that is mapped
        self.in_memory = self.device.type != "cpu" or not self.is_large
        self.binarize = images.binarize
        self.is_random = images.binarize == "dynamic"

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.images.batch(index, generator)

    def raw(self, index: Tensor) -> Tensor:
        return self.images.pixels[index]


class _TensorRows(Source):
    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.device = tensor, tensor.shape, tensor.device
        self.itemsize = tensor.dtype.itemsize
        self.in_memory = not self.is_large  # a large one may be a file that is mapped

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.tensor.index_select(0, index)


class _ArrayRows(Source):
    """Rows of an array that need not be in memory, read in increasing order, as files want it."""

    def __init__(self, array: Any, dtype: torch.dtype):
        self.dtype, self.shape = dtype, tuple(array.shape)
        self.indexer = getattr(array, "oindex", array)  # of zarr

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        positions, inverse = np.unique(index.numpy(), return_inverse=True)
        return self._read(positions)[torch.from_numpy(inverse)]

    def _read(self, rows_read: np.ndarray | slice) -> Tensor:
        return tensor_of_rows(self.indexer[rows_read], self.dtype)


class _ChunkRows(_ArrayRows):
    """Rows of a large file that stores them in chunks: these are read whole, and the last ones kept.

    A chunk too large to mix is read in pieces, which keeps memory small.
    """

    def __init__(self, array: Any, dtype: torch.dtype, rows: int):
        super().__init__(array, dtype)
        rows = min(rows, max(1, _MIXED_BYTES // (_LEAST_MIXED * self.row_bytes)))
        mixed = max(_LEAST_MIXED, _MIXED_BYTES // (rows * self.row_bytes))
        self.chunks = self.stored = Chunks(rows, mixed)
        self.kept: OrderedDict[int, Tensor] = OrderedDict()

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        numbers, offsets = index // self.stored.rows, index % self.stored.rows
        found = None
        for number in numbers.unique().tolist():
            chunk, here = self._chunk(number), numbers == number
            if found is None:
                found = chunk.new_empty(len(index), *chunk.shape[1:])
            found[here] = chunk[offsets[here]]
        return self._read(slice(0, 0)) if found is None else found

    def _chunk(self, number: int) -> Tensor:
        if number not in self.kept:
            begin = number * self.stored.rows
            self.kept[number] = self._read(slice(begin, begin + self.stored.rows))
            if len(self.kept) > 3 * self.stored.mixed:  # a part's run of so many rows lies in up to three
                self.kept.popitem(last=False)
        self.kept.move_to_end(number)
        return self.kept[number]


class _DatasetRows(Source):
    """Items of a map-style torch data set: tensors, or tuples of one.

    What its transforms draw, from torch, Python or NumPy, is a function of the batch.
    """

    is_random = runs_user_code = True

    def __init__(self, dataset: Any, dtype: torch.dtype):
        self.dataset, self.dtype = dataset, dtype
        first = self.raw(torch.tensor([0])) if len(dataset) else torch.empty(0)
        self.shape = (len(dataset), *_row_shape(first))

    @without_autocast()  # of a step that reads its parts
    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        noise, seed = python_noise(), generator.initial_seed()
        try:
            with isolated_generators(self.device, seed):
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002 (which a transform may still use)
                items = self._items(index.tolist())
        finally:
            restore_python_noise(noise)
        batch = default_collate(items)
        if isinstance(batch, list | tuple):
            batch = batch[0] if len(batch) == 1 else tuple(batch)
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
            raise TypeError(
                f"an item of the data set must be a tensor, or a tuple or dict of tensors; got {items[0]!r}"
            )
        return tree_map(lambda leaf: leaf.to(self.dtype) if leaf.is_floating_point() else leaf, batch)

    def _items(self, positions: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(positions)
        return [self.dataset[position] for position in positions]


class _Several(Source):
    """A tuple or dict of sources of the same length, or None for an argument that is not there."""

    def __init__(self, data: Any, dtype: torch.dtype, seed: int):
        paths, self.structure = tree_flatten_with_path(data, is_leaf=_is_rows)
        names = [keystr(path) for path, _ in paths]
        self.leaves = [
            None if leaf is None else as_source(leaf, binarize=None, seed=seed, dtype=dtype)
            for _, leaf in paths
        ]
        sources = [leaf for leaf in self.leaves if leaf is not None]
        lengths = {name: len(leaf) for name, leaf in zip(names, self.leaves, strict=True) if leaf is not None}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{name} {length:,}" for name, length in lengths.items()) or "no data"
            raise ValueError(f"the arguments must have the same number of rows; got {found}")
        values = sum(math.prod(source.shape[1:]) for source in sources)
        self.shape, self.device = (len(sources[0]), values), sources[0].device
        self.itemsize = -(-sum(source.row_bytes for source in sources) // max(1, values))
        self.in_memory = all(source.in_memory for source in sources)
        self.is_random = any(source.is_random for source in sources)
        self.runs_user_code = any(source.runs_user_code for source in sources)
        stored = [source.chunks for source in sources if source.chunks is not None]
        self.chunks = max(stored, default=None)

    def batch(self, index: Tensor, generator: torch.Generator) -> Any:
        return self._gather(lambda source, where: source.batch(where, generator), index)

    def raw(self, index: Tensor) -> Any:
        return self._gather(lambda source, where: source.raw(where), index)

    def _gather(self, take: Callable[[Source, Tensor], Any], index: Tensor) -> Any:
        parts = [None if leaf is None else take(leaf, index.to(leaf.device)) for leaf in self.leaves]
        return tree_unflatten(parts, self.structure)


def _is_rows(item: Any) -> bool:
    """Return whether an item of a tuple or dict is a source itself, such as a data frame or a Dataset."""
    return not isinstance(item, tuple | dict | list) or hasattr(item, "shape")


def _row_shape(batch: Any) -> tuple[int, ...]:
    """Return the shape of a row, or the number of its values if it has several parts."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape[1:])
    return (sum(math.prod(leaf.shape[1:]) for leaf in tree_leaves(batch)),)


class Arguments(NamedTuple):
    """A batch of positional and named arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Masked(Source):
    """Another source whose NaN are missing values; see `mark_missing`."""

    def __init__(self, source: Source):
        self.source, self.shape, self.device = source, source.shape, source.device
        self.itemsize, self.in_memory = source.itemsize, source.in_memory
        self.is_random, self.runs_user_code = source.is_random, source.runs_user_code
        self.chunks = source.chunks

    def batch(self, index: Tensor, generator: torch.Generator) -> Any:
        return mark_missing(self.source.batch(index, generator))

    def raw(self, index: Tensor) -> Any:
        return self.source.raw(index)


def mark_missing(batch: Any) -> Any:
    """Return a batch with 0 for NaN in x, and where it was not NaN as a further argument.

    The batch x becomes f(x, observed=...), (x, y) becomes f(x, y, observed=...), and of a dict it is "x", or
    the first entry.
    """
    if isinstance(batch, dict):
        name = "x" if "x" in batch else next(iter(batch))
        x, observed = _fill(batch[name])
        return {**batch, name: x, "observed": observed}
    first, *others = batch if isinstance(batch, tuple) else (batch,)
    x, observed = _fill(first)
    return Arguments((x, *others), {"observed": observed})


def told_of_missing(missing: str | None, pair: Any) -> Callable[..., Any] | None:
    """Return the model of a pair if it is to be told which values are missing, for `Batches`, or None.

    Raises:
        ValueError: If `missing` is neither None nor "nan".
    """
    if missing not in (None, "nan"):
        raise ValueError(f"missing must be None or 'nan', the mark of a missing value; got {missing!r}")
    return None if missing is None else getattr(pair, "written", pair).model


def without_missing(source: Source, model: Callable[..., Any]) -> Source:
    """Return a source with its missing values marked; see `mark_missing`. Raises as `require_observed`."""
    require_observed(model)
    return _Masked(source)


def require_observed(model: Callable[..., Any]) -> None:
    """Raise TypeError if the model takes no argument `observed`."""
    parameters = inspect.signature(model).parameters.values()
    if not any(
        parameter.name == "observed" or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters
    ):
        raise TypeError(
            "missing='nan' calls model(x, observed=...) and guide(x, observed=...), with 0 for NaN in x, and "
            "False there in observed, of the shape of x; this model takes no such argument: add it to both"
        )


def _fill(x: Tensor) -> tuple[Tensor, Tensor]:
    require_floating("data with missing values", x)
    observed = ~x.isnan()
    return torch.where(observed, x, 0.0), observed


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and named arguments of a program for a batch.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.ones(2)
        >>> len(arguments(x)[0]), len(arguments((x, y))[0]), list(arguments({"x": x, "y": y})[1])
        (1, 2, ['x', 'y'])
    """
    if isinstance(batch, Arguments):
        return batch
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def check_arguments(batch: Any) -> None:
    """Raise ValueError if an argument has infinite values, which no program means."""
    for path, leaf in tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.isinf().any():
            index = tuple(leaf.isinf().nonzero()[0].tolist())
            raise ValueError(
                f"x{keystr(path)}{list(index)} is {leaf[index]}: data must be finite (NaN may mean "
                "missing, if the programs take it so)"
            )


def num_rows(batch: Any) -> int:
    """Return the number of examples in a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    leaf = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    if leaf is None:
        raise ValueError("a batch must hold a tensor, whose first dimension counts its examples; got none")
    return len(leaf)


class _Binarised(Source):
    """Grey levels in [0, 1] of another source, as bits."""

    def __init__(self, source: Source, mode: str, seed: int):
        self.source, self.binarize, self.shape, self.device = source, mode, source.shape, source.device
        self.itemsize, self.in_memory = source.itemsize, source.in_memory
        self.runs_user_code, self.chunks = source.runs_user_code, source.chunks
        self.is_random = mode == "dynamic" or source.is_random
        if mode == "fixed":
            generator = torch.Generator(source.device).manual_seed(seed)
            grey = source.batch(torch.arange(len(source), device=source.device), generator)
            self._require_grey(grey)
            self.source, self.in_memory = _TensorRows(torch.bernoulli(grey, generator=generator)), True
            self.is_random, self.runs_user_code, self.chunks = False, False, None

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = self.source.batch(index, generator)
        if self.binarize == "fixed":
            return batch
        if (
            self.binarize == "threshold" or batch.device.type != "cpu"
        ):  # where torch would not say what is wrong
            self._require_grey(batch)
        if self.binarize == "threshold":
            return (batch >= 0.5).to(batch.dtype)
        try:
            return torch.bernoulli(batch, generator=generator)
        except (RuntimeError, NotImplementedError):
            self._require_grey(batch)
            raise

    def raw(self, index: Tensor) -> Tensor:
        return self.source.raw(index)

    def _require_grey(self, grey: Tensor) -> None:
        require_floating("data", grey)
        if not ((grey >= 0) & (grey <= 1)).all():
            divide = "divide those of 0..255 by 255"
            other = (
                "scale each column to [0, 1], or choose another likelihood without binarize, such as Normal"
            )
            raise ValueError(
                f"binarize={self.binarize!r} needs grey levels in [0, 1]; got {grey.min():.6g} to "
                f"{grey.max():.6g}: {divide if grey.min() >= 0 and grey.max() <= 255 else other}"
            )
