"""Statistics of each example under a VAE, from draws with the same base noise for every example.

Notation: N examples, S particles z_s ~ q(z|x) per example, importance weights w_s = p(x, z_s) / q(z_s|x).
Values are in nats per example.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.applications.shared_noise import draw_with_shared_noise
from pyro_vae.data.batches import Batches
from pyro_vae.data.images import Images
from pyro_vae.evaluation.draws import chunk_lengths, chunk_sizes, in_chunks, prepare_data, require_finite
from pyro_vae.evaluation.importance_weights import summarise_weights
from pyro_vae.utils.elements import elementwise
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE, require_vae

__all__ = ["Statistics", "element_log_likelihood", "prepare", "statistics"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics per example: float64 on the CPU, (N,), in nats unless stated otherwise.

    Attributes:
        log_likelihood: E_q[log p(x|z)].
        kl: KL(q(z|x) ‖ p(z)), in closed form where there is one, else sampled.
        log_evidence: log (1/S) Σ w_s.
        squared_error: ‖x − E[x|z]‖² at the mean of q(z|x), in the data's units squared.
        effective_sample_size: (Σ w_s)² / Σ w_s², from 1 to S.
        pareto_k: Shape k̂ of the weights' tail; above 0.7 `log_evidence` is likely too low. NaN for S < 30.
    """

    log_likelihood: Tensor
    kl: Tensor
    log_evidence: Tensor
    squared_error: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor

    @property
    def elbo(self) -> Tensor:
        """E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))."""
        return self.log_likelihood - self.kl

    @property
    def gap(self) -> Tensor:
        """Estimate of KL(q(z|x) ‖ p(z|x)) = log p(x) − ELBO."""
        return self.log_evidence - self.elbo


def prepare(vae: Any, data: Any, *, seed: int) -> Batches:
    """Validate a VAE and N examples that are scored.

    Raises:
        TypeError: If `vae` is not a `VAE`, or the data are of a kind that `fit` does not take.
        ValueError: If data have another shape, lie outside the likelihood's support (NaN and ±inf do), or are
            images that are binarised at random, whose score would depend on their position.
    """
    require_vae("a score", vae, instead=": evaluate(vae, (x, y)) has log p(x|y) of each example")
    if isinstance(data, Images) and data.binarize in ("dynamic", "fixed"):
        raise ValueError(
            f"images binarised at random (binarize={data.binarize!r}) would get another score at another "
            'position: pass images.binarized("threshold"), or train a likelihood of grey levels'
        )
    return prepare_data(vae, data, binarize=None, seed=seed)


def statistics(vae: VAE, data: Any, *, num_particles: int, seed: int) -> Statistics:
    """Compute the statistics of data (N, *event_shape), each a function of its example and the seed alone.

    Raises:
        TypeError: As `prepare`.
        ValueError: As `prepare`.
        NonFiniteError: If a parameter or an importance weight is infinite or NaN.
    """
    require_count("num_particles", num_particles)
    batches = prepare(vae, data, seed=seed)
    with evaluating(vae, batches.device, seed):
        parts = [_chunk_statistics(vae, chunk) for chunk in _chunks(vae, batches, num_particles)]
    names = [field.name for field in dataclasses.fields(Statistics)]
    return Statistics(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def element_log_likelihood(vae: VAE, data: Any, *, num_particles: int, seed: int) -> Tensor:
    """Compute E_q[log p(x_d|z)] per element, (N, *event_shape); their sum is `Statistics.log_likelihood`."""
    require_count("num_particles", num_particles)
    batches = prepare(vae, data, seed=seed)
    with evaluating(vae, batches.device, seed):
        return torch.cat([_element_means(vae, chunk) for chunk in _chunks(vae, batches, num_particles)])


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Guide draws of n examples, and how many of them are decoded at once."""

    first_index: int
    x: Tensor
    q: list[dist.Distribution]
    z: Tensor
    log_q: Tensor
    particles: int

    def decoded(self, vae: VAE) -> Iterator[dist.Distribution]:
        """Yield p(x|z) for some of the draws at a time."""
        return (vae.decode(part) for part in self.z.split(self.particles))


def _chunks(vae: VAE, batches: Batches, num_particles: int) -> Iterator[_Chunk]:
    size, particles = chunk_sizes(batches, num_particles)
    for first_index, x in in_chunks(batches, size, 0):
        q, z, log_q = draw_with_shared_noise(vae, x, num_particles, seed=batches.seed)
        yield _Chunk(first_index, x, q, z, log_q, particles)


def _element_means(vae: VAE, chunk: _Chunk) -> Tensor:
    total = torch.zeros(chunk.x.shape, dtype=torch.float64)
    for p in chunk.decoded(vae):
        total += elementwise(p).log_prob(chunk.x).double().sum(0).cpu()
    return total / len(chunk.z)


def _chunk_statistics(vae: VAE, chunk: _Chunk) -> Statistics:
    prior = vae.prior()
    log_likelihood = torch.cat([p.log_prob(chunk.x) for p in chunk.decoded(vae)])
    log_prior = prior.log_prob(chunk.z)
    log_weight = log_likelihood + log_prior - chunk.log_q
    require_finite(log_weight, first_index=chunk.first_index)
    weights = summarise_weights(log_weight)
    try:
        kl = torch.cat([kl_divergence(part, prior) for part in chunk.q])
    except NotImplementedError:
        kl = (chunk.log_q - log_prior).mean(0)
    return Statistics(
        log_likelihood=log_likelihood.double().mean(0).cpu(),
        kl=kl.double().cpu(),
        log_evidence=weights.log_mean,
        squared_error=_squared_error(vae, chunk.x, chunk.q, chunk.z),
        effective_sample_size=weights.effective_sample_size,
        pareto_k=weights.pareto_k,
    )


def _squared_error(vae: VAE, x: Tensor, q: list[Any], z: Tensor) -> Tensor:
    """Return ‖x − E[x|z]‖² at the mean of q, or of its draws where q has no analytic mean, (n,)."""
    try:
        centre = torch.cat([part.mean for part in q])
    except NotImplementedError:
        centre = z.mean(0)
    sizes = chunk_lengths(len(x), max(1, 2**20 // x[0].numel()))
    means = torch.cat([vae.decode(part).mean for part in centre.split(sizes)])
    return (x - means).double().square().flatten(1).sum(1).cpu()
