"""Compile a recorded graph by Inductor: C++ on a CPU, Triton on a GPU."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.engine.products import with_kernel

__all__ = ["NotCompiled", "calls_to_pay", "compile_graph", "outputs_of"]

# Rough costs, of which only the ratios count: the same on every machine, so that a resumed run starts to
# compile at the same step. Measured: 8 s for 240 operations, 55 s for 5,800
_COMPILE_TIME = 20.0
_COMPILE_TIME_PER_OPERATION = 0.03
_SAVED_PER_OPERATION = 4e-6
_SAVED_PER_VALUE = 1e-9  # per element of an operation's output

_OPTIONS = {
    "fallback_random": True,  # the random numbers of eager torch
    # the caller has checked the arguments, and these checks take as long as a small step
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}


class NotCompiled(Exception):  # noqa: N818 (handled by interpreting the graph)
    """No compiler is available, or compilation failed."""


def compile_graph(module: fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """Compile a graph of tensor operations in seconds, or less if Inductor's cache on disk holds it.

    On a GPU, the compiled code is captured as a CUDA graph. On a CPU, matrix products of float32 run by the
    kernel of `products.with_kernel` where that is available.

    Args:
        module: The graph; not changed.
        arguments: Tensors with the shapes, strides, dtypes and devices of later calls; not changed.

    Returns:
        The compiled function, to be called under `torch.no_grad`.

    Raises:
        NotCompiled: With the reason, most often a missing C++ compiler.

    Example:
        >>> def twice(x):
        ...     return (2 * x,)
        >>> compiled = compile_graph(fx.symbolic_trace(twice), [torch.ones(3)])
        >>> compiled(torch.tensor([1.0, 2.0, 3.0]))[0]
        tensor([2., 4., 6.])
    """
    # which import sympy, for a second
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415

    # the number of threads, since graphs on disk are told apart by options
    options = {**_OPTIONS, "cpp.threads": torch.get_num_threads()}
    options = {**options, "triton.cudagraphs": any(a.device.type == "cuda" for a in arguments)}
    on_cpu = all(argument.is_cpu for argument in arguments)
    if on_cpu:  # Inductor would give convolutions channels-last operands: copies take longer than is gained
        options["layout_optimization"] = False
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # hides a warning about machines without a GPU
    try:
        module = with_kernel(module) if on_cpu else module
        # only a graph that was compiled for shapes, not for values, is found on disk by the next process
        fakes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        shapes: list[Any] = [fakes.from_tensor(argument, static_shapes=True) for argument in arguments]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates functions that Inductor calls
            return torch._inductor.compile(module, shapes, options=options)
    except Exception as error:  # Inductor and the C++ compiler document no common error type
        reason = str(error).strip().splitlines() or [""]
        raise NotCompiled(f"{type(error).__name__}: {reason[0]}") from error
    finally:
        logger.setLevel(level)


def calls_to_pay(outputs: Sequence[Tensor], rows: int = 1) -> float:
    """Return the number of calls after which a compiled graph has saved as much time as compiling takes.

    Args:
        outputs: Those of a graph's operations, see `outputs_of`.
        rows: How many times as many values the operations will have.
    """
    values = rows * sum(output.numel() for output in outputs)
    compile_time = _COMPILE_TIME + _COMPILE_TIME_PER_OPERATION * len(outputs)
    return compile_time / (_SAVED_PER_OPERATION * len(outputs) + _SAVED_PER_VALUE * values)


def outputs_of(module: fx.GraphModule) -> list[Tensor]:
    """Return the outputs of a graph's operations, on the meta device; see `products`."""
    return [node.meta["output"] for node in module.graph.nodes if "output" in node.meta]
