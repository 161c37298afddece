"""`closed_form` against quadrature (scipy), arbitrary precision (mpmath) and dense linear algebra."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, stats
from torch import Tensor

from pyro_vae import closed_form
from pyro_vae.closed_form import GaussianMixture, LinearGaussian, MultivariateNormal

mp = mpmath.mp.clone()
mp.dps = 60


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float64)


def relative(found: Tensor, expected: mpmath.mpf) -> float:
    return float(abs(mp.mpf(found.item()) - expected) / abs(expected)) if expected else abs(found.item())


def assert_standard_errors(draws: Tensor, expected: Tensor, *, limit: float = 5.0) -> None:
    """The mean of independent draws (first dimension) is as expected, within so many standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= limit * error).all(), (draws.mean(0) - expected) / error


def random_model(seed: int, D: int = 5, K: int = 3) -> tuple[LinearGaussian, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D, K, generator=generator, dtype=torch.float64)
    b = torch.randn(D, generator=generator, dtype=torch.float64)
    return LinearGaussian(W, b, 0.1 + torch.rand((), generator=generator, dtype=torch.float64)), generator


def random_guide(generator: torch.Generator, N: int, K: int) -> tuple[Tensor, Tensor]:
    loc = torch.randn(N, K, generator=generator, dtype=torch.float64)
    root = torch.randn(N, K, K + 1, generator=generator, dtype=torch.float64)
    return loc, root @ root.mT


# Univariate Gaussians

GAUSSIANS = [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -1.2, 2.0), (-4.0, 3.0, 1.0, 0.7), (2.0, 1.3, 2.1, 1.31)]


@pytest.mark.parametrize(("loc1", "scale1", "loc2", "scale2"), GAUSSIANS)
def test_gaussian_terms_equal_quadrature(loc1, scale1, loc2, scale2):
    p1, p2 = stats.norm(loc1, scale1), stats.norm(loc2, scale2)

    def average(f):
        bounds = (loc1 - 12 * scale1, loc1 + 12 * scale1)
        return integrate.quad(lambda z: p1.pdf(z) * f(z), *bounds, epsabs=1e-12, epsrel=1e-12)[0]

    arguments = [f64(v) for v in (loc1, scale1, loc2, scale2)]
    negentropy, cross_entropy = average(p1.logpdf), -average(p2.logpdf)
    assert closed_form.normal_negentropy(arguments[1]).item() == pytest.approx(negentropy, abs=1e-10)
    assert closed_form.normal_cross_entropy(*arguments).item() == pytest.approx(cross_entropy, rel=1e-10)
    assert closed_form.normal_kl(*arguments).item() == pytest.approx(negentropy + cross_entropy, abs=1e-10)


# scales e^(log-variance / 2), and pairs so close that the textbook formula has no correct digit left
SCALES = [math.exp(log_variance / 2) for log_variance in range(-60, 61, 15)]
SCALE_PAIRS = [*itertools.product(SCALES, SCALES), *((1 + 10.0**-k, 1.0) for k in range(1, 13)), (0.995, 1.0)]


@pytest.mark.parametrize("shift", [0.0, 1e-7, 0.5, 1e4, -1e4])
def test_normal_kl_equals_arbitrary_precision(shift):
    for scale1, scale2 in SCALE_PAIRS:
        s1, s2, m = mp.mpf(scale1), mp.mpf(scale2), mp.mpf(shift)
        expected = mp.log(s2 / s1) + (s1**2 + m**2) / (2 * s2**2) - mp.mpf(1) / 2
        loc1, scale = f64(shift).requires_grad_(), f64(scale1).requires_grad_()
        found = closed_form.normal_kl(loc1, scale, 0.0, scale2)
        d_loc, d_scale = torch.autograd.grad(found, [loc1, scale])
        assert relative(found, expected) < 1e-10, (scale1, scale2)
        assert relative(d_loc, m / s2**2) < 1e-10, (scale1, scale2)
        assert relative(d_scale, s1 / s2**2 - 1 / s1) < 1e-10, (scale1, scale2)


@pytest.mark.parametrize("log_variance", range(-60, 61, 20))
def test_cross_entropy_and_negentropy_equal_arbitrary_precision(log_variance):
    scale = math.exp(log_variance / 2)
    s = mp.mpf(scale)
    log_volume = mp.log(2 * mp.pi * s**2) / 2
    assert relative(closed_form.normal_negentropy(scale), -log_volume - mp.mpf(1) / 2) < 1e-12
    for loc, other in itertools.product([0.0, 1e4], SCALES):
        expected = log_volume + (mp.mpf(other) ** 2 + mp.mpf(loc) ** 2) / (2 * s**2)
        assert relative(closed_form.normal_cross_entropy(loc, other, 0.0, scale), expected) < 1e-12


def test_standard_normal_kl_is_half_the_sum_of_h_plus_g_squared_minus_log_h_minus_one():
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    h = torch.rand(4, 3, generator=generator, dtype=torch.float64) * 3 + 0.1
    expected = 0.5 * (h + g**2 - h.log() - 1).sum(-1)
    torch.testing.assert_close(closed_form.standard_normal_kl(g, h.sqrt()), expected, rtol=1e-12, atol=1e-12)


numbers = st.floats(-1e4, 1e4, allow_subnormal=False)
scales = st.floats(-30, 30).map(math.exp)


@given(data=st.data(), shapes=hnp.mutually_broadcastable_shapes(num_shapes=4, max_dims=3, max_side=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_normal_kl_broadcasts_and_is_never_negative(data, shapes):
    draw = [
        torch.from_numpy(np.asarray(data.draw(hnp.arrays(np.float64, shape, elements=elements))))
        for shape, elements in zip(shapes.input_shapes, [numbers, scales, numbers, scales], strict=True)
    ]
    leaves = [value.clone().requires_grad_() for value in draw]
    kl = closed_form.normal_kl(*leaves)
    assert kl.shape == shapes.result_shape
    assert (kl >= 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(kl.sum(), leaves))
    by_parts = closed_form.normal_negentropy(draw[1]) + closed_form.normal_cross_entropy(*draw)
    torch.testing.assert_close(kl.detach(), by_parts, rtol=1e-9, atol=1e-9)


# Multivariate Gaussians


def test_multivariate_kl_equals_dense_linear_algebra():
    generator = torch.Generator().manual_seed(2)
    (loc1, covariance1), (loc2, covariance2) = random_guide(generator, 4, 3), random_guide(generator, 4, 3)
    found = closed_form.multivariate_normal_kl(
        loc1, torch.linalg.cholesky(covariance1), loc2, torch.linalg.cholesky(covariance2)
    )
    for n in range(4):
        shift, inverse = (loc2 - loc1)[n].numpy(), np.linalg.inv(covariance2[n].numpy())
        log_ratio = (
            np.linalg.slogdet(covariance2[n].numpy())[1] - np.linalg.slogdet(covariance1[n].numpy())[1]
        )
        expected = np.trace(inverse @ covariance1[n].numpy()) + shift @ inverse @ shift - 3 + log_ratio
        assert found[n].item() == pytest.approx(0.5 * expected, rel=1e-10)


def test_multivariate_kl_of_diagonal_gaussians_is_the_sum_of_univariate_ones():
    generator = torch.Generator().manual_seed(3)
    loc1, loc2 = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * 100
    scale1, scale2 = (torch.rand(2, 5, 3, generator=generator, dtype=torch.float64) * 60 - 30).exp()
    found = closed_form.multivariate_normal_kl(loc1, torch.diag_embed(scale1), loc2, torch.diag_embed(scale2))
    expected = closed_form.normal_kl(loc1, scale1, loc2, scale2).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_multivariate_kl_broadcasts_and_has_the_right_gradient():
    generator = torch.Generator().manual_seed(4)
    loc1, covariance1 = random_guide(generator, 2, 3)
    loc2, covariance2 = random_guide(generator, 4, 3)
    factor1 = (
        torch.linalg.cholesky(covariance1).unsqueeze(1).requires_grad_()
    )  # (2, 1, 3, 3) beside (4, 3, 3)
    factor2 = torch.linalg.cholesky(covariance2).requires_grad_()
    loc1 = loc1.unsqueeze(1).requires_grad_()

    def kl(loc1: Tensor, factor1: Tensor, factor2: Tensor) -> Tensor:
        return closed_form.multivariate_normal_kl(loc1, factor1.tril(), loc2, factor2.tril())

    assert kl(loc1, factor1, factor2).shape == (2, 4)
    assert torch.autograd.gradcheck(kl, (loc1, factor1, factor2))


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


# Likelihoods


@pytest.mark.parametrize("log_variance", range(-60, 61, 20))
def test_gaussian_nll_equals_arbitrary_precision(log_variance):
    variance = math.exp(log_variance)
    c = mp.mpf(variance)
    for x, mean in itertools.product([0.0, 0.7, 1e4], [0.0, -0.4, -1e4]):
        squared = (mp.mpf(x) - mp.mpf(mean)) ** 2
        expected = squared / (2 * c) + mp.log(2 * mp.pi * c) / 2
        x_, mean_, variance_ = (f64(v).reshape(1).requires_grad_() for v in (x, mean, variance))
        found = closed_form.gaussian_nll(x_, mean_, variance_)
        gradients = torch.autograd.grad(found, [mean_, variance_])
        assert relative(found, expected) < 1e-12
        assert relative(gradients[0], -(mp.mpf(x) - mp.mpf(mean)) / c) < 1e-12
        assert relative(gradients[1], 1 / (2 * c) - squared / (2 * c**2)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_dimensions(dtype):
    D, generator = 10**6, torch.Generator().manual_seed(6)
    x = torch.rand(1, D, generator=generator, dtype=dtype)
    other = torch.randn(1, D, generator=generator, dtype=dtype).requires_grad_()
    scale = (30 * torch.randn(1, D, generator=generator, dtype=dtype).clamp(-1, 1)).exp().requires_grad_()
    cases = {
        closed_form.gaussian_nll: (x, other, 0.5),
        closed_form.bernoulli_nll: (x, other),
        closed_form.continuous_bernoulli_nll: (x, other),
        closed_form.standard_normal_kl: (other, scale),
    }
    for function, arguments in cases.items():
        found = function(*arguments)
        (gradient,) = torch.autograd.grad(found.sum(), other)
        assert found.dtype == gradient.dtype == dtype
        assert torch.isfinite(gradient).all()
        exact = function(*(a.detach().double()[..., None] if isinstance(a, Tensor) else a for a in arguments))
        assert found.item() == pytest.approx(math.fsum(exact.flatten().tolist()), rel=1e-6)


LOGITS = [
    *(sign * 10.0**k for k in range(-12, 5) for sign in (-1, 1)),
    0.0,
    0.0999,
    0.1001,
    25.0,
    40.0,
    -40.0,
]


@pytest.mark.parametrize("x", [0.0, 1.0, 0.3])
def test_bernoulli_terms_equal_arbitrary_precision(x):
    for logit in LOGITS:
        eta, v = mp.mpf(logit), mp.mpf(x)
        probability = 1 / (1 + mp.exp(-eta))
        leaf = f64(logit).reshape(1).requires_grad_()
        found = closed_form.bernoulli_nll(f64(x).reshape(1), leaf)
        expected = v * mp.log1p(mp.exp(-eta)) + (1 - v) * mp.log1p(mp.exp(eta))
        (gradient,) = torch.autograd.grad(found, leaf)
        if expected > 1e-300:  # below, float64 has no digits
            assert relative(found, expected) < 1e-12, logit
            assert relative(gradient, probability - v) < 1e-12, logit

        normaliser = closed_form.continuous_bernoulli_log_normaliser(leaf)
        (gradient,) = torch.autograd.grad(normaliser.sum(), leaf)
        assert relative(normaliser, mp.log(eta / mp.tanh(eta / 2)) if eta else mp.log(2)) < 1e-14, logit
        slope = 1 / eta - 1 / mp.sinh(eta) if eta else mp.mpf(0)
        assert relative(gradient, slope) < 1e-11, logit

        nll = closed_form.continuous_bernoulli_nll(f64(x).reshape(1), leaf)
        log_density = v * eta - (mp.log(mp.expm1(eta) / eta) if eta else 0)
        assert abs(nll.item() + log_density) < 1e-12 * max(1, abs(log_density)), logit


@pytest.mark.parametrize("logit", [-30.0, -1.0, -1e-9, 0.0, 0.05, 3.0, 200.0])
def test_continuous_bernoulli_is_normalised(logit):
    def density(x):
        return math.exp(-closed_form.continuous_bernoulli_nll(f64(x).reshape(1), f64(logit).reshape(1)))

    total, _ = integrate.quad(
        density, 0, 1, epsabs=1e-12, epsrel=1e-12, points=[0.95] if logit > 100 else None
    )
    assert total == pytest.approx(1, abs=1e-10)


def test_bernoulli_nll_of_grey_levels_is_no_density():
    density = integrate.quad(
        lambda x: math.exp(-closed_form.bernoulli_nll(f64(x).reshape(1), f64(0.0).reshape(1))), 0, 1
    )[0]
    assert density == pytest.approx(0.5, abs=1e-10)


# The whole loss


def vae_arguments() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    return {
        "x": torch.randn(4, 5, **draw),
        "x_hat": torch.randn(2, 4, 5, **draw).requires_grad_(),
        "loc": torch.randn(4, 3, **draw).requires_grad_(),
        "variance": (torch.rand(4, 3, **draw) + 0.1).requires_grad_(),
    }


def test_vae_loss_lacks_exactly_the_constant():
    arguments, c = vae_arguments(), f64(0.3)
    whole = closed_form.negative_elbo(**arguments, noise_variance=c)
    without = closed_form.vae_loss(**arguments, weight=1 / (2 * c))
    assert whole.shape == (2, 4)
    constant = 2.5 * math.log(2 * math.pi * 0.3)
    torch.testing.assert_close(whole - without, torch.full_like(whole, constant), rtol=0, atol=1e-12)
    leaves = [arguments[name] for name in ("x_hat", "loc", "variance")]
    for one, other in zip(
        torch.autograd.grad(whole.sum(), leaves), torch.autograd.grad(without.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_vae_loss_has_another_gradient_in_a_learned_noise_variance():
    arguments, c = vae_arguments(), f64(0.3).requires_grad_()
    (whole,) = torch.autograd.grad(closed_form.negative_elbo(**arguments, noise_variance=c).sum(), c)
    (without,) = torch.autograd.grad(closed_form.vae_loss(**arguments, weight=1 / (2 * c)).sum(), c)
    assert (whole - without).item() == pytest.approx(2 * 4 * 5 / (2 * 0.3), rel=1e-12)
    assert without < 0  # it always asks for more noise


def test_vae_loss_is_the_formula():
    a, C = {name: value.detach() for name, value in vae_arguments().items()}, 0.7
    g, h = a["loc"], a["variance"]
    expected = C * ((a["x"] - a["x_hat"]) ** 2).sum(-1) + 0.5 * (h + g**2 - h.log() - 1).sum(-1)
    torch.testing.assert_close(closed_form.vae_loss(**a, weight=C), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("log_variance", [-60.0, -1e-9, 0.0, 1e-9, 60.0])
def test_vae_loss_equals_arbitrary_precision(log_variance):
    variance = math.exp(log_variance)
    h = mp.mpf(variance)
    leaf = f64(variance).reshape(1).requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    loss = closed_form.vae_loss(zero, zero, zero, leaf, 1.0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert relative(loss, (h - mp.log(h) - 1) / 2) < 1e-10
    assert relative(gradient, (1 - 1 / h) / 2) < 1e-10


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
def test_three_forms_of_the_elbo_are_one_and_the_gap_is_the_kl_to_the_posterior(seed, sizes):
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
def test_elbo_gradient_by_hand_equals_that_of_each_form(form):
    model, generator = random_model(11)
    x, (loc, covariance) = model.sample(4, generator=generator), random_guide(generator, 4, 3)
    leaves = [t.clone().requires_grad_() for t in (model.W, model.b, model.noise_variance, loc, covariance)]
    elbo = getattr(LinearGaussian(*leaves[:3]), form)(x, *leaves[3:])
    by_hand = model.elbo_gradient(x, loc, covariance)
    for n in range(4):
        gradients = torch.autograd.grad(elbo[n], leaves, retain_graph=True)
        expected = by_hand.W[n], by_hand.b[n], by_hand.noise_variance[n]
        for found, hand in zip(gradients[:3], expected, strict=True):
            torch.testing.assert_close(found, hand, rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(gradients[3][n], by_hand.loc[n], rtol=1e-10, atol=1e-9)
        symmetric = (gradients[4][n] + gradients[4][n].mT) / 2
        torch.testing.assert_close(symmetric, by_hand.covariance[n], rtol=1e-10, atol=1e-9)


def test_at_the_posterior_the_elbo_has_the_gradient_of_the_evidence():
    model, generator = random_model(12)
    x = model.sample(4, generator=generator)
    posterior = model.posterior(x)
    by_hand = model.elbo_gradient(x, posterior.loc, posterior.covariance_matrix)
    leaves = [t.clone().requires_grad_() for t in (model.W, model.b, model.noise_variance)]
    gradients = torch.autograd.grad(LinearGaussian(*leaves).log_evidence(x).sum(), leaves)
    for found, hand in zip(gradients, (by_hand.W, by_hand.b, by_hand.noise_variance), strict=True):
        torch.testing.assert_close(found, hand.sum(0), rtol=1e-10, atol=1e-9)
    for stationary in (by_hand.loc, by_hand.covariance):
        torch.testing.assert_close(stationary, torch.zeros_like(stationary), rtol=0, atol=1e-9)


def test_elbo_gradient_takes_one_guide_for_all_data():
    model, generator = random_model(13)
    x, (loc, covariance) = model.sample(4, generator=generator), random_guide(generator, 1, 3)
    shared = model.elbo_gradient(x, loc[0], covariance[0])
    each = model.elbo_gradient(x, loc.expand(4, -1), covariance.expand(4, -1, -1))
    for name in ("W", "b", "noise_variance", "loc", "covariance"):
        torch.testing.assert_close(getattr(shared, name), getattr(each, name))


def test_best_diagonal_guide_is_the_best_and_leaves_the_gap():
    model, generator = random_model(14)
    x = model.sample(4, generator=generator)
    best = model.best_diagonal_guide(x)
    gap = model.gap(x, best.loc, best.covariance_matrix)
    torch.testing.assert_close(gap, model.diagonal_gap().expand(4), rtol=1e-10, atol=0)
    assert gap.min() > 0.1  # this W has no orthogonal columns
    gradient = model.elbo_gradient(x, best.loc, best.covariance_matrix)
    for stationary in (gradient.loc, gradient.covariance.diagonal(dim1=-2, dim2=-1)):
        torch.testing.assert_close(stationary, torch.zeros_like(stationary), rtol=0, atol=1e-9)
    for _ in range(20):
        loc = best.loc + 0.1 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
        spread = (0.1 * torch.randn(4, 3, generator=generator, dtype=torch.float64)).exp()
        assert (model.gap(x, loc, best.covariance_matrix * torch.diag_embed(spread)) > gap).all()


def test_orthogonal_loadings_leave_a_diagonal_guide_no_gap():
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


# Drawing from the prior


def test_naive_sample_size_equals_quadrature():
    model, generator = random_model(19, D=3, K=1)
    x = model.sample(1, generator=generator)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(-1)
    prior, likelihood = stats.norm.pdf(z.squeeze(-1).numpy()), model.log_likelihood(x, z).exp().numpy()
    first, second = (integrate.simpson(prior * likelihood**power, dx=24 / 4000) for power in (1, 2))
    expected = math.log(second / first**2 - 1)
    assert model.log_naive_sample_size(x).item() == pytest.approx(expected, rel=1e-8)


def test_naive_evidence_is_right_in_the_limit_and_its_need_grows_exponentially():
    model, generator = random_model(20, D=5, K=2)
    x = model.sample(4, generator=generator)
    z = torch.randn(40_000, 1, 2, generator=generator, dtype=torch.float64)
    log_likelihood = model.log_likelihood(x, z)
    assert_standard_errors(log_likelihood.exp(), model.log_evidence(x).exp())
    expected = log_likelihood.exp().mean(0).log()
    torch.testing.assert_close(closed_form.naive_log_evidence(log_likelihood), expected)

    sizes = []
    for K in (2, 4, 8, 16):
        one_to_one = LinearGaussian(
            torch.eye(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64), 0.01
        )
        sizes.append(one_to_one.log_naive_sample_size(torch.ones(K, dtype=torch.float64)).item())
    slopes = np.diff(sizes) / np.diff([2, 4, 8, 16])
    np.testing.assert_allclose(slopes, slopes[-1], rtol=0.02)  # log S is linear in K
    assert slopes[-1] > 1.5


def test_naive_sample_size_is_zero_where_the_latent_does_nothing():
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


def test_mixture_bound_is_tight_at_the_posterior_alone():
    mixture, generator = random_mixture(22)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    q = torch.rand(5, 4, 3, generator=generator, dtype=torch.float64).softmax(-1)
    q[0] = f64(1, 0, 0)  # a guide may rule components out
    evidence = mixture.log_evidence(x)
    torch.testing.assert_close(evidence - mixture.elbo(x, q), mixture.gap(x, q), rtol=1e-10, atol=1e-12)
    assert (mixture.gap(x, q) > 0).all()
    torch.testing.assert_close(mixture.elbo(x, mixture.posterior(x)), evidence, rtol=1e-12, atol=0)


# Types, and bad input

ONE, TWO, EYE = torch.ones(1), torch.ones(2), torch.eye(2)
MODEL = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 1.0)
X, SKEW = torch.zeros(4, 3), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
MIXTURE = GaussianMixture(torch.tensor([0.25, 0.75]), torch.zeros(2, 1), torch.ones(2, 1, 1))
NAN = torch.tensor([1.0, math.nan])

BAD_INPUT = {
    "integer tensor": (
        lambda: closed_form.normal_kl(torch.ones(2, dtype=torch.int64), 1, 0, 1),
        TypeError,
        "loc1",
    ),
    "half": (lambda: closed_form.normal_negentropy(ONE.half()), TypeError, "scale"),
    "list": (lambda: closed_form.standard_normal_kl([0.0], ONE), TypeError, "loc"),
    "boolean": (lambda: closed_form.gaussian_nll(ONE, ONE, True), TypeError, "variance"),
    "zero scale": (
        lambda: closed_form.normal_negentropy(torch.tensor([1.0, 0.0])),
        ValueError,
        r"scale.*\(1,\)",
    ),
    "negative scale": (
        lambda: closed_form.normal_kl(0.0, 1.0, 0.0, -1.0),
        ValueError,
        "scale2.*positive.*-1",
    ),
    "negative entropy scale": (lambda: closed_form.normal_cross_entropy(0, -1, 0, 1), ValueError, "scale1"),
    "NaN": (
        lambda: closed_form.normal_kl(NAN, 1.0, 0.0, 1.0),
        ValueError,
        r"loc1.*finite.*nan at index \(1,\)",
    ),
    "infinite": (lambda: closed_form.normal_kl(0.0, math.inf, 0.0, 1.0), ValueError, "scale1.*finite"),
    "broadcast": (
        lambda: closed_form.normal_kl(torch.zeros(2), torch.ones(3), 0.0, 1.0),
        ValueError,
        r"loc1 \(2,\), scale1 \(3,\)",
    ),
    "standard normal broadcast": (
        lambda: closed_form.standard_normal_kl(TWO, torch.ones(3)),
        ValueError,
        "scale",
    ),
    "covariance for a factor": (
        lambda: closed_form.multivariate_normal_kl(TWO, EYE + 0.5, TWO, EYE),
        ValueError,
        "scale_tril1.*above its diagonal",
    ),
    "factor with a negative diagonal": (
        lambda: closed_form.multivariate_normal_kl(TWO, EYE, TWO, -EYE),
        ValueError,
        "scale_tril2.*positive",
    ),
    "factor that is not square": (
        lambda: closed_form.multivariate_normal_kl(TWO, torch.ones(3, 2), TWO, EYE),
        ValueError,
        "scale_tril1",
    ),
    "mean of another size": (
        lambda: closed_form.multivariate_normal_kl(ONE, EYE, TWO, EYE),
        ValueError,
        "loc1",
    ),
    "factors of two sizes": (
        lambda: closed_form.multivariate_normal_kl(TWO, EYE, TWO, torch.eye(3)),
        ValueError,
        "scale_tril2",
    ),
    "variance": (lambda: closed_form.gaussian_nll(ONE, ONE, 0.0), ValueError, "variance"),
    "weight": (lambda: closed_form.gaussian_reconstruction_loss(ONE, ONE, -1.0), ValueError, "weight"),
    "grey level above one": (lambda: closed_form.bernoulli_nll(2 * ONE, ONE), ValueError, r"x.*\[0, 1\].*2"),
    "infinite logit": (lambda: closed_form.bernoulli_nll(ONE, ONE * math.inf), ValueError, "logits"),
    "grey level below zero": (lambda: closed_form.continuous_bernoulli_nll(-ONE, ONE), ValueError, "x"),
    "NaN logit": (lambda: closed_form.continuous_bernoulli_log_normaliser(NAN), ValueError, "logits"),
    "guide variance": (lambda: closed_form.vae_loss(X, X, X, 0 * X, 1.0), ValueError, "variance"),
    "loss weight": (lambda: closed_form.vae_loss(X, X, X, X + 1, 0.0), ValueError, "weight"),
    "loss broadcast": (
        lambda: closed_form.vae_loss(X, X, torch.zeros(5, 2), torch.ones(5, 2), 1.0),
        ValueError,
        r"\(4,\).*\(5,\)",
    ),
    "loss noise": (lambda: closed_form.negative_elbo(X, X, X, X + 1, -1.0), ValueError, "noise_variance"),
    "no draws": (lambda: closed_form.naive_log_evidence(torch.zeros(0, 3)), ValueError, "log_likelihood"),
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
        "probabilities.*zero",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


def test_numbers_take_the_type_of_the_tensors_beside_them():
    third = closed_form.normal_kl(f64(0.1), 0.3, 0.2, 0.7)
    assert third.dtype == torch.float64
    assert third.item() == pytest.approx(math.log(7 / 3) + (0.09 + 0.01) / 0.98 - 0.5, rel=1e-14)
    assert closed_form.normal_kl(torch.tensor(0.1), 0.3, 0.2, 0.7).dtype == torch.float32
    assert closed_form.normal_negentropy(2).dtype == torch.float64


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
