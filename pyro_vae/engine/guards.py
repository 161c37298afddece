"""What Python code looks at beside tensors while a model runs, and whether it is still the same.

A graph of a step was recorded under certain attributes, global variables and variables of closures. Numbers
and words among them are constants in the graph, and modules and functions are in it as what they did. So the
names are kept with the objects that they stood for, and compared before the graph is used again.
"""

import dis
import functools
import operator
import sys
import sysconfig
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

__all__ = ["PLAIN", "Watch"]

PLAIN = (Tensor, bool, int, float, str, bytes, NoneType, torch.dtype, torch.device, torch.Size)
_VALUES = (*PLAIN, np.generic, np.ndarray)
_COMPARED = (bool, int, float, str, bytes, np.generic)  # by value where the object is another one
_PARTS = (
    "_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples", "_forward_hooks",
    "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_ABSENT = object()
_OURS = ("torch.", "pyro.", "pyro_vae.", "zuko.")
_BARE = (nn.Module, PyroModule)  # which read nothing but parts
_HERE = str(Path(__file__).parent.parent)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_LARGE = 100  # a dictionary with more items is data


class Watch:
    """Names, and the objects that they stood for when this was made.

    From functions on, everything is found that their code can reach: global variables, closures, defaults,
    what partials, decorators and methods hold, items of dictionaries, and the attributes that the code reads
    somewhere, with the functions among them. Of modules the parts and hooks are watched as well, and of the
    libraries' objects all plain attributes. Not watched are the attributes of classes and Python modules,
    and the inside of lists. Code of libraries is taken to look at nothing that changes.

    Args:
        functions: Python functions, methods, classes, other callables; dictionaries that they look into.
        objects: Modules and other objects that take part.

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

    def __init__(self, functions: Iterable[Callable | dict], objects: Iterable[Any]):
        self.kept: dict[tuple[int, Any], tuple[dict, Any, Any]] = {}  # namespace, name, value
        self.whole: list[dict] = []  # to which nothing may be added
        self.cells: list[CellType] = []
        self.reads: set[str] = set()  # names of attributes in the code
        self.objects: list[Any] = []
        self._seen: dict[int, Any] = {}  # alive, so that ids are unique
        for value in [*objects, *functions]:
            self._visit(value)
        size = -1
        while size != len(self._seen) + len(self.reads):  # what is read of objects leads to more that reads
            size = len(self._seen) + len(self.reads)
            for item in list(self.objects):
                self._look_inside(item)
        self.spaces = [space for space, _, _ in self.kept.values()]
        self.names = [name for _, name, _ in self.kept.values()]
        self.values = [value for _, _, value in self.kept.values()]
        self.sizes = list(map(len, self.whole))
        self.contents = list(map(_content, self.cells))

    def is_same(self) -> bool:
        """Whether every name stands for what it stood for: the same object, or an equal number or word."""
        found = map(dict.get, self.spaces, self.names, repeat(_ABSENT))
        if not all(map(operator.is_, found, self.values)):
            new = list(map(dict.get, self.spaces, self.names, repeat(_ABSENT)))
            if not all(map(_equal, new, self.values)):
                return False
            self.values = new
        return (
            all(map(_equal, map(_content, self.cells), self.contents))
            and list(map(len, self.whole)) == self.sizes
        )

    def _keep(self, space: dict, names: Iterable[Any]) -> None:
        """Watch these names, absent ones too, and visit what they stand for."""
        for name in names:
            if (id(space), name) not in self.kept:
                value = space.get(name, _ABSENT)
                self.kept[id(space), name] = (space, name, value)
                self._visit(value)

    def _visit(self, value: Any) -> None:
        if isinstance(value, (*_VALUES, ModuleType)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, type):  # of its methods a library may call any, as log_prob of a distribution
            if not _is_of_a_library(getattr(sys.modules.get(value.__module__), "__file__", None) or ""):
                for member in vars(value).values():
                    if isinstance(member, FunctionType):
                        self._visit_function(member)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, MethodType):
            self._visit(value.__func__)
            self._visit(value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, value.keywords):
                self._visit(part)
        elif isinstance(value, dict):
            if len(value) <= _LARGE:
                self._keep(value, value)
                self.whole.append(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._visit(getattr(value, "__wrapped__", None))
            self.objects.append(value)

    def _visit_function(self, function: FunctionType) -> None:
        self._visit(vars(function).get("__wrapped__"))
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(part)
        for cell in function.__closure__ or ():
            self.cells.append(cell)
            self._visit(_content(cell))
        if _is_of_a_library(function.__code__.co_filename):
            return
        variables, attributes = _names(function.__code__)
        self.reads |= attributes
        known = function.__globals__
        self._keep(known, [name for name in variables if name in known])

    def _look_inside(self, item: Any) -> None:
        """Watch what code reads of an object, and visit the methods that it calls."""
        kind, attributes = type(item), vars(item)
        bases = [base for base in kind.__mro__ if base.__module__.startswith(_OURS) and base not in _BARE]
        names = [name for name in attributes if name in self.reads]
        if bases:  # whose code, which is not looked at, may read any
            names += [name for name, value in attributes.items() if isinstance(value, _VALUES)]
        self._keep(attributes, names)
        if isinstance(item, nn.Module):
            for part in _PARTS:
                self._visit(attributes.get(part))
        for name in {*self.reads, "forward", "__call__"}.difference(attributes, vars(object)):
            member = getattr(kind, name, None)
            member = getattr(member, "fget", getattr(member, "__func__", member))  # of a property, ...
            if name == "forward" or (member is not None and not bases):
                self._keep(attributes, [name])  # absent, until an attribute of the object's own hides it
            if isinstance(member, FunctionType):
                self._visit(member)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, _COMPARED) and bool(one == other)


def _is_of_a_library(filename: str) -> bool:
    return filename.startswith((_HERE, *_LIBRARIES, "<frozen"))


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """The global variables, and the attributes of whatever, that a function and those inside it read."""
    variables, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            variables |= inner[0]
            attributes |= inner[1]
    return variables, attributes
