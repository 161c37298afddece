"""Every density, KL and bound over the range of its parameters and data, against arbitrary precision.

The error of an element is relative to its value, or to the floor of its case: 1 for a log density of real
data, which crosses 0.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from precision import mp
from torch.distributions import kl_divergence

from pyro_vae import closed_form as exact
from pyro_vae import distributions as ours
from pyro_vae.objectives.estimators import CIWAE, IWAE, Renyi

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
TWO_PI = 2 * mp.pi

LOGITS = (-300.0, -88.0, -20.0, -1.0, -0.21, -0.19, -1e-3, 0.0, 1e-6, 0.1, 0.2, 3.0, 17.0, 60.0, 300.0)
GREY = (0.0, 1e-7, 0.25, 0.5, 0.999, 1.0)
LOCS = (-1e4, -3.0, -1e-3, 0.0, 0.7, 50.0)
SCALES = (1e-4, 0.03, 0.9999, 1.0, 1.0001, 4.0, 1e4)
REALS = (-1e5, -2.0, 0.0, 1e-4, 0.7, 1e5)
COUNTS = (0.0, 1.0, 2.0, 16.0, 100.0, 9_999.0, 1e7)
PSEUDO_COUNTS = (1e-6, 0.03, 1.0, 15.9, 300.0, 1e5, 1e8)
RATES = (1e-20, 1e-6, 0.1, 15.9, 100.0, 1e4, 1e7, 1e12)


def log1pexp(a):
    return mp.log1p(mp.exp(a))


def bernoulli(eta, x):
    return x * -log1pexp(-eta) + (1 - x) * -log1pexp(eta)


def continuous_bernoulli(eta, x):
    return x * eta - (mp.log(mp.expm1(eta) / eta) if eta else 0)


def normal(loc, variance, x):
    return -((x - loc) ** 2) / (2 * variance) - mp.log(TWO_PI * variance) / 2


def normal_kl(m1, s1, m2, s2):
    return mp.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - mp.mpf(1) / 2


def poisson(rate, x):
    return x * mp.log(rate) - rate - mp.loggamma(x + 1)


def negative_binomial(m, r, x):
    choices = mp.loggamma(x + r) - mp.loggamma(r) - mp.loggamma(x + 1)
    return choices + r * mp.log(r / (r + m)) + x * mp.log(m / (r + m))


def beta_binomial(a, b, x, n=255):
    choices = mp.loggamma(n + 1) - mp.loggamma(x + 1) - mp.loggamma(n - x + 1)
    return choices + _log_beta(x + a, n - x + b) - _log_beta(a, b)


def _log_beta(a, b):
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


def discretized_logistic(loc, scale, x):
    half = mp.mpf(1) / 510

    def below(edge):
        return 1 / (1 + mp.exp(-(edge - loc) / scale))

    upper = mp.mpf(1) if x > 1 - half else below(x + half)
    if x < half:
        return mp.log(upper)
    if x > 1 - half:  # by the upper tail, which does not cancel
        return -log1pexp((x - half - loc) / scale)
    a, b = (x - half - loc) / scale, (x + half - loc) / scale
    return -log1pexp(-b) - log1pexp(a) + mp.log(-mp.expm1(a - b))


def mixture(loc1, scale1, loc2, scale2, x):
    parts = (mp.exp(normal(m, s**2, x)) for m, s in ((loc1, scale1), (loc2, scale2)))
    return mp.log(sum(w * part for w, part in zip((mp.mpf(1) / 4, mp.mpf(3) / 4), parts, strict=True)))


def normal_mixture(loc1, scale1, loc2, scale2, x):
    weights = torch.tensor([0.25, 0.75], dtype=x.dtype)
    parts = dist.Normal(
        torch.stack([loc1, loc2], -1)[..., None], torch.stack([scale1, scale2], -1)[..., None]
    )
    return ours.NormalMixture(
        dist.Categorical(weights.expand(*x.shape, 2)), parts.to_event(1), validate_args=False
    ).log_prob(x[..., None])


def full_covariance(loc, scale, below, q_scale):
    zero, one = torch.zeros_like(loc), torch.ones_like(loc)
    factor = torch.stack([torch.stack([scale, zero], -1), torch.stack([below, scale], -1)], -2)
    q = dist.Normal(torch.stack([zero, one], -1), torch.stack([q_scale, q_scale], -1)).to_event(1)
    return kl_divergence(dist.MultivariateNormal(torch.stack([loc, one], -1), scale_tril=factor), q)


def full_covariance_kl(loc, scale, below, q_scale):
    zero = mp.mpf(0)
    return (
        normal_kl(loc, scale, zero, q_scale)
        + normal_kl(zero, scale, zero, q_scale)
        + below**2 / (2 * q_scale**2)
    )


def two_dimensional(loc, scale, below, q_scale):
    zero = torch.zeros_like(loc)
    factor = torch.stack([torch.stack([scale, zero], -1), torch.stack([below, scale], -1)], -2)
    other = torch.diag_embed(torch.stack([q_scale, q_scale], -1))
    return exact.multivariate_normal_kl(
        torch.stack([loc, zero], -1), factor, torch.zeros_like(torch.stack([loc, zero], -1)), other
    )


def low_rank(v, w, variance):
    factor, diagonal = torch.stack([v, w], -1)[..., None], torch.stack([variance, variance], -1)
    return ours.LowRankMultivariateNormal(torch.zeros_like(diagonal), factor, diagonal)


def low_rank_density(v, w, variance, x):
    determinant = variance * (variance + v**2 + w**2)
    along, across = (v**2 + variance, w**2 + variance), v * w
    distance = (along[1] * x**2 - 2 * across * x + along[0]) / determinant  # of (x, 1)
    return -distance / 2 - mp.log(determinant) / 2 - mp.log(TWO_PI)


def low_rank_kl(v, w, variance, q_scale):
    total, determinant = v**2 + w**2 + 2 * variance, variance * (variance + v**2 + w**2)
    return (total / q_scale**2 - 2 - mp.log(determinant / q_scale**4)) / 2


def low_rank_to_diagonal(v, w, variance, q_scale):
    q = dist.Normal(torch.zeros(2, dtype=v.dtype), torch.stack([q_scale, q_scale], -1)).to_event(1)
    return kl_divergence(low_rank(v, w, variance), q)


class Case(NamedTuple):
    """A function of tensors of one shape, the same of mpmath's numbers, and the values of each argument."""

    found: Callable[..., Any]
    truth: Callable[..., Any]
    grids: tuple
    floor: Callable[..., float] = lambda *_: 0.0  # absolute errors count relative to this, if it is larger
    differentiable: int = 99  # number of the first arguments that are parameters


def crosses_zero(*_):
    return 1.0


CASES = {
    "Bernoulli": Case(
        lambda eta, x: ours.Bernoulli(logits=eta).log_prob(x),
        bernoulli,
        (LOGITS, (0.0, 1.0)),
        differentiable=1,
    ),
    "ContinuousBernoulli": Case(
        lambda eta, x: ours.ContinuousBernoulli(eta).log_prob(x),
        continuous_bernoulli,
        (LOGITS, GREY),
        crosses_zero,
        differentiable=1,
    ),
    "DiscretizedLogistic": Case(
        lambda loc, scale, x: ours.DiscretizedLogistic(loc, scale).log_prob(x),
        discretized_logistic,
        ((-30.0, 0.0, 0.3, 0.5, 1.0, 7.0), (1e-3, 0.05, 1.0, 1e4), (0.0, 1 / 255, 128 / 255, 254 / 255, 1.0)),
        differentiable=2,
    ),
    "Normal": Case(
        lambda loc, scale, x: dist.Normal(loc, scale).log_prob(x),
        lambda loc, scale, x: normal(loc, scale**2, x),
        (LOCS, SCALES, REALS),
        crosses_zero,
    ),
    "Poisson": Case(
        lambda rate, x: ours.Poisson(rate).log_prob(x), poisson, (RATES, COUNTS), differentiable=1
    ),
    "NegativeBinomial": Case(
        lambda m, r, x: ours.NegativeBinomial(m, r).log_prob(x),
        negative_binomial,
        (RATES[1:-1], (1e-6, 0.5, 10.0, 1e4, 1e8), COUNTS),
        crosses_zero,
        differentiable=2,
    ),
    "BetaBinomial": Case(
        lambda a, b, x: ours.BetaBinomial(a, b).log_prob(x),
        beta_binomial,
        (PSEUDO_COUNTS, PSEUDO_COUNTS, (0.0, 1.0, 100.0, 254.0, 255.0)),
        crosses_zero,
        differentiable=2,
    ),
    "NormalMixture": Case(
        normal_mixture, mixture, (LOCS[1:-1], SCALES[1:-1], (0.0, 3.0), (1.0, 0.1), REALS[1:-1]), crosses_zero
    ),
    "multivariate_to_diagonal_normal": Case(
        full_covariance, full_covariance_kl, (LOCS, SCALES, (-2.0, 0.0, 1e-3), SCALES)
    ),
    "LowRankMultivariateNormal": Case(
        lambda v, w, variance, x: low_rank(v, w, variance).log_prob(torch.stack([x, torch.ones_like(x)], -1)),
        low_rank_density,
        ((0.0, 1e-3, 1.0, 30.0, 1e3), (0.0, 0.7, -40.0), (1e-4, 0.3, 1.0, 1e4), REALS[1:-1]),
        crosses_zero,
    ),
    "multivariate_to_diagonal_normal, low rank": Case(
        low_rank_to_diagonal,
        low_rank_kl,
        ((0.0, 1e-3, 1.0, 30.0), (0.0, 0.7, -40.0), (1e-4, 0.3, 1.0, 1e4), SCALES[1:-1]),
        crosses_zero,
    ),
    "closed_form.normal_kl": Case(exact.normal_kl, normal_kl, (LOCS, SCALES, LOCS, SCALES)),
    "closed_form.standard_normal_kl": Case(
        lambda loc, scale: exact.standard_normal_kl(loc[..., None], scale[..., None]),
        lambda loc, scale: normal_kl(loc, scale, mp.mpf(0), mp.mpf(1)),
        (LOCS, SCALES),
    ),
    "closed_form.multivariate_normal_kl": Case(
        two_dimensional, full_covariance_kl, (LOCS, SCALES, (-2.0, 0.0, 1e-3), SCALES)
    ),
    "closed_form.normal_negentropy": Case(
        exact.normal_negentropy, lambda s: -(1 + mp.log(TWO_PI * s**2)) / 2, (SCALES,), crosses_zero
    ),
    "closed_form.normal_cross_entropy": Case(
        exact.normal_cross_entropy,
        lambda m1, s1, m2, s2: (mp.log(TWO_PI * s2**2) + (s1**2 + (m1 - m2) ** 2) / s2**2) / 2,
        (LOCS, SCALES, LOCS, SCALES),
        crosses_zero,
    ),
    "closed_form.gaussian_nll": Case(
        lambda x, loc, variance: exact.gaussian_nll(x[..., None], loc[..., None], variance[..., None]),
        lambda x, loc, variance: -normal(loc, variance, x),
        (REALS, LOCS, SCALES),
        crosses_zero,
    ),
    "closed_form.bernoulli_nll": Case(
        lambda eta, x: exact.bernoulli_nll(x[..., None], eta[..., None]),
        lambda eta, x: -bernoulli(eta, x),
        (LOGITS, GREY),
        differentiable=1,
    ),
    "closed_form.continuous_bernoulli_log_normaliser": Case(
        exact.continuous_bernoulli_log_normaliser,
        lambda eta: mp.log(eta / mp.tanh(eta / 2)) if eta else mp.log(2),
        (LOGITS,),
    ),
    "closed_form.continuous_bernoulli_nll": Case(
        lambda eta, x: exact.continuous_bernoulli_nll(x[..., None], eta[..., None]),
        lambda eta, x: -continuous_bernoulli(eta, x),
        (LOGITS, GREY),
        crosses_zero,
        differentiable=1,
    ),
}


def values_and_inputs(case: Case, dtype: torch.dtype):
    rows = list(product(*case.grids))
    inputs = [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)]
    for tensor in inputs[: case.differentiable]:
        tensor.requires_grad_()
    return case.found(*inputs), inputs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_digits_are_held_over_the_whole_range(name, dtype):
    case = CASES[name]
    found, inputs = values_and_inputs(case, dtype)
    smallest = torch.finfo(torch.float32).tiny
    wrong = []
    for value, *row in zip(found.tolist(), *(tensor.tolist() for tensor in inputs), strict=True):
        truth = case.truth(*map(mp.mpf, row))
        error = abs(mp.mpf(value) - truth) / max(abs(truth), case.floor(*row), smallest)
        if not error <= TOLERANCE[dtype]:
            wrong.append((row, value, float(truth), float(error)))
    assert not wrong, f"{len(wrong)} of {len(found)}, the worst {max(wrong, key=lambda each: each[-1])}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_where_the_value_is(name, dtype):
    case = CASES[name]
    found, inputs = values_and_inputs(case, dtype)
    assert found.isfinite().all()
    found.sum().backward()
    for number, tensor in enumerate(inputs[: case.differentiable]):
        rows = [[t[i].item() for t in inputs] for i in (~tensor.grad.isfinite()).nonzero().flatten()]
        assert not rows, f"argument {number} at {rows[:3]}"


# Bounds -----------------------------------------------------------------------------------------------------

WEIGHTS = {
    "alike": (-1000.0, -1000.25, -999.5),
    "apart": (-1e5, -3.0, -200.0),
    "large": (1e4, 1e4 + 1, 9.9e3),
    "near zero": (1e-3, -2e-3, 5e-4),
    "one impossible": (-float("inf"), -3.0, -4.0),
}


class Weights:
    """Terms as far as a bound reads them."""

    def __init__(self, log_weight):
        self.log_weight = log_weight


def power_mean(weights, alpha):
    power = 1 - mp.mpf(alpha)
    terms = [mp.exp(power * w) if mp.isfinite(w) else mp.mpf(0) for w in weights]
    return mp.log(sum(terms) / len(terms)) / power


BOUNDS = {
    "IWAE": (IWAE(3), lambda weights: power_mean(weights, 0.0)),
    **{
        f"Renyi({alpha})": (Renyi(alpha, 3), lambda weights, alpha=alpha: power_mean(weights, alpha))
        for alpha in (-1.5, 0.5, 0.999, 1 - 1e-6, 1 + 1e-6, 2.0)
    },
    "CIWAE": (CIWAE(0.5, 3), lambda w: (sum(w) / len(w) + power_mean(w, 0.0)) / 2),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_hold_their_digits(name, weights, dtype):
    estimator, truth = BOUNDS[name]
    log_weight = torch.tensor(WEIGHTS[weights], dtype=dtype)[:, None].requires_grad_()
    impossible = not log_weight.isfinite().all()
    if impossible and (name == "CIWAE" or getattr(estimator, "alpha", 0) > 1):
        pytest.skip("the bound is -inf")
    found = estimator.bound(Weights(log_weight))
    expected = truth([mp.mpf(w) for w in log_weight.flatten().tolist()])
    largest = max(abs(w) for w in WEIGHTS[weights] if w > -float("inf"))
    tolerance = TOLERANCE[dtype] * max(abs(float(expected)), largest)
    assert abs(mp.mpf(found.item()) - expected) <= tolerance
    (gradient,) = torch.autograd.grad(found.sum(), log_weight)
    assert gradient.isfinite().all()
    rounding = 10 * max(1, largest) * torch.finfo(dtype).eps  # of the logarithms of the weights
    assert gradient.sum().item() == pytest.approx(1, rel=rounding)
