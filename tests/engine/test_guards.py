"""Guards fail when a Python value that the model reads changes, and hold when another one changes."""

import functools
import sysconfig
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.engine import guards
from pyro_vae.engine.guards import Guards

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
    guards = Guards([function], [])
    assert guards.hold()
    monkeypatch.setitem(globals(), name, value)
    assert not guards.hold()
    monkeypatch.undo()
    assert guards.hold()


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
def test_objects_in_global_variables(monkeypatch, function, space, name):
    guards = Guards([function], [])
    assert guards.hold()
    monkeypatch.setitem(space, name, 7.0)
    assert not guards.hold()


def test_attributes_that_are_only_written_may_change():
    """For example activations stored for a plot, or an epoch counter set by a training loop."""
    guards = Guards([by_net], [NET])
    NET.last, NET.epoch = torch.zeros(2), 3
    assert guards.hold()


def test_an_equal_number_of_the_same_type_holds(monkeypatch):
    guards = Guards([by_global], [])
    monkeypatch.setitem(globals(), "SCALE", float("2.0"))
    assert guards.hold()
    monkeypatch.setitem(globals(), "SCALE", 2)  # another type has other arithmetic
    assert not guards.hold()


def test_attributes_that_methods_read():
    owner = Owner()
    guards = Guards([owner.model], [])
    owner.steps += 1
    assert guards.hold()
    owner.slope = 2.0
    assert not guards.hold()


def test_values_that_are_not_read_may_change(monkeypatch):
    guards = Guards([by_global, by_object], [])
    monkeypatch.setitem(SETTINGS, "slope", 7.0)
    monkeypatch.setattr(OBJECT, "unread", 1)
    assert guards.hold()


def test_closures():
    slope = 1.0

    def model(x):
        return slope * x

    guards = Guards([model], [])
    assert guards.hold()
    slope = 2.0
    assert not guards.hold()


def test_a_changed_global_variable_takes_effect_at_the_next_step(monkeypatch, caplog):
    """As in a notebook, where one cell sets the variable and another continues training."""

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
            if step in (5, 6, 11):  # not powers of two
                monkeypatch.setitem(globals(), "SCALE", 1.0 + step)
            losses[engine].append(svi.step(torch.linspace(-1.0, 1.0, 7)))
    assert svi._replay.num_recordings == 4
    assert losses["traced"] == pytest.approx(losses["eager"], rel=1e-5)
    assert not caplog.records


def test_packages_of_the_system_and_of_the_user_are_libraries():
    """Else what torch keeps for itself would be compared at each step."""
    system, user = "/usr/lib/python3/dist-packages", "/home/me/.local/lib/python3.11/site-packages"
    found = guards._library_folders(["/home/me/project", system, "", user])
    assert {system, user, sysconfig.get_path("purelib")} <= set(found)
    assert "/home/me/project" not in found
    assert "" not in found
