"""Sites that the model enumerates and the guide lacks are summed out: terms against sums by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vae as pv

N, S, C, V, T = 5, 4, 3, 6, 7

pytestmark = pytest.mark.usefixtures("double")

LOCS = torch.tensor([-2.0, 0.5, 1.0], dtype=torch.float64)
PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def guide(x, *_):
    first = x.reshape(len(x), -1)[:, 0]
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(first / 2, 0.7))


def mixture_of_likelihoods(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z * (1 + y), 0.5), obs=x)


def mixture_prior(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(LOCS[y], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_hand(z, x, name):
    """Return log p(x|z) and log p(z), (S, N)."""
    z, classes = z[..., None], torch.arange(C)
    if name == "likelihood":
        p_x = dist.Normal(z * (1 + classes), 0.5).log_prob(x[:, None]) + PROBS.log()
        return p_x.logsumexp(-1), dist.Normal(0.0, 1.0).log_prob(z[..., 0])
    p_z = (dist.Normal(LOCS, 1.0).log_prob(z) + PROBS.log()).logsumexp(-1)
    return dist.Normal(z[..., 0], 0.5).log_prob(x), p_z


@pytest.mark.parametrize("num_particles", [1, S])
@pytest.mark.parametrize(
    ("model", "name"), [(mixture_of_likelihoods, "likelihood"), (mixture_prior, "prior")]
)
def test_terms_are_sums_over_the_values(model, name, num_particles):
    x = torch.randn(N)
    t = pv.terms(model, guide, x, num_particles=num_particles)
    z = t.sites.draws["z"].reshape(num_particles, N)
    log_likelihood, log_prior = by_hand(z, x, name)
    torch.testing.assert_close(t.log_likelihood, log_likelihood, rtol=0, atol=1e-10)
    torch.testing.assert_close(t.log_prior, log_prior, rtol=0, atol=1e-10)
    assert (t.kl is None) == (name == "prior")
    assert list(t.by_site()) == ["x"]
    torch.testing.assert_close(t.by_site()["x"], t.log_likelihood, rtol=0, atol=1e-10)
    if name == "likelihood":
        with pytest.raises(ValueError, match="'x' depends on values that are summed out"):
            t.by_element("x")


@pytest.mark.parametrize("model", [mixture_of_likelihoods, mixture_prior])
def test_the_elbo_is_that_of_pyro(model):
    x = torch.randn(N)
    torch.manual_seed(3)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    draws = poutine.trace(guide)
    torch.manual_seed(3)
    trace = draws.get_trace(x)
    t = pv.terms(model, poutine.replay(guide, trace=trace), x)
    assert -t.log_weight.sum().item() == pytest.approx(loss, abs=1e-10)


def test_values_within_a_plate_of_the_example_are_summed_each():
    """Words of a document, each with a topic of its own, as in a topic model."""
    words = torch.randint(V, (N, T))
    topics = torch.randn(C, V).log_softmax(-1)
    counted = torch.rand(N, T) < 0.7

    def model(x):
        with pyro.plate("data", N, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(N, 1, C), 1.0).to_event(1))
            with pyro.plate("words", T, dim=-1), poutine.mask(mask=counted):
                topic = pyro.sample("topic", dist.Categorical(logits=z), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Categorical(logits=topics[topic]), obs=x)

    def of_documents(x):
        with pyro.plate("data", N, dim=-2):
            pyro.sample("z", dist.Normal(torch.ones(N, 1, C), 0.5).to_event(1))

    t = pv.terms(model, of_documents, words, num_particles=S, max_plate_nesting=2)
    z = t.sites.draws["z"].reshape(S, N, 1, C)
    each = (z.log_softmax(-1) + topics[:, words].movedim(0, -1)).logsumexp(-1)
    expected = torch.where(counted, each, 0.0).sum(-1)
    torch.testing.assert_close(t.log_likelihood, expected, rtol=0, atol=1e-10)
    report = pv.evaluate(
        (model, of_documents), words, num_particles=20, max_plate_nesting=2, aggregate_size=0, progress=False
    )
    assert report.num_dimensions == float(counted.sum()) / N


def test_a_chain_of_hidden_states_is_summed_by_messages():
    x = torch.randn(N, T)
    transition = torch.randn(C, C).log_softmax(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            state = 0
            for t in pyro.markov(range(T)):
                state = pyro.sample(
                    f"y_{t}", dist.Categorical(logits=transition[state]), infer={"enumerate": "parallel"}
                )
                pyro.sample(f"x_{t}", dist.Normal(LOCS[state] + z, 1.0), obs=x[:, t])

    t = pv.terms(model, guide, x, num_particles=S)
    z = t.sites.draws["z"]
    message = transition[0].expand(S, N, C)
    for step in range(T):
        seen = message + dist.Normal(LOCS + z[..., None], 1.0).log_prob(x[:, step, None])
        message = (seen[..., None] + transition).logsumexp(-2)
    torch.testing.assert_close(t.log_likelihood, seen.logsumexp(-1), rtol=0, atol=1e-10)
    assert list(t.by_site()) == [" and ".join(f"x_{step}" for step in range(T))]


def test_sites_that_do_not_depend_on_the_values_stay_apart():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(1.0, 1.0), obs=x)
            y = pyro.sample("y", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z * (1 + y), 0.5), obs=x)

    x = torch.randn(N)
    t = pv.terms(model, guide, x, num_particles=S)
    w = dist.Normal(1.0, 1.0).log_prob(x)
    torch.testing.assert_close(t.by_site()["w"], w.expand(S, N), rtol=0, atol=1e-10)
    expected = by_hand(t.sites.draws["z"], x, "likelihood")[0]
    torch.testing.assert_close(t.by_site()["x"], expected, rtol=0, atol=1e-10)
    assert t.by_element("w").shape == (S, N)


@pytest.mark.parametrize("estimator", [pv.IWAE(S), pv.STL(S), pv.DReG(S)])
@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_importance_weighted_bounds_are_trained(estimator, engine):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.locs, self.shift = torch.nn.Parameter(LOCS.clone()), torch.nn.Parameter(torch.zeros(()))

        def model(self, x):
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(self.locs[y], 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.8 * x + self.shift, 0.6))

    x = torch.randn(N) * 2
    pair = Pair()
    svi = pv.SVI(pair, torch.optim.Adam(pair.parameters(), 0.05), estimator, engine=engine)
    torch.manual_seed(1)
    assert all(math.isfinite(svi.step(x)) for _ in range(9))
    assert not torch.equal(pair.locs.detach(), LOCS)

    by_hand_locs = pair.locs.detach().clone().requires_grad_()
    pair.zero_grad()
    torch.manual_seed(2)
    t = pv.terms(pair, x, num_particles=S)
    t.log_weight.logsumexp(0).sum().backward()
    z = t.sites.draws["z"].detach()
    p_z = (dist.Normal(by_hand_locs, 1.0).log_prob(z[..., None]) + PROBS.log()).logsumexp(-1)
    (t.log_weight.detach().softmax(0) * p_z).sum().backward()
    torch.testing.assert_close(pair.locs.grad, by_hand_locs.grad, rtol=0, atol=1e-10)


def test_the_evidence_is_exact():
    """A mixture of normals with a latent shift: p(x) is a mixture too."""
    x = torch.randn(N) * 2
    exact = torch.stack([dist.Normal(loc, math.sqrt(1.25)).log_prob(x) for loc in LOCS], -1) + PROBS.log()

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.9 * x, 1.0))

    report = pv.evaluate((mixture_prior, wide), x, num_particles=5000, aggregate_size=0, progress=False)
    error = report.per_datum.log_evidence - exact.logsumexp(-1)
    assert (error.abs() < 5 * report.per_datum.log_evidence_mc_se).all()
    assert math.isnan(report.kl_per_dimension[0])


def test_fit_validates_by_terms():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.locs = torch.nn.Parameter(LOCS.clone())

        @config_enumerate
        def model(self, x):
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(PROBS))
                z = pyro.sample("z", dist.Normal(self.locs[y], 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.8 * x, 0.6))

    history = pv.fit(Pair(), torch.randn(40), validation=0.25, epochs=2, batch_size=10, progress=False)
    assert math.isfinite(history[-1].validation_elbo)
    assert history[-1].validation_elbo_se > 0


def test_a_guide_that_draws_nothing_has_no_terms():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LOCS[y], 0.5), obs=x)

    x = torch.randn(N)
    with pytest.raises(ValueError, match="all latent sites, such as 'y', are summed out"):
        pv.terms(model, lambda x: None, x)
    report = pv.evaluate((model, lambda x: None), x, num_particles=1, progress=False)
    exact = (dist.Normal(LOCS, 0.5).log_prob(x[:, None]) + PROBS.log()).logsumexp(-1).mean()
    assert report.elbo == pytest.approx(float(exact), abs=1e-10)
