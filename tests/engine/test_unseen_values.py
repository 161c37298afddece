"""A value that changes takes effect at the next step, wherever the code of the model reads it."""

import argparse
import array
import builtins
import collections
import configparser
import contextvars
import ctypes
import dataclasses
import enum
import functools
import importlib
import multiprocessing
import operator
import os
import queue
import re
import sys
import time
import types
import weakref

import numpy as np
import pandas as pd
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


ORDERED = collections.OrderedDict(a=1.0, b=0.1)
PLAIN = {"a": 1.0, "b": 0.1}
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)
HELD = {"beta": 1.0}
USER_DICT, CHAIN, PROXY = (
    collections.UserDict(beta=1.0),
    collections.ChainMap({}, HELD),
    types.MappingProxyType(HELD),
)
NUMBERS, BYTES, DOUBLE = array.array("d", [1.0]), bytearray([10]), ctypes.c_double(1.0)
NUMBERED, SIGNED = types.SimpleNamespace(beta_0=1.0), types.SimpleNamespace(zero=0.0)
INNER = types.SimpleNamespace(inner=types.SimpleNamespace(rate=1.0))
BY_CALLER = operator.attrgetter("inner.rate")
REFERENCE, WEAK_PROXY = weakref.ref(BY_METHOD), weakref.proxy(BY_METHOD)
TENSOR = torch.ones(2)
SHAPED = torch.ones(2)
BY_INDEX = 1.0


@functools.cache
def settings():
    return types.SimpleNamespace(beta=1.0)


@functools.lru_cache
def table():
    return {"beta": 1.0}


class Meta(type):
    rate = 1.0

    @property
    def computed(cls):
        return cls.held


class WithMeta(metaclass=Meta):
    held = 1.0


class Base:
    rate = 1.0

    def value(self):
        return 1.0


class Derived(Base):
    pass


class Other(Base):
    def value(self):
        return 0.1


class Partial:
    rate = 1.0

    def _value(self, factor):
        return self.rate * factor

    value = functools.partialmethod(_value, 1.0)


class Factor(float):
    pass


DERIVED, ONE, PARTIAL, FACTOR = Derived(), Base(), Partial(), Factor(1.0)
config.__getattr__ = lambda name: config.hidden if name == "computed" else getattr(object, name)
config.hidden = 1.0


PARSER, WEAK_KEYS = configparser.ConfigParser(), weakref.WeakKeyDictionary({BY_METHOD: 1.0})
PARSER["model"] = {"beta": "1.0"}


def set_order(container):
    def put(value):
        for name in ("a", "b") if value == 1.0 else ("b", "a"):
            container[name] = container.pop(name)

    return put


def set_derived(value):
    if value == 1.0 and "rate" in vars(Derived):
        del Derived.rate
    elif value != 1.0:
        Derived.rate = value


def set_builtin(value):
    if value == 1.0:
        vars(builtins).pop("PV_TEST_BETA", None)
    else:
        builtins.PV_TEST_BETA = value


def builtin():
    try:
        return PV_TEST_BETA
    except NameError:
        return 1.0


def by_number(number):
    return getattr(NUMBERED, f"beta_{number}", 1.0)


def by_name(name):
    return getattr(NUMBERED, name)


def softplus(value):
    torch.nn.functional.softplus = SOFTPLUS if value == 1.0 else lambda x: SOFTPLUS(x) / 2


SOFTPLUS = torch.nn.functional.softplus

CASES |= {
    "ordered": (
        lambda: next(iter(ORDERED.values())),
        lambda v: ORDERED.move_to_end("b" if v == 1.0 else "a"),
    ),
    "order": (lambda: next(iter(PLAIN.values())), set_order(PLAIN)),
    "context variable": (lambda: CONTEXT.get(), lambda v: CONTEXT.set(v)),
    "cached object": (lambda: settings().beta, lambda v: setattr(settings(), "beta", v)),
    "cached dictionary": (lambda: table()["beta"], lambda v: table().update(beta=v)),
    "metaclass": (lambda: WithMeta.rate, lambda v: setattr(Meta, "rate", v)),
    "property of a metaclass": (lambda: WithMeta.computed, lambda v: setattr(WithMeta, "held", v)),
    "UserDict": (lambda: USER_DICT["beta"], lambda v: USER_DICT.update(beta=v)),
    "ChainMap": (lambda: CHAIN["beta"], lambda v: HELD.update(beta=v)),
    "mapping proxy": (lambda: PROXY["beta"], lambda v: HELD.update(beta=v)),
    "array": (lambda: NUMBERS[0], lambda v: NUMBERS.__setitem__(0, v)),
    "bytearray": (lambda: BYTES[0] / 10, lambda v: BYTES.__setitem__(0, round(10 * v))),
    "ctypes": (lambda: DOUBLE.value, lambda v: setattr(DOUBLE, "value", v)),
    "weak reference": (lambda: REFERENCE().beta, lambda v: setattr(ByMethod, "beta", v)),
    "weak proxy": (lambda: WEAK_PROXY.beta, lambda v: setattr(ByMethod, "beta", v)),
    "import_module": (lambda: importlib.import_module("config").beta, lambda v: setattr(config, "beta", v)),
    "sys.modules": (lambda: sys.modules["config"].beta, lambda v: setattr(config, "beta", v)),
    "__getattr__ of a module": (lambda: config.computed, lambda v: setattr(config, "hidden", v)),
    "vars": (lambda: vars(NUMBERED)["beta_0"], lambda v: setattr(NUMBERED, "beta_0", v)),
    "__dict__": (lambda: NUMBERED.__dict__["beta_0"], lambda v: setattr(NUMBERED, "beta_0", v)),
    "getattr, formatted": (lambda: by_number(0), lambda v: setattr(NUMBERED, "beta_0", v)),
    "getattr, passed": (lambda: by_name("beta_0"), lambda v: setattr(NUMBERED, "beta_0", v)),
    "attrgetter": (
        lambda: operator.attrgetter("inner.rate")(INNER),
        lambda v: setattr(INNER.inner, "rate", v),
    ),
    "attrgetter, global": (lambda: BY_CALLER(INNER), lambda v: setattr(INNER.inner, "rate", v)),
    "hidden by a derived class": (lambda: Derived.rate, set_derived),
    "hidden from an instance": (lambda: DERIVED.rate, set_derived),
    "__class__": (lambda: ONE.value(), lambda v: setattr(ONE, "__class__", Base if v == 1.0 else Other)),
    "partialmethod": (lambda: PARTIAL.value(), lambda v: setattr(Partial, "rate", v)),
    "attribute of a float": (lambda: FACTOR.beta, lambda v: setattr(FACTOR, "beta", v)),
    "attribute of a tensor": (lambda: TENSOR.beta, lambda v: setattr(TENSOR, "beta", v)),
    "length of a tensor": (
        lambda: 1.0 / len(SHAPED),
        lambda v: setattr(SHAPED, "data", torch.ones(2 if v == 1.0 else 3)),
    ),
    "configuration": (
        lambda: PARSER.getfloat("model", "beta"),
        lambda v: PARSER.set("model", "beta", str(v)),
    ),
    "weak keys": (lambda: WEAK_KEYS[BY_METHOD], lambda v: WEAK_KEYS.update({BY_METHOD: v})),
    "built in": (builtin, set_builtin),
    "negative zero": (
        lambda: 1.0 if np.copysign(1.0, SIGNED.zero) > 0 else 0.1,
        lambda v: setattr(SIGNED, "zero", 0.0 if v == 1.0 else -0.0),
    ),
    "environ, renamed": (lambda: float(ENVIRONMENT["PV_TEST_BETA"]), set_environment),
    "environb": (lambda: float(os.environb[b"PV_TEST_BETA"]), set_environment),
    "function of a library": (lambda: torch.nn.functional.softplus(torch.ones(())), softplus),
}
ENVIRONMENT = os.environ


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


SERIES = pd.Series({"beta": 1.0})
QUEUE, SHARED = queue.Queue(), multiprocessing.Value("d", 1.0)


def from_file():
    with open(__file__) as file:
        return float(len(file.read()) > 0)


def count_shared():
    SHARED.value += 1
    return 1.0


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda: SERIES["beta"], "reads variable 'SERIES' .* of class Series, which cannot be compared"),
        (lambda: QUEUE.get() + 1.0, "of class Queue"),
        (count_shared, "of class Synchronized"),
        (lambda: 1.0 if time.monotonic() < 1e12 else 2.0, "reads a clock"),
        (from_file, "reads files"),
        (lambda: eval("CONFIG.beta", {"CONFIG": Config}), "reads names out of text"),
        (lambda: 1.0 if sys._getframe(1).f_code else 2.0, "reads variables of its callers"),
    ],
)
def test_what_no_guard_can_compare_needs_the_eager_step(read, reason, caplog):
    def fill(counts, _):
        counts.append((QUEUE.qsize(), SHARED.value))
        SHARED.value = 0.0
        QUEUE.queue.clear()
        QUEUE.queue.extend([0.0] * 99)

    results = {}
    for engine in ("eager", "traced"):
        counts = []
        losses, svi = run(read, functools.partial(fill, counts), engine, ())
        results[engine] = losses, counts[1]
    assert results["traced"] == results["eager"]
    assert svi._replay.disabled
    assert re.search(reason, caplog.text)


def test_clocks_and_names_in_code_that_does_not_run_keep_the_graph(caplog):
    class Trainer:
        def read(self):
            return 1.0

        def log(self, name):
            return time.time(), getattr(self, name), SERIES["beta"], open(name)

    trainer = Trainer()
    _, svi = run(lambda: trainer.read(), lambda v: setattr(trainer, "steps", v), "traced")
    assert not svi._replay.disabled
    assert svi._replay.num_recordings == 1


def test_a_large_list_counts_by_its_length():
    large = [1.0] * 2_000
    guards = pv.engine.guards.Guards([lambda: len(large)], [])
    large[3] = 2.0
    assert guards.hold()
    large.append(1.0)
    assert not guards.hold()
