"""Minibatches of a source: their order, and their binarisation on the way.

Order and binarisation are functions of the seed, the epoch and the number of the batch alone, so that a run
can be resumed at any batch, and reading ahead changes nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.images import Images
from pyro_vae.data.permutations import permutation
from pyro_vae.data.sources import SMALL, Source, _TensorRows, as_source, fingerprint, nbytes
from pyro_vae.utils.isolation import derived_seed, seed_at

__all__ = ["Batches"]

_ORDER, _BITS, _SPLIT, _FIXED = 10, 11, 12, 13  # streams of random numbers
_CHUNK = 4096  # examples checked at a time
_AHEAD = 2  # batches read before they are needed


class Batches:
    """Data of one run, in batches.

    Args:
        data: Whatever `sources.as_source` takes.
        binarize: None, "dynamic", "fixed" or "threshold"; see `pyro_vae.data.Images`.
        seed: Seed of the order and of the binarisation.
        device: Device of the batches; the data stay on theirs.
        dtype: Floating-point type of batches from data other than tensors and images.

    Raises:
        TypeError: If the data are of an unsupported type, or to be binarised and not floating-point.
        ValueError: If they are empty, or to be binarised and outside [0, 1] or binarised already.

    Example:
        >>> batches = Batches(torch.arange(5.0)[:, None], seed=1)
        >>> [len(batch) for batch in batches.epoch(0, batch_size=2)]
        [2, 3]
    """

    def __init__(
        self,
        data: Any,
        *,
        binarize: str | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        fixed_seed = seed if isinstance(data, Images) else derived_seed(seed, _FIXED)
        source = as_source(data, binarize=binarize, seed=fixed_seed, dtype=dtype or torch.get_default_dtype())
        self._fill(source, lambda positions: positions, len(source), seed, torch.device(device))

    def _fill(
        self,
        source: Source,
        rows: Callable[[Tensor], Tensor],
        length: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.source, self.rows, self.length, self.seed, self.device = source, rows, length, seed, device
        self.bits = torch.Generator(getattr(source, "pixels", torch.empty(0)).device)
        if isinstance(source, _TensorRows):
            self.bits = torch.Generator(source.tensor.device)
        self.unchecked: Callable[[Tensor], None] | None = None

    def __len__(self) -> int:
        return self.length

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *event_shape)."""
        return (self.length, *self.source.shape[1:])

    def split(self, fraction: float) -> tuple["Batches", "Batches"]:
        """Hold out a random fraction of the data, by position: the rest, and the held-out part.

        Raises:
            ValueError: If either part would be empty.
        """
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"a validation fraction of {fraction} of {len(self)} data leaves {count} for validation "
                f"and {len(self) - count} for training; both need at least 1"
            )
        order = permutation(len(self), derived_seed(self.seed, _SPLIT, 0))
        train = self._part(lambda positions: order(positions + count), len(self) - count, 0)
        return train, self._part(order, count, 1)

    def first(self, count: int) -> "Batches":
        """Return the first `count` examples, or all if there are fewer, with the same seed."""
        part = object.__new__(Batches)
        part._fill(self.source, self.rows, min(count, len(self)), self.seed, self.device)
        return part

    def _part(self, order: Callable[[Tensor], Tensor], length: int, number: int) -> "Batches":
        part = object.__new__(Batches)
        seed = derived_seed(self.seed, _SPLIT, number)
        part._fill(self.source, lambda positions: self.rows(order(positions)), length, seed, self.device)
        return part

    def lengths(self, batch_size: int) -> list[int]:
        """Return the lengths of the batches of an epoch.

        The last may be smaller. A single example left over joins the batch before it: batch normalisation
        cannot train on one, and its gradient would be mostly noise.

        Example:
            >>> Batches(torch.zeros(7, 2)).lengths(3), Batches(torch.zeros(8, 2)).lengths(3)
            ([3, 4], [3, 3, 2])
        """
        full, rest = divmod(len(self), batch_size)
        lengths = [batch_size] * full
        if rest == 1 and full:
            lengths[-1] += 1
        elif rest:
            lengths.append(rest)
        return lengths

    def epoch(self, number: int, *, batch_size: int, start: int = 0) -> Iterator[Tensor]:
        """Yield the batches (B, *event_shape) of a pass in random order, from the batch `start` on."""
        order = permutation(len(self), derived_seed(self.seed, _ORDER, number))
        bits = derived_seed(self.seed, _BITS, number)
        lengths = self.lengths(batch_size)

        def batch(which: int) -> Tensor:
            begin = which * batch_size
            return self._at(order(torch.arange(begin, begin + lengths[which])), seed_at(bits, which))

        yield from self._ahead(batch, range(start, len(lengths)))
        self.unchecked = None  # all have been seen

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the batches (B, *event_shape) of a pass in the order of the data."""
        bits = derived_seed(self.seed, _BITS)  # the same at each pass

        def batch(which: int) -> Tensor:
            begin = which * batch_size
            positions = torch.arange(begin, min(begin + batch_size, len(self)))
            return self._at(positions, seed_at(bits, which))

        yield from self._ahead(batch, range(-(-len(self) // batch_size)))

    def _at(self, positions: Tensor, seed: int) -> Tensor:
        if self.source.binarize == "dynamic":
            self.bits.manual_seed(seed)
        return self.source.batch(self.rows(positions).to(self.bits.device), self.bits).to(self.device)

    def _ahead(self, batch: Callable[[int], Tensor], numbers: range) -> Iterator[Tensor]:
        """Yield the batches of these numbers; what is not in memory is read ahead by a thread."""
        if isinstance(self.source, _TensorRows | Images) and nbytes(self.source) <= SMALL:
            yield from map(batch, numbers)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: deque[Future[Tensor]] = deque()
            try:
                for number in numbers:
                    waiting.append(reader.submit(batch, number))
                    if len(waiting) > _AHEAD:
                        yield self._checked(waiting.popleft().result())
                while waiting:
                    yield self._checked(waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def _checked(self, batch: Tensor) -> Tensor:
        if self.unchecked is not None:
            self.unchecked(batch)
        return batch

    def check(self, check_data: Callable[[Tensor], None]) -> None:
        """Pass all the data to a check, in chunks; of data that are binarised on the way, the first ones.

        Of data above 1 GiB the first chunk is checked now, the others when they are first read.

        Raises:
            ValueError: Of the check, with the first index of the chunk that it refers to.
        """
        for number, chunk in enumerate(self.in_order(_CHUNK)):
            try:
                check_data(chunk)
            except ValueError as error:
                if number:
                    raise ValueError(f"{error} (counting from example {number * _CHUNK})") from error
                raise
            if self.source.binarize == "dynamic" and isinstance(self.source, Images):
                break
            if nbytes(self.source) > SMALL:
                self.unchecked = check_data
                break

    def describe(self) -> dict[str, Any]:
        """Return plain values that tell these data from others; see `sources.fingerprint`."""
        return {**fingerprint(self.source), "length": len(self)}
