"""Programs as Pyro's tutorials and examples write them: accepted, and the same losses as under Pyro's SVI."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv

N, STEPS = 7, 4
Pair = tuple[Callable, Callable, tuple]


def regression(guide: Callable) -> Pair:
    """Bayesian regression with a `PyroModule`: bayesian_regression.ipynb."""

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x, y):
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    model = Regression().double()
    return model, guide(model), (torch.randn(N, 3), torch.randn(N))


def normals_for_a_regression() -> Pair:
    """A normal guide for a uniform scale, which stays inside in practice: intro_long.ipynb."""

    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(a + b * x, sigma), obs=y)

    def guide(x, y):
        for name in ("a", "b"):
            loc = pyro.param(f"{name}_loc", torch.tensor(0.1))
            scale = pyro.param(f"{name}_scale", torch.tensor(1.0), constraint=constraints.positive)
            pyro.sample(name, dist.Normal(loc, scale))
        loc = pyro.param("sigma_loc", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("sigma", dist.Normal(loc, 0.05))

    return model, guide, (torch.randn(N), torch.randn(N))


def mixture() -> Pair:
    """Gaussian mixture with enumerated assignments: gmm.ipynb."""

    @config_enumerate
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=x)

    hidden = poutine.block(model, expose=["weights", "locs", "scale"])
    return model, AutoDelta(hidden), (torch.randn(N),)


def enumerated_shapes() -> Pair:
    """A model that asserts the shapes that enumeration gives, as Pyro's tutorial on shapes does."""

    @config_enumerate
    def model(x):
        weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(weight))
            assert on.shape == (2, 1)
            pyro.sample("obs", dist.Normal(on, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.tensor(0.1))
        pyro.sample("weight", dist.Delta(logit.sigmoid()))

    return model, guide, (torch.randn(N),)


def enumerated_guide() -> Pair:
    """Enumeration in the guide, of a site that a later site depends on."""

    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(kind.to(x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @config_enumerate
    def guide(x):
        logits = pyro.param("logits", torch.zeros(N, 3))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=logits))
            assert kind.shape == (3, 1)
            pyro.sample("z", dist.Normal(x, 1.0))

    return model, guide, (torch.randn(N),)


def particle_shapes() -> Pair:
    """A model that asserts the shapes of vectorised particles."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert z.shape == (3, N)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w * x, 1.0))

    return model, guide, (torch.randn(N),)


def hidden_markov() -> Pair:
    """Sequences of several lengths with enumerated states: hmm.py."""
    lengths = torch.tensor([2, 3, 1])

    @config_enumerate
    def model(x, lengths):
        with poutine.mask(mask=True):
            probs = pyro.sample("probs", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
            rates = pyro.sample("rates", dist.Beta(0.1, 0.9).expand([2, 4]).to_event(2))
        tones = pyro.plate("tones", 4, dim=-1)
        with pyro.plate("sequences", len(x), 2, dim=-2) as batch:
            state = 0
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=(t < lengths[batch]).unsqueeze(-1)):
                    state = pyro.sample(f"state_{t}", dist.Categorical(probs[state]))
                    with tones as tone:
                        pyro.sample(f"x_{t}", dist.Bernoulli(rates[state, tone]), obs=x[batch, t])

    def on_numbers(x, lengths):
        return model(x, lengths)

    guide = AutoDelta(poutine.block(on_numbers, expose=["probs", "rates"]))
    return model, guide, (torch.bernoulli(torch.full((3, 3, 4), 0.5)), lengths)


def topics() -> Pair:
    """Documents that the guide subsamples, words whose topics are enumerated: lda.py."""

    def model(x):
        with pyro.plate("topics", 2):
            weights = pyro.sample("weights", dist.Gamma(0.5, 1.0))
            words = pyro.sample("words", dist.Dirichlet(torch.ones(5)))
        with pyro.plate("documents", x.shape[1]) as index:
            mixture = pyro.sample("mixture", dist.Dirichlet(weights))
            with pyro.plate("places", len(x)):
                topic = pyro.sample("topic", dist.Categorical(mixture), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(words[topic]), obs=x[:, index])

    def guide(x):
        positive = constraints.positive
        weights = pyro.param("weights_q", torch.ones(2), constraint=positive)
        words = pyro.param("words_q", torch.ones(2, 5), constraint=positive)
        with pyro.plate("topics", 2):
            pyro.sample("weights", dist.Gamma(weights, 1.0))
            pyro.sample("words", dist.Dirichlet(words))
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("documents", x.shape[1], 3) as index:
            mixture = logits.softmax(-1).expand(len(index), 2)
            pyro.sample("mixture", dist.Delta(mixture, event_dim=1))

    return model, guide, (torch.randint(0, 5, (4, N)),)


def capture() -> Pair:
    """Enumerated states of animals and an automatic guide of the rest: cjs.py."""

    @config_enumerate
    def model(x):
        survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
        seen = pyro.sample("seen", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", len(x)):
            alive = torch.ones(len(x))
            for t in pyro.markov(range(3)):
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survival * alive))
                pyro.sample(f"x_{t}", dist.Bernoulli(seen * alive), obs=x[:, t])

    hidden = poutine.block(model, expose=["survival", "seen"])
    x = torch.zeros(N, 3)
    x[:, 0] = 1
    return model, AutoDiagonalNormal(hidden), (x,)


def scaled_latents() -> Pair:
    """Annealed latent variables, scaled in both programs: dmm.py."""

    def program(x, *, observe):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(0.0 if observe else w * x, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return partial(program, observe=True), partial(program, observe=False), (torch.randn(N),)


def coin() -> tuple[Callable, tuple]:
    """Fairness of a coin: mle_map.ipynb and svi_part_i.ipynb."""

    def model(x):
        f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(f), obs=x)

    return model, (torch.bernoulli(torch.full((N,), 0.6)),)


def coin_map() -> Pair:
    model, data = coin()

    def guide(x):
        f = pyro.param("f", torch.tensor(0.4), constraint=constraints.unit_interval)
        pyro.sample("latent_fairness", dist.Delta(f))

    return model, guide, data


def coin_mle() -> Pair:
    def model(x):
        f = pyro.param("f", torch.tensor(0.4), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(f), obs=x)

    return model, lambda x: None, coin()[1]


def coin_posterior() -> Pair:
    model, data = coin()

    def guide(x):
        a, b = (pyro.param(name, torch.tensor(15.0), constraint=constraints.positive) for name in "ab")
        pyro.sample("latent_fairness", dist.Beta(a, b))

    return model, guide, data


def sequential_coins() -> Pair:
    """A sequential plate with a subsample: svi_part_ii.ipynb."""

    def model(x):
        f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
        for i in pyro.plate("data_loop", len(x), subsample_size=3):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=x[i])

    _, guide, data = coin_posterior()
    return model, guide, data


def sequential_local_latents() -> Pair:
    """Latent variables per datum in a sequential plate with a subsample: svi_part_ii.ipynb."""

    def model(x):
        beta = pyro.sample("beta", dist.Beta(10.0, 10.0))
        for i in pyro.plate("locals", len(x), subsample_size=3):
            z = pyro.sample(f"z_{i}", dist.Beta(beta, 1.0 - beta))
            pyro.sample(f"obs_{i}", dist.Bernoulli(z), obs=x[i])

    def guide(x):
        q = pyro.param("beta_q", torch.tensor(0.4), constraint=constraints.unit_interval)
        pyro.sample("beta", dist.Beta(9 + q, 9.0))
        a = pyro.param("a", 0.5 * torch.ones(len(x)), constraint=constraints.positive)
        for i in pyro.plate("locals", len(x), subsample_size=3):
            pyro.sample(f"z_{i}", dist.Beta(a[i], 1.0))

    return model, guide, coin()[1]


def subsampled_by_the_guide() -> Pair:
    """A plate that the guide alone subsamples, as in AIR and LDA."""

    def model(x):
        with pyro.plate("data", len(x)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert len(z) == 3
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", dist.Normal(w * x[index], 1.0))

    return model, guide, (torch.randn(N),)


def masked_steps() -> Pair:
    """A step that counts only where an earlier draw says so, in both programs: air.py."""

    def program(x, *, present, observe):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(present).to_event(1))
            scale = pyro.param("scale", torch.tensor(0.7)) if not observe else torch.tensor(1.0)
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), scale).mask(on).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(z * on, 1.0).to_event(1), obs=x)

    def guide(x):
        probability = pyro.param("probability", torch.full((N, 1), 0.4), constraint=constraints.unit_interval)
        program(x, present=probability, observe=False)

    def model(x):
        program(x, present=torch.full((len(x), 1), 0.5), observe=True)

    return model, guide, (torch.randn(N, 2),)


def observed_by_both() -> Pair:
    """A treatment that the guide scores too, for the loss to add: cevae/synthetic.py."""

    def model(x, treated):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("treated", dist.Bernoulli(logits=z), obs=treated)

    def guide(x, treated):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            treated = pyro.sample(
                "treated", dist.Bernoulli(logits=slope * x), obs=treated, infer={"is_auxiliary": True}
            )
            pyro.sample("z", dist.Normal(slope * x + treated, 0.8))

    return model, guide, (torch.randn(N), torch.arange(N) % 2.0)


def positive_latents(model: Callable | None = None) -> tuple[Callable, tuple]:
    """Latent variables with all sorts of supports."""

    def supports(x):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        probability = pyro.sample("probability", dist.Beta(2.0, 2.0))
        shift = pyro.sample("shift", dist.Uniform(-1.0, 4.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        factor = pyro.sample("factor", dist.LogNormal(0.0, 1.0))
        heavy = pyro.sample("heavy", dist.HalfCauchy(1.0))
        triangle = pyro.sample("triangle", dist.LKJCholesky(2, 1.0))
        mean = shift + probability * weights[..., 0] + factor * triangle[..., 1, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, scale + rate + heavy), obs=x)

    return model or supports, (torch.randn(N),)


def automatic(make: Callable, model: Callable | None = None) -> Pair:
    model, data = positive_latents(model)
    return model, make(model), data


def lognormals(x):
    a, b = (pyro.param(name, torch.tensor(0.3)) for name in "ab")
    pyro.sample("rate", dist.LogNormal(a, 0.5))
    pyro.sample("heavy", dist.LogNormal(b, 0.5))


def rates(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    heavy = pyro.sample("heavy", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(rate, heavy), obs=x)


def improper(x):
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def improper_guide(x):
    pyro.sample("scale", dist.LogNormal(pyro.param("a", torch.tensor(0.3)), 0.5))


def local(x):
    shared = pyro.sample("shared", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Gamma(shared, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def real(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


class Easy(EasyGuide):
    """A guide whose plates have no stated size."""

    def guide(self, x):
        self.map_estimate("shared")
        with self.plate("data", len(x), subsample_size=3):
            self.map_estimate("z")


class EasyOfAnySize(EasyGuide):
    def guide(self, x):
        loc = pyro.param("loc", torch.full((3,), 0.3))
        self.group().sample("all", dist.Normal(loc, 0.5).to_event(1))


def components(x):
    weights = pyro.sample("weights", dist.Gamma(1.0, 1.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(locs.sum(), weights), obs=x)


def listed(model):
    guides = AutoGuideList(model)
    guides.append(AutoDelta(poutine.block(model, expose=["rate"])))
    guides.append(AutoNormal(poutine.block(model, hide=["rate"])))
    return guides


PAIRS: dict[str, tuple[Callable[[], Pair], Any]] = {
    "bayesian_regression": (lambda: regression(AutoDiagonalNormal), Trace_ELBO),
    "intro_long": (normals_for_a_regression, Trace_ELBO),
    "gmm": (mixture, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "shapes of enumeration": (enumerated_shapes, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "enumeration in the guide": (enumerated_guide, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "shapes of particles": (
        particle_shapes,
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ),
    "shapes of particles, IWAE": (particle_shapes, lambda: pv.IWAE(3)),
    "hmm": (hidden_markov, lambda: TraceEnum_ELBO(max_plate_nesting=2)),
    "lda": (topics, lambda: TraceEnum_ELBO(max_plate_nesting=2)),
    "lda, guessed plates": (topics, TraceEnum_ELBO),
    "cjs": (capture, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "cjs, particles": (
        capture,
        lambda: TraceEnum_ELBO(max_plate_nesting=1, num_particles=2, vectorize_particles=True),
    ),
    "annealed": (scaled_latents, Trace_ELBO),
    "annealed, Rényi": (scaled_latents, lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "gmm, TMC": (mixture, lambda: TraceTMC_ELBO(max_plate_nesting=1)),
    "mle_map, MAP": (coin_map, Trace_ELBO),
    "mle_map, MLE": (coin_mle, Trace_ELBO),
    "svi_part_i": (coin_posterior, Trace_ELBO),
    "svi_part_ii, subsampled loop": (sequential_coins, Trace_ELBO),
    "svi_part_ii, local latents": (sequential_local_latents, Trace_ELBO),
    "a subsample of the guide": (subsampled_by_the_guide, Trace_ELBO),
    "a subsample of the guide, particles": (
        subsampled_by_the_guide,
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=False),
    ),
    "a mask that is drawn": (masked_steps, TraceGraph_ELBO),
    "cevae": (observed_by_both, TraceCausalEffect_ELBO),
    "a site that both observe": (observed_by_both, Trace_ELBO),
    "AutoDelta": (lambda: automatic(AutoDelta), Trace_ELBO),
    "AutoNormal": (lambda: automatic(AutoNormal), Trace_ELBO),
    "AutoNormal, vectorised": (
        lambda: automatic(AutoNormal),
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    ),
    "AutoNormal, mean field": (lambda: automatic(AutoNormal, real), TraceMeanField_ELBO),
    "AutoDiagonalNormal": (lambda: automatic(AutoDiagonalNormal), Trace_ELBO),
    "AutoMultivariateNormal": (lambda: automatic(AutoMultivariateNormal), Trace_ELBO),
    "AutoLowRankMultivariateNormal": (lambda: automatic(AutoLowRankMultivariateNormal), Trace_ELBO),
    "AutoLaplaceApproximation": (lambda: automatic(AutoLaplaceApproximation), Trace_ELBO),
    "AutoGuideList": (lambda: automatic(listed), Trace_ELBO),
    "AutoNormalMessenger": (lambda: automatic(AutoNormalMessenger, components), Trace_ELBO),
    "log-normals for gamma and half-Cauchy": (lambda: automatic(lambda _: lognormals, rates), Trace_ELBO),
    "an improper prior": (lambda: automatic(lambda _: improper_guide, improper), Trace_ELBO),
    "an improper prior, AutoNormal": (
        lambda: automatic(
            partial(AutoNormal, init_loc_fn=init_to_value(values={"scale": torch.tensor(1.0)})), improper
        ),
        Trace_ELBO,
    ),
    "EasyGuide": (lambda: automatic(Easy, local), Trace_ELBO),
    "EasyGuide, plates of any size": (lambda: automatic(EasyOfAnySize, components), Trace_ELBO),
}


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def losses(make: Callable[[], Pair], train: Callable) -> list[float]:
    """Losses of some steps, from the same seed and initial parameters."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, data = make()
    with suppress(AssertionError), poutine.trace(param_only=True) as tracer:
        drawn = poutine.trace(guide).get_trace(*data)
        poutine.replay(model, trace=drawn)(*data)
    parameters = [site["value"].unconstrained() for site in tracer.trace.nodes.values()]
    svi = train(model, guide, parameters)
    torch.manual_seed(1)
    return [svi.step(*data) for _ in range(STEPS)]


def test_an_automatic_guide_of_a_positive_scale_has_pyros_loss():
    def model(x):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("N", 50):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    torch.manual_seed(0)
    x = torch.randn(50)
    torch.manual_seed(1)
    guide = AutoNormal(model)
    guide._setup_prototype(x)  # makes the parameters
    svi = pv.SVI(model, guide, torch.optim.Adam(guide.parameters(), 0.01), Trace_ELBO())
    assert svi.step(x) == pytest.approx(76.8696, abs=1e-4)  # of pyro.infer.SVI, which makes them itself
    pyro.clear_param_store()


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", PAIRS)
def test_pyros_programs_have_the_same_losses_as_under_pyros_svi(name):
    make, estimator = PAIRS[name]
    expected = losses(
        make, lambda model, guide, _: SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), estimator())
    )
    found = losses(
        make,
        lambda model, guide, parameters: pv.SVI(
            model, guide, torch.optim.Adam(parameters, 0.01), estimator(), engine="eager"
        ),
    )
    assert found == pytest.approx(expected, rel=1e-10)
