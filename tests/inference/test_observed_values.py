"""Data outside the support of a pair's observed site are named, with the site, before the first step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv

N, C = 12, 3
X, Y = torch.linspace(-2, 2, N), torch.arange(N) % C
QUIET = {"progress": False}


def pair(observe=lambda z, y: pyro.sample("y", dist.Categorical(logits=logits(z)), obs=y)) -> pv.Pair:
    encoder = nn.Linear(1, 1)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            observe(z, y)

    def guide(x, y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 0.6))

    return pv.Pair(model, guide)


def logits(z):
    return torch.stack([z, -z, 0 * z], -1)


def changed(index, value):
    y = Y.to(torch.tensor(value).dtype).clone()
    y[index] = value
    return y


@pytest.mark.parametrize(("index", "value"), [(9, 7), (4, -1), (2, 0.5), (11, float("nan"))])
def test_fit_and_evaluate_name_argument_row_and_site(index, value):
    y = changed(index, value)
    message = rf"^x\[1\]\[{index}\] = {value} lies outside the support of Categorical at the site 'y'"
    for estimator in (None, Trace_ELBO(), pv.IWAE(2)):
        with pytest.raises(ValueError, match=message):
            pv.fit(pair(), (X, y), estimator=estimator, batch_size=4, **QUIET)
    with pytest.raises(ValueError, match=message.replace("^", "^the validation data: ")):
        pv.fit(pair(), (X, Y), validation=(X, y), epochs=10**6, **QUIET)
    with pytest.raises(ValueError, match=message.replace(r"\[1\]", r"\['y'\]")):
        pv.evaluate(pair(), {"x": X, "y": y}, **QUIET)
    for call in (pv.check_guide, lambda *args: pv.SVI(pair(), torch.optim.Adam([P])).check(*args[1:])):
        with pytest.raises(ValueError, match=message):
            call(pair(), X, y)


P = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_later_batch_of_svi(engine):
    made = pair()
    made.make_parameters(X, Y)
    svi = pv.SVI(made, torch.optim.Adam(made.parameters()), Trace_ELBO(), engine=engine)
    svi.step(X, Y)
    with pytest.raises(ValueError, match=r"^x\[1\]\[3\] = 5 lies outside .* at the site 'y'"):
        svi.step(X, changed(3, 5))


def test_a_value_of_another_shape_names_both():
    one_hot = nn.functional.one_hot(Y, C)
    message = r"site 'y' observes a value of shape \(12, 3\), expected one of batch shape \(12,\) and event"
    for call in (pv.check_guide, pv.SVI(pair(), torch.optim.Adam([P])).check):
        args = (X, one_hot) if call is not pv.check_guide else (pair(), X, one_hot)
        with pytest.raises(ValueError, match=message):
            call(*args)
    with pytest.raises(ValueError, match=message):
        pv.fit(pair(), (X, one_hot), **QUIET)


def test_what_a_pair_may_observe_passes():
    def masked(z, y):
        with poutine.mask(mask=y >= 0):
            pyro.sample("y", dist.Categorical(logits=logits(z)), obs=y.clamp(min=0))

    def unvalidated(z, y):
        pyro.sample("y", dist.Bernoulli(logits=z, validate_args=False), obs=y)

    def depends(z, y):
        pyro.sample("y", dist.Uniform(z.detach() - 100, z.detach() + 100), obs=y)

    pv.fit(pair(masked), (X, changed(4, -1)), epochs=1, **QUIET)
    pv.fit(pair(unvalidated), (X, torch.full((N,), 0.3)), epochs=1, **QUIET)
    pv.fit(pair(depends), (X, Y / 2), epochs=1, **QUIET)
    pv.fit(pair(), (X, Y.float()), epochs=1, **QUIET)
    with pyro.validation_enabled(False):
        pv.fit(pair(lambda z, y: pyro.sample("y", dist.Bernoulli(logits=z), obs=y)), (X, Y / 3), **QUIET)


def test_the_row_of_a_wrong_value_in_data_that_are_read_late():
    from pyro_vae.data.batches import Batches

    batches = Batches((X, changed(9, 7)))
    batches.unchecked = pv.inference.observed_values.check_of(pair(), batches)
    with pytest.raises(ValueError, match=r"x\[1\]\[9\] = 7 .*; 1 of 4 values do in 4 of the \d+ rows"):
        list(batches.in_order(4))
