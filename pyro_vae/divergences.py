"""Kullback-Leibler divergences in closed form that torch lacks, entered in its table `register_kl`.

`kl_divergence`, and so `TraceMeanField_ELBO`, takes them from there. Without them Pyro samples the KL of a
guide with correlated dimensions to a prior with independent ones.
"""

import math

import torch
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    register_kl,
)

__all__ = ["multivariate_to_diagonal_normal"]


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def multivariate_to_diagonal_normal(
    p: MultivariateNormal | LowRankMultivariateNormal, q: Independent
) -> Tensor:
    """KL of a normal of any covariance to one of independent dimensions.

    KL(N(μ, Σ) ‖ N(m, diag s²)) = Σ_k ½ (log 2πs_k² + (Σ_kk + (μ_k − m_k)²) / s_k²) − H[N(μ, Σ)],
    cross-entropy less entropy: of Σ it takes no more than the diagonal and the determinant.

    Args:
        p: Batch shape (*p), event shape (K,).
        q: An `Independent` of a `Normal`, batch shape (*q), event shape (K,).

    Returns:
        Nats, of the shape that (*p) and (*q) broadcast to.

    Raises:
        NotImplementedError: If q is another kind of `Independent`, as `register_kl` wants it.

    Example:
        >>> p = MultivariateNormal(torch.zeros(5, 2), scale_tril=torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> q = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> multivariate_to_diagonal_normal(p, q)[0]  # (1 + 13 - 2) / 2 - log 2
        tensor(5.3069)
    """
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    loc, scale = q.base_dist.loc, q.base_dist.scale
    log_normaliser = torch.log(scale) + 0.5 * math.log(2 * math.pi)
    cross_entropy = log_normaliser + (p.variance + (p.mean - loc) ** 2) / (2 * scale**2)
    return cross_entropy.sum(-1) - p.entropy()
