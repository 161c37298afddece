"""Compiled graphs are found on disk by later calls with as many threads; products, given to a library."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

from pyro_vae.engine.compiler import compile_graph
from pyro_vae.engine.products import ANY_SHAPE, choose_matmul_libraries


def product(a: Tensor, b: Tensor) -> tuple[Tensor]:
    """No code in C++, so that no C++ compiler is needed."""
    return (torch.mm(a, b),)


def test_a_graph_on_disk_is_taken_for_as_many_threads_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the options of pyro_vae where torch does not tell them apart, as 2.8 does not, and 2.15 does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    arguments = torch.randn(3, 4), torch.randn(4, 5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 2, 1):
            torch.set_num_threads(threads)
            counters.clear()
            compiled = compile_graph(fx.symbolic_trace(product), arguments)
            torch.testing.assert_close(compiled(*arguments)[0], torch.mm(*arguments))
            found.append(counters["inductor"]["fxgraph_cache_hit"])
    finally:
        torch.set_num_threads(before)
    assert found == [0, 1, 0, 1, 1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
@pytest.mark.parametrize(("rows", "is_large"), [(300, True), (3, False)])
def test_the_graph_that_others_are_compared_with_keeps_its_products(*, rows: int, is_large: bool) -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    a.meta["output"] = torch.empty(rows, 200, device="meta")
    b.meta["output"] = torch.empty(200, 100, device="meta")
    graph.output(graph.call_function(torch.ops.aten.mm.default, (a, b)))
    module = fx.GraphModule({}, graph)
    chosen = choose_matmul_libraries(module, {ANY_SHAPE: "onednn"})
    assert "onednn" not in module.code
    assert ("onednn" in chosen.code) == is_large
    assert (chosen is module) != is_large
    x, y = torch.randn(rows, 200), torch.randn(200, 100)
    torch.testing.assert_close(chosen(x, y), x @ y, rtol=1e-4, atol=1e-4)
