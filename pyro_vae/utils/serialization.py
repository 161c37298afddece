"""Save and load without pickled code: whole files, checked archives, modules rebuilt from plain values.

A file is what `torch.save` writes of nested plain values and tensors, so that
`torch.load(path, weights_only=True)` reads it without this package. Reading here also verifies the check sums
in the file, which `torch.load` does not.

A file that can rebuild a model must not be able to run code. A class marked `rebuildable` records the
arguments of its constructor; `spec` turns a module into nested plain values, and `rebuild` turns these back
into a module, out of the marked classes alone.
"""

import contextlib
import copy
import functools
import inspect
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

__all__ = [
    "CheckpointError",
    "fitting",
    "read",
    "rebuild",
    "rebuildable",
    "replacing",
    "spec",
    "to_plain",
    "write",
]

_VERSIONS = {"run": 2}  # of the formats of files; 1 of all others
_Result = TypeVar("_Result")
_Class = TypeVar("_Class", bound=type[nn.Module])
_CLASSES: dict[str, type[nn.Module]] = {}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which takes the name `path` when the block ends well.

    The content reaches the disk first, and the name changes in one step: a kill, an error or a full
    disk at any moment leaves the earlier file or the new one, whole.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with replacing(path) as partial:
        ...     _ = partial.write_text("1 2 3")
        >>> path.read_text()
        '1 2 3'
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


class CheckpointError(ValueError):
    """A file that holds no usable checkpoint: missing, damaged, foreign, or of another model."""


def write(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write plain values and tensors to a file, whole or not at all; see `replacing`.

    Args:
        path: The file; its folder must exist.
        kind: What the file holds, in a word; `read` asks for the same.
        content: Nested dicts and lists of tensors, numbers, strings, booleans and None.

    Raises:
        TypeError: If the content holds anything else; the message names the place.
        OSError: If the file cannot be written; the message names it, and `path` is as it was before.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "example.pt"
        >>> write(path, "example", {"weight": torch.ones(2)})
        >>> read(path, "example")
        {'weight': tensor([1., 1.])}
    """
    content = to_plain(content, lambda v: v if isinstance(v, torch.Tensor) else NotImplemented, "content")
    try:
        with replacing(path) as partial:
            torch.save(
                {"format": f"pyro_vae {kind}", "version": _VERSIONS.get(kind, 1), "content": content}, partial
            )
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        advice = "an earlier one of that name is untouched. Is the folder there, writable, with space left?"
        raise OSError(f"cannot write the checkpoint {path}: {error}; {advice}") from error


def to_plain(value: Any, convert: Callable[[Any], Any], place: str = "value") -> Any:
    """Return nested dicts, lists and tuples of plain values: numbers, strings, booleans, None.

    NumPy's numbers, and other kinds of number or string, become Python's own.

    Args:
        value: What to convert.
        convert: Asked first about each value; returns what to take for it, or `NotImplemented` where the
            rule above holds.
        place: Name of the value for the error.

    Raises:
        TypeError: For anything else; the message names the place.

    Example:
        >>> keep_tensors = lambda v: v if isinstance(v, torch.Tensor) else NotImplemented
        >>> to_plain({"a": [np.float64(1.5), torch.ones(2)]}, keep_tensors)
        {'a': [1.5, tensor([1., 1.])]}
    """
    converted = convert(value)
    if converted is not NotImplemented:
        return converted
    if isinstance(value, dict):
        return {key: to_plain(item, convert, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(item, convert, f"{place}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TypeError(
        f"{place} is a {type(value).__name__}; expected only tensors and plain values "
        "(numbers, strings, booleans, None, and dicts, lists and tuples of these)"
    )


def read(path: str | os.PathLike[str], kind: str, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, holds anything but tensors and plain values, or is
            not a file of this `kind`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        stored = None if damaged else torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive or pickle can fail in any way at all
        raise CheckpointError(
            f"{path} is no readable checkpoint: truncated, damaged, or not written by this library "
            f"({type(error).__name__}); only tensors and plain values are read, never code"
        ) from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the check sum of its part {damaged!r} does not match")
    if not (isinstance(stored, dict) and stored.get("format") == f"pyro_vae {kind}"):
        found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise CheckpointError(f"{path} should hold a {kind!r} file of pyro_vae; found {found!r}")
    version = _VERSIONS.get(kind, 1)
    if stored.get("version") != version:
        raise CheckpointError(
            f"{path} has format version {stored.get('version')!r} and this release reads version {version}: "
            "use the release that wrote it, or begin again in another folder"
        )
    return stored["content"]


def fitting(path: str | os.PathLike[str], restore: Callable[[], _Result]) -> _Result:
    """Call `restore`, which puts a checkpoint's content to use; report a misfit as `CheckpointError`."""
    try:
        return restore()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds another architecture or other settings: {error}") from error


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
    keywords = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(construct)
    def record_and_construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if type(self) is cls:
            arguments = signature.bind(self, *args, **kwargs).arguments
            arguments |= arguments.pop(keywords, {})  # recorded as if each were a named parameter
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

    def describe(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return _describe(value, numbers)
        if isinstance(value, dict):  # would be taken for a description of a module
            raise TypeError("a dict cannot be stored as an argument")
        return to_plain(list(value), describe) if isinstance(value, tuple) else NotImplemented

    arguments = {name: to_plain(value, describe, name) for name, value in arguments.items()}
    numbers[module] = len(numbers)
    return {"class": recorded["class"], "arguments": arguments}


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
