"""Guides q(z|x): modules that take data x and return a Pyro distribution over their latent vectors.

Notation: x (*, *event_shape), z (*, K) with K = latent_dim; * is any batch shape.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.networks import MLP, apply_batched, check_input, positive
from pyro_vae.specs import rebuildable

__all__ = ["DiagonalNormal", "Guide"]


class Guide(nn.Module, ABC):
    """What the guides share: a network from x to the parameters of q(z|x).

    A subclass sets `num_parameters`, how many numbers a latent dimension needs, and implements
    `forward` by `outputs`. A guide of your own need not be a subclass: any module from x to a
    distribution serves.

    Args:
        event_shape: Shape of one datum.
        latent_dim: K, the number of latent dimensions.
        hidden_features: Widths of the hidden layers of the default network, an `MLP`.
        activation: Activation of the default network.
        network: A module from (N, *event_shape) to (N, num_parameters * K) in place of the default.

    Raises:
        ValueError: If `event_shape` or `latent_dim` has an entry below 1.
    """

    num_parameters: int

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | None = None,
    ):
        super().__init__()
        if min([latent_dim, *event_shape]) < 1:
            raise ValueError(
                "event_shape and latent_dim need entries of at least 1; "
                f"got {tuple(event_shape)} and {latent_dim}"
            )
        self.event_shape = tuple(event_shape)
        self.latent_dim = latent_dim
        # one linear layer for all the heads: a single matrix product
        self.network = network or MLP(
            math.prod(event_shape),
            self.num_parameters * latent_dim,
            hidden_features=hidden_features,
            activation=activation,
        )

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the network: x (*, *event_shape) to `num_parameters` tensors of shape (*, K).

        Raises:
            TypeError: If x is no floating-point tensor of the module's dtype.
            ValueError: If x has another event shape or device, or the network another output size.
        """
        check_input(self, "x", x, self.event_shape)
        raw = apply_batched(self.network, x, len(self.event_shape))
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        expected = self.num_parameters * self.latent_dim
        if raw.shape != (*batch_shape, expected):
            raise ValueError(
                f"{type(self).__name__}: the network must return shape {(*batch_shape, expected)} "
                f"({self.num_parameters} x latent_dim {self.latent_dim} a datum); got {tuple(raw.shape)}"
            )
        return raw.chunk(self.num_parameters, dim=-1)

    @abstractmethod
    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (*,) and event shape (K,)."""


@rebuildable
class DiagonalNormal(Guide):
    """Normal guide with independent dimensions, q(z|x) = N(g(x), diag h(x)).

    g is the first half of the network's output. The standard deviation, the root of h, is
    `networks.positive` of the second half, which cannot overflow. Arguments as for `Guide`.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Example:
        >>> import torch
        >>> guide = DiagonalNormal((1, 28, 28), 20)
        >>> q = guide(torch.rand(5, 1, 28, 28))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([20]))
    """

    num_parameters = 2

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (*,) and event shape (K,)."""
        loc, raw_scale = self.outputs(x)
        return dist.Normal(loc, positive(raw_scale)).to_event(1)
