"""A value that changes takes effect at the next step, wherever the code of the model reads it."""

import argparse
import collections
import dataclasses
import enum
import functools
import os
import re
import sys
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv

# ruff: noqa: PLW0108 (a lambda looks its function up at each call)

X = torch.randn(7, generator=torch.Generator().manual_seed(0))
config = types.ModuleType("config")
sys.modules["config"] = config


class Config:
    beta = 1.0

    @staticmethod
    def static():
        return Config.beta

    @classmethod
    def by_class(cls):
        return cls.beta


class Inherited(Config):
    pass


@dataclasses.dataclass(slots=True)
class Slots:
    beta: float = 1.0


class Computed:
    """As configuration objects of libraries are written."""

    def __init__(self):
        self._values = {"beta": 1.0}

    def __getattr__(self, name):
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None


class Items:
    def __init__(self):
        self.values = {"beta": 1.0}

    def __getitem__(self, name):
        return self.values[name]


class Mode(enum.Enum):
    ONE = 1.0


class ByMethod:
    beta = 1.0

    def value(self):
        return self.beta


Settings = collections.namedtuple("Settings", "values")
LIST, TUPLE, DEQUE, SET = [1.0], ([1.0],), collections.deque([1.0]), {1.0}
NESTED = Settings([{"beta": [1.0]}])
SCALAR, ARRAY, ZERO_D = np.float64(1.0), np.ones(3), np.array(1.0)
SLOTS, COMPUTED, ITEMS, BY_METHOD = Slots(), Computed(), Items(), ByMethod()
NAMESPACE = argparse.Namespace()


def function():
    return function.beta


def replaced():
    return 1.0


def with_default(beta=1.0):
    return beta


def imports_locally():
    import config as local

    return local.beta


def imports_a_name():
    from config import beta

    return beta


def set_scalar(value):
    global SCALAR  # noqa: PLW0603
    SCALAR = np.float64(value)


def set_environment(value):
    os.environ["PV_TEST_BETA"] = str(value)


def set_code(value):
    replaced.__code__ = (lambda: 1.0).__code__ if value == 1.0 else (lambda: 0.1).__code__


def set_method(value):
    ByMethod.value = (lambda self: 1.0) if value == 1.0 else (lambda self: 0.1)


def set_absent(value):
    if value == 1.0:
        vars(NAMESPACE).clear()
    else:
        NAMESPACE.maybe = value


def set_absent_variable(value):
    if value == 1.0:
        globals().pop("MAYBE", None)
    else:
        globals()["MAYBE"] = value


def maybe():
    try:
        return MAYBE
    except NameError:
        return 1.0


def set_set(value):
    SET.clear()
    SET.add(value)


CASES = {
    "module": (lambda: config.beta, lambda v: setattr(config, "beta", v)),
    "local import": (imports_locally, lambda v: setattr(config, "beta", v)),
    "name imported locally": (imports_a_name, lambda v: setattr(config, "beta", v)),
    "class": (lambda: Config.beta, lambda v: setattr(Config, "beta", v)),
    "inherited": (lambda: Inherited.beta, lambda v: setattr(Config, "beta", v)),
    "instance": (lambda: BY_METHOD.value(), lambda v: setattr(ByMethod, "beta", v)),
    "static method": (lambda: Config.static(), lambda v: setattr(Config, "beta", v)),
    "class method": (lambda: Inherited.by_class(), lambda v: setattr(Config, "beta", v)),
    "method of a class": (lambda: BY_METHOD.value(), set_method),
    "slots": (lambda: SLOTS.beta, lambda v: setattr(SLOTS, "beta", v)),
    "__getattr__": (lambda: COMPUTED.beta, lambda v: COMPUTED._values.update(beta=v)),
    "__getitem__": (lambda: ITEMS["beta"], lambda v: ITEMS.values.update(beta=v)),
    "getattr": (lambda: getattr(NAMESPACE, "maybe", 1.0), set_absent),
    "enumeration": (lambda: Mode.ONE.beta, lambda v: setattr(Mode.ONE, "beta", v)),
    "function": (lambda: function.beta, lambda v: setattr(function, "beta", v)),
    "code": (lambda: replaced(), set_code),
    "default": (lambda: with_default(), lambda v: setattr(with_default, "__defaults__", (v,))),
    "list": (lambda: LIST[0], lambda v: LIST.__setitem__(0, v)),
    "list in a tuple": (lambda: TUPLE[0][0], lambda v: TUPLE[0].__setitem__(0, v)),
    "nested": (lambda: NESTED.values[0]["beta"][0], lambda v: NESTED.values[0]["beta"].__setitem__(0, v)),
    "length": (lambda: 1.0 / len(LIST), lambda v: LIST.__setitem__(slice(1, None), [0] * int(1 / v - 0.5))),
    "set": (lambda: next(iter(SET)), set_set),
    "deque": (lambda: DEQUE[-1], lambda v: DEQUE.__setitem__(0, v)),
    "keyword of a partial": (None, None),
    "environment": (lambda: float(os.environ["PV_TEST_BETA"]), set_environment),
    "getenv": (lambda: float(os.getenv("PV_TEST_BETA")), set_environment),
    "NumPy scalar": (lambda: SCALAR, set_scalar),
    "NumPy array": (lambda: float(ARRAY[1]), lambda v: ARRAY.__setitem__(1, v)),
    "NumPy array, 0-d": (lambda: torch.tensor(ZERO_D).item(), lambda v: ZERO_D.__setitem__((), v)),
    "absent variable": (maybe, set_absent_variable),
}


def run(read, put, engine, changed_at=(5, 6, 11), steps=13):
    put(1.0)
    weight = nn.Parameter(torch.tensor(0.1))

    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=read()):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=read()):
            pyro.sample("z", dist.Normal(weight * x, 1.0))

    optimizer = torch.optim.SGD([weight], 0.01)
    svi = pv.SVI(model, guide, optimizer, Trace_ELBO(max_plate_nesting=1), engine=engine)
    torch.manual_seed(0)
    losses, value = [], 1.0
    for step in range(steps):
        if step in changed_at:
            value = 1.1 - value
            put(value)
        losses.append(svi.step(X))
    put(1.0)
    return losses, svi


@pytest.mark.parametrize("case", CASES)
def test_a_changed_value_takes_effect_at_the_next_step(case, caplog, monkeypatch):
    monkeypatch.setenv("PV_TEST_BETA", "1.0")
    read, put = CASES[case]
    if read is None:
        read = functools.partial(with_default, beta=1.0)
        put = functools.partial(lambda read, value: read.keywords.update(beta=value), read)
    expected, _ = run(read, put, "eager")
    found, svi = run(read, put, "traced")
    assert found == pytest.approx(expected, rel=1e-5)
    assert svi._replay.num_recordings == 4
    assert not caplog.records


def test_a_training_script_that_changes_a_module_at_step_300():
    """As reported: 211 wrong steps."""
    read, put = CASES["module"]
    expected, found = (run(read, put, engine, (300,), 600)[0] for engine in ("eager", "traced"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_large_array_and_an_iterator_need_the_eager_step(caplog):
    data, counter = np.ones(10_000), iter([1.0] * 99)
    for read, reason in (
        (lambda: float(data[0]), "reads variable 'data' of function .* a NumPy array of 80000 bytes"),
        (lambda: next(counter), "reads variable 'counter' of function .* an iterator"),
    ):
        caplog.clear()
        _, svi = run(read, lambda v: None, "traced")
        assert svi._replay.disabled
        assert len(caplog.messages) == 1
        assert re.search(reason, caplog.text)


def test_a_large_list_counts_by_its_length():
    large = [1.0] * 2_000
    guards = pv.engine.guards.Guards([lambda: len(large)], [])
    large[3] = 2.0
    assert guards.hold()
    large.append(1.0)
    assert not guards.hold()
