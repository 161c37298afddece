"""Which code multiplies the float32 matrices of a recorded graph on a CPU.

`torch.mm` calls MKL. oneDNN, also part of torch, is up to twice as fast for large matrices on some machines,
and slower on others. So for graphs that are interpreted, both are timed once per shape. A compiled graph
calls a kernel of the package, where the CPU has AVX-512: of the products of small VAEs it takes half of MKL's
time on AMD's processors, of those of large ones 0.8 of oneDNN's. It is called without timing, so that the
bits of a result depend on no clock.
"""

import copy
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.engine import product_kernel

__all__ = ["ANY_SHAPE", "choose_matmul_libraries", "usually_fastest", "with_kernel"]

aten = torch.ops.aten
_MIN_SIZE = 4_000_000  # multiplications; below, what oneDNN gains is lost in the Python that calls it
_REPEATS = 9
ANY_SHAPE = "any shape"
_MAX_TIME_RATIO = 0.95  # of oneDNN to MKL, so that timing noise seldom decides
_LARGEST = 2**22  # values of a factor for the kernel, which may keep a copy of one in panels of 64 columns


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
    if not torch.backends.mkldnn.is_available() or not any(map(_is_large, module.graph.nodes)):
        return module
    module = copy.deepcopy(module)
    for node in list(module.graph.nodes):
        operands = _operands(node)
        if operands is None or not _is_large(node):
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


def with_kernel(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that calls the kernel for each float32 matrix product, to be compiled by Inductor.

    Args:
        module: As for `choose_matmul_libraries`, before or after it; not changed.

    Example:
        >>> graph = fx.Graph()
        >>> a, b = graph.placeholder("a"), graph.placeholder("b")
        >>> a.meta["output"] = torch.empty(20, 784, device="meta")
        >>> b.meta["output"] = torch.empty(200, 784, device="meta").t()
        >>> _ = graph.output(graph.call_function(aten.mm.default, (a, b)))
        >>> module = with_kernel(fx.GraphModule({}, graph))
        >>> x, y = torch.randn(20, 784), torch.randn(200, 784)
        >>> torch.testing.assert_close(module(x, y.t()), x @ y.t(), rtol=1e-4, atol=1e-4)
    """
    if not any(map(_operands, module.graph.nodes)) or not product_kernel.is_available():
        return module
    module = copy.deepcopy(module)
    for node in list(module.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        bias, *factors = operands
        outputs = [factor.meta["output"] for factor in factors]
        strides = [output.stride() for output in outputs]
        is_large = max(*map(torch.numel, outputs), 64 * len(outputs[1])) > _LARGEST
        if is_large or not all(1 in each for each in strides):
            continue
        is_transposed = [each[1] != 1 for each in strides]
        with module.graph.inserting_before(node):
            rows = [
                _transposed(factor) if swap else factor
                for factor, swap in zip(factors, is_transposed, strict=True)
            ]
        node.target, node.kwargs = product_kernel.OPERATOR, {}
        node.args = (*rows, bias, *is_transposed)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node] | None:
    """Return (bias or None, a, b) if a node is a float32 product a b, or a b + bias; else None."""
    arguments: Any = node.args
    if node.target is aten.mm.default:
        bias, (a, b) = None, arguments
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, a, b = arguments
    elif node.target is torch.ops.pyro_vae.onednn_linear.default:
        a, transposed, bias = arguments
        b = transposed.args[0]
    else:
        return None
    outputs = [each.meta.get("output") for each in (a, b)]
    if any(output is None or output.dtype != torch.float32 for output in outputs):
        return None
    is_vector = bias is None or bias.meta["output"].shape == outputs[1].shape[1:]
    return (bias, a, b) if is_vector else None


def _transposed(node: fx.Node) -> fx.Node:
    """Return a node of the transpose: what the node transposes, or a new one before the current place."""
    if node.target is aten.t.default:
        (transposed,) = node.all_input_nodes
        return transposed
    return node.graph.call_function(aten.t.default, (node,))


def _is_large(node: fx.Node) -> bool:
    """Return whether a node is a product of many multiplications."""
    if (operands := _operands(node)) is None:
        return False
    _, a, b = operands
    return bool(a.meta["output"].numel() * b.meta["output"].shape[1] >= _MIN_SIZE)


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
