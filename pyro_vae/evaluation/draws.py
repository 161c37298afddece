"""Data under evaluation: checked, binarised once, and given out in chunks of bounded size.

What is evaluated is a *pair*: any object with a generative model and a guide. It is run as it is used, in
evaluation mode and without gradients, and with random numbers of its own, so that evaluating a model changes
nothing about its training.
"""

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_vae.data.batches import Batches
from pyro_vae.data.datasets import Images
from pyro_vae.utils.validation import NonFiniteError, require_floating

__all__ = ["Pair", "chunk_sizes", "head", "observe", "parts", "require_finite"]

# draws decoded at a time, and the numbers that they decode to: four arrays of them are kept when freed
_ROWS, _VALUES = 2**13, 3 * 2**20
_PARTICLES = 250  # of a datum at a time, so that encoding it costs little beside decoding them


class Pair(Protocol):
    """A generative model and a guide, such as a `VAE`: two Pyro functions of a batch x (N, *event_shape)."""

    def model(self, x: Tensor) -> Any:
        """p(z) p(x|z), with x observed."""

    def guide(self, x: Tensor) -> Any:
        """q(z|x)."""


def observe(pair: Pair, data: Tensor | Images, *, binarize: str | None, seed: int) -> Batches:
    """Check data and parameters, and binarise the data once and for all, so that every pass sees the same.

    Args:
        pair: Whose data they are; they go to the device of its parameters.
        data: (N, *event_shape).
        binarize: None, "dynamic", "fixed" (these two alike: one draw from `seed`) or "threshold".
        seed: Of the binarisation.

    Raises:
        TypeError: If the data are no floating-point tensor or `Images`, or the pair is none.
        ValueError: If the data are empty, have another shape than the likelihood, or lie outside its support.
        NonFiniteError: If a parameter is infinite or NaN.
    """
    if not callable(getattr(pair, "model", None)):
        raise TypeError(
            "what is evaluated must have Pyro functions model and guide, as a VAE has; "
            f"got {type(pair).__name__}"
        )
    if isinstance(data, Images) and data.binarize == "dynamic":
        data, binarize = dataclasses.replace(data, binarize=None), binarize or "dynamic"
    parameters = dict(pair.named_parameters()) if isinstance(pair, nn.Module) else {}
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(
                f"parameter {name!r} is not finite: load a checkpoint from before it went wrong"
            )
    device = next((parameter.device for parameter in parameters.values()), getattr(data, "device", "cpu"))
    binarize = "fixed" if binarize == "dynamic" else binarize
    batches = Batches(data, binarize=binarize, seed=seed, device=device)
    batches.check(getattr(pair, "check_data", _require_data))
    return batches


def _require_data(x: Tensor) -> None:
    require_floating("the data", x)
    if len(x) == 0:
        raise ValueError("the data are empty: there must be at least one datum")


def chunk_sizes(batches: Batches, num_particles: int) -> tuple[int, int]:
    """How many data to take at once, and how many particles of each."""
    rows = max(1, min(_ROWS, _VALUES // math.prod(batches.data.shape[1:])))
    particles = min(num_particles, _PARTICLES, rows)
    return max(1, rows // particles), particles


def parts(total: int, size: int) -> list[int]:
    """Divide a total into parts of that size; the last may be smaller.

    Example:
        >>> parts(7, 3)
        [3, 3, 1]
    """
    return [min(size, total - start) for start in range(0, total, size)]


def head(batches: Batches, count: int) -> Batches:
    """Give the first data, or all where there are no more."""
    data = batches.data
    part = data.subset(slice(count)) if isinstance(data, Images) else data[:count]
    return Batches(part, seed=batches.seed, device=batches.device)


def require_finite(log_weight: Tensor, *, first: int) -> None:
    """Refuse log weights (S, n), of the data from the one numbered `first` on, that are not all finite."""
    wrong = (~log_weight.isfinite()).sum(0)
    if not wrong.any():
        return
    data = wrong.nonzero().flatten().tolist()
    shown = ", ".join(str(first + index) for index in data[:5]) + (", …" if len(data) > 5 else "")
    raise NonFiniteError(
        f"the log importance weight is infinite or NaN for {len(data)} of the data {first} to "
        f"{first + log_weight.shape[1] - 1}: number {shown}; number {first + data[0]} has "
        f"{int(wrong[data[0]])} such weights of {len(log_weight)}. Check the parameters and these data"
    )
