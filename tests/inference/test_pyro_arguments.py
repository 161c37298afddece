"""What `pyro.infer.SVI` takes, `pv.SVI` takes with the same numbers, or names what to give instead."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    EnergyDistance,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from torch import nn

import pyro_vae as pv

N, STEPS = 7, 4
pytestmark = pytest.mark.usefixtures("in_double")


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    with pyro.get_param_store().scope():
        yield
    torch.set_default_dtype(torch.float32)


def model(x):
    shift = pyro.param("shift", torch.tensor(0.3))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("n", N):
        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


def guide(x, observations=None):
    loc, log_scale = pyro.param("loc", torch.tensor(0.1)), pyro.param("log_scale", torch.tensor(-0.2))
    pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def simple_elbo(model, guide, *args):
    """As in Pyro's tutorial on custom objectives."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return -(model_trace.log_prob_sum() - guide_trace.log_prob_sum())


def regularised(model, guide, *args):
    penalty = pyro.param("loc").square() + pyro.param("log_scale").square()
    return Trace_ELBO(num_particles=3).differentiable_loss(model, guide, *args) + 0.7 * penalty


def with_own_backward(model, guide, *args):
    loss = simple_elbo(model, guide, *args)
    loss.backward()
    return loss.item()


LOSSES = {
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(num_particles=3),
    "ReweightedWakeSleep, sleep": lambda: ReweightedWakeSleep(num_particles=3, insomnia=0.4),
    "TraceTailAdaptive_ELBO": lambda: TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True),
    "a function": lambda: simple_elbo,
    "a function with parameters of the store": lambda: regularised,
    "a function that calls backward": lambda: with_own_backward,
    "EnergyDistance": lambda: EnergyDistance(num_particles=3),
    "differentiable_loss": lambda: TraceMeanField_ELBO(num_particles=2).differentiable_loss,
    "loss_and_grads": lambda: TraceGraph_ELBO().loss_and_grads,
}


def run(train, pair=(model, guide), *, data=None):
    """Return the losses of some steps, and the values of all parameters after them."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    data = (torch.randn(N),) if data is None else data
    with poutine.trace(param_only=True) as tracer:
        poutine.replay(pair[0], trace=poutine.trace(pair[1]).get_trace(*data))(*data)
    svi = train(*pair, [site["value"].unconstrained() for site in tracer.trace.nodes.values()])
    torch.manual_seed(1)
    losses = [svi.step(*data) for _ in range(STEPS)]
    values = [value.detach().clone() for value in pyro.get_param_store().values()]
    return torch.tensor(losses, dtype=torch.float64), values


def upstream(loss):
    methods = {"loss_and_grads": loss} if getattr(loss, "__name__", "") == "loss_and_grads" else {}
    return lambda model, guide, _: SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss, **methods)


def ours(loss, engine="eager"):
    def train(model, guide, parameters):
        parameters = parameters or [nn.Parameter(torch.tensor(5.0))]
        return pv.SVI(model, guide, torch.optim.Adam(parameters, 0.01), loss, engine=engine)

    return train


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("name", LOSSES)
def test_pyros_losses_take_the_steps_of_pyro(name, engine):
    expected, moved = run(upstream(LOSSES[name]()))
    found, values = run(ours(LOSSES[name](), engine))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(values, moved, rtol=1e-10, atol=1e-12)
    assert any(value != initial for value, initial in zip(values, (0.1, -0.2, 0.3), strict=True))


def test_a_loss_of_several_numbers_is_a_tuple():
    losses, _ = run(ours(ReweightedWakeSleep(num_particles=3)))
    assert losses.shape == (STEPS, 2)
    svi = pv.SVI(
        model, guide, torch.optim.SGD([nn.Parameter(torch.zeros(()))]), ReweightedWakeSleep(num_particles=3)
    )
    assert len(svi.evaluate_loss(torch.zeros(N))) == 2


def test_the_graph_of_a_function_is_used_and_follows_what_it_reads():
    weight = [1.0]

    def annealed(model, guide, *args):
        return weight[0] * simple_elbo(model, guide, *args)

    losses = {}
    for engine in ("eager", "traced"):
        weight[0] = 1.0
        pyro.clear_param_store()
        guide(torch.zeros(N)), model(torch.zeros(N))
        parameters = [p for _, p in pyro.get_param_store().named_parameters()]
        svi = pv.SVI(model, guide, torch.optim.SGD(parameters, 0.0), annealed, engine=engine)
        torch.manual_seed(1)
        losses[engine] = []
        for step in range(9):
            weight[0] = 1.0 if step < 6 else 0.1
            losses[engine].append(svi.step(torch.zeros(N)))
    assert losses["traced"] == pytest.approx(losses["eager"], rel=1e-10)
    assert not svi._replay.disabled
    assert svi._replay.num_recordings == 2


# Nothing to learn -------------------------------------------------------------------------------------------


def fixed_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("n", N):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def fixed_guide(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


@config_enumerate
def counting_model(x):
    with pyro.plate("n", N):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(kind.to(x.dtype), 1.0), obs=x)


FIXED = {
    "Trace_ELBO": (fixed_model, fixed_guide, Trace_ELBO),
    "TraceMeanField_ELBO": (fixed_model, fixed_guide, TraceMeanField_ELBO),
    "TraceGraph_ELBO": (fixed_model, fixed_guide, TraceGraph_ELBO),
    "TraceEnum_ELBO": (
        fixed_model,
        fixed_guide,
        lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    ),
    "TraceTMC_ELBO": (
        fixed_model,
        fixed_guide,
        lambda: TraceTMC_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    ),
    "TraceEnum_ELBO, empty guide": (
        counting_model,
        lambda x: None,
        lambda: TraceEnum_ELBO(max_plate_nesting=1),
    ),
    "a function": (fixed_model, fixed_guide, lambda: simple_elbo),
    "Trace_ELBO, empty pair": (lambda x: None, lambda x: None, Trace_ELBO),
}


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("name", FIXED)
def test_a_pair_without_parameters_has_a_loss_and_moves_nothing(name, engine, caplog):
    *pair, loss = FIXED[name]
    dummy = nn.Parameter(torch.tensor(5.0))
    expected, _ = run(upstream(loss()), pair)
    with caplog.at_level(logging.WARNING, "pyro_vae"):
        found, _ = run(lambda m, g, _: ours(loss(), engine)(m, g, [dummy]), pair)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert dummy == 5.0
    assert sum("moves nothing" in message for message in caplog.messages) == 1


# Errors -----------------------------------------------------------------------------------------------------


def adam():
    return torch.optim.Adam([nn.Parameter(torch.zeros(()))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": None, "loss": Trace_ELBO()}, "no argument 'optim' of pyro.infer.SVI: call it optimizer"),
        (
            {"optimizer": None, "loss": None, "loss_and_grads": None},
            "'loss_and_grads' .*: pass the estimator",
        ),
        ({"optimizer": None, "loss": None, "num_steps": 3}, "'num_steps' .*: call step in a loop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keywords_of_pyro_are_explained(options, message):
    with pytest.raises(TypeError, match=message):
        pv.SVI(model, guide, **options)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Trace_ELBO().loss, "loss is the method loss of Trace_ELBO, .*: pass the Trace_ELBO itself"),
        (Trace_ELBO, "got Trace_ELBO itself: call it"),
        (Trace_ELBO()(nn.Linear(1, 1), nn.Linear(1, 1)), "called with a pair: pass the ELBO itself"),
        (3, "or a function .*; got int"),
    ],
    ids=["method", "class", "called", "number"],
)
def test_other_losses_raise(loss, message):
    with pytest.raises(TypeError, match=message):
        pv.SVI(model, guide, adam(), loss)


def test_a_function_that_returns_no_loss_raises():
    x = torch.zeros(N)
    for function, kind, message in [
        (lambda m, g, x: None, TypeError, "returned nothing: return the loss"),
        (lambda m, g, x: torch.zeros(3), ValueError, r"returned a tensor of shape \(3,\): return one number"),
        (lambda m, g, x: torch.tensor(math.nan), pv.NonFiniteError, "the loss is nan"),
    ]:
        with pytest.raises(kind, match=message):
            pv.SVI(fixed_model, fixed_guide, adam(), function).step(x)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_parameter_that_a_function_uses_must_be_held(engine):
    """It is in the store before the first step, so that only the run of the function can show it."""
    x = torch.zeros(N)
    guide(x), model(x)
    held = [dict(pyro.get_param_store().named_parameters())[name] for name in ("loc", "log_scale")]
    svi = pv.SVI(model, guide, torch.optim.SGD(held, 0.01), simple_elbo, engine=engine)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"does not hold 'shift' \(of pyro.param"):
            svi.step(x)
    assert [value.item() for value in pyro.get_param_store().values()] == [0.1, pytest.approx(-0.2), 0.3]


def test_a_function_may_leave_a_module_untrained_and_give_other_arguments():
    decoder = nn.Linear(1, N)

    def decoding(x, scale):
        pyro.module("decoder", decoder)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", N):
            pyro.sample("x", dist.Normal(decoder(z[None]), scale), obs=x)

    def loss(model, guide, x):
        return Trace_ELBO().differentiable_loss(lambda *_: decoding(x, 2.0), lambda *_: guide(x), x)

    x = torch.zeros(N)
    guide(x)
    held = [p for _, p in pyro.get_param_store().named_parameters()]
    decoding(x, 2.0)
    svi = pv.SVI(decoding, guide, torch.optim.SGD(held, 0.01), loss, engine="eager")
    assert math.isfinite(svi.step(x))
    with torch.no_grad():
        held[0].fill_(math.nan)
    with (
        pyro.validation_enabled(False),
        pytest.warns(UserWarning, match="NaN"),
        pytest.raises(pv.NonFiniteError),
    ):
        svi.step(x)
