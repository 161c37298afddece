"""What stands around a step, such as hooks, modes, stores and optimiser options, acts as on an eager step."""

import types
import warnings

import pyro
import pyro.distributions as dist
import pyro.settings
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints
from torch.distributions.kl import _KL_MEMOIZE, _KL_REGISTRY, kl_divergence, register_kl
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import pyro_vae as pv

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CHANGED_AT = (5, 11)


@pytest.fixture(autouse=True)
def store():
    with pyro.get_param_store().scope():
        yield


class Case:
    """A pair with a place to fill in model and guide, what is done at each step, and what it leaves."""

    def __init__(self, scale=lambda: 1.0, wrap=lambda h: h):
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.decoder = nn.Linear(2, 3).double()
        self.options = types.SimpleNamespace(value=1.0, list=[], tensors={})
        self.loss, self.optimizer = Trace_ELBO(), lambda p: torch.optim.SGD(p, 0.01)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z) * scale(), 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(wrap(self.encoder(x)), 0.7).to_event(1))

        self.model, self.guide = model, guide
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.change = lambda svi: None
        self.step = lambda svi, number: svi.step(X)
        self.state = lambda: 0.0


def run(make, engine, steps=14):
    case = make()
    svi = pv.SVI(case.model, case.guide, case.optimizer(case.parameters), case.loss, engine=engine)
    torch.manual_seed(0)
    found = []
    for number in range(steps):
        if number in CHANGED_AT:
            case.change(svi)
        try:
            loss = case.step(svi, number)
        except (ValueError, KeyError) as error:
            loss = type(error).__name__, str(error)
        values = torch.cat([p.detach().reshape(-1) for p in case.parameters])
        found.append((loss, values, torch.get_rng_state(), torch.as_tensor(case.state()).double()))
    return found, svi


def without_gradients():
    case = Case()

    def step(svi, number):
        with torch.set_grad_enabled(number not in CHANGED_AT):
            return svi.step(X)

    case.step = step
    return case


def function_mode():
    class Halve(TorchFunctionMode):
        def __torch_function__(self, func, _, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result / 2 if func is nn.functional.linear else result

    case = Case()

    def step(svi, number):
        if number in CHANGED_AT:
            with Halve():
                return svi.step(X)
        return svi.step(X)

    case.step = step
    return case


def global_hook():
    case, hooks = Case(), []

    def change(_):
        if hooks:
            hooks.pop().remove()
        else:
            hooks.append(register_module_forward_hook(lambda *args: args[-1] * 0.9))

    case.change = change
    return case


def post_accumulate_hook():
    case = Case()

    def reduce(parameter):
        parameter.grad.mul_(0.1)

    case.change = lambda _: case.encoder[0].weight.register_post_accumulate_grad_hook(reduce)
    return case


def number_in_a_hook():
    case = Case()
    case.encoder[0].weight.register_hook(lambda gradient: gradient * case.options.value)
    case.change = lambda _: setattr(case.options, "value", 1.1 - case.options.value)
    return case


def hook_that_counts():
    case = Case()
    case.encoder[0].weight.register_hook(lambda _: case.options.list.append(1))
    case.state = lambda: len(case.options.list)
    return case


def split_at_a_tensor():
    at = torch.tensor([1])
    case = Case(wrap=lambda h: torch.cat([p * (1 + i) for i, p in enumerate(torch.tensor_split(h, at))]))
    case.change = lambda _: at.add_(1)
    return case


def gradient_that_the_model_reads():
    weight = nn.Parameter(torch.ones(2).double(), requires_grad=False)
    weight.grad = torch.ones(2).double()
    case = Case(wrap=lambda h: h * weight.grad)
    case.change = lambda _: setattr(weight, "grad", weight.grad / 2)
    return case


def gradient_of_the_data():
    case, x = Case(), X.clone().requires_grad_()
    case.step = lambda svi, _: svi.step(x)
    case.state = lambda: x.grad
    return case


def data_from_a_network():
    case, first = Case(), nn.Linear(3, 3).double()
    case.parameters += first.parameters()
    case.step = lambda svi, _: svi.step(first(X))
    return case


def another_optimizer():
    weight = nn.Parameter(torch.ones(3).double())
    case, other = Case(scale=lambda: weight), torch.optim.SGD([weight], 0.001)

    def step(svi, number):
        svi.clip_norm = 1.0
        loss = svi.step(X)
        if number % 3 == 0:
            other.step()
            other.zero_grad()
        return loss

    case.step = step
    case.state = lambda: torch.cat([weight.detach(), torch.zeros(3) if weight.grad is None else weight.grad])
    return case


def stored(change, constraint=constraints.real):
    def make():
        pyro.clear_param_store()
        value = pyro.param("value", torch.ones(()).double(), constraint=constraint)
        case = Case(wrap=lambda h: h * pyro.param("value", torch.ones(()).double(), constraint=constraint))
        case.parameters.append(value.unconstrained())
        case.change = lambda _: change(pyro.get_param_store())
        return case

    return make


def replace_after_a_scope(store):
    with store.scope():
        pass
    store["value"] = torch.tensor(2.0).double()


def change_constraint(store):
    store._constraints["value"] = constraints.greater_than(0.5)


def free_bits():
    case = Case()
    case.loss = pv.KLWeighted(TraceMeanField_ELBO(), 1.0)
    case.change = lambda _: setattr(case.loss, "free_bits", 3.0 - case.loss.free_bits)
    return case


def conditioned():
    case, data = Case(), {"extra": torch.tensor(0.5).double()}
    inner = case.model

    def model(x):
        extra = pyro.sample("extra", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.factor("factor", -3 * extra)
        inner(x)

    case.model = poutine.condition(model, data=data)
    case.change = lambda _: data.update(extra=data["extra"] + 1)
    return case


def hidden_sites():
    case = Case()
    case.model = poutine.block(case.model, hide=case.options.list)
    case.change = lambda _: case.options.list.append("x")
    return case


class Scripted(nn.Module):
    factor: float

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.factor = 1.0

    def forward(self, x):
        return self.linear(x) * self.factor


def scripted():
    case = Case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        case.encoder = torch.jit.script(Scripted().double())
    case.parameters = [*case.encoder.parameters(), *case.decoder.parameters()]
    case.change = lambda _: setattr(case.encoder, "factor", 1.5 - case.encoder.factor)
    return case


class Special(dist.Normal):
    pass


def registered_kl():
    _KL_REGISTRY.pop((Special, dist.Normal), None)
    _KL_MEMOIZE.clear()
    case = Case()
    case.loss = TraceMeanField_ELBO()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Special(case.encoder(x), torch.tensor(0.7).double()).to_event(1))

    def change(_):
        register_kl(Special, dist.Normal)(
            lambda p, q: 0.5 * kl_divergence(dist.Normal(p.loc, p.scale), dist.Normal(q.loc, q.scale))
        )

    case.guide, case.change = guide, change
    return case


def pyro_setting():
    case = Case()
    inner = case.model

    def model(x):
        inner(x)
        logits = case.decoder.weight.sum()
        binomial = dist.Binomial(torch.tensor(10.0).double(), logits.sigmoid())
        pyro.sample("count", binomial, obs=torch.tensor(4.0).double())

    case.model = model

    def step(svi, number):
        with pyro.settings.context(binomial_approx_log_prob_tol=0.1 * (number in CHANGED_AT)):
            return svi.step(X)

    case.step = step
    return case


def zero_grad_that_counts():
    case = Case()

    class Counting(torch.optim.SGD):
        def zero_grad(self, *args, **kwargs):
            case.options.list.append(1)
            super().zero_grad(*args, **kwargs)

    case.optimizer = lambda p: Counting(p, 0.01)
    case.state = lambda: len(case.options.list)
    return case


def own_step_under_a_scheduler():
    case = Case()

    def optimizer(parameters):
        adam = torch.optim.Adam(parameters, 0.01)
        plain = adam.step

        def step(self, *args, **kwargs):
            case.options.list.append(1)
            return plain(*args, **kwargs)

        adam.step = types.MethodType(step, adam)
        case.scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, 0.9)
        return adam

    case.optimizer, case.state = optimizer, lambda: len(case.options.list)
    return case


def adam_option(name, value):
    def make():
        case = Case()
        case.optimizer = lambda p: torch.optim.Adam(p, 0.01)
        case.change = lambda svi: svi.optimizer.param_groups[0].update({name: value})
        return case

    return make


def method_of_an_instance():
    case = Case()
    torch.manual_seed(1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (3,)),
        guide=pv.guides.DiagonalNormal((3,), 2),
    ).double()
    case.model, case.guide, case.parameters = vae.model, vae.guide, [*vae.parameters()]
    case.optimizer = lambda p: torch.optim.Adam(p, 0.01)
    distribution = vae.likelihood.distribution
    case.change = lambda _: setattr(
        vae.likelihood, "distribution", lambda mean, *rest: distribution(mean / 2, *rest)
    )
    return case


def parametrized_later():
    pyro.clear_param_store()
    case = Case()
    case.encoder = PyroModule[nn.Sequential](*case.encoder)
    inner = case.guide

    def guide(x):
        pyro.module("encoder", case.encoder)
        inner(x)

    case.guide = guide
    done = []
    case.change = lambda _: done or done.append(nn.utils.parametrizations.weight_norm(case.encoder[0]))
    return case


CASES = {
    make.__name__: make
    for make in (
        without_gradients, function_mode, global_hook, post_accumulate_hook, number_in_a_hook,
        hook_that_counts, split_at_a_tensor, gradient_that_the_model_reads, gradient_of_the_data,
        data_from_a_network, another_optimizer, free_bits, conditioned, hidden_sites, scripted, registered_kl,
        pyro_setting, zero_grad_that_counts, own_step_under_a_scheduler, method_of_an_instance,
        parametrized_later,
    )
} | {
    "a cleared store": stored(lambda store: store.clear()),
    "a store with another parameter": stored(replace_after_a_scope),
    "a store with another constraint": stored(change_constraint, constraints.positive),
    "a rate in a tensor": adam_option("lr", torch.tensor(0.02, dtype=torch.float64)),
    "amsgrad too late": adam_option("amsgrad", True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_as_an_eager_one(name):
    expected, _ = run(CASES[name], "eager")
    found, _ = run(CASES[name], "traced")
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        where = f"step {number}"
        if isinstance(one[0], tuple) or isinstance(other[0], tuple):
            assert one[0] == other[0], where
        else:
            assert one[0] == pytest.approx(other[0], rel=1e-9), where
        torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-12, msg=where)
        assert torch.equal(one[2], other[2]), where
        torch.testing.assert_close(one[3], other[3], rtol=1e-9, atol=1e-12, msg=where)


def test_gradients_for_another_optimizer_come_from_a_graph(caplog):
    _, svi = run(another_optimizer, "traced")
    assert not svi._replay.disabled
    assert not caplog.records


def test_a_model_that_seeds_a_generator_is_told_so(caplog):
    def seed(h):
        torch.manual_seed(7)
        return h

    expected, _ = run(lambda: Case(wrap=seed), "eager")
    found, _ = run(lambda: Case(wrap=seed), "traced")
    assert [step[0] for step in found] == [step[0] for step in expected]
    assert "the model seeds or restores a generator" in caplog.text
