"""Run Pyro programs without side effects: restore generators, parameter store, modules and their modes.

Pyro draws from torch's global generators. So training, data order and evaluation seed these from separate
streams, derived from one seed, and restore them.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Generator, Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

__all__ = [
    "ModuleStates",
    "before_change",
    "derived_seed",
    "evaluating",
    "evaluation_mode",
    "isolated",
    "isolated_generators",
    "keep_freed_memory",
    "preserved",
    "python_noise",
    "restore_python_noise",
    "seed_at",
    "seed_generators",
    "without_autocast",
]

_LARGEST_BLOCK = 31 * 2**20  # bytes


def derived_seed(seed: int, *key: int) -> int:
    """Return a seed for the random stream `key` of a run; different keys give independent streams.

    Raises:
        TypeError: If the seed is not an integer.
        ValueError: If the seed or an entry of the key is negative.

    Example:
        >>> len({derived_seed(0, 1), derived_seed(0, 1, 0), derived_seed(0, 2), derived_seed(1, 2)})
        4
    """
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be a non-negative integer; got {seed!r}")
    if min(seed, *key) < 0:
        raise ValueError(f"seed must be a non-negative integer; got {min(seed, *key)}")
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def seed_at(stream: int, step: int) -> int:
    """Return the seed of one step of a stream, so that its random numbers depend on no earlier step.

    Steps of a stream have different seeds, up to 2³² steps. The low 32 bits, which are all that torch's
    generator of the CPU takes, are a one-to-one scrambling of stream + step.

    Args:
        stream: A seed from `derived_seed`.
        step: Number of the step, from 0.

    Example:
        >>> stream = derived_seed(0, 1)
        >>> len({seed_at(stream, step) % 2**32 for step in range(1000)})
        1000
    """
    word = (stream + step) & 0xFFFFFFFF
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (stream >> 32 << 32) | (word ^ (word >> 16))


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's global generators of the CPU and of `device`, and of no other device."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch `torch.autocast` off in a block, or in a function that this decorates.

    Matrix products of float32 tensors then keep their digits, in densities and in backward passes.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast():
        ...     (torch.ones(1, 2) @ torch.ones(2, 1)).dtype
        torch.float32
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def isolated_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `device` in a block, and restore them after it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        seed_generators(device, seed)
        yield


@contextmanager
def evaluation_mode(*programs: Any) -> Iterator[None]:
    """Set modules to evaluation mode in a block, and restore the mode of each submodule after it.

    Args:
        *programs: Modules and methods of modules; other objects are ignored.

    Example:
        >>> dropout = nn.Dropout(0.5)
        >>> with evaluation_mode(dropout):
        ...     dropout(torch.ones(2))
        tensor([1., 1.])
        >>> dropout.training
        True
    """
    owners = [getattr(program, "__self__", program) for program in programs]
    modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(pair: Any, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluate a pair in a block: evaluation mode, no gradients, random numbers from `seed`.

    Pyro's validation, an extra pass over all logits, is off for a `VAE`, which checks its data before.
    """
    if device.type == "cpu":
        keep_freed_memory()
    validation = is_validation_enabled() and not hasattr(pair, "check_data")
    store = pyro.get_param_store()
    with (
        torch.no_grad(),
        isolated_generators(device, seed),
        pyro.validation_enabled(validation),
        store.scope(store.get_state()),
        evaluation_mode(pair.model, getattr(pair, "guide", None)),
    ):
        yield


@contextmanager
def isolated(model: Any, guide: Any) -> Iterator[None]:
    """Run Pyro programs in a block without side effects on global state or on their modules.

    Torch's global generators, Pyro's parameter store, and the buffers and attributes of all modules that run
    are restored; outer handlers are blocked. Gradients are on. Validation is off, so that distributions with
    invalid parameters can be created and reported.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> with isolated(norm, norm):
        ...     _ = norm(torch.randn(5, 3))
        >>> norm.running_mean
        tensor([0., 0., 0.])
    """
    states = ModuleStates()
    for program in (model, guide):
        states.save(getattr(program, "__self__", program))
    store = pyro.get_param_store()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with (
            states.followed(),
            torch.random.fork_rng(devices=cuda),
            torch.enable_grad(),
            store.scope(store.get_state()),
            pyro.validation_enabled(False),
            poutine.block(),
        ):
            yield
    finally:
        states.restore()


class ModuleStates:
    """Saved buffers and attributes of modules; the first run of an autoguide, for one, adds attributes."""

    def __init__(self) -> None:
        self.attributes: dict[
            int, tuple[nn.Module, dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]
        ] = {}
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Save modules as they run in a block, also those that functions call and no attribute shows."""
        hook = register_module_forward_pre_hook(self.save)
        _FOLLOWED.append(self)
        try:
            yield
        finally:
            _FOLLOWED.remove(self)
            hook.remove()

    def save(self, module: Any, *_: Any) -> None:
        """Save the state of a module and its submodules, except of those saved before."""
        if not isinstance(module, nn.Module) or id(module) in self.attributes:
            return
        for buffer in filter(lambda buffer: not is_lazy(buffer), module.buffers()):
            self.buffers.setdefault(id(buffer), (buffer, buffer.clone()))
        for part in module.modules():
            if id(part) not in self.attributes:
                inner = [(value, dict(value)) for value in vars(part).values() if isinstance(value, dict)]
                self.attributes[id(part)] = part, dict(vars(part)), inner

    def changes(self) -> Iterator[tuple[nn.Module, str, Any, Any]]:
        """Yield attributes that are another object now: module, name, value before and after (or None)."""
        for part, attributes, inner in self.attributes.values():
            for now, before in [(vars(part), attributes), *inner]:
                for name in {**before, **now}:
                    if now.get(name) is not before.get(name):
                        yield part, name, before.get(name), now.get(name)

    def restore(self) -> None:
        """Restore all saved states in place."""
        for part, attributes, inner in self.attributes.values():
            for now, before in [(vars(part), attributes), *inner]:
                now.clear()
                now.update(before)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Restore the values of buffers alone."""
        with torch.no_grad():
            for buffer, old in self.buffers.values():
                buffer.copy_(old)


_FOLLOWED: list[ModuleStates] = []


def before_change(module: nn.Module) -> None:
    """Save the state of a module that is about to be changed, wherever modules are followed."""
    for states in _FOLLOWED:
        states.save(module)


def keep_freed_memory() -> None:
    """Make the C library reuse freed memory for the next tensors of this process.

    By default, freed memory returns to the kernel, which clears its pages at the next allocation: up to a
    third of the time of a step, or of decoding. But the C library keeps up to twice the size of the largest
    block freed so far, if that block is smaller than 32 MiB. So a block of 31 MiB is allocated and freed.

    Example:
        >>> keep_freed_memory()
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8)  # freed at once


@contextmanager
def preserved(generators: Sequence[Generator], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the states of generators and the values of tensors after a block."""
    states = [generator.get_state() for generator in generators]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.detach().copy_(value)


def python_noise() -> tuple[Any, ...]:
    """Return the states of Python's and NumPy's global generators."""
    return random.getstate(), np.random.get_state(legacy=True)  # noqa: NPY002 (models may use it)


def restore_python_noise(states: tuple[Any, ...]) -> None:
    """Restore Python's and NumPy's global generators from `python_noise()`."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
