"""Call a function of tensors many times: by a compiled graph, where that pays."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.engine.compiler import calls_to_pay, compile_graph, outputs_of
from pyro_vae.engine.guards import Guards
from pyro_vae.engine.recorder import Graph
from pyro_vae.engine.side_effects import record_with_guards

__all__ = ["Repeated"]

logger = logging.getLogger("pyro_vae")

_FEWEST = 100  # calls for which a recording may pay
_MARGIN = 3.0  # times as many calls as pay, since compiling takes the longer the more goes on beside it
_MOST_BYTES = 2**28  # of all values of a call, which a recording keeps


class Repeated:
    """A function of tensors on a CPU, without gradients, that may draw from torch's generators.

    Its first call is as it is. Then a graph of its operations is compiled, if the expected calls save several
    times what that takes. The graph draws the same random numbers and agrees within rounding, which is
    compared once; where it does not hold for a call, the function is called. Whether it is compiled depends
    on the graph and the number of calls alone, on no clock, so that processes that share the calls agree.

    Args:
        function: Returns a tensor.
        programs: Functions and methods that it runs, for `Guards`.
        calls: Number of calls to expect with tensors of the first shapes.

    Example:
        >>> weight = torch.tensor([3.0, 1.0])
        >>> def scaled(x):
        ...     return weight * x
        >>> repeated = Repeated(scaled, [scaled], calls=5)  # too few to compile
        >>> with torch.no_grad():
        ...     repeated(torch.ones(2))
        tensor([3., 1.])
    """

    def __init__(self, function: Callable[..., Tensor], programs: Iterable[Any], *, calls: int):
        self.function, self.programs, self.calls = function, list(programs), calls
        self.is_ended = calls < _FEWEST
        self.run: Callable[..., Any] | None = None
        self.is_compared = False
        self.shapes: list[tuple[Any, ...]] = []

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the value of the function, of tensors (n, ...)."""
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
        if self.run is None and not self.is_ended:
            self._compile(tensors)
            self.shapes = shapes
        if self.run is None or self.is_ended or shapes != self.shapes or not self.guards.hold():
            return self.function(*tensors)
        before = [generator.get_state() for generator in self.graph.generators]
        _, invalid, found = self.run(*tensors, *self.graph.captured)
        if self.is_compared and not invalid:
            return found
        after = [generator.get_state() for generator in self.graph.generators]
        for generator, state in zip(self.graph.generators, before, strict=True):
            generator.set_state(state)
        expected = self.function(*tensors)
        drawn = [generator.get_state() for generator in self.graph.generators]
        self.is_compared = not invalid and all(map(torch.equal, drawn, after)) and _agree(found, expected)
        self.is_ended = not self.is_compared
        if self.is_ended:
            logger.info("a compiled graph disagrees with its function, which is called in its place")
        return expected if self.is_ended else found  # as other processes, which compare at another call

    def _compile(self, tensors: tuple[Tensor, ...]) -> None:
        """Record the function and compile the graph, unless that does not pay or is not possible."""
        self.is_ended = True
        if not all(tensor.is_cpu for tensor in tensors):
            return
        try:
            # one row tells what all would take, and takes little itself
            graph, _ = self._record([tensor[:1] for tensor in tensors])
            outputs, rows = outputs_of(graph.module), len(tensors[0])
            pays = self.calls >= _MARGIN * calls_to_pay(outputs, rows)
            if not pays or rows * sum(output.nbytes for output in outputs) > _MOST_BYTES:
                return
            self.graph, self.guards = self._record(tensors)
            if all(tensor.is_cpu for tensor in self.graph.captured) and not self.graph.mutated:
                self.run = compile_graph(self.graph.module, [*tensors, *self.graph.captured])
                self.is_ended = False
        except Exception as reason:  # whatever fails is a reason to call the function
            logger.info("no graph is compiled: %s: %s", type(reason).__name__, reason)

    def _record(self, tensors: Sequence[Tensor]) -> tuple[Graph, Guards]:
        def value(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
            found = self.function(*tensors)
            return found.new_zeros(()), [found]

        owners = [getattr(program, "__self__", program) for program in self.programs]
        modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
        return record_with_guards(value, tensors, self.programs, modules)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether all values agree within eps^(2/3), relative to at least 1."""
    allowed = torch.finfo(expected.dtype).eps ** (2 / 3) * expected.abs().clamp(min=1.0)
    return bool(((found - expected).abs() <= allowed).all())
