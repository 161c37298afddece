"""Parts of a VAE of data in their own units, which standardise them inside.

With x = offset + scale u, the networks see u, and p(x|z) is the density of x: nats are those of the units
of x, and whoever loads the VAE passes x as it is.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.guides import Guide
from pyro_vae.likelihoods import Likelihood
from pyro_vae.utils.elements import elementwise
from pyro_vae.utils.serialization import rebuildable

__all__ = ["StandardisedGuide", "StandardisedLikelihood"]


class _Units(nn.Module):
    """Offset and scale of the elements of an example, as buffers that a file keeps as arguments."""

    offset: Tensor
    scale: Tensor

    def __init__(self, part: Guide | Likelihood, offset: Sequence[float], scale: Sequence[float]):
        super().__init__()
        self.event_shape, self.latent_dim = part.event_shape, part.latent_dim
        event_shape = self.event_shape
        for name, values in (("offset", offset), ("scale", scale)):
            given = torch.tensor(values, dtype=torch.float64)
            if given.shape != (1,) and given.numel() != torch.Size(event_shape).numel():
                raise ValueError(
                    f"{name} must have one number, or one per element of {event_shape}; got {len(values)}"
                )
            given = given.reshape(event_shape) if given.shape != (1,) else given
            self.register_buffer(name, given, persistent=False)
        if not (self.scale > 0).all():
            raise ValueError(f"scale must be positive; got {float(self.scale.min())}")


@rebuildable
class StandardisedGuide(_Units):
    """Guide q(z|x) that sees u = (x − offset) / scale, and 0, the mean of u, where x is missing.

    Args:
        guide: q(z|u).
        offset: One number, or one for each element of x, in order.
        scale: Likewise, positive.

    Raises:
        ValueError: If there are as many numbers as neither, or a scale is not positive.

    Example:
        >>> from pyro_vae.guides import DiagonalNormal
        >>> inner = DiagonalNormal((2,), 3).double()
        >>> guide = StandardisedGuide(inner, [10.0, 0.0], [2.0, 1.0])
        >>> x, u = torch.tensor([[14.0, 1.0]]).double(), torch.tensor([[2.0, 1.0]]).double()
        >>> bool((guide(x).mean == inner(u).mean).all())
        True
    """

    mask_input = True  # `VAE` passes where x is observed

    def __init__(self, guide: Guide, offset: Sequence[float], scale: Sequence[float]):
        super().__init__(guide, offset, scale)
        self.guide = guide

    def forward(
        self, x: Tensor, y: Tensor | None = None, observed: Tensor | None = None
    ) -> dist.Distribution:
        """Return q(z|x), of batch shape (*,), for x (*, *event_shape)."""
        u = (x - self.offset) / self.scale
        if observed is None:
            return self.guide(u, y)
        u = torch.where(observed, u, 0.0)
        return self.guide(u, y, observed) if self.guide.mask_input else self.guide(u, y)


@rebuildable
class StandardisedLikelihood(_Units):
    """Likelihood p(x|z) of x = offset + scale u, from p(u|z), normal or Student-t by elements.

    Args:
        likelihood: p(u|z), of `likelihoods.Normal` or `likelihoods.StudentT`.
        offset: One number, or one for each element of x, in order.
        scale: Likewise, positive.

    Raises:
        ValueError: If there are as many numbers as neither, or a scale is not positive.

    Example:
        >>> from pyro_vae.likelihoods import Normal
        >>> inner = Normal(3, (2,)).double()
        >>> p = StandardisedLikelihood(inner, [10.0, 0.0], [2.0, 1.0])(torch.zeros(4, 3).double())
        >>> p.stddev[0]
        tensor([2., 1.], dtype=torch.float64)
    """

    def __init__(self, likelihood: Likelihood, offset: Sequence[float], scale: Sequence[float]):
        super().__init__(likelihood, offset, scale)
        self.likelihood = likelihood

    def forward(self, z: Tensor, y: Tensor | None = None) -> dist.Distribution:
        """Return p(x|z), of batch shape (*,) and event shape `event_shape`."""
        inner = elementwise(self.likelihood(z, y))
        loc, scale = self.offset + self.scale * inner.loc, self.scale * inner.scale
        if isinstance(inner, dist.StudentT):
            found: dist.Distribution = dist.StudentT(inner.df, loc, scale)
        else:
            found = dist.Normal(loc, scale)
        return found.to_event(len(self.event_shape))
