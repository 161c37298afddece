"""Running Pyro programs without a trace of it: in generators, parameter store, modules, outer handlers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.objectives.sites import Program

__all__ = ["nothing_left_behind"]


@contextmanager
def nothing_left_behind(model: Program, guide: Program) -> Iterator[None]:
    """Run Pyro programs within the block without a trace of it in what is global, or in their modules.

    Random numbers, Pyro's parameter store and outer handlers are left alone, and the modules that run keep
    their buffers, such as running means, and their attributes. Gradients are on. Validation is off, so that
    distributions with wrong parameters come to be, and can be told of.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> with nothing_left_behind(norm, norm):
        ...     _ = norm(torch.randn(5, 3))
        >>> norm.running_mean
        tensor([0., 0., 0.])
    """
    kept = _Kept()
    for program in (model, guide):
        kept.keep(getattr(program, "__self__", program))
    hook = register_module_forward_pre_hook(kept.keep)  # a function may call modules that nothing else shows
    store = pyro.get_param_store()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with (
            torch.random.fork_rng(devices=cuda),
            torch.enable_grad(),
            store.scope(store.get_state()),
            pyro.validation_enabled(False),
            poutine.block(),
        ):
            yield
    finally:
        hook.remove()
        kept.restore()


class _Kept:
    """Modules as they were: their buffers, and their attributes, which an autoguide's first run adds to."""

    def __init__(self) -> None:
        self.attributes: dict[int, tuple[nn.Module, dict, list[tuple[dict, dict]]]] = {}
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, module: Any, *_: Any) -> None:
        """Note the state of a module and its parts, of each when it is first seen."""
        if not isinstance(module, nn.Module) or id(module) in self.attributes:
            return
        for buffer in module.buffers():
            self.buffers.setdefault(id(buffer), (buffer, buffer.clone()))
        for part in module.modules():
            if id(part) not in self.attributes:
                inner = [(value, dict(value)) for value in vars(part).values() if isinstance(value, dict)]
                self.attributes[id(part)] = part, dict(vars(part)), inner

    def restore(self) -> None:
        """Put all back, in place."""
        for part, attributes, inner in self.attributes.values():
            for now, before in [(vars(part), attributes), *inner]:
                now.clear()
                now.update(before)
        with torch.no_grad():
            for buffer, old in self.buffers.values():
                buffer.copy_(old)
