"""Random orders as functions of a position, so that the order of 10⁹ rows takes no memory."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["permutation"]

_IN_MEMORY = 10**7  # rows up to which the order is listed
_ROUNDS = 4


def permutation(size: int, seed: int, *, in_memory: int = _IN_MEMORY) -> Callable[[Tensor], Tensor]:
    """Return a random order of `size` rows, as a function from positions (B,) to rows (B,), both int64.

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


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permute the integers of 2 · half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        left, right = right, left ^ ((mixed >> np.uint64(29)) & mask)
    return (left << half) | right
