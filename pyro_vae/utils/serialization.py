"""Save and load models and checkpoints without pickled code: atomic writes, check sums, rebuildable modules.

A file holds nested plain values and tensors, written by `torch.save`, so that
`torch.load(path, weights_only=True)` reads it without this package. `read` also verifies the check sums in
the file, which `torch.load` does not.

Loading a model must not run code from its file. So a class marked `rebuildable` records its constructor
arguments; `spec` describes a module by nested plain values, from which `rebuild` builds it again.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "CheckpointError",
    "fitting",
    "imported_on_demand",
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
_ON_DEMAND: dict[str, str] = {}  # module of a marked class, by its last name


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace the file `path` atomically: yield a temporary path, renamed to `path` if the block succeeds.

    The content is synchronised to the disk before the renaming, so that a kill, an error or a full disk
    leaves either the earlier file or the new one, complete.

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
    """A file without a usable checkpoint: missing, damaged, of another format, or of another model."""


def write(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write plain values and tensors to a file atomically; see `replacing`.

    Args:
        path: The file; its folder must exist.
        kind: Kind of content in a word; `read` checks it.
        content: Nested dicts and lists of tensors, numbers, strings, booleans and None.

    Raises:
        TypeError: If the content has values of other types; the message names the place.
        OSError: If the file cannot be written; an earlier file at `path` is unchanged.

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
        advice = "an earlier file is unchanged. Check that the folder exists, is writable and has space left"
        raise OSError(f"cannot write the checkpoint {path}: {error}; {advice}") from error


def to_plain(value: Any, convert: Callable[[Any], Any], place: str = "value") -> Any:
    """Convert a value to nested dicts, lists and tuples of plain values: numbers, strings, booleans, None.

    NumPy numbers, and subclasses of Python's numbers and strings, become Python's own types.

    Args:
        value: Value to convert.
        convert: Called first with each value; returns its replacement, or `NotImplemented` for the default
            conversion.
        place: Name of the value in error messages.

    Raises:
        TypeError: For values of other types; the message names the place.

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
    """Return the content of a file written by `write`.

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If the file is damaged, of another kind, or has values other than tensors and plain
            ones.
    """
    path = Path(path)
    if not path.is_file():
        folder = ", which is a folder: name the file in it" if path.is_dir() else ""
        raise FileNotFoundError(f"no checkpoint at {path}{folder}")
    try:
        with zipfile.ZipFile(path) as archive:
            _require_stored(archive, path.stat().st_size)
            damaged = archive.testzip()
        stored = None if damaged else torch.load(path, map_location=device, weights_only=True)
    except (PermissionError, MemoryError):
        raise  # not the fault of the content
    except Exception as error:  # a damaged archive or pickle may raise any error
        raise CheckpointError(
            f"{path} holds no readable checkpoint: it is truncated, damaged, or not written by this library "
            f"({type(error).__name__}); only tensors and plain values are read, never code"
        ) from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the check sum of its part {damaged!r} does not match")
    if not (isinstance(stored, dict) and stored.get("format") == f"pyro_vae {kind}"):
        found = stored.get("format") if isinstance(stored, dict) else None
        other = f"a {type(stored).__name__} that torch.save wrote"
        raise CheckpointError(
            f"{path} should hold a {kind!r} file of pyro_vae; found {other if found is None else repr(found)}"
        )
    version = _VERSIONS.get(kind, 1)
    if stored.get("version") != version:
        raise CheckpointError(
            f"{path} has format version {stored.get('version')!r} and this release reads version {version}: "
            "use the release that wrote it, or begin again in another folder"
        )
    return stored["content"]


def _require_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raise if an archive announces more bytes than its file has: `write` compresses nothing."""
    entries = archive.infolist()
    announced = sum(entry.file_size for entry in entries)
    if announced > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{size:,} bytes announce {announced:,}")


def fitting(path: str | os.PathLike[str], restore: Callable[[], _Result]) -> _Result:
    """Call `restore`, which applies a checkpoint's content; raise `CheckpointError` if it does not fit."""
    try:
        return restore()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds another architecture or other settings: {error}") from error


def rebuildable(cls: _Class) -> _Class:
    """Mark a module class, so that its instances record their constructor arguments for `spec`.

    Files name the class by the last part of its module's name and its own, as in "likelihoods.Normal". A
    user-defined class that is marked must be imported before a file is loaded.

    Raises:
        ValueError: If another class with the same name in files is already marked.

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
            arguments |= arguments.pop(keywords, {})  # each recorded as a named argument
            values = {
                key: copy.copy(value) if isinstance(value, list) else value
                for key, value in arguments.items()
            }
            recorded = {"class": name, "arguments": dict(list(values.items())[1:])}  # without self
            object.__setattr__(self, "_spec", recorded)

    cls.__init__ = record_and_construct  # type: ignore[method-assign]
    return cls


def imported_on_demand(*modules: str) -> None:
    """Name modules with `rebuildable` classes that are imported when a file names one of these classes.

    Only these are: what a file says never decides what else is imported.
    """
    _ON_DEMAND.update({module.rpartition(".")[2]: module for module in modules})


def spec(module: nn.Module) -> dict[str, Any] | None:
    """Describe a module by nested plain values; return None if one of its submodules is not `rebuildable`.

    Also None if submodules were replaced after construction, since the constructor arguments no longer
    describe the module. A submodule used in several places, such as a guide in a `VampPrior`, is described
    once, and rebuilt as one submodule.
    """
    try:
        description = _describe(module, {})
    except TypeError:
        return None
    with torch.random.fork_rng(devices=[]):  # initial parameters are drawn
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
        raise TypeError(f"a submodule of {type(module).__name__} was replaced")

    def describe(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return _describe(value, numbers)
        if isinstance(value, dict):  # would be read as the description of a module
            raise TypeError("a dict cannot be stored as an argument")
        return to_plain(list(value), describe) if isinstance(value, tuple) else NotImplemented

    arguments = {name: to_plain(value, describe, name) for name, value in arguments.items()}
    numbers[module] = len(numbers)
    return {"class": recorded["class"], "arguments": arguments}


def rebuild(description: Any, state: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Build a module with new initial parameters from a description by `spec`.

    Args:
        description: From `spec`, or from a file.
        state: Tensors that belong to the description: building may not allocate much more than they hold, so
            that a small file cannot ask for a large module.

    Raises:
        ValueError: If the description is malformed, names an unmarked class or invalid arguments, or asks for
            more memory than the state accounts for.
    """
    with nullcontext() if state is None else _BoundedAllocation(state):
        return _build(description, [])


class _BoundedAllocation(TorchDispatchMode):
    """Raise before an operation allocates much more than the tensors of a state hold."""

    def __init__(self, state: Mapping[str, torch.Tensor]):
        super().__init__()
        storages = [tensor.untyped_storage() for tensor in state.values()]  # that several tensors may share
        sizes = list({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self.largest = max([4 * size for size in sizes] + [2**20])  # of one tensor, in bytes
        self.left = 64 * sum(sizes) + 2**26  # of all, temporary ones too

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: the first use of a mode that the compiler skips imports it, which takes seconds."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = self._size(function, args, kwargs or {})
        self.left -= size
        if size > self.largest or self.left < 0:
            raise ValueError("it describes modules that are larger than its tensors")
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _size(function: Any, args: Any, kwargs: dict[str, Any]) -> int:
        """Estimate the bytes that an operation allocates if it broadcasts its arguments."""
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        asked = math.prod(given.get("size", given.get("repeats", ())) or (1,))
        if "arange" in function._schema.name and isinstance(given.get("end"), int):  # a slice has an end, too
            asked = max(asked, given["end"])
        for name in ("n", "m"):  # eye
            asked *= given[name] if isinstance(given.get(name), int) else 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # by hand, because torch.broadcast_shapes imports sympy, which takes seconds
        shapes = (reversed(tensor.shape) for tensor in tensors)
        sizes = [set(lengths) - {1} for lengths in itertools.zip_longest(*shapes, fillvalue=1)]
        if all(len(lengths) <= 1 for lengths in sizes):
            read = math.prod(length for lengths in sizes for length in lengths)
        else:  # a product of matrices, a concatenation
            read = sum(tensor.numel() for tensor in tensors)
        return 8 * max(asked * (read if "repeats" in given else 1), read if tensors else 1)


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
    module_name = str(name).partition(".")[0]
    if name not in _CLASSES and module_name in _ON_DEMAND:
        importlib.import_module(_ON_DEMAND[module_name])
    if name not in _CLASSES:
        raise ValueError(f"{name!r} is not a class that can be rebuilt; known: {', '.join(sorted(_CLASSES))}")
    try:
        parts = {k: _build(v, built) if isinstance(v, dict) else v for k, v in arguments.items()}
        module = _CLASSES[name](**parts)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} cannot be rebuilt from {arguments!s:.80}: {error}") from error
    built.append(module)
    return module
