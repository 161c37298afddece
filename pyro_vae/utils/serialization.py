"""Modules that remember how they were built, so that a saved model is plain values and tensors.

A file that can rebuild a model must not be able to run code. A class marked `rebuildable` records
the arguments of its constructor; `spec` turns a module into nested plain values, and `rebuild`
turns these back into a module, out of the marked classes alone.
"""

import copy
import functools
import inspect
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

__all__ = ["rebuild", "rebuildable", "spec"]

_Class = TypeVar("_Class", bound=type[nn.Module])
_CLASSES: dict[str, type[nn.Module]] = {}


def rebuildable(cls: _Class) -> _Class:
    """Mark a module class: its instances record their constructor's arguments for `spec`.

    The class is known in files by its module's last name and its own, as in "likelihoods.Normal";
    a user's own class may be marked too, and must then be imported before a file is loaded.

    Raises:
        ValueError: If another class of the same name is marked already.

    Example:
        >>> @rebuildable
        ... class Scale(nn.Module):
        ...     def __init__(self, factor: float = 2.0):
        ...         super().__init__()
        >>> spec(Scale(3.0))["arguments"]
        {'factor': 3.0}
    """
    name = f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"
    if name in _CLASSES and _CLASSES[name].__module__ != cls.__module__:
        raise ValueError(f"two classes would be saved as {name!r}: rename one, or do not mark it")
    _CLASSES[name] = cls
    construct = cls.__init__
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def record_and_construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if type(self) is cls:
            arguments = signature.bind(self, *args, **kwargs).arguments
            values = {
                key: copy.copy(value) if isinstance(value, list) else value
                for key, value in arguments.items()
            }
            recorded = {"class": name, "arguments": dict(list(values.items())[1:])}  # without self
            object.__setattr__(self, "_spec", recorded)

    cls.__init__ = record_and_construct  # type: ignore[method-assign]
    return cls


def spec(module: nn.Module) -> dict[str, Any] | None:
    """Describe a module by nested plain values, or None where some part of it is not `rebuildable`.

    A part that stands in several places, such as a guide in a `VampPrior`, is described once, and
    stays one part when it is rebuilt. None, too, for a module whose parts were exchanged since it was
    built: its constructor's arguments no longer tell what it is.
    """
    try:
        description = _describe(module, {})
    except TypeError:
        return None
    with torch.random.fork_rng(devices=[]):  # fresh parameters are drawn
        return description if str(rebuild(description)) == str(module) else None


def _describe(module: nn.Module, numbers: dict[nn.Module, int]) -> dict[str, Any]:
    if module in numbers:
        return {"again": numbers[module]}
    recorded = getattr(module, "_spec", None)
    if recorded is None:
        raise TypeError(f"{type(module).__name__} is not rebuildable")
    arguments = recorded["arguments"]
    given = [value for value in arguments.values() if isinstance(value, nn.Module)]
    if not set(given) <= set(module.modules()):
        raise TypeError(f"a part of {type(module).__name__} was exchanged")
    arguments = {name: _plain(value, numbers) for name, value in arguments.items()}
    numbers[module] = len(numbers)
    return {"class": recorded["class"], "arguments": arguments}


def _plain(value: Any, numbers: dict[nn.Module, int]) -> Any:
    if isinstance(value, nn.Module):
        return _describe(value, numbers)
    if isinstance(value, list | tuple):
        return [_plain(item, numbers) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{value!r} is no plain value")


def rebuild(description: Any) -> nn.Module:
    """Build the module that `spec` described, with fresh parameters.

    Raises:
        ValueError: If the description is malformed, names a class that is not marked, or holds
            arguments that this class refuses.
    """
    return _build(description, [])


def _build(description: Any, built: list[nn.Module]) -> nn.Module:
    if not isinstance(description, dict) or set(description) not in ({"class", "arguments"}, {"again"}):
        raise ValueError(
            f"expected a description with keys 'class' and 'arguments'; got {str(description)[:80]}"
        )
    if "again" in description:
        number = description["again"]
        if number not in range(len(built)):
            raise ValueError(f"part {number!r} is used again, but only {len(built)} parts stand before it")
        return built[number]
    name, arguments = description["class"], description["arguments"]
    if name not in _CLASSES:
        raise ValueError(f"{name!r} is no class that can be rebuilt; known: {', '.join(sorted(_CLASSES))}")
    try:
        parts = {k: _build(v, built) if isinstance(v, dict) else v for k, v in arguments.items()}
        module = _CLASSES[name](**parts)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} cannot be rebuilt from {arguments!s:.80}: {error}") from error
    built.append(module)
    return module
