"""Compile a recorded graph by Inductor, torch's compiler: C++ on a CPU, Triton on a GPU.

Before that, matrix products are given to the fastest library for their shapes. For float32 on a CPU
`torch.mm` calls MKL. oneDNN, which torch carries too, is up to twice as fast for some shapes on some
machines, and slower for others, so the two are timed once for each shape.
"""

import logging
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["NotCompiled", "choose_products", "compile_graph"]

aten = torch.ops.aten
_SMALL = 1_000_000  # multiplications; a smaller product takes no longer than a few calls of Python
_REPEATS = 9
_WORTHWHILE = 0.95  # of MKL's time, so that noise changes little

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


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _form_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


# x Wᵀ + b. By torch's own name for it, the compiler would first copy whatever is transposed
_library = torch.library.Library("pyro_vae", "DEF")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("onednn_linear", _onednn_linear, "CPU")
torch.library.register_fake("pyro_vae::onednn_linear", _form_of_linear, lib=_library)


def choose_products(module: fx.GraphModule, fastest: MutableMapping[str, str]) -> None:
    """Let each matrix product of a graph be taken by the library that is the fastest for its shapes.

    Args:
        module: A graph of operations on CPU tensors whose nodes hold tensors of their form in `meta["form"]`;
            changed in place.
        fastest: From shapes to "mkl" or "onednn". What is missing is measured, and added.

    Example:
        >>> graph = fx.Graph()
        >>> a, b = graph.placeholder("a"), graph.placeholder("b")
        >>> a.meta["form"] = torch.empty(256, 784, device="meta")
        >>> b.meta["form"] = torch.empty(784, 400, device="meta")
        >>> _ = graph.output(graph.call_function(aten.mm.default, (a, b)))
        >>> module, fastest = fx.GraphModule({}, graph), {}
        >>> choose_products(module, fastest)
        >>> fastest  # doctest: +SKIP
        {'mm (256, 784)/(784, 1) (784, 400)/(400, 1), 2 threads': 'onednn'}
        >>> x, y = torch.randn(256, 784), torch.randn(784, 400)
        >>> torch.testing.assert_close(module(x, y), x @ y, rtol=1e-4, atol=1e-4)
    """
    if not torch.backends.mkldnn.is_available():
        return
    for node in list(module.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        bias, a, b = operands
        forms = [part.meta["form"] for part in (a, b)]
        shapes = " ".join(f"{tuple(form.shape)}/{form.stride()}" for form in forms)
        name = "mm" if bias is None else "addmm"
        key = f"{name} {shapes}, {torch.get_num_threads()} threads"
        if key not in fastest:
            fastest[key] = _measure(*forms, with_bias=bias is not None)
        if fastest[key] == "onednn":
            with module.graph.inserting_before(node):
                transposed = module.graph.call_function(aten.t.default, (b,))
            node.target, node.args = torch.ops.pyro_vae.onednn_linear.default, (a, transposed, bias)
    module.recompile()


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node] | None:
    """(bias or None, a, b) of a node that is a large float32 product a b, or a b plus a bias for each row."""
    arguments: Any = node.args
    if node.target is aten.mm.default:
        bias, (a, b) = None, arguments
    elif node.target is aten.addmm.default and not node.kwargs and arguments[0].meta["form"].dim() == 1:
        bias, a, b = arguments
    else:
        return None
    forms = a.meta["form"], b.meta["form"]
    size = forms[0].shape[0] * forms[0].shape[1] * forms[1].shape[1]
    return (bias, a, b) if size >= _SMALL and all(f.dtype == torch.float32 for f in forms) else None


def _measure(a: Tensor, b: Tensor, *, with_bias: bool) -> str:
    """Time both libraries on tensors of these forms, in turn."""
    a, b = (torch.empty_strided(form.shape, form.stride()).fill_(0.5) for form in (a, b))  # real ones
    bias = torch.zeros(b.shape[1]) if with_bias else None
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
    return "onednn" if seconds["onednn"] < _WORTHWHILE * seconds["mkl"] else "mkl"
