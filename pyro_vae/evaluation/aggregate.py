"""The aggregate posterior q(z) = (1/N) Σ q(z|x_n), and how it splits the KL to the prior.

Notation: N data x_n, one draw z_n ~ q(z|x_n) for each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.data.batches import Batches
from pyro_vae.evaluation.draws import Pair, chunk_sizes
from pyro_vae.objectives.log_terms import PairSites, terms
from pyro_vae.objectives.sites import run, sample_sites

__all__ = ["AggregatePosterior", "aggregate_posterior"]

_NUMBERS = 2**21  # of latent vectors, scored at a time


@dataclass(frozen=True, eq=False)
class AggregatePosterior:
    """Densities at one draw z_n ~ q(z|x_n) for each of N data, float64 (N,), in nats.

    Attributes:
        log_guide: log q(z_n|x_n).
        log_aggregate: log q(z_n), of the aggregate over these data.
        log_prior: log p(z_n).
    """

    log_guide: Tensor
    log_aggregate: Tensor
    log_prior: Tensor

    @property
    def information(self) -> Tensor:
        """Log q(z_n|x_n) − log q(z_n), (N,): the mean estimates the mutual information of x and z."""
        return self.log_guide - self.log_aggregate

    @property
    def marginal_kl(self) -> Tensor:
        """Log q(z_n) − log p(z_n), (N,): the mean estimates KL(q(z) ‖ p(z))."""
        return self.log_aggregate - self.log_prior


def aggregate_posterior(
    pair: Pair,
    batches: Batches,
    *,
    max_plate_nesting: int = 1,
    advance: Callable[[int], object] = lambda count: None,
) -> AggregatePosterior:
    r"""Score one draw for each datum under the guide of every datum: N² densities, in bounded memory.

    .. math:: \frac1N \sum_n \mathrm{KL}(q(z|x_n) \,\|\, p(z)) = I(x; z) + \mathrm{KL}(q(z) \,\|\, p(z))

    where I is the mutual information of z and the *number* of a datum among these N, so that it is at most
    log N, however much more z tells. Draws from torch's global generators.

    Args:
        pair: A model and a guide.
        batches: The N data.
        max_plate_nesting: See `terms`.
        advance: Called now and then with the number of densities that have been added up.

    Raises:
        ValueError: If the guide cannot score a value that it has not just drawn.

    Source: M. Hoffman, M. Johnson (2016), ELBO surgery: yet another way to carve up the variational evidence
    lower bound, NeurIPS workshop on advances in approximate Bayesian inference.
    """
    draws: list[dict[str, Tensor]] = []
    log_guide, log_prior = [], []
    for x in batches.in_order(chunk_sizes(batches, 1)[0]):
        t = terms(pair.model, pair.guide, x, max_plate_nesting=max_plate_nesting)
        draws.append({name: _as_particles(t.sites, name) for name in t.sites.draws})
        log_guide.append(t.log_guide[0])
        log_prior.append(t.log_prior[0])
    together = {name: torch.cat([drawn[name] for drawn in draws]) for name in draws[0]}
    numbers = sum(values[0].numel() for values in together.values())
    at_once = max(1, math.isqrt(_NUMBERS // numbers))

    log_sum = torch.full((len(batches),), -math.inf, dtype=torch.float64, device=batches.device)
    for x in batches.in_order(at_once):
        for start in range(0, len(batches), at_once):
            part = slice(start, start + at_once)
            values = {name: z[part] for name, z in together.items()}
            scores = _log_guide(pair, x, values, t.sites).double().logsumexp(1)
            log_sum[part] = torch.logaddexp(log_sum[part], scores)
            advance(len(x) * len(scores))
    return AggregatePosterior(
        log_guide=torch.cat(log_guide).double().cpu(),
        log_aggregate=log_sum.cpu() - math.log(len(batches)),
        log_prior=torch.cat(log_prior).double().cpu(),
    )


def _as_particles(sites: PairSites, name: str) -> Tensor:
    """Make n particles of the draws of n data: (…, n, …, *event) to (n, …, 1, …, *event)."""
    values = sites.in_full(sites.draws[name], sites.guide[name]["fn"].event_dim)
    return values.transpose(0, sites.data_axis)


def _log_guide(pair: Pair, x: Tensor, values: dict[str, Tensor], sites: PairSites) -> Tensor:
    """Score B draws under the guide of each of n data, (B, n)."""
    count = len(next(iter(values.values())))
    axis = sites.data_axis
    spread = {name: z.expand(*z.shape[:axis], len(x), *z.shape[axis + 1 :]) for name, z in values.items()}
    with pyro.plate("draws", count, dim=-sites.rank):
        guide_sites = sample_sites(run(poutine.condition(pair.guide, data=spread), (x,), {}))
    total = x.new_zeros(count, len(x))
    for name, site in guide_sites.items():
        try:
            log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"the guide's site {name!r} cannot score a value that it has not just drawn"
            ) from error
        total = total + (log_prob.sum(sites.other_dims) if sites.other_dims else log_prob)
    return total
