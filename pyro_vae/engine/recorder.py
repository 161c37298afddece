"""Record a step of SVI as a graph: one list of tensor operations for loss and gradients, without Pyro in it.

Pyro builds its traces, and autograd its graph, anew at every step, though the operations on tensors that come
out of it are the same each time. The recorder sits below autograd, where it sees the forward and the backward
pass as one list of operations, while the step itself runs as ever. In the graph that it writes

- whatever the operations read that none of them made (parameters, buffers, data in closures) is an input, by
  reference, so that a parameter changed in place is seen;
- whatever Python asked of a tensor (does the value lie in the support? is the loss NaN?) is asked again, and
  where an answer differs from the recorded one the graph says that it does not hold;
- draws stay draws from torch's global generators, so that a seed means the same as without the graph.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.utils.isolation import preserved, python_noise, restore_python_noise

__all__ = [
    "Graph",
    "LossAndGradients",
    "Untraceable",
    "record",
]

aten = torch.ops.aten
_PLAIN = {aten._is_all_true.default: aten.all.default}  # the same, and known to compilers
_ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operations that need values
_PUTTING = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_TAKING = (Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__repr__, Tensor.__dlpack__)
_MAKING = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_MASK = (torch.bool, torch.uint8)
LossAndGradients = Callable[..., tuple[Tensor, Sequence[Tensor | None]]]


class Untraceable(Exception):  # noqa: N818 (nothing has gone wrong)
    """The operations of a function depend on more than the shapes of its arguments."""


@dataclass(eq=False)
class Graph:
    """The operations of one step, for arguments of certain shapes."""

    module: fx.GraphModule
    """From the arguments and `outside` to the loss, NaN where the graph does not hold; 1.0 where it does not
    and 0.0 where it does; and for each parameter the gradient, or None."""
    outside: list[Tensor]
    """What the operations read beside the arguments."""
    changed: list[Tensor]
    """What they change of it, such as the statistics of a BatchNorm."""
    modules: list[nn.Module]
    """The modules that ran."""
    generators: list[Generator]
    """Those that the operations may draw from."""


def record(loss_and_gradients: LossAndGradients, arguments: Sequence[Tensor]) -> Graph:
    """Run a function of tensors once, and return its graph; leave buffers and generators as they were.

    Args:
        loss_and_gradients: From the arguments to a loss, shape (), and the gradients of parameters.
        arguments: The tensors to call it with.

    Raises:
        Untraceable: If it takes other than yes-or-no answers out of tensors, or draws from a generator of
            its own.

    Example:
        >>> weight = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> def loss_and_gradients(x):
        ...     loss = (weight.exp() * x).sum()
        ...     return loss, torch.autograd.grad(loss, [weight])
        >>> graph = record(loss_and_gradients, [torch.ones(2)])
        >>> with torch.no_grad():
        ...     _ = weight.zero_()
        ...     loss, does_not_hold, gradient = graph.module(torch.tensor([1.0, 2.0]), *graph.outside)
        >>> loss, does_not_hold, gradient
        (tensor(3.), tensor(0.), tensor([1., 2.]))
    """
    modules: dict[int, nn.Module] = {}
    # other objects, so that an argument that the function also knows otherwise is told from it
    arguments = [argument.detach().requires_grad_(argument.requires_grad) for argument in arguments]
    recorder = _Recorder(arguments)
    values = [argument.detach().clone() for argument in arguments]
    noise = python_noise()
    hook = register_module_forward_pre_hook(lambda module, _: modules.update({id(module): module}))
    try:
        with preserved(_all_generators(), []), recorder, _NumbersAsTensors(recorder):
            loss, gradients = loss_and_gradients(*arguments)
            holds = loss.isfinite()
            for answer, expected in recorder.answers:
                holds = holds & (answer if expected else ~answer)
            outputs = [loss.detach().where(holds, math.nan), (~holds).float(), *gradients]
    finally:
        hook.remove()
        changed = recorder.restore()
        for argument, value in zip(arguments, values, strict=True):
            if _memory(argument) in recorder.written:
                recorder.obstacle = "it changes an argument in place"
                argument.detach().copy_(value)
        if not _same(python_noise(), noise):
            recorder.obstacle = "it draws from the generator of Python or NumPy"
            restore_python_noise(noise)
    if recorder.obstacle is not None:
        raise Untraceable(recorder.obstacle)
    module = recorder.graph_module(arguments, outputs)
    drawn_from = _generators_of([*arguments, *recorder.outside])
    return Graph(module, recorder.outside, changed, list(modules.values()), drawn_from)


def _all_generators() -> list[Generator]:
    """Torch's global generators."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if in_use else ())]


def _generators_of(tensors: Sequence[Tensor]) -> list[Generator]:
    """Those of the CPU and of the devices that the tensors lie on."""
    devices = {tensor.device for tensor in tensors}
    return [g for g in _all_generators() if g.device.type == "cpu" or g.device in devices]


class _Recorder(TorchDispatchMode):
    """Writes down each operation below autograd, with the tensors that it read and made."""

    def __init__(self, arguments: Sequence[Tensor]):
        super().__init__()
        self.tape: list[tuple[Any, tuple, dict, Any]] = []  # keeps its tensors alive, so that ids are unique
        self.known = {id(argument) for argument in arguments}
        self.outside: list[Tensor] = []
        self.before: list[Tensor] = []  # what those held
        self.constant: set[int] = set()  # memory whose content depends on nothing
        self.written: set[int] = set()  # memory changed in place
        self.answers: list[tuple[Tensor, bool]] = []
        self.obstacle: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, torch's default, imports its compiler: seconds before the first step

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            return self._afresh(args[0])  # torch.tensor(...) has just made it of numbers
        args, kwargs = self._without_constant_masks(func, args), kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._know(leaf)
            elif isinstance(leaf, Generator):
                self.obstacle = "it draws from a random generator of its own"
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:
            self.written.update(map(_memory, _written(func, args, kwargs)))
        if self._is_constant(func, inputs):
            self.constant.update(map(_memory, made))
            if _ASKS.intersection(func.tags):
                return pytree.tree_map_only(Tensor, self._afresh, out)  # for no compiler takes func
        else:
            self.constant.difference_update(map(_memory, made + _written(func, args, kwargs)))
            if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                self.answers.append((args[0], out))
            elif self._depends_on_values(func, args):
                self.obstacle = f"it takes values out of tensors, by {func}"
        self.known.update(map(id, made))
        if made or func._schema.is_mutable:
            self.tape.append((func, args, kwargs, out))
        return out

    def _know(self, tensor: Tensor) -> None:
        """Note a tensor that no operation has made."""
        if id(tensor) not in self.known:
            self.known.add(id(tensor))
            self.outside.append(tensor)
            self.before.append(tensor.detach().clone())

    def _afresh(self, constant: Tensor) -> Tensor:
        """A copy of a constant, which the graph makes anew, whatever is done to it in place."""
        self._know(constant)
        copy = constant.clone()
        self.known.add(id(copy))
        self.constant.update(map(_memory, (constant, copy)))
        self.tape.append((aten.clone.default, (constant,), {}, copy))
        return copy

    def _is_constant(self, func: Any, inputs: list[Tensor]) -> bool:
        """Whether an operation gives the same at every step."""
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        return not drawn and all(_memory(tensor) in self.constant for tensor in inputs)

    def _without_constant_masks(self, func: Any, args: tuple) -> tuple:
        """Index by numbers where a constant mask does, which would not tell a compiler the shape."""
        if func is not aten.index.Tensor and func not in _PUTTING:
            return args
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype in _MASK and _memory(index) in self.constant:
                numbers = index.nonzero()
                self.constant.add(_memory(numbers))
                indices += numbers.unbind(1)
            else:
                indices.append(index)
        return args[0], indices, *args[2:]

    def _depends_on_values(self, func: Any, args: tuple) -> bool:
        """Whether an operation gives numbers, or a shape, that depend on the values of tensors."""
        if func is aten.index.Tensor:  # indices give a known shape, masks do not
            return any(index is not None and index.dtype in _MASK for index in args[1])
        return bool(_ASKS.intersection(func.tags))

    def restore(self) -> list[Tensor]:
        """Give the tensors outside back what they held, and return those that may have changed."""
        changed = []
        for tensor, value in zip(self.outside, self.before, strict=True):
            # the schema of batch normalisation does not tell what it writes
            if _memory(tensor) in self.written or not torch.equal(tensor, value):
                tensor.detach().copy_(value)
                changed.append(tensor)
        return changed

    def graph_module(self, arguments: Sequence[Tensor], outputs: Sequence[Tensor | None]) -> fx.GraphModule:
        """Write the tape as a function of the arguments and the tensors outside."""
        graph = fx.Graph()
        nodes: dict[int, fx.Node] = {}

        def node(leaf: Any) -> Any:
            return nodes[id(leaf)] if isinstance(leaf, Tensor) else leaf

        def define(tensor: Tensor, new: fx.Node) -> None:
            nodes[id(tensor)] = new
            new.meta["form"] = _shell(tensor)

        for index, tensor in enumerate([*arguments, *self.outside]):
            define(tensor, graph.placeholder(f"input_{index}"))
        for func, args, kwargs, out in self.tape:
            call = graph.call_function(_PLAIN.get(func, func), *pytree.tree_map(node, (args, kwargs)))
            if isinstance(out, Tensor):
                define(out, call)
            elif isinstance(out, tuple | list):
                for index, part in enumerate(out):
                    if isinstance(part, Tensor):
                        define(part, graph.call_function(operator.getitem, (call, index)))
        graph.output(tuple(node(output) for output in outputs))
        graph.eliminate_dead_code()  # what no output needs; draws and changes in place stay
        return fx.GraphModule(nn.Module(), graph)


def _shell(tensor: Tensor) -> Tensor:
    """A tensor of that form, without content."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments of an operation that it changes in place."""
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves([given.get(name) for name in written]) if leaf is not None]


def _same(one: tuple, other: tuple) -> bool:
    """Whether two states of Python's and NumPy's generators are equal."""
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))


class _NumbersAsTensors(TorchFunctionMode):
    """Answers `tensor.item()` with the tensor, detached: it calculates like the number."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.item and args[0].dtype.is_floating_point | (args[0].dtype == torch.bool):
            return args[0].detach()
        parts = pytree.tree_leaves([part for part in args if isinstance(part, list | tuple)])
        if func in _TAKING or (func in _MAKING and any(isinstance(part, Tensor) for part in parts)):
            self.recorder.obstacle = f"it takes values out of tensors, by {func.__name__}"
        return func(*args, **(kwargs or {}))
