"""A VAE that starts as factor analysis: the solution is right, and the VAE built from it the same model."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, FactorAnalysis

from pyro_vae import terms
from pyro_vae.applications.linear_start import LinearPlusMLP, factor_analysis_vae, fit_factor_analysis
from pyro_vae.utils.serialization import rebuild, spec


def table(count=300, features=7, latent=3, seed=0):
    random = np.random.default_rng(seed)
    loadings = random.normal(size=(features, latent))
    y = random.normal(size=(count, latent)) @ loadings.T + random.normal(size=(count, features)) * 0.5
    return y - y.mean(0)


def log_density(y, loadings, noise):
    covariance = torch.tensor(loadings @ loadings.T + np.diag(noise))
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(noise), dtype=torch.float64), covariance)
    return normal.log_prob(torch.tensor(y))


def test_it_is_as_good_as_scikit_learns_factor_analysis():
    y = table()
    ours = log_density(y, *fit_factor_analysis(y, 3, floor=0.01, iterations=500)).mean()
    assert float(ours) == pytest.approx(FactorAnalysis(3, tol=1e-8, max_iter=5000).fit(y).score(y), abs=1e-3)


def test_with_one_noise_it_is_principal_component_analysis():
    y = table()
    loadings, noise = fit_factor_analysis(y, 2, floor=0.01, shared=True, iterations=1000)
    assert np.ptp(noise) == 0
    pca = PCA(2).fit(y * np.sqrt((len(y) - 1) / len(y)))  # scikit-learn divides by N − 1
    expected = pca.get_covariance()
    np.testing.assert_allclose(loadings @ loadings.T + np.diag(noise), expected, rtol=1e-6, atol=1e-8)


def test_the_loadings_are_rotated_ordered_and_signed():
    loadings, noise = fit_factor_analysis(table(), 3, floor=0.01)
    gram = loadings.T @ (loadings / noise[:, None])
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-10 * gram.max())
    assert (np.diff(np.diag(gram)) < 0).all()
    assert (loadings[np.abs(loadings).argmax(0), range(3)] > 0).all()


@pytest.mark.parametrize("variance", ["per_element", "shared"])
def test_the_guide_is_exact_at_the_start(variance):
    """Zero noise: every importance weight is p(x)."""
    y = table()
    options = {"activation": "relu", "floor": 0.01, "variance": variance, "dtype": torch.float64, "seed": 0}
    vae = factor_analysis_vae(y, 3, hidden_features=(6, 4), **options)
    loadings, noise = fit_factor_analysis(y, 3, floor=0.01, shared=variance == "shared")
    x = torch.tensor(y[:11])
    log_weight = terms(vae.model, vae.guide, x, num_particles=5).log_weight
    exact = log_density(y[:11], loadings, noise).expand(5, 11)
    torch.testing.assert_close(log_weight, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("count", "features", "latent"), [(2, 5, 4), (30, 1, 3), (40, 3, 6)])
def test_more_latent_dimensions_than_rank(count, features, latent):
    y = table(count, features, 1)
    loadings, noise = fit_factor_analysis(y, latent, floor=0.01)
    assert loadings.shape == (features, latent)
    assert np.isfinite(loadings).all()
    assert (noise >= 0.02**2).all()
    vae = factor_analysis_vae(y, latent, hidden_features=(4,), activation="tanh", floor=0.01, seed=0)
    assert vae.sample(3).isfinite().all()


def test_constant_columns_get_the_least_noise():
    y = table()
    y[:, 4] = 0
    loadings, noise = fit_factor_analysis(y, 2, floor=0.01)
    np.testing.assert_allclose(loadings[4], 0, atol=1e-12)
    assert noise[4] == pytest.approx(0.02**2)


def test_many_rows_are_thinned_by_the_seed():
    y = table(5100, 4, 2)
    options = {"hidden_features": (), "activation": "relu", "floor": 0.01}
    first, same, other = (factor_analysis_vae(y, 2, seed=seed, **options) for seed in (3, 3, 4))
    weights = [vae.likelihood.network.linear.weight for vae in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[0], weights[2], atol=0.2, rtol=0)


def test_the_parts_are_rebuilt_from_their_description():
    vae = factor_analysis_vae(table(), 2, hidden_features=(5,), activation="relu", floor=0.02, seed=0)
    copy = rebuild(spec(vae))
    copy.load_state_dict(vae.state_dict())
    x = torch.randn(3, 7)
    assert torch.equal(copy.reconstruct(x), vae.reconstruct(x))
    assert isinstance(copy.posterior.network, LinearPlusMLP)
