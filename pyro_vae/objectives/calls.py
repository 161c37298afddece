"""Arguments of a pair: a batch as `fit` takes it, and messages for calls that the programs do not take."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_vae.utils.validation import nan_message

__all__ = ["as_arguments", "explaining_calls", "left_out", "require_arguments"]

_OUTSIDE = r"Shape mismatch inside plate\('(.*)'\) at site (.*) dim (-\d+), (\d+) vs (\d+)"
_LOG_PROB = r'at site "(.*)", invalid log_prob shape\s+Expected \[(.*)\], actual \[(.*)\]'
_COLLISION = r'at plates "(.*)" and "(?:particles|num_particles).*collide at dim=-(\d+)'


def as_arguments(
    model: Any, data: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a pair, taken out of a tuple or dict if that is all there is.

    A tuple or dict is a batch as in `fit` only where it can be nothing else: the model takes its items, and
    either no single argument, or a tensor by its annotation.

    Args:
        model: A Pyro model.
        data: Positional arguments.
        kwargs: Named arguments.

    Example:
        >>> as_arguments(lambda x, y: None, ((1, 2),), {}), as_arguments(lambda x, y=3: None, ((1, 2),), {})
        (((1, 2), {}), (((1, 2),), {}))
    """
    if len(data) != 1 or kwargs or not isinstance(data[0], tuple | dict):
        return data, kwargs
    if isinstance(data[0], dict):
        items: tuple[tuple[Any, ...], dict[str, Any]] = (), data[0]
    else:
        items = tuple(data[0]), {}
    signature = _signature(model)
    if signature is None or _call_problem(signature, *items):
        return data, kwargs
    first = next(iter(signature.parameters.values()), None)
    takes_tensor = first is not None and first.annotation in (Tensor, "Tensor", "torch.Tensor")
    return items if takes_tensor or _call_problem(signature, data, kwargs) else (data, kwargs)


def require_arguments(model: Any, data: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if the only argument is a tuple or dict of those that a model takes; see `as_arguments`."""
    if as_arguments(model, data, kwargs)[0] is not data:
        raise TypeError(
            f"expected the arguments of the model; got one {type(data[0]).__name__}{_remedy(data)}"
        )


@contextmanager
def explaining_calls(model: Any, guide: Any, data: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Raise errors that say which arguments a program takes, if it got others, or how deep its plates lie."""
    try:
        yield
    except ValueError as error:
        explanation = _explanation(str(error)) or _of_missing(str(error), data)
        if explanation is None:
            raise
        raise ValueError(explanation) from error
    except TypeError as error:
        for name, program in {"model": model, "guide": guide}.items():
            signature = _signature(program)
            problem = signature and _call_problem(signature, data, kwargs)
            if problem:
                raise TypeError(
                    f"the {name} takes {signature}; got {_shown(data, kwargs)}: {problem}{_remedy(data)}"
                ) from error
        raise


def _of_missing(message: str, data: tuple[Any, ...]) -> str | None:
    """Return what an error about parameters of a distribution means where data hold NaN."""
    tensors = [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor)]
    found = [leaf for leaf in tensors if "invalid values" in message and leaf.isnan().any()]
    return nan_message(found[0]) if found else None


def left_out(model: Any, data: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """Say which arguments of a model are None: a site that observes one is latent in this call."""
    signature = _signature(model)
    if signature is None or _call_problem(signature, data, kwargs):
        return
    bound = signature.bind(*data, **kwargs)
    bound.apply_defaults()
    names = [name for name, value in bound.arguments.items() if value is None and name != "observed"]
    if names:
        yield (
            f"The model was called with {', '.join(f'{name}=None' for name in names)}: a site that observes "
            "it is latent in this call, unless it is given"
        )


def _explanation(message: str) -> str | None:
    """Return what an error of Pyro's about shapes means here, if it is one that is known."""
    if found := re.search(_COLLISION, message):
        plate, nesting = found.groups()
        return (
            f"the plate {plate!r} lies at dim=-{nesting}, where that of the particles would: pass "
            f"max_plate_nesting={nesting}, to the estimator, as in IWAE(5, max_plate_nesting={nesting}), or "
            "to evaluate, terms and their like"
        )
    if found := re.search(_OUTSIDE, message):
        plate, site, dim, size, length = found.groups()
        return (
            f"the model's site {site!r} has {length} entries at dim {dim} of its batch shape, expected "
            f"{size}, one per example in the plate {plate!r}: declare the dimensions of an example as event "
            "dimensions, as in dist.Normal(loc, scale).to_event(1), at this site, or in the guide if its "
            "draws are of another shape than the model's"
        )
    if found := re.search(_LOG_PROB, message):
        site, expected, actual = found.groups()
        return (
            f"the values observed at the site {site!r} have another shape than its distribution: their "
            f"log-density has shape ({actual}), expected ({expected}). Give values of the distribution's "
            "shape, as in y.squeeze(-1) for a column, or declare its dimensions by .to_event(1)"
        )
    return None


def _signature(program: Any) -> inspect.Signature | None:
    """Return the signature of a program as it was written, or None if it has none."""
    owner, name = getattr(program, "__self__", None), getattr(program, "__name__", "")
    program = getattr(getattr(owner, "written", None), name, program)
    call: Callable[..., Any] = program.forward if isinstance(program, nn.Module) else program
    try:
        return inspect.signature(call).replace(return_annotation=inspect.Signature.empty)
    except (TypeError, ValueError):
        return None


def _call_problem(signature: inspect.Signature, data: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    try:
        signature.bind(*data, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _shown(data: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    found = f"{len(data)} argument{'s' * (len(data) != 1)} by position" if data or not kwargs else ""
    by_name = f"{', '.join(map(repr, kwargs))} by name" if kwargs else ""
    return " and ".join(filter(None, (found, by_name)))


def _remedy(data: tuple[Any, ...]) -> str:
    if len(data) == 1 and isinstance(data[0], tuple | dict):
        stars = "*" * (1 + isinstance(data[0], dict))
        return f". Pass the items of the {type(data[0]).__name__} as arguments, {stars}batch"
    return ". A batch for fit and evaluate is a tuple of all arguments, or a dict by their names"
