"""KL per latent dimension, active units, aggregate posterior, mutual information.

A latent dimension is one component of the latent vectors: those of all latent sites concatenated, U in total.
A site with plates other than the data's counts once per position in the plates. The aggregate posterior over
N examples is q(z) = (1/N) Σ q(z|x_n). Divergences and log-densities are in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments, num_rows
from pyro_vae.evaluation.draws import Pair, by_example, chunk_sizes, in_chunks
from pyro_vae.objectives.log_terms import PairSites, terms
from pyro_vae.objectives.sites import Site, joint_mask, masked_log_prob, run, sample_sites

__all__ = ["AggregatePosterior", "LatentSummary", "aggregate_posterior", "marginals", "summarise_latents"]

_AGGREGATE = 52  # a stream of random numbers
_NUMBERS = 2**21  # largest number of latent values scored at once


@dataclass(frozen=True)
class LatentSummary:
    """Latent dimensions of N examples, estimated from one run of a pair.

    Attributes:
        names: Names of the dimensions, such as "z[3]".
        kl: KL of the marginal q(z_u|x) from the marginal p(z_u), (N, U): in closed form where torch has one,
            else sampled; NaN where a distribution, such as a flow, has no marginals in closed form.
        mean: E_q[z_u|x], (N, U): averaged over the means of the sites' distributions, or over the draws where
            a distribution has no mean in closed form.
        mean_variance: Monte Carlo variance of `mean`, (N, U): 0 where it depends on no draw.
    """

    names: list[str]
    kl: Tensor
    mean: Tensor
    mean_variance: Tensor


def summarise_latents(sites: PairSites) -> LatentSummary:
    """Summarise the latent dimensions in one run of a pair on N examples with S particles.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors, terms
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> t = terms(vae.model, vae.guide, torch.randn(9, 6))
        >>> torch.allclose(summarise_latents(t.sites).kl.sum(1), t.kl)
        True
    """
    names: list[str] = []
    kl, mean = [], []
    for name, latent in sites.latent.items():
        guide = sites.guide[name]
        values = _by_dimension(sites, guide, guide["value"])
        count = values.shape[-1]
        names += [name] if count == 1 else [f"{name}[{number}]" for number in range(count)]
        unknown = name in sites.summed  # its prior is a sum
        each = torch.full_like(guide["value"], torch.nan) if unknown else _kl(guide, latent)
        counted = each.where(joint_mask(guide), 0.0)
        kl.append(_by_dimension(sites, guide, counted).mean(0).expand(values.shape[1:]))
        mean.append(_by_dimension(sites, guide, _mean(guide)).expand(values.shape))
    means = torch.cat(mean, dim=-1)
    return LatentSummary(
        names=names,
        kl=torch.cat(kl, dim=-1),
        mean=means.mean(0),
        mean_variance=means.var(0, correction=min(1, len(means) - 1)) / len(means),
    )


def marginals(distribution: Distribution) -> Distribution | None:
    """Return the marginal distribution of each component of a vector, or None where it is not known."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, MultivariateNormal | LowRankMultivariateNormal):
        return Normal(distribution.mean, distribution.stddev)
    if isinstance(distribution, MixtureSameFamily) and distribution.event_shape:
        components = marginals(distribution.component_distribution)
        if not isinstance(components, Normal):
            return None
        weights = distribution.mixture_distribution.logits.unsqueeze(-2)
        each = Normal(components.loc.mT, components.scale.mT)  # (*, K, C)
        return MixtureSameFamily(Categorical(logits=weights), each)
    return None if distribution.event_shape else distribution


def _kl(guide: Site, latent: Site) -> Tensor:
    q, p, z = marginals(guide["fn"]), marginals(latent["fn"]), guide["value"]
    if q is None or p is None:
        return torch.full_like(z, torch.nan)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(z) - p.log_prob(z)


def _mean(guide: Site) -> Tensor:
    try:
        return guide["fn"].mean
    except NotImplementedError:
        return guide["value"]


def _by_dimension(sites: PairSites, site: Site, values: Tensor) -> Tensor:
    """Flatten a site's values, (*batch, *event), to (S, N, dimensions)."""
    values = by_example(sites, site, values)
    return values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class AggregatePosterior:
    """Log-densities at one draw z_n ~ q(z|x_n) for each of N examples, float64 (N,).

    Attributes:
        log_guide: log q(z_n|x_n).
        log_aggregate: log q(z_n), the aggregate posterior over these examples.
        log_prior: log p(z_n).
    """

    log_guide: Tensor
    log_aggregate: Tensor
    log_prior: Tensor

    @property
    def information(self) -> Tensor:
        """Log q(z_n|x_n) − log q(z_n), (N,): its mean estimates the mutual information of x and z."""
        return self.log_guide - self.log_aggregate

    @property
    def marginal_kl(self) -> Tensor:
        """Log q(z_n) − log p(z_n), (N,): its mean estimates KL(q(z) ‖ p(z))."""
        return self.log_aggregate - self.log_prior


def aggregate_posterior(
    pair: Pair,
    batches: Batches,
    *,
    max_plate_nesting: int = 1,
    advance: Callable[[int], object] = lambda count: None,
) -> AggregatePosterior:
    r"""Score one draw per example under the guide of every example: N² densities, in bounded memory.

    .. math:: \frac1N \sum_n \mathrm{KL}(q(z|x_n) \,\|\, p(z)) = I(x; z) + \mathrm{KL}(q(z) \,\|\, p(z))

    I is the mutual information of z and the *index* n of an example among these N. It is at most log N,
    even if z determines x. Draws from torch's global generators.

    Args:
        pair: A model and a guide.
        batches: The N examples.
        max_plate_nesting: See `terms`.
        advance: Called with the number of densities computed since the last call.

    Raises:
        ValueError: If the guide can score only values that it has just drawn.

    Source: M. Hoffman, M. Johnson (2016), ELBO surgery: yet another way to carve up the variational evidence
    lower bound, NeurIPS workshop on advances in approximate Bayesian inference.
    """
    draws: list[dict[str, Tensor]] = []
    log_guide, log_prior = [], []
    for _, batch in in_chunks(batches, chunk_sizes(batches, 1)[0], _AGGREGATE):
        args, kwargs = arguments(batch)
        t = terms(pair.model, pair.guide, *args, max_plate_nesting=max_plate_nesting, **kwargs)
        draws.append({name: _as_particles(t.sites, name) for name in t.sites.draws})
        log_guide.append(t.log_guide[0])
        log_prior.append(t.log_prior[0])
    joined = {name: torch.cat([drawn[name] for drawn in draws]) for name in draws[0]}
    numbers = sum(values[0].numel() for values in joined.values())
    at_once = max(1, math.isqrt(_NUMBERS // numbers))

    log_sum = torch.full((len(batches),), -math.inf, dtype=torch.float64, device=batches.device)
    for _, batch in in_chunks(batches, at_once, _AGGREGATE):
        for start in range(0, len(batches), at_once):
            part = slice(start, start + at_once)
            values = {name: z[part] for name, z in joined.items()}
            scores = _log_guide(pair, batch, values, t.sites).double().logsumexp(1)
            log_sum[part] = torch.logaddexp(log_sum[part], scores)
            advance(num_rows(batch) * len(scores))
    return AggregatePosterior(
        log_guide=torch.cat(log_guide).double().cpu(),
        log_aggregate=log_sum.cpu() - math.log(len(batches)),
        log_prior=torch.cat(log_prior).double().cpu(),
    )


def _as_particles(sites: PairSites, name: str) -> Tensor:
    """Turn the draws of n examples into n particles: (…, n, …, *event) to (n, …, 1, …, *event)."""
    values = sites.in_full(sites.draws[name], sites.guide[name]["fn"].event_dim)
    return values.transpose(0, sites.data_axis)


def _log_guide(pair: Pair, batch: Any, values: dict[str, Tensor], sites: PairSites) -> Tensor:
    """Score B draws under the guide of each of n examples, (B, n)."""
    count = len(next(iter(values.values())))
    axis, length = sites.data_axis, num_rows(batch)
    spread = {name: z.expand(*z.shape[:axis], length, *z.shape[axis + 1 :]) for name, z in values.items()}
    with pyro.plate("draws", count, dim=-sites.rank):
        guide_sites = sample_sites(run(poutine.condition(pair.guide, data=spread), *arguments(batch)))
    total = next(iter(values.values())).new_zeros(count, length, dtype=torch.get_default_dtype())
    for name, site in guide_sites.items():
        try:
            log_prob = masked_log_prob(site, site["value"])
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"the guide's site {name!r} can score only values that it has just drawn"
            ) from error
        total = total + (log_prob.sum(sites.other_dims) if sites.other_dims else log_prob)
    return total
