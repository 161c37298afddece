"""Latent dimensions of guides and priors that do not factorise, and of sites with further plates."""

import math

import pyro
import pyro.distributions as dist
import torch
from solved import within

from pyro_vae import terms
from pyro_vae.distributions import NormalMixture
from pyro_vae.evaluation.latents import marginals, summarise_latents

N, K, S = 4, 3, 6


def run(q, p, *, num_particles=S):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return summarise_latents(terms(model, guide, torch.zeros(N).double(), num_particles=num_particles).sites)


def normal(loc=0.0, scale=1.0):
    return dist.Normal(torch.full((K,), loc).double(), scale).to_event(1)


def covariance():
    A = torch.randn(N, K, K).double()
    return A @ A.mT + torch.eye(K).double()


def test_correlated_dimensions_have_the_kl_of_their_marginals():
    loc, sigma = torch.randn(N, K).double(), covariance()
    q = dist.MultivariateNormal(loc, sigma)
    found = run(q, normal(0.3, 2.0))
    variance = sigma.diagonal(dim1=1, dim2=2)
    expected = math.log(2) - variance.log() / 2 + (variance + (loc - 0.3) ** 2) / 8 - 0.5
    torch.testing.assert_close(found.kl, expected)
    torch.testing.assert_close(found.mean, loc)
    assert (found.mean_variance < 1e-30).all()
    factor, diagonal = torch.randn(N, K, 2).double(), torch.rand(N, K).double() + 0.1
    low_rank = dist.LowRankMultivariateNormal(loc, factor, diagonal)
    full = dist.MultivariateNormal(loc, low_rank.covariance_matrix)
    torch.testing.assert_close(run(low_rank, normal()).kl, run(full, normal()).kl)


def test_mixtures_have_the_kl_of_their_marginals():
    logits, loc = torch.randn(N, 2).double(), torch.randn(N, 2, K).double()
    scale = torch.rand(N, 2, K).double() + 0.5
    q = NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
    each = marginals(q)
    z = torch.linspace(-12, 12, 8001).double()
    log_q = each.log_prob(z[:, None, None])
    kl = torch.trapezoid(log_q.exp() * (log_q - dist.Normal(0.0, 1.0).log_prob(z)[:, None, None]), z, dim=0)
    found = run(q, normal(), num_particles=4000)
    draws = q.sample((4000,))
    spread = (each.log_prob(draws) - normal().base_dist.log_prob(draws)).std(0)
    within(found.kl, kl, spread / math.sqrt(4000))
    torch.testing.assert_close(found.mean, (logits.softmax(-1)[..., None] * loc).sum(1))


def test_the_kl_is_nan_where_the_marginals_are_unknown():
    flow = dist.TransformedDistribution(normal().expand([N]), [dist.transforms.Planar(K).double()])
    found = run(flow, normal())
    assert found.kl.isnan().all()
    assert found.mean.isfinite().all()
    assert (found.mean_variance > 0).all()


def test_sites_and_plates_are_concatenated():
    loc = torch.randn(2, N, 1).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            with pyro.plate("rows", 2, dim=-2):
                a = pyro.sample("a", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(a[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b", dist.Normal(x, 1.0))
            with pyro.plate("rows", 2, dim=-2):
                pyro.sample("a", dist.Normal(loc, 0.5).to_event(1))

    x = torch.randn(N).double()
    t = terms(model, guide, x, num_particles=S, max_plate_nesting=2)
    found = summarise_latents(t.sites)
    assert found.names == ["b", "a[0]", "a[1]"]
    torch.testing.assert_close(found.mean, torch.stack([x, loc[0, :, 0], loc[1, :, 0]], dim=1))
    torch.testing.assert_close(found.kl.sum(1), t.kl)
