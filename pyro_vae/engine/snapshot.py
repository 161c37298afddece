"""Snapshot of values that Python code reads: compared at each step, and restored after a recording.

The comparison is a few loops of C code over flat lists, since it costs time at each step.
"""

import math
import operator
import os
import pickle
import random
from array import array as Array  # noqa: N812 (a class)
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from ctypes import Array as CArray
from ctypes import _SimpleCData
from functools import partial
from itertools import chain, repeat
from types import CellType, MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["ABSENT", "BUFFER_TYPES", "MAX_ITEMS", "Change", "Snapshot", "attribute", "equal"]

ABSENT = object()
_BY_VALUE = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device)
BUFFER_TYPES = (np.ndarray, Array, bytearray, memoryview, CArray, _SimpleCData)  # compared by their bytes
MAX_ITEMS = 1_000  # of a container; a larger one is taken for data
_MAX_BYTES = 2**16  # of an array: some 10 µs


class Change(NamedTuple):
    """A value that differs from the one in a snapshot."""

    owner: Any
    """Object, class, module or container that holds the value; a function for its variables."""
    name: Any
    before: Any
    after: Any


class _Lookups:
    """Values under names in spaces of one kind: dictionaries, classes, objects or cells."""

    def __init__(self, get: Callable[[Any, Any, Any], Any], put: Callable[[Any, Any, Any], None]):
        self.get, self.put = get, put
        self.spaces: list[Any] = []
        self.names: list[Any] = []
        self.values: list[Any] = []
        self.owners: list[Any] = []

    def add(self, space: Any, name: Any, owner: Any) -> Any:
        self.spaces.append(space)
        self.names.append(name)
        self.values.append(self.get(space, name, ABSENT))
        self.owners.append(owner)
        return self.values[-1]

    def found(self) -> Iterator[Any]:
        return map(self.get, self.spaces, self.names, repeat(ABSENT))

    def hold(self) -> bool:
        if not self.names:
            return True
        if all(map(operator.is_, self.found(), self.values)):
            return True
        found = list(self.found())
        if not all(map(equal, found, self.values)):
            return False
        self.values = found
        return True

    def changes(self) -> list[Change]:
        places = zip(self.owners, self.names, self.values, self.found(), strict=True)
        return [Change(*place) for place in places if not equal(place[2], place[3])]

    def restore(self) -> None:
        found = list(self.found())
        for space, owner, name, before, after in zip(
            self.spaces, self.owners, self.names, self.values, found, strict=True
        ):
            if before is not after:
                self.put(owner if isinstance(space, MappingProxyType) else space, name, before)


class Snapshot:
    """Values of attributes, variables and items at one time.

    Args:
        ignored: Attributes that are left out, by the `id` of their owner and name.
    """

    def __init__(self, ignored: set[tuple[int, Any]]):
        self.ignored = ignored
        self.in_dicts = _Lookups(dict.get, _put_item)
        self.in_classes = _Lookups(MappingProxyType.get, _put_attribute)
        self.in_objects = _Lookups(attribute, _put_attribute)
        self.in_cells = _Lookups(_content, _put_content)
        self.in_contexts = _Lookups(_context, _put_context)
        self.in_mappings = _Lookups(_item, _put_item)
        self.in_calls = _Lookups(_called, _put_nothing)
        self.lookups = (
            self.in_dicts, self.in_classes, self.in_objects, self.in_cells, self.in_contexts,
            self.in_mappings, self.in_calls,
        )  # fmt: skip
        self.containers: list[
            tuple[Any, tuple[Any, Any], list[Any] | None]
        ] = []  # container, owner and name, content
        self.sized: list[Any] = []
        self.sizes: list[int] = []
        self.sequences: list[Any] = []  # containers that are compared item by item
        self.items: list[Any] = []  # of all sequences
        self.arrays: list[Any] = []
        self.bytes: list[bytes] = []
        self.typed: list[Any] = []
        self.types: list[type] = []
        self.environment: dict[Any, Any] | None = None
        self.generators: list[tuple[Any, Any]] = []  # with their states; `hold` does not compare these
        self._known = set(ignored)

    def __len__(self) -> int:
        return sum(len(lookups.names) for lookups in self.lookups) + len(self.items) + len(self.arrays)

    def add_variable(self, space: dict[Any, Any], name: Any, owner: Any) -> Any:
        """Add an item of a dictionary that belongs to `owner`; return its value, or ABSENT if known."""
        return self._add(self.in_dicts, space, name, owner)

    def add_attribute(self, owner: Any, name: str) -> Any:
        """Add an attribute of a class, or of an object by `getattr`; return its value, or ABSENT if known."""
        if isinstance(owner, type):
            return self._add(self.in_classes, vars(owner), name, owner)
        return self._add(self.in_objects, owner, name, owner)

    def add_cell(self, cell: CellType, name: str, owner: Any) -> Any:
        """Add a variable of a closure; return its value."""
        return self.in_cells.add(cell, name, owner)

    def add_context(self, variable: ContextVar[Any], owner: Any) -> Any:
        """Add a context variable; return its value."""
        return self.in_contexts.add(variable, variable.name, owner)

    def add_mapping(self, mapping: Mapping[Any, Any]) -> list[Any]:
        """Add the items of a mapping that is not a dictionary; return the values."""
        self.add_call(partial(tuple, mapping), "names", mapping)
        return [self.in_mappings.add(mapping, name, mapping) for name in mapping]

    def add_call(self, function: Callable[[], tuple[Any, ...]], name: str, owner: Any) -> None:
        """Add the values that a function returns as a tuple; they are compared, and not restored."""
        self.in_calls.add(function, name, owner)

    def add_type(self, item: Any) -> None:
        """Add the class of an object, which may be assigned."""
        self.typed.append(item)
        self.types.append(type(item))

    def _add(self, lookups: _Lookups, space: Any, name: Any, owner: Any) -> Any:
        if (id(owner), name) in self._known:
            return ABSENT
        self._known.add((id(owner), name))
        return lookups.add(space, name, owner)

    def add_container(self, container: Any, owner: Any, name: Any) -> bool:
        """Add a list, set, deque or dictionary; return False if it is so large that only its size counts."""
        is_small = len(container) <= MAX_ITEMS
        self.containers.append((container, (owner, name), list(container) if is_small else None))
        self.sized.append(container)
        self.sizes.append(len(container))
        if is_small and len(container):  # of a dictionary the names, in their order
            self.sequences.append(container)
            self.items += container
        return is_small

    def add_array(self, array: Any) -> bool:
        """Add the elements of an array or another buffer; return False if they are too many."""
        if (array if isinstance(array, np.ndarray) else memoryview(array)).nbytes > _MAX_BYTES:
            return False
        self.arrays.append(array)
        self.bytes.append(_bytes(array))
        return True

    def add_generator(self, generator: Any) -> None:
        """Add a random generator of Python or NumPy."""
        self.generators.append((generator, _state(generator)))

    def add_environment(self) -> None:
        """Add the environment variables."""
        self.environment = dict(_environment())

    def hold(self) -> bool:
        """Return True if all values are the same objects, or equal numbers and strings."""
        return (
            all(lookups.hold() for lookups in self.lookups)
            and list(map(len, self.sized)) == self.sizes
            and self._items_hold()
            and list(map(_bytes, self.arrays)) == self.bytes
            and list(map(type, self.typed)) == self.types
            and (self.environment is None or _environment() == self.environment)
        )

    def _items_hold(self) -> bool:
        if all(map(operator.is_, chain.from_iterable(self.sequences), self.items)):
            return True
        return all(map(equal, chain.from_iterable(self.sequences), self.items))

    def changes(self) -> list[Change]:
        """Return the values that changed; a container, an array and the environment count as one value."""
        found = [change for lookups in self.lookups for change in lookups.changes()]
        for (container, (owner, name), content), size in zip(self.containers, self.sizes, strict=True):
            same = content is None or equal(tuple(container), tuple(content))
            if len(container) != size or not same:
                found.append(Change(owner, name, content, list(container)))
        for array, elements in zip(self.arrays, self.bytes, strict=True):
            if _bytes(array) != elements:
                found.append(Change(array, "elements", elements, _bytes(array)))
        for item, kind in zip(self.typed, self.types, strict=True):
            if type(item) is not kind:
                found.append(Change(item, "__class__", kind, type(item)))
        if self.environment is not None and _environment() != self.environment:
            found.append(Change(os, "environ", self.environment, dict(_environment())))
        for generator, state in self.generators:
            if _state(generator) != state:
                found.append(Change(generator, "state", state, _state(generator)))
        return found

    def restore(self) -> None:
        """Restore all values, except the content of containers that are compared by their size."""
        for lookups in self.lookups:
            lookups.restore()
        for container, _, content in self.containers:
            if content is not None and not equal(tuple(container), tuple(content)):
                _fill(container, content)
        for array, elements in zip(self.arrays, self.bytes, strict=True):
            if _bytes(array) != elements:
                _put_bytes(array, elements)
        for item, kind in zip(self.typed, self.types, strict=True):
            if type(item) is not kind:
                item.__class__ = kind
        if self.environment is not None and _environment() != self.environment:
            decoded = {os.fsdecode(name): os.fsdecode(value) for name, value in self.environment.items()}
            os.environ.clear()
            os.environ.update(decoded)
        for generator, state in self.generators:
            _set_state(generator, state)


def equal(one: Any, other: Any) -> bool:
    """Return True for the same object, for equal numbers and strings of one type, and for tuples of these.

    Zeros of different sign differ.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float | np.floating) and (math.isnan(one) or not one):
        return math.isnan(other) if one else not other and math.copysign(1, one) == math.copysign(1, other)
    return isinstance(one, _BY_VALUE) and bool(one == other)


def _environment() -> dict[Any, Any]:
    return os.environ._data  # type: ignore[attr-defined] # encoded: 30 times faster to copy


def attribute(owner: Any, name: str, default: Any) -> Any:
    """Return an attribute, or the default if there is none or finding it raises an error."""
    try:
        return getattr(owner, name, default)
    except Exception:  # a `__getattr__` may raise anything
        return default


def _content(cell: CellType, _: str, default: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return default


def _item(mapping: Mapping[Any, Any], name: Any, default: Any) -> Any:
    try:
        return mapping[name]
    except Exception:  # a library's may raise anything
        return default


def _context(variable: ContextVar[Any], _: str, default: Any) -> Any:
    return variable.get(default)


def _called(function: Callable[[], tuple[Any, ...]], _: str, __: Any) -> tuple[Any, ...]:
    return function()


def _bytes(array: Any) -> bytes:
    """Return the elements of an array as bytes; of one of Python objects, their identities."""
    return array.tobytes() if isinstance(array, np.ndarray) else bytes(memoryview(array))


def _put_bytes(array: Any, elements: bytes) -> None:
    if isinstance(array, np.ndarray):
        array[...] = np.frombuffer(elements, array.dtype).reshape(array.shape)
    else:
        memoryview(array).cast("B")[:] = elements


def _put_item(space: dict[Any, Any], name: Any, value: Any) -> None:
    if value is ABSENT:
        del space[name]
    else:
        space[name] = value


def _put_attribute(owner: Any, name: str, value: Any) -> None:
    if value is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _put_content(cell: CellType, _: str, value: Any) -> None:
    if value is ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _put_context(variable: ContextVar[Any], _: str, value: Any) -> None:
    if value is not ABSENT:  # a variable of a context cannot be removed from it
        variable.set(value)


def _put_nothing(*_: Any) -> None:
    pass


def _fill(container: Any, content: list[Any]) -> None:
    """Give a container its former items in their order; the values of a dictionary are looked up."""
    if isinstance(container, dict):
        former = {name: container[name] for name in content if name in container}
        container.clear()
        container.update(former)
    else:
        container.clear()
        container.update(content) if isinstance(container, set) else container.extend(content)


def _state(generator: Any) -> bytes:
    """Return the state of a random generator, in a form that can be compared."""
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    return pickle.dumps(getattr(generator, "bit_generator", generator).__getstate__())


def _set_state(generator: Any, state: bytes) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))
    else:
        getattr(generator, "bit_generator", generator).__setstate__(pickle.loads(state))
