"""Batches that an iterable makes: a torch DataLoader, or a stream that has no length.

`Stream` stands where `Batches` does in `fit`, but order and size of the batches are those of the iterable.
What it draws from torch's, NumPy's and Python's generators in this process is a function of the seed, the
epoch and the number of the batch.
"""

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from pyro_vae.data.balance import Balance
from pyro_vae.data.batches import row_in
from pyro_vae.data.sources import mark_missing, num_rows, require_observed
from pyro_vae.utils.arrays import as_tensor
from pyro_vae.utils.isolation import (
    derived_seed,
    isolated_generators,
    python_noise,
    restore_python_noise,
    seed_at,
    without_autocast,
)
from pyro_vae.utils.processes import Processes, checksum

__all__ = ["Stream", "has_length", "is_divided", "is_stream"]

logger = logging.getLogger("pyro_vae")

_ORDER = 15  # a stream of random numbers


def is_stream(data: Any) -> bool:
    """Return whether data are an iterable of batches, not rows that are taken by position."""
    if isinstance(data, DataLoader | IterableDataset):
        return True
    rows = isinstance(data, Tensor | tuple | list | dict | str) or hasattr(data, "shape")
    by_position = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return not rows and not by_position and isinstance(data, Iterable)


def has_length(data: Any) -> bool:
    """Return whether data tell how many batches they have; a DataLoader of a stream does not."""
    try:
        len(data)
    except TypeError:
        return False
    return True


def is_divided(data: Any) -> bool:
    """Return whether data are a DataLoader that gives each process a part."""
    return any(getattr(sampler, "num_replicas", 1) > 1 for sampler in _samplers(data))


class Stream:
    """Batches of an iterable.

    Without `steps_per_epoch` an epoch is one pass over an iterable that has a length, such as a DataLoader,
    and a run resumes to the bit, by reading the batches before again. With it, an epoch is so many batches,
    the next one goes on where it ended, and the iterable begins again after its last batch. Such a run goes
    on where it was if the iterable has `state_dict` and `load_state_dict`; else it begins again when resumed,
    which a warning says.

    The samplers of a DataLoader are told the number of each pass, as by `set_epoch`. A generator that it was
    given is seeded for each batch, from its own seed, and restored.

    Args:
        data: An iterable of batches, each a tensor, array or data frame, or a tuple or dict of these, as a
            program takes them.
        steps_per_epoch: Batches of an epoch.
        seed: Of what the iterable draws; each process draws its own.
        device: Device of the batches.
        dtype: Their floating-point type.
        missing_for: As in `Batches`.
        processes: Those that train together, each with an iterable of its own part of the data.

    Raises:
        ValueError: If the iterable gives no batch, or has no length and `steps_per_epoch` is missing; or if
            it is a DataLoader that would give all processes the same data.

    Example:
        >>> loader = DataLoader([torch.tensor([float(i)]) for i in range(5)], batch_size=2)
        >>> stream = Stream(loader, None, seed=0)
        >>> [len(batch) for batch in stream.epoch(0, batch_size=2)]
        [2, 2, 1]
    """

    balance: Balance | None = None

    def __init__(
        self,
        data: Any,
        steps_per_epoch: int | None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        missing_for: Callable[..., Any] | None = None,
        processes: Processes | None = None,
    ):
        processes = processes or Processes(None)
        if processes.size > 1 and isinstance(data, DataLoader) and _gives_all(data):
            raise ValueError(
                "this DataLoader would give every process the same data: pass its dataset (loader.dataset), "
                "or give it sampler=torch.utils.data.DistributedSampler(dataset)"
            )
        if steps_per_epoch is None and not has_length(data):
            raise ValueError(
                "data without a length need steps_per_epoch, the number of batches after which fit "
                "validates, saves and reports"
            )
        self.data, self.seed, self.device = data, seed, torch.device(device)
        self.dtype = dtype or torch.get_default_dtype()
        self.rank, self.is_alone = processes.rank, processes.size == 1
        self.in_passes = steps_per_epoch is None
        self.has_state = not self.in_passes and all(
            hasattr(data, name) for name in ("state_dict", "load_state_dict")
        )
        self.marks_missing = missing_for is not None
        if missing_for is not None:
            require_observed(missing_for)
        self.check_batch: Callable[[Any], None] | None = None
        self.iterator: Iterator[Any] | None = None
        self.passes = 0  # begun, if an epoch is not a pass
        self.begun = False  # by an epoch, or where a resumed run left it

        def look() -> tuple[int, int]:
            self.first_batch = self._first()
            leaves = [leaf for leaf in tree_leaves(self.first_batch) if isinstance(leaf, Tensor)]
            return steps_per_epoch or len(data), checksum(leaves)

        lengths, sums = zip(*processes.gather(look), strict=True)
        self.steps, self.batch_size = max(lengths), num_rows(self.first_batch)
        if len(set(sums)) < len(sums):
            logger.warning(
                "processes begin with the same batch: give each its own part of the data, else the gradient "
                "counts the same examples several times"
            )

    def _first(self) -> Any:
        """Read the first batch, and keep it for the first epoch where it could not be read again."""
        state = copy.deepcopy(self.data.state_dict()) if self.has_state else None
        with self._noise(0, 0):
            iterator = self._begin(0)
            batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"the {type(self.data).__name__} gives no batch")
        if self.has_state:
            self.data.load_state_dict(state)
        elif not self.in_passes:
            self.iterator, self.passes = _chain(batch, iterator), 1
        return self._converted(batch)

    def __len__(self) -> int:
        """Return the number of examples of an epoch, as far as the first batch tells."""
        return self.steps * self.batch_size

    def usual_batch(self, largest: int) -> int:
        """Return the length of the batches."""
        return self.batch_size

    def lengths(self, batch_size: int) -> list[int]:
        """Return the lengths of the batches of an epoch, as far as the first tells."""
        return [self.batch_size] * self.steps

    def peek(self, count: int) -> Any:
        """Return the first examples of the first batch."""
        length = self.batch_size

        def first(leaf: Any) -> Any:
            return leaf[:count] if isinstance(leaf, Tensor) and leaf.shape[:1] == (length,) else leaf

        return tree_map(first, self.first_batch)

    def check(self, check_data: Callable[[Any], None]) -> None:
        """Pass the first batch to a check now, the others when they are read."""
        self.check_batch = check_data
        self._checked(self.first_batch, 0, first_row=0)

    def epoch(self, number: int, *, batch_size: int, start: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch, from the batch `start` on."""
        if self.in_passes:
            self.iterator = None
        elif (number or start) and not self.begun:
            logger.warning(
                "the %s begins again from its start: it has no state_dict that would tell where it was",
                type(self.data).__name__,
            )
        self.begun = True
        row, is_known = 0, self.in_passes or not start  # of the next batch
        for step in range(self.steps):
            skipped = step < start
            if skipped and not self.in_passes:
                continue
            with self._noise(number, step):
                batch = self._next(number if self.in_passes else None)
            if skipped:
                row += 0 if batch is None else num_rows(self._converted(batch))
                continue
            if batch is None and self.is_alone:
                name = type(self.data).__name__
                raise ValueError(
                    f"the {name} ended after {step} of {self.steps} batches: it can be read once only, or "
                    "its length is wrong; steps_per_epoch may say how many there are"
                )
            if batch is not None:
                batch = self._checked(self._converted(batch), step, first_row=row if is_known else None)
                row += num_rows(batch)
            yield batch

    def epoch_in_shards(
        self, number: int, *, batch_size: int, shards: range, num_shards: int, start: int = 0
    ) -> Iterator[list[tuple[int, Any]]]:
        """Yield the batches as the part of this process; its stream may end before another's."""
        if len(shards) != 1:
            raise ValueError(
                f"data that come in batches are not cut in shards: there must be one for each process; got "
                f"{num_shards} in all, {len(shards)} here"
            )
        for batch in self.epoch(number, batch_size=batch_size, start=start):
            yield [] if batch is None else [(shards[0], batch)]

    def in_order(self, batch_size: int, *, first: int = 0, every: int = 1) -> Iterator[Any]:
        """Yield the batches of one pass as they come."""
        self.iterator = None
        row = 0
        for step in range(self.steps):
            with self._noise(0, step):
                batch = self._next(0)
            if batch is None:
                continue
            batch = self._converted(batch)
            if step % every == first:
                yield self._checked(batch, step, first_row=row)
            row += num_rows(batch)

    def describe(self) -> dict[str, Any]:
        """Return what tells this stream from others, which its data cannot."""
        return {"stream": type(self.data).__name__, "steps": self.steps}

    def state_dict(self) -> Any:
        """Return the iterable's own state in this process, or None."""
        return self.data.state_dict() if self.has_state else None

    def load_state_dict(self, state: Any) -> None:
        """Restore the iterable's own state."""
        if state is not None and self.has_state:
            self.data.load_state_dict(state)
            self.iterator, self.begun = None, True

    @without_autocast()  # of a step that reads its parts
    def _next(self, number: int | None) -> Any:
        """Return the next batch of a pass, None after its last; or of endless passes, if it has no number."""
        if self.iterator is None:
            self.iterator = self._begin(number)
        batch = next(self.iterator, None)
        if batch is None and number is None:
            self.iterator = self._begin(None)
            batch = next(self.iterator, None)
            if batch is None:
                raise ValueError(f"the {type(self.data).__name__} has ended, and gives no batch again")
        return batch

    def _begin(self, number: int | None) -> Iterator[Any]:
        """Begin a pass, and tell its number to samplers whose order depends on it."""
        number = self.passes if number is None else number
        self.passes = number + 1
        for sampler in _samplers(self.data):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        return iter(self.data)

    def _noise(self, number: int, step: int) -> "_Noise":
        other = (self.rank,) * (self.rank > 0)
        seeds = {
            generator: seed_at(derived_seed(generator.initial_seed(), _ORDER, number), step)
            for generator in _generators(self.data)
        }
        return _Noise(seed_at(derived_seed(self.seed, _ORDER, number, *other), step), seeds)

    def _converted(self, batch: Any) -> Any:
        if isinstance(batch, list):
            batch = batch[0] if len(batch) == 1 else tuple(batch)

        def convert(leaf: Any) -> Any:
            is_text = isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "bfiu"
            leaf = leaf if is_text else as_tensor(leaf, dtype=self.dtype)
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)

        found = tree_map(convert, batch)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
            raise TypeError(
                "a batch must be a tensor, array or data frame of numbers, or a tuple or dict of these; got "
                f"{batch!r:.100}"
            )
        return mark_missing(found) if self.marks_missing else found

    def _checked(self, batch: Any, step: int, *, first_row: int | None) -> Any:
        """Return a batch that was checked; an error says where it stands, if its first row is known."""
        if self.check_batch is not None:
            try:
                self.check_batch(batch)
            except ValueError as error:
                row, also = row_in(error), ""
                if row is not None and first_row is not None:
                    also = f"; it is row {first_row + row} of the epoch"
                raise type(error)(f"{error} (in batch {step} of the epoch{also}, counted from 0)") from error
        return batch


class _Noise:
    """Seed the generators of the CPU, NumPy and Python, and others, in a block; restore them after it."""

    def __init__(self, seed: int, others: dict[Generator, int]):
        self.seed, self.others = seed, others
        self.torch = isolated_generators(torch.device("cpu"), seed)

    def __enter__(self) -> None:
        self.before = python_noise()
        self.torch.__enter__()
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002 (which a transform may still use)
        self.states = [generator.get_state() for generator in self.others]
        for generator, seed in self.others.items():
            generator.manual_seed(seed)

    def __exit__(self, *error: Any) -> None:
        for generator, state in zip(self.others, self.states, strict=True):
            generator.set_state(state)
        self.torch.__exit__(*error)
        restore_python_noise(self.before)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _samplers(data: Any) -> list[Any]:
    """Return the samplers of a DataLoader."""
    if not isinstance(data, DataLoader):
        return []
    batches = data.batch_sampler
    found = [data.sampler, batches, getattr(batches, "sampler", None)]
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _generators(data: Any) -> list[Generator]:
    """Return the generators that a DataLoader and its samplers were given."""
    owners = [data, *_samplers(data)] if isinstance(data, DataLoader) else []
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, Generator)))


def _gives_all(loader: DataLoader[Any]) -> bool:
    """Return whether a loader reads all of a data set that has positions."""
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return False  # a user's own, which may divide them
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if type(sampler) is RandomSampler and sampler.replacement:
        return False
    return type(sampler) in (SequentialSampler, RandomSampler, SubsetRandomSampler)
