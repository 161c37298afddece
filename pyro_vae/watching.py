"""What Python code looks at beside tensors while a model runs, and whether it is still the same.

A graph of a step was recorded under certain attributes, global variables and variables of closures. Numbers
and words among them are constants in the graph, and modules and functions are in it as what they did. So the
names are kept with the objects that they stood for, and compared by identity before the graph is used again.
"""

import dis
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PLAIN", "Watch"]

PLAIN = (Tensor, bool, int, float, str, bytes, NoneType, torch.dtype, torch.device, torch.Size)
_VALUES = (*PLAIN, np.generic, np.ndarray)
_LIBRARIES = ("torch.", "pyro.", "zuko.")  # whose functions look at nothing that changes


class Watch:
    """Names, and the objects that they stood for when this was made.

    Watched are all plain attributes, parts and hooks of modules, and the plain attributes of other objects
    that are given; the global variables and closures that functions read; and of what they find there the
    items of dictionaries, the attributes that they name, and the functions that they call. Not watched are
    the attributes of classes and of Python modules, and the inside of lists.

    Args:
        functions: Python functions, methods or callables; those of the libraries are passed over.
        objects: Modules and others whose attributes count.

    Example:
        >>> from types import SimpleNamespace
        >>> settings = SimpleNamespace(slope=2.0, steps=0)
        >>> def model(x):
        ...     return settings.slope * x
        >>> watch = Watch([model], [])
        >>> settings.steps += 1  # which the model does not look at
        >>> watch.is_same()
        True
        >>> settings.slope = 3.0
        >>> watch.is_same()
        False
    """

    def __init__(self, functions: Iterable[Callable], objects: Iterable[Any]):
        self.spaces: list[dict] = []
        self.names: list[Any] = []
        self.values: list[Any] = []
        self.cells: list[CellType] = []
        self.contents: list[Any] = []
        self.whole: list[dict] = []  # to which nothing may be added
        self._seen: set[tuple[int, ...]] = set()
        for item in objects:
            self._watch_object(item)
        for function in functions:
            self._watch_function(function)
        self.sizes = list(map(len, self.whole))

    def is_same(self) -> bool:
        """Whether every name stands for the object that it stood for."""
        return (
            all(map(operator.is_, map(dict.get, self.spaces, self.names), self.values))
            and all(map(operator.is_, map(_content, self.cells), self.contents))
            and list(map(len, self.whole)) == self.sizes
        )

    def _is_new(self, *items: Any) -> bool:
        key = tuple(map(id, items))
        new = key not in self._seen
        self._seen.add(key)
        return new

    def _keep(self, space: dict, names: Iterable[Any]) -> None:
        for name in names:
            self.spaces.append(space)
            self.names.append(name)
            self.values.append(space[name])

    def _watch_object(self, item: Any) -> None:
        if not self._is_new(item):
            return
        attributes = vars(item)
        inner = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        parts = [attributes[name] for name in inner if isinstance(attributes.get(name), dict)]
        self._keep(attributes, [name for name, value in attributes.items() if isinstance(value, _VALUES)])
        for part in parts:
            self._keep(part, part)
        self.whole += [attributes, *parts]

    def _watch_function(self, function: Any) -> None:
        if isinstance(function, functools.partial):
            self._watch_value(function.keywords, None)
            function = function.func
        owner = getattr(function, "__self__", None)
        function = getattr(function, "__func__", function)
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or (function.__module__ or "").startswith(_LIBRARIES):
            return
        if not self._is_new(function, owner):
            return
        code, known = function.__code__, function.__globals__
        names = [name for name in _global_names(code) if name in known]
        self._keep(known, names)
        self.cells += function.__closure__ or ()
        self.contents += map(_content, function.__closure__ or ())
        for value in [owner, *map(known.get, names), *map(_content, function.__closure__ or ())]:
            self._watch_value(value, code)

    def _watch_value(self, value: Any, code: CodeType | None) -> None:
        """Look inside what a name in a function's code stands for."""
        if isinstance(value, FunctionType | MethodType | functools.partial):
            self._watch_function(value)
        elif isinstance(value, (*_VALUES, nn.Module, ModuleType, type)) or not self._is_new(value, code):
            return
        elif type(value) is dict:
            self._keep(value, [name for name, item in value.items() if isinstance(item, _VALUES)])
            self.whole.append(value)
        elif code is not None and hasattr(value, "__dict__"):
            attributes = vars(value)
            named = [name for name in code.co_names if name in attributes]
            self._keep(attributes, named)
            for name in named:
                self._watch_value(attributes[name], code)
            for name in code.co_names:
                method = getattr(type(value), name, None)
                if isinstance(method, FunctionType):
                    self._watch_function(MethodType(method, value))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _global_names(code: CodeType) -> Iterator[str]:
    """The global variables that a function and those defined in it read."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
