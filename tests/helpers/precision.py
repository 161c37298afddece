"""Comparison of float64 with arbitrary precision (mpmath), and random Gaussians."""

import mpmath
import torch
from torch import Tensor

mp = mpmath.mp.clone()
mp.dps = 60


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float64)


def relative(found: Tensor, expected: mpmath.mpf) -> float:
    return float(abs(mp.mpf(found.item()) - expected) / abs(expected)) if expected else abs(found.item())


def random_guide(generator: torch.Generator, N: int, K: int) -> tuple[Tensor, Tensor]:
    loc = torch.randn(N, K, generator=generator, dtype=torch.float64)
    root = torch.randn(N, K, K + 1, generator=generator, dtype=torch.float64)
    return loc, root @ root.mT
