"""Mixed precision: networks in bfloat16, densities, divergences and bounds in float32."""

import pyro.distributions as dist
import pytest
import torch
from parts import EVENT, GUIDES, PRIORS, K
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae import likelihoods

LIKELIHOODS = [likelihoods.Bernoulli, likelihoods.ContinuousBernoulli, likelihoods.Normal]
LIKELIHOODS += [likelihoods.DiscretizedLogistic, likelihoods.Poisson, likelihoods.NegativeBinomial]
LIKELIHOODS += [likelihoods.BetaBinomial]


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def make(guide="DiagonalNormal", prior="StandardNormal", likelihood=likelihoods.Bernoulli):
    torch.manual_seed(0)
    prior = PRIORS[prior]()
    likelihood = likelihood(K, EVENT, hidden_features=(16,))
    return pv.VAE(prior=prior, likelihood=likelihood, guide=GUIDES[guide]())


X = torch.randint(0, 2, (13, *EVENT), generator=torch.Generator().manual_seed(1)).float()


def losses(vae, estimator):
    found = []
    for context in (bf16(), torch.autocast("cpu", enabled=False)):
        torch.manual_seed(2)
        with context:
            found.append(estimator.differentiable_loss(vae.model, vae.guide, X))
    return found


@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_computes_its_densities_without_autocast(guide):
    vae = make(guide=guide)
    low, high = losses(vae, Trace_ELBO())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0.01, atol=0)
    with bf16():
        q = vae.encode(X)
        z = q.rsample()
        assert z.dtype == torch.float32
        within = q.log_prob(z)
    torch.testing.assert_close(within, q.log_prob(z.clone()), rtol=1e-4, atol=1e-4)  # same q, no autocast


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior(prior):
    low, high = losses(make(prior=prior), Trace_ELBO())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0.01, atol=0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda c: c.__name__)
def test_every_likelihood(likelihood):
    low, high = losses(make(likelihood=likelihood), TraceMeanField_ELBO())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0.01, atol=0)


def test_a_vae_in_bfloat16_stays_in_it():
    vae = make().to(torch.bfloat16)
    assert vae.encode(X.bfloat16()).rsample().dtype == torch.bfloat16


def test_without_autocast_an_input_of_another_dtype_raises():
    with pytest.raises(TypeError, match=r"torch.bfloat16, the parameters are torch.float32"):
        make().encode(X.bfloat16())
    assert isinstance(make().encode(X), dist.Distribution)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_fit_in_bf16_ends_within_the_error_of_float32(engine):
    x, test = (pv.data.load("digits", split=split, binarize="fixed") for split in ("train", "test"))
    found = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(3)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(8),
            likelihood=likelihoods.Bernoulli(8, (1, 28, 28), hidden_features=(64,)),
            guide=pv.guides.DiagonalNormal((1, 28, 28), 8, hidden_features=(64,)),
        )
        options = {"epochs": 3, "batch_size": 100, "engine": engine, "progress": False}
        history = pv.fit(vae, x, validation=test, precision=precision, **options)
        found[precision] = history[-1]
        assert next(vae.parameters()).dtype == torch.float32
    low, high = found["bf16"], found["float32"]
    assert low.validation_elbo != high.validation_elbo
    assert abs(low.validation_elbo - high.validation_elbo) < high.validation_elbo_se


def test_an_unknown_precision_raises():
    with pytest.raises(ValueError, match="precision must be one of float32, bf16; got 'fp8'"):
        pv.fit(make(), X, precision="fp8", progress=False)


@pytest.mark.parametrize("guide", ["FullCovarianceNormal", "LowRankNormal", "Mixture"])
def test_gradients_of_densities_are_in_full_precision(guide):
    """The gradient in the outputs of the networks: what autocast leaves to the densities."""
    q = GUIDES[guide]()
    raw = [part.detach().requires_grad_() for part in q.outputs(X)]
    found = {}
    for precision in ("bf16", "float32"):
        torch.manual_seed(5)
        with bf16() if precision == "bf16" else torch.autocast("cpu", enabled=False):
            family = q.distribution(*raw)
            z = family.rsample()
            loss = (family.log_prob(z) * z.sum(-1)).sum()
        found[precision] = torch.autograd.grad(loss, raw)
    for low, high in zip(found["bf16"], found["float32"], strict=True):
        torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-5)


def test_a_step_takes_its_backward_pass_without_autocast():
    """As if autocast had been left before it."""
    gradients = {}
    for inside in (True, False):
        vae = make(guide="Mixture")
        optimizer = torch.optim.SGD(vae.parameters(), 0.0)
        torch.manual_seed(2)
        if inside:
            with bf16():
                pv.SVI(vae.model, vae.guide, optimizer, Trace_ELBO(), engine="eager").step(X)
        else:
            with bf16():
                loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, X)
            loss.backward()
        gradients[inside] = [p.grad for p in vae.parameters()]
    assert all(map(torch.equal, gradients[True], gradients[False]))
