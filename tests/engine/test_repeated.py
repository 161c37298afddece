"""A function that is called often: its graph gives the same numbers, and is left where it does not hold."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.engine import repeated
from pyro_vae.engine.compiler import NotCompiled
from pyro_vae.engine.repeated import Repeated

needs_compiler = pytest.mark.usefixtures("compiler")


@pytest.fixture(autouse=True)
def compiles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "_FEWEST", 2)
    monkeypatch.setattr(repeated, "_MARGIN", 0.0)


class Noisy:
    """A function that draws, and reads an attribute."""

    def __init__(self) -> None:
        self.slope = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return (self.slope * x + torch.randn(3, len(x), dtype=x.dtype)).exp()


@needs_compiler
@torch.no_grad()
def test_the_graph_draws_and_computes_the_same() -> None:
    function = Noisy()
    fast = Repeated(function, [function], calls=9)
    xs = [torch.randn(5, dtype=torch.float64) for _ in range(4)] + [torch.randn(2, dtype=torch.float64)]
    results = []
    for call in (fast, function):
        torch.manual_seed(3)
        results.append(([call(x) for x in xs], torch.get_rng_state()))
    (found, state), (expected, other) = results
    assert fast.run is not None
    assert fast.is_compared
    assert torch.equal(state, other)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=0)


@needs_compiler
@torch.no_grad()
def test_what_the_function_reads_is_followed() -> None:
    function = Noisy()
    fast = Repeated(function, [function], calls=9)
    x = torch.randn(5, dtype=torch.float64)
    fast(x)
    function.slope = -1.0
    torch.manual_seed(1)
    found = fast(x)
    torch.manual_seed(1)
    assert torch.equal(found, function(x))


@needs_compiler
@torch.no_grad()
def test_the_first_value_is_that_of_the_graph_as_the_others_are() -> None:
    """Else a process that shares the calls would return another value for its first."""
    function, x, values = Noisy(), torch.randn(5), []
    fast = Repeated(function, [function], calls=9)
    for _ in range(2):
        torch.manual_seed(3)
        values.append(fast(x))
    assert fast.is_compared
    assert torch.equal(*values)


@torch.no_grad()
def test_a_recording_that_would_hold_too_much_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    function, lengths = Noisy(), []
    fast = Repeated(function, [function], calls=9)
    record = Repeated._record
    monkeypatch.setattr(
        Repeated, "_record", lambda self, tensors: (lengths.append(len(tensors[0])), record(self, tensors))[1]
    )
    monkeypatch.setattr(repeated, "_MOST_BYTES", 50)
    assert fast(torch.randn(40)).shape == (3, 40)
    assert fast.is_ended
    assert lengths == [1]


@pytest.mark.parametrize("why", ["few calls", "no compiler", "disagrees", "is not recorded", "is refused"])
@torch.no_grad()
def test_the_function_is_called_where_no_graph_holds(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(module: Any, arguments: Any) -> Any:
        if why == "no compiler":
            raise NotCompiled("none")
        return lambda *inputs: [*module(*inputs)[:2], module(*inputs)[2] * 1.01]

    monkeypatch.setattr(repeated, "compile_graph", compiled)
    if why == "is refused":
        monkeypatch.setattr(repeated, "record_with_guards", lambda *arguments: 1 // 0)
    if why == "is not recorded":
        function: Any = lambda x: x * x.sum().item() + torch.randn(len(x)) * float(x.tolist()[0])  # noqa: E731
    else:
        function = Noisy()
    fast = Repeated(function, [function], calls=1 if why == "few calls" else 9)
    x, results = torch.randn(5), []
    for call in (fast, function):
        torch.manual_seed(3)
        results.append([call(x) for _ in range(3)])
    assert fast.is_ended
    assert all(map(torch.equal, *results))


@needs_compiler
@pytest.mark.parametrize("named", [False, True])
def test_evaluate_gives_the_same_numbers(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (3,), variance=0.2),
        guide=pv.guides.DiagonalNormal((3,), 2),
    ).double()
    pair = pv.Pair(vae.model, vae.guide) if named else vae
    x = torch.randn(70, 3, dtype=torch.float64)
    data: Any = {"x": x} if named else x
    compilations = []
    original = repeated.compile_graph
    monkeypatch.setattr(repeated, "compile_graph", lambda *a: (compilations.append(1), original(*a))[1])
    found = pv.evaluate(pair, data, num_particles=1250, progress=False)
    assert compilations == [1]
    monkeypatch.setattr(repeated, "_FEWEST", 10**9)
    expected = pv.evaluate(pair, data, num_particles=1250, progress=False)
    for name in ("log_evidence", "elbo_sampled_kl", "pareto_k", "effective_sample_size"):
        pair_of = [torch.as_tensor(getattr(each.per_datum, name)) for each in (found, expected)]
        torch.testing.assert_close(*pair_of, rtol=1e-10, atol=1e-10)
