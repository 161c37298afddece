"""Mixtures of normals whose draws are reparameterised, so that a gradient passes through them."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints

__all__ = ["NormalMixture"]


class NormalMixture(dist.MixtureSameFamily):
    r"""Mixture of normals with independent dimensions, p(z) = Σ_c π_c Π_k N(z_k; μ_ck, σ_ck²).

    Its draws z carry gradients by implicit reparameterisation. The map from z to the conditional
    distribution functions

    .. math:: u_k = F(z_k \,|\, z_{<k}) = \sum_c w_{kc} \, \Phi((z_k - \mu_{ck}) / \sigma_{ck}), \qquad
        w_{kc} \propto \pi_c \prod_{j<k} \mathcal N(z_j; \mu_{cj}, \sigma_{cj}^2)

    makes u uniform whatever the parameters φ are, so that z(φ) at fixed u has the derivative
    ∂z/∂φ = −(∂u/∂z)⁻¹ ∂u/∂φ, in which ∂u/∂z is triangular. Once differentiable, like Pyro's
    `MixtureOfDiagNormals`; unlike it, for K = 1 and coinciding components too, and without underflow
    in many dimensions.

    Args:
        mixture_distribution: A `Categorical` of batch shape (*,) over C components.
        component_distribution: `Normal(μ, σ).to_event(1)` of batch shape (*, C), event shape (K,).

    Raises:
        TypeError: When it draws, if its components are no normals with independent dimensions.

    Source: Figurnov, Mohamed and Mnih, 2018, Implicit reparameterization gradients, arXiv:1805.08498;
    Graves, 2016, Stochastic backpropagation through mixture density distributions, arXiv:1607.05690.

    Example:
        >>> loc = torch.zeros(5, 3, 2, requires_grad=True)
        >>> components = dist.Normal(loc, torch.ones(5, 3, 2)).to_event(1)
        >>> q = NormalMixture(dist.Categorical(logits=torch.zeros(5, 3)), components)
        >>> q.rsample((7,)).shape
        torch.Size([7, 5, 2])
    """

    has_rsample = True
    support = constraints.real_vector

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw z, of shape (*sample_shape, *batch_shape, K), with its gradient."""
        components = self.component_distribution
        normal = getattr(components, "base_dist", components)
        if not isinstance(normal, torch.distributions.Normal):
            raise TypeError(f"components must be Normal(loc, scale).to_event(1); got {components}")
        z = self.sample(sample_shape)
        return _Reparameterised.apply(z, self.mixture_distribution.logits, normal.loc, normal.scale)


class _Reparameterised(torch.autograd.Function):
    """z, with the gradients that a draw has in the parameters of the mixture it was drawn from."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(z, logits, loc, scale)
        return z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        z, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            logits, loc, scale = (parameter.detach().requires_grad_() for parameter in parameters)
            u, du_dz = _conditional_distribution(z, logits, loc, scale)
        # −gradientᵀ (∂u/∂z)⁻¹ ∂u/∂φ, the solve first
        solved = torch.linalg.solve_triangular(du_dz.detach().mT, gradient.unsqueeze(-1), upper=True)
        return (None, *torch.autograd.grad(u, (logits, loc, scale), -solved.squeeze(-1)))


def _conditional_distribution(z: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute u = F(z), (*, K), and ∂u/∂z, (*, K, K) lower triangular, from z (*, K) and C components."""
    standard = (z.unsqueeze(-2) - loc) / scale  # (*, C, K)
    unit = dist.Normal(torch.zeros_like(standard), 1.0, validate_args=False)
    log_density = unit.log_prob(standard) - scale.log()
    # component weights before z_k is seen: of the dimensions before k, (*, C, K)
    seen = log_density.cumsum(-1) - log_density
    weight = (logits.unsqueeze(-1) + seen).softmax(-2)
    below = unit.cdf(standard)
    u = (weight * below).sum(-2)
    # through z_k itself, and through the weights, which depend on the dimensions before
    density = (weight * log_density.exp()).sum(-2)
    surprise = weight * (below - u.unsqueeze(-2))
    through_weights = -torch.einsum("...ck,...cj->...kj", surprise, standard / scale)
    return u, through_weights.tril(-1) + density.diag_embed()
