"""Distributions that torch lacks, or has in a form that loses accuracy for confident networks."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F  # noqa: N812

from pyro_vae.utils.validation import outside_support

__all__ = ["Bernoulli", "ContinuousBernoulli", "DiscretizedLogistic", "grid"]


class _InASentence:
    """A distribution that tells of values outside its support in a sentence, where torch prints them all."""

    def _validate_sample(self, value: Tensor) -> None:
        try:
            super()._validate_sample(value)  # type: ignore[misc]
        except ValueError:
            message = isinstance(value, Tensor) and outside_support(
                "value",
                value,
                type(self).__name__,
                self.support,  # type: ignore[attr-defined]
            )
            if not message:
                raise
            raise ValueError(message) from None


class Bernoulli(_InASentence, dist.Bernoulli):
    """Bernoulli on {0, 1}: log p(x) = log σ((2x − 1) η), with logit η.

    Torch's goes by (1 − x) η − log σ(η), which cancels where x = 0 is likely, and takes more passes.

    Args:
        logits: η, any shape (*).

    Example:
        >>> Bernoulli(logits=torch.tensor(-20.0)).log_prob(torch.tensor(0.0))  # torch's gives 0
        tensor(-2.0612e-09)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of values in {0, 1}."""
        if self._validate_args:
            self._validate_sample(value)
        return F.logsigmoid((2 * value - 1) * self.logits)


class ContinuousBernoulli(_InASentence, TorchDistribution):
    """Continuous Bernoulli on [0, 1]: log p(x) = x η − log((e^η − 1) / η), with logit η.

    Unlike torch's class of the same name it never passes through probabilities, so that it is
    accurate for any η: torch clamps them, and is then off by 0.9 nats a pixel at η = 40 in float32.
    Near η = 0 it is (x − ½) η − log(sinh a / a) with a = η/2, by a series; elsewhere
    (x − [η > 0]) η − log((1 − e^(−|η|)) / |η|), in which nothing cancels.

    Source: Loaiza-Ganem and Cunningham, 2019, The continuous Bernoulli, arXiv:1907.06845.

    Args:
        logits: η, any shape (*).

    Example:
        >>> ContinuousBernoulli(torch.tensor(0.0)).log_prob(torch.tensor(0.3)).abs()  # uniform
        tensor(0.)
    """

    arg_constraints: ClassVar = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ContinuousBernoulli":
        """Return the same distribution with its parameters expanded to a batch shape."""
        new = ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at values in [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        near = self.logits.abs() < 0.2
        symmetric = (value - 0.5) * self.logits - _log_sinhc_series(torch.where(near, self.logits / 2, 0.0))
        size = torch.where(near, 1.0, self.logits).abs()
        step = (self.logits > 0).to(value.dtype)
        tail = (value - step) * self.logits - torch.log(-torch.expm1(-size) / size)
        return torch.where(near, symmetric, tail)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw by the inverse of the distribution function, for −|η|, mirrored where η > 0."""
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        negative = torch.where(self.logits > 0, -self.logits, self.logits)  # abs has slope 0 at 0
        flat = negative > -1e-3  # the uniform's first-order correction, where 0 / 0 threatens
        safe = torch.where(flat, -1.0, negative)
        steep = torch.log1p(u * torch.expm1(safe)) / safe
        mirrored = torch.where(flat, u + negative * u * (1 - u) / 2, steep).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - mirrored, mirrored)

    @property
    def mean(self) -> Tensor:
        """E[x] = (1 + coth a − 1/a) / 2 with a = η/2."""
        a = self.logits / 2
        near = a.abs() < 0.1
        safe = torch.where(near, 1.0, a)
        series = a / 3 - a**3 / 45 + 2 * a**5 / 945 - a**7 / 4725
        return (1 + torch.where(near, series, 1 / torch.tanh(safe) - 1 / safe)) / 2


def _log_sinhc_series(a: Tensor) -> Tensor:
    """log(sinh(a) / a) for |a| ≤ 0.1, to 1e-15."""
    square = a**2
    return square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))


def grid(levels: int) -> constraints.Constraint:
    """Constraint to the values 0, 1/(levels − 1), …, 1."""
    return _Grid(levels)


class _Grid(constraints.Constraint):
    is_discrete = True

    def __init__(self, levels: int):
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        steps = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((steps - steps.round()).abs() < 1e-3)

    def __repr__(self) -> str:
        return f"multiples of 1/{self.levels - 1} in [0, 1]"


class DiscretizedLogistic(_InASentence, TorchDistribution):
    """Logistic variable rounded to a grid of grey levels: a probability for each 8-bit pixel value.

    With L levels the values are x = k / (L − 1), and with Δ = 1 / (L − 1)
    p(x) = σ((x + Δ/2 − μ)/s) − σ((x − Δ/2 − μ)/s), where the bin of 0 reaches down to −∞ and that
    of 1 up to +∞, so that the L probabilities sum to 1. The difference is computed in logarithms by
    σ(b) − σ(a) = σ(b) σ(−a) (1 − e^(a − b)), which does not cancel.

    Source: Kingma et al., 2016, Improved variational inference with inverse autoregressive flow,
    arXiv:1606.04934, appendix.

    Args:
        loc: μ, any shape (*), on the scale of the values.
        scale: s > 0, the same shape.
        levels: L, 256 for 8-bit images.

    Raises:
        ValueError: If `levels` is below 2, or with validation, for a scale that is not positive.

    Example:
        >>> d = DiscretizedLogistic(torch.tensor(0.2), torch.tensor(0.05))
        >>> levels = torch.arange(256) / 255
        >>> d.expand((256,)).log_prob(levels).exp().sum()
        tensor(1.0000)
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, *, levels: int = 256, validate_args: bool | None = None):
        if levels < 2:
            raise ValueError(f"levels must be at least 2; got {levels}")
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The grid of values."""
        return grid(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscretizedLogistic":
        """Return the same distribution with its parameters expanded to a batch shape."""
        new = DiscretizedLogistic(
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            levels=self.levels,
            validate_args=False,
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of values on the grid."""
        if self._validate_args:
            self._validate_sample(value)
        half_bin = 0.5 / (self.levels - 1)
        upper = (value + half_bin - self.loc) / self.scale
        lower = (value - half_bin - self.loc) / self.scale
        below_top = torch.where(value > 1 - half_bin, 0.0, F.logsigmoid(upper))
        above_bottom = torch.where(value < half_bin, 0.0, F.logsigmoid(-lower))
        inside = (value >= half_bin) & (value <= 1 - half_bin)
        # the width is a function of the scale alone: no cancellation between the two edges
        log_width = torch.log(-torch.expm1(-2 * half_bin / self.scale))
        return below_top + above_bottom + torch.where(inside, log_width, 0.0)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw grey levels."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            tiny = torch.finfo(self.loc.dtype).tiny
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(min=tiny)
            value = self.loc + self.scale * (torch.log(u) - torch.log1p(-u))
            return (value.clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """E[x] = Δ Σ_k P(x ≥ k Δ), k = 1 … L − 1."""
        bin_width = 1 / (self.levels - 1)
        mean = torch.zeros_like(self.loc)
        for k in range(1, self.levels):  # a loop, to hold one picture in memory and not one a level
            mean += torch.sigmoid((self.loc - (k - 0.5) * bin_width) / self.scale)
        return mean * bin_width
