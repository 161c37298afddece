"""Importance-weight estimates: log-mean, standard error, effective sample size, Pareto k̂.

Notation: S weights w per example for N examples, as logarithms (S, N).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evaluation.arviz_compat import MIN_DRAWS, pareto_smooth

__all__ = ["WeightSummary", "bound_by_particles", "pareto_smoothed", "summarise_weights"]


@dataclass(frozen=True, eq=False)
class WeightSummary:
    """Estimates per example from its importance weights; float64 on the CPU, each (N,).

    Attributes:
        log_mean: log (1/S) Σ w_s, in nats. By Jensen's inequality at most log E[w] on average, and below it
            by about half the square of `standard_error`.
        standard_error: Standard error of `log_mean` by the delta method: the standard deviation of w divided
            by √S times its mean. Too small where `pareto_k` is above 0.7; NaN for S = 1.
        effective_sample_size: (Σ w_s)² / Σ w_s², from 1 to S.
        pareto_k: Shape k̂ of the weights' tail; see `pareto_smoothed`.
    """

    log_mean: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor


def summarise_weights(log_weight: Tensor) -> WeightSummary:
    """Summarise finite log weights (S, N) per example.

    Example:
        >>> summary = summarise_weights(torch.tensor([[1.0, 1.0], [1.0, 5.0]]).log())
        >>> summary.log_mean.exp().round(decimals=4)
        tensor([1., 3.], dtype=torch.float64)
        >>> summary.standard_error.round(decimals=4)  # √8 / (√2 · 3)
        tensor([0.0000, 0.6667], dtype=torch.float64)
    """
    _, k = pareto_smoothed(log_weight)
    log_weight = log_weight.cpu().double()
    num_particles = len(log_weight)
    log_mean = log_weight.logsumexp(0) - math.log(num_particles)
    variance = (log_weight - log_mean).expm1().square().mean(0)  # of weights whose mean is 1
    return WeightSummary(
        log_mean=log_mean,
        standard_error=(variance / (num_particles - 1)).sqrt() if num_particles > 1 else variance * math.nan,
        effective_sample_size=num_particles / (1 + variance),
        pareto_k=k,
    )


def pareto_smoothed(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth the largest of each example's weights, given as log weights (S, N), by a Pareto fit of shape k̂.

    k̂ is good below 0.5 and usable up to 0.7. Above 0.7 the draws miss much of the target, and neither the
    mean weight nor its error is reliable.

    Returns:
        The smoothed log weights, (S, N), normalised, and k̂, (N,): 0 where the largest weights are equal up
        to rounding, +∞ where too few are non-negligible for a fit, NaN for fewer than 30 draws. Float64 on
        the CPU.

    Source: Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018), Yes, but did it work?: evaluating variational
    inference, arXiv:1802.02538.
    """
    rounding = 100 * torch.finfo(log_weight.dtype).eps
    log_weight = log_weight.cpu().double()
    smoothed, k = log_weight.log_softmax(0), log_weight.new_full(log_weight.shape[1:], math.nan)
    num_particles = len(log_weight)
    if num_particles < MIN_DRAWS:
        return smoothed, k
    tail = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles))) + 1
    largest = log_weight.topk(tail, dim=0).values
    uneven = largest[0] - largest[-1] > rounding * log_weight.abs().amax(0).clamp(min=1)
    k[~uneven] = 0.0
    if uneven.any():
        fitted = pareto_smooth(log_weight[:, uneven].T.contiguous().numpy())
        smoothed[:, uneven], k[uneven] = torch.from_numpy(fitted[0]).T, torch.from_numpy(fitted[1])
    return smoothed, k


def bound_by_particles(log_weight: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Estimate the importance-weighted bounds L_1, L_10, L_100, …, L_S from log weights (S, N).

    The estimate of L_s is the mean over S // s groups of s weights.

    Returns:
        For each s the estimate and its Monte Carlo error, both (N,). The error is that of a mean over the
        groups, or the delta method's for a single group.
    """
    log_weight = log_weight.cpu().double()
    total = len(log_weight)
    sizes = sorted({10**power for power in range(math.floor(math.log10(total) + 1e-9) + 1)} | {total})
    bounds = {}
    for size in sizes:
        groups = log_weight[: total // size * size].unflatten(0, (-1, size)).logsumexp(1) - math.log(size)
        if len(groups) > 1:
            bounds[size] = (groups.mean(0), groups.std(0) / math.sqrt(len(groups)))
        else:
            summary = summarise_weights(log_weight[:size])
            bounds[size] = (summary.log_mean, summary.standard_error)
    return bounds
