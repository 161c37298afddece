"""Processes that train or evaluate together, as torchrun starts them; a process alone is one of one.

What all of them have to know is gathered, or sent by the first. Whatever one of them raises, all raise: none
is left waiting for another.
"""

import atexit
import contextlib
import gc
import logging
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pyro_vae.utils.validation import NonFiniteError

__all__ = ["Processes", "alone", "checksum", "join", "raise_for_all"]

T = TypeVar("T")

_GRACE = 1.0  # seconds in which those that have not ended or stalled answer

_state = {"alone": 0, "collectives": 0}


def join(group: Any = "auto") -> "Processes":
    """Return the processes of a group.

    Args:
        group: A `torch.distributed.ProcessGroup`; "auto" for the group of all processes, which is made where
            torchrun has set the environment for one; None for this process alone.

    Raises:
        TypeError: If it is anything else.
    """
    if isinstance(group, str) and group == "auto":
        if _state["alone"] or not dist.is_available():
            return Processes(None)
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
                return Processes(None)
            _init_process_group()
        group = dist.group.WORLD
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, None or 'auto'; got {group!r}")
    return Processes(group)


def _init_process_group() -> None:
    """Make the group of torchrun's environment, apart from what an attempt before a restart has left."""
    store, rank, size = next(iter(rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # else dead processes would be called
    store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined] # its stub omits it
    dist.init_process_group(store=store, rank=rank, world_size=size)
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """End the group before the interpreter ends, as torch asks for: its threads may abort then."""
    if dist.is_initialized():
        gc.collect()  # of what still refers to the group
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Make `join("auto")` return this process alone in a block, which the others do not run."""
    _state["alone"] += 1
    try:
        yield
    finally:
        _state["alone"] -= 1


class _Outcome(NamedTuple):
    """What a function returned or raised in one process."""

    value: Any
    error: tuple[str, str] | None


class Processes:
    """This process and the others of a group.

    Args:
        group: A process group; None for this process alone.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.

    Example:
        >>> processes = Processes(None)
        >>> processes.gather(lambda: "a"), processes.on_first(lambda: "b"), processes.is_first
        (['a'], 'b', True)
    """

    def __init__(self, group: "dist.ProcessGroup | None"):
        # the world is looked up: a reference would keep its threads until the interpreter aborts under them
        self._is_world = group is not None and group is dist.group.WORLD
        self._other = None if self._is_world else group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The process group; None for this process alone."""
        return dist.group.WORLD if self._is_world else self._other

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> None:
        """Replace values by their sum over all processes."""
        if self.size > 1:
            with self._named():
                dist.all_reduce(values, group=self.group)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        if self.group is not None and self.size > 1:
            first = dist.get_global_rank(self.group, 0)
            with self._named(), torch.no_grad():
                for tensor in tensors:
                    value = tensor.detach().contiguous()
                    dist.broadcast(value, first, group=self.group)
                    tensor.detach().copy_(value)

    def gather(self, function: Callable[[], T]) -> list[T]:
        """Call a function in every process; return all results, by rank, in all.

        Raises:
            Exception: What the function raised here; elsewhere a `RuntimeError`, or `NonFiniteError`, that
                says in which process it was raised.
        """
        if self.size == 1:
            return [function()]
        outcome, error = _Outcome(None, None), None
        try:
            outcome = _Outcome(function(), None)
            pickle.dumps(outcome.value)
        except Exception as raised:
            error = raised
            outcome = _Outcome(None, (type(raised).__name__, str(raised)))
        outcomes = self._exchange(outcome)
        raise_for_all([outcome.error for outcome in outcomes], error)
        return [outcome.value for outcome in outcomes]

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process alone; return its result in all. Raises as `gather`."""
        return cast(T, self.gather(function if self.is_first else lambda: None)[0])

    def interleave(self, function: Callable[[], list[T]]) -> list[T]:
        """Call a function in every process; return the items of all lists in turn, in all processes.

        Of items 0, 1, 2, … process r computes r, r + size, r + 2 · size, …
        """
        lists = self.gather(function)
        longest = max(map(len, lists))
        return [items[turn] for turn in range(longest) for items in lists if turn < len(items)]

    def shares(self, total: int) -> range:
        """Return this process's share of 0 … total − 1, as equal in length to the others' as can be."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def require_same(self, what: str, value: Any) -> None:
        """Raise unless a value is the same in all processes.

        Raises:
            ValueError: Names the processes where it differs from that of the first, or that compare another.
        """
        subjects, values = zip(*self.gather(lambda: (what, value)), strict=True)
        elsewhere = [rank for rank, subject in enumerate(subjects) if subject != subjects[0]]
        if elsewhere:
            raise ValueError(
                f"the processes are at different calls: {_ranks(elsewhere)} at {subjects[elsewhere[0]]}, "
                f"rank 0 at {subjects[0]}. All must call fit and evaluate; with group=None one works for "
                "itself"
            )
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            first, other = _different_entries(values[0], values[differing[0]])
            raise ValueError(
                f"the processes differ in {what}: {_ranks(differing)} {other!r}, rank 0 has "
                f"{first!r}. With group=None each process works for itself"
            )

    @contextlib.contextmanager
    def logging_once(self) -> Iterator[None]:
        """Keep the warnings of all processes but the first out of the log in a block."""
        logger = logging.getLogger("pyro_vae")
        level = logger.level
        if not self.is_first:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._named():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the processes that have ended or stalled if a collective in the block fails."""
        _state["collectives"] += 1
        try:
            yield
        except RuntimeError as error:
            missing = self._silent(f"pyro_vae/{_state['collectives']}")
            if not missing:
                raise
            raise RuntimeError(
                f"{_ranks(missing)} ended, or did not get here within the group's time limit: see its own "
                "output for the reason. All processes must call fit and evaluate; with group=None one works "
                "for itself"
            ) from error

    def _silent(self, key: str) -> list[int]:
        """Return the processes that do not report the same failure."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{key}/{self.rank}", "here")
            time.sleep(_GRACE)
            return [rank for rank in range(self.size) if not store.check([f"{key}/{rank}"])]
        except RuntimeError:  # the store has ended, too
            return []


def raise_for_all(errors: list[tuple[str, str] | None], own: Exception | None) -> None:
    """Raise the error of this process; or else one that tells what others raised, if any did.

    Args:
        errors: Type and message, or None, of each process.
        own: The error of this process, if it has one.
    """
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    if not failed:
        return
    rank, (kind, message) = next(iter(failed.items()))
    if kind == NonFiniteError.__name__:
        raise NonFiniteError(f"rank {rank}: {message}") from own
    if own is not None:
        raise own
    raise RuntimeError(f"rank {rank} raised {kind}: {message}")


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a number that tells tensors from others, to the bit."""
    result = 0
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        result = zlib.crc32(plain.numpy().data, result)
    return result


def _different_entries(a: Any, b: Any) -> tuple[Any, Any]:
    """Return two values that differ; of two dicts with the same keys, the entries that do."""
    if not (isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys()):
        return a, b
    keys = [key for key in a if a[key] != b[key]]
    return {key: a[key] for key in keys}, {key: b[key] for key in keys}


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
