"""The kernel of matrix products: agrees with torch's in float64, for all shapes and strides."""

import ctypes
import itertools
import math
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import pyro_vae as pv
from pyro_vae.engine import product_kernel, products
from pyro_vae.engine.compiler import compile_graph
from pyro_vae.engine.products import ANY_SHAPE, choose_matmul_libraries, with_kernel
from pyro_vae.engine.recorder import record

aten = torch.ops.aten
needs_kernel = pytest.mark.usefixtures("kernel")


@pytest.fixture
def kernel() -> None:
    """Skip a test where the kernel does not run; not asked before, which would import torch's compiler."""
    if not product_kernel.is_available():
        pytest.skip("the CPU has no AVX-512, or there is no C++ compiler")


# rows, terms, columns: around tiles of 5 x 64, sums of 4 x 4, blocks of 128 terms, and 16 terms for each row
SHAPES = [
    *itertools.product((1, 4, 5, 7), (1, 16, 33, 130), (1, 3, 16, 65)),
    (20, 784, 200),
    (200, 20, 784),
    (64, 257, 129),
    (3, 49, 81),
    (33, 528, 12),
    (33, 529, 12),
    (0, 4, 3),
    (6, 0, 7),
    (2, 5, 0),
]


def matrix(rows: int, columns: int, layout: str, seed: int = 0) -> Tensor:
    """Return normal values with contiguous rows or columns, some of a larger matrix, some all the same."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).t()
    if layout == "columns of more":
        return torch.randn(columns, rows + 3, generator=generator)[:, 2 : rows + 2].t()
    if layout == "rows of more":
        return torch.randn(rows, columns + 5, generator=generator)[:, 1 : columns + 1]
    if layout == "one row":
        return torch.randn(1, columns, generator=generator).expand(rows, columns)
    return torch.randn(rows, columns, generator=generator)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the product by the operator, as `with_kernel` calls it."""
    graph = fx.Graph()
    operands = [a, b] if bias is None else [bias, a, b]
    nodes = [graph.placeholder(f"input_{index}") for index in range(len(operands))]
    for node, operand in zip(nodes, operands, strict=True):
        node.meta["output"] = torch.empty_strided(operand.shape, operand.stride(), device="meta")
    graph.output(graph.call_function(aten.mm.default if bias is None else aten.addmm.default, tuple(nodes)))
    module = with_kernel(fx.GraphModule({}, graph))
    assert "pyro_vae.product" in module.code
    result: Tensor = module(*operands)
    return result


@needs_kernel
@pytest.mark.parametrize("b_layout", ["rows", "columns", "rows of more", "columns of more"])
@pytest.mark.parametrize("a_layout", ["rows", "columns", "rows of more", "one row"])
def test_agrees_with_float64(a_layout: str, b_layout: str) -> None:
    for rows, terms, columns in SHAPES:
        a, b = matrix(rows, terms, a_layout), matrix(terms, columns, b_layout, seed=1)
        bias = torch.randn(columns, generator=torch.Generator().manual_seed(2))
        for added in (None, bias):
            found = product(a, b, added)
            exact = a.double() @ b.double() + (0 if added is None else added.double())
            # |error| of a sum of n terms: at most n eps times the sum of their sizes
            allowed = (terms + 1) * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double())
            allowed += 1e-7 * bias.abs()
            assert found.shape == (rows, columns)
            assert ((found - exact).abs() <= allowed + 1e-12).all(), (rows, terms, columns, added is None)


@needs_kernel
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_bits_do_not_depend_on_threads(layout: str) -> None:
    a, b = matrix(37, 300, "rows"), matrix(300, 210, layout, seed=1)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product(a, b))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernel
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_reach_their_row_alone(value: float, layout: str) -> None:
    for rows in (3, 23):
        a, b = matrix(rows, 41, "rows"), matrix(41, 70, layout, seed=1)
        a[1, 7] = value
        finite = product(a, b).isfinite()
        assert not finite[1].any()
        assert finite[[0, *range(2, rows)]].all()


@needs_kernel
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("rows", [3, 40])
def test_reads_nothing_behind_the_last_value(rows: int, layout: str) -> None:
    """By memory whose next page may not be read."""
    terms, columns = 37, 21
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + page), page, 0) == 0
    end = torch.frombuffer(memory, dtype=torch.float32, count=page // 4)
    flat = end[-terms * columns :]
    b = flat.view(terms, columns) if layout == "rows" else flat.view(columns, terms).t()
    b.copy_(matrix(terms, columns, "rows", seed=1))
    a = matrix(rows, terms, "rows")
    torch.testing.assert_close(product(a, b), a @ b.contiguous(), rtol=1e-4, atol=1e-4)


@needs_kernel
def test_inductor_calls_it_for_parts_and_transposes_of_values_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # no graph of an earlier lowering
    generator = torch.Generator().manual_seed(3)
    x, w, v = (torch.randn(shape, generator=generator) for shape in ((11, 37), (37, 24), (9, 70)))
    w.requires_grad_(), v.requires_grad_()

    def loss_and_gradients(x: Tensor) -> Any:
        hidden = torch.addmm(v[0, ::3], x, w).tanh()  # a bias with gaps
        left, right = hidden[:, 2:11], hidden[:, 11:]
        loss = (left @ v).square().mean() + (right.t() @ left).sin().sum() + (left[:1].expand(5, 9) @ v).sum()
        loss = loss + torch.addmm(right[:9, :9], v[:, :7], v[:, 7:14].t()).sin().mean()  # adds a matrix
        return loss, torch.autograd.grad(loss, [w, v])

    graph = record(loss_and_gradients, [x])
    module = with_kernel(graph.module)
    assert str(graph.module.code).count("aten.mm") == 12
    assert str(graph.module.code).count("aten.addmm") == 2
    # but two whose factor is a sum's gradient, an expanded number, and one that adds a matrix
    assert str(module.code).count("pyro_vae.product") == 12 + 2 - 3
    arguments = [x, *graph.captured]
    with torch.no_grad():
        loss, invalid, *gradients = compile_graph(graph.module, arguments)(*arguments)
    assert invalid == 0
    expected, exact = loss_and_gradients(x)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for found, gradient in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_a_compiled_step_multiplies_by_the_kernel(monkeypatch: Any) -> None:
    from torch._inductor.select_algorithm import extern_kernels

    called = []
    function = product_kernel._kernel()
    monkeypatch.setattr(
        extern_kernels,
        f"pyro_vae_{product_kernel._NAME}",
        lambda *args, out: (called.append(args[-7:-4]), function(*args, out=out)),
    )
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Bernoulli(3, (29,), hidden_features=(17,)),
        guide=pv.guides.DiagonalNormal((29,), 3, hidden_features=(17,)),
    )
    svi = pv.SVI(vae, torch.optim.SGD(vae.parameters(), 1e-3), engine="compiled")
    x = (torch.rand(11, 29) < 0.5).float()
    for _ in range(3):
        svi.step(x)
    forward = {(11, 29, 17), (11, 17, 6), (11, 3, 17), (11, 17, 29)}
    backward = {(11, 29, 17), (29, 11, 17), (11, 17, 3), (17, 11, 3), (11, 6, 17), (6, 11, 17), (17, 11, 29)}
    assert {*called} == forward | backward


@needs_kernel
def test_takes_over_from_another_library() -> None:
    graph = fx.Graph()
    bias, a, b = (graph.placeholder(name) for name in ("bias", "a", "b"))
    for node, shape in ((bias, (70,)), (a, (300, 200)), (b, (200, 70))):
        node.meta["output"] = torch.empty(shape, device="meta")
    graph.output(graph.call_function(aten.addmm.default, (bias, a, b)))
    chosen = choose_matmul_libraries(fx.GraphModule({}, graph), {ANY_SHAPE: "onednn"})
    assert "onednn" in chosen.code
    module = with_kernel(chosen)
    assert "onednn" not in module.code
    x, y, z = matrix(300, 200, "rows"), matrix(200, 70, "rows", seed=1), matrix(70, 1, "rows", seed=2)[:, 0]
    torch.testing.assert_close(module(z, x, y), torch.addmm(z, x, y), rtol=1e-4, atol=1e-4)


@needs_kernel
def test_a_scaled_product_is_torchs() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("bias", "a", "b")]
    for node, shape in zip(nodes, ((5,), (4, 3), (3, 5)), strict=True):
        node.meta["output"] = torch.empty(shape, device="meta")
    graph.output(graph.call_function(aten.addmm.default, tuple(nodes), {"alpha": 0.5}))
    module = with_kernel(fx.GraphModule({}, graph))
    x, y, z = matrix(4, 3, "rows"), matrix(3, 5, "rows", seed=1), torch.ones(5)
    torch.testing.assert_close(module(z, x, y), 1 + 0.5 * x @ y)


def test_without_the_kernel_products_are_torchs(monkeypatch: Any) -> None:
    monkeypatch.setattr(product_kernel, "is_available", lambda: False)
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    for node, shape in ((a, (4, 3)), (b, (3, 5))):
        node.meta["output"] = torch.empty(shape, device="meta")
    graph.output((graph.call_function(aten.mm.default, (a, b)),))
    module = fx.GraphModule({}, graph)
    assert with_kernel(module) is module


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "strides", "largest"),
    [(torch.float64, (3, 1), 100), (torch.float32, (6, 2), 100), (torch.float32, (3, 1), 11)],
)
def test_other_products_are_torchs(dtype: Any, strides: Any, largest: int, monkeypatch: Any) -> None:
    """Of another dtype, without contiguous rows or columns, or too large for a copy to be kept."""
    monkeypatch.setattr(products, "_LARGEST", largest)
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    a.meta["output"] = torch.empty_strided((4, 3), strides, dtype=dtype, device="meta")
    b.meta["output"] = torch.empty(3, 2, dtype=dtype, device="meta")
    graph.output((graph.call_function(aten.mm.default, (a, b)),))
    module = with_kernel(fx.GraphModule({}, graph))
    assert "pyro_vae" not in module.code
    x = torch.empty_strided((4, 3), strides, dtype=dtype).normal_()
    y = torch.randn(3, 2, dtype=dtype)
    (found,) = compile_graph(module, [x, y])(x, y)
    torch.testing.assert_close(found, x @ y)
