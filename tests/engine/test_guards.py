"""What a model looks at beside tensors is seen to change, and what it does not look at may change."""

import functools
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.engine.guards import Watch

SCALE = 2.0
SETTINGS = {"slope": 1.0}
NETWORK = nn.Linear(2, 2)
OBJECT = SimpleNamespace(slope=1.0, inner=SimpleNamespace(offset=0.5), unread=0)


def helper(x):
    return SCALE * x


def by_global(x):
    return x * SCALE


def by_dictionary(x):
    return x * SETTINGS["slope"]


def by_helper(x):
    return helper(x)


def by_inner_function(x):
    def inner(y):
        return y * SCALE

    return inner(x)


def by_network(x):
    return NETWORK(x)


def by_object(x):
    return OBJECT.slope * x + OBJECT.inner.offset


def by_lambda(x):
    return functools.reduce(lambda y, _: OBJECT.slope * y, range(2), x)


def by_default(x, settings=OBJECT):
    return x * settings.slope


def by_argument(x):
    return slope_of(OBJECT) * x


def slope_of(anything):
    return anything.slope


def doubled(function):
    @functools.wraps(function)
    def wrapper(x):
        return SCALE * function(x)

    return wrapper


@doubled
def by_decorator(x):
    return x * OBJECT.slope


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings, self.activation = SimpleNamespace(slope=1.0, nested={"deep": {"er": 1.0}}), torch.tanh
        self.layer = nn.Linear(2, 2)

    @property
    def slope(self):
        return self.settings.slope * SCALE

    def forward(self, x):
        self.last = x
        return self.activation(self.layer(x)) * self.slope * self.settings.nested["deep"]["er"]


NET = Net()


def by_net(x):
    return NET(x)


class Owner:
    def __init__(self):
        self.slope, self.steps = 1.0, 0

    def model(self, x):
        return self.line(x)

    def line(self, x):
        return self.slope * x


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (by_global, "SCALE", 3.0),
        (by_helper, "SCALE", 3.0),
        (by_helper, "helper", abs),
        (by_inner_function, "SCALE", 3.0),
        (by_network, "NETWORK", nn.Linear(2, 2)),
        (functools.partial(by_global), "SCALE", 3.0),
    ],
    ids=["number", "number of a helper", "helper", "inner function", "network", "partial"],
)
def test_global_variables(monkeypatch, function, name, value):
    watch = Watch([function], [])
    assert watch.is_same()
    monkeypatch.setitem(globals(), name, value)
    assert not watch.is_same()
    monkeypatch.undo()
    assert watch.is_same()


@pytest.mark.parametrize(
    ("function", "space", "name"),
    [
        (by_dictionary, SETTINGS, "slope"),
        (by_dictionary, SETTINGS, "another"),
        (by_object, vars(OBJECT), "slope"),
        (by_object, vars(OBJECT), "inner"),
        (by_object, vars(OBJECT.inner), "offset"),
        (by_lambda, vars(OBJECT), "slope"),
        (by_default, vars(OBJECT), "slope"),
        (by_argument, vars(OBJECT), "slope"),
        (by_decorator, vars(OBJECT), "slope"),
        (by_decorator, globals(), "SCALE"),
        (functools.partial(slope_of, OBJECT), vars(OBJECT), "slope"),
        (pyro.poutine.scale(by_object, scale=2.0), vars(OBJECT), "slope"),
        (by_net, vars(NET), "activation"),
        (by_net, NET._modules, "layer"),
        (by_net, vars(NET), "forward"),
        (by_net, vars(NET.settings), "slope"),
        (by_net, NET.settings.nested["deep"], "er"),
        (by_net, globals(), "SCALE"),
        (by_net, NET.layer._forward_hooks, "a hook"),
    ],
)
def test_what_global_variables_hold(monkeypatch, function, space, name):
    watch = Watch([function], [])
    assert watch.is_same()
    monkeypatch.setitem(space, name, 7.0)
    assert not watch.is_same()


def test_what_is_only_written_may_change():
    """Such as activations kept for a plot, or what a loop of training notes down."""
    watch = Watch([by_net], [NET])
    NET.last, NET.epoch = torch.zeros(2), 3
    assert watch.is_same()


def test_equal_numbers_are_the_same(monkeypatch):
    watch = Watch([by_global], [])
    monkeypatch.setitem(globals(), "SCALE", float("2.0"))
    assert watch.is_same()
    monkeypatch.setitem(globals(), "SCALE", 2)  # another type, and other arithmetic
    assert not watch.is_same()


def test_attributes_that_methods_name():
    owner = Owner()
    watch = Watch([owner.model], [])
    owner.steps += 1
    assert watch.is_same()
    owner.slope = 2.0
    assert not watch.is_same()


def test_what_is_not_looked_at_may_change(monkeypatch):
    watch = Watch([by_global, by_object], [])
    monkeypatch.setitem(SETTINGS, "slope", 7.0)
    monkeypatch.setattr(OBJECT, "unread", 1)
    assert watch.is_same()


def test_variables_of_closures():
    slope = 1.0

    def model(x):
        return slope * x

    watch = Watch([model], [])
    assert watch.is_same()
    slope = 2.0
    assert not watch.is_same()


def test_a_global_variable_that_a_model_reads_takes_effect_at_the_next_step(monkeypatch, caplog):
    """As in a notebook, where a cell sets it and another goes on with training."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(SCALE * z, 1.0), obs=x)

    weight = nn.Parameter(torch.tensor(0.3))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.5))

    losses = {}
    for engine in ("eager", "traced"):
        monkeypatch.undo()
        with torch.no_grad():
            weight.fill_(0.3)
        estimator = pyro.infer.Trace_ELBO(max_plate_nesting=1)
        svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.01), estimator, engine=engine)
        torch.manual_seed(1)
        losses[engine] = []
        for step in range(12):
            if step in (5, 6, 11):  # no power of two
                monkeypatch.setitem(globals(), "SCALE", 1.0 + step)
            losses[engine].append(svi.step(torch.linspace(-1.0, 1.0, 7)))
    assert svi._replay.num_recordings == 4
    assert losses["traced"] == pytest.approx(losses["eager"], rel=1e-5)
    assert not caplog.records
