"""Exact models against quadrature (scipy), arbitrary precision (mpmath), dense linear algebra, sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import f64, mp, random_guide, relative
from scipy import integrate, stats
from torch import Tensor

from pyro_vae.closed_form import GaussianMixture, LinearGaussian, MultivariateNormal, naive_log_evidence


def assert_standard_errors(draws: Tensor, expected: Tensor, *, limit: float = 5.0) -> None:
    """Assert that the mean of the draws (first dimension) is within `limit` standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= limit * error).all(), (draws.mean(0) - expected) / error


def random_model(seed: int, D: int = 5, K: int = 3) -> tuple[LinearGaussian, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D, K, generator=generator, dtype=torch.float64)
    b = torch.randn(D, generator=generator, dtype=torch.float64)
    return LinearGaussian(W, b, 0.1 + torch.rand((), generator=generator, dtype=torch.float64)), generator


def test_multivariate_normal_equals_scipy():
    generator = torch.Generator().manual_seed(5)
    loc, covariance = random_guide(generator, 4, 3)
    z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    found = MultivariateNormal(loc, torch.linalg.cholesky(covariance))
    torch.testing.assert_close(found.covariance_matrix, covariance)
    for n in range(4):
        oracle = stats.multivariate_normal(loc[n].numpy(), covariance[n].numpy())
        assert found.log_prob(z)[n].item() == pytest.approx(oracle.logpdf(z[n].numpy()), rel=1e-10)
        assert found.entropy()[n].item() == pytest.approx(oracle.entropy(), rel=1e-10)
    assert found.mean is loc
    assert MultivariateNormal(loc[0], found.scale_tril).entropy().shape == (4,)


# The linear-Gaussian model


@pytest.mark.parametrize("shape", [(5, 3), (3, 4), (2, 1)])
def test_linear_gaussian_equals_dense_linear_algebra(shape):
    D, K = shape
    model, generator = random_model(8, D, K)
    x = model.sample(4, generator=generator)
    W, b, c = model.W.numpy(), model.b.numpy(), model.noise_variance.item()
    evidence = stats.multivariate_normal(b, W @ W.T + c * np.eye(D)).logpdf(x.numpy())
    np.testing.assert_allclose(model.log_evidence(x).numpy(), evidence, rtol=1e-11)
    M = W.T @ W + c * np.eye(K)
    posterior = model.posterior(x)
    np.testing.assert_allclose(posterior.mean.numpy(), (x.numpy() - b) @ W @ np.linalg.inv(M), rtol=1e-10)
    np.testing.assert_allclose(
        posterior.covariance_matrix.numpy(), np.broadcast_to(c * np.linalg.inv(M), (4, K, K)), rtol=1e-10
    )


def test_evidence_and_posterior_equal_quadrature():
    model, generator = random_model(9, D=3, K=1)
    x = model.sample(1, generator=generator)

    def integral(f):
        z = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(-1)
        return integrate.simpson((model.log_joint(x, z).exp() * f(z.squeeze(-1))).numpy(), dx=24 / 4000)

    evidence, posterior = integral(torch.ones_like), model.posterior(x)
    assert model.log_evidence(x).item() == pytest.approx(math.log(evidence), rel=1e-10)
    assert posterior.mean.item() == pytest.approx(integral(lambda z: z) / evidence, rel=1e-10)
    second_moment = integral(lambda z: z**2) / evidence
    assert posterior.covariance_matrix.item() == pytest.approx(
        second_moment - posterior.mean.item() ** 2, rel=1e-9
    )


@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_three_forms_of_the_elbo_agree_and_the_gap_is_the_kl_to_the_posterior(seed, sizes):
    D, K, N = sizes
    model, generator = random_model(seed, D, K)
    x, (loc, covariance) = model.sample(N, generator=generator), random_guide(generator, N, K)
    elbo, evidence = model.elbo(x, loc, covariance), model.log_evidence(x)
    close = {"rtol": 1e-10, "atol": 1e-9}
    torch.testing.assert_close(model.elbo_by_entropy(x, loc, covariance), elbo, **close)
    torch.testing.assert_close(model.elbo_by_gap(x, loc, covariance), elbo, **close)
    assert (elbo <= evidence).all()
    torch.testing.assert_close(evidence - elbo, model.gap(x, loc, covariance), **close)

    posterior = model.posterior(x)
    exact = posterior.loc, posterior.covariance_matrix
    torch.testing.assert_close(model.elbo(x, *exact), evidence, **close)
    torch.testing.assert_close(model.gap(x, *exact), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-9)


def test_elbo_is_the_mean_of_sampled_log_weights():
    model, generator = random_model(10)
    x, (loc, covariance) = model.sample(4, generator=generator), random_guide(generator, 4, 3)
    guide = MultivariateNormal(loc, torch.linalg.cholesky(covariance))
    noise = torch.randn(20_000, 4, 3, generator=generator, dtype=torch.float64)
    z = loc + (guide.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    assert_standard_errors(model.log_joint(x, z) - guide.log_prob(z), model.elbo(x, loc, covariance))
    assert_standard_errors(model.log_likelihood(x, z), model.expected_log_likelihood(x, loc, covariance))


@pytest.mark.parametrize("form", ["elbo", "elbo_by_entropy", "elbo_by_gap"])
def test_analytic_elbo_gradient_equals_autograd_of_each_form(form):
    model, generator = random_model(11)
    x, (loc, covariance) = model.sample(4, generator=generator), random_guide(generator, 4, 3)
    leaves = [t.clone().requires_grad_() for t in (model.W, model.b, model.noise_variance, loc, covariance)]
    elbo = getattr(LinearGaussian(*leaves[:3]), form)(x, *leaves[3:])
    analytic = model.elbo_gradient(x, loc, covariance)
    for n in range(4):
        gradients = torch.autograd.grad(elbo[n], leaves, retain_graph=True)
        expected = analytic.W[n], analytic.b[n], analytic.noise_variance[n]
        for found, exact in zip(gradients[:3], expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(gradients[3][n], analytic.loc[n], rtol=1e-10, atol=1e-9)
        symmetric = (gradients[4][n] + gradients[4][n].mT) / 2
        torch.testing.assert_close(symmetric, analytic.covariance[n], rtol=1e-10, atol=1e-9)


def test_at_the_posterior_the_elbo_has_the_gradient_of_the_evidence():
    model, generator = random_model(12)
    x = model.sample(4, generator=generator)
    posterior = model.posterior(x)
    analytic = model.elbo_gradient(x, posterior.loc, posterior.covariance_matrix)
    leaves = [t.clone().requires_grad_() for t in (model.W, model.b, model.noise_variance)]
    gradients = torch.autograd.grad(LinearGaussian(*leaves).log_evidence(x).sum(), leaves)
    for found, exact in zip(gradients, (analytic.W, analytic.b, analytic.noise_variance), strict=True):
        torch.testing.assert_close(found, exact.sum(0), rtol=1e-10, atol=1e-9)
    for stationary in (analytic.loc, analytic.covariance):
        torch.testing.assert_close(stationary, torch.zeros_like(stationary), rtol=0, atol=1e-9)


def test_elbo_gradient_takes_one_guide_for_all_data():
    model, generator = random_model(13)
    x, (loc, covariance) = model.sample(4, generator=generator), random_guide(generator, 1, 3)
    shared = model.elbo_gradient(x, loc[0], covariance[0])
    each = model.elbo_gradient(x, loc.expand(4, -1), covariance.expand(4, -1, -1))
    for name in ("W", "b", "noise_variance", "loc", "covariance"):
        torch.testing.assert_close(getattr(shared, name), getattr(each, name))


def test_best_diagonal_guide_has_the_least_gap_of_diagonal_guides():
    model, generator = random_model(14)
    x = model.sample(4, generator=generator)
    best = model.best_diagonal_guide(x)
    gap = model.gap(x, best.loc, best.covariance_matrix)
    torch.testing.assert_close(gap, model.diagonal_gap().expand(4), rtol=1e-10, atol=0)
    assert gap.min() > 0.1  # the columns of this W are not orthogonal
    gradient = model.elbo_gradient(x, best.loc, best.covariance_matrix)
    for stationary in (gradient.loc, gradient.covariance.diagonal(dim1=-2, dim2=-1)):
        torch.testing.assert_close(stationary, torch.zeros_like(stationary), rtol=0, atol=1e-9)
    for _ in range(20):
        loc = best.loc + 0.1 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
        spread = (0.1 * torch.randn(4, 3, generator=generator, dtype=torch.float64)).exp()
        assert (model.gap(x, loc, best.covariance_matrix * torch.diag_embed(spread)) > gap).all()


def test_a_diagonal_guide_of_orthogonal_loadings_has_no_gap():
    model, _ = random_model(15)
    orthogonal = torch.linalg.qr(model.W).Q * f64(1, 2, 3)
    assert LinearGaussian(orthogonal, model.b, 0.3).diagonal_gap().item() == pytest.approx(0, abs=1e-12)


def test_samples_are_drawn_from_the_evidence():
    model, generator = random_model(16)
    x = model.sample(20_000, generator=generator)
    assert_standard_errors(x, model.b)
    centred = x - model.b
    covariance = model.W @ model.W.mT + model.noise_variance * torch.eye(5).double()
    assert_standard_errors(centred.unsqueeze(-1) * centred.unsqueeze(-2), covariance)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), centred.mT, upper=False)
    assert stats.kstest(white.flatten().numpy(), "norm").pvalue > 1e-3


def test_linear_gaussian_of_a_million_dimensions():
    D, K = 10**6, 2
    generator = torch.Generator().manual_seed(17)
    W = torch.randn(D, K, generator=generator, dtype=torch.float64).requires_grad_()
    model = LinearGaussian(W, torch.zeros(D, dtype=torch.float64), 0.5)
    x = model.sample(3, generator=generator).detach()
    posterior = model.posterior(x)
    elbo = model.elbo(x, posterior.loc, posterior.covariance_matrix)
    torch.testing.assert_close(elbo, model.log_evidence(x), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(elbo.sum(), W)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("log_variance", [-60.0, -20.0, 20.0, 60.0])
def test_linear_gaussian_at_extreme_noise_equals_arbitrary_precision(log_variance):
    model, generator = random_model(18, D=3, K=2)
    model = LinearGaussian(model.W, model.b, math.exp(log_variance))
    x = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    W, c = mp.matrix(model.W.tolist()), mp.mpf(model.noise_variance.item())
    S = W * W.T + c * mp.eye(3)
    d = mp.matrix(x[0].tolist()) - mp.matrix(model.b.tolist())
    expected = -((d.T * mp.inverse(S) * d)[0] + mp.log(mp.det(S)) + 3 * mp.log(2 * mp.pi)) / 2
    assert relative(model.log_evidence(x), expected) < 1e-6
    posterior = model.posterior(x)
    elbo = model.elbo(x, posterior.loc, posterior.covariance_matrix)
    assert relative(elbo, expected) < 1e-6


def test_maximum_likelihood_is_where_the_evidence_is_stationary_and_a_diagonal_guide_enough():
    truth, generator = random_model(24, D=6, K=3)
    x = truth.sample(50, generator=generator)
    best = LinearGaussian.maximum_likelihood(x, 2)  # fewer latent dimensions than the truth
    posterior = best.posterior(x)
    gradient = best.elbo_gradient(x, posterior.loc, posterior.covariance_matrix)
    for slope in (gradient.W, gradient.b, gradient.noise_variance):
        torch.testing.assert_close(slope.mean(0), torch.zeros_like(slope[0]), rtol=0, atol=1e-10)
    assert best.diagonal_gap().item() == pytest.approx(0, abs=1e-10)

    evidence = best.log_evidence(x).mean()
    for _ in range(20):
        shift = 0.1 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
        assert LinearGaussian(best.W + shift, best.b, best.noise_variance).log_evidence(x).mean() < evidence
        noise_variance = best.noise_variance * shift[0, 0].exp()
        assert LinearGaussian(best.W, best.b + shift[:, 0], noise_variance).log_evidence(x).mean() < evidence


# Sampling from the prior


def test_naive_sample_size_equals_quadrature():
    model, generator = random_model(19, D=3, K=1)
    x = model.sample(1, generator=generator)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(-1)
    prior, likelihood = stats.norm.pdf(z.squeeze(-1).numpy()), model.log_likelihood(x, z).exp().numpy()
    first, second = (integrate.simpson(prior * likelihood**power, dx=24 / 4000) for power in (1, 2))
    expected = math.log(second / first**2 - 1)
    assert model.log_naive_sample_size(x).item() == pytest.approx(expected, rel=1e-8)


def test_naive_evidence_is_consistent_and_its_sample_size_grows_exponentially():
    model, generator = random_model(20, D=5, K=2)
    x = model.sample(4, generator=generator)
    z = torch.randn(40_000, 1, 2, generator=generator, dtype=torch.float64)
    log_likelihood = model.log_likelihood(x, z)
    assert_standard_errors(log_likelihood.exp(), model.log_evidence(x).exp())
    expected = log_likelihood.exp().mean(0).log()
    torch.testing.assert_close(naive_log_evidence(log_likelihood), expected)

    sizes = []
    for K in (2, 4, 8, 16):
        one_to_one = LinearGaussian(
            torch.eye(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64), 0.01
        )
        sizes.append(one_to_one.log_naive_sample_size(torch.ones(K, dtype=torch.float64)).item())
    slopes = np.diff(sizes) / np.diff([2, 4, 8, 16])
    np.testing.assert_allclose(slopes, slopes[-1], rtol=0.02)  # log S is linear in K
    assert slopes[-1] > 1.5


def test_naive_sample_size_is_zero_where_x_does_not_depend_on_z():
    nothing = LinearGaussian(torch.zeros(3, 2), torch.zeros(3), 0.5)
    assert nothing.log_naive_sample_size(torch.ones(3)).item() == -math.inf


# The mixture


def random_mixture(seed: int, C: int = 3, D: int = 2) -> tuple[GaussianMixture, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(C, generator=generator, dtype=torch.float64) + 0.1
    locs, covariances = random_guide(generator, C, D)
    return GaussianMixture(weights / weights.sum(), locs, covariances), generator


def test_mixture_equals_enumeration():
    mixture, generator = random_mixture(21)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    joint = np.stack(
        [
            weight.item() * stats.multivariate_normal(loc.numpy(), covariance.numpy()).pdf(x.numpy())
            for weight, loc, covariance in zip(
                mixture.weights, mixture.locs, mixture.covariances, strict=True
            )
        ],
        axis=-1,
    )
    np.testing.assert_allclose(mixture.log_joint(x).numpy(), np.log(joint), rtol=1e-10)
    np.testing.assert_allclose(mixture.log_evidence(x).numpy(), np.log(joint.sum(-1)), rtol=1e-10)
    np.testing.assert_allclose(mixture.posterior(x).numpy(), joint / joint.sum(-1, keepdims=True), rtol=1e-10)


def test_mixture_bound_is_tight_at_the_posterior_only():
    mixture, generator = random_mixture(22)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    q = torch.rand(5, 4, 3, generator=generator, dtype=torch.float64).softmax(-1)
    q[0] = f64(1, 0, 0)  # a guide may rule components out
    evidence = mixture.log_evidence(x)
    torch.testing.assert_close(evidence - mixture.elbo(x, q), mixture.gap(x, q), rtol=1e-10, atol=1e-12)
    assert (mixture.gap(x, q) > 0).all()
    torch.testing.assert_close(mixture.elbo(x, mixture.posterior(x)), evidence, rtol=1e-12, atol=0)


# Dtypes and bad input

TWO, EYE, ONE = torch.ones(2), torch.eye(2), torch.ones(1)
MODEL = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 1.0)
X, SKEW = torch.zeros(4, 3), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
MIXTURE = GaussianMixture(torch.tensor([0.25, 0.75]), torch.zeros(2, 1), torch.ones(2, 1, 1))

BAD_INPUT = {
    "W": (lambda: LinearGaussian(torch.ones(3), torch.ones(3), 1.0), ValueError, "W"),
    "b": (lambda: LinearGaussian(torch.ones(3, 2), torch.ones(2), 1.0), ValueError, "b"),
    "noise": (lambda: LinearGaussian(torch.ones(3, 2), torch.ones(3), 0.0), ValueError, "noise_variance"),
    "noise per output": (
        lambda: LinearGaussian(torch.ones(3, 2), torch.ones(3), torch.ones(3)),
        ValueError,
        "noise",
    ),
    "noise beyond float32": (
        lambda: LinearGaussian(torch.ones(3, 2), torch.ones(3), 1e-12).log_evidence(X),
        ValueError,
        "noise_variance.*float64",
    ),
    "as many latent dimensions": (lambda: LinearGaussian.maximum_likelihood(X, 3), ValueError, "latent_dim"),
    "fewer data than latent dimensions": (
        lambda: LinearGaussian.maximum_likelihood(X[:2], 2),
        ValueError,
        "latent_dim",
    ),
    "no latent dimension": (lambda: LinearGaussian.maximum_likelihood(X, 0), ValueError, "latent_dim"),
    "data in a plane": (
        lambda: LinearGaussian.maximum_likelihood(torch.eye(3), 2),
        ValueError,
        "x.*more than 2 directions",
    ),
    "x that would broadcast": (lambda: MODEL.log_evidence(torch.zeros(4, 1)), ValueError, r"x.*\(..., 3\)"),
    "x NaN": (lambda: MODEL.log_evidence(X * math.nan), ValueError, "x"),
    "z": (lambda: MODEL.log_joint(X, torch.zeros(4, 1)), ValueError, "z"),
    "guide mean": (lambda: MODEL.elbo(X, torch.zeros(5, 2), EYE), ValueError, r"x \(4,\), loc \(5,\)"),
    "guide of variances": (
        lambda: MODEL.elbo(X, torch.zeros(4, 2), torch.ones(4, 2)),
        ValueError,
        "covariance",
    ),
    "guide not symmetric": (
        lambda: MODEL.elbo(X, torch.zeros(4, 2), SKEW),
        ValueError,
        "covariance.*symmetric",
    ),
    "guide not positive definite": (
        lambda: MODEL.gap(X, torch.zeros(4, 2), torch.ones(2, 2) + torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
        ValueError,
        "covariance.*positive definite.*-1",
    ),
    "normal mean": (lambda: MultivariateNormal(torch.zeros(3), EYE), ValueError, "loc"),
    "normal z": (lambda: MultivariateNormal(TWO, EYE).log_prob(ONE), ValueError, "z"),
    "mixture weights": (
        lambda: GaussianMixture(TWO, torch.zeros(2, 1), torch.ones(2, 1, 1)),
        ValueError,
        "weights",
    ),
    "mixture weight of zero": (
        lambda: GaussianMixture(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2, 1, 1)),
        ValueError,
        "weights.*positive",
    ),
    "mixture locs": (
        lambda: GaussianMixture(ONE, torch.zeros(2, 1), torch.ones(2, 1, 1)),
        ValueError,
        "locs",
    ),
    "mixture covariances": (lambda: GaussianMixture(ONE, torch.zeros(1, 2), EYE), ValueError, "covariances"),
    "mixture covariance": (
        lambda: GaussianMixture(ONE, torch.zeros(1, 2), -EYE[None]),
        ValueError,
        "covariances",
    ),
    "mixture x": (lambda: MIXTURE.log_evidence(X), ValueError, "x"),
    "mixture guide": (lambda: MIXTURE.elbo(torch.zeros(4, 1), TWO), ValueError, "probabilities.*one"),
    "mixture guide below zero": (
        lambda: MIXTURE.gap(torch.zeros(4, 1), torch.tensor([1.5, -0.5])),
        ValueError,
        "probabilities: expected non-negative",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_raises_an_error_that_names_it(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


def test_single_precision_stays_single_and_close():
    model, generator = random_model(23)
    x, (loc, covariance) = model.sample(4, generator=generator), random_guide(generator, 4, 3)
    single = LinearGaussian(model.W.float(), model.b.float(), model.noise_variance.float())
    for name in ("elbo", "elbo_by_entropy", "elbo_by_gap", "gap"):
        found = getattr(single, name)(x.float(), loc.float(), covariance.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), getattr(model, name)(x, loc, covariance), rtol=1e-4, atol=1e-4
        )
