"""Record a training step as a graph: the tensor operations of its forward and backward pass.

Pyro traces the model, and autograd builds its graph, at every step, though the resulting tensor operations
are the same each time. The recorder stands below autograd, so that it sees both passes as one list of
operations while the step runs as usual. In the recorded graph,

- tensors that the operations read but none of them computed (parameters, buffers, data in closures) are
  inputs by reference, so that a parameter changed in place takes effect;
- a condition that Python code evaluated on a tensor (Is a value in the support? Is the loss NaN?) is
  evaluated again, and a result other than the recorded one marks the output as invalid;
- so does an integer that Python code read from a tensor (the length of the longest sequence), or a number of
  elements that a mask selects, if it is not the recorded one;
- random numbers come from torch's global generators, as in an eager step with the same seed.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.utils.isolation import preserved, python_noise, restore_python_noise

__all__ = ["Graph", "LossAndGradients", "Untraceable", "global_generators", "record"]

aten = torch.ops.aten
_COMPILABLE = {aten._is_all_true.default: aten.all.default}  # equal operations that Inductor supports
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEX_PUT = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_TO_PYTHON = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__repr__, Tensor.__dlpack__)
_FROM_PYTHON = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_SPLITS = (torch.tensor_split, Tensor.tensor_split)  # may take indices in a tensor, by name
_GRADIENT = vars(torch._C.TensorBase)["grad"].__get__
_MASK_DTYPES = (torch.bool, torch.uint8)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# functions whose C++ code reads integers, such as the lengths of sequences, from arguments at these positions
_READ_BELOW = {
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), (1,)),
    **dict.fromkeys(("gru", "lstm", "rnn_relu", "rnn_tanh"), (1,)),
    "tensor_split": (1,),
}
LossAndGradients = Callable[..., tuple[Tensor, Sequence[Tensor | None]]]


class Untraceable(Exception):  # noqa: N818 (handled by an eager step)
    """The operations of a function depend on more than the shapes of its arguments."""


@dataclass(eq=False)
class Graph:
    """The recorded operations of one step, for arguments of fixed shapes."""

    module: fx.GraphModule
    """From the arguments and `captured` to the loss, NaN if invalid; 1.0 if invalid, else 0.0; and a gradient
    or None for each parameter. The output is invalid if a condition differs or the loss is not finite."""
    captured: list[Tensor]
    """Tensors other than the arguments that the operations read."""
    mutated: list[Tensor]
    """Captured tensors that the operations change in place, such as the statistics of a BatchNorm."""
    modules: list[nn.Module]
    """Modules whose `forward` ran."""
    generators: list[Generator]
    """Random generators that the operations may draw from."""


def record(loss_and_gradients: LossAndGradients, arguments: Sequence[Tensor]) -> Graph:
    """Run a function of tensors once and return its graph; restore buffers and generators.

    Args:
        loss_and_gradients: From the arguments to a loss, shape (), and the gradients of parameters.
        arguments: Tensors to call the function with.

    Raises:
        Untraceable: If Python code reads values other than booleans from tensors, if an argument is changed
            in place, or if a random generator other than torch's global ones is used.

    Example:
        >>> weight = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> def loss_and_gradients(x):
        ...     loss = (weight.exp() * x).sum()
        ...     return loss, torch.autograd.grad(loss, [weight])
        >>> graph = record(loss_and_gradients, [torch.ones(2)])
        >>> with torch.no_grad():
        ...     _ = weight.zero_()
        ...     loss, invalid, gradient = graph.module(torch.tensor([1.0, 2.0]), *graph.captured)
        >>> loss, invalid, gradient
        (tensor(3.), tensor(0.), tensor([1., 2.]))
    """
    modules: dict[int, nn.Module] = {}
    # new objects, to distinguish an argument from the same tensor captured by the function
    arguments = [argument.detach().requires_grad_(argument.requires_grad) for argument in arguments]
    recorder = _Recorder(arguments)
    values = [argument.detach().clone() for argument in arguments]
    noise = python_noise()
    torch.clear_autocast_cache()  # else casts of parameters, made before, would be constants of the graph
    hook = register_module_forward_pre_hook(lambda module, _: modules.update({id(module): module}))
    try:
        with preserved(global_generators(), []), recorder, _NumbersAsTensors(recorder):
            loss, gradients = loss_and_gradients(*arguments)
            valid = loss.isfinite()
            for condition, expected in recorder.conditions_as_read():
                valid = valid & (condition if expected else ~condition)
            outputs = [loss.detach().where(valid, math.nan), (~valid).float(), *gradients]
    finally:
        hook.remove()
        torch.clear_autocast_cache()
        mutated = recorder.restore()
        for argument, value in zip(arguments, values, strict=True):
            if _storage(argument) in recorder.written:
                recorder.reason = "it changes an argument in place"
                argument.detach().copy_(value)
        if not _equal_states(python_noise(), noise):
            recorder.reason = "it draws from the global generator of Python or NumPy"
            restore_python_noise(noise)
    if recorder.reason is not None:
        raise Untraceable(recorder.reason)
    module = recorder.graph_module(arguments, outputs)
    drawn_from = _generators_of([*arguments, *recorder.captured])
    return Graph(module, recorder.captured, mutated, list(modules.values()), drawn_from)


def global_generators() -> list[Generator]:
    """Return torch's global generators, of the CPU and of GPUs in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if in_use else ())]


def _generators_of(tensors: Sequence[Tensor]) -> list[Generator]:
    """Return the global generators of the CPU and of the devices that hold the tensors."""
    devices = {tensor.device for tensor in tensors}
    return [g for g in global_generators() if g.device.type == "cpu" or g.device in devices]


class _Recorder(TorchDispatchMode):
    """Record each operation below autograd, with its arguments and results."""

    def __init__(self, arguments: Sequence[Tensor]):
        super().__init__()
        # keeps its tensors alive, so that ids are unique
        self.tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.known = {id(argument) for argument in arguments}
        self.captured: list[Tensor] = []
        self.before: list[Tensor] = []  # copies of the captured tensors
        self.constant: set[int] = set()  # storage with the same content at every step
        self.written: set[int] = set()  # storage changed in place
        self.conditions: list[
            tuple[Tensor, bool, Tensor, int]
        ] = []  # value, outcome, copy, length of the tape
        self.generators: dict[int, tuple[Generator, Tensor]] = {}  # explicit ones, with their first states
        self.reason: str | None = None  # why no graph can be recorded

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's default, True, imports its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            return self._copy_of_constant(args[0])  # a new tensor of Python numbers, by torch.tensor(...)
        args, kwargs = self._with_known_shape(func, args), kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._capture(leaf)
            elif isinstance(leaf, Generator):
                self.reason = "it draws from an explicit random generator"
                self.generators.setdefault(id(leaf), (leaf, leaf.get_state()))
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:
            self.written.update(map(_storage, _written_arguments(func, args, kwargs)))
        if self._is_constant(func, inputs):
            self.constant.update(map(_storage, results))
            if _DATA_DEPENDENT.intersection(func.tags):  # compilers do not support func, but a constant
                return pytree.tree_map_only(Tensor, self._copy_of_constant, out)
        else:
            self.constant.difference_update(map(_storage, results + _written_arguments(func, args, kwargs)))
            if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                self.conditions.append((args[0], out, args[0].clone(), len(self.tape)))
            elif func is aten._local_scalar_dense.default and args[0].dtype in _INTEGERS:
                self._require(args[0], out)
            elif func is not aten.index.Tensor and _DATA_DEPENDENT.intersection(func.tags):
                self.reason = f"it reads values of tensors into Python, by {func}"
        self.known.update(map(id, results))
        if results or func._schema.is_mutable:
            self.tape.append((func, args, kwargs, out))
        return out

    def _capture(self, tensor: Tensor) -> None:
        """Store a tensor that is neither an argument nor the result of a recorded operation."""
        if id(tensor) not in self.known:
            self.known.add(id(tensor))
            self.captured.append(tensor)
            self.before.append(tensor.detach().clone())

    def _copy_of_constant(self, constant: Tensor) -> Tensor:
        """Return a copy that every replay makes again, since later operations may change it in place."""
        self._capture(constant)
        copy = constant.clone()
        self.known.add(id(copy))
        self.constant.update(map(_storage, (constant, copy)))
        self.tape.append((aten.clone.default, (constant,), {}, copy))
        return copy

    def _is_constant(self, func: Any, inputs: list[Tensor]) -> bool:
        """Return True if an operation has the same result at every step."""
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        return not is_random and all(_storage(tensor) in self.constant for tensor in inputs)

    def _with_known_shape(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace masks by integer indices, so that the shape of the result is known, to compilers too.

        Lengths of sequences, which are a condition of the graph, become constants for the same reason.
        """
        if func is aten._pack_padded_sequence.default and args[1].device.type == "cpu":
            lengths = torch.tensor(args[1].tolist())
            self.constant.add(_storage(lengths))
            return args[0], lengths, *args[2:]
        if func is not aten.index.Tensor and func not in _INDEX_PUT:
            return args
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype not in _MASK_DTYPES:
                indices.append(index)
            elif _storage(index) in self.constant:
                integers = index.nonzero()
                self.constant.add(_storage(integers))
                indices += integers.unbind(1)
            elif func in _INDEX_PUT and args[2].numel() == 1:  # fills any number of elements
                indices.append(index)
            else:
                indices += self._selected(index)
        return args[0], indices, *args[2:]

    def _selected(self, mask: Tensor) -> Sequence[Tensor]:
        """Return the positions that a mask selects, as many at every step, as integers per dimension."""
        self._capture(mask)
        count = self._apply(aten.count_nonzero.default, mask)
        self._require(count, count.item())
        positions = self._apply(aten.nonzero_static.default, mask, size=count.item(), fill_value=0)
        return self._apply(aten.unbind.int, positions, 1)

    def _apply(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operation that the function did not, and record it."""
        out = func(*args, **kwargs)
        self.known.update(map(id, pytree.tree_leaves(out)))
        self.tape.append((func, args, kwargs, out))
        return out

    def _require(self, tensor: Tensor, value: int) -> None:
        """Mark the output as invalid if a tensor of one element is not `value` at this place."""
        condition = self._apply(aten.all.default, self._apply(aten.eq.Scalar, tensor, value))
        self.conditions.append((condition, True, condition, len(self.tape)))

    def conditions_as_read(self) -> list[tuple[Tensor, bool]]:
        """Return conditions and outcomes; those that are changed in place are copied where they were read."""
        conditions = []
        for value, outcome, copy, position in reversed(self.conditions):
            is_written = _storage(value) in self.written
            if is_written:
                self.known.add(id(copy))
                self.tape.insert(position, (aten.clone.default, (value,), {}, copy))
            conditions.append((copy if is_written else value, outcome))
        return conditions

    def restore(self) -> list[Tensor]:
        """Restore generators and the captured tensors; return the tensors that may have changed."""
        for generator, state in self.generators.values():
            generator.set_state(state)
        mutated = []
        for tensor, value in zip(self.captured, self.before, strict=True):
            # compared too, since the schema of batch normalisation does not say what it writes
            if _storage(tensor) in self.written or not torch.equal(tensor, value):
                tensor.detach().copy_(value)
                mutated.append(tensor)
        return mutated

    def graph_module(self, arguments: Sequence[Tensor], outputs: Sequence[Tensor | None]) -> fx.GraphModule:
        """Return the tape as a function of the arguments and the captured tensors."""
        graph = fx.Graph()
        nodes: dict[int, fx.Node] = {}

        def node(leaf: Any) -> Any:
            return nodes[id(leaf)] if isinstance(leaf, Tensor) else leaf

        def define(tensor: Tensor, new: fx.Node) -> None:
            nodes[id(tensor)] = new
            new.meta["output"] = _like(tensor)

        for index, tensor in enumerate([*arguments, *self.captured]):
            define(tensor, graph.placeholder(f"input_{index}"))
        for func, args, kwargs, out in self.tape:
            given = map_aggregate((args, kwargs), node)
            call = graph.call_function(_COMPILABLE.get(func, func), *given)
            if isinstance(out, Tensor):
                define(out, call)
            elif isinstance(out, tuple | list):
                for index, part in enumerate(out):
                    if isinstance(part, Tensor):
                        define(part, graph.call_function(operator.getitem, (call, index)))
        graph.output(tuple(node(output) for output in outputs))
        graph.eliminate_dead_code()  # keeps random and in-place operations
        return fx.GraphModule(nn.Module(), graph)


def _like(tensor: Tensor) -> Tensor:
    """Return a meta tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation changes in place, by its schema."""
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves([given.get(name) for name in written]) if leaf is not None]


def _equal_states(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return True if two states of Python's and NumPy's generators are equal."""
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))


class _NumbersAsTensors(TorchFunctionMode):
    """Replace `tensor.item()` by the detached tensor, which takes part in arithmetic like the number.

    Integers that Python code reads become conditions of the graph.
    """

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.item and args[0].dtype.is_floating_point | (args[0].dtype == torch.bool):
            with torch.no_grad():  # a copy, since the tensor may be changed in place
                return args[0].clone() if args[0].dim() == 0 else args[0].reshape(()).clone()
        if func in _SPLITS and any(isinstance(part, Tensor) for part in (kwargs or {}).values()):
            self.recorder.reason = f"it reads values of tensors into Python, by {func.__name__}"
        if func == _GRADIENT:
            gradient = func(*args)
            if gradient is not None:
                self.recorder.reason = "it reads the gradient of a tensor, by its attribute grad"
            return gradient
        if func is Tensor.__int__ and args[0].dtype.is_floating_point:
            return int(args[0].detach().long())  # a condition of the graph, as other integers are
        for position in _READ_BELOW.get(getattr(func, "__name__", ""), ()):
            read = args[position] if position < len(args) else None
            if isinstance(read, Tensor) and read.dtype in _INTEGERS:
                bool((read == torch.tensor(read.tolist(), device=read.device)).all())  # a condition
        parts = pytree.tree_leaves([part for part in args if isinstance(part, list | tuple)])
        if func in _TO_PYTHON or (func in _FROM_PYTHON and any(isinstance(part, Tensor) for part in parts)):
            self.recorder.reason = f"it reads values of tensors into Python, by {func.__name__}"
        return func(*args, **(kwargs or {}))
