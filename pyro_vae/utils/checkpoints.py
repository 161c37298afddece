"""Files that hold a model or a run: written whole or not at all, read without executing code.

A file is what `torch.save` writes of nested plain values and tensors, so that
`torch.load(path, weights_only=True)` reads it without this package. Reading here also verifies the
check sums in the file, which `torch.load` does not.
"""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pyro_vae.utils.files import replacing

__all__ = ["CheckpointError", "fitting", "read", "write"]

_VERSION = 1
_Result = TypeVar("_Result")


class CheckpointError(ValueError):
    """A file that holds no usable checkpoint: missing, damaged, foreign, or of another model."""


def write(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write plain values and tensors to a file, whole or not at all; see `files.replacing`.

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
    content = _plain(content, "content")
    try:
        with replacing(path) as partial:
            torch.save({"format": f"pyro_vae {kind}", "version": _VERSION, "content": content}, partial)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        advice = "an earlier one of that name is untouched. Is the folder there, writable, with space left?"
        raise OSError(f"cannot write the checkpoint {path}: {error}; {advice}") from error


def _plain(value: Any, place: str) -> Any:
    """Return the value with NumPy's numbers, and other kinds of number or word, as Python's own."""
    if isinstance(value, dict):
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, f"{place}[{index}]") for index, item in enumerate(value))
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"{place} is a {type(value).__name__}; a checkpoint holds only tensors and plain values "
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
    if stored.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format version {stored.get('version')!r}; this release reads version {_VERSION}"
        )
    return stored["content"]


def fitting(path: str | os.PathLike[str], restore: Callable[[], _Result]) -> _Result:
    """Call `restore`, which puts a checkpoint's content to use; report a misfit as `CheckpointError`."""
    try:
        return restore()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds another architecture or other settings: {error}") from error
