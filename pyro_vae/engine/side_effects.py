"""Record a graph without side effects, and find models that change what a graph would not.

A graph repeats tensor operations, so that a model that counts its calls, fills a list or replaces a buffer
needs the eager step. Only values that a library caches may change, such as the log-determinant of a flow.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pyro import get_param_store
from torch import Tensor, nn

from pyro_vae.engine.guards import LIBRARIES, Guards, describe, library_bases
from pyro_vae.engine.recorder import Graph, LossAndGradients, Untraceable, record
from pyro_vae.engine.snapshot import Change, equal
from pyro_vae.utils.isolation import ModuleStates

__all__ = ["SideEffect", "record_with_guards"]

_PLAIN = (bool, int, float, complex, str, bytes)


class SideEffect(Untraceable):
    """The model changes a value, other than a tensor in place, in a run."""


def record_with_guards(
    loss_and_gradients: LossAndGradients,
    tensors: Sequence[Tensor],
    functions: Iterable[Any],
    objects: list[Any],
) -> tuple[Graph, Guards]:
    """Record a graph and guard what the functions read; restore whatever the run changed.

    Args:
        loss_and_gradients: From the tensors to a loss and gradients; see `record`.
        tensors: Tensors to call the function with.
        functions: Functions, and dictionaries, that it reads.
        objects: Modules and other objects whose attributes it reads.

    Raises:
        SideEffect: If the run changes a value of a Python object that is not a cache of a library.
        Untraceable: If no graph can be recorded.
    """
    functions = list(functions)
    before = Guards(functions, objects)
    store = get_param_store()
    spaces = [store._params, store._constraints, store._param_to_name]
    spaces += [vars(item) for item in objects if not isinstance(item, nn.Module)]  # the estimator
    saved = [(space, dict(space)) for space in spaces]
    states = ModuleStates()
    for item in [*objects, *before.objects.values()]:
        states.save(item)
    try:
        with states.followed():
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
    ignored = {(id(change.owner), change.name) for change in changes}
    return graph, Guards(functions, [*objects, *graph.modules], ignored)


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
