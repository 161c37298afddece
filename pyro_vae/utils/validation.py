"""Argument checks whose messages name the expected value, the value found, and a fix."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = [
    "NonFiniteError",
    "elementwise_support",
    "outside_support",
    "require_count",
    "require_event_and_latent",
    "require_floating",
    "require_shape",
    "to_shape",
]


class NonFiniteError(ValueError):
    """A loss, gradient or parameter became infinite or NaN."""


def require_count(name: str, value: Any, *, minimum: int = 1) -> None:
    """Raise unless `value` is an integer ≥ `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if int(value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def require_shape(name: str, value: Any) -> tuple[int, ...]:
    """Return a shape, or the widths of layers, as a tuple; raise unless all sizes are integers ≥ 1.

    Example:
        >>> require_shape("event_shape", 784)
        Traceback (most recent call last):
            ...
        TypeError: event_shape must be a tuple of integers; got 784: write (784,)
    """
    if isinstance(value, Integral):
        raise TypeError(f"{name} must be a tuple of integers; got {value}: write ({value},)")
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a tuple of integers; got {value!r}")
    shape = tuple(value)
    for index, size in enumerate(shape):
        require_count(f"{name}[{index}]", size)
    return shape


def require_event_and_latent(call: str, *, event_shape: Any, latent_dim: Any) -> tuple[int, ...]:
    """Return the event shape; raise if it or `latent_dim` is invalid, or if the two are swapped in `call`."""
    if isinstance(event_shape, Integral) and isinstance(latent_dim, Sequence):
        raise TypeError(
            f"{call} was given event_shape={event_shape!r} and latent_dim={latent_dim!r}: swap the two"
        )
    require_count("latent_dim", latent_dim)
    return require_shape("event_shape", event_shape)


def require_floating(name: str, value: Any) -> None:
    """Raise unless `value` is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be floating point; got {value.dtype}: divide grey levels 0..255 by 255, as "
            "pyro_vae.data.from_array(x)[:] does, or convert counts and bits by .float()"
        )


def to_shape(name: str, found: Sequence[int], expected: Sequence[int], part: str) -> str:
    """Return advice to bring data of shape `found` to (N, *expected), the input of the module `part`."""
    if tuple(found) == tuple(expected):
        return f"add a dimension for the batch, {name}[None]"
    if len(found) > 0 and math.prod(found[1:]) == math.prod(expected):
        return f"{name}.reshape({', '.join(map(str, (-1, *expected)))}) has it"
    return f"reshape {name}, or build {part} for its shape"


def elementwise_support(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of single elements, from inside `constraints.independent`.

    Example:
        >>> elementwise_support(constraints.independent(constraints.boolean, 1))
        Boolean()
    """
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def outside_support(name: str, x: Tensor, family: str, support: constraints.Constraint) -> str | None:
    """Return a message on the first value of x outside a support or not finite; None if all are valid.

    Example:
        >>> outside_support("x", torch.tensor([0.0, -3.0]), "Bernoulli", constraints.boolean)
        'x[1] = -3 lies outside the support of Bernoulli, 0 or 1; 1 of 2 values do'
    """
    support = elementwise_support(support)
    outside = ~(support.check(x) & torch.isfinite(x))
    if not outside.any():
        return None
    is_binary = isinstance(support, type(constraints.boolean))
    index = tuple(outside.nonzero()[0].tolist())
    message = (
        f"{name}{list(index)} = {x[index].item():.6g} lies outside the support of {family}, "
        f"{'0 or 1' if is_binary else support}; {outside.sum()} of {x.numel()} values do"
    )
    if is_binary and ((x >= 0) & (x <= 1)).all():
        message += (
            '. Grey levels are not binary: pass binarize="dynamic" (or "fixed", "threshold") to fit, '
            "evaluate or data.load, or choose a likelihood for grey levels, such as ContinuousBernoulli"
        )
    elif not support.check(x.new_tensor(2.0)) and ((x >= 0) & (x <= 255)).all():  # such as [0, 1]
        message += ". Divide grey levels 0..255 by 255"
    return message
