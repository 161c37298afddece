"""Imputation and denoising: exact in the linear-Gaussian model, calibrated, and careful with input."""

import math

import numpy as np
import pytest
import torch
from solved import D, K, data, linear_gaussian, within
from torch import nn

import pyro_vae as pv
from pyro_vae.applications import corruptions, denoise, impute, pool
from pyro_vae.applications.conditioning import _inverse_log_ndtr, condition
from pyro_vae.applications.corruptions import (
    BitFlip,
    CorruptionError,
    Erase,
    LinearMap,
    Normal,
    Poisson,
    Quantise,
)
from pyro_vae.distributions import Bernoulli, BetaBinomial, DiscretizedLogistic

N, M = 7, 400


def gaps(x, seed=4):
    """Missing entries at random: one example without any observed entry, one without any missing."""
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    missing[1], missing[2] = True, False
    return missing, torch.where(missing, math.nan, x)


def exact_conditional(exact, y, observed, noise_variance):
    """Mean and covariance of x given y = x + noise where observed, for N(b, WWᵀ + cI)."""
    covariance = exact.W @ exact.W.T + exact.noise_variance * torch.eye(D, dtype=torch.float64)
    known = covariance[observed][:, observed] + noise_variance * torch.eye(int(observed.sum())).double()
    gain = torch.linalg.solve(known, covariance[observed]).T if observed.any() else covariance[:, observed]
    mean = exact.b + gain @ (y - exact.b)[observed]
    return mean, covariance - gain @ covariance[observed]


def exact_moments(exact, y, missing, noise_variance=0.0):
    parts = [
        exact_conditional(exact, row, ~gone, noise_variance) for row, gone in zip(y, missing, strict=True)
    ]
    return torch.stack([mean for mean, _ in parts]), torch.stack(
        [c.diagonal().clamp(min=0.0) for _, c in parts]
    )


# Exact answers


@pytest.mark.parametrize("method", ["importance", "metropolis", "auto"])
def test_the_conditional_of_a_linear_gaussian_is_exact(method):
    exact, vae = linear_gaussian(scale=1.5)
    x = data(exact, N)
    missing, holes = gaps(x)
    found = impute(vae, holes, method=method, num_particles=8000, num_draws=M)
    mean, variance = exact_moments(exact, x, missing)
    # E[x|z] varies less than x, so that this error is an upper bound; with chains, an estimate from 20
    size, count = found.effective_sample_size[:, None], 5 if method == "metropolis" else 3
    within(found.mean, mean, (variance / size).sqrt() + 1e-9, count=count)  # and rounding
    within(found.std**2, variance, variance * (2 / size).sqrt() + 1e-9, count=count)
    within(found.draws.mean(0), mean, (variance / min(M, 200)).sqrt() + 1e-9)
    assert (found.std == 0).equal(~missing)


@pytest.mark.parametrize("method", ["importance", "metropolis"])
def test_denoising_a_linear_gaussian_is_exact(method):
    exact, vae = linear_gaussian(scale=1.5)
    x, sigma = data(exact, N), 0.8
    y = x + sigma * torch.randn(N, D, generator=torch.Generator().manual_seed(3)).double()
    missing, holes = gaps(y)
    found = denoise(vae, holes, corruption=Normal(sigma), method=method, num_particles=8000, num_draws=M)
    mean, variance = exact_moments(exact, y, missing, sigma**2)
    size, count = found.effective_sample_size[:, None], 5 if method == "metropolis" else 3
    within(found.mean, mean, (variance / size).sqrt(), count=count)
    within(found.std**2, variance, variance * (2 / size).sqrt(), count=count)
    within(found.draws.mean(0), mean, (variance / 150).sqrt())
    # Erase hides what the noise would have left
    same = denoise(
        vae, y, corruption=Erase(missing, then=Normal(sigma)), method=method, num_particles=8000, num_draws=M
    )
    assert torch.equal(same.mean, found.mean)


@pytest.mark.parametrize("method", ["importance", "metropolis"])
def test_linear_maps_of_a_linear_gaussian_are_exact(method):
    """y = A x + noise, three numbers of five; some are missing, and all of them for one example."""
    exact, vae = linear_gaussian(scale=1.5)
    A = torch.randn(3, D, generator=torch.Generator().manual_seed(5)).double()
    x, sigma = data(exact, N), 0.4
    y = x @ A.T + sigma * torch.randn(N, 3, generator=torch.Generator().manual_seed(3)).double()
    y[1], y[2, 1] = math.nan, math.nan
    covariance = exact.W @ exact.W.T + exact.noise_variance * torch.eye(D).double()
    found = denoise(
        vae, y, corruption=LinearMap(A, sigma), method=method, num_particles=8000, num_draws=M, seed=1
    )
    for row in range(N):
        seen = A[~y[row].isnan()]
        gain = covariance @ seen.T @ (seen @ covariance @ seen.T + sigma**2 * torch.eye(len(seen))).inverse()
        mean = exact.b + gain @ (y[row][~y[row].isnan()] - seen @ exact.b)
        posterior = covariance - gain @ seen @ covariance
        variance, size = posterior.diagonal(), found.effective_sample_size[row]
        within(found.mean[row], mean, (variance / size).sqrt())
        within(found.std[row] ** 2, variance, variance * (2 / size).sqrt())
        within(found.draws[:, row].mean(0), mean, (variance / 150).sqrt())
        outer = variance[:, None] * variance
        within(found.draws[:, row].T.cov(), posterior, (2 * outer / 150).sqrt())


def test_conditioning_on_a_linear_map_given_z():
    """log p(y|z) and the moments of x given y, z, of images of shape (2, 3), by dense matrices."""
    random = torch.Generator().manual_seed(0)
    loc, scale = torch.randn(4, 5, 2, 3, generator=random).double(), 0.7
    A, y = torch.randn(4, 6, generator=random).double(), torch.randn(5, 4, generator=random).double()
    missing = torch.zeros(5, 4).bool()
    missing[2, 1] = True
    base = torch.distributions.Normal(loc, scale * (1 + loc.square()).sqrt())
    found = condition(base, y, missing, LinearMap(A, 0.3), event_dim=2)
    mean, variance = found.moments()
    assert found.log_prob().shape == (4, 5, 1)
    for s, n in [(0, 0), (3, 2)]:
        seen, prior = A[~missing[n]], base.variance[s, n].flatten().diag()
        of_y = seen @ prior @ seen.T + 0.09 * torch.eye(len(seen)).double()
        y_seen, m = y[n][~missing[n]], loc[s, n].flatten()
        density = torch.distributions.MultivariateNormal(seen @ m, of_y).log_prob(y_seen)
        gain = prior @ seen.T @ of_y.inverse()
        torch.testing.assert_close(found.log_prob()[s, n, 0], density, rtol=1e-10, atol=1e-10)
        expected = m + gain @ (y_seen - seen @ m)
        torch.testing.assert_close(mean[s, n].flatten(), expected, rtol=1e-10, atol=1e-10)
        expected = (prior - gain @ seen @ prior).diagonal()
        torch.testing.assert_close(variance[s, n].flatten(), expected, rtol=1e-10, atol=1e-10)
    loc[:] = loc[3, 2].clone()  # so that all (4, 5) are alike but for y, and for what is missing
    many = torch.distributions.Normal(loc[:1].expand(4000, 5, 2, 3), 0.7)
    found = condition(many, y, missing, LinearMap(A, 0.9), event_dim=2)
    mean, variance = found.moments()
    x = found.sample()
    within(x.mean(0), mean[0], (variance[0] / 4000).sqrt())
    within(x.var(0), variance[0], variance[0] * (2 / 4000) ** 0.5)


def test_the_identity_is_a_linear_map():
    exact, vae = linear_gaussian(scale=1.5)
    x = data(exact, N)
    identity = LinearMap(torch.eye(D), 0.8)
    options = {"num_particles": 50, "method": "importance"}
    # of normal noise the guide encodes y itself, of a map what x may have been: more draws agree
    same = denoise(vae, x, corruption=Normal(0.8), num_particles=20000, method="importance")
    found = denoise(vae, x, corruption=identity, num_particles=20000, method="importance")
    within(found.mean, same.mean, 2 * found.std / found.effective_sample_size.sqrt()[:, None])
    assert denoise(vae, x[:, :3], corruption=LinearMap(torch.eye(D)[:3], 0.8), **options).mean.shape == (N, D)


def test_erasing_is_imputing():
    exact, vae = linear_gaussian(scale=1.5)
    x = data(exact, N)
    missing, holes = gaps(x)
    imputed = impute(vae, holes, num_particles=50, num_draws=3, seed=2)
    erased = denoise(vae, x, corruption=Erase(missing), num_particles=50, num_draws=3, seed=2)
    assert torch.equal(imputed.draws, erased.draws)


def test_denoising_has_a_smaller_error_than_reconstructing_on_data_of_the_model():
    exact, vae = linear_gaussian()
    x = data(exact, 300)
    y = x + 0.8 * torch.randn(300, D, generator=torch.Generator().manual_seed(3)).double()
    clean = denoise(vae, y, corruption=Normal(0.8), num_particles=200, num_draws=1).mean
    difference = (vae.reconstruct(y) - x).square().mean(1) - (clean - x).square().mean(1)
    assert difference.mean() > 5 * difference.std() / math.sqrt(300)


def test_metropolis_corrects_what_pseudo_gibbs_gets_wrong():
    exact, vae = linear_gaussian(scale=2.0)  # a guide that is too wide
    x = data(exact, 1)
    holes = x.clone()
    holes[:, 1:] = math.nan
    _, variance = exact_moments(exact, x, holes.isnan())
    found = {
        m: impute(vae, holes, method=m, num_particles=20000).std[0, 1:] ** 2 for m in ("gibbs", "metropolis")
    }
    error = {m: ((value / variance[0, 1:]).log()).abs().max() for m, value in found.items()}
    assert error["metropolis"] < 0.1
    assert error["gibbs"] > 2 * error["metropolis"]


def test_chains_do_not_follow_a_guide_that_runs_away():
    """Pseudo-Gibbs diverges with this guide, whose means are too large; Metropolis within Gibbs must not."""
    exact, vae = linear_gaussian()
    with torch.no_grad():
        vae.posterior.weight *= 3
    x = data(exact, N)
    missing, holes = gaps(x)
    mean, variance = exact_moments(exact, x, missing)
    found = {m: impute(vae, holes, method=m, num_particles=8000).mean for m in ("gibbs", "metropolis")}
    assert (found["gibbs"] - mean).abs().max() > 1e3
    assert ((found["metropolis"] - mean).abs() <= 0.3 * variance.sqrt() + 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize("noise", [None, Normal(0.7)], ids=["erased", "noise"])
def test_metropolis_within_gibbs_is_calibrated(noise):
    """Simulation-based calibration: the rank of the true value among draws is uniform.

    The decoder is smooth enough for the chains to mix: with weights of twice the size they need 2,000 sweeps.
    """
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (4,), hidden_features=(8,), variance=0.3),
        guide=pv.guides.DiagonalNormal((4,), 2, hidden_features=(8,)),
    )
    for parameter in vae.likelihood.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = vae.sample(600)
    y = x.clone() if noise is None else noise(x).sample()
    y[:, :2] = math.nan
    draws, bins = 99, 10
    found = denoise(
        vae,
        y,
        corruption=noise or Erase(y.isnan()),
        method="metropolis",
        num_particles=20 * 600,
        num_draws=draws,
    )
    for element in range(2 if noise is None else 4):
        rank = (found.draws[:, :, element] < x[:, element]).sum(0)
        counts = torch.histc(rank.float(), bins, 0, draws + 1)
        chi_square = ((counts - 60) ** 2 / 60).sum()
        assert chi_square < 27.9  # P = 0.001 with 9 degrees of freedom


# Elements given what was observed of them

GREY = DiscretizedLogistic(
    torch.tensor([[0.1, 0.5, 0.9, 1.3]], dtype=torch.float64),
    torch.tensor([[0.02, 0.1, 0.3, 0.05]], dtype=torch.float64),
)
BITS = Bernoulli(logits=torch.tensor([[-2.0, 0.0, 1.0, 3.0]], dtype=torch.float64))
COUNTS = BetaBinomial(
    torch.tensor([[0.3, 2.0, 40.0, 1.0]], dtype=torch.float64),
    torch.tensor([[0.7, 9.0, 25.0, 1.0]], dtype=torch.float64),
    total_count=9,
)
CASES = {
    "grey, noise": (GREY, Normal(0.3), torch.tensor([[-0.4, 0.2, 0.7, 1.9]])),
    "grey, little noise": (GREY, Normal(0.02), torch.tensor([[0.1, 0.45, 0.7, 1.0]])),
    "grey, photons": (GREY, Poisson(9.0), torch.tensor([[0.0, 4.0, 7.0, 12.0]])),
    "grey, rounded": (GREY, Quantise(0.25), torch.tensor([[0.0, 0.5, 0.75, 1.0]])),
    "counts, noise": (COUNTS, Normal(0.8), torch.tensor([[-0.4, 2.2, 5.7, 9.9]])),
    "counts, photons": (COUNTS, Poisson(2.0), torch.tensor([[0.0, 4.0, 7.0, 12.0]])),
    "bits, flips": (BITS, BitFlip(0.2), torch.tensor([[1.0, 0, 1, 0]])),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_over_levels(case):
    base, corruption, y = CASES[case]
    y = y.double()
    levels = torch.arange(256).double() / 255 if base is GREY else base.enumerate_support()[:, 0, 0]
    elements = condition(base, y, torch.zeros_like(y).bool(), corruption)
    assert type(elements).__name__ == ("_GreyLevels" if case == "grey, noise" else "_Levels")
    at = levels[:, None].expand(-1, 4)
    log_joint = base.log_prob(at) + torch.stack([corruption(row).log_prob(y[0]) for row in at])
    torch.testing.assert_close(elements.log_prob()[0], log_joint.logsumexp(0), rtol=1e-8, atol=1e-8)
    share = log_joint.softmax(0)
    mean = (share * at).sum(0)
    found_mean, found_variance = elements.moments()
    torch.testing.assert_close(found_mean[0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found_variance[0], (share * (at - mean) ** 2).sum(0), rtol=1e-6, atol=1e-9)
    many = condition(base.expand((3000, 4)), y, torch.zeros_like(y).bool(), corruption).sample()
    within(many.mean(0), mean, found_variance[0].sqrt() / math.sqrt(3000) + 1e-6)


def test_rounded_normals_are_truncated_normals():
    base = pv.likelihoods.dist.Normal(
        torch.tensor([[0.0, 1.0, -30.0, 30.0]]).double(), torch.tensor(0.8).double()
    )
    y = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).double()
    elements = condition(base, y, torch.tensor([[False, False, False, False]]), Quantise(0.5))
    grid = torch.linspace(0.25, 0.75, 20001, dtype=torch.float64)[:, None]
    log_density = base.log_prob(grid)
    weight = (log_density - log_density.amax(0)).exp()
    torch.testing.assert_close(
        elements.log_prob()[0],
        weight.mean(0).log() + log_density.amax(0) + math.log(0.5),
        rtol=1e-3,
        atol=2e-3,
    )
    mean = (weight * grid).sum(0) / weight.sum(0)
    torch.testing.assert_close(elements.moments()[0][0], mean, rtol=0, atol=2e-3)
    draws = condition(base.expand((4000, 4)), y, torch.zeros(1, 4).bool(), Quantise(0.5)).sample()
    assert ((draws >= 0.25) & (draws <= 0.75)).all()
    within(draws.mean(0), mean, draws.std(0) / math.sqrt(4000) + 4e-4)


def test_what_corruptions_do_to_a_value():
    x = torch.tensor([0.0, 0.1, 0.2, 0.9]).double()
    lattice = torch.arange(-2, 8).double()[:, None] * 0.25
    certain = Quantise(0.25)(x).log_prob(lattice).exp()
    assert torch.equal(certain.sum(0), torch.ones(4).double())  # of one value each
    assert torch.equal((certain * lattice).sum(0), torch.tensor([0.0, 0.0, 0.25, 1.0]).double())
    assert torch.equal(Quantise(0.25)(x).sample(), torch.tensor([0.0, 0.0, 0.25, 1.0]).double())
    assert torch.equal(Poisson(4.0).guess(Poisson(4.0)(x).mean), x)
    A = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.5]]).double()
    noise = LinearMap(A, 0.3)(x[None])
    torch.testing.assert_close(noise.mean, torch.tensor([[0.2, 1.05]]).double())
    assert (noise.stddev == 0.3).all()
    prior = torch.linalg.solve(A @ A.T + 0.09 * torch.eye(2), noise.mean[0]) @ A  # E[x|y] for x ~ N(0, I)
    torch.testing.assert_close(LinearMap(A, 0.3).guess(noise.mean)[0], prior)


def test_moments_of_rounded_normals():
    """Against a fine grid, with a step whose half is not its square, on both sides and in the middle."""
    base = torch.distributions.Normal(torch.tensor([[0.0, 0.35, -2.0, 2.4]]).double(), 0.8)
    y, step = torch.tensor([[0.6, 0.6, -1.2, 1.2]]).double(), 0.6
    edges = torch.linspace(-step / 2, step / 2, 20001, dtype=torch.float64)[:, None]
    grid = y + (edges[1:] + edges[:-1]) / 2
    weight = base.log_prob(grid).exp() * step / 20000
    elements = condition(base, y, torch.zeros(1, 4).bool(), Quantise(step))
    close = {"rtol": 1e-7, "atol": 1e-8}
    torch.testing.assert_close(elements.log_prob()[0], weight.sum(0).log(), **close)
    mean, variance = elements.moments()
    expected = (weight * grid).sum(0) / weight.sum(0)
    torch.testing.assert_close(mean[0], expected, **close)
    expected = (weight * (grid - expected).square()).sum(0) / weight.sum(0)
    torch.testing.assert_close(variance[0], expected, **close)
    missing = condition(base, y, torch.ones(1, 4).bool(), Quantise(step))
    assert torch.equal(missing.moments()[0], base.mean)
    assert torch.equal(missing.moments()[1], base.variance)
    assert not missing.log_prob().any()


def test_the_inverse_of_the_normal_distribution_function():
    t = torch.tensor([-60.0, -9.0, -6.5, -6.2, -3.0, -0.5, 0.0, 1.0, 4.0]).double()
    torch.testing.assert_close(_inverse_log_ndtr(torch.special.log_ndtr(t)), t, rtol=1e-9, atol=1e-9)


def test_a_user_function_is_a_corruption():
    torch.manual_seed(1)
    vae = binary_vae()
    y = (torch.rand(5, 2, 3) < 0.5).float()
    mine = denoise(
        vae, y, corruption=lambda x: torch.distributions.Bernoulli(0.1 + 0.8 * x), num_particles=40
    )
    assert torch.equal(mine.mean, denoise(vae, y, corruption=BitFlip(0.1), num_particles=40).mean)


# What comes back


def binary_vae():
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(2, (2, 3), hidden_features=(5,)),
        guide=pv.guides.DiagonalNormal((2, 3), 2, hidden_features=(5,)),
    )


LIKELIHOODS = {
    "Bernoulli": (pv.likelihoods.Bernoulli, lambda u: (u > 0.5).float()),
    "ContinuousBernoulli": (pv.likelihoods.ContinuousBernoulli, lambda u: u),
    "DiscretizedLogistic": (pv.likelihoods.DiscretizedLogistic, lambda u: (u * 255).round() / 255),
    "Poisson": (pv.likelihoods.Poisson, lambda u: (u * 9).floor()),
    "BetaBinomial": (pv.likelihoods.BetaBinomial, lambda u: (u * 9).floor()),
    "NegativeBinomial": (pv.likelihoods.NegativeBinomial, lambda u: (u * 9).floor()),
    "Normal": (pv.likelihoods.Normal, lambda u: 3 * u - 1),
    "StudentT": (pv.likelihoods.StudentT, lambda u: 3 * u - 1),
}


@pytest.mark.parametrize("method", ["importance", "gibbs", "metropolis", "auto"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_observed_entries_come_back_bit_for_bit(name, method):
    make, values = LIKELIHOODS[name]
    torch.manual_seed(1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=make(2, (2, 3), hidden_features=(5,)),
        guide=pv.guides.DiagonalNormal((2, 3), 2, hidden_features=(5,)),
    )
    x = values(torch.rand(N, 2, 3))
    missing, holes = gaps(x)
    state = torch.get_rng_state()
    found = impute(vae, holes, method=method, num_particles=60, num_draws=9)
    assert torch.equal(state, torch.get_rng_state())
    assert found.mean.shape == found.std.shape == x.shape
    assert found.draws.shape == (9, N, 2, 3)
    for result in (found.mean, *found.draws, found.quantile(0.3)):
        assert torch.equal(result[~missing], x[~missing])
        assert result.isfinite().all()
    assert (found.std[missing] > 0).all()
    vae.check_data(found.draws[4])  # draws are data, such as bits
    assert found.from_chains.all() == (method in ("gibbs", "metropolis"))
    again = impute(vae, holes, method=method, num_particles=60, num_draws=9)
    assert torch.equal(again.draws, found.draws)


def test_nothing_missing_and_one_value_missing():
    exact, vae = linear_gaussian()
    x = data(exact, 3)
    found = impute(vae, x, num_particles=40)
    assert torch.equal(found.mean, x)
    assert not found.std.any()
    x[2, 4] = math.nan
    found = impute(vae, x, num_particles=40)
    assert int((found.std > 0).sum()) == 1
    assert found.mean.isfinite().all()


def test_a_column_all_missing_and_arrays():
    exact, vae = linear_gaussian()
    x = data(exact, 4).numpy()
    x[:, 2] = np.nan
    assert impute(vae, x, num_particles=40).mean.isfinite().all()
    import pandas as pd

    named = impute(vae, pd.DataFrame(x, columns=list("abcde")), num_particles=40)
    assert torch.equal(torch.tensor(named.mean.to_numpy()), impute(vae, x, num_particles=40).mean)


def test_effective_sample_sizes():
    """The exact guide has equal weights; a wider one Σ w² of its own; one state of a chain counts as one."""
    exact, vae = linear_gaussian()
    x = data(exact, N)
    found = impute(vae, x, num_particles=50, method="importance").effective_sample_size
    torch.testing.assert_close(found, torch.full((N,), 50.0).double())
    # weights of a normal of twice the scale in K dimensions: E[w]² / E[w²] = (√7 / 4)^K
    _, wide = linear_gaussian(scale=2.0)
    found = impute(wide, x, num_particles=20000, method="importance").effective_sample_size / 20000
    within(found, (7**0.5 / 4) ** K, 0.02)
    one = impute(vae, x, num_particles=1, num_draws=2, method="metropolis")
    assert (one.effective_sample_size == 1).all()
    chains = impute(wide, x, num_particles=4000, method="metropolis").effective_sample_size
    assert ((chains > 100) & (chains <= 4000)).all()
    assert chains.max() > 300  # more than states of a chain and chains together


def test_auto_runs_chains_where_the_weights_have_a_heavy_tail():
    """A guide of 0.55 times the scale has weights of tail shape 1 − 0.55² ≈ 0.7."""
    exact, vae = linear_gaussian(scale=0.55)
    x = data(exact, 30)
    found = impute(vae, x, num_particles=400, num_draws=2)
    assert torch.equal(found.from_chains, found.pareto_k > 0.7)
    assert 0 < int(found.from_chains.sum()) < 30
    alone = impute(vae, x, num_particles=400, num_draws=2, method="importance")
    assert torch.equal(found.pareto_k, alone.pareto_k)
    same = ~found.from_chains
    assert torch.equal(found.effective_sample_size[same], alone.effective_sample_size[same])
    assert (found.effective_sample_size != alone.effective_sample_size)[found.from_chains].all()
    for name in ("mean", "std"):
        given = getattr(found, name) == getattr(alone, name)
        assert given[same].all()
    assert torch.equal(found.draws[:, same], alone.draws[:, same])
    assert (found.draws != alone.draws)[:, found.from_chains][:, x[found.from_chains].isnan()].all()


def test_quantiles_interpolate_the_draws():
    exact, vae = linear_gaussian()
    _, holes = gaps(data(exact, N))
    found = impute(vae, holes, num_particles=50, num_draws=21)
    levels = torch.tensor([0.0, 0.13, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.quantile(levels), found.draws.quantile(levels, dim=0))
    torch.testing.assert_close(found.quantile(0.5), found.draws.median(0).values)
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\]"):
        found.quantile(1.2)
    assert repr(found) == "Restored(7 examples of (5,), 21 draws, 0 from chains)"


def test_rubins_rules():
    pooled = pool([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]], [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert pooled.estimate.tolist() == [3.0, 2.0]
    assert pooled.standard_error.square().tolist() == pytest.approx([2 + 4 / 3 * 4, 1.0])
    assert pooled.degrees_of_freedom.tolist() == [pytest.approx(2 * (1 + 2 / (16 / 3)) ** 2), math.inf]
    for estimates, variances in [
        ([1.0], [1.0]),
        ([1.0, 2.0], [1.0]),
        ([1.0, math.nan], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, -1.0]),
    ]:
        with pytest.raises(ValueError, match=r"estimates"):
            pool(estimates, variances)


# Invalid input


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda x: x + math.inf, ValueError, r"x\[0, 0, 0\] is infinite"),
        (lambda x: x[:, 1:], ValueError, "must have shape"),
        (lambda x: x[:0], ValueError, "empty"),
        (lambda x: x.long(), TypeError, "floating point"),
        (lambda x: x.long().numpy(), TypeError, r"astype\(float\)"),
        (lambda x: x.tolist(), TypeError, "tensor, array or data frame"),
        (lambda x: x + 0.5, ValueError, r"x\[0, 0, 0\] = 0.5 lies outside the support of Bernoulli"),
        (lambda x: x.double(), TypeError, "float64"),
    ],
    ids=["inf", "shape", "empty", "int", "int array", "list", "support", "dtype"],
)
def test_invalid_data_get_an_error(bad, error, message):
    with pytest.raises(error, match=message):
        impute(binary_vae(), bad(torch.zeros(4, 2, 3)), num_particles=5)


def test_invalid_settings_get_an_error():
    vae, x = binary_vae(), torch.zeros(4, 2, 3)
    with pytest.raises(TypeError, match=r"takes a pyro_vae\.VAE"):
        impute(vae.likelihood, x)
    with pytest.raises(ValueError, match="method must be one of auto"):
        impute(vae, x, method="mcmc")
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        impute(vae, x, num_draws=0)
    with pytest.raises(TypeError, match="or a function"):
        denoise(vae, x, corruption=0.3)
    with pytest.raises(TypeError, match="or a function"):
        denoise(vae, x, corruption=Normal)
    with pytest.raises(CorruptionError, match=r"y\[0, 0, 0\] = 0.5 lies outside the support of BitFlip"):
        denoise(vae, x + 0.5, corruption=BitFlip(0.1))
    with pytest.raises(CorruptionError, match="each element"):
        denoise(vae, x, corruption=lambda x: torch.distributions.Normal(x.sum(), 1.0))
    with pytest.raises(ValueError, match="does not broadcast"):
        denoise(vae, x, corruption=Erase(torch.ones(5).bool()))
    with pytest.raises(TypeError, match="truth values"):
        Erase(torch.ones(3))
    with pytest.raises(TypeError, match="floating-point tensor; got list"):
        LinearMap([[1.0]], 0.3)
    with pytest.raises(ValueError, match=r"shape \(M, D\)"):
        LinearMap(torch.ones(3), 0.3)
    zeros = (lambda: Normal(0), lambda: BitFlip(0), lambda: Poisson(0), lambda: Quantise(0))
    for make in (*zeros, lambda: BitFlip(1.0), lambda: Poisson(-1.0), lambda: Quantise(math.inf)):
        with pytest.raises(ValueError, match="must be a number between"):
            make()


def test_a_corruption_that_the_likelihood_cannot_go_with():
    exact, vae = linear_gaussian()
    x = data(exact, 3)
    with pytest.raises(CorruptionError, match="BitFlip corrupts bits"):
        denoise(vae, x.round().clamp(0, 1), corruption=BitFlip(0.1))
    with pytest.raises(CorruptionError, match="values ≥ 0"):
        denoise(vae, x.abs().round(), corruption=Poisson())
    likelihood = pv.likelihoods.StudentT(K, (D,)).double()
    heavy = pv.VAE(prior=vae.prior, likelihood=likelihood, guide=vae.posterior)
    for noise in (Normal(0.3), LinearMap(torch.eye(D), 0.3)):
        with pytest.raises(CorruptionError, match="no closed form with a likelihood of StudentT"):
            denoise(heavy, x, corruption=noise)
    for size in (4, 6):
        with pytest.raises(CorruptionError, match=f"takes {size} elements; the likelihood gives 5"):
            denoise(vae, x[:, :2], corruption=LinearMap(torch.ones(2, size), 0.3))
    with pytest.raises(CorruptionError, match="BitFlip corrupts bits"):
        BitFlip(0.1)(torch.tensor([0.0, 2.0]))
    with pytest.raises(CorruptionError, match=r"shape \(N, 2\), as the matrix gives it; got \(3, 5\)"):
        denoise(vae, x, corruption=LinearMap(torch.ones(2, D), 0.3))
    with pytest.raises(CorruptionError, match="no closed form with a likelihood of Bernoulli"):
        denoise(binary_vae(), torch.zeros(3, 2), corruption=LinearMap(torch.ones(2, 6), 0.3))
    assert "Normal" in corruptions.__all__


def test_elements_must_be_independent():
    class Correlated(nn.Module):
        def forward(self, z):
            return pv.likelihoods.dist.MultivariateNormal(z @ torch.ones(2, 3), torch.eye(3))

    guide = pv.guides.DiagonalNormal((3,), 2)
    vae = pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=Correlated(), guide=guide)
    with pytest.raises(ValueError, match="expected independent elements"):
        impute(vae, torch.zeros(4, 3), num_particles=5)


def test_nan_never_reaches_a_network():
    class Strict(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            assert x.isfinite().all()
            return self.inner(x)

    vae = binary_vae()
    vae.posterior.network = Strict(vae.posterior.network)
    x = torch.zeros(4, 2, 3)
    x[1, 0], x[3] = math.nan, math.nan
    for method in ("importance", "gibbs", "metropolis"):
        assert impute(vae, x, method=method, num_particles=30).mean.isfinite().all()
