"""Compile a recorded graph by Inductor (C++ on a CPU, Triton on a GPU); choose its matrix-product library.

`torch.mm` of float32 on a CPU calls MKL. oneDNN, also part of torch, is up to twice as fast for some shapes
on some machines, and slower for others. So both are timed once per shape.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "ANY_SHAPE",
    "NotCompiled",
    "calls_to_pay",
    "choose_matmul_libraries",
    "compile_graph",
    "outputs_of",
    "usually_fastest",
]

aten = torch.ops.aten
_MIN_SIZE = 4_000_000  # multiplications; below, what oneDNN gains is lost in the Python that calls it
_REPEATS = 9
ANY_SHAPE = "any shape"
_MAX_TIME_RATIO = 0.95  # of oneDNN to MKL, so that timing noise seldom decides

# Rough costs in seconds, the same on every machine, so that a resumed run starts to compile at the same step
_COMPILE_TIME = 20.0
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

    On a GPU, the compiled code is captured as a CUDA graph.

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
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # hides a warning about machines without a GPU
    try:
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
    return _COMPILE_TIME / (_SAVED_PER_OPERATION * len(outputs) + _SAVED_PER_VALUE * values)


def outputs_of(module: fx.GraphModule) -> list[Tensor]:
    """Return the outputs of a graph's operations, on the meta device; see `choose_matmul_libraries`."""
    return [node.meta["output"] for node in module.graph.nodes if "output" in node.meta]


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


# x Wᵀ + b. An operator of its own, since Inductor first copies transposed operands of torch's operator
_library = torch.library.Library("pyro_vae", "DEF")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("onednn_linear", _onednn_linear, "CPU")
torch.library.register_fake("pyro_vae::onednn_linear", _fake_linear, lib=_library)


def choose_matmul_libraries(module: fx.GraphModule, fastest: MutableMapping[str, str]) -> fx.GraphModule:
    """Return a graph in which each large float32 matrix product calls the fastest library for its shapes.

    Args:
        module: A graph of operations on CPU tensors; not changed. For each node, `meta["output"]` is a
            meta tensor with the shape, strides and dtype of its output.
        fastest: From shapes to "mkl" or "onednn". Missing shapes are added: that for `ANY_SHAPE`, or timed.

    Returns:
        A copy; the graph itself if it has no large product.

    Example:
        >>> graph = fx.Graph()
        >>> a, b = graph.placeholder("a"), graph.placeholder("b")
        >>> a.meta["output"] = torch.empty(256, 784, device="meta")
        >>> b.meta["output"] = torch.empty(784, 400, device="meta")
        >>> _ = graph.output(graph.call_function(aten.mm.default, (a, b)))
        >>> module, fastest = fx.GraphModule({}, graph), {}
        >>> chosen = choose_matmul_libraries(module, fastest)
        >>> fastest  # doctest: +SKIP
        {'mm (256, 784)/(784, 1) (784, 400)/(400, 1), 2 threads': 'onednn'}
        >>> x, y = torch.randn(256, 784), torch.randn(784, 400)
        >>> torch.testing.assert_close(chosen(x, y), x @ y, rtol=1e-4, atol=1e-4)
    """
    if not torch.backends.mkldnn.is_available() or not any(map(_operands, module.graph.nodes)):
        return module
    module = copy.deepcopy(module)
    for node in list(module.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        bias, a, b = operands
        outputs = [operand.meta["output"] for operand in (a, b)]
        shapes = " ".join(f"{tuple(output.shape)}/{output.stride()}" for output in outputs)
        name = "mm" if bias is None else "addmm"
        key = f"{name} {shapes}, {torch.get_num_threads()} threads"
        if key not in fastest:
            fastest[key] = fastest.get(ANY_SHAPE) or _measure(*outputs, with_bias=bias is not None)
        if fastest[key] == "onednn":
            with module.graph.inserting_before(node):
                transposed = module.graph.call_function(aten.t.default, (b,))
            node.target, node.args = torch.ops.pyro_vae.onednn_linear.default, (a, transposed, bias)
    module.recompile()
    return module


def usually_fastest() -> str:
    """Return the library that is faster for a product of middle size, "mkl" or "onednn"."""
    if not torch.backends.mkldnn.is_available():
        return "mkl"
    a, b = torch.empty(256, 768, device="meta"), torch.empty(384, 768, device="meta").t()
    return _measure(a, b, with_bias=True)


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node] | None:
    """Return (bias or None, a, b) if a node is a large float32 product a b, or a b + bias; else None."""
    arguments: Any = node.args
    if node.target is aten.mm.default:
        bias, (a, b) = None, arguments
    elif node.target is aten.addmm.default and not node.kwargs and arguments[0].meta["output"].dim() == 1:
        bias, a, b = arguments
    else:
        return None
    outputs = a.meta["output"], b.meta["output"]
    size = outputs[0].shape[0] * outputs[0].shape[1] * outputs[1].shape[1]
    is_large = size >= _MIN_SIZE and all(output.dtype == torch.float32 for output in outputs)
    return (bias, a, b) if is_large else None


def _measure(a: Tensor, b: Tensor, *, with_bias: bool) -> str:
    """Return the faster library for operands of these shapes and strides, by alternating timed calls."""
    as_float: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    a, b = (torch.empty_strided(like.shape, like.stride(), **as_float).fill_(0.5) for like in (a, b))
    bias = torch.zeros(b.shape[1], **as_float) if with_bias else None
    calls: dict[str, Callable[[], Tensor]] = {
        "mkl": lambda: aten.mm(a, b) if bias is None else aten.addmm(bias, a, b),
        "onednn": lambda: torch.ops.pyro_vae.onednn_linear.default(a, b.t(), bias),
    }
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(_REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return "onednn" if seconds["onednn"] < _MAX_TIME_RATIO * seconds["mkl"] else "mkl"
