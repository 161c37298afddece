"""Compile a recorded graph by Inductor, torch's compiler: C++ on a CPU, Triton on a GPU."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["NotCompiled", "compile_graph"]

_OPTIONS = {
    "fallback_random": True,  # the draws of eager torch
    # the caller has looked at the arguments already, and a small step is as short as these checks
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}


class NotCompiled(Exception):  # noqa: N818 (nothing has gone wrong)
    """There is no compiler here, or it does not take the graph."""


def compile_graph(module: fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """Compile a graph of tensor operations for arguments of these forms.

    On a GPU it is captured as a CUDA graph. It takes seconds; Inductor keeps what it made on disk, so that
    the next process which compiles the same takes less.

    Args:
        module: Neither it nor the arguments are changed.
        arguments: Tensors of the shapes, strides, dtypes and devices it will be called with.

    Returns:
        The function that the graph is, under `torch.no_grad`.

    Raises:
        NotCompiled: Says why: no C++ compiler, as a rule.

    Example:
        >>> def twice(x):
        ...     return (2 * x,)
        >>> compiled = compile_graph(fx.symbolic_trace(twice), [torch.ones(3)])
        >>> compiled(torch.tensor([1.0, 2.0, 3.0]))[0]
        tensor([2., 4., 6.])
    """
    options = {**_OPTIONS, "triton.cudagraphs": any(a.device.type == "cuda" for a in arguments)}
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of a machine without a GPU
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one part of torch about another
            return torch._inductor.compile(module, list(arguments), options=options)
    except Exception as error:  # whatever a compiler may raise
        reason = str(error).strip().splitlines() or [""]
        raise NotCompiled(f"{type(error).__name__}: {reason[0]}") from error
    finally:
        logger.setLevel(level)
