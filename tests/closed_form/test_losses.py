"""Analytic losses against quadrature (scipy), arbitrary precision (mpmath) and dense linear algebra."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from precision import f64, mp, random_guide, relative
from scipy import integrate, stats
from torch import Tensor

from pyro_vae import closed_form

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
    factor1 = torch.linalg.cholesky(covariance1).unsqueeze(1).requires_grad_()  # (2, 1, 3, 3)
    factor2 = torch.linalg.cholesky(covariance2).requires_grad_()
    loc1 = loc1.unsqueeze(1).requires_grad_()

    def kl(loc1: Tensor, factor1: Tensor, factor2: Tensor) -> Tensor:
        return closed_form.multivariate_normal_kl(loc1, factor1.tril(), loc2, factor2.tril())

    assert kl(loc1, factor1, factor2).shape == (2, 4)
    assert torch.autograd.gradcheck(kl, (loc1, factor1, factor2))


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


def test_bernoulli_nll_of_grey_levels_is_not_a_density():
    density = integrate.quad(
        lambda x: math.exp(-closed_form.bernoulli_nll(f64(x).reshape(1), f64(0.0).reshape(1))), 0, 1
    )[0]
    assert density == pytest.approx(0.5, abs=1e-10)


# VAE losses


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
    assert without < 0  # it always favours more noise


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


# Dtypes and bad input

ONE, TWO, EYE = torch.ones(1), torch.ones(2), torch.eye(2)
X = torch.zeros(4, 3)
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
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_raises_an_error_that_names_it(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


def test_numbers_take_the_dtype_of_the_tensor_arguments():
    third = closed_form.normal_kl(f64(0.1), 0.3, 0.2, 0.7)
    assert third.dtype == torch.float64
    assert third.item() == pytest.approx(math.log(7 / 3) + (0.09 + 0.01) / 0.98 - 0.5, rel=1e-14)
    assert closed_form.normal_kl(torch.tensor(0.1), 0.3, 0.2, 0.7).dtype == torch.float32
    assert closed_form.normal_negentropy(2).dtype == torch.float64
