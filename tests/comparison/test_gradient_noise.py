"""Variance, SNR and zero-mean test of random vectors with known moments."""

import math

import pytest
import torch

from pyro_vae.comparison.gradient_noise import GradientMoments, ZeroMeanTest

MEAN = torch.tensor([0.3, -0.1, 0.0, 0.2, 0.05], dtype=torch.float64)
SCALE = torch.tensor([1.0, 0.5, 2.0, 0.1, 0.7], dtype=torch.float64)


def draws(count, mean=MEAN):
    return mean + SCALE * torch.randn(count, len(SCALE), dtype=torch.float64)


def summarise(sample, **options):
    moments = GradientMoments()
    for draw in sample:
        moments.add(draw)
    return moments.summary(**options)


def test_the_variance_is_the_trace_of_the_sample_covariance():
    sample = draws(33)
    assert summarise(sample).variance == pytest.approx(sample.var(0).sum().item(), rel=1e-12)


def test_the_squared_mean_uses_products_of_different_draws():
    sample = draws(23)
    products = sample @ sample.T
    products.fill_diagonal_(0)
    snr2 = products.sum() / (23 * 22) / sample.var(0).sum()
    assert snr2 > 0
    assert summarise(sample).snr == pytest.approx(snr2.sqrt().item(), rel=1e-12)


def test_moments_and_errors_over_many_experiments():
    summaries = [summarise(draws(40)) for _ in range(400)]
    variance = torch.tensor([s.variance for s in summaries])
    true_variance = SCALE.square().sum().item()
    assert abs(variance.mean() - true_variance) < 5 * variance.std() / math.sqrt(400)
    assert torch.tensor([s.variance_se for s in summaries]).mean() == pytest.approx(
        variance.std().item(), rel=0.15
    )
    # SNR² is unbiased at any noise; a negative estimate gives an SNR of 0
    snr = torch.tensor([summarise(draws(2000)).snr for _ in range(20)])
    true_snr = MEAN.norm().item() / math.sqrt(true_variance)
    assert abs(snr.mean() - true_snr) < 5 * snr.std() / math.sqrt(20)
    snr_se = torch.tensor([summarise(draws(2000)).snr_se for _ in range(20)])
    assert snr_se.mean() == pytest.approx(snr.std().item(), rel=0.5)


def test_pure_noise_has_no_signal():
    snr = [summarise(draws(50, mean=0 * MEAN)).snr for _ in range(200)]
    assert sum(s == 0 for s in snr) > 80  # about half, except for the skewness
    assert max(snr) < 0.5


def test_the_error_of_a_zero_estimate_covers_the_signal():
    experiments = [summarise(draws(50, mean=0 * MEAN)) for _ in range(200)]
    assert sum(s.snr <= 2 * s.snr_se for s in experiments) > 180


def test_negligible_draws_are_zero():
    summary = summarise(1e-12 * draws(12), negligible=1e-20)
    assert (summary.variance, summary.variance_se) == (0.0, 0.0)
    assert math.isnan(summary.snr)


def test_single_precision_draws_do_not_lose_small_signals():
    # The norm of the noise far exceeds that of the signal, as with many parameters
    sample = torch.randn(100, 20_000) + 0.05
    assert summarise(sample).snr == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("size", [1, 3, 200])
def test_the_statistic_is_students_where_the_mean_is_zero(size):
    t = []
    for _ in range(400):
        test = ZeroMeanTest(30)
        for draw in torch.randn(30, size) * torch.linspace(0.1, 2, size):
            test.add(draw)
        t.append(test.t)
    t = torch.tensor(t)
    # Student's t with 14 degrees of freedom: variance 14/12, and 5 % beyond 2.145
    assert abs(t.mean()) < 5 * math.sqrt(14 / 12 / 400)
    beyond = (t.abs() > 2.145).sum().item()
    assert abs(beyond - 20) < 5 * math.sqrt(400 * 0.05 * 0.95)


def test_a_nonzero_mean_is_detected():
    test = ZeroMeanTest(60)
    for draw in draws(60, mean=0 * MEAN + torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0])):
        test.add(draw)
    small = test.t
    test = ZeroMeanTest(60)
    for draw in draws(60, mean=5 * MEAN):
        test.add(draw)
    assert test.t > 4
    assert test.t > small


def test_vectors_of_zeros():
    test = ZeroMeanTest(6)
    for _ in range(6):
        test.add(torch.zeros(3))
    assert test.t == 0.0


def test_constant_differences_give_an_infinite_t():
    test = ZeroMeanTest(6)
    for _ in range(6):
        test.add(torch.ones(3))
    assert test.t == math.inf


def test_too_few_draws_raise():
    with pytest.raises(ValueError, match="at least 4"):
        summarise(draws(3))
    with pytest.raises(ValueError, match="at least 4"):
        ZeroMeanTest(3)


def test_the_mean_square_is_over_draws_not_blocks_or_coordinates():
    moments = GradientMoments()
    draws = torch.randn(23, 4, dtype=torch.float64)  # more than the blocks, and no multiple of them
    for draw in draws:
        moments.add(draw)
    assert moments.mean_square == pytest.approx(float(draws.square().sum(1).mean()), rel=1e-12)
