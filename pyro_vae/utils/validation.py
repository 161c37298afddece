"""Argument checks whose messages name the expected value, the value found, and a fix."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = [
    "NonFiniteError",
    "elementwise_support",
    "first_outside",
    "flag_non_finite",
    "known_support",
    "outside_support",
    "require_count",
    "require_event_and_latent",
    "require_floating",
    "require_module",
    "require_number",
    "require_shape",
    "require_tensor",
    "same_support",
    "to_shape",
]


class NonFiniteError(ValueError):
    """A loss, gradient or parameter became infinite or NaN."""


def flag_non_finite(tensors: Iterable[Tensor | None], flag: Tensor) -> Tensor:
    """Set `flag`, of shape (), to 1.0 if an element of the tensors is not finite, and return it.

    All tensors are read in one call, as by `torch.amp.GradScaler`.

    Example:
        >>> flag_non_finite([torch.ones(2), None, torch.tensor([1.0, torch.inf])], torch.zeros(()))
        tensor(1.)
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            values = tensor._values() if tensor.is_sparse else tensor
            values = torch.view_as_real(values) if values.is_complex() else values
            groups.setdefault((values.device, values.dtype), []).append(values)
    for (device, _), members in groups.items():
        found, scale = (value.to(device, torch.float32) for value in (flag, torch.ones(())))
        torch._amp_foreach_non_finite_check_and_unscale_(members, found, scale)  # a scale of 1.0 is skipped
        if found is not flag:
            flag.copy_(torch.maximum(flag, found.to(flag.device)))
    return flag


def require_count(name: str, value: Any, *, minimum: int = 1) -> None:
    """Raise unless `value` is an integer ≥ `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if int(value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def require_number(name: str, value: Any) -> None:
    """Raise unless `value` is a real number.

    Example:
        >>> require_number("clip_norm", "1")
        Traceback (most recent call last):
            ...
        TypeError: clip_norm must be a number; got '1'
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def require_module(name: str, value: Any) -> None:
    """Raise unless `value` can be called as a torch module can."""
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__name__} itself: build one" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be a torch module; got {got}")


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


def require_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor.

    Example:
        >>> require_tensor("y", [0, 1])
        Traceback (most recent call last):
            ...
        TypeError: y must be a tensor; got list: convert with torch.as_tensor
    """
    if not isinstance(value, Tensor):
        hint = ": convert with torch.as_tensor" * (hasattr(value, "__array__") or isinstance(value, list))
        if hasattr(value, "columns"):  # a data frame, which torch does not take as it is
            hint += "(numpy.asarray(frame, dtype='float32'))"
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}{hint}")


def require_floating(name: str, value: Any) -> None:
    """Raise unless `value` is a floating-point tensor."""
    require_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be floating point; got {value.dtype}: divide grey levels 0..255 by 255, as "
            "pyro_vae.data.from_array(x) does, whose [:] is a tensor, or convert counts and bits by "
            ".float(), of an array .astype('float32')"
        )


def to_shape(name: str, found: Sequence[int], expected: Sequence[int], part: str) -> str:
    """Return advice to bring data of shape `found` to (N, *expected), the input of the module `part`."""
    if tuple(found) == tuple(expected):
        return f"add a dimension for the batch, {name}[None]"
    own = [size for size in found[1:] if size != 1]
    wanted = [size for size in expected if size != 1]
    if own != wanted and len(own) > 1 and len(wanted) > 1:  # a reshape would mix rows, columns, channels
        channels = len(expected) == 3 and tuple(found[1:]) == (*expected[1:], expected[0])
        moved = f"move the channels, {name}.movedim(-1, 1), of an array numpy.moveaxis({name}, -1, 1); or "
        return f"{moved * channels}build {part} for its shape"
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


def known_support(distribution: Any) -> constraints.Constraint | None:
    """Return the support of a distribution, or None if it states none."""
    try:
        support = distribution.support
    except NotImplementedError:
        return None
    return None if constraints.is_dependent(elementwise_support(support)) else support


def same_support(a: constraints.Constraint | None, b: constraints.Constraint | None) -> bool:
    """Return whether two supports are the same, with the same bounds.

    Example:
        >>> same_support(constraints.interval(0, 2), constraints.interval(0, 3))
        False
    """
    if type(a) is not type(b):
        return False
    pairs = [(value, vars(b).get(name)) for name, value in vars(a).items()]
    return all(_same(value, other) for value, other in pairs)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, constraints.Constraint):
        return same_support(value, other)
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(value), torch.as_tensor(other))
    return value is other or bool(value == other)


WHERE_MISSING = (
    "where NaN means missing, pass observed=~x.isnan() of a tensor, ~np.isnan(x) of an array or ~x.isna() "
    "of a data frame, or missing='nan' to fit, evaluate and their like"
)


def nan_message(x: Tensor) -> str:
    """Return the message on the first value of x that is NaN, of which there is one."""
    return f"x{x.isnan().nonzero()[0].tolist()} is nan: {WHERE_MISSING}"


def outside_support(name: str, x: Tensor, family: str, support: constraints.Constraint) -> str | None:
    """Return the message of `first_outside` on data, with advice for grey levels."""
    message = first_outside(name, x, family, support)
    return message and message + _grey_levels_hint(x, elementwise_support(support))


def first_outside(name: str, x: Tensor, family: str, support: constraints.Constraint) -> str | None:
    """Return a message on the first value, or event, of x outside a support; None if all are valid.

    Supports of whole events, such as one-hot vectors, are checked by event. The support decides whether NaN
    is valid. Infinite values are not, except in a user's own support, as torch's checks mostly accept them.

    Example:
        >>> first_outside("x", torch.tensor([0.0, -3.0]), "Bernoulli", constraints.boolean)
        'x[1] = -3 lies outside the support of Bernoulli, 0 or 1; 1 of 2 values do'
        >>> first_outside("x", torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "OneHot", constraints.one_hot)
        'x[1] = [1, 1] lies outside the support of OneHot, OneHot(); 1 of 2 events of shape (2,) do'
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    valid = torch.as_tensor(support.check(x))
    event_shape = x.shape[valid.dim() :]  # of events that the support checks as a whole
    if type(support).__module__.partition(".")[0] in ("torch", "pyro"):
        infinite = torch.isinf(x)
        valid = valid & ~(infinite.flatten(valid.dim()).any(-1) if event_shape else infinite)
    if valid.all():
        return None
    index = tuple((~valid).nonzero()[0].tolist())
    found = x.expand(valid.shape + event_shape)[index]
    at = getattr(support, "at", lambda _: "0 or 1" if _is_binary(support) else support)
    return (
        f"{name}{list(index) or ''} = {_shown(found)} lies outside the support of {family}, "
        f"{at(index)}; {(~valid).sum()} of {valid.numel()} "
        f"{f'events of shape {tuple(event_shape)}' if event_shape else 'values'} do"
    )


def _is_binary(support: constraints.Constraint) -> bool:
    return isinstance(support, type(constraints.boolean))


def _shown(value: Tensor) -> str:
    entries = [f"{entry:.6g}" for entry in value.flatten()[:8].tolist()]
    if value.dim() == 0:
        return entries[0]
    return f"[{', '.join(entries)}{', ...' * (value.numel() > 8)}]"


def _grey_levels_hint(x: Tensor, support: constraints.Constraint) -> str:
    """Return advice for values that seem to be grey levels, or ""."""
    if support.event_dim or hasattr(support, "at"):  # which differs from column to column
        return ""
    if _is_binary(support) and ((x >= 0) & (x <= 1)).all():
        return (
            '. Grey levels are not binary: pass binarize="dynamic" (or "fixed", "threshold") to fit, '
            "evaluate or data.load, or choose a likelihood for grey levels, such as ContinuousBernoulli"
        )
    largest = getattr(support, "upper_bound", None)
    if isinstance(largest, int) and largest in (255, 65535) and ((x >= 0) & (x <= 1)).all():
        return f". Multiply grey levels of [0, 1] by {largest} and round them"
    two = torch.as_tensor(support.check(torch.full_like(x, 2.0)))
    if not two.any() and ((x >= 0) & (x <= 255)).all():  # such as [0, 1]
        return ". Divide grey levels 0..255 by 255"
    return ""
