"""Random orders as functions of a position, so that the order of 10⁹ rows takes no memory."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pyro_vae.utils.isolation import derived_seed

__all__ = ["Order", "hold_out_evenly", "permutation", "permutation_by_chunks"]

Order = Callable[[Tensor], Tensor]  # from positions (B,) to rows (B,), both int64

_IN_MEMORY = 10**7  # rows up to which the order is listed
_ROUNDS = 4


def permutation(size: int, seed: int, *, in_memory: int = _IN_MEMORY) -> Order:
    """Return a random order of `size` rows, as a function of the position.

    A long order is a Feistel network of four rounds over the next power of four, walked along its cycles
    back into the range.

    Args:
        size: Number of rows.
        seed: Of the order.
        in_memory: Orders up to this length are drawn by `torch.randperm` and kept.

    Source: M. Luby, C. Rackoff (1988), How to construct pseudorandom permutations from pseudorandom
    functions, SIAM Journal on Computing 17.

    Example:
        >>> order = permutation(1000, seed=3, in_memory=0)
        >>> len(order(torch.arange(1000)).unique())
        1000
    """
    if size <= in_memory:
        listed = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        return lambda positions: listed[positions]
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # bits
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def rows(positions: Tensor) -> Tensor:
        values = _feistel(positions.numpy().astype(np.uint64), half, keys)
        while (outside := values >= size).any():
            values[outside] = _feistel(values[outside], half, keys)
        return torch.from_numpy(values.astype(np.int64))

    return rows


def permutation_by_chunks(size: int, seed: int, *, chunk: int, mixed: int) -> Order:
    """Return a random order of rows that are stored in chunks: neighbours in it come from few of them.

    The chunks are in random order, and the rows of `mixed` successive ones in random order. Rows after the
    last whole chunk belong to the last ones that are mixed.

    Args:
        size: Number of rows.
        seed: Of the order.
        chunk: Rows of a chunk.
        mixed: Number of chunks whose rows are mixed.

    Example:
        >>> order = permutation_by_chunks(1000, seed=3, chunk=10, mixed=4)
        >>> len(order(torch.arange(1000)).unique())
        1000
        >>> len((order(torch.arange(40)) // 10).unique())
        4
    """
    whole = size // chunk
    if whole == 0:
        return permutation(size, seed)
    order, span, windows = permutation(whole, derived_seed(seed, 0)), chunk * mixed, max(1, whole // mixed)

    @lru_cache(2)
    def within(window: int) -> Order:
        length = span if window < windows - 1 else size - span * window
        return permutation(length, derived_seed(seed, 1 + window))

    def rows(positions: Tensor) -> Tensor:
        window = (positions // span).clamp(max=windows - 1)
        result = torch.empty_like(positions)
        for number in window.unique().tolist():
            here, begin = window == number, number * span
            row = begin + within(number)(positions[here] - begin)
            stored = order((row // chunk).clamp(max=whole - 1)) * chunk + row % chunk
            result[here] = torch.where(row < whole * chunk, stored, row)
        return result

    return rows


def hold_out_evenly(size: int, count: int, seed: int) -> tuple[Order, Order]:
    """Hold out a random row of each of `count` runs of rows, as equal in length as can be.

    Neither part takes memory, and both keep the order of the rows.

    Returns:
        The size − count rows that are kept, and those held out.

    Example:
        >>> kept, held_out = hold_out_evenly(10, 3, seed=1)
        >>> kept(torch.arange(7)).tolist(), held_out(torch.arange(3)).tolist()
        ([0, 2, 4, 5, 6, 7, 8], [1, 3, 9])
    """
    if 2 * count > size:
        return hold_out_evenly(size, size - count, seed)[::-1]
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]

    def start(run: Tensor) -> Tensor:
        return run * size // count

    def held_out(run: Tensor) -> Tensor:
        length = (start(run + 1) - start(run)).numpy().astype(np.uint64)
        offset = (_mix(run.numpy().astype(np.uint64), key) >> np.uint64(11)) % length
        return start(run) + torch.from_numpy(offset.astype(np.int64))

    def kept(position: Tensor) -> Tensor:
        run = position * count // (size - count)  # or one beside it, as the starts are rounded
        run = run - (start(run) - run > position).long()
        run = run + (start(run + 1) - (run + 1) <= position).long()
        row = position + run
        return row + (row >= held_out(run)).long()

    return kept, held_out


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash the integers of 64 bits."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permute the integers of 2 · half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ ((_mix(right, key) >> np.uint64(29)) & mask)
    return (left << half) | right
