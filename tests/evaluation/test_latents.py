"""Latent dimensions of guides and priors that do not factorise, and of sites with further plates."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from solved import within

from pyro_vae import terms
from pyro_vae.data.batches import Batches
from pyro_vae.distributions import NormalMixture
from pyro_vae.evaluation.latents import _AGGREGATE, aggregate_posterior, marginals, summarise_latents
from pyro_vae.utils.isolation import derived_seed, seed_at, seed_generators

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


def test_other_plates_count_as_a_sum_in_the_aggregate_posterior():
    N, P = 5, 3

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            whole = pyro.sample("whole", dist.Normal(0.0, 1.0).expand([len(x), 1]))
            with pyro.plate("parts", P, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), P]))
                pyro.sample("x", dist.Normal(whole + z, 1.0), obs=x)

    def q_whole(x):
        return dist.Normal(x.mean(-1, keepdim=True), 0.4)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("whole", q_whole(x))
            with pyro.plate("parts", P, dim=-1):
                pyro.sample("z", dist.Normal(x / 2, 0.6))

    x = torch.randn(N, P)
    pair = SimpleNamespace(model=model, guide=guide)
    found = aggregate_posterior(pair, Batches(x, seed=7), max_plate_nesting=2)
    seed_generators(torch.device("cpu"), seed_at(derived_seed(7, _AGGREGATE), 0))
    draws = terms(model, guide, x, max_plate_nesting=2).sites.draws
    log_q = dist.Normal(x / 2, 0.6).log_prob(draws["z"].reshape(N, 1, P)).sum(-1)  # draw n under example m
    log_q = log_q + q_whole(x).log_prob(draws["whole"].reshape(N, 1, 1)).squeeze(-1)
    torch.testing.assert_close(found.log_guide, log_q.diagonal().double(), rtol=1e-5, atol=1e-5)
    expected = log_q.logsumexp(1) - math.log(N)
    torch.testing.assert_close(found.log_aggregate, expected.double(), rtol=1e-5, atol=1e-5)


def test_masked_values_have_no_kl():
    counted = torch.tensor([True, False, True, False, False])

    def model(x):
        with pyro.plate("data", 5), pyro.poutine.mask(mask=counted):
            z = pyro.sample("z", dist.Normal(torch.zeros(5, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5), pyro.poutine.mask(mask=counted):
            pyro.sample("z", dist.Normal(torch.tensor([1.0, 2.0]).expand(5, 2), 1.0).to_event(1))

    t = terms(model, guide, torch.zeros(5), num_particles=3)
    found = summarise_latents(t.sites).kl
    torch.testing.assert_close(found, counted[:, None] * torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(found.sum(-1), t.kl)


def test_the_aggregate_posterior_scores_two_million_values_at_once():
    D, N = 2**15, 11

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(D), 0.9).to_event(1))

    counts = []
    pair = SimpleNamespace(model=model, guide=guide)
    aggregate_posterior(pair, Batches(torch.zeros(N), seed=7), advance=counts.append)
    assert counts == [8 * 8, 8 * 3, 3 * 8, 3 * 3]  # 8 draws of 8 examples: 2⁶ · 2¹⁵ values
