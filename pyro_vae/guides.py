"""Guides q(z|x): modules that take data x and return a Pyro distribution over their latent vectors.

Notation: x (*, *event_shape), z (*, K) with K = latent_dim; * is any batch shape.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.utils import vec_to_tril_matrix

from pyro_vae.distributions import FlowDistribution, NormalMixture, build_flow
from pyro_vae.networks import MLP, apply_batched, check_input, positive
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.utils.validation import require_count, require_event_and_latent

__all__ = [
    "DiagonalNormal",
    "Flow",
    "FullCovarianceNormal",
    "Guide",
    "LowRankNormal",
    "Mixture",
    "SemiAmortised",
]


class Guide(nn.Module, ABC):
    """What the guides share: a network from x to the numbers that make up q(z|x).

    A subclass implements `sizes`, how many numbers each part of q(z|x) takes, and `distribution`,
    which puts the parts together. A guide of your own need not be a subclass: any module from x to a
    distribution serves.

    Args:
        event_shape: Shape of one datum.
        latent_dim: K, the number of latent dimensions.
        hidden_features: Widths of the hidden layers of the default network, an `MLP`.
        activation: Activation of the default network.
        network: A module in place of the default, from (N, *event_shape) to (N, P), where P is the
            sum of `sizes`; so for an encoder of your own, `sum(guides.LowRankNormal.sizes(20, rank=3))`.
        options: Of `sizes`.

    Raises:
        TypeError: If `latent_dim` or an option is no integer, or `event_shape` or `hidden_features` no tuple
            of integers.
        ValueError: If one of these numbers is below 1.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | None = None,
        **options: int,
    ):
        super().__init__()
        self.event_shape = require_event_and_latent(
            f"{type(self).__name__}(event_shape, latent_dim)", event_shape=event_shape, latent_dim=latent_dim
        )
        for name, option in options.items():
            require_count(name, option)
        self.latent_dim = latent_dim
        self.output_sizes = self.sizes(latent_dim, **options)
        # one linear layer for all the heads: a single matrix product
        if network is None:
            sizes = math.prod(self.event_shape), sum(self.output_sizes)
            network = MLP(*sizes, hidden_features=hidden_features, activation=activation)
        self.network = network

    @staticmethod
    @abstractmethod
    def sizes(latent_dim: int, *args: Any, **options: Any) -> tuple[int, ...]:
        """Return how many numbers each part of q(z|x) takes of a datum."""

    @abstractmethod
    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return the q(z|x) of batch shape (*,) and event shape (K,) that is made of parts (*, size)."""

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the network: x (*, *event_shape) to the parts of q(z|x), each (*, its size).

        Raises:
            TypeError: If x is no floating-point tensor of the module's dtype.
            ValueError: If x has another event shape or device, or the network another output size.
        """
        check_input(self, "x", x, self.event_shape)
        raw = apply_batched(self.network, x, len(self.event_shape))
        expected = (*x.shape[: x.dim() - len(self.event_shape)], sum(self.output_sizes))
        if raw.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: the network must return shape {expected} "
                f"({' + '.join(map(str, self.output_sizes))} numbers a datum, for latent_dim "
                f"{self.latent_dim}); got {tuple(raw.shape)}: give its last layer {expected[-1]} outputs"
            )
        return raw.split(self.output_sizes, dim=-1)

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (*,) and event shape (K,)."""
        return self.distribution(*self.outputs(x))


@rebuildable
class DiagonalNormal(Guide):
    """Normal guide with independent dimensions, q(z|x) = N(g(x), diag h(x)).

    g is the first half of the network's output. The standard deviation, the root of h, is
    `networks.positive` of the second half, which cannot overflow. Arguments as for `Guide`; the
    network returns 2K numbers.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Example:
        >>> guide = DiagonalNormal((1, 28, 28), 20)
        >>> q = guide(torch.rand(5, 1, 28, 28))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([20]))
    """

    @staticmethod
    def sizes(latent_dim: int) -> tuple[int, ...]:
        """Return how many numbers location and scale take."""
        return latent_dim, latent_dim

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return N(loc, diag scale²)."""
        loc, raw_scale = parts
        return dist.Normal(loc, positive(raw_scale)).to_event(1)


@rebuildable
class FullCovarianceNormal(Guide):
    """Normal guide with any covariance, q(z|x) = N(g(x), L(x) L(x)ᵀ), L lower triangular.

    Where the posterior is normal, as in linear-Gaussian models, this family holds it. Its KL to a
    prior of independent normals is known in closed form. Arguments as for `Guide`; the network returns
    K + K(K + 1)/2 numbers: g, the diagonal of L through `networks.positive`, the entries below it
    row by row.

    Source: Kingma and Welling, 2019, An introduction to variational autoencoders, arXiv:1906.02691,
    section 2.5.1.

    Example:
        >>> guide = FullCovarianceNormal((1, 28, 28), 20)
        >>> guide(torch.rand(5, 1, 28, 28)).covariance_matrix.shape
        torch.Size([5, 20, 20])
    """

    @staticmethod
    def sizes(latent_dim: int) -> tuple[int, ...]:
        """Return how many numbers location, diagonal and the entries below it take."""
        return latent_dim, latent_dim, latent_dim * (latent_dim - 1) // 2

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return N(loc, L Lᵀ)."""
        loc, raw_diagonal, below = parts
        scale_tril = positive(raw_diagonal).diag_embed() + vec_to_tril_matrix(below, diag=-1)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


@rebuildable
class LowRankNormal(Guide):
    """Normal guide with a few directions of correlation, q(z|x) = N(g(x), V(x) V(x)ᵀ + diag h(x)).

    V is K by R. Costs grow linearly with K, where those of `FullCovarianceNormal` grow with K² or K³. Its
    KL to a prior of independent normals is known in closed form. The network returns (2 + R) K numbers.

    Args:
        event_shape: As for `Guide`.
        latent_dim: As for `Guide`.
        rank: R, the number of columns of V.
        hidden_features: As for `Guide`.
        activation: As for `Guide`.
        network: As for `Guide`.

    Source: Ong, Nott and Smith, 2018, Gaussian variational approximation with a factor covariance
    structure, arXiv:1701.03208.

    Example:
        >>> guide = LowRankNormal((1, 28, 28), 20, rank=3)
        >>> guide(torch.rand(5, 1, 28, 28)).cov_factor.shape
        torch.Size([5, 20, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        rank: int = 2,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | None = None,
    ):
        super().__init__(
            event_shape,
            latent_dim,
            hidden_features=hidden_features,
            activation=activation,
            network=network,
            rank=rank,
        )

    @staticmethod
    def sizes(latent_dim: int, rank: int = 2) -> tuple[int, ...]:
        """Return how many numbers location, scale and V take."""
        return latent_dim, latent_dim, latent_dim * rank

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return N(loc, V Vᵀ + diag scale²)."""
        loc, raw_scale, factor = parts
        V = factor.unflatten(-1, (self.latent_dim, -1))
        return dist.LowRankMultivariateNormal(loc, V, positive(raw_scale) ** 2)


@rebuildable
class Mixture(Guide):
    """Mixture guide, q(z|x) = Σ_c π_c(x) N(g_c(x), diag h_c(x)), for posteriors of several modes.

    Reparameterised, see `distributions.NormalMixture`, so that every estimator takes it. The network
    returns C (1 + 2K) numbers.

    Args:
        event_shape: As for `Guide`.
        latent_dim: As for `Guide`.
        num_components: C.
        hidden_features: As for `Guide`.
        activation: As for `Guide`.
        network: As for `Guide`.

    Source: Graves, 2016, Stochastic backpropagation through mixture density distributions,
    arXiv:1607.05690.

    Example:
        >>> guide = Mixture((1, 28, 28), 20, num_components=3)
        >>> guide(torch.rand(5, 1, 28, 28)).rsample((7,)).shape
        torch.Size([7, 5, 20])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        num_components: int = 4,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | None = None,
    ):
        super().__init__(
            event_shape,
            latent_dim,
            hidden_features=hidden_features,
            activation=activation,
            network=network,
            num_components=num_components,
        )

    @staticmethod
    def sizes(latent_dim: int, num_components: int = 4) -> tuple[int, ...]:
        """Return how many numbers the weights, locations and scales take."""
        return num_components, num_components * latent_dim, num_components * latent_dim

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return Σ_c π_c N(loc_c, diag scale_c²)."""
        logits, loc, raw_scale = parts
        locs, scales = (part.unflatten(-1, (-1, self.latent_dim)) for part in (loc, positive(raw_scale)))
        components = dist.Normal(locs, scales).to_event(1)
        return NormalMixture(dist.Categorical(logits=logits), components)


@rebuildable
class Flow(Guide):
    """Normalising flow, z = g(x) + √h(x) f⁻¹(ε; c(x)) with ε ~ N(0, I), for posteriors of any shape.

    As `DiagonalNormal`, of which the flow bends the noise, by transforms that see a context c(x) from
    the network. The scale comes last so that the transforms see standardised vectors whatever x: the
    splines of "nsf" bend only what lies in [-5, 5]. The network returns 2K + C numbers.

    Args:
        event_shape: As for `Guide`.
        latent_dim: As for `Guide`.
        flow: "iaf", "maf" or "nsf"; see `distributions.build_flow`. "iaf" draws in one pass, the others in K.
        num_context: C, the size of the context.
        num_transforms: How many transforms in a row.
        flow_features: Widths of the hidden layers of each transform's network.
        hidden_features: As for `Guide`.
        activation: As for `Guide`.
        network: As for `Guide`.

    Source: Rezende and Mohamed, 2015, Variational inference with normalizing flows, arXiv:1505.05770;
    Kingma et al., 2016, Improved variational inference with inverse autoregressive flow, arXiv:1606.04934.

    Example:
        >>> guide = Flow((1, 28, 28), 20, flow="iaf", num_transforms=2)
        >>> guide(torch.rand(5, 1, 28, 28)).rsample((7,)).shape
        torch.Size([7, 5, 20])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        flow: str = "iaf",
        num_context: int = 32,
        num_transforms: int = 3,
        flow_features: Sequence[int] = (64, 64),
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | None = None,
    ):
        super().__init__(
            event_shape,
            latent_dim,
            hidden_features=hidden_features,
            activation=activation,
            network=network,
            num_context=num_context,
        )
        self.flow = build_flow(
            flow, latent_dim, num_context, num_transforms=num_transforms, hidden_features=flow_features
        )

    @staticmethod
    def sizes(latent_dim: int, num_context: int = 32) -> tuple[int, ...]:
        """Return how many numbers location, scale and context take."""
        return latent_dim, latent_dim, num_context

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return the distribution of loc + scale f⁻¹(ε; context)."""
        loc, raw_scale, context = parts
        return FlowDistribution(self.flow(context), loc, positive(raw_scale))


@rebuildable
class SemiAmortised(nn.Module):
    """Guide that refines another's q(z|x) for each datum: some steps up the ELBO from where it begins.

    The numbers λ(x) that the other guide's network returns, see `Guide.outputs`, are the parameters of
    q(z|x; λ) for one datum. Each step is one of Adam's along the gradient of a Monte Carlo estimate
    of ELBO(x; λ) = E_q[log p(x, z) − log q(z|x; λ)]; step t of T has the size η (1 − t/T).

    Trained through (`end_to_end`), the network learns to return a λ that is good to begin with.
    Wrapped around a guide that is trained already, with many steps, it comes near the best q of the
    family for each datum; what that wins in ELBO is the amortisation gap.

    A `VAE` gives log p(x, z) to every guide with a true attribute `needs_log_joint`, as a second argument.

    Args:
        guide: The guide to refine, a `Guide`.
        num_steps: T.
        step_size: η.
        num_particles: Draws of z from which each gradient is estimated.
        end_to_end: Whether the ELBO's gradient passes through the steps, so that it meets the second
            derivatives of the model. Else the sum of the steps counts as a constant.

    Raises:
        TypeError: If the guide is no `Guide`, or a count no integer.
        ValueError: If a number is not positive.

    Source: Kim, Wiseman, Miller, Sontag and Rush, 2018, Semi-amortized variational autoencoders,
    arXiv:1802.02550; Cremer, Li and Duvenaud, 2018, Inference suboptimality in variational autoencoders,
    arXiv:1801.03558.

    Example:
        >>> from pyro_vae import priors
        >>> guide = SemiAmortised(FullCovarianceNormal((6,), 2), num_steps=3)
        >>> prior = priors.StandardNormal(2)()
        >>> q = guide(torch.zeros(5, 6), log_joint=lambda x, z: prior.log_prob(z))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    needs_log_joint = True

    def __init__(
        self,
        guide: Guide,
        *,
        num_steps: int = 10,
        step_size: float = 0.05,
        num_particles: int = 1,
        end_to_end: bool = True,
    ):
        super().__init__()
        if not isinstance(guide, Guide):
            raise TypeError(
                f"SemiAmortised refines a guide of this library, a `Guide`; got {type(guide).__name__}"
            )
        require_count("num_steps", num_steps)
        require_count("num_particles", num_particles)
        if not step_size > 0:
            raise ValueError(f"step_size must be positive; got {step_size}")
        self.guide = guide
        self.num_steps = num_steps
        self.step_size = step_size
        self.num_particles = num_particles
        self.end_to_end = end_to_end

    def forward(self, x: Tensor, log_joint: Callable[[Tensor, Tensor], Tensor]) -> dist.Distribution:
        """Return the refined q(z|x), of batch shape (N,) and event shape (K,).

        Args:
            x: Data (N, *event_shape).
            log_joint: From x and z (S, N, K) to log p(x, z) (S, N).
        """
        start = torch.cat(self.guide.outputs(x), dim=-1)
        through = self.end_to_end and torch.is_grad_enabled()
        with torch.enable_grad():
            refined = self._refined(start if through else start.detach(), x, log_joint, through=through)
        return self._distribution(refined if through else start + (refined - start).detach())

    def _distribution(self, values: Tensor) -> dist.Distribution:
        return self.guide.distribution(*values.split(self.guide.output_sizes, dim=-1))

    def _refined(
        self, values: Tensor, x: Tensor, log_joint: Callable[[Tensor, Tensor], Tensor], *, through: bool
    ) -> Tensor:
        """Climb from λ = `values` (N, P) by Adam, each datum for itself."""
        values.requires_grad_()
        mean, square = torch.zeros_like(values), torch.zeros_like(values)
        for step in range(self.num_steps):
            q = self._distribution(values)
            z = q.rsample((self.num_particles,))
            elbo = (log_joint(x, z) - q.log_prob(z)).mean(0)
            (gradient,) = torch.autograd.grad(elbo.sum(), values, create_graph=through)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient**2
            # the running means begin at zero; the root is kept away from where it has no derivative
            direction = mean / (1 - 0.9 ** (step + 1))
            size = (square / (1 - 0.99 ** (step + 1)) + 1e-12).sqrt()
            values = values + self.step_size * (1 - step / self.num_steps) * direction / size
            if not through:
                values = values.detach().requires_grad_()
        return values
