"""What a computation costs in memory."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_memory"]


def peak_memory(computation: Callable[[], Any]) -> int:
    """Run a computation and return the peak of the memory that its tensors held at one time, in bytes.

    Counted are the storages that torch's operations allocate, on any device, those of the backward pass too,
    while they live; not what existed before, nor what a kernel needs for itself. It depends on nothing but
    the computation, unlike the memory of the process.

    Example:
        >>> peak_memory(lambda: torch.ones(1000) + 1)  # two tensors of 4-byte numbers
        8000
    """
    with _Storages() as storages:
        computation()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Keep account of the storages that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation reads, which was there before, and what it returns."""
        self._note((args, kwargs), new=False)
        result = function(*args, **(kwargs or {}))
        self._note(result, new=True)
        return result

    def _note(self, tree: Any, *, new: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes() if new else 0
                self.held += self.sizes[key]
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.held -= self.sizes.pop(key)
