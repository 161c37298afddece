"""The latent units of a pair: how many nats each carries, and where its posterior lies.

A unit is one number of a latent vector z. Those of all latent sites are put side by side, U in all; of a
site with plates of its own besides the data's, those of each position in the plates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from pyro_vae.objectives.log_terms import PairSites
from pyro_vae.objectives.sites import Site

__all__ = ["Units", "by_datum", "marginals", "units"]


@dataclass(frozen=True)
class Units:
    """What one run of a pair tells of its latent units.

    Attributes:
        names: Of the units, as in "z[3]".
        kl: KL of the marginal q(z_u|x) from the marginal p(z_u), (N, U), in nats: in closed form where torch
            knows it, else sampled; NaN where a distribution has no marginals in closed form, as a flow.
        mean: E_q[z_u|x], (N, U), through the means of the sites' distributions where they have some.
        mean_variance: Variance of `mean` over repeated draws, (N, U): 0 where no draw enters it.
    """

    names: list[str]
    kl: Tensor
    mean: Tensor
    mean_variance: Tensor


def units(sites: PairSites) -> Units:
    """Look at the latent units in one run of a pair on N data with S particles; see `Units`.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors, terms
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> t = terms(vae.model, vae.guide, torch.randn(9, 6))
        >>> torch.allclose(units(t.sites).kl.sum(1), t.kl)
        True
    """
    names: list[str] = []
    kl, mean = [], []
    for name, latent in sites.latent.items():
        guide = sites.guide[name]
        values = _side_by_side(sites, guide, guide["value"])
        count = values.shape[-1]
        names += [name] if count == 1 else [f"{name}[{number}]" for number in range(count)]
        kl.append(_side_by_side(sites, guide, _kl(guide, latent)).mean(0).expand(values.shape[1:]))
        mean.append(_side_by_side(sites, guide, _mean(guide)).expand(values.shape))
    means = torch.cat(mean, dim=-1)
    return Units(
        names=names,
        kl=torch.cat(kl, dim=-1),
        mean=means.mean(0),
        mean_variance=means.var(0, correction=min(1, len(means) - 1)) / len(means),
    )


def marginals(distribution: Distribution) -> Distribution | None:
    """The distribution of each number of a vector, whatever the others are; None where it is not known."""
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
        return MixtureSameFamily(torch.distributions.Categorical(logits=weights), each)
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


def by_datum(sites: PairSites, site: Site, values: Tensor) -> Tensor:
    """Arrange numbers of a site, (*batch, *event), as (S, N, *others, *event), with the batch's other dims.

    S or another dimension of the batch may be 1 where the numbers do not depend on it.
    """
    return sites.in_full(values, site["fn"].event_dim).movedim(sites.data_axis, 1)


def _side_by_side(sites: PairSites, site: Site, values: Tensor) -> Tensor:
    """Arrange numbers of a site as (S, N, units)."""
    values = by_datum(sites, site, values)
    return values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1)
