"""Guide draws made from the same base noise for every example.

The draws z_s ~ q(z|x) of an example are then a function of x and the seed alone: not of the other examples
of its batch, nor of their order. Notation: n examples, S particles, K latent dimensions.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from pyro_vae.utils.isolation import seed_generators
from pyro_vae.vae import VAE

__all__ = ["draw_with_shared_noise", "shared_noise"]


def draw_with_shared_noise(
    vae: VAE, x: Tensor, num_particles: int, *, seed: int
) -> tuple[list[dist.Distribution], Tensor, Tensor]:
    """Draw z (S, n, K) from q(z|x) for x (n, *event_shape), each example from the same base noise.

    Normal guides transform one draw of noise (S, 1, K). Where another guide is used, or one that draws noise
    of its own, examples are encoded one at a time, each with the generators seeded alike.

    Returns:
        The distributions q(z|x), one of batch shape (n,) or n of batch shape (1,); z; and log q(z|x), (S, n).
    """
    seed_generators(x.device, seed)
    before = torch.get_rng_state()
    q = vae.encode(x)
    draws_nothing = torch.equal(before, torch.get_rng_state())
    if draws_nothing and not getattr(vae.posterior, "needs_log_joint", False):
        z = shared_noise(q, num_particles)
        if z is not None:
            return [q], z, q.log_prob(z)
    alone, draws, densities = [], [], []
    for row in x.split(1):
        seed_generators(x.device, seed)
        q = vae.encode(row)
        alone.append(q)
        draws.append(q.rsample((num_particles,)) if q.has_rsample else q.sample((num_particles,)))
        densities.append(q.log_prob(draws[-1]))
    return alone, torch.cat(draws, dim=1), torch.cat(densities, dim=1)


def shared_noise(q: Any, num_particles: int) -> Tensor | None:
    """Draw z (S, n, K) from a normal q of batch shape (n,), one noise for all; None for another family.

    Example:
        >>> q = dist.Normal(torch.tensor([[0.0], [5.0]]), 1.0).to_event(1)
        >>> z = shared_noise(q, 3)
        >>> torch.allclose(z[:, 0] + 5, z[:, 1])
        True
    """
    base = q.base_dist if isinstance(q, Independent) else q
    K = q.event_shape[-1] if len(q.event_shape) == 1 else None
    if K is None or len(q.batch_shape) != 1:
        return None

    def noise(*size: int) -> Tensor:
        return torch.randn(num_particles, 1, *size, dtype=q.mean.dtype, device=q.mean.device)

    if isinstance(base, Normal):
        return base.loc + base.scale * noise(K)
    if isinstance(q, MultivariateNormal):
        return q.loc + (q._unbroadcasted_scale_tril @ noise(K, 1)).squeeze(-1)
    if isinstance(q, LowRankMultivariateNormal):
        along = (q._unbroadcasted_cov_factor @ noise(q._unbroadcasted_cov_factor.shape[-1], 1)).squeeze(-1)
        return q.loc + along + q._unbroadcasted_cov_diag.sqrt() * noise(K)
    return None
