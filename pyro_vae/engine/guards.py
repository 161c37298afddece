"""Guards for a recorded graph: the Python values that the model read, and a check that they are unchanged.

Numbers and strings that a model reads from attributes, global variables and closures become constants of its
graph; modules and functions become the operations that they ran. So each name is stored with the object that
it referred to, and looked up again before the graph is replayed.
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

__all__ = ["PLAIN_TYPES", "Guards"]

PLAIN_TYPES = (Tensor, bool, int, float, str, bytes, NoneType, torch.dtype, torch.device, torch.Size)
_LEAF_TYPES = (*PLAIN_TYPES, np.generic, np.ndarray)
_COMPARED_BY_VALUE = (bool, int, float, str, bytes, np.generic)
_MODULE_DICTS = (
    "_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples", "_forward_hooks",
    "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_ABSENT = object()
_LIBRARIES = ("torch.", "pyro.", "pyro_vae.", "zuko.")
_BASE_MODULES = (nn.Module, PyroModule)  # their own code reads `_MODULE_DICTS` only
_PACKAGE = str(Path(__file__).parent.parent)
_LIBRARY_FOLDERS = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_MAX_ITEMS = 100  # a larger dictionary is taken for data


class Guards:
    """Names that the code of a model reads, with the objects that they referred to on construction.

    The search starts at `functions` and follows the global variables and attributes that their code reads,
    closures, defaults, decorated functions, partials, methods and dictionaries. For torch modules it includes
    parameters, buffers, submodules and hooks; for objects of classes in torch, Pyro, zuko and pyro_vae, or
    derived from one other than `nn.Module`, all attributes that are numbers, strings, tensors or arrays.

    Not guarded are

    - attributes of classes, Python modules and functions, including methods replaced on a class;
    - elements of lists, tuples, sets, arrays and other containers; dictionaries with more than 100 items;
    - attributes in `__slots__`, and names that did not exist on construction;
    - names read otherwise than as `name` or `object.name`, such as by `getattr` or a local import;
    - values read by code that runs through operators, such as `__getitem__`, or descriptors other than
      `property`; and by inherited, static and class methods of a class, unless an object of it is found;
    - values read by code of installed libraries and of pyro_vae, except the attributes above;
    - files, environment variables, clocks, and global settings of torch and Pyro.

    Args:
        functions: Python functions, methods, classes, other callables; dictionaries that they read.
        objects: Modules and other objects whose attributes the functions read.

    Example:
        >>> from types import SimpleNamespace
        >>> settings = SimpleNamespace(slope=2.0, steps=0)
        >>> def model(x):
        ...     return settings.slope * x
        >>> guards = Guards([model], [])
        >>> settings.steps += 1  # not read by the model
        >>> guards.hold()
        True
        >>> settings.slope = 3.0
        >>> guards.hold()
        False
    """

    def __init__(self, functions: Iterable[Callable | dict], objects: Iterable[Any]):
        self.guarded: dict[tuple[int, Any], tuple[dict, Any, Any]] = {}  # namespace, name, value
        self.dicts: list[dict] = []  # guarded as a whole: no item may be added
        self.cells: list[CellType] = []
        self.reads: set[str] = set()  # names of attributes in the code
        self.objects: list[Any] = []
        self._seen: dict[int, Any] = {}  # keeps its objects alive, so that ids are unique
        for value in [*objects, *functions]:
            self._visit(value)
        size = -1
        while size != len(self._seen) + len(self.reads):  # methods found on objects read further attributes
            size = len(self._seen) + len(self.reads)
            for item in list(self.objects):
                self._visit_attributes(item)
        self.spaces = [space for space, _, _ in self.guarded.values()]
        self.names = [name for _, name, _ in self.guarded.values()]
        self.values = [value for _, _, value in self.guarded.values()]
        self.sizes = list(map(len, self.dicts))
        self.contents = list(map(_content, self.cells))

    def hold(self) -> bool:
        """Return True if each name still refers to the same object, or to an equal number or string."""
        found = map(dict.get, self.spaces, self.names, repeat(_ABSENT))
        if not all(map(operator.is_, found, self.values)):
            new = list(map(dict.get, self.spaces, self.names, repeat(_ABSENT)))
            if not all(map(_equal, new, self.values)):
                return False
            self.values = new
        return (
            all(map(_equal, map(_content, self.cells), self.contents))
            and list(map(len, self.dicts)) == self.sizes
        )

    def _guard(self, space: dict, names: Iterable[Any]) -> None:
        """Guard these names, including absent ones, and visit their values."""
        for name in names:
            if (id(space), name) not in self.guarded:
                value = space.get(name, _ABSENT)
                self.guarded[id(space), name] = (space, name, value)
                self._visit(value)

    def _visit(self, value: Any) -> None:
        if isinstance(value, (*_LEAF_TYPES, ModuleType)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, type):  # a library may call any method, such as log_prob of a distribution
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
            if len(value) <= _MAX_ITEMS:
                self._guard(value, value)
                self.dicts.append(value)
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
        self._guard(known, [name for name in variables if name in known])

    def _visit_attributes(self, item: Any) -> None:
        """Guard the attributes of an object that code reads, and visit its methods and properties."""
        kind, attributes = type(item), vars(item)
        bases = [b for b in kind.__mro__ if b.__module__.startswith(_LIBRARIES) and b not in _BASE_MODULES]
        names = [name for name in attributes if name in self.reads]
        if bases:  # code of a library is not searched, and may read any attribute
            names += [name for name, value in attributes.items() if isinstance(value, _LEAF_TYPES)]
        self._guard(attributes, names)
        if isinstance(item, nn.Module):
            for part in _MODULE_DICTS:
                self._visit(attributes.get(part))
        for name in {*self.reads, "forward", "__call__"}.difference(attributes, vars(object)):
            member = getattr(kind, name, None)
            member = getattr(member, "fget", getattr(member, "__func__", member))  # the function inside
            if name == "forward" or (member is not None and not bases):
                self._guard(attributes, [name])  # absent; an attribute set later would hide the method
            if isinstance(member, FunctionType):
                self._visit(member)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, _COMPARED_BY_VALUE) and bool(one == other)


def _is_of_a_library(filename: str) -> bool:
    return filename.startswith((_PACKAGE, *_LIBRARY_FOLDERS, "<frozen"))


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the global variables, and the attributes, that a function and its inner functions read."""
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
