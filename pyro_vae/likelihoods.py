"""Likelihoods p(x|z): modules that take latent vectors z and return a Pyro distribution over data.

Notation: z (*, K) with K = latent_dim, x (*, *event_shape); * is any batch shape. Every density is
normalised, so that losses are comparable with published values, and between likelihoods of the same kind:
probabilities of discrete data, or densities of continuous data. Constructors raise TypeError for an argument
of another type and ValueError for a number out of range, naming the argument.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import distributions
from pyro_vae.networks import RAW_ONE, NetworkOptions, apply_in_context, check_input, decoder, positive
from pyro_vae.utils.columns import (
    COUNTS,
    FAMILIES,
    LEVELS,
    REAL,
    Column,
    ColumnValues,
    parse_columns,
    parse_units,
)
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.utils.validation import require_count, require_event_and_latent

__all__ = [
    "Bernoulli",
    "BetaBinomial",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
]


class Likelihood(nn.Module):
    """Base class of likelihoods: a network from z to the parameters of p(x|z).

    A subclass sets `num_parameters`, the number of network outputs per element of x, and implements
    `distribution`. A user-defined likelihood need not be a subclass: any module from z to a
    distribution can be used.

    Args:
        latent_dim: K, the number of latent dimensions.
        event_shape: Shape of one example.
        hidden_features: Widths of the hidden layers of the default network, an `MLP`.
        activation: Activation of the default network.
        network: "conv", a `ConvDecoder` of images; or a module from (N, K) to
            num_parameters * prod(event_shape) numbers per example, in any shape; the parameters vary
            slowest, so that a convolutional network returns (N, num_parameters * channels, height, width).
            With a context from (N, K + C).
        context_dim: C, the size of a further input y, for p(x|z, y); see `networks.as_context`.
    """

    num_parameters: int = 1

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        *,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
        network: nn.Module | Literal["conv"] | None = None,
        context_dim: int = 0,
    ):
        super().__init__()
        require_count("context_dim", context_dim, minimum=0)
        self.context_dim = context_dim
        self.event_shape = require_event_and_latent(
            f"{type(self).__name__}(latent_dim, event_shape)", event_shape=event_shape, latent_dim=latent_dim
        )
        self.latent_dim = latent_dim
        self.network = decoder(
            network,
            latent_dim + context_dim,
            self.event_shape,
            num_outputs=self.num_outputs,
            hidden_features=hidden_features,
            activation=activation,
        )

    @property
    def num_outputs(self) -> int:
        """Numbers that the network returns per example."""
        return self.num_parameters * math.prod(self.event_shape)

    def outputs(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """Apply the network: z (*, K) to `num_parameters` tensors of shape (*, *event_shape).

        Raises:
            TypeError: If z is not a floating-point tensor of the module's dtype, or y is missing or unwanted.
            ValueError: If z or y has another size or device, or the network another output size.
        """
        raw = self._apply_network(z, y, f"{self.num_parameters} x {self.event_shape}")
        batch_shape = raw.shape[:-1]
        if self.num_parameters == 1:  # because the gradient of `unbind` is a copy
            return (raw.reshape(*batch_shape, *self.event_shape),)
        return raw.reshape(*batch_shape, self.num_parameters, *self.event_shape).unbind(len(batch_shape))

    def _apply_network(self, z: Tensor, y: Tensor | None, wanted: str) -> Tensor:
        """Return the outputs of the network, (*, num_outputs); raise as `outputs`."""
        check_input(self, "z", z, (self.latent_dim,))
        raw, batch_shape = apply_in_context(self, z, y, 1)
        expected = (*batch_shape, self.num_outputs)
        if raw.shape[: len(batch_shape)] != batch_shape or raw.numel() != math.prod(expected):
            raise ValueError(
                f"{type(self).__name__}: for latent vectors of batch shape {tuple(batch_shape)} the network "
                f"must return {wanted} numbers each; got {tuple(raw.shape)}: give its last layer "
                f"{self.num_outputs} outputs"
            )
        return raw.reshape(expected)

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z), of batch shape (*,) and event shape `event_shape`, from the network's outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define distribution(*parts), or forward(z)")

    def forward(self, z: Tensor, y: Tensor | None = None) -> dist.Distribution:
        """Return p(x|z), or p(x|z, y), of batch shape (*,) and event shape `event_shape`."""
        return self.distribution(*self.outputs(z, y))


@rebuildable
class Bernoulli(Likelihood):
    """Bernoulli likelihood of binary data: log p(x|z) = Σ_d x_d η_d − log(1 + e^(η_d)), logits η = f(z).

    Grey levels are not binary: binarise them, or use `ContinuousBernoulli` or `DiscretizedLogistic`.
    Arguments as for `Likelihood`.

    Example:
        >>> p = Bernoulli(20, (1, 28, 28))(torch.zeros(5, 20))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5]), torch.Size([1, 28, 28]))
    """

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        (logits,) = parts
        return distributions.Bernoulli(logits=logits).to_event(len(self.event_shape))


@rebuildable
class ContinuousBernoulli(Likelihood):
    """Continuous Bernoulli likelihood of data in [0, 1]: log p(x|z) = Σ_d x_d η_d − log((e^(η_d) − 1)/η_d).

    Arguments as for `Likelihood`.

    Source: Loaiza-Ganem and Cunningham, 2019, The continuous Bernoulli, arXiv:1907.06845.

    Example:
        >>> p = ContinuousBernoulli(20, (784,))(torch.zeros(5, 20))
        >>> p.log_prob(torch.rand(5, 784)).shape
        torch.Size([5])
    """

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        (logits,) = parts
        return distributions.ContinuousBernoulli(logits).to_event(len(self.event_shape))


@rebuildable
class Normal(Likelihood):
    """Normal likelihood of real data, p(x|z) = N(f(z), c I) or N(f(z), diag c).

    log p(x|z) = −C ‖x − f(z)‖² − (D/2) log(2πc) with C = 1/(2c) for one variance c. Arguments as
    for `Likelihood`, and:

    Args:
        variance: c, a positive number for a fixed variance; "shared" to learn one for all elements;
            "per_element" to learn one for each element of x. Learned variances start at 1.

    Example:
        >>> p = Normal(2, (3,), variance=0.25)(torch.zeros(5, 2))
        >>> p.stddev[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        *,
        variance: float | str = 1.0,
        **network_options: Unpack[NetworkOptions],
    ):
        super().__init__(latent_dim, event_shape, **network_options)
        self.raw_scale: nn.Parameter | None = None
        if isinstance(variance, str) and variance in ("shared", "per_element"):
            shape = () if variance == "shared" else self.event_shape
            self.raw_scale = nn.Parameter(torch.full(shape, RAW_ONE))
        elif isinstance(variance, int | float) and 0 < variance < math.inf:
            self.fixed_scale = math.sqrt(variance)  # a number, so that it has the dtype of the network
        else:
            raise ValueError(
                f"variance must be a positive number, 'shared' or 'per_element'; got {variance!r} "
                "(it is a variance, not a standard deviation)"
            )

    @property
    def scale(self) -> Tensor | float:
        """Standard deviation √c: a number if fixed, otherwise of shape () or `event_shape`."""
        return positive(self.raw_scale) if self.raw_scale is not None else self.fixed_scale

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        (loc,) = parts
        return dist.Normal(loc, self.scale).to_event(len(self.event_shape))


@rebuildable
class DiscretizedLogistic(Likelihood):
    """Discretised logistic likelihood of grey levels k/255: a probability for each 8-bit value.

    See `distributions.DiscretizedLogistic` for the formula and the source. The network returns a location and
    a scale for each element of x. Arguments as for `Likelihood`.

    Example:
        >>> p = DiscretizedLogistic(2, (1, 4, 4))(torch.zeros(5, 2))
        >>> p.log_prob(torch.ones(5, 1, 4, 4)).shape
        torch.Size([5])
    """

    num_parameters = 2

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        loc, raw_scale = parts
        # initial locations in mid-grey, initial scales near a tenth of the range
        return distributions.DiscretizedLogistic(loc + 0.5, positive(raw_scale - 2)).to_event(
            len(self.event_shape)
        )


@rebuildable
class Poisson(Likelihood):
    """Poisson likelihood of counts: log p(x|z) = Σ_d x_d log λ_d − λ_d − log x_d!, rates λ = f(z).

    See `distributions.Poisson` for how it is computed. Arguments as for `Likelihood`.

    Example:
        >>> p = Poisson(2, (6,))(torch.zeros(5, 2))
        >>> p.event_shape
        torch.Size([6])
    """

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        (raw_rate,) = parts
        return distributions.Poisson(positive(raw_rate)).to_event(len(self.event_shape))


@rebuildable
class NegativeBinomial(Likelihood):
    """Negative binomial likelihood of overdispersed counts, with mean m = f(z) and variance m + m²/r.

    log p(x|z) = Σ_d log Γ(x_d + r_d)/(Γ(r_d) x_d!) + r_d log(r_d/(r_d + m_d)) + x_d log(m_d/(r_d + m_d)).
    The dispersion r is learned, one for each element of x; r → ∞ is the Poisson. Arguments as for
    `Likelihood`.

    Source: Lopez et al., 2018, Deep generative modeling for single-cell transcriptomics, Nature Methods.

    Example:
        >>> p = NegativeBinomial(2, (6,))(torch.zeros(5, 2))
        >>> bool((p.variance > p.mean).all())
        True
    """

    def __init__(
        self, latent_dim: int, event_shape: Sequence[int], **network_options: Unpack[NetworkOptions]
    ):
        super().__init__(latent_dim, event_shape, **network_options)
        self.raw_dispersion = nn.Parameter(torch.zeros(self.event_shape))

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        (raw_mean,) = parts
        mean, dispersion = positive(raw_mean), positive(self.raw_dispersion)
        return distributions.NegativeBinomial(mean, dispersion).to_event(len(self.event_shape))


@rebuildable
class BetaBinomial(Likelihood):
    """Beta-binomial likelihood of counts 0 … n, such as the grey levels 0 … 255 of 8-bit images.

    log p(x|z) = Σ_d log C(n, x_d) + log B(x_d + α_d, n − x_d + β_d) − log B(α_d, β_d), with α and β from z, 1
    at first, for which all counts are equally likely. Its variance exceeds the binomial's, which is the limit
    of large α + β. See `distributions.BetaBinomial` for how it is computed. Arguments as for `Likelihood`,
    and:

    Args:
        total_count: n, the largest count.

    Source: Townsend, Bird and Barber, 2019, Practical lossless compression with latent variables using bits
        back coding, arXiv:1901.04866, section 3.2.

    Example:
        >>> levels = torch.rand(5, 1, 4, 4).mul(255).round()  # of an image in [0, 1]
        >>> BetaBinomial(2, (1, 4, 4))(torch.zeros(5, 2)).log_prob(levels).shape
        torch.Size([5])
    """

    num_parameters = 2

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        *,
        total_count: int = 255,
        **network_options: Unpack[NetworkOptions],
    ):
        super().__init__(latent_dim, event_shape, **network_options)
        require_count("total_count", total_count)
        self.total_count = total_count

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        alpha, beta = (positive(raw + RAW_ONE) for raw in parts)
        return distributions.BetaBinomial(alpha, beta, total_count=self.total_count).to_event(
            len(self.event_shape)
        )


@rebuildable
class StudentT(Likelihood):
    """Student-t likelihood of real data with heavy tails, p(x|z) = Π_d T(x_d; ν_d, μ_d, s_d), all from z.

    Degrees of freedom ν > 2, so that mean and variance exist; ν → ∞ is the normal. The scale is at least
    `min_scale`: without a floor the density of a constant column grows without bound. For standardised
    tables; arguments as for `Likelihood`, and:

    Args:
        min_scale: Least scale s, positive.

    Source: P.-A. Mattei, J. Frellsen (2019), MIWAE, arXiv:1812.02633, section 4.

    Example:
        >>> p = StudentT(2, (6,))(torch.zeros(5, 2))
        >>> bool(p.variance.isfinite().all())
        True
    """

    num_parameters = 3

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        *,
        min_scale: float = 1e-3,
        **network_options: Unpack[NetworkOptions],
    ):
        super().__init__(latent_dim, event_shape, **network_options)
        if not (isinstance(min_scale, int | float) and 0 < min_scale < math.inf):
            raise ValueError(f"min_scale must be a positive number; got {min_scale!r}")
        self.min_scale = min_scale

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        loc, raw_scale, raw_df = parts
        df, scale = positive(raw_df) + 2, positive(raw_scale) + self.min_scale
        return dist.StudentT(df, loc, scale).to_event(len(self.event_shape))


@rebuildable
class Columns(Likelihood):
    """Likelihood of a table of mixed columns: log p(x|z) = Σ_j log p_j(x_j|z), each of its own family.

    | family | p_j(x_j|z) |
    |---|---|
    | "normal" | N(m, s²) with m = offset + scale f(z), s = scale σ |
    | "log-normal" | log x ~ N(m, s²), in units of log x; density of x |
    | "student-t" | T(ν, m, s), ν > 2 |
    | "poisson" | mean scale f(z) |
    | "negative-binomial" | mean m = scale f(z), variance m + m²/r |
    | "binary" | P(x = 1) = σ(f(z)) |
    | ("categorical", k) | P(x = c) = softmax(f(z))_c, of k outputs f, for codes c = 0 … k − 1 |
    | ("ordinal", k) | P(x ≤ c) = σ(t_c − f(z)), t increasing |

    The network gives f, one output per column (k of a category); σ, ν, r and t are learned, one or one set
    for each column. Densities are those of x in its own units. All values stand in one floating-point tensor
    (N, D), so that `missing="nan"` and `impute` work as for other likelihoods. Arguments as for `Likelihood`,
    and:

    Args:
        latent_dim: K, the number of latent dimensions.
        columns: The family of each column, with its number of levels where it has levels.
        offset: Of each column, (D,): the mean of x for "normal" and "student-t", of log x for "log-normal";
            of others it plays no role. By default 0.
        scale: Likewise the standard deviation; for counts their mean. By default 1.
        names: Names of the columns, for messages.
        min_scale: Least σ, positive: without it the density of a constant column grows without bound.

    Source: A. Nazabal, P. Olmos, Z. Ghahramani, I. Valera (2020), Handling incomplete heterogeneous data
    using VAEs, arXiv:1807.03653, section 3; without its mixture prior and its hierarchy of latent variables.

    Example:
        >>> p = Columns(2, ["normal", ("categorical", 3), "poisson"], offset=[170, 0, 0], scale=[10, 1, 2.5])
        >>> p(torch.zeros(5, 2)).log_prob(torch.tensor([[181.0, 2.0, 3.0]])).shape
        torch.Size([5])
        >>> p(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])
    """

    positions: Tensor
    order: Tensor

    def __init__(
        self,
        latent_dim: int,
        columns: Sequence[Any],
        *,
        offset: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        min_scale: float = 0.01,
        **network_options: Unpack[NetworkOptions],
    ):
        found = parse_columns(columns)
        if names is not None and len(names) != len(found):
            raise ValueError(f"names must have {len(found)} entries, one per column; got {len(names)}")
        if not (isinstance(min_scale, int | float) and 0 < min_scale < math.inf):
            raise ValueError(f"min_scale must be a positive number; got {min_scale!r}")
        self.columns = found  # before the network, whose size depends on them
        super().__init__(latent_dim, (len(found),), **network_options)
        units = parse_units(found, offset, scale)
        positions = [[j for j, column in enumerate(found) if column.family == family] for family in FAMILIES]
        self.groups = nn.ModuleList()
        for family, places in zip(FAMILIES, positions, strict=True):
            if places:
                own = [found[place] for place in places]
                self.groups.append(_GROUPS[family](own, units[0][places], units[1][places], min_scale))
        order = torch.tensor([place for places in positions for place in places])
        self.register_buffer("positions", order, persistent=False)
        self.register_buffer("order", order.argsort(), persistent=False)
        self.values = ColumnValues(found, names)

    @property
    def num_outputs(self) -> int:
        """Numbers that the network returns per example."""
        return sum(column.levels if column.family == "categorical" else 1 for column in self.columns)

    def outputs(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """Apply the network: z (*, K) to its outputs for the columns of each family, (*, outputs).

        Raises:
            TypeError: As for `Likelihood`.
            ValueError: As for `Likelihood`.
        """
        raw = self._apply_network(z, y, f"{self.num_outputs}")
        return raw.split([group.num_outputs for group in self.groups], -1)

    def distribution(self, *parts: Tensor) -> dist.Distribution:
        """Return p(x|z)."""
        families = [group(raw) for group, raw in zip(self.groups, parts, strict=True)]
        return distributions.Columns(families, self.positions, self.order, self.values).to_event(1)


class _Group(nn.Module):
    """C columns of one family: from outputs of the network (*, num_outputs) to p(x_j|z), (*, C)."""

    offset: Tensor
    scale: Tensor

    def __init__(self, columns: Sequence[Column], offset: Tensor, scale: Tensor, min_scale: float):
        super().__init__()
        self.family, self.num_outputs, self.min_scale = columns[0].family, len(columns), min_scale
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("scale", scale, persistent=False)


class _Real(_Group):
    def __init__(self, columns: Sequence[Column], *options: Any):
        super().__init__(columns, *options)
        self.raw_scale = nn.Parameter(torch.full((len(columns),), RAW_ONE))
        if self.family == "student-t":
            self.raw_df = nn.Parameter(torch.full((len(columns),), 3.0))

    def forward(self, raw: Tensor) -> dist.Distribution:
        unit = self.scale.to(raw.dtype)
        loc, scale = (
            self.offset.to(raw.dtype) + unit * raw,
            unit * (positive(self.raw_scale) + self.min_scale),
        )
        if self.family == "student-t":
            return dist.StudentT(positive(self.raw_df) + 2, loc, scale)
        return (dist.LogNormal if self.family == "log-normal" else dist.Normal)(loc, scale)


class _Counts(_Group):
    def __init__(self, columns: Sequence[Column], *options: Any):
        super().__init__(columns, *options)
        if self.family == "negative-binomial":
            self.raw_dispersion = nn.Parameter(torch.zeros(len(columns)))

    def forward(self, raw: Tensor) -> dist.Distribution:
        mean = self.scale.to(raw.dtype) * positive(raw + RAW_ONE)  # the scale itself, where raw is 0
        if self.family == "poisson":
            return distributions.Poisson(mean)
        return distributions.NegativeBinomial(mean, positive(self.raw_dispersion))


class _Binary(_Group):
    def forward(self, raw: Tensor) -> dist.Distribution:
        return distributions.Bernoulli(logits=raw)


class _Categorical(_Group):
    is_absent: Tensor
    place: Tensor

    def __init__(self, columns: Sequence[Column], *options: Any):
        super().__init__(columns, *options)
        levels = torch.tensor([column.levels for column in columns])
        code = torch.arange(int(levels.max()))
        self.num_outputs = int(levels.sum())
        self.register_buffer("is_absent", code >= levels[:, None], persistent=False)
        place = (levels.cumsum(0) - levels)[:, None] + code  # of the output of each code
        self.register_buffer("place", place.clamp(max=self.num_outputs - 1).flatten(), persistent=False)

    def forward(self, raw: Tensor) -> dist.Distribution:
        logits = raw.index_select(-1, self.place).unflatten(-1, self.is_absent.shape)
        return distributions.Levels(logits.masked_fill(self.is_absent, -torch.inf))


class _Ordinal(_Group):
    levels: Tensor

    def __init__(self, columns: Sequence[Column], *options: Any):
        super().__init__(columns, *options)
        levels = torch.tensor([column.levels for column in columns])
        self.register_buffer("levels", levels, persistent=False)
        shares = torch.arange(1, int(levels.max())) / levels[:, None]  # equal, where f is 0
        start = torch.logit(shares.clamp(max=0.99))
        gaps = start.diff(dim=-1).clamp(min=0.5)
        self.first = nn.Parameter(start[:, :1])
        self.raw_gaps = nn.Parameter(gaps + torch.log(-torch.expm1(-gaps)))

    def forward(self, raw: Tensor) -> dist.Distribution:
        thresholds = torch.cat([self.first, positive(self.raw_gaps)], -1).cumsum(-1)
        return distributions.Levels(distributions.ordinal_logits(raw, thresholds, self.levels))


_GROUPS: dict[str, type[_Group]] = {
    **dict.fromkeys(REAL, _Real),
    **dict.fromkeys(COUNTS, _Counts),
    "binary": _Binary,
    **dict(zip(LEVELS, (_Categorical, _Ordinal), strict=True)),
}
