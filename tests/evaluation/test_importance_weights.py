"""Importance-weight estimates against known distributions of weights."""

import itertools
import math

import pytest
import torch
from pyro.ops.stats import fit_generalized_pareto
from solved import within

from pyro_vae.evaluation.importance_weights import bound_by_particles, pareto_smoothed, summarise_weights

S, N = 3000, 4


def pareto_k(log_weight):
    return pareto_smoothed(log_weight)[1]


def pareto_weights(shape):
    """Draw log weights (S, N) whose tail has the given shape."""
    u = torch.rand(S, N, dtype=torch.float64)
    return torch.log1p(shape * (u.pow(-shape) - 1) / shape)


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.1])
def test_the_tail_has_the_shape_it_was_drawn_with(shape):
    k = pareto_k(pareto_weights(shape))
    within(k, shape, (1 + shape) / math.sqrt(3 * math.sqrt(S)))  # the asymptotic error of a fit to M draws


def test_the_shape_is_that_of_another_implementation():
    log_weight = pareto_weights(0.6)[:, :1]
    largest = log_weight.sort(0, descending=True).values.exp()[:, 0]
    tail = math.ceil(3 * math.sqrt(S))
    expected, _ = fit_generalized_pareto(largest[:tail] - largest[tail])
    assert float(pareto_k(log_weight)) == pytest.approx(float(expected), abs=0.03)


def test_the_shape_ignores_order_and_scale_and_differs_between_examples():
    log_weight = torch.cat([pareto_weights(0.1)[:, :1], pareto_weights(1.5)[:, :1]], dim=1)
    k = pareto_k(log_weight)
    assert k[0] < 0.5
    assert k[1] > 0.7
    torch.testing.assert_close(pareto_k(log_weight.flip(0) + 700), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_equal_up_to_rounding_have_no_tail(dtype):
    log_weight = torch.full((100, 3), -90.0, dtype=dtype)
    log_weight[:, 1] += 5 * torch.finfo(dtype).eps * 90 * torch.randn(100).to(dtype)
    log_weight[:, 2] += torch.randn(100).to(dtype)
    k = pareto_k(log_weight)
    assert (k[:2] == 0).all()
    assert k[2] != 0


def test_few_draws_or_one_overwhelming_draw():
    assert pareto_k(torch.randn(29, N)).isnan().all()
    assert pareto_k(torch.randn(30, N)).isfinite().all()
    overwhelmed = torch.full((100, 1), -1e4).index_fill(0, torch.tensor([7]), 0.0)
    assert pareto_k(overwhelmed).isinf().all()


def test_a_few_values_that_the_largest_weights_share_have_no_tail():
    log_weight = torch.zeros(100, 2)
    log_weight[::2] = 1.0  # half of the draws have the larger of two weights
    log_weight[:, 1] += torch.randn(100)
    k = pareto_k(log_weight)
    assert k[0] == 0
    assert k[1] != 0


def test_smoothing_keeps_the_body_and_the_order_and_adds_up_to_one():
    log_weight = pareto_weights(1.1)
    smoothed, _ = pareto_smoothed(log_weight)
    torch.testing.assert_close(smoothed.logsumexp(0), torch.zeros(N).double())
    tail = math.ceil(3 * math.sqrt(S))
    order = log_weight[:, 2].argsort()
    assert smoothed[order, 2].diff().min() >= 0
    body = order[: S - tail]
    shift = smoothed[body, 2] - log_weight[body, 2]
    torch.testing.assert_close(shift, shift[:1].expand(len(body)))
    assert smoothed.amax(0).exp().max() < log_weight.softmax(0).max()
    few = torch.randn(9, N).double()
    torch.testing.assert_close(pareto_smoothed(few)[0], few.log_softmax(0))


def test_the_summary_is_finite_for_weights_beyond_the_range_of_floats():
    log_weight = torch.tensor([[-1e5], [-1e5 + math.log(3.0)]], dtype=torch.float64)
    summary = summarise_weights(log_weight)
    assert float(summary.log_mean) == pytest.approx(-1e5 + math.log(2))
    assert float(summary.standard_error) == pytest.approx(0.5)
    assert float(summary.effective_sample_size) == pytest.approx(16 / 10)


def test_the_summary_is_that_of_the_weights_written_out():
    log_weight = 1.5 * torch.randn(11, N).double()
    summary, weight = summarise_weights(log_weight), log_weight.exp()
    torch.testing.assert_close(summary.log_mean, weight.mean(0).log(), rtol=0, atol=1e-12)
    error = weight.std(0) / (math.sqrt(11) * weight.mean(0))
    torch.testing.assert_close(summary.standard_error, error, rtol=1e-12, atol=0)
    size = weight.sum(0) ** 2 / weight.square().sum(0)
    torch.testing.assert_close(summary.effective_sample_size, size, rtol=1e-12, atol=0)


def test_bounds_are_means_over_groups():
    log_weight = torch.randn(23, N).double()
    bounds = bound_by_particles(log_weight)
    assert list(bounds) == [1, 10, 23]
    groups = torch.stack([log_weight[:10], log_weight[10:20]]).exp().mean(1).log()
    torch.testing.assert_close(bounds[10][0], groups.mean(0))
    torch.testing.assert_close(bounds[10][1], (groups[0] - groups[1]).abs() / 2)
    torch.testing.assert_close(bounds[1][0], log_weight.mean(0))
    torch.testing.assert_close(bounds[23][0], log_weight.exp().mean(0).log())
    assert [list(bound_by_particles(torch.randn(count, N))) for count in (1, 9, 100, 1000)] == [
        [1],
        [1, 9],
        [1, 10, 100],
        [1, 10, 100, 1000],
    ]


def test_bounds_have_the_expectation_of_log_normal_weights():
    log_weight = torch.randn(10_000, 3).double() - 0.5  # mean weight 1
    bounds = bound_by_particles(log_weight)
    within(bounds[1][0], -0.5, bounds[1][1])
    within(bounds[10_000][0], 0.0, bounds[10_000][1])
    means = [bound.mean() for bound, _ in bounds.values()]
    assert all(lower < upper + 0.02 for lower, upper in itertools.pairwise(means))


@pytest.mark.parametrize(("num_particles", "tail"), [(50, 10), (400, 60)])  # ⌈min(S/5, 3√S)⌉
def test_k_is_0_where_the_tail_and_the_weight_below_it_are_equal(num_particles, tail):
    log_weight = torch.full((num_particles, 2), -30.0, dtype=torch.float64)
    log_weight[: tail + 1, 0] = 0.0  # the tail, and the weight that it begins at
    log_weight[:tail, 1] = 0.0
    log_weight[tail:, 1] = torch.linspace(-1, -30, num_particles - tail)
    _, k = pareto_smoothed(log_weight)
    assert k[0] == 0
    assert k[1] != 0
