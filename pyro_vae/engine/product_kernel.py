"""An operator for products of float32 matrices: a kernel of the package, for CPUs with AVX-512.

The source, `product_kernel.cpp`, is compiled as Inductor compiles its own, and a compiled graph calls it
without torch's dispatcher. Without a compiler, or without AVX-512, the products of torch stay.
"""

import functools
import importlib.machinery
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPERATOR", "is_available"]

logger = logging.getLogger("pyro_vae")

# tells graphs on disk apart: counted up with changes of `lower`, or of what the source's `call` takes
_NAME = "product_1"


def is_available() -> bool:
    """Return whether graphs that are compiled now can call the operator; compile its source if need be."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    from torch._inductor import config  # noqa: PLC0415 (imports torch's compiler)

    return not config.cpp_wrapper and _is_known_to_inductor()  # generated C++ cannot call it


@functools.cache
def _is_known_to_inductor() -> bool:
    """Compile the source and tell Inductor how to call it; return whether that worked."""
    try:
        _tell_inductor(_kernel())
    except Exception as error:  # as in `compile_graph`, no error type is documented
        reason = (str(error).splitlines() or [""])[0]
        logger.info("matrix products run by torch's libraries: %s: %s", type(error).__name__, reason)
        return False
    return True


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    """Return the compiled function, from Inductor's cache on disk if it is there."""
    from torch._inductor.codecache import CppCodeCache  # noqa: PLC0415

    path = CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text())._name
    loader = importlib.machinery.ExtensionFileLoader("product_kernel", path)
    spec = importlib.util.spec_from_file_location("product_kernel", path, loader=loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    function: Callable[..., Tensor] = module.product
    return function


def _product(a: Tensor, b: Tensor, bias: Tensor | None, *is_transposed: bool) -> Tensor:
    rows = [each if each.stride(1) == 1 else each.contiguous() for each in (a, b)]
    a, b = (each.t() if swap else each for each, swap in zip(rows, is_transposed, strict=True))
    operands = (a, b) if bias is None else (a, b, bias.contiguous())
    out = a.new_empty(len(a), b.shape[1])
    return _kernel()(*operands, *a.shape, b.shape[1], *a.stride(), *b.stride(), out=out)


def _fake_product(a: Tensor, b: Tensor, _: Tensor | None, *is_transposed: bool) -> Tensor:
    return a.new_empty(a.shape[is_transposed[0]], b.shape[not is_transposed[1]])


# a b + bias, where each factor may stand for its transpose
_library = torch.library.Library("pyro_vae", "FRAGMENT")
_library.define(
    f"{_NAME}(Tensor a, Tensor b, Tensor? bias, bool is_a_transposed, bool is_b_transposed) -> Tensor"
)
_library.impl(_NAME, _product, "CPU")
torch.library.register_fake(f"pyro_vae::{_NAME}", _fake_product, lib=_library)
OPERATOR = getattr(torch.ops.pyro_vae, _NAME).default


def _tell_inductor(kernel: Callable[..., Tensor]) -> None:
    """Let Inductor call the kernel for the operator, by strides of tensors that it knows."""
    from torch._inductor import ir  # noqa: PLC0415
    from torch._inductor.lowering import register_lowering  # noqa: PLC0415
    from torch._inductor.select_algorithm import extern_kernels  # noqa: PLC0415

    setattr(extern_kernels, f"pyro_vae_{_NAME}", kernel)

    def with_rows(tensor: Any) -> Any:
        found = ir.ExternKernel.require_stride_order(tensor, [1, 0])
        return found if found.get_stride()[1] == 1 else ir.ExternKernel.copy_input(found)

    def lower(a: Any, b: Any, bias: Any, *is_transposed: bool) -> Any:
        if a.get_device().type != "cpu":
            raise NotImplementedError("the kernel of matrix products is for CPUs")
        factors = [with_rows(a), with_rows(b)]
        sizes = [[*map(int, each.get_size())] for each in factors]
        strides = [[*map(int, each.get_stride())] for each in factors]
        for pair in (sizes, strides):
            pair[:] = [each[::-1] if swap else each for each, swap in zip(pair, is_transposed, strict=True)]
        (rows, terms), (_, columns) = sizes
        biases = [] if bias is None else [ir.ExternKernel.require_contiguous(bias)]
        return ir.TensorBox.create(
            ir.ExternKernelOut(
                ir.FixedLayout(a.get_device(), a.get_dtype(), [rows, columns]),
                [*factors, *map(ir.ExternKernel.realize_input, biases)],
                constant_args=[rows, terms, columns, *strides[0], *strides[1]],
                python_kernel_name=f"extern_kernels.pyro_vae_{_NAME}",
            )
        )

    register_lowering(OPERATOR, type_promotion_kind=None)(lower)
