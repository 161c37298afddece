"""Record a graph without side effects, and find models that change what a graph would not.

A graph repeats tensor operations, so that a model that counts its calls, fills a list or replaces a buffer
needs the eager step. Only values that a library caches may change, such as the log-determinant of a flow.
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, Self

import numpy as np
import pyro.settings
import torch
from pyro import get_param_store
from torch import Tensor, nn
from torch.distributions.kl import _KL_REGISTRY
from torch.nn.modules import module as torch_modules

from pyro_vae.engine.guards import LIBRARIES, Guards, describe, is_library_file, library_bases
from pyro_vae.engine.recorder import Graph, LossAndGradients, Untraceable, record
from pyro_vae.engine.snapshot import Change, equal
from pyro_vae.utils.isolation import ModuleStates

__all__ = ["SideEffect", "record_with_guards"]

_PLAIN = (bool, int, float, complex, str, bytes)
_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_UNSEEN: dict[str, list[Any]] = {  # functions with results that no guard can compare
    "a clock": [
        time.time, time.time_ns, time.monotonic, time.monotonic_ns, time.perf_counter, time.perf_counter_ns,
        time.process_time, time.process_time_ns, time.localtime, time.gmtime,
    ],
    "files": [
        open, os.open, os.stat, os.listdir, os.scandir, os.path.exists, os.path.isfile, os.path.getmtime,
        np.load, np.loadtxt, np.fromfile, torch.load,
    ],
    "names out of text that it runs": [eval, exec],
    "variables of its callers": [sys._getframe],
}  # fmt: skip


class SideEffect(Untraceable):
    """The model changes a value, other than a tensor in place, in a run."""


def record_with_guards(
    loss_and_gradients: LossAndGradients,
    tensors: Sequence[Tensor],
    functions: Iterable[Any],
    objects: list[Any],
    ignored: Iterable[tuple[int, Any]] = (),
) -> tuple[Graph, Guards]:
    """Record a graph and guard what the functions read; restore whatever the run changed.

    Args:
        loss_and_gradients: From the tensors to a loss and gradients; see `record`.
        tensors: Tensors to call the function with.
        functions: Functions, and dictionaries, that it reads.
        objects: Modules and other objects whose attributes it reads.
        ignored: Attributes that may change, by the `id` of their owner and name.

    Raises:
        SideEffect: If the run changes a value of a Python object that is not a cache of a library.
        Untraceable: If no graph can be recorded.
    """
    store = get_param_store()
    functions = [*functions, store._params, *(vars(torch_modules)[name] for name in _HOOKS)]
    before = Guards(functions, objects)
    spaces = [store._params, store._constraints, store._param_to_name]
    spaces += [vars(item) for item in objects if not isinstance(item, nn.Module)]  # the estimator
    saved = [(space, dict(space)) for space in spaces]
    states = ModuleStates()
    for item in [*objects, *before.objects.values()]:
        states.save(item)
    try:
        with states.followed(), _Calls() as calls:
            graph = record(loss_and_gradients, tensors)
        changes = [*(Change(*change) for change in states.changes()), *before.snapshot.changes()]
        changes = [change for change in changes if not equal(change.before, change.after)]
    finally:
        before.snapshot.restore()
        states.restore()
        for space, content in saved:
            space.clear()
            space.update(content)
    captured = {id(tensor) for tensor in graph.captured}
    for change in changes:
        if not _is_cache(change, captured):
            raise SideEffect(
                f"the model changes {describe(change.owner, change.name)} in each run, which a graph does "
                "not. Change a tensor in place instead, or return the value"
            )
    if calls.unseen is not None:
        raise Untraceable(f"it reads {calls.unseen}")
    ignored = {*ignored, *((id(change.owner), change.name) for change in changes)}
    guards = Guards(functions, [*objects, *graph.modules], ignored, calls.ran)
    guards.snapshot.add_call(_registered, "state", store)
    for setting, (module, name, _) in pyro.settings._REGISTRY.items():
        if setting.startswith("validate"):  # no number depends on it
            continue
        *path, last = name.split(".")
        owner = sys.modules[module]
        for part in path:
            owner = getattr(owner, part)
        guards.snapshot.add_attribute(owner, last)
    return graph, guards


def _registered() -> tuple[Any, ...]:
    """Return what Pyro's parameter store holds, whose dictionaries `scope` and `clear` replace, and more."""
    store = get_param_store()
    return *store._params, *store._params.values(), *store._constraints.values(), len(_KL_REGISTRY)


class _Calls:
    """Follow calls in a block.

    Attributes:
        ran: Code that ran.
        unseen: What code outside libraries read that no guard can compare, or None.
    """

    def __init__(self) -> None:
        self.ran: set[CodeType] = set()
        self.unseen: str | None = None
        self.functions = {id(f): what for what, functions in _UNSEEN.items() for f in functions}
        self.codes = {
            f.__code__: what for what, fs in _UNSEEN.items() for f in fs if isinstance(f, FunctionType)
        }

    def __enter__(self) -> Self:
        self.is_free = sys.getprofile() is None  # a profiler keeps its calls; the search then finds less
        if self.is_free:
            sys.setprofile(self._follow)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.is_free:
            sys.setprofile(None)

    def _follow(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "call":
            self.ran.add(frame.f_code)
            what, caller = self.codes.get(frame.f_code), frame.f_back
        elif event == "c_call":
            what, caller = self.functions.get(id(value)), frame
        else:
            return
        if what is not None and caller is not None and not is_library_file(caller.f_code.co_filename):
            self.unseen = what


def _is_cache(change: Change, captured: set[int]) -> bool:
    """Return True if a library writes the value before it reads it, in each run."""
    if id(change.before) in captured or isinstance(change.before, _PLAIN) or isinstance(change.after, _PLAIN):
        return False
    kind = type(change.owner)
    if kind.__module__.startswith(LIBRARIES):
        return True
    if library_bases(kind) and str(change.name).startswith("_"):
        return True
    # old weight_norm, spectral_norm and pruning set the attribute in a hook
    hooks = getattr(change.owner, "_forward_pre_hooks", {}).values()
    return change.name in [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks]
