"""Guides q(z|x): modules that take data x and return a Pyro distribution over their latent vectors.

Notation: x (*, *event_shape), z (*, K) with K = latent_dim; * is any batch shape. Constructors raise
TypeError for an argument of another type and ValueError for a number out of range, naming the argument.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.utils import vec_to_tril_matrix

from pyro_vae.distributions import (
    FlowDistribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NormalMixture,
    build_flow,
)
from pyro_vae.networks import NetworkOptions, apply_in_context, check_input, encoder, positive
from pyro_vae.utils.isolation import without_autocast
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


class GuideOptions(NetworkOptions, total=False):
    """Keyword arguments of every guide, documented in `Guide`."""

    mask_input: bool


class Guide(nn.Module, ABC):
    """Base class of guides: a network from x to the parameters of q(z|x).

    A subclass implements `sizes`, the number of network outputs for each parameter of q(z|x), and
    `distribution`, which builds q(z|x) from these parameters. A user-defined guide need not be a subclass:
    any module from x to a distribution can be used.

    Args:
        event_shape: Shape of one example.
        latent_dim: K, the number of latent dimensions.
        hidden_features: Widths of the hidden layers of the default network, an `MLP`.
        activation: Activation of the default network.
        network: "conv", a `ConvEncoder` of images; or a module from (N, *event_shape) to (N, P), where P is
            the sum of `sizes`, such as `sum(guides.LowRankNormal.sizes(20, rank=3))`. With a context from
            (N, prod(event_shape) + C).
        context_dim: C, the size of a further input y, for q(z|x, y); see `networks.as_context`.
        mask_input: Give the network, where values of x may be missing, a second half of its first dimension,
            (2 event_shape[0], ...): 1 where x is observed, 0 where it is missing.
        options: Keyword arguments of `sizes`.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | Literal["conv"] | None = None,
        context_dim: int = 0,
        mask_input: bool = False,
        **options: int,
    ):
        super().__init__()
        require_count("context_dim", context_dim, minimum=0)
        self.context_dim = context_dim
        self.mask_input = mask_input
        self.event_shape = require_event_and_latent(
            f"{type(self).__name__}(event_shape, latent_dim)", event_shape=event_shape, latent_dim=latent_dim
        )
        inspect.signature(self.sizes).bind(latent_dim, **options)  # raises TypeError for an unknown keyword
        for name, option in options.items():
            require_count(name, option)
        self.latent_dim = latent_dim
        self.output_sizes = self.sizes(latent_dim, **options)
        first, *others = self.event_shape or (1,)
        self.network = encoder(
            network,
            ((1 + mask_input) * first, *others),
            sum(self.output_sizes),  # one output layer for all parameters: a single matrix product
            context_dim=context_dim,
            hidden_features=hidden_features,
            activation=activation,
        )

    @staticmethod
    @abstractmethod
    def sizes(latent_dim: int, *args: Any, **options: Any) -> tuple[int, ...]:
        """Return the number of network outputs for each parameter of q(z|x), per example."""

    @abstractmethod
    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (*,) and event shape (K,), from parameters (*, size)."""

    def outputs(
        self, x: Tensor, y: Tensor | None = None, observed: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Apply the network: x (*, *event_shape) to the parameters of q(z|x), each (*, its size).

        Raises:
            TypeError: If x is not a floating-point tensor of the module's dtype, or y is missing or unwanted.
            ValueError: If x or y has another event shape or device, or the network another output size.
        """
        check_input(self, "x", x, self.event_shape)
        if self.mask_input:
            mask = torch.ones_like(x) if observed is None else observed.to(x.dtype)
            x = torch.cat([x, mask], -len(self.event_shape))
        raw, batch_shape = apply_in_context(self, x, y, len(self.event_shape))
        expected = (*batch_shape, sum(self.output_sizes))
        if raw.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: the network must return shape {expected} "
                f"({' + '.join(map(str, self.output_sizes))} numbers per example, for latent_dim "
                f"{self.latent_dim}); got {tuple(raw.shape)}: give its last layer {expected[-1]} outputs"
            )
        return raw.split(self.output_sizes, dim=-1)

    def forward(
        self, x: Tensor, y: Tensor | None = None, observed: Tensor | None = None
    ) -> dist.Distribution:
        """Return q(z|x), or q(z|x, y), of batch shape (*,) and event shape (K,).

        Args:
            x: (*, *event_shape), 0 where missing.
            y: Context, if there is one.
            observed: Where x is observed, bool (*, *event_shape), for `mask_input`; by default everywhere.
        """
        return self.distribution(*self.outputs(x, y, observed))


@rebuildable
class DiagonalNormal(Guide):
    """Normal guide with independent dimensions, q(z|x) = N(g(x), diag h(x)).

    The network returns 2K numbers: g, and the standard deviation √h through `networks.positive`, which cannot
    overflow. Arguments as for `Guide`.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Example:
        >>> guide = DiagonalNormal((1, 28, 28), 20)
        >>> q = guide(torch.rand(5, 1, 28, 28))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([20]))
    """

    @staticmethod
    def sizes(latent_dim: int) -> tuple[int, ...]:
        """Return the number of outputs for location and scale."""
        return latent_dim, latent_dim

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return N(loc, diag scale²)."""
        loc, raw_scale = parts
        return dist.Normal(loc, positive(raw_scale)).to_event(1)


@rebuildable
class FullCovarianceNormal(Guide):
    """Normal guide with any covariance, q(z|x) = N(g(x), L(x) L(x)ᵀ), L lower triangular.

    Contains the exact posterior where that is normal, as in linear-Gaussian models. The KL to a prior of
    independent normals has a closed form. The network returns K + K(K + 1)/2 numbers: g, the diagonal of L
    through `networks.positive`, and the entries below it by rows. Arguments as for `Guide`.

    Source: Kingma and Welling, 2019, An introduction to variational autoencoders, arXiv:1906.02691,
    section 2.5.1.

    Example:
        >>> guide = FullCovarianceNormal((1, 28, 28), 20)
        >>> guide(torch.rand(5, 1, 28, 28)).covariance_matrix.shape
        torch.Size([5, 20, 20])
    """

    @staticmethod
    def sizes(latent_dim: int) -> tuple[int, ...]:
        """Return the number of outputs for location, diagonal and the entries below it."""
        return latent_dim, latent_dim, latent_dim * (latent_dim - 1) // 2

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return N(loc, L Lᵀ)."""
        loc, raw_diagonal, below = parts
        scale_tril = positive(raw_diagonal).diag_embed() + vec_to_tril_matrix(below, diag=-1)
        return MultivariateNormal(loc, scale_tril=scale_tril)


@rebuildable
class LowRankNormal(Guide):
    """Normal guide with a low-rank covariance factor, q(z|x) = N(g(x), V(x) V(x)ᵀ + diag h(x)).

    V is K by R. Costs grow linearly with K, where those of `FullCovarianceNormal` grow with K² or K³. The KL
    to a prior of independent normals has a closed form. The network returns (2 + R) K numbers. Arguments as
    for `Guide`, and:

    Args:
        rank: R, the number of columns of V.

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
        **network_options: Unpack[GuideOptions],
    ):
        super().__init__(event_shape, latent_dim, rank=rank, **network_options)

    @staticmethod
    def sizes(latent_dim: int, rank: int = 2) -> tuple[int, ...]:
        """Return the number of outputs for location, scale and V."""
        return latent_dim, latent_dim, latent_dim * rank

    @without_autocast()
    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return N(loc, V Vᵀ + diag scale²)."""
        loc, raw_scale, factor = parts
        V = factor.unflatten(-1, (self.latent_dim, -1))
        return LowRankMultivariateNormal(loc, V, positive(raw_scale) ** 2)


@rebuildable
class Mixture(Guide):
    """Mixture guide, q(z|x) = Σ_c π_c(x) N(g_c(x), diag h_c(x)), for posteriors of several modes.

    Reparameterised, see `distributions.NormalMixture`, and therefore valid with every estimator. The network
    returns C (1 + 2K) numbers. Arguments as for `Guide`, and:

    Args:
        num_components: C, the number of components.

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
        **network_options: Unpack[GuideOptions],
    ):
        super().__init__(event_shape, latent_dim, num_components=num_components, **network_options)

    @staticmethod
    def sizes(latent_dim: int, num_components: int = 4) -> tuple[int, ...]:
        """Return the number of outputs for weights, locations and scales."""
        return num_components, num_components * latent_dim, num_components * latent_dim

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return Σ_c π_c N(loc_c, diag scale_c²)."""
        logits, loc, raw_scale = parts
        locs, scales = (part.unflatten(-1, (-1, self.latent_dim)) for part in (loc, positive(raw_scale)))
        components = dist.Normal(locs, scales).to_event(1)
        return NormalMixture(dist.Categorical(logits=logits), components)


@rebuildable
class Flow(Guide):
    """Normalising flow guide, z = g(x) + √h(x) f⁻¹(ε; c(x)) with ε ~ N(0, I), for posteriors of any shape.

    Location and scale as in `DiagonalNormal`; the transforms are conditioned on a context c(x) from the
    network. They act before the scale, on standardised vectors, because the splines of "nsf" are the identity
    outside [-5, 5]. The network returns 2K + C numbers. Arguments as for `Guide`, and:

    Args:
        flow: "iaf", "maf" or "nsf"; see `distributions.build_flow`. "iaf" draws in one pass, the others
            in K.
        num_context: C, the size of the context.
        num_transforms: Number of transforms in a row.
        flow_features: Widths of the hidden layers of each transform's network.

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
        **network_options: Unpack[GuideOptions],
    ):
        super().__init__(event_shape, latent_dim, num_context=num_context, **network_options)
        self.flow = build_flow(
            flow, latent_dim, num_context, num_transforms=num_transforms, hidden_features=flow_features
        )

    @staticmethod
    def sizes(latent_dim: int, num_context: int = 32) -> tuple[int, ...]:
        """Return the number of outputs for location, scale and context."""
        return latent_dim, latent_dim, num_context

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return the distribution of loc + scale f⁻¹(ε; context)."""
        loc, raw_scale, context = parts
        return FlowDistribution(self.flow(context), loc, positive(raw_scale))


@rebuildable
class SemiAmortised(nn.Module):
    """Guide that refines the q(z|x) of another guide for each example, by gradient steps on the ELBO.

    The network outputs λ(x) of the other guide, see `Guide.outputs`, are the parameters of q(z|x; λ) for one
    example. Each step is an Adam step along the gradient of a Monte Carlo estimate of
    ELBO(x; λ) = E_q[log p(x, z) − log q(z|x; λ)]; step t of T has size η (1 − t/T).

    Trained with `end_to_end`, the network learns a λ from which the steps lead to a high ELBO. With many
    steps on a trained guide, q approaches the best member of the family for each example; the gain in ELBO is
    the amortisation gap. A `VAE` passes log p(x, z) as a second argument to every guide whose attribute
    `needs_log_joint` is true.

    Args:
        guide: The guide to refine, a `Guide`.
        num_steps: T, the number of steps.
        step_size: η > 0, the size of the first step.
        num_particles: Number of draws of z that estimate each gradient.
        end_to_end: If true, the gradient of the ELBO passes through the steps, which takes second derivatives
            of the model. Otherwise the sum of the steps is treated as a constant.

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
                f"SemiAmortised refines a guide of pyro_vae, such as DiagonalNormal((6,), 2); got {guide!r}"
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
        self.mask_input = guide.mask_input

    def forward(
        self, x: Tensor, log_joint: Callable[[Tensor, Tensor], Tensor], observed: Tensor | None = None
    ) -> dist.Distribution:
        """Return the refined q(z|x), of batch shape (N,) and event shape (K,).

        Args:
            x: Data (N, *event_shape), 0 where missing.
            log_joint: Function from x and z (S, N, K) to log p(x, z) (S, N).
            observed: As for a `Guide`.
        """
        start = torch.cat(self.guide.outputs(x, observed=observed), dim=-1)
        through = self.end_to_end and torch.is_grad_enabled()
        with torch.enable_grad():
            refined = self._refined(start if through else start.detach(), x, log_joint, through=through)
        return self._distribution(refined if through else start + (refined - start).detach())

    def _distribution(self, values: Tensor) -> dist.Distribution:
        return self.guide.distribution(*values.split(self.guide.output_sizes, dim=-1))

    def _refined(
        self, values: Tensor, x: Tensor, log_joint: Callable[[Tensor, Tensor], Tensor], *, through: bool
    ) -> Tensor:
        """Maximise the ELBO from λ = `values` (N, P) by Adam, independently for each example."""
        values.requires_grad_()
        mean, square = torch.zeros_like(values), torch.zeros_like(values)
        for step in range(self.num_steps):
            q = self._distribution(values)
            z = q.rsample((self.num_particles,))
            elbo = (log_joint(x, z) - q.log_prob(z)).mean(0)
            (gradient,) = torch.autograd.grad(elbo.sum(), values, create_graph=through)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient**2
            # bias-corrected as in Adam; 1e-12 keeps the root differentiable at 0
            direction = mean / (1 - 0.9 ** (step + 1))
            size = (square / (1 - 0.99 ** (step + 1)) + 1e-12).sqrt()
            values = values + self.step_size * (1 - step / self.num_steps) * direction / size
            if not through:
                values = values.detach().requires_grad_()
        return values
