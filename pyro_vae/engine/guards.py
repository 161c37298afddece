"""Guards for a recorded graph: the Python values that the model read, and a check that they are unchanged.

Numbers and strings that a model reads from attributes, variables and containers become constants of its
graph; modules and functions become the operations that they ran. So each name is stored with the object that
it referred to, and looked up again before the graph is replayed.
"""

import argparse
import builtins
import dis
import functools
import gc
import inspect
import operator
import os
import random
import sys
import sysconfig
import weakref
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from types import (
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.engine.recorder import Untraceable
from pyro_vae.engine.snapshot import ABSENT, BUFFER_TYPES, MAX_ITEMS, Snapshot, attribute, equal

__all__ = [
    "LIBRARIES",
    "PLAIN_TYPES",
    "Guards",
    "describe",
    "is_library_file",
    "is_of_library",
    "library_bases",
]

PLAIN_TYPES = (
    Tensor, bool, int, float, complex, str, bytes, NoneType, np.generic,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_LEAF_TYPES = (*PLAIN_TYPES, np.ndarray)
_NUMBERS = (bool, int, float, complex, str, bytes)
_NOISE_TYPES = (random.Random, np.random.Generator, np.random.RandomState)
_MODULE_DICTS = (
    "_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples", "_forward_hooks",
    "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_BUILTINS = frozenset(vars(builtins))
_SEARCHED = (UserDict, UserList, ChainMap, MappingProxyType, weakref.ref, functools.partial)
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_MOVING = ("multiprocessing.", "queue.", "_queue.", "_io.", "tempfile.", "shelve.", "sqlite3.", "mmap.")
_BY_TEXT = {
    "getattr",
    "hasattr",
    "attrgetter",
    "methodcaller",
    "__getattribute__",
}  # read names given as text
_ALL_NAMES = {"vars", "__dict__"}
_BY_IMPORT = {"import_module", "__import__", "modules"}
_CODE = ("__code__", "__defaults__", "__kwdefaults__")
_NOT_RUN = {"__init__", "__new__", "__post_init__", "__init_subclass__", "__del__", "__repr__", "__str__"}
_CALLED = {"forward", "__call__"}
LIBRARIES = ("torch.", "pyro.", "pyro_vae.", "zuko.")
_BASE_MODULES = (nn.Module, PyroModule)  # their own code reads `_MODULE_DICTS` only
_PACKAGE = str(Path(__file__).parent.parent)


def _library_folders(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the folders of libraries: of this environment, and those among the paths.

    Such as the packages of the system or of the user, which an environment may see, too.
    """
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return (*own, *(path for path in paths if Path(path).name in ("site-packages", "dist-packages")))


_LIBRARY_FOLDERS = _library_folders(sys.path)


class Guards:
    """Names that the code of a model reads, with the objects that they referred to on construction.

    The search starts at `functions`. It follows what their code reads by name: global variables, closures,
    defaults, attributes of objects, tensors, classes, metaclasses, Python modules and functions, local
    imports, and methods; decorated functions, partials, and what `functools.cache` holds; items of
    dictionaries in their order, lists, tuples, sets, deques, the views and copies of these in `types` and
    `collections`, other mappings that return what they hold; elements of NumPy arrays, `array`, `bytearray`
    and ctypes; context variables and weak references. Where code that ran calls `getattr` with a name made
    at run time, or reads `vars(...)` or `__dict__`, it includes all attributes of the objects that are read;
    where code names the environment, all its variables. For torch modules the search includes parameters,
    buffers, submodules and hooks; for objects of classes in torch, Pyro, zuko and pyro_vae, or derived from
    such a class other than `nn.Module`, all attributes that are numbers, strings, tensors, arrays, or, such
    as the programs of a pair, functions that ran; for Pyro's messengers, all attributes.

    Not guarded are

    - items of containers with more than 1,000 of them, except their number;
    - attributes that did not exist on construction, except names of `getattr` and `hasattr`, and those that
      hide an attribute of a class;
    - objects that a function returns and no variable or cache holds, such as one of a registry of a library;
    - values read by code of installed libraries and of pyro_vae, except the attributes above, and methods or
      functions replaced in their classes, and in their Python modules except where the model names these;
    - files and clocks that libraries read; what torch's functions say of its settings, such as its number of
      threads; hooks of the nodes that accumulate gradients.

    Args:
        functions: Python functions, methods, classes, other callables; dictionaries that they read.
        objects: Modules and other objects whose attributes the functions read.
        ignored: Attributes that may change, by the `id` of their owner and name.
        ran: Code that is known to run: only there, names made at run time make all attributes guarded, and
            containers of libraries raise.

    Raises:
        Untraceable: If the code reads what no guard can compare: an iterator, an array of more than 64 KiB,
            or a container of a library, such as a data frame, a queue or an open file.

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
        ran: Container[CodeType] = (),
    ):
        self.snapshot = Snapshot(set(ignored))
        self.reads: set[str] = set()  # names of attributes in the code
        self.literals: set[str] = set()  # names that `getattr` and `hasattr` may read
        self.ran = ran
        self._methods: dict[type, set[str]] = {}
        self.read_there: set[str] = set()  # names in code that ran
        self.reads_all = False  # by names that are made at run time
        self.objects: dict[
            int, Any
        ] = {}  # objects, classes, Python modules and functions that have attributes
        self.tensors: dict[int, Tensor] = {}
        self._seen: dict[int, Any] = {}  # keeps its objects alive, so that ids are unique
        for value in [*objects, *functions]:
            self._visit(value, None, type(value).__name__)
        size: tuple[int, ...] = ()
        while size != self._size():  # what is found reads further names
            size = self._size()
            for item in list(self.objects.values()):
                self._visit_attributes(item)
        for item in self.objects.values():
            if not isinstance(item, type | ModuleType | FunctionType):
                self.snapshot.add_type(item)
        if {"environ", "environb", "getenv", "getenvb"} & self.reads:
            self.snapshot.add_environment()

    def _size(self) -> tuple[int, ...]:
        parts: tuple[Any, ...] = self._seen, self.reads, self.literals, self.objects
        return *map(len, parts), self.reads_all

    def hold(self) -> bool:
        """Return True if each name still refers to the same object, or to an equal number or string."""
        return self.snapshot.hold()

    def first_change(self) -> str:
        """Describe the first value that changed."""
        return next((describe(change.owner, change.name) for change in self.snapshot.changes()), "a value")

    def _visit(self, value: Any, owner: Any, name: Any) -> None:
        """Search a value found under a name of its owner."""
        if id(value) in self._seen or value is ABSENT:
            return
        if isinstance(value, PLAIN_TYPES):
            if isinstance(value, Tensor):
                self.tensors[id(value)] = value
            if getattr(value, "__dict__", None):  # of a tensor, or of a class derived from a number
                self._seen[id(value)] = value
                self._list(value)
            return
        self._seen[id(value)] = value
        if type(value) in weakref.ProxyTypes:
            self._visit(attribute(attribute(value, "__repr__", None), "__self__", None), owner, name)
        elif not self._visit_special(value, owner, name):
            self._visit_searched(value, owner, name)

    def _visit_special(self, value: Any, owner: Any, name: Any) -> bool:
        """Guard the content of buffers, generators, contexts and the environment; return False for others."""
        if isinstance(value, BUFFER_TYPES):
            if not self.snapshot.add_array(value):
                size = value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes
                kind = (
                    "a NumPy array" if isinstance(value, np.ndarray) else f"of class {type(value).__name__}"
                )
                raise Untraceable(
                    f"it reads {describe(owner, name)}, {kind} of {size} bytes, too large "
                    "to be compared at each step: turn it into a tensor by torch.as_tensor"
                )
        elif isinstance(value, _NOISE_TYPES):
            self.snapshot.add_generator(value)
        elif isinstance(value, os._Environ):
            self.snapshot.add_environment()
        elif isinstance(value, ContextVar):
            self._visit(self.snapshot.add_context(value, owner), value, value.name)
        elif isinstance(value, Iterator):
            raise Untraceable(f"it reads {describe(owner, name)}, an iterator")
        else:
            return False
        return True

    def _visit_searched(self, value: Any, owner: Any, name: Any) -> None:
        if isinstance(value, dict | list | set | frozenset | tuple | deque):
            self._visit_container(value, owner, name)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, ModuleType):
            self._list(value)
        else:
            self._visit_object(value, owner, name)

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
        for base in chain(kind.__mro__, inspect.getmro(type(kind))):
            if not is_of_library(base):
                self._list(base)
                for member in list(vars(base).values()):
                    if isinstance(member, FunctionType | staticmethod | classmethod | property):
                        self._visit(member, base, "")

    def _visit_object(self, value: Any, owner: Any, name: Any) -> None:
        self._require_comparable(value, owner, name)
        parts: list[Any] = [attribute(value, "__wrapped__", None)]
        if isinstance(value, functools.partial | functools.partialmethod):
            parts += [value.func, value.args, value.keywords]
        elif isinstance(value, functools._lru_cache_wrapper):
            self._visit_cache(value)
        elif isinstance(value, weakref.ref):
            parts.append(value())
        elif (held := self._held(value)) is not None:
            parts.extend(held)
        elif isinstance(value, operator.attrgetter | operator.methodcaller):
            texts = [text for text in value.__reduce__()[1] if isinstance(text, str)]
            self.reads |= {part for text in texts for part in text.split(".")}
        elif isinstance(value, MethodType | staticmethod | classmethod):
            parts += [value.__func__, attribute(value, "__self__", None)]
        elif isinstance(value, property | functools.cached_property):
            parts += [getattr(value, "fget", None), getattr(value, "func", None)]
        elif isinstance(attribute(value, "__dict__", None), dict) or not is_of_library(type(value)):
            self._list(value)
        for part in parts:
            self._visit(part, value, "")

    def _held(self, value: Any) -> list[Any] | None:
        """Return what a container of a library other than the usual ones holds; None for other objects."""
        if isinstance(value, MappingProxyType):
            return gc.get_referents(value)
        if isinstance(value, ChainMap):
            return [value.maps]
        if isinstance(value, UserDict | UserList):
            if not is_of_library(type(value)):
                self._list(value)
            return [value.data]
        return self.snapshot.add_mapping(value) if _is_stable_mapping(value) else None

    def _require_comparable(self, value: Any, owner: Any, name: Any) -> None:
        """Raise if the value is a container that no guard can compare, and code that ran reads it."""
        kind = type(value)
        moves = is_of_library(kind) and f"{kind.__module__}.".startswith(_MOVING)  # a run could not be undone
        is_read = bool(self.ran) and (not isinstance(name, str) or name in self.read_there or owner is value)
        is_searched = isinstance(value, _SEARCHED) or _is_stable_mapping(value)
        if moves or (is_read and _is_opaque(kind) and not is_searched):
            raise Untraceable(
                f"it reads {describe(owner, name)}, of class {kind.__name__}, which cannot be compared at "
                "each step: pass its values to step() as tensors, or keep them in a dictionary or a list"
            )

    def _visit_cache(self, function: Any) -> None:
        """Guard the results that `functools.cache` or `lru_cache` holds."""
        is_bounded = function.cache_info().maxsize is not None
        for part in gc.get_referents(function):  # C code, without attributes
            if part is vars(function) or isinstance(part, type):
                continue
            links = isinstance(part, dict) and any("_lru" in type(value).__name__ for value in part.values())
            if isinstance(part, dict) and (links or not is_bounded):
                self._guard(part, part)  # results by arguments; later ones do not matter
            else:
                self._visit(part, function, "")

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
        if "globals" in names.variables and code in self.ran:
            names.variables.update(function.__globals__)
        self.reads |= names.attributes | names.variables | names.literals
        self.literals |= names.literals
        if code in self.ran:
            self.read_there |= names.attributes | names.variables | {*code.co_freevars}
            self.reads_all |= names.are_made_at_run_time
        space = function.__globals__
        for name in names.imports:
            for full in (name, f"{space.get('__package__')}.{name}"):
                self._visit(sys.modules.get(full), function, name)
        unknown = [n for n in names.variables if n not in space and n not in _BUILTINS]
        self._guard(vars(builtins), unknown, builtins)
        module = sys.modules.get(space.get("__name__", ""))
        self._guard(space, names.variables, module if getattr(module, "__dict__", None) is space else None)

    def _list(self, item: Any) -> None:
        """Enter an object whose attributes may be read."""
        self.objects.setdefault(id(item), item)

    def _guard(self, space: dict[str, Any], names: Iterable[Any], owner: Any = None) -> None:
        """Guard names of a dictionary, including absent ones, and search their values."""
        owner = space if owner is None else owner
        for name in list(names):
            self._visit(self.snapshot.add_variable(space, name, owner), owner, name)

    def _visit_attributes(self, item: Any) -> None:
        """Guard the attributes of an object that code reads."""
        if isinstance(item, type):
            bases = [base for base in item.__mro__ if not is_of_library(base)]
            names = (self.reads | _CALLED).intersection(chain.from_iterable(map(vars, bases)))
            if self.reads_all and item in bases:
                names |= {name for name in vars(item) if not name.startswith("__")}
            for name in names:
                self._visit(
                    self.snapshot.add_attribute(item, name), item, name
                )  # absent ones would hide others
        elif isinstance(item, ModuleType) and is_of_library(item):
            numbers = {name for name in self.reads if isinstance(vars(item).get(name), _NUMBERS)}
            self._guard(vars(item), numbers | self.read_there.intersection(vars(item)), item)
        elif isinstance(item, ModuleType | FunctionType):
            names = self.reads.intersection(vars(item)) | self.literals
            if self.reads_all:
                names |= {name for name in vars(item) if not name.startswith("__")}
            if "__getattr__" in vars(item):
                self._visit_computed(item, [name for name in self.reads if name not in vars(item)])
                names.add("__getattr__")
            self._guard(vars(item), names, item)
        else:
            self._visit_instance(item, attribute(item, "__dict__", {}))

    def _visit_instance(self, item: Any, attributes: dict[str, Any]) -> None:
        kind = type(item)
        names = self.reads.intersection(attributes) | self.literals
        if self.reads_all and (not is_of_library(kind) or isinstance(item, _NAMESPACES)):
            names |= {name for name in attributes if isinstance(name, str)}
        if isinstance(item, Messenger):
            names |= attributes.keys()
        if isinstance(item, torch.jit.ScriptModule):
            kind_of = attribute(item, "_concrete_type", None)  # its attributes are in C++
            self._visit_computed(item, kind_of.get_attributes() if kind_of is not None else ())
        if library_bases(kind):  # code of a library is not searched, and may read any attribute
            names |= {name for name, value in attributes.items() if self._is_read(value)}
            names |= self._methods_run(kind)
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

    def _is_read(self, value: Any) -> bool:
        """Return whether an attribute holds a value, or a function that ran, or a tuple of such."""
        if isinstance(value, tuple):
            return any(map(self._is_read, value))
        function = value.func if isinstance(value, functools.partial) else value
        return isinstance(value, _LEAF_TYPES) or getattr(function, "__code__", None) in self.ran

    def _methods_run(self, kind: type) -> set[str]:
        """Return the methods in libraries that ran, which attributes of an object may hide."""
        if kind not in self._methods:
            members = chain.from_iterable(vars(base).items() for base in library_bases(kind))
            self._methods[kind] = {
                name for name, member in members if getattr(member, "__code__", None) in self.ran
            }
        return self._methods[kind]

    def _visit_operators(self, item: Any, base: type) -> None:
        """Search methods that run without their name, such as `__getitem__`, and guard `__slots__`."""
        for name, member in list(vars(base).items()):
            if isinstance(member, FunctionType) and name.startswith("__") and name not in _NOT_RUN:
                self._visit(member, base, name)
            elif isinstance(member, MemberDescriptorType) and (self.reads_all or name in self.reads):
                self._visit(self.snapshot.add_attribute(item, name), item, name)

    def _visit_computed(self, item: Any, names: Iterable[str]) -> None:
        """Guard attributes that a `__getattr__` finds, such as those of a configuration object."""
        for name in names:
            found = [attribute(item, name, ABSENT) for _ in range(2)]
            if found[0] is not ABSENT and equal(*found):
                self._visit(self.snapshot.add_attribute(item, name), item, name)


def _is_opaque(kind: type) -> bool:
    """Return True for a container of a library, whose content is not searched."""
    name = f"{kind.__module__}."
    if not is_of_library(kind) or name.startswith((*LIBRARIES, "typing.", "types.", "re.", "inspect.")):
        return False
    return kind is not range and any("__getitem__" in vars(base) for base in kind.__mro__)


def is_of_library(value: Any) -> bool:
    """Return True for a function, class or module of the standard library, an installed one or pyro_vae."""
    if isinstance(value, FunctionType):
        return is_library_file(value.__code__.co_filename)
    module = sys.modules.get(value.__module__) if isinstance(value, type) else value
    name = value.__module__ if isinstance(value, type) else value.__name__
    filename = getattr(module, "__file__", None)
    if isinstance(filename, str):
        return filename.startswith((_PACKAGE, *_LIBRARY_FOLDERS))
    return name.partition(".")[0] in (*sys.stdlib_module_names, "torch")


def _is_stable_mapping(value: Any) -> bool:
    """Return True for a mapping of a library, such as a configuration, that holds the objects it returns."""
    if not (isinstance(value, Mapping) and is_of_library(type(value))):
        return False
    try:
        found = (
            [tuple(chain.from_iterable(value.items())) for _ in range(2)] if len(value) <= MAX_ITEMS else []
        )
    except Exception:  # a library's may raise anything, such as that a file is closed
        return False
    return bool(found) and equal(*found)


def is_library_file(filename: str) -> bool:
    """Return True for a file of the standard library, an installed one or pyro_vae."""
    return filename.startswith((_PACKAGE, *_LIBRARY_FOLDERS, "<frozen"))


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
        self.are_made_at_run_time = False
        instructions = list(dis.get_instructions(code))
        for position, instruction in enumerate(instructions):
            operation, name = instruction.opname, instruction.argval
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.variables.add(name)
            elif operation in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                self.attributes.add(name)
            elif operation == "IMPORT_NAME":
                self.imports.add(name)
            else:
                continue
            if name in ("getattr", "hasattr", "__getattribute__") and operation != "IMPORT_NAME":
                self.are_made_at_run_time |= not _second_is_text(instructions[position:])
        names = self.variables | self.attributes
        self.are_made_at_run_time |= bool(_ALL_NAMES & names)
        texts = [constant for constant in code.co_consts if isinstance(constant, str)]
        if names & _BY_TEXT:
            self.literals |= {part for text in texts for part in text.split(".") if part.isidentifier()}
        if names & _BY_IMPORT:
            self.imports.update(texts)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                inner = _Names(constant)
                self.variables |= inner.variables
                self.attributes |= inner.attributes
                self.imports |= inner.imports
                self.literals |= inner.literals
                self.are_made_at_run_time |= inner.are_made_at_run_time


def _second_is_text(instructions: list[dis.Instruction]) -> bool:
    """Return True if a call of the function that the first instruction loads has text as second argument."""
    depth, starts = 0, {0: 0, 1: 0, 2: 0}  # arguments on the stack; where the last one at each depth begins
    body: list[dis.Instruction] = []
    for instruction in instructions[1:]:
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            return False
        after = depth + dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if instruction.opname in ("PRECALL", "CALL") and (after <= 0 or depth <= (instruction.arg or 0)):
            break
        starts[depth] = len(body)
        body.append(instruction)
        depth = after
    start = starts[1]
    end = starts[2] if depth == 3 else len(body)
    text = body[start].argval if start < len(body) and body[start].opname == "LOAD_CONST" else None
    return isinstance(text, str) and end == start + 1
