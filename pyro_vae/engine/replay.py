"""Take steps of SVI by graphs, as recorded or compiled, and eagerly wherever a graph does not serve.

A graph holds while what Python code looks at stays the same. That is watched as far as it can be: numbers
among the arguments, dtypes, and what `watching` finds. A model may still look at other things, such as the
attribute of a class; so a graph is believed only as long as it agrees with the eager loss and gradients for
the same random numbers, which is tried at its 1st, 2nd, 4th, 8th ... use.

A step goes like this:

1. find the recording for the forms of the arguments, or make it;
2. compile it if its time has come; compare it with the function if this use is one of those;
3. run the graph, which gives the loss, a flag, 1.0 where the graph does not hold, and the gradients;
4. update the parameters, unless the flag is up, which nobody waits for;
5. read the loss: NaN where the flag is up. If it is finite, that was the step;
6. otherwise put back what the graph changed, and take the step eagerly.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import get_param_store
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pyro_vae.engine.compiler import NotCompiled, choose_products, compile_graph
from pyro_vae.engine.guards import PLAIN, Watch
from pyro_vae.engine.optimizer_step import Update
from pyro_vae.engine.recorder import (
    LossAndGradients,
    Untraceable,
    preserved,
    python_noise,
    record,
    restore_python_noise,
)
from pyro_vae.utils.isolation import keep_freed_memory

__all__ = ["ENGINES", "Replay"]

logger = logging.getLogger("pyro_vae")

ENGINES = ("auto", "eager", "traced", "compiled")

_MAX_RECORDINGS = 32  # where shapes keep changing, recording costs more than it saves

# What compiling costs, and what it saves at each step: rough, and the same on every machine, so that a run
# which is resumed changes over at the same step
_COMPILING = 20.0  # seconds
_PER_OPERATION = 4e-6
_PER_VALUE = 1e-9  # of what an operation makes


class _NotYet(Untraceable):
    """The step is eager, but the next ones need not be."""


class Replay:
    """Steps of SVI by graphs, one for each shape of the arguments.

    Under "traced" the graphs are interpreted as recorded, under "compiled" compiled at once, and under "auto"
    as soon as compiling earlier would have paid, so that this takes at most twice as long as the better of
    the two. Where they cannot be compiled, the log says so and they are interpreted.

    If no graph can be made, or one disagrees with the eager step, the log says why and every step is eager
    from then on. A step whose graph does not hold (see `recording`), or whose loss is not finite, is undone
    and taken eagerly from the same random numbers, so that it raises what an eager step raises.

    Args:
        model: A Pyro model function.
        guide: A Pyro guide function.
        estimator: An ELBO.
        optimizer: A torch optimiser.
        clip_norm: As for `pyro_vae.SVI`.
        engine: "traced", "compiled" or "auto".
        eager_step: Takes a step without a graph.
        fastest: Which library multiplies matrices of which shapes: see `choose_products`.
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
        eager_step: Callable[..., float],
        fastest: dict[str, str],
    ):
        self.model, self.guide = model, guide
        self.estimator: Any = estimator
        self.optimizer, self.clip_norm, self.eager_step = optimizer, clip_norm, eager_step
        self.engine, self.fastest = engine, fastest
        self.update = Update(optimizer)
        self.recordings: dict[tuple, _Recording] = {}
        self.num_recordings = self.num_compilations = 0
        self.given_up = False
        some = self._parameters()[0]
        if some.device.type == "cpu":
            keep_freed_memory()
        # A loss with a scheduled weight, such as `KLWeighted`, has `beta`, the weight of the next step,
        # `steps`, how many were taken, and `differentiable_loss_at(weight, model, guide, ...)`. The weight is
        # filled in outside the recorded function: within it, a number would become a constant of the graph.
        self.is_scheduled = hasattr(estimator, "differentiable_loss_at")
        self.weight = torch.ones((), dtype=torch.float64, device=some.device)  # it promotes nothing

    def step(self, number: int, *args: Any, **kwargs: Any) -> float:
        """Take the step of that number, counted from 0, and return its loss."""
        if self.given_up or _PYRO_STACK:  # a handler around the step may do anything
            return self.eager_step(*args, **kwargs)
        if self.is_scheduled:
            self.weight.fill_(self.estimator.beta)
        try:
            recording, tensors = self._recording(args, kwargs)
            self._prepare(recording, tensors, number)
        except Untraceable as reason:
            loss = self.eager_step(*args, **kwargs)  # if the arguments are at fault, this raises
            if isinstance(reason, _NotYet):
                return loss
            self.given_up = True
            logger.warning("SVI steps are eager from now on, not by a graph: %s", reason)
            return loss

        graph = recording.graph
        states = [generator.get_state() for generator in graph.generators]
        values = [tensor.clone() for tensor in graph.changed]
        for parameter in self._parameters():
            parameter.grad = None  # the new gradients find its memory in the cache
        with torch.no_grad():
            loss, does_not_hold, *gradients = recording.run(*tensors, *graph.outside)
            self.update(gradients, skip=does_not_hold)
            value = loss.item()
            if math.isfinite(value):
                if self.is_scheduled:
                    self.estimator.steps += 1
                return value
            for generator, state in zip(graph.generators, states, strict=True):
                generator.set_state(state)
            for tensor, before in zip(graph.changed, values, strict=True):
                tensor.copy_(before)
        return self.eager_step(*args, **kwargs)

    def _recording(self, args: tuple, kwargs: dict[str, Any]) -> "tuple[_Recording, list[Tensor]]":
        """Find or make the recording for these arguments; return it and the tensors among them."""
        leaves, spec = list(args), None  # the common case: flattening takes as long as a small product
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, spec = pytree.tree_flatten((args, kwargs))
        if not all(isinstance(leaf, PLAIN) for leaf in leaves):
            raise Untraceable(f"its arguments are more than tensors, numbers and words: {spec}")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        parameters = self._parameters()

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec) if spec else (filled, {})
            return self._loss_and_gradients(parameters, args, kwargs)

        key = self._key(leaves, spec, tensors, parameters)
        recording = self.recordings.get(key)
        if recording is None or not recording.watch.is_same():
            recording = self.recordings[key] = self._record(loss_and_gradients, tensors)
        recording.loss_and_gradients = loss_and_gradients
        return recording, tensors

    def _key(self, leaves: list[Any], spec: Any, tensors: list[Tensor], parameters: list[Tensor]) -> tuple:
        """What a recording depends on: the forms of arguments and parameters, and what is set in torch."""
        identities = [id(tensor) for tensor in tensors]
        return (
            spec,
            *[_form(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves],
            *[(id(p), *_form(p), *(p._backward_hooks or ())) for p in parameters],
            id(self._inner_estimator),
            *map(identities.index, identities),  # which of them are the same
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
            torch.get_default_dtype(),
            is_validation_enabled(),
            Distribution._validate_args,
        )

    def _record(self, loss_and_gradients: LossAndGradients, tensors: list[Tensor]) -> "_Recording":
        self.num_recordings += 1
        if self.num_recordings > _MAX_RECORDINGS:
            raise Untraceable(f"shapes or attributes keep changing, {_MAX_RECORDINGS} times by now")
        estimator = self._inner_estimator
        nesting = estimator.max_plate_nesting
        pair = (self.model, self.guide)
        recording = _Recording(loss_and_gradients, tensors, pair, self._watched(), self.fastest)
        if estimator.max_plate_nesting != nesting:
            estimator.max_plate_nesting = nesting
            raise _NotYet(
                "the estimator finds max_plate_nesting at its first step, by draws that no other makes"
            )
        return recording

    def _prepare(self, recording: "_Recording", tensors: Sequence[Tensor], number: int) -> None:
        """Compile the graph if the time has come, and look whether it is right."""
        try:
            if self.engine == "compiled" or (self.engine == "auto" and number >= recording.break_even):
                self.num_compilations += recording.compile(tensors)
            recording.use(tensors)
        except NotCompiled as reason:
            self.engine = "traced"
            logger.warning("the graph of the SVI step is not compiled, but interpreted: %s", reason)
            recording.use(tensors)

    def _loss_and_gradients(
        self, parameters: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        estimator = self.estimator
        if self.is_scheduled:
            loss = estimator.differentiable_loss_at(self.weight, self.model, self.guide, *args, **kwargs)
        elif hasattr(estimator, "differentiable_loss"):
            loss = estimator.differentiable_loss(self.model, self.guide, *args, **kwargs)
        else:
            raise Untraceable(f"{type(estimator).__name__} has no differentiable_loss")
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if any(parameter._post_accumulate_grad_hooks for parameter in trained):
            raise Untraceable("a parameter has hooks that wait for a gradient to be accumulated")
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        if self.clip_norm is not None:
            norm = get_total_norm([gradient for gradient in gradients if gradient is not None])
            shrink = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            gradients = tuple(None if gradient is None else gradient * shrink for gradient in gradients)
        found = dict(zip(map(id, trained), gradients, strict=True))
        laid_out = [_laid_out_like(parameter, found.get(id(parameter))) for parameter in parameters]
        return loss, _apart(laid_out)

    @property
    def _inner_estimator(self) -> ELBO:
        """The estimator that a loss with a scheduled weight holds, or the loss itself."""
        return self.estimator.estimator if self.is_scheduled else self.estimator

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _watched(self) -> list[Any]:
        """What shapes the graph beside the modules that run: the estimator, and modules bound to the pair."""
        watched: list[Any] = [self._inner_estimator]
        for function in (self.model, self.guide):
            owner = getattr(function, "__self__", function)
            if isinstance(owner, nn.Module):
                watched += owner.modules()
        return watched


class _Recording:
    """A graph, and the attributes that it was made under."""

    def __init__(
        self,
        loss_and_gradients: LossAndGradients,
        tensors: Sequence[Tensor],
        functions: Sequence[Callable],
        watched: list[Any],
        fastest: dict[str, str],
    ):
        self.loss_and_gradients = loss_and_gradients
        try:
            self.graph = record(loss_and_gradients, tensors)
            self.plain = copy.deepcopy(self.graph.module).forward  # by the products of eager torch
            if all(tensor.device.type == "cpu" for tensor in [*tensors, *self.graph.outside]):
                choose_products(self.graph.module, fastest)
            # an estimator of the user's own is called by its methods, which only its class shows
            looked_at = [*functions, type(watched[0]), get_param_store()._params]
            self.watch = Watch(looked_at, [*watched, *self.graph.modules])
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(f"recording it raised {type(error).__name__}: {error}") from error
        self.run = self.graph.module.forward
        self.is_compiled = self.is_doubtful = False
        self.uses = 0
        made = [node.meta["form"].numel() for node in self.graph.module.graph.nodes if "form" in node.meta]
        self.break_even = _COMPILING / (_PER_OPERATION * len(made) + _PER_VALUE * sum(made))  # steps

    def compile(self, tensors: Sequence[Tensor]) -> bool:
        """Run compiled from now on; return whether that is new.

        Raises:
            NotCompiled: If it cannot be.
        """
        if self.is_compiled:
            return False
        self.run = compile_graph(self.graph.module, [*tensors, *self.graph.outside])
        self.is_compiled, self.uses = True, 0
        return True

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Count a use, and now and then compare the graph with the function that it was made from.

        Raises:
            NotCompiled: If the compiled graph disagrees with itself as recorded, twice running; it is
                interpreted from now on.
            Untraceable: If the graph as recorded disagrees with the function; or, for this step only, if the
                compiled one was found to disagree for the first time.
        """
        self.uses += 1
        if self.uses & (self.uses - 1):  # no power of 2
            return
        recorded_agrees, compiled_agrees = self._agreements(tensors)
        if not recorded_agrees:
            raise Untraceable(
                "the graph disagrees with the eager step, so the model looks at something that changes and "
                "is neither an argument nor a tensor changed in place; pass it to step() as a tensor"
            )
        if compiled_agrees:
            self.is_doubtful = False
        elif not self.is_doubtful:  # rounding may have put a number on the other side of a ReLU's kink
            self.is_doubtful, self.uses = True, 0
            raise _NotYet("the compiled graph disagrees, and is asked again at the next step")
        else:
            self.run, self.is_compiled, self.uses = self.graph.module.forward, False, 0
            raise NotCompiled("compiled, the graph disagrees with the eager step")

    def _agreements(self, tensors: Sequence[Tensor]) -> tuple[bool, bool]:
        """Whether the graph as recorded gives what the function does; and whether it does compiled.

        The recorded one is asked with the products of eager torch, so that its operations are those of the
        function. Compiled, they round otherwise, which exponentials of log weights enlarge: their gradients
        are given more room.
        """
        graph = self.graph

        def draw(run: Callable[..., Sequence[Any]], *inputs: Tensor) -> tuple[Sequence[Any], list[Tensor]]:
            with preserved(graph.generators, graph.changed):
                return run(*inputs), [generator.get_state() for generator in graph.generators]

        with torch.no_grad():
            (loss, does_not_hold, *gradients), states = draw(self.run, *tensors, *graph.outside)
            (plain_loss, _, *plain_gradients), plain_states = draw(self.plain, *tensors, *graph.outside)
        if does_not_hold:
            return True, True  # it says so itself
        noise = python_noise()
        (expected_loss, expected), expected_states = draw(self.loss_and_gradients, *tensors)
        restore_python_noise(noise)

        found, plain = [loss, *gradients], [plain_loss, *plain_gradients]
        recorded = _agree(plain, [expected_loss.detach(), *expected], power=2 / 3)
        compiled = not self.is_compiled or _agree(found, plain, power=1 / 2)
        return (
            recorded and all(map(torch.equal, plain_states, expected_states)),
            compiled and all(map(torch.equal, states, plain_states)),
        )


def _laid_out_like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Copy a gradient that does not lie in memory as its parameter does: fused kernels count on it."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copy those that share memory with an earlier one: whoever scales one must not scale the other."""
    seen: set[int] = set()
    result = []
    for gradient in gradients:
        own = gradient
        if gradient is not None:
            memory = gradient.untyped_storage()._cdata
            own = gradient.clone() if memory in seen else gradient
            seen.add(memory)
        result.append(own)
    return result


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], *, power: float) -> bool:
    """Whether losses are equal up to rounding, and gradients, as one vector, up to that power of its unit."""
    if [tensor is None for tensor in found] != [tensor is None for tensor in expected]:
        return False
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    unit = torch.finfo(pairs[0][1].dtype).eps
    differences = [(f - e).norm() for f, e in pairs]
    sizes = [e.norm() for _, e in pairs]
    loss_agrees = differences[0] <= unit ** (2 / 3) * sizes[0].clamp(min=1.0)
    return bool(loss_agrees & (get_total_norm(differences[1:]) <= unit**power * get_total_norm(sizes[1:])))
