"""Streams of random numbers that do not disturb each other.

Pyro draws from torch's global generators. Training, data order and evaluation each get a stream of
their own here, derived from one seed, and the global generators are left as they were found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derived_seed", "isolated_generators"]


def derived_seed(seed: int, *key: int) -> int:
    """Return a seed for the stream `key` of a run: independent streams for different keys.

    Raises:
        ValueError: If the seed or an entry of the key is negative.

    Example:
        >>> derived_seed(0, 1) != derived_seed(0, 2) != derived_seed(1, 2)
        True
    """
    if min(seed, *key) < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed}")
    return int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0])


@contextmanager
def isolated_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `device` within the block; restore them after it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every other device too
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
