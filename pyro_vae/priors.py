"""Priors p(z): modules that, called with nothing, return a Pyro distribution over one latent vector."""

import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.specs import rebuildable

__all__ = ["StandardNormal"]


@rebuildable
class StandardNormal(nn.Module):
    """Standard normal prior p(z) = N(0, I).

    Calling it returns a distribution of batch shape () and event shape (latent_dim,).

    Args:
        latent_dim: K, the number of latent dimensions.

    Raises:
        ValueError: If `latent_dim` is below 1.

    Example:
        >>> StandardNormal(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1; got {latent_dim}")
        self.latent_dim = latent_dim
        # buffers, so that the prior follows the module's device and dtype
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        """Return p(z)."""
        return dist.Normal(self.loc, self.scale).to_event(1)
