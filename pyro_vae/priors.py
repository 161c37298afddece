"""Priors p(z): modules that take no input and return a Pyro distribution over one latent vector.

The distribution has batch shape () and event shape (K,), K = latent_dim. Constructors raise TypeError for a
number that is not an integer and ValueError for a number below 1, naming the argument.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions import FlowDistribution, NormalMixture, build_flow
from pyro_vae.networks import RAW_ONE, context_of, positive
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.utils.validation import require_count, require_shape

__all__ = ["Flow", "LearnedNormal", "Mixture", "StandardNormal", "VampPrior"]


@rebuildable
class StandardNormal(nn.Module):
    """Standard normal prior p(z) = N(0, I).

    Args:
        latent_dim: K, the number of latent dimensions.

    Example:
        >>> StandardNormal(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        require_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        # buffers, so that the prior follows the module's device and dtype
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        """Return p(z)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


@rebuildable
class LearnedNormal(nn.Module):
    """Normal prior with learned location and scale, p(z) = N(m, diag s²), initially N(0, I).

    With a context, p(z|y) = N(m(y), diag s(y)²), both linear in y before s is made positive.

    Args:
        latent_dim: K, the number of latent dimensions.
        context_dim: C, the size of y (see `networks.as_context`), or 0 for none.

    Source: Hoffman and Johnson, 2016, ELBO surgery, section 2: the ELBO is highest for the average of q(z|x)
    over the data as the prior; this prior can match the moments of that average.

    Example:
        >>> [name for name, _ in LearnedNormal(20).named_parameters()]
        ['loc', 'raw_scale']
        >>> LearnedNormal(20, context_dim=3)(torch.tensor([0, 2])).batch_shape
        torch.Size([2])
    """

    def __init__(self, latent_dim: int, *, context_dim: int = 0):
        super().__init__()
        require_count("latent_dim", latent_dim)
        require_count("context_dim", context_dim, minimum=0)
        self.latent_dim, self.context_dim = latent_dim, context_dim
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_scale = nn.Parameter(torch.full((latent_dim,), RAW_ONE))
        self.shift = nn.Linear(context_dim, 2 * latent_dim, bias=False) if context_dim else None
        if self.shift is not None:
            nn.init.zeros_(self.shift.weight)

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        """Return p(z), or p(z|y) of batch shape (*,)."""
        loc, raw_scale = self.loc, self.raw_scale
        context = context_of(self, loc, y)
        if self.shift is not None:
            shift_loc, shift_scale = self.shift(context).chunk(2, -1)
            loc, raw_scale = loc + shift_loc, raw_scale + shift_scale
        return dist.Normal(loc, positive(raw_scale)).to_event(1)


@rebuildable
class Mixture(nn.Module):
    """Mixture prior p(z) = Σ_c π_c N(m_c, diag s_c²) with learned weights, locations and scales.

    Initially the weights are equal, the scales 1, and the locations drawn from N(0, I).

    Args:
        latent_dim: K, the number of latent dimensions.
        num_components: C.

    Source: Dilokthanakul et al., 2016, Deep unsupervised clustering with Gaussian mixture variational
    autoencoders, arXiv:1611.02648; as a baseline in Tomczak and Welling, 2018, arXiv:1705.07120.

    Example:
        >>> Mixture(20, num_components=5)().sample((7,)).shape
        torch.Size([7, 20])
    """

    def __init__(self, latent_dim: int, *, num_components: int = 10):
        super().__init__()
        require_count("latent_dim", latent_dim)
        require_count("num_components", num_components)
        self.latent_dim = latent_dim
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, latent_dim))
        self.raw_scale = nn.Parameter(torch.full((num_components, latent_dim), RAW_ONE))

    def forward(self) -> dist.Distribution:
        """Return p(z)."""
        components = dist.Normal(self.loc, positive(self.raw_scale)).to_event(1)
        return NormalMixture(dist.Categorical(logits=self.logits), components)


@rebuildable
class VampPrior(nn.Module):
    """Mixture of a guide's posteriors at learned pseudo-inputs u_c, p(z) = Σ_c π_c q(z|u_c).

    Approximates the average of q(z|x) over the data, the prior of the highest ELBO. Pass the guide of the VAE
    itself, not a copy, so that prior and VAE share one network.

    Args:
        guide: q(z|x), a module from x (C, *event_shape) to a distribution of batch shape (C,).
        event_shape: Shape of one example; by default the guide's.
        num_components: C.

    Raises:
        ValueError: If neither the guide nor `event_shape` gives the shape of x.

    Source: Tomczak and Welling, 2018, VAE with a VampPrior, arXiv:1705.07120.

    Example:
        >>> from pyro_vae.guides import DiagonalNormal
        >>> guide = DiagonalNormal((1, 28, 28), 20)
        >>> prior = VampPrior(guide, num_components=5)
        >>> prior.set_pseudo_inputs(torch.rand(5, 1, 28, 28))
        >>> prior().event_shape
        torch.Size([20])
    """

    def __init__(
        self, guide: nn.Module, *, event_shape: Sequence[int] | None = None, num_components: int = 100
    ):
        super().__init__()
        require_count("num_components", num_components)
        if not isinstance(guide, nn.Module):
            raise TypeError(f"VampPrior takes the guide of the VAE, a module from x to q(z|x); got {guide!r}")
        event_shape = getattr(guide, "event_shape", None) if event_shape is None else event_shape
        if event_shape is None:
            raise ValueError(
                f"{type(guide).__name__} has no attribute event_shape: pass event_shape=, "
                "the shape of one example"
            )
        shape = require_shape("event_shape", event_shape)
        self.guide = guide
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.pseudo_inputs = nn.Parameter(torch.rand(num_components, *shape))

    @torch.no_grad()
    def set_pseudo_inputs(self, x: Tensor) -> None:
        """Set the pseudo-inputs to data x (C, *event_shape); initially they are uniform noise in [0, 1]."""
        if x.shape != self.pseudo_inputs.shape:
            raise ValueError(f"x must have shape {tuple(self.pseudo_inputs.shape)}; got {tuple(x.shape)}")
        self.pseudo_inputs.copy_(x)

    def forward(self) -> dist.Distribution:
        """Return p(z)."""
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), self.guide(self.pseudo_inputs))


@rebuildable
class Flow(nn.Module):
    """Normalising flow prior, z = f⁻¹(u) with u ~ N(0, I) and f learned.

    Args:
        latent_dim: K, the number of latent dimensions.
        flow: "maf", "nsf" or "iaf"; see `distributions.build_flow`. "maf" and "nsf" compute the density of a
            given z, as in training, in one pass; "nsf" is the identity outside [-5, 5].
        num_transforms: Number of transforms in a row.
        flow_features: Widths of the hidden layers of each transform's network.

    Source: Chen et al., 2017, Variational lossy autoencoder, arXiv:1611.02731; Papamakarios, Pavlakou and
    Murray, 2017, Masked autoregressive flow for density estimation, arXiv:1705.07057.

    Example:
        >>> Flow(20, num_transforms=2)().sample((7,)).shape
        torch.Size([7, 20])
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        flow: str = "maf",
        num_transforms: int = 3,
        flow_features: Sequence[int] = (64, 64),
    ):
        super().__init__()
        require_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.flow = build_flow(flow, latent_dim, num_transforms=num_transforms, hidden_features=flow_features)

    def forward(self) -> dist.Distribution:
        """Return p(z)."""
        return FlowDistribution(self.flow())
