import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from precision import mp
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import integrate, stats
from solved import within
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.closed_form import multivariate_normal_kl
from pyro_vae.distributions import (
    Bernoulli,
    BetaBinomial,
    ContinuousBernoulli,
    DiscretizedLogistic,
    NegativeBinomial,
    Poisson,
)

K, N, S = 3, 5, 7
LOGITS = [-800.0, -40.0, -3.0, -0.21, -0.19, -1e-4, 0.0, 1e-9, 0.05, 0.2, 1.0, 17.0, 300.0]


def test_bernoulli_is_accurate_for_confident_logits_of_either_sign():
    logits = torch.tensor(LOGITS, requires_grad=True)
    wide = logits.detach().double()
    for x, size in ((0.0, wide), (1.0, -wide)):
        log_prob = Bernoulli(logits=logits).log_prob(torch.full_like(wide, x).float())
        truth = -torch.clamp(size, min=0) - torch.log1p(torch.exp(-size.abs()))
        torch.testing.assert_close(log_prob.double(), truth, rtol=1e-6, atol=1e-38)
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        torch.testing.assert_close(gradient.double(), x - torch.sigmoid(wide), rtol=1e-5, atol=1e-7)


def test_bernoulli_agrees_with_torch():
    logits = torch.tensor([[-800.0, -40.0, -3.0, 0.0], [2.0, 21.0, 40.0, 800.0]]).double().requires_grad_()
    x = torch.tensor([[[0.0, 1.0, 1.0, 0.0]], [[1.0, 0.0, 1.0, 1.0]], [[0.0, 0.0, 1.0, 1.0]]]).double()
    ours = Bernoulli(logits=logits).log_prob(x)
    theirs = torch.distributions.Bernoulli(logits=logits).log_prob(x)
    assert ours.shape == (3, 2, 4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="support"):
        Bernoulli(logits=logits).log_prob(x + 0.5)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_integrates_to_one_with_the_stated_mean(logit):
    p = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))

    def density(x):
        return p.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item()

    # the mass of a steep density lies at one end, within some multiples of 1 / |logit|
    ends = [0.0, *[point for point in (30 / abs(logit or 1), 1 - 30 / abs(logit or 1)) if 0 < point < 1], 1.0]
    pieces = list(zip(sorted(ends)[:-1], sorted(ends)[1:], strict=True))
    mass = sum(integrate.quad(density, a, b, epsabs=1e-13)[0] for a, b in pieces)
    mean = sum(integrate.quad(lambda x: x * density(x), a, b, epsabs=1e-13)[0] for a, b in pieces)
    assert mass == pytest.approx(1, abs=1e-10)
    assert p.mean.item() == pytest.approx(mean, abs=1e-10)


def test_continuous_bernoulli_gradient_is_x_minus_the_mean():
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(0, 1, len(LOGITS), dtype=torch.float64)
    p = ContinuousBernoulli(logits)
    (gradient,) = torch.autograd.grad(p.log_prob(x).sum(), logits)
    torch.testing.assert_close(gradient, (x - p.mean).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("logit", [-0.199, -0.1, 0.03, 0.15, 0.19, 0.21, 3.0])
def test_continuous_bernoulli_is_exact_near_the_uniform(logit):
    eta = mp.mpf(logit)
    for x in (0.0, 0.3, 1.0):
        found = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64)).log_prob(
            torch.tensor(x, dtype=torch.float64)
        )
        exact = mp.mpf(x) * eta - mp.log(mp.expm1(eta) / eta)
        assert float(abs(mp.mpf(found.item()) - exact)) < 1e-15 * max(1, abs(logit))


@pytest.mark.parametrize(
    "make",
    [
        lambda value: ContinuousBernoulli(value, validate_args=False),
        lambda value: Poisson(value, validate_args=False),
        lambda value: NegativeBinomial(value, value, validate_args=False),
        lambda value: DiscretizedLogistic(value, value, validate_args=False),
        lambda value: BetaBinomial(value, value, validate_args=False),
    ],
)
def test_expanding_checks_no_parameters(make):
    expanded = make(torch.tensor([math.nan, -1.0])).expand((3, 2))
    assert expanded.batch_shape == (3, 2)
    assert not expanded._validate_args


def test_the_slope_of_the_continuous_bernoulli_mean_is_its_variance():
    logits = torch.tensor([-800.0, -3.0, -0.21, -0.19, 0.0, 0.05, 0.2, 1.0, 17.0]).double().requires_grad_()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():  # of NaN on the way
        (slope,) = torch.autograd.grad(ContinuousBernoulli(logits).mean.sum(), logits)
    variance = [
        1 / 12 if a == 0 else float(1 / (4 * a**2) - 1 / (4 * mp.sinh(a) ** 2))
        for a in map(mp.mpf, (logits / 2).tolist())
    ]
    torch.testing.assert_close(slope, torch.tensor(variance, dtype=torch.float64), rtol=0, atol=1e-11)


def test_continuous_bernoulli_is_exact_where_torch_clamps():
    logit = torch.tensor(40.0)  # log((e^40 − 1) / 40) = 40 − log 40
    ours = ContinuousBernoulli(logit).log_prob(torch.tensor(1.0)).item()
    theirs = torch.distributions.ContinuousBernoulli(logits=logit).log_prob(torch.tensor(1.0)).item()
    assert ours == pytest.approx(math.log(40), abs=1e-6)
    assert abs(theirs - math.log(40)) > 0.5


@pytest.mark.parametrize("logit", [-30.0, -0.5, 0.0, 5e-4, 2.0, 80.0])
def test_continuous_bernoulli_samples_have_the_stated_mean(logit):
    p = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))
    draws = p.sample((40_000,))
    assert ((draws >= 0) & (draws <= 1)).all()
    assert abs(draws.mean() - p.mean) < 5 * draws.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("logit", [-30.0, -0.5, 0.0, 5e-4, 2.0, 80.0])
def test_continuous_bernoulli_draws_carry_the_gradient_of_the_mean(logit):
    logits = torch.full((40_000,), logit, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(ContinuousBernoulli(logits).rsample().sum(), logits)
    at = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ContinuousBernoulli(at).mean, at)
    assert abs(slopes.mean() - expected) < 5 * slopes.std() / math.sqrt(len(slopes))


def test_continuous_bernoulli_samples_follow_the_distribution_function():
    p = ContinuousBernoulli(torch.tensor(-2.0, dtype=torch.float64))
    draws = p.sample((40_000,))
    for x in (0.1, 0.5, 0.8):
        below = math.expm1(-2 * x) / math.expm1(-2)
        assert abs((draws < x).double().mean() - below) < 5 * math.sqrt(below * (1 - below) / len(draws))


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.07), (-2.0, 1e-3), (0.999, 1e-5), (0.5, 30.0)])
def test_discretized_logistic_sums_to_one_with_the_stated_mean(levels, loc, scale):
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    p = DiscretizedLogistic(torch.tensor(loc).double(), torch.tensor(scale).double(), levels=levels)
    probabilities = p.expand((levels,)).log_prob(values).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert p.mean.item() == pytest.approx((values * probabilities).sum().item(), abs=1e-12)


def test_discretized_logistic_is_accurate_in_its_tails():
    loc, scale = torch.tensor(0.0, requires_grad=True), torch.tensor(1e-3, requires_grad=True)
    log_prob = DiscretizedLogistic(loc, scale).log_prob(torch.tensor(200 / 255))
    # σ(b) − σ(a) for a, b ≫ 0 is e^(−a) − e^(−b)
    a, b = (199.5 / 255) / 1e-3, (200.5 / 255) / 1e-3
    assert log_prob.item() == pytest.approx(-a + np.log1p(-np.exp(a - b)), rel=1e-5)
    log_prob.backward()
    assert torch.isfinite(loc.grad)
    assert torch.isfinite(scale.grad)


def test_discretized_logistic_draws_grey_levels_with_their_probabilities():
    p = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.2), levels=4)
    draws = p.sample((30_000,))
    assert p.support.check(draws).all()
    for value in (0.0, 1 / 3, 2 / 3, 1.0):
        expected = p.log_prob(torch.tensor(value)).exp().item()
        found = ((draws - value).abs() < 1e-6).double().mean().item()
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / len(draws))


def test_values_outside_the_support_raise():
    with pytest.raises(ValueError, match="multiples of 1/255"):
        DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.2)).log_prob(torch.tensor(0.3))
    with pytest.raises(ValueError, match="support"):
        ContinuousBernoulli(torch.tensor(0.4)).log_prob(torch.tensor(1.2))
    with pytest.raises(ValueError, match="levels must be at least 2"):
        DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.2), levels=1)


# Kullback-Leibler divergences


def full(*batch):
    scale_tril = (
        torch.randn(*batch, K, K).double().tril(-1) + torch.rand(*batch, K).double().diag_embed() + 0.1
    )
    return dist.MultivariateNormal(torch.randn(*batch, K).double(), scale_tril=scale_tril.tril())


def low_rank(*batch):
    return dist.LowRankMultivariateNormal(
        torch.randn(*batch, K).double(),
        torch.randn(*batch, K, 2).double(),
        torch.rand(*batch, K).double() + 0.1,
    )


def diagonal(*batch):
    return dist.Normal(torch.randn(*batch, K).double(), torch.rand(*batch, K).double() + 0.1).to_event(1)


@pytest.mark.parametrize("make", [full, low_rank])
@pytest.mark.parametrize(
    ("p_batch", "q_batch"), [((), ()), ((N,), ()), ((N,), (N,)), ((S, 1), (N,)), ((), (N,))]
)
def test_kl_is_the_analytic_one(make, p_batch, q_batch):
    p, q = make(*p_batch), diagonal(*q_batch)
    analytic = multivariate_normal_kl(
        p.loc, torch.linalg.cholesky(p.covariance_matrix), q.mean, q.stddev.diag_embed()
    )
    torch.testing.assert_close(kl_divergence(p, q), analytic, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [full, low_rank])
def test_expanded_distributions_have_a_kl(make):
    p, q = make(N), diagonal()
    expanded = kl_divergence(p.expand((S, N)), q.expand((S, N)))
    assert expanded.shape == (S, N)
    torch.testing.assert_close(expanded, kl_divergence(p, q).expand(S, N), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [full, low_rank])
@pytest.mark.parametrize(
    "q",
    [
        dist.Laplace(torch.zeros(K), 1.0).to_event(1),
        dist.Normal(torch.zeros(2, K), 1.0).to_event(2),
        diagonal().mask(False),
    ],
)
def test_other_distributions_have_no_kl(make, q):
    with pytest.raises(NotImplementedError):
        kl_divergence(make(), q)


@pytest.mark.parametrize("guide", [pv.guides.FullCovarianceNormal, pv.guides.LowRankNormal])
@pytest.mark.parametrize("prior", [pv.priors.StandardNormal, pv.priors.LearnedNormal])
@pytest.mark.parametrize("vectorize", [False, True])
def test_trace_mean_field_elbo_uses_the_registered_kl(guide, prior, vectorize):
    vae = pv.VAE(
        prior=prior(K),
        likelihood=pv.likelihoods.Normal(K, (4,), network=nn.Linear(K, 4)),
        guide=guide((4,), K),
    ).double()
    nn.init.zeros_(vae.likelihood.network.weight)  # x is independent of z: only the KL may vary
    x = torch.randn(N, 4).double()
    q, p = vae.encode(x), vae.prior()
    reconstruction = vae.decode(torch.zeros(N, K).double()).log_prob(x)
    exact = reconstruction - multivariate_normal_kl(
        q.mean, torch.linalg.cholesky(q.covariance_matrix), p.mean, p.stddev.diag()
    )
    options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    loss = TraceMeanField_ELBO(**options).loss(vae.model, vae.guide, x)
    assert loss == pytest.approx(-exact.sum().item(), rel=1e-10)
    assert abs(Trace_ELBO(**options).loss(vae.model, vae.guide, x) - loss) > 1e-3  # Trace_ELBO samples the KL


# Counts, against arbitrary precision ------------------------------------------------------------------------

RATES = (1e-6, 0.1, 3.7, 15.3, 16.0, 100.0, 1e4, 1e5, 1e7)
DISPERSIONS = (1e-6, 0.5, 1.0, 10.0, 1e3, 1e4, 1e6, 1e8)


def counts_near(mean):
    spread = mean**0.5
    return sorted(
        {0, 1, 2, 15, 16, 17, 10**7, *(round(mean + k * spread) for k in (0, 1, 5)), round(2 * mean)}
    )


def poisson_by_definition(x, rate):
    return x * mp.log(rate) - rate - mp.loggamma(x + 1)


def negative_binomial_by_definition(x, m, r):
    choices = mp.loggamma(x + r) - mp.loggamma(r) - mp.loggamma(x + 1)
    return choices + r * mp.log(r / (r + m)) + x * mp.log(m / (r + m))


def largest_error(found, expected):
    """Relative where the logarithm is beyond -1, absolute where it is nearer to 0."""
    return max(float(abs(mp.mpf(f) - e) / max(1, abs(e))) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_poisson_holds_its_digits(dtype, tolerance):
    cases = [(rate, x) for rate in RATES for x in counts_near(rate)]
    rate, x = (torch.tensor(column, dtype=dtype) for column in zip(*cases, strict=True))
    found = Poisson(rate).log_prob(x).tolist()
    exact = [
        poisson_by_definition(*map(mp.mpf, pair)) for pair in zip(x.tolist(), rate.tolist(), strict=True)
    ]
    assert largest_error(found, exact) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_negative_binomial_holds_its_digits(dtype, tolerance):
    cases = [(m, r, x) for m in RATES for r in DISPERSIONS for x in counts_near(m)]
    columns = [torch.tensor(column, dtype=dtype) for column in zip(*cases, strict=True)]
    found = NegativeBinomial(columns[0], columns[1]).log_prob(columns[2]).tolist()
    exact = [
        negative_binomial_by_definition(mp.mpf(x), mp.mpf(m), mp.mpf(r))
        for m, r, x in zip(*(column.tolist() for column in columns), strict=True)
    ]
    assert largest_error(found, exact) < tolerance


@pytest.mark.parametrize("rate", [0.3, 15.9, 1e3, 1e7])
def test_the_gradient_of_poisson_is_exact(rate):
    x = torch.tensor([0.0, 1.0, 17.0, rate // 1, 1.05 * rate // 1, 2 * rate // 1], dtype=torch.float64)
    rates = torch.full_like(x, rate).requires_grad_()
    (gradient,) = torch.autograd.grad(Poisson(rates).log_prob(x).sum(), rates)
    torch.testing.assert_close(gradient, x / rate - 1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("r", [0.5, 20.0, 1e6])
def test_the_gradients_of_the_negative_binomial_are_exact(r):
    x = torch.tensor([0.0, 1.0, 7.0, 90.0, 104.0, 300.0], dtype=torch.float64)
    m, dispersion = (torch.full_like(x, value).requires_grad_() for value in (97.0, r))
    log_prob = NegativeBinomial(m, dispersion).log_prob(x).sum()
    of_mean, of_dispersion = torch.autograd.grad(log_prob, (m, dispersion))
    torch.testing.assert_close(of_mean, x / 97 - (x + r) / (97 + r), rtol=1e-8, atol=1e-12)
    by_definition = [
        float(mp.diff(lambda q, x=x: negative_binomial_by_definition(mp.mpf(x), mp.mpf(97), q), r))
        for x in x.tolist()
    ]
    expected = torch.tensor(by_definition, dtype=torch.float64)
    torch.testing.assert_close(of_dispersion, expected, rtol=1e-4, atol=1e-13)


def test_counts_in_single_precision_as_in_double():
    """2,000 elements of mean 1e5: torch's Poisson is off by 66 nats."""
    rate = torch.full((2000,), 1e5)
    x = torch.poisson(rate)
    for family in (Poisson(rate), NegativeBinomial(rate, torch.full_like(rate, 1e6))):
        parameters = [p.double() for p in (rate, torch.full_like(rate, 1e6))]
        double = Poisson(parameters[0]) if isinstance(family, Poisson) else NegativeBinomial(*parameters)
        torch.testing.assert_close(
            family.log_prob(x).sum().double(), double.log_prob(x.double()).sum(), rtol=1e-6, atol=0
        )


def test_unchecked_values_between_the_counts_have_the_density_of_the_formula():
    x, m, r = (
        torch.tensor([0.25, 0.75, 1.5, 20.3]).double(),
        torch.tensor(3.7).double(),
        torch.tensor(1.9).double(),
    )
    poisson = Poisson(m, validate_args=False).log_prob(x)
    negative_binomial = NegativeBinomial(m, r, validate_args=False).log_prob(x)
    for value, found in zip(x.tolist(), zip(poisson, negative_binomial, strict=True), strict=True):
        exact = (
            poisson_by_definition(value, m.item()),
            negative_binomial_by_definition(value, m.item(), r.item()),
        )
        assert [float(f) for f in found] == pytest.approx([float(e) for e in exact], abs=1e-12)


def test_negative_binomial_draws_have_its_moments():
    family = NegativeBinomial(torch.tensor([3.0, 40.0]), torch.tensor([0.7, 5.0]))
    x = family.sample((40_000,))
    within(x.mean(0), family.mean, (family.variance / 40_000).sqrt())
    fourth = ((x - family.mean) ** 4).mean(0)
    within(x.var(0), family.variance, ((fourth - family.variance**2) / 40_000).sqrt())


ALPHAS, BETAS, TOTAL = (0.02, 0.7, 20.0, 1e4), (0.3, 5.0, 400.0), 13


def test_the_beta_binomial_of_scipy_and_of_a_large_sum_in_single_precision():
    for alpha, beta in itertools.product(ALPHAS, BETAS):
        family = BetaBinomial(torch.tensor(alpha).double(), torch.tensor(beta).double(), total_count=TOTAL)
        x = family.enumerate_support()
        expected = stats.betabinom(TOTAL, float(family.alpha), float(family.beta)).logpmf(x.numpy())
        torch.testing.assert_close(family.log_prob(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)
        assert family.log_prob(x).logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    a, b, x = torch.tensor(3.3e6), torch.tensor(1.7e7), torch.arange(256.0)
    double = BetaBinomial(a.double(), b.double()).log_prob(x.double())
    torch.testing.assert_close(BetaBinomial(a, b).log_prob(x).double(), double, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradients_of_the_beta_binomial_are_exact(alpha):
    x = torch.arange(TOTAL + 1).double()
    a, b = (torch.full_like(x, value).requires_grad_() for value in (alpha, 5.0))
    found = torch.autograd.grad(BetaBinomial(a, b, total_count=TOTAL).log_prob(x).sum(), (a, b))
    of_sum = torch.digamma(a + b) - torch.digamma(a + b + TOTAL)
    for gradient, own, count in ((found[0], a, x), (found[1], b, TOTAL - x)):
        expected = torch.digamma(own + count) - torch.digamma(own) + of_sum
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-7, atol=1e-11)


def test_beta_binomial_draws_have_its_moments():
    family = BetaBinomial(torch.tensor([0.3, 40.0]), torch.tensor([0.7, 5.0]), total_count=TOTAL)
    x = family.sample((40_000,))
    levels = family.enumerate_support()
    mass = family.log_prob(levels).exp()
    torch.testing.assert_close((mass * levels).sum(0), family.mean)
    torch.testing.assert_close((mass * (levels - family.mean) ** 2).sum(0), family.variance)
    within(x.mean(0), family.mean, (family.variance / 40_000).sqrt())
    fourth = ((x - family.mean) ** 4).mean(0)
    within(x.var(0), family.variance, ((fourth - family.variance**2) / 40_000).sqrt())


def test_beta_binomial_expands_and_names_values_outside():
    family = BetaBinomial(torch.tensor(3.0), torch.tensor([0.7, 5.0]), total_count=TOTAL).expand((4, 2))
    assert family.log_prob(torch.ones(2)).shape == (4, 2)
    assert family.enumerate_support().shape == (TOTAL + 1, 4, 2)
    assert family.enumerate_support(expand=False).shape == (TOTAL + 1, 1, 1)
    checked = BetaBinomial(torch.ones(2), torch.ones(2), total_count=TOTAL, validate_args=True)
    for value in (-1.0, 0.5, 14.0, math.nan):
        with pytest.raises(ValueError, match=rf"value\[1\] = {value:.6g} lies outside the support"):
            checked.log_prob(torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match=r"Multiply grey levels of \[0, 1\] by 255 and round them"):
        BetaBinomial(torch.ones(2), torch.ones(2), validate_args=True).log_prob(torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match="total_count must be at least 1"):
        BetaBinomial(torch.ones(2), torch.ones(2), total_count=0)


def test_negative_binomial_expands():
    family = NegativeBinomial(torch.tensor(3.0), torch.tensor([0.7, 5.0])).expand((4, 2))
    assert family.log_prob(torch.ones(2)).shape == (4, 2)
    with pytest.raises(ValueError, match=r"value\[1\] = -1 lies outside the support"):
        NegativeBinomial(torch.ones(2), torch.ones(2), validate_args=True).log_prob(torch.tensor([1.0, -1.0]))
