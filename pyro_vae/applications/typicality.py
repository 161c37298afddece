"""Typicality of a batch: do examples come from where the reference does, taken together?"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.applications.statistics import prepare, statistics
from pyro_vae.utils.isolation import derived_seed
from pyro_vae.vae import VAE

__all__ = ["BatchTypicality", "batch_typicality"]

_ORDER = 23  # a stream of random numbers


class BatchTypicality(NamedTuple):
    """Typicality of a batch of n examples.

    Attributes:
        score: −|mean log p(x) − E log p(x)|, in nats per example; higher is more normal.
        p_value: (1 + #{batches of the reference with a score ≤ this one}) / (B + 1).
        num_batches: B, the number of batches of n examples that the p-value compares with.
    """

    score: float
    p_value: float
    num_batches: int


def batch_typicality(
    vae: VAE, x: Any, *, reference: Any, num_particles: int = 50, seed: int = 0
) -> BatchTypicality:
    r"""Test whether a batch, as a whole, is typical of reference data.

    .. math:: s(x_1, \dots, x_n) = -\Big| \frac1n \sum_i \log p(x_i) - E[\log p(x)] \Big|

    Data of another kind may be likelier than the reference, which no threshold on log p(x) finds, but rarely
    as likely on average: the mean of n examples lies within about sd(log p) / √n of the expectation. One half
    of the reference, at random, estimates the expectation; the other is cut into batches of n, whose scores
    give the p-value. For a batch of examples like the reference P(p ≤ α) ≤ α.

    Args:
        vae: A trained VAE.
        x: The batch, (n, *event_shape).
        reference: Normal examples (N, *event_shape), not those the VAE was trained on, N ≥ 2n.
        num_particles: S, draws of z per example.
        seed: Seed of the base noise, and of the order of the reference.

    Raises:
        TypeError: If `vae` is not a `VAE`, or data are not floating-point.
        ValueError: If the reference has fewer than 2n examples, or data have another shape or lie outside the
            support.

    Source: E. Nalisnick, A. Matsukawa, Y. W. Teh, B. Lakshminarayanan (2019), Detecting out-of-distribution
    inputs to deep generative models using typicality, arXiv:1906.02994; p-values as in `AnomalyDetector`,
    without their bootstrap.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> found = batch_typicality(vae, torch.zeros(5, 6), reference=torch.randn(200, 6))
        >>> found.num_batches, found.p_value < 0.1  # zeros are likelier than any of the reference
        (20, True)
    """
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
    log_p = statistics(vae, x, **options).log_evidence
    size, count = len(log_p), len(prepare(vae, reference, seed=seed))
    if count < 2 * size:
        raise ValueError(
            f"a batch of {size} examples needs a reference of at least {2 * size}; got {count}: pass more, "
            "or a part of the batch"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, _ORDER)))
    log_p_reference = statistics(vae, reference, **options).log_evidence[order]
    half = count // 2
    expected = log_p_reference[:half].mean()
    batches = log_p_reference[half:].unfold(0, size, size)

    def score(log_p: Tensor) -> Tensor:
        return -(log_p.mean(-1) - expected).abs()

    own = score(log_p)
    at_most = int((score(batches) <= own).sum())
    return BatchTypicality(float(own), (1 + at_most) / (1 + len(batches)), len(batches))
