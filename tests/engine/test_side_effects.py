"""What a model changes while it runs is changed once per step; what a library caches does not matter."""

import collections
import logging
import os
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch import nn

import pyro_vae as pv

# ruff: noqa: PLW0108 (a lambda looks its function up at each call)

N = 8


@pytest.fixture(autouse=True)
def store():
    with pyro.get_param_store().scope():
        yield


class Encoder(nn.Module):
    """An encoder with a running mean that is replaced, as codebooks of VQ-VAEs often are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.linear(x - self.mean)


class Counting(Encoder):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) / self.calls


class Storing(Encoder):
    def forward(self, x):
        self.last = self.linear(x)
        return self.last


class Listing(Encoder):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return self.linear(x) / len(self.seen)


def train(engine, make=Encoder, steps=4, by_method=False):
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = make()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = net.forward(x) if by_method else net(x)
            pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    svi = pv.SVI(model, guide, torch.optim.Adam(net.parameters(), 0.01), Trace_ELBO(), engine=engine)
    return [svi.step(x) for _ in range(steps)], net, svi


def test_a_buffer_that_is_replaced_is_updated_once_per_step(caplog):
    """The numbers as reported for the eager step."""
    for engine in ("eager", "traced"):
        losses, net, svi = train(engine)
        assert losses == pytest.approx([61.4828, 52.9102, 46.9404, 47.5585], abs=1e-4)
        assert net.mean.tolist() == pytest.approx([-0.0166, 0.0019, 0.0255], abs=1e-4)
    assert svi._replay.num_recordings == 2
    assert caplog.messages == [
        "SVI steps are eager from now on, without a graph: the model changes attribute 'mean' of Encoder in "
        "each run, which a graph does not. Change a tensor in place instead, or return the value"
    ]


@pytest.mark.parametrize("make", [Encoder, Counting, Storing, Listing])
@pytest.mark.parametrize("by_method", [False, True])
def test_modules_that_change_their_attributes_need_the_eager_step(make, by_method, caplog):
    runs = {}
    for engine in ("eager", "traced"):
        losses, net, svi = train(engine, make, by_method=by_method)
        runs[engine] = losses, {**vars(net), **net._buffers, **dict(net.named_parameters())}
    assert svi._replay.disabled
    assert len(caplog.messages) == 1
    assert make.__name__ in caplog.text
    assert runs["traced"][0] == runs["eager"][0]
    for name in ("mean", "calls", "last", "seen", "linear.weight"):
        expected, found = (runs[engine][1].get(name) for engine in ("eager", "traced"))
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


class BuiltAtFirstUse(Encoder):
    def __init__(self):
        super().__init__()
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = x.std()
        return self.linear(x) * self.scale


def test_a_change_in_the_first_run_alone_delays_the_graph_by_a_step(caplog):
    expected, _, _ = train("eager", BuiltAtFirstUse)
    found, _, svi = train("traced", BuiltAtFirstUse)
    assert found == pytest.approx(expected, rel=1e-6)
    assert svi._replay.num_recordings == 2
    assert not svi._replay.disabled
    assert not caplog.records


class State:
    """Everything but modules that a model may change."""

    def __init__(self):
        self.number, self.list, self.set, self.dict = 0.0, [0.0], {0.0}, {"a": 0.0}
        self.deque, self.array = collections.deque([0.0], maxlen=3), np.zeros(2)
        self.random, self.generator = random.Random(1), np.random.default_rng(1)
        self.state, self.torch = np.random.RandomState(1), torch.Generator().manual_seed(1)


STATE = State()
Counter = type("Counter", (), {"value": 0.0})


def of_closure():
    value = 0.0

    def run():
        nonlocal value
        value += 0.5
        return value

    return run


def add(container, value):
    (container.add if isinstance(container, set) else container.append)(value)
    return len(container) / 10


def set_item(container, key):
    container[key] += 0.5
    return float(container[key])


def new_item():
    STATE.dict[f"new {len(STATE.dict)}"] = 1.0
    return len(STATE.dict) / 10


def environment():
    os.environ["PV_TEST"] = str(float(os.environ.get("PV_TEST", "0")) + 0.5)
    return float(os.environ["PV_TEST"])


def attribute():
    STATE.number += 0.5
    return STATE.number


def class_attribute():
    Counter.value += 0.5
    return Counter.value


EFFECTS = {
    "attribute": attribute,
    "class": class_attribute,
    "closure": None,
    "list": lambda: add(STATE.list, 1.0),
    "set": lambda: add(STATE.set, float(len(STATE.set))),
    "deque": lambda: set_item(STATE.deque, 0),
    "item": lambda: set_item(STATE.dict, "a"),
    "new item": new_item,
    "array": lambda: set_item(STATE.array, 1),
    "environment": environment,
    "random.Random": lambda: STATE.random.random(),
    "numpy.random.Generator": lambda: STATE.generator.normal(),
    "RandomState": lambda: STATE.state.normal(),
    "torch.Generator": lambda: torch.randn((), generator=STATE.torch),
    "random": lambda: random.random(),
    "numpy.random": lambda: np.random.random(),  # noqa: NPY002
}


@pytest.mark.parametrize("name", EFFECTS)
def test_whatever_else_a_model_changes_is_changed_once_per_step(name, caplog, monkeypatch):
    monkeypatch.delenv("PV_TEST", raising=False)
    runs = []
    for engine in ("eager", "traced"):
        STATE.__init__()
        Counter.value = 0.0
        os.environ.pop("PV_TEST", None)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        read, weight = EFFECTS[name] or of_closure(), nn.Parameter(torch.tensor(0.1))

        def model(x, read=read):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + read(), 1.0), obs=x)

        def guide(x, weight=weight):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(weight * x, 0.7))

        svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), Trace_ELBO(), engine=engine)
        svi._checked = (svi.model, svi.guide, svi.loss)  # the check runs the model too
        torch.manual_seed(2)
        runs.append([svi.step(torch.linspace(-1.0, 2.0, N)) for _ in range(5)])
    os.environ.pop("PV_TEST", None)
    assert runs[1] == runs[0]
    assert svi._replay.disabled
    assert len(caplog.messages) == 1


FLOWS = {
    "affine_autoregressive": lambda: transforms.affine_autoregressive(3),
    "planar": lambda: transforms.planar(3),
    "radial": lambda: transforms.radial(3),
    "affine_coupling": lambda: transforms.affine_coupling(3),
    "neural_autoregressive": lambda: transforms.neural_autoregressive(3),
    "sylvester": lambda: transforms.sylvester(3),
    "householder": lambda: transforms.householder(3),
}


class FlowGuide(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow, self.loc = flow, nn.Parameter(torch.zeros(3))

    def forward(self, x):
        base = dist.Normal(self.loc, 1.0).to_event(1)
        pyro.sample("b", dist.TransformedDistribution(base, [self.flow]))


class NormedGuide(nn.Module):
    """Old-style normalisation of weights, which stores the computed weight as an attribute."""

    def __init__(self, norm):
        super().__init__()
        self.linear = norm(nn.Linear(3, 3))

    def forward(self, x):
        pyro.sample("b", dist.Normal(self.linear(x).mean(0), 1.0).to_event(1))


def regression(x):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("N", len(x)):
        pyro.sample("x", dist.Normal(x @ b, 1.0), obs=x.sum(-1))


GUIDES = {
    **{name: lambda make=make: FlowGuide(make()) for name, make in FLOWS.items()},
    "AutoIAFNormal": lambda: AutoIAFNormal(regression),
    "weight_norm": lambda: NormedGuide(torch.nn.utils.weight_norm),
    "spectral_norm": lambda: NormedGuide(torch.nn.utils.spectral_norm),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", GUIDES)
def test_tensors_that_a_library_caches_are_recorded_once(name, caplog):
    losses = []
    for engine in ("eager", "traced"):
        torch.manual_seed(0)
        pyro.clear_param_store()
        x = torch.randn(10, 3)
        guide = GUIDES[name]()
        guide(x)
        optimizer = torch.optim.Adam(guide.parameters(), 0.01)
        svi = pv.SVI(regression, guide, optimizer, Trace_ELBO(max_plate_nesting=1), engine=engine)
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(20)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert svi._replay.num_recordings == 1
    assert not svi._replay.disabled
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
