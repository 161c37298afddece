"""Minibatches of a source: their order, and their binarisation on the way.

A batch is a tensor, or a tuple or dict of tensors: one argument of a program, or several. Order and
binarisation are functions of the seed, the epoch and the number of the batch alone, so that a run
can be resumed at any batch, and reading ahead changes nothing.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_vae.data.balance import Balance
from pyro_vae.data.images import Images
from pyro_vae.data.permutations import Order, hold_out_evenly, permutation, permutation_by_chunks
from pyro_vae.data.sources import Arguments, Source, as_source, num_rows, without_missing
from pyro_vae.utils.isolation import derived_seed, seed_at

__all__ = ["Batches", "row_in"]

_ORDER, _BITS, _SPLIT, _FIXED, _PARTS = 10, 11, 12, 13, 14  # streams of random numbers
_CHUNK, _CHUNK_BYTES = 4096, 2**26  # examples checked at a time, and the bytes that they may take
_INDEX = r"(x(?:\['?\w+'?\])?\[)(\d+)(?=[,\]])"  # of an example, after that of its argument, if any
_COUNT = r"\d+ of \d+ (values|events of shape \([\d, ]*\)) do"
_AHEAD = 2  # batches read before they are needed


class Batches:
    """Data of one run, in batches.

    Args:
        data: Whatever `sources.as_source` takes.
        binarize: None, "dynamic", "fixed" or "threshold"; see `pyro_vae.data.Images`.
        seed: Seed of the order and of the binarisation.
        device: Device of the batches; the data stay on theirs.
        dtype: Floating-point type of batches from data other than tensors and images.
        missing_for: The model, if NaN means missing: it gets the mask as a further argument.

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
        missing_for: Callable[..., Any] | None = None,
    ):
        fixed = seed if isinstance(data, Images) else derived_seed(seed, _FIXED)  # as `Images.binarized`
        source = as_source(data, binarize=binarize, seed=fixed, dtype=dtype or torch.get_default_dtype())
        if missing_for is not None:
            source = without_missing(source, missing_for)
        self._fill(source, lambda positions: positions, len(source), seed, torch.device(device))

    def _fill(
        self,
        source: Source,
        rows_of: Order,
        length: int,
        seed: int,
        device: torch.device,
    ) -> "Batches":
        self.source, self.rows_of, self.length, self.seed, self.device = source, rows_of, length, seed, device
        self.generator = torch.Generator(source.device)
        self.unchecked: Callable[[Any], None] | None = None
        self.balance: Balance | None = None
        return self

    def __len__(self) -> int:
        return self.length

    def usual_batch(self, largest: int) -> int:
        """Return the length of a batch where none is asked for."""
        return min(largest, len(self))

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
        seed = derived_seed(self.seed, _SPLIT)
        if self.source.chunks is not None:  # both parts lie as the file does
            kept, held_out = hold_out_evenly(len(self), count, seed)
        else:
            held_out = permutation(len(self), seed)
            kept = lambda positions: held_out(positions + count)  # noqa: E731
        return self._part(kept, len(self) - count, 0), self._part(held_out, count, 1)

    def first(self, count: int) -> "Batches":
        """Return the first `count` examples, or all if there are fewer, with the same seed."""
        part = object.__new__(Batches)
        return part._fill(self.source, self.rows_of, min(count, len(self)), self.seed, self.device)

    def _part(self, order: Order, length: int, number: int) -> "Batches":
        part, seed = object.__new__(Batches), derived_seed(self.seed, _PARTS, number)
        return part._fill(
            self.source, lambda positions: self.rows_of(order(positions)), length, seed, self.device
        )

    def lengths(self, batch_size: int) -> list[int]:
        """Return the lengths of the batches of an epoch.

        The last may be smaller. A single example left over joins the batch before it: batch normalisation
        cannot train on one, and its gradient would be mostly noise.

        Example:
            >>> Batches(torch.zeros(7, 2)).lengths(3), Batches(torch.zeros(8, 2)).lengths(3)
            ([3, 4], [3, 3, 2])
        """
        if self._is_balanced(batch_size):
            return cast(Balance, self.balance).lengths(batch_size)
        full, rest = divmod(len(self), batch_size)
        lengths = [batch_size] * full
        if rest == 1 and full:
            lengths[-1] += 1
        elif rest:
            lengths.append(rest)
        return lengths

    def epoch(self, number: int, *, batch_size: int, start: int = 0) -> Iterator[Any]:
        """Yield the batches (B, *event_shape) of a pass in random order, from the batch `start` on.

        A batch of all the data keeps their order, as parameters of single examples in a guide need. With a
        `balance`, batches have one more argument, weight (B,).
        """
        bits = partial(seed_at, derived_seed(self.seed, _BITS, number))
        lengths = self.lengths(batch_size)
        if self._is_balanced(batch_size):
            balance = cast(Balance, self.balance)
            positions_of = balance.positions(batch_size, derived_seed(self.seed, _ORDER, number))
            for batch in self._read(positions_of, bits, range(start, len(lengths))):
                yield _with_weight(batch, balance.weights(batch_size, num_rows(batch)))
            return
        order = self._order(number, batch_size)

        def positions(which: int) -> Tensor:
            begin = which * batch_size
            return order(torch.arange(begin, begin + lengths[which]))

        yield from self._read(positions, bits, range(start, len(lengths)))

    def epoch_in_shards(
        self, number: int, *, batch_size: int, shards: range, num_shards: int, start: int = 0
    ) -> Iterator[list[tuple[int, Any]]]:
        """Yield, for each batch of an epoch, its parts for some shards: pairs of shard and part.

        A batch is cut in `num_shards` runs of examples, as equal in length as can be. Empty parts are left
        out. The bits of a part are a function of the seed, epoch, batch and shard.

        Args:
            number: Of the epoch.
            batch_size: Of the whole batch, at least `num_shards`.
            shards: Those whose parts are read.
            num_shards: Number of all shards.
            start: Number of the first batch.
        """
        lengths, order = self.lengths(batch_size), self._order(number, batch_size)
        bits = [derived_seed(self.seed, _BITS, number, shard) for shard in shards]

        def positions(which: int) -> Tensor:
            step, shard = which // len(shards), shards[which % len(shards)]
            begin, length = step * batch_size, lengths[step]
            cuts = (begin + (shard + offset) * length // num_shards for offset in (0, 1))
            return order(torch.arange(*cuts))

        def seed_of(which: int) -> int:
            return seed_at(bits[which % len(shards)], which // len(shards))

        numbers = range(start * len(shards), len(lengths) * len(shards))
        parts = self._read(positions, seed_of, numbers)
        for _ in range(start, len(lengths)):
            batch = [(shard, next(parts)) for shard in shards]
            yield [(shard, part) for shard, part in batch if part is not None]

    def _order(self, number: int, batch_size: int) -> Order:
        """Return the order of the examples in an epoch: theirs, if a batch is all of them."""
        if batch_size >= len(self):
            return lambda positions: positions
        seed, chunks = derived_seed(self.seed, _ORDER, number), self.source.chunks
        if chunks is not None:
            return permutation_by_chunks(len(self), seed, chunk=chunks.rows, mixed=chunks.mixed)
        return permutation(len(self), seed)

    def _is_balanced(self, batch_size: int) -> bool:
        """Return whether batches have a share of labelled examples: not where one, or all, make a batch."""
        return self.balance is not None and 1 < batch_size < len(self)

    def balanced(self, labelled: Tensor, share: float) -> "Batches":
        """Return these data with at least a share of labelled examples in each batch of an epoch.

        Args:
            labelled: Which examples are, bool (N,).
            share: Their least share, below 1.
        """
        part = self.first(len(self))
        part.unchecked = self.unchecked
        part.balance = Balance(labelled.nonzero().flatten(), (~labelled).nonzero().flatten(), share)
        return part

    def in_order(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[Any]:
        """Yield the batches (B, *event_shape) of a pass in the order of the data.

        Args:
            batch_size: B.
            first: Number of the first batch.
            every: Yield only each so many of them.
        """

        def positions(which: int) -> Tensor:
            begin = which * batch_size
            return torch.arange(begin, min(begin + batch_size, len(self)))

        # the same bits at each pass
        bits = partial(seed_at, derived_seed(self.seed, _BITS))
        yield from self._read(positions, bits, range(first, -(-len(self) // batch_size), every))

    def peek(self, count: int) -> Any:
        """Return the first `count` examples, and read no others."""
        return self._at(torch.arange(min(count, len(self))), seed_at(derived_seed(self.seed, _BITS), 0))

    def _at(self, positions: Tensor, seed: int) -> Any:
        if self.source.is_random:
            self.generator.manual_seed(seed)
        index = self.rows_of(positions).to(self.source.device)
        batch = self.source.batch(index, self.generator)
        if isinstance(batch, Tensor):
            return batch.to(self.device)
        return tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, batch)

    def _read(
        self, positions: Callable[[int], Tensor], seed_of: Callable[[int], int], numbers: range
    ) -> Iterator[Any]:
        """Yield the batches of these numbers, None where one is empty.

        What is not in memory is read ahead by a thread.
        """

        def read(number: int) -> tuple[Tensor, Any]:
            where = positions(number)
            return where, self._at(where, seed_of(number)) if len(where) else None

        alone = self.source.in_memory or self.source.runs_user_code
        seen = 0
        for where, batch in map(read, numbers) if alone else _ahead(read, numbers):
            seen += len(where)
            if self.unchecked is not None and batch is not None:
                self._check_part(self.unchecked, batch, where)
            yield batch
        if seen >= len(self):
            self.unchecked = None

    def _check_part(self, check_data: Callable[[Any], None], batch: Any, positions: Tensor) -> None:
        """Check the examples at some positions; an error names the row in all the data."""
        try:
            check_data(batch)
        except ValueError as error:
            message = _located(str(error), self.rows_of(positions), of=len(self.source))
            if message == str(error):
                raise
            raise type(error)(message) from error

    def check(self, check_data: Callable[[Any], None]) -> None:
        """Pass all the data to a check, in chunks; of images that are binarised on the way, the first ones.

        Of data above 1 GiB the first chunk is checked now, the others when they are first read.

        Raises:
            ValueError: Of the check, with the row of the data that it refers to, and the rows looked at.
        """
        size = max(1, min(_CHUNK, _CHUNK_BYTES // self.source.row_bytes))
        if self.source.is_large or (self.source.itemsize == 1 and self.source.is_random):
            self._check_part(check_data, self.peek(size), torch.arange(min(size, len(self))))
            self.unchecked = check_data if self.source.is_large else None
            return
        for number, chunk in enumerate(self.in_order(size)):
            self._check_part(check_data, chunk, number * size + torch.arange(num_rows(chunk)))

    def describe(self) -> dict[str, Any]:
        """Return plain values that tell these data from others; see `Source.fingerprint`."""
        return {**self.source.fingerprint, "length": len(self)}

    def state_dict(self) -> None:
        """Return None: where a run stands tells all, unlike with a `Stream`."""

    def load_state_dict(self, state: Any) -> None:
        """Restore nothing; see `state_dict`."""


def row_in(error: ValueError) -> int | None:
    """Return the index of the example that an error of x names, or None."""
    found = re.search(_INDEX, str(error))
    return None if found is None else int(found[2])


def _located(message: str, rows: Tensor, *, of: int) -> str:
    """Return a message on some rows of the data with the index that x has in all, and a count of what it has.

    Args:
        message: Of a check of these rows.
        rows: Their numbers in the data.
        of: Number of all rows.

    Example:
        >>> _located("x[1, 2] = -3 is wrong; 1 of 6 values do", torch.arange(4, 6), of=9)
        'x[5, 2] = -3 is wrong; 1 of 6 values do in 2 of the 9 rows'
    """
    message = re.sub(_INDEX, lambda found: f"{found[1]}{int(rows[int(found[2])])}", message, count=1)
    if len(rows) == of:
        return message
    first = "the first " * torch.equal(rows, torch.arange(len(rows)))
    return re.sub(_COUNT, lambda found: f"{found[0]} in {first}{len(rows):,} of the {of:,} rows", message)


def _with_weight(batch: Any, weight: Tensor) -> Any:
    leaf = next(leaf for leaf in tree_leaves(batch) if leaf.is_floating_point())
    weight = weight.to(leaf)
    if isinstance(batch, Arguments):
        return Arguments((*batch.args, weight), batch.kwargs)
    return {**batch, "weight": weight} if isinstance(batch, dict) else (*batch, weight)


def _ahead(read: Callable[[int], tuple[Tensor, Any]], numbers: range) -> Iterator[tuple[Tensor, Any]]:
    """Yield what is read for these numbers, in order, by a thread that is some numbers ahead."""
    with ThreadPoolExecutor(1) as reader:
        waiting: deque[Future[tuple[Tensor, Any]]] = deque()
        try:
            for number in numbers:
                waiting.append(reader.submit(read, number))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
