"""Guards for a recorded graph: the Python values that the model read, and a check that they are unchanged.

Numbers and strings that a model reads from attributes, variables and containers become constants of its
graph; modules and functions become the operations that they ran. So each name is stored with the object that
it referred to, and looked up again before the graph is replayed.
"""

import dis
import functools
import os
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.engine.recorder import Untraceable
from pyro_vae.engine.snapshot import ABSENT, Snapshot, attribute, equal

__all__ = ["LIBRARIES", "PLAIN_TYPES", "Guards", "describe", "is_of_library", "library_bases"]

PLAIN_TYPES = (
    Tensor, bool, int, float, complex, str, bytes, NoneType, np.generic,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_LEAF_TYPES = (*PLAIN_TYPES, np.ndarray)
_NOISE_TYPES = (random.Random, np.random.Generator, np.random.RandomState)
_MODULE_DICTS = (
    "_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples", "_forward_hooks",
    "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_CODE = ("__code__", "__defaults__", "__kwdefaults__")
_NOT_RUN = {"__init__", "__new__", "__post_init__", "__init_subclass__", "__del__", "__repr__", "__str__"}
_CALLED = {"forward", "__call__"}
LIBRARIES = ("torch.", "pyro.", "pyro_vae.", "zuko.")
_BASE_MODULES = (nn.Module, PyroModule)  # their own code reads `_MODULE_DICTS` only
_PACKAGE = str(Path(__file__).parent.parent)
_LIBRARY_FOLDERS = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


class Guards:
    """Names that the code of a model reads, with the objects that they referred to on construction.

    The search starts at `functions`. It follows what their code reads by name: global variables, closures,
    defaults, attributes of objects, classes, Python modules and functions, local imports, `getattr` and
    `hasattr` with a literal name, and methods; decorated functions and partials; items of dictionaries,
    lists, tuples, sets and deques; elements of NumPy arrays. If the code names `os.environ` or `os.getenv`,
    it includes all environment variables. For torch modules it includes parameters, buffers, submodules and
    hooks; for objects of classes in torch, Pyro, zuko and pyro_vae, or derived from such a class other than
    `nn.Module`, all attributes that are numbers, strings, tensors or arrays.

    Not guarded are

    - items of containers with more than 1,000 of them, except their number, and of other kinds of container;
    - attributes that did not exist on construction, except those of `getattr` and `hasattr`;
    - names put together at run time, such as `getattr(settings, prefix + "scale")`, and `sys.modules`;
    - values read through descriptors other than `property` and methods;
    - values read by code of installed libraries and of pyro_vae, except the attributes above, and attributes
      of their Python modules and classes, including methods replaced on these;
    - files, clocks, and global settings of torch and Pyro.

    Args:
        functions: Python functions, methods, classes, other callables; dictionaries that they read.
        objects: Modules and other objects whose attributes the functions read.
        ignored: Attributes that may change, by the `id` of their owner and name.

    Raises:
        Untraceable: If the code reads an iterator, or a NumPy array of more than 64 KiB.

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

    def __init__(
        self,
        functions: Iterable[Any],
        objects: Iterable[Any],
        ignored: Iterable[tuple[int, Any]] = (),
    ):
        self.snapshot = Snapshot(set(ignored))
        self.reads: set[str] = set()  # names of attributes in the code
        self.literals: set[str] = set()  # names that `getattr` and `hasattr` may read
        self.objects: dict[
            int, Any
        ] = {}  # objects, classes, Python modules and functions that have attributes
        self._seen: dict[int, Any] = {}  # keeps its objects alive, so that ids are unique
        for value in [*objects, *functions]:
            self._visit(value, None, type(value).__name__)
        size = -1
        while size != len(self._seen) + len(self.reads) + len(
            self.objects
        ):  # what is found reads further names
            size = len(self._seen) + len(self.reads) + len(self.objects)
            for item in list(self.objects.values()):
                self._visit_attributes(item)
        if {"environ", "getenv"} & self.reads:
            self.snapshot.add_environment()

    def hold(self) -> bool:
        """Return True if each name still refers to the same object, or to an equal number or string."""
        return self.snapshot.hold()

    def first_change(self) -> str:
        """Describe the first value that changed."""
        return next((describe(change.owner, change.name) for change in self.snapshot.changes()), "a value")

    def _visit(self, value: Any, owner: Any, name: Any) -> None:
        """Search a value found under a name of its owner."""
        if isinstance(value, PLAIN_TYPES) or value is ABSENT or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, np.ndarray):
            if not self.snapshot.add_array(value):
                raise Untraceable(
                    f"it reads {describe(owner, name)}, a NumPy array of {value.nbytes} bytes, too large to "
                    "be compared at each step: turn it into a tensor by torch.as_tensor"
                )
        elif isinstance(value, _NOISE_TYPES):
            self.snapshot.add_generator(value)
        elif isinstance(value, Iterator):
            raise Untraceable(f"it reads {describe(owner, name)}, an iterator")
        elif isinstance(value, dict | list | set | frozenset | tuple | deque):
            self._visit_container(value, owner, name)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, ModuleType):
            if not is_of_library(value):
                self._list(value)
        else:
            self._visit_object(value)

    def _visit_container(self, container: Any, owner: Any, name: Any) -> None:
        if (id(owner), name) in self.snapshot.ignored:
            return
        if not is_of_library(type(container)) and hasattr(container, "__dict__"):
            self._list(container)
        if not isinstance(container, tuple | frozenset):
            is_small = self.snapshot.add_container(container, owner, name)
            if not is_small:
                return
        if isinstance(container, dict):
            self._guard(container, container)
        else:
            for item in container:
                self._visit(item, owner, name)

    def _visit_class(self, kind: type) -> None:
        """Search all methods, since a library may call any, such as `log_prob` of a distribution."""
        for base in kind.__mro__:
            if not is_of_library(base):
                self._list(base)
                for member in list(vars(base).values()):
                    if isinstance(member, FunctionType | staticmethod | classmethod | property):
                        self._visit(member, base, "")

    def _visit_object(self, value: Any) -> None:
        parts = [attribute(value, "__wrapped__", None)]
        if isinstance(value, functools.partial):
            parts += [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType | staticmethod | classmethod):
            parts += [value.__func__, attribute(value, "__self__", None)]
        elif isinstance(value, property | functools.cached_property):
            parts += [getattr(value, "fget", None), getattr(value, "func", None)]
        elif isinstance(attribute(value, "__dict__", None), dict) or not is_of_library(type(value)):
            self._list(value)
        for part in parts:
            self._visit(part, value, "")

    def _visit_function(self, function: FunctionType) -> None:
        code = function.__code__
        self._visit(vars(function).get("__wrapped__"), function, "__wrapped__")
        for part in (function.__defaults__, function.__kwdefaults__):
            self._visit(part, function, "__defaults__")
        for cell, name in zip(function.__closure__ or (), code.co_freevars, strict=True):
            self._visit(self.snapshot.add_cell(cell, name, function), function, name)
        if is_of_library(function):
            return
        self._list(function)
        for name in _CODE:
            self.snapshot.add_attribute(function, name)
        names = _Names(code)
        self.reads |= names.attributes | names.variables | names.literals
        self.literals |= names.literals
        space = function.__globals__
        for name in names.imports:
            for full in (name, f"{space.get('__package__')}.{name}"):
                self._visit(sys.modules.get(full), function, name)
        module = sys.modules.get(space.get("__name__", ""))
        self._guard(space, names.variables, module if getattr(module, "__dict__", None) is space else None)

    def _list(self, item: Any) -> None:
        """Enter an object whose attributes may be read."""
        self.objects.setdefault(id(item), item)

    def _guard(self, space: dict, names: Iterable[Any], owner: Any = None) -> None:
        """Guard names of a dictionary, including absent ones, and search their values."""
        owner = space if owner is None else owner
        for name in list(names):
            self._visit(self.snapshot.add_variable(space, name, owner), owner, name)

    def _visit_attributes(self, item: Any) -> None:
        """Guard the attributes of an object that code reads."""
        if isinstance(item, type):
            for name in (self.reads | _CALLED).intersection(vars(item)):
                self._visit(self.snapshot.add_attribute(item, name), item, name)
        elif isinstance(item, ModuleType | FunctionType):
            self._guard(vars(item), self.reads.intersection(vars(item)) | self.literals, item)
        else:
            self._visit_instance(item, attribute(item, "__dict__", {}))

    def _visit_instance(self, item: Any, attributes: dict[str, Any]) -> None:
        kind = type(item)
        names = self.reads.intersection(attributes) | self.literals
        if library_bases(kind):  # code of a library is not searched, and may read any attribute
            names |= {name for name, value in attributes.items() if isinstance(value, _LEAF_TYPES)}
        if isinstance(item, nn.Module):
            names.add("forward")  # absent; if it is set later, it hides the method
            for part in _MODULE_DICTS:
                self._visit(attributes.get(part), item, part)
        elif hasattr(kind, "__getattr__"):
            self._visit_computed(
                item, [n for n in self.reads if n not in attributes and not hasattr(kind, n)]
            )
        for base in kind.__mro__:
            if not is_of_library(base):
                self._list(base)
                names |= (self.reads | _CALLED).intersection(vars(base))  # absent names that would hide these
                self._visit_operators(item, base)
        if isinstance(attributes, dict):
            self._guard(attributes, names, item)

    def _visit_operators(self, item: Any, base: type) -> None:
        """Search methods that run without their name, such as `__getitem__`, and guard `__slots__`."""
        for name, member in list(vars(base).items()):
            if isinstance(member, FunctionType) and name.startswith("__") and name not in _NOT_RUN:
                self._visit(member, base, name)
            elif isinstance(member, MemberDescriptorType) and name in self.reads:
                self._visit(self.snapshot.add_attribute(item, name), item, name)

    def _visit_computed(self, item: Any, names: Iterable[str]) -> None:
        """Guard attributes that a `__getattr__` finds, such as those of a configuration object."""
        for name in names:
            found = [attribute(item, name, ABSENT) for _ in range(2)]
            if found[0] is not ABSENT and equal(*found):
                self._visit(self.snapshot.add_attribute(item, name), item, name)


def is_of_library(value: Any) -> bool:
    """Return True for a function, class or module of the standard library, an installed one or pyro_vae."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith((_PACKAGE, *_LIBRARY_FOLDERS, "<frozen"))
    module = sys.modules.get(value.__module__) if isinstance(value, type) else value
    name = value.__module__ if isinstance(value, type) else value.__name__
    filename = getattr(module, "__file__", None)
    if isinstance(filename, str):
        return filename.startswith((_PACKAGE, *_LIBRARY_FOLDERS))
    return name.partition(".")[0] in (*sys.stdlib_module_names, "torch")


def library_bases(kind: type) -> list[type]:
    """Return the bases of a class in torch, Pyro, zuko and pyro_vae, other than `nn.Module`."""
    return [b for b in kind.__mro__ if b.__module__.startswith(LIBRARIES) and b not in _BASE_MODULES]


def describe(owner: Any, name: Any) -> str:
    """Name an attribute, variable or item for a message."""
    if isinstance(owner, _NOISE_TYPES) or owner is os or isinstance(owner, np.ndarray):
        return f"the {name} of {getattr(owner, '__name__', type(owner).__name__)}"
    if isinstance(owner, ModuleType):
        return f"variable {name!r} of module {owner.__name__!r}"
    if isinstance(owner, FunctionType):
        return f"variable {name!r} of function {owner.__name__!r}"
    if isinstance(owner, type):
        return f"attribute {name!r} of class {owner.__name__!r}"
    if isinstance(owner, dict | list | tuple):
        return f"item {name!r} of a {type(owner).__name__}"
    return f"attribute {name!r} of {type(owner).__name__}"


class _Names:
    """Names that the code of a function and of its inner functions reads."""

    def __init__(self, code: CodeType):
        self.variables: set[str] = set()  # global ones
        self.attributes: set[str] = set()
        self.imports: set[str] = set()
        self.literals: set[str] = set()  # strings in code that calls `getattr` or the like
        for instruction in dis.get_instructions(code):
            operation, name = instruction.opname, instruction.argval
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.variables.add(name)
            elif operation in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                self.attributes.add(name)
            elif operation == "IMPORT_NAME":
                self.imports.add(name)
        if {"getattr", "hasattr", "attrgetter"} & (self.variables | self.attributes):
            self.literals |= {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                inner = _Names(constant)
                self.variables |= inner.variables
                self.attributes |= inner.attributes
                self.imports |= inner.imports
                self.literals |= inner.literals
