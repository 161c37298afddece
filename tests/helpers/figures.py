"""Arrays for the tests of figures."""

import math

import torch


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


HISTORY = {
    "epoch": [1, 2, 3, 4],
    "train_bound": [-200.0, -150.0, -130.0, -120.0],
    "train_bound_se": [4.0, 3.0, 2.0, 1.0],
    "validation_elbo": [math.nan, -155.0, math.nan, -125.0],
    "validation_elbo_se": [math.nan, 5.0, math.nan, math.nan],
    "learning_rate": [1e-3, 1e-3, 1e-4, 1e-4],
}
