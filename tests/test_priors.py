import copy
import math

import pyro
import pytest
import torch
from parts import EVENT, GUIDES, PRIORS, K, N, S, plane
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Renyi
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.log_terms import terms
from pyro_vae.utils.serialization import rebuild, spec

every_prior = pytest.mark.parametrize("name", PRIORS)

ESTIMATORS = [
    Trace_ELBO(S, 1, vectorize_particles=True),
    TraceMeanField_ELBO(S, 1, vectorize_particles=True),
    TraceGraph_ELBO(2),
    IWAE(S),
    IWAE(2, 3),
    PIWAE(2, 3),
    CIWAE(0.3, S),
    Renyi(0.5, S),
    STL(S),
    DReG(S),
    VIMCO(S),
    KLWeighted(IWAE(S), 0.5),
]


def data(*batch):
    return torch.randn(*batch, *EVENT, dtype=torch.float64)


def make_vae(prior, guide=None):
    guide = guide or guides.DiagonalNormal(EVENT, K, hidden_features=(7,))
    likelihood = likelihoods.Normal(K, EVENT, hidden_features=(6,), variance=0.3)
    return pv.VAE(prior=prior, likelihood=likelihood, guide=guide).double()


# Properties of every prior


@every_prior
def test_shapes(name):
    p = PRIORS[name](K=4).double()()
    assert (p.batch_shape, p.event_shape) == ((), (4,))
    assert p.sample((S,)).shape == (S, 4)
    z = torch.randn(S, N, 4).double()
    assert p.log_prob(z).shape == (S, N)
    expanded = p.expand((S, N))
    assert expanded.sample().shape == (S, N, 4)
    torch.testing.assert_close(expanded.log_prob(z), p.log_prob(z), rtol=1e-10, atol=1e-10)
    assert PRIORS[name](K=1)().sample().shape == (1,)


@every_prior
def test_the_density_is_normalised_and_that_of_the_draws(name):
    p = PRIORS[name]().double()()
    grid, area = plane()
    density = p.log_prob(grid).detach().exp() * area
    kinks = 2e-3 if "flow" in name.lower() else 1e-10
    assert density.sum().item() == pytest.approx(1, abs=kinks)

    def features(z):
        a, b = z[..., 0], z[..., 1]
        return torch.stack([a, b, a * b, a**2, b**2, (a + 2 * b).cos(), (a * b).sin()], -1)

    exact = (density.unsqueeze(-1) * features(grid)).sum(0)
    draws = features(p.sample((20_000,)))
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / math.sqrt(len(draws)) + kinks).all()


@every_prior
def test_it_trains_under_upstream_svi_and_is_sampled(name):
    vae, x = make_vae(PRIORS[name]()), data(N)
    old = copy.deepcopy(vae)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    for _ in range(60):
        svi.step(x)
    loss = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss
    assert loss(vae.model, vae.guide, x) < loss(old.model, old.guide, x)
    moved = [(p != q).any() for p, q in zip(vae.parameters(), old.parameters(), strict=True)]
    assert all(moved)
    assert vae.sample(S).shape == (S, *EVENT)
    vae.check_data(x)


@every_prior
def test_it_is_rebuilt_from_its_description(name, tmp_path):
    vae = make_vae(PRIORS[name]())
    vae.save(tmp_path / "vae.pt")
    z = torch.randn(N, K).double()
    assert torch.equal(pv.VAE.load(tmp_path / "vae.pt").prior().log_prob(z), vae.prior().log_prob(z))


@pytest.mark.parametrize("guide", GUIDES)
@every_prior
def test_every_guide_and_estimator_goes_with_it(name, guide):
    """On the same draws the estimators' terms are the densities, and each gives finite gradients."""
    vae, x = make_vae(PRIORS[name](), GUIDES[guide]()), data(N)
    run = terms(vae.model, vae.guide, x, num_particles=S)
    z = run.sites.draws["z"].detach()
    q, p = vae.encode(x), vae.prior()
    torch.testing.assert_close(run.log_prior, p.log_prob(z), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(run.log_guide, q.log_prob(z), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(run.log_likelihood + run.log_prior, vae.log_joint(x, z), rtol=1e-8, atol=1e-8)
    normal = name in ("StandardNormal", "LearnedNormal")
    assert (run.kl is not None) == (
        normal and guide in ("DiagonalNormal", "FullCovarianceNormal", "LowRankNormal")
    )
    assert_every_estimator_trains(vae, x)


@every_prior
def test_every_estimator_goes_with_it_and_a_refined_guide(name):
    guide = guides.SemiAmortised(GUIDES["FullCovarianceNormal"](), num_steps=2)
    assert_every_estimator_trains(make_vae(PRIORS[name](), guide), data(N))


def assert_every_estimator_trains(vae, x):
    for estimator in ESTIMATORS:
        vae.zero_grad()
        assert math.isfinite(estimator.loss_and_grads(vae.model, vae.guide, x)), estimator
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in vae.parameters()), estimator


def test_every_prior_of_the_package_is_in_the_table():
    assert {type(make()) for make in PRIORS.values()} == {getattr(priors, name) for name in priors.__all__}


# Each prior


def test_a_learned_normal_starts_as_the_standard_one():
    z = torch.randn(N, K)
    torch.testing.assert_close(priors.LearnedNormal(K)().log_prob(z), priors.StandardNormal(K)().log_prob(z))


def test_a_mixture_starts_with_equal_weights():
    prior = priors.Mixture(K, num_components=3)
    z = torch.randn(N, K)
    normal = torch.distributions.Normal(prior.loc, 1.0)
    expected = normal.log_prob(z.unsqueeze(1)).sum(-1).exp().mean(-1).log()
    torch.testing.assert_close(prior().log_prob(z), expected)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_vamp_prior_is_the_average_of_the_guide(guide):
    guide = GUIDES[guide]().double()
    prior = priors.VampPrior(guide, num_components=4).double()
    nn.init.normal_(prior.logits)
    u, z = data(4), torch.randn(N, K).double()
    prior.set_pseudo_inputs(u)
    densities = torch.stack([guide(u[c]).log_prob(z).exp() for c in range(4)])
    expected = (prior.logits.softmax(0) @ densities).log()
    torch.testing.assert_close(prior().log_prob(z), expected, rtol=1e-8, atol=1e-8)


def test_a_vamp_prior_shares_the_guide_also_when_copied_and_rebuilt(tmp_path):
    guide = GUIDES["DiagonalNormal"]()
    vae = make_vae(priors.VampPrior(guide, num_components=4), guide)
    vae.save(tmp_path / "vae.pt")
    for shared in (vae, copy.deepcopy(vae), pv.VAE.load(tmp_path / "vae.pt")):
        assert shared.prior.guide is shared.posterior
        old = shared.prior().component_distribution.mean
        SVI(shared.model, shared.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(data(N))
        assert (shared.prior().component_distribution.mean != old).all()
    kept = vae.with_guide(GUIDES["DiagonalNormal"]().double())
    assert kept.prior.guide is not kept.posterior


def test_a_vamp_prior_of_a_users_guide():
    class Guide(nn.Module):
        def forward(self, x):
            return pyro.distributions.Normal(x, 1.0).to_event(1)

    prior = priors.VampPrior(Guide(), event_shape=(K,), num_components=4)
    assert prior().sample((S,)).shape == (S, K)
    assert spec(prior) is None


def test_parts_that_are_not_shared_are_rebuilt_apart():
    vae = make_vae(priors.VampPrior(GUIDES["DiagonalNormal"]()))
    other = rebuild(spec(vae))
    assert other.prior.guide is not other.posterior


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.LearnedNormal(0), "latent_dim must be at least 1; got 0"),
        (lambda: priors.Mixture(K, num_components=0), "num_components must be at least 1; got 0"),
        (lambda: priors.Flow(0), "latent_dim must be at least 1; got 0"),
        (lambda: priors.Flow(K, flow="real"), "flow must be one of maf, iaf, nsf; got 'real'"),
        (lambda: priors.VampPrior(nn.Linear(2, 2)), "Linear has no attribute event_shape: pass event_shape="),
        (lambda: priors.VampPrior(GUIDES["DiagonalNormal"](), num_components=0), "num_components must be"),
        (
            lambda: priors.VampPrior(GUIDES["DiagonalNormal"]()).set_pseudo_inputs(torch.zeros(3, *EVENT)),
            r"x must have shape \(100, 2, 4\); got \(3, 2, 4\)",
        ),
        (lambda: rebuild({"again": 0}), "part 0 is used again, but only 0 parts stand before it"),
    ],
)
def test_wrong_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_learned_priors_start_at_unit_scale():
    torch.testing.assert_close(priors.LearnedNormal(3)().base_dist.scale, torch.ones(3), rtol=0, atol=1e-6)
    mixture = priors.Mixture(3, num_components=2)()
    scale = mixture.component_distribution.base_dist.scale
    torch.testing.assert_close(scale, torch.ones(2, 3), rtol=0, atol=1e-6)
