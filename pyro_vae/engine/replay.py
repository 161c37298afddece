"""Replay recorded or compiled graphs of SVI steps, with eager steps where no graph is valid.

A graph is valid while the Python values that the model reads are unchanged. Arguments that are numbers,
dtypes and the values found by `Guards` are checked before each step. A model may also read unguarded values
(`Guards` lists them). So at its 1st, 2nd, 4th, 8th ... use, a graph is compared with the eager loss and
gradients for the same random numbers; if they disagree, no graph is used from then on.

A step of `Replay`:

1. find the recording for the shapes and dtypes of the arguments, or record one;
2. compile the graph if that now pays; compare it with the eager function at the uses listed above;
3. run the graph, which returns the loss, the flag `invalid` and the gradients; a gradient that is not finite
   sets the flag too;
4. update the parameters, which the device skips if `invalid` is 1.0;
5. read the loss and the flag. If the loss is finite and the flag 0.0, the step is done;
6. otherwise restore what the graph changed, and take the step eagerly.
"""

import logging
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from pyro.infer import ELBO, TraceGraph_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from pyro_vae.engine.compiler import NotCompiled, calls_to_pay, compile_graph, outputs_of
from pyro_vae.engine.guards import PLAIN_TYPES
from pyro_vae.engine.optimizer_step import OptimizerStep
from pyro_vae.engine.products import choose_matmul_libraries
from pyro_vae.engine.recorder import LossAndGradients, Untraceable
from pyro_vae.engine.side_effects import SideEffect, record_with_guards
from pyro_vae.utils.isolation import (
    keep_freed_memory,
    preserved,
    python_noise,
    restore_python_noise,
    without_autocast,
)
from pyro_vae.utils.validation import flag_non_finite

__all__ = ["ENGINES", "Replay"]

logger = logging.getLogger("pyro_vae")

ENGINES = ("auto", "eager", "traced", "compiled")

_MAX_RECORDINGS = 32  # that have not paid; if shapes keep changing, recording costs more than it saves
_STEPS_TO_PAY = 100
_MAX_VALUES = 8  # recordings for other values of arguments that are not tensors, each used once
_MAX_MISSES = 8  # invalid uses in a row

_PROPERTIES = operator.attrgetter("shape", "dtype", "device", "requires_grad")
_Key = tuple[tuple[Any, ...], tuple[Any, ...]]


class _EagerOnce(Untraceable):
    """This step has to be eager; later ones may use a graph."""


class Replay:
    """Take SVI steps by graph replay, with one graph per combination of argument shapes.

    With "traced", graphs are interpreted as recorded; with "compiled", compiled at once; with "auto", as soon
    as compiled steps would have saved as much time so far as compiling takes, so that the total is at most
    twice that of the better choice. If compilation fails, a warning is logged and graphs are interpreted.

    A step is eager under a Pyro handler or a mode of torch, without gradients, and where an argument requires
    a gradient. Gradients of leaf tensors that the optimiser does not hold are accumulated as by a backward
    pass.

    If no graph can be recorded, if the model changes Python values as it runs, if two recordings in a row do
    not last, or if a graph disagrees with the eager step, a warning is logged and all later steps are eager.
    A step whose graph is invalid (see `Graph`), or whose loss or gradient is not finite, is undone and taken
    eagerly with the same random numbers, so that it raises the errors of an eager step.

    Args:
        model: A Pyro model function.
        guide: A Pyro guide function.
        estimator: An ELBO.
        optimizer: A torch optimiser.
        clip_norm: Largest norm of all gradients together, or None; as for `pyro_vae.SVI`.
        engine: "traced", "compiled" or "auto".
        watched: Returns model and guide as they run while a graph is recorded or compared.
        eager_step: Takes a step without a graph and returns its loss.
        fastest: The matrix-product library for each shape, see `choose_matmul_libraries`; None for torch's.
        update: Called in place of an `OptimizerStep`, with the same arguments and return value.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        estimator: ELBO,
        optimizer: Optimizer,
        clip_norm: float | None,
        *,
        engine: str,
        watched: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]],
        eager_step: Callable[..., float],
        fastest: dict[str, str] | None,
        update: Callable[..., Tensor] | None = None,
    ):
        self.model, self.guide, self.watched = model, guide, watched
        self.estimator: Any = estimator
        self.clip_norm, self.eager_step = clip_norm, eager_step
        self.engine, self.fastest = engine, fastest
        self.optimizer_step = OptimizerStep(optimizer)
        self.update = update or self.optimizer_step
        self.recordings: dict[_Key, _Recording] = {}
        self.failures: dict[_Key, int] = {}
        self.untrained: set[_Key] = set()  # that depend on leaves which the optimiser does not hold
        self.missed: set[_Key] = set()  # whose graphs were invalid many times in a row
        self.num_recordings = self.num_compilations = 0
        self.unpaid = 0  # recordings that have not been used for long
        self.disabled = False  # every step is eager
        self.last: tuple[_Key, _Recording, tuple[Any, ...]] | None = (
            None  # of a step that the next may repeat
        )
        self.device_types = sorted({"cpu", *(p.device.type for p in self.optimizer_step.parameters())})
        some = self.optimizer_step.parameters()[0]
        if some.device.type == "cpu":
            keep_freed_memory()
        # A loss with a scheduled weight, such as `KLWeighted`, has `beta`, the weight of the next step,
        # `steps`, the number of steps taken, and `differentiable_loss_at(weight, model, guide, ...)`. The
        # tensor is filled outside the recorded function: inside, the weight would become a constant.
        self.is_scheduled = hasattr(estimator, "differentiable_loss_at")
        self.weight = torch.ones((), dtype=torch.float64, device=some.device)  # 0-d: promotes no dtype

    def step(self, number: int, /, *args: Any, **kwargs: Any) -> float:
        """Take step `number`, counted from 0, and return its loss."""
        self.last = None
        if self.disabled or _PYRO_STACK or _is_within_torch_mode():  # these may have any effect
            return self.eager_step(*args, **kwargs)
        if self.is_scheduled:
            self.weight.fill_(self.estimator.beta)
        try:
            key, recording, tensors = self._recording(args, kwargs)
            self._prepare(recording, tensors, number)
        except Untraceable as reason:
            return self._step_eagerly(reason, args, kwargs)
        if shapes := _shapes(args, kwargs):
            self.last = key, recording, shapes
        return self._run(key, recording, tensors, args, kwargs)

    def can_repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a graph took the last step, with arguments of the same shapes.

        And no code of others ran in it: an optimiser's hooks, or own step, may change what the programs read.
        """
        if self.last is None or not (self.update is self.optimizer_step and self.optimizer_step.kernels):
            return False
        return self.last[2] == _shapes(args, kwargs)

    def step_again(self, number: int, /, *args: Any, **kwargs: Any) -> float:
        """Take step `number`, which `can_repeat` allows, and return its loss.

        What the model reads is not compared with what was recorded: nothing but steps may have run since.
        """
        assert self.last is not None
        key, recording, _ = self.last
        tensors = [*args, *kwargs.values()]
        if self.is_scheduled:
            self.weight.fill_(self.estimator.beta)
        try:
            self._prepare(recording, tensors, number)
        except Untraceable as reason:
            return self._step_eagerly(reason, args, kwargs)
        return self._run(key, recording, tensors, args, kwargs, again=True)

    def _step_eagerly(self, reason: Untraceable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Take a step without a graph, and so all later ones unless the reason is of this step alone."""
        self.last = None
        loss = self.eager_step(*args, **kwargs)  # raises if the arguments are invalid
        if not isinstance(reason, _EagerOnce):
            self._disable(reason)
        return loss

    def _run(
        self,
        key: "_Key",
        recording: "_Recording",
        tensors: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        **again: bool,
    ) -> float:
        """Take a step by the graph, or, if it is invalid, eagerly; `again` goes to `OptimizerStep`."""
        graph = recording.graph
        states = [generator.get_state() for generator in graph.generators]
        values = [tensor.clone() for tensor in graph.mutated]
        self.optimizer_step.zero_grad()
        with torch.no_grad(), _without_autocast(self.device_types):
            loss, invalid, *gradients = recording.run(*tensors, *graph.captured)
            num_trained = len(gradients) - len(recording.others)
            gradients, others = gradients[:num_trained], gradients[num_trained:]
            self.optimizer_step.is_compiled = recording.is_compiled
            invalid = self.update(gradients, skip=invalid, **again)
            value = loss.item()
            if math.isfinite(value) and not invalid:
                if self.is_scheduled:
                    self.estimator.steps += 1
                if others:
                    _accumulate(recording.others, others)
                self._count_step(key, recording)
                return value
            for generator, state in zip(graph.generators, states, strict=True):
                generator.set_state(state)
            for tensor, before in zip(graph.mutated, values, strict=True):
                tensor.copy_(before)
        self.last = None
        loss = self.eager_step(*args, **kwargs)
        self._count_miss(key, recording)
        return loss

    def _disable(self, reason: object) -> None:
        self.disabled = True
        logger.warning("SVI steps are eager from now on, without a graph: %s", reason)

    def _count_step(self, key: "_Key", recording: "_Recording") -> None:
        """Count a step taken by a graph; note that its recording lasts, and when it has paid."""
        recording.steps += 1
        recording.misses = 0
        if recording.steps == 2:
            self.failures.pop(key, None)
        if recording.steps == _STEPS_TO_PAY:
            self.unpaid -= 1

    def _count_miss(self, key: "_Key", recording: "_Recording") -> None:
        """Count a step whose graph was invalid; after many in a row, record another graph, or none."""
        recording.misses += 1
        if recording.misses < _MAX_MISSES:
            return
        if key in self.missed:
            self._disable(
                "what the model reads from tensors into Python keeps differing from what was recorded, "
                "such as a condition or an integer"
            )
        self.missed.add(key)
        del self.recordings[key]

    def _recording(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "tuple[_Key, _Recording, list[Tensor]]":
        """Find or create the recording for these arguments; return it and the tensors among them."""
        leaves, spec = (
            list(args),
            None,
        )  # common case without flattening, which takes as long as a small product
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        parameters = self.optimizer_step.parameters()
        others: list[Tensor] = []

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec) if spec else (filled, {})
            return self._loss_and_gradients(parameters, others, args, kwargs)

        if any(tensor.requires_grad for tensor in tensors):
            raise _EagerOnce("an argument requires a gradient, which a graph does not compute")
        key = self._key(leaves, spec, tensors, parameters)
        recording = self.recordings.get(key)
        if recording is None or not recording.holds():
            if recording is not None and recording.steps < 2:
                self._count_failure(key, f"the model reads {recording.first_change()}, which keeps changing")
            objects = [leaf for leaf in leaves if not isinstance(leaf, PLAIN_TYPES)]
            recording = self._record(key, loss_and_gradients, tensors, objects)
            others += recording.untrained
            if others and key not in self.untrained:
                self.untrained.add(key)
                raise _EagerOnce("SVI checks whether these parameters may be left out, after an eager step")
            if others:  # an eager step leaves gradients on these, too
                recording = self._record(key, loss_and_gradients, tensors, objects)
                recording.others = others
            self.recordings[key] = recording
        others[:] = recording.others
        recording.loss_and_gradients = loss_and_gradients
        return key, recording, tensors

    def _count_failure(self, key: "_Key", reason: object) -> None:
        """Count recordings that held for less than two steps; give up at the second in a row."""
        self.failures[key] = self.failures.get(key, 0) + 1
        if self.failures[key] == 2:
            raise Untraceable(str(reason))

    def _key(self, leaves: list[Any], spec: Any, tensors: list[Tensor], parameters: list[Tensor]) -> "_Key":
        """Return what a recording depends on besides guards: arguments, parameters, settings of torch.

        The first part is the structure with the tensors, the second the values of the other arguments.
        """
        identities = [id(tensor) for tensor in tensors]
        structure = (
            spec,
            *[_signature(leaf) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves],
            *[(id(p), *_signature(p), *_hooks(p)) for p in parameters],
            id(self._inner_estimator),
            *map(identities.index, identities),  # which arguments are the same tensor
            *[torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in self.device_types],
            torch.get_default_dtype(),
            torch.get_default_device(),
            is_validation_enabled(),
            Distribution._validate_args,
        )
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        # an object by its identity, which its recording keeps; guards compare its attributes
        return structure, tuple(o if isinstance(o, PLAIN_TYPES) else id(o) for o in others)

    def _record(
        self, key: "_Key", loss_and_gradients: LossAndGradients, tensors: list[Tensor], objects: list[Any]
    ) -> "_Recording":
        if self.unpaid >= _MAX_RECORDINGS:
            raise Untraceable(f"shapes or attributes keep changing: {_MAX_RECORDINGS} graphs were recorded")
        same = [r for (structure, _), r in self.recordings.items() if structure == key[0]]
        if sum(recording.steps < 2 for recording in same) >= _MAX_VALUES:
            raise Untraceable("its arguments other than tensors keep changing: pass numbers as tensors")
        self.num_recordings += 1
        self.unpaid += 1
        hooks = [
            hook for p in self.optimizer_step.parameters() for hook in (p._backward_hooks or {}).values()
        ]
        functions = [self.model, self.guide, *objects, *hooks, type(self.estimator)]
        try:
            recording = _Recording(
                loss_and_gradients,
                tensors,
                functions,
                self._guarded_objects(),
                fastest=self.fastest,
                ignored=self._counted(),
                parameters=self.optimizer_step.parameters(),
            )
        except SideEffect as reason:
            self._count_failure(key, reason)
            raise _EagerOnce(f"it may be of the first run only: {reason}") from reason
        return recording

    def _prepare(self, recording: "_Recording", tensors: Sequence[Tensor], number: int) -> None:
        """Compile the graph if that now pays, and count the use."""
        try:
            if self.engine == "compiled" or (self.engine == "auto" and number >= recording.break_even):
                self.num_compilations += recording.compile(tensors)
            recording.use(tensors)
        except NotCompiled as reason:
            self.engine = "traced"
            logger.warning("the graph of the SVI step is interpreted, not compiled: %s", reason)
            recording.use(tensors)

    def _loss_and_gradients(
        self, parameters: list[Tensor], others: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        estimator, surrogate = self.estimator, None
        if type(estimator).__name__.startswith("Jit"):
            raise Untraceable(f"{type(estimator).__name__} compiles itself: pass the class without Jit")
        if self.is_scheduled:
            loss = estimator.differentiable_loss_at(self.weight, *self.watched(), *args, **kwargs)
        elif hasattr(estimator, "differentiable_loss"):
            loss = estimator.differentiable_loss(*self.watched(), *args, **kwargs)
        elif type(estimator) is TraceGraph_ELBO:
            elbo, surrogate = estimator._loss_and_surrogate_loss(*self.watched(), args, kwargs)
            loss = -elbo
        else:
            raise Untraceable(f"{type(estimator).__name__} has no differentiable_loss")
        trained = [parameter for parameter in [*parameters, *others] if parameter.requires_grad]
        if any(parameter._post_accumulate_grad_hooks for parameter in trained):
            raise Untraceable("a parameter has post-accumulate-gradient hooks")
        with without_autocast():
            gradients = torch.autograd.grad(
                loss if surrogate is None else surrogate, trained, allow_unused=True
            )
        num = len(trained) - len(others)
        if self.clip_norm is not None:
            norm = get_total_norm([gradient for gradient in gradients[:num] if gradient is not None])
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as in torch's clip_grad_norm_
            clipped = [None if gradient is None else gradient * factor for gradient in gradients[:num]]
            gradients = (*clipped, *gradients[num:])
        found = dict(zip(map(id, trained), gradients, strict=True))
        with_strides = [_with_strides_of(p, found.get(id(p))) for p in [*parameters, *others]]
        return loss, _without_shared_memory(with_strides)

    @property
    def _inner_estimator(self) -> ELBO:
        """The estimator inside a loss with a scheduled weight, or the loss itself."""
        return self.estimator.estimator if self.is_scheduled else self.estimator

    def _guarded_objects(self) -> list[Any]:
        """Return the estimator, and all modules of the objects that the model and the guide belong to."""
        objects: list[Any] = [self._inner_estimator, self.estimator]
        for function in (self.model, self.guide):
            owner = getattr(function, "__self__", function)
            if isinstance(owner, nn.Module):
                objects += owner.modules()
        return objects

    def _counted(self) -> set[tuple[int, Any]]:
        """Return what changes in a loss with a scheduled weight at each step, outside the graph."""
        return {(id(self.estimator), name) for name in ("beta", "steps") if self.is_scheduled}


class _Recording:
    """A graph with its guards, interpreted at first and compiled on demand."""

    def __init__(
        self,
        loss_and_gradients: LossAndGradients,
        tensors: Sequence[Tensor],
        functions: Sequence[Any],
        objects: list[Any],
        *,
        fastest: dict[str, str] | None,
        ignored: set[tuple[int, Any]],
        parameters: Sequence[Tensor],
    ):
        self.loss_and_gradients = loss_and_gradients
        try:
            # the class of the estimator, since a user's estimator is called by its methods only
            readers = [*functions, type(objects[0])]
            self.graph, self.guards = record_with_guards(
                loss_and_gradients, tensors, readers, objects, ignored
            )
            self.reference = self.graph.module.forward  # matrix products of eager torch
            if fastest is not None and all(
                tensor.device.type == "cpu" for tensor in [*tensors, *self.graph.captured]
            ):
                self.graph.module = choose_matmul_libraries(self.graph.module, fastest)
        except Untraceable:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise Untraceable(f"recording it raised {type(error).__name__}: {reason}") from error
        self.run = self.graph.module.forward
        self.others: list[Tensor] = []  # of `untrained`, whose gradients the graph returns, too
        known = {*map(id, parameters)}  # which are compared by the key
        read = {**self.guards.tensors, **{id(tensor): tensor for tensor in self.graph.captured}}
        self.tensors = [tensor for key, tensor in read.items() if key not in known]
        leaves = [tensor for tensor in self.graph.captured if tensor.requires_grad and tensor.is_leaf]
        self.untrained = [tensor for tensor in leaves if id(tensor) not in known]
        self.signatures = self._signatures()
        self.is_compiled = self.disagreed = False
        self.uses = 0
        self.steps = self.misses = (
            0  # taken by the graph; in a row by the eager step, as the graph was invalid
        )
        self.break_even = calls_to_pay(outputs_of(self.graph.module))  # steps

    def holds(self) -> bool:
        """Return True if the guards hold and no captured tensor has another shape, dtype or device."""
        return self.guards.hold() and self._signatures() == self.signatures

    def _signatures(self) -> list[tuple[Any, ...]]:
        """Return what a graph takes for constant of the tensors that the model reads, in few calls."""
        return [*map(_PROPERTIES, self.tensors), *map(Tensor.stride, self.tensors)]

    def compile(self, tensors: Sequence[Tensor]) -> bool:
        """Compile the graph unless it is compiled already; return True if that was needed."""
        if self.is_compiled:
            return False
        self.run = compile_graph(self.graph.module, [*tensors, *self.graph.captured])
        self.is_compiled, self.uses = True, 0
        return True

    def first_change(self) -> str:
        """Describe the first value that changed."""
        for tensor, before in zip(self.tensors, self.signatures, strict=False):
            if _PROPERTIES(tensor) != before:
                return f"a tensor of shape {tuple(before[0])}, now {tuple(tensor.shape)}"
        return self.guards.first_change()

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Count a use, and at powers of 2 compare the graph with the function that it was recorded from.

        Raises:
            NotCompiled: If the compiled graph disagrees with the recorded one in two successive comparisons;
                the graph is interpreted from now on.
            Untraceable: If the recorded graph disagrees with the function; or, for this step only, if the
                compiled graph disagrees for the first time.
        """
        self.uses += 1
        if self.uses & (self.uses - 1):  # not a power of 2
            return
        recorded_agrees, compiled_agrees, same_noise = self._compare(tensors)
        if not same_noise:
            raise Untraceable(
                "the eager step leaves other random numbers to the next step than the graph: the model seeds "
                "or restores a generator, or how much it draws depends on a value that is not an argument"
            )
        if not recorded_agrees:
            raise Untraceable(
                "the graph disagrees with the eager step: the model reads a value that changes and is "
                "neither an argument nor a tensor changed in place. Pass it to step() as a tensor"
            )
        if compiled_agrees:
            self.disagreed = False
        elif not self.disagreed:  # rounding may have moved a value across the kink of a ReLU
            self.disagreed, self.uses = True, 0
            raise _EagerOnce("the compiled graph disagrees; it is compared again at the next step")
        else:
            self.run, self.is_compiled, self.uses = self.graph.module.forward, False, 0
            raise NotCompiled("the compiled graph disagrees with the eager step")

    def _compare(self, tensors: Sequence[Tensor]) -> tuple[bool, bool, bool]:
        """Return whether the recorded graph agrees with the function, and the compiled with the recorded.

        The third value is whether the graph draws as many random numbers as the function.

        The recorded graph is run with the matrix products of eager torch, so that both have the same
        operations. The compiled graph rounds differently, which exponentials of log weights amplify, so its
        gradients have a larger tolerance.
        """
        graph = self.graph

        kinds = sorted({generator.device.type for generator in graph.generators})

        def draw(run: Callable[..., Sequence[Any]], *inputs: Tensor) -> tuple[Sequence[Any], list[Tensor]]:
            with preserved(graph.generators, graph.mutated):
                return run(*inputs), [generator.get_state() for generator in graph.generators]

        with torch.no_grad(), _without_autocast(kinds):
            (loss, invalid, *gradients), states = draw(self.run, *tensors, *graph.captured)
            (recorded_loss, _, *recorded), recorded_states = draw(self.reference, *tensors, *graph.captured)
            invalid = flag_non_finite(recorded, invalid)
        if invalid:
            return True, True, True  # the step is eager anyway
        noise = python_noise()
        torch.clear_autocast_cache()
        (expected_loss, expected), expected_states = draw(self.loss_and_gradients, *tensors)
        torch.clear_autocast_cache()
        restore_python_noise(noise)

        found, recorded = [loss, *gradients], [recorded_loss, *recorded]
        recorded_agrees = _agree(recorded, [expected_loss.detach(), *expected], power=2 / 3)
        low = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
        compiled_agrees = not self.is_compiled or _agree(found, recorded, power=1 / 2, dtypes=low)
        return (
            recorded_agrees,
            compiled_agrees and all(map(torch.equal, states, recorded_states)),
            all(map(torch.equal, recorded_states, expected_states)),
        )


def _accumulate(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those of leaf tensors, as a backward pass does."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            # a copy, since a compiled graph may reuse the memory
            tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad.add_(gradient)


def _is_within_torch_mode() -> bool:
    """Return True without gradients, or under a mode that sees torch's operations, other than a device."""
    if not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        return True
    if not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def _hooks(parameter: Tensor) -> tuple[Any, ...]:
    """Return the identifiers of a parameter's hooks."""
    hooks, later = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return (*(hooks or ()), *(later or ())) if hooks or later else ()


def _without_autocast(device_types: Sequence[str]) -> ExitStack:
    """Switch autocast off in a block, since a graph holds the casts that were recorded."""
    stack = ExitStack()
    for kind in device_types:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _with_strides_of(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Return the gradient with the strides of its parameter, which fused kernels require."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _without_shared_memory(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copy gradients that share memory with an earlier one, so that each can be changed in place."""
    seen: set[int] = set()
    result: list[Tensor | None] = []
    for gradient in gradients:
        storage = 0 if gradient is None else gradient.untyped_storage()._cdata
        result.append(gradient.clone() if gradient is not None and storage in seen else gradient)
        seen.add(storage)
    return result


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what the arguments of a repeated step share; None unless they are different tensors."""
    tensors = [*args, *kwargs.values()]
    if len({*map(id, tensors)}) < len(tensors) or not all(isinstance(each, Tensor) for each in tensors):
        return None
    return (len(args), *kwargs, *map(_signature, tensors))


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _agree(
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    *,
    power: float,
    dtypes: Sequence[torch.dtype] = (),
) -> bool:
    """Return True if losses agree within eps^(2/3), and all gradients as one vector within eps^power.

    eps is that of the least precise dtype of `dtypes` and the tensors: a loss of float64 may sum float32.
    """
    if [tensor is None for tensor in found] != [tensor is None for tensor in expected]:
        return False
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    eps = max(torch.finfo(dtype).eps for dtype in [*dtypes, *(t.dtype for pair in pairs for t in pair)])
    differences = [(f - e).norm() for f, e in pairs]
    sizes = [e.norm() for _, e in pairs]
    loss_agrees = differences[0] <= eps ** (2 / 3) * sizes[0].clamp(min=1.0)
    return bool(loss_agrees & (get_total_norm(differences[1:]) <= eps**power * get_total_norm(sizes[1:])))
