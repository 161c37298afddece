"""Distributions and Kullback-Leibler divergences that torch lacks, or computes inaccurately.

Importing this module registers its closed-form divergences with `torch.distributions.register_kl`, from which
`kl_divergence` and `TraceMeanField_ELBO` take them. zuko, which provides the normalising flows, is slow to
import and therefore loaded by the first flow that is built.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import (
    Distribution,
    Independent,
    Normal,
    constraints,
    register_kl,
)
from torch.nn import functional as F  # noqa: N812

from pyro_vae.utils.isolation import without_autocast
from pyro_vae.utils.validation import outside_support, require_count, require_shape

__all__ = [
    "FLOWS",
    "Bernoulli",
    "BetaBinomial",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "FlowDistribution",
    "Levels",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "NegativeBinomial",
    "NormalMixture",
    "Poisson",
    "build_flow",
    "grid",
    "multivariate_to_diagonal_normal",
    "ordinal_logits",
    "poisson_deviance",
    "stirling_remainder",
]

_Distribution = TypeVar("_Distribution", bound=TorchDistribution)


def _copy_validation(source: _Distribution, expanded: _Distribution) -> _Distribution:
    """Give an expanded distribution the validation setting of its source, parameters unchecked."""
    expanded._validate_args = source._validate_args
    return expanded


class _ConciseErrors:
    """Mixin that names the first value outside the support, where torch prints the whole tensor."""

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


class MultivariateNormal(dist.MultivariateNormal):
    """Pyro's `MultivariateNormal`, in full precision under `torch.autocast`."""

    rsample = without_autocast()(dist.MultivariateNormal.rsample)
    log_prob = without_autocast()(dist.MultivariateNormal.log_prob)


class LowRankMultivariateNormal(dist.LowRankMultivariateNormal):
    r"""Normal with covariance V Vᵀ + D, in full precision under `torch.autocast`.

    The Mahalanobis distance of x − m = r is the least of ‖D^(−½) (r − V a)‖² + ‖a‖² over a, and is computed
    as such. Torch subtracts two large numbers instead, and loses all digits in float32 where V is wide and D
    narrow.
    """

    rsample = without_autocast()(dist.LowRankMultivariateNormal.rsample)

    @without_autocast()
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        V, D = self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag
        root = self._capacitance_tril  # L Lᵀ = I + Vᵀ D⁻¹ V
        r = (value - self.loc).unsqueeze(-1)
        a = torch.cholesky_solve(V.mT @ (r / D.unsqueeze(-1)), root)
        residual = (r - V @ a).squeeze(-1)
        distance = (residual.square() / D).sum(-1) + a.squeeze(-1).square().sum(-1)
        log_volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + D.log().sum(-1) / 2
        return -log_volume - (distance + self.event_shape[0] * math.log(2 * math.pi)) / 2


class Bernoulli(_ConciseErrors, dist.Bernoulli):
    """Bernoulli on {0, 1}: log p(x) = log σ((2x − 1) η), with logit η.

    Torch computes (1 − x) η − log σ(η), which cancels where x = 0 is likely, and is slower.

    Args:
        logits: η, any shape (*).

    Example:
        >>> Bernoulli(logits=torch.tensor(-20.0)).log_prob(torch.tensor(0.0))  # torch's gives 0
        tensor(-2.0612e-09)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of values in {0, 1}."""
        if self._validate_args:
            self._validate_sample(value)
        return F.logsigmoid((2 * value - 1) * self.logits)


class ContinuousBernoulli(_ConciseErrors, TorchDistribution):
    """Continuous Bernoulli on [0, 1]: log p(x) = x η − log((e^η − 1) / η), with logit η.

    Accurate for any η. Torch's class of the same name clamps probabilities, and is off by 0.9 nats per pixel
    at η = 40 in float32. Here log p(x) is (x − ½) η − log(sinh a / a) with a = η/2, by a series, near η = 0,
    and elsewhere (x − [η > 0]) η − log((1 − e^(−|η|)) / |η|), in which nothing cancels.

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
        """Return the distribution with its parameters expanded to a batch shape."""
        logits = self.logits.expand(batch_shape)
        return _copy_validation(self, ContinuousBernoulli(logits, validate_args=False))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at values in [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        near = self.logits.abs() < 0.2
        symmetric = (value - 0.5) * self.logits - _log_sinhc_series(torch.where(near, self.logits / 2, 0.0))
        size = torch.where(near, 1.0, self.logits).abs()
        step = (self.logits > 0).to(value.dtype)
        tail = (value - step) * self.logits - torch.log(-torch.expm1(-size) / size)
        return torch.where(near, symmetric, tail)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw by the inverse of the distribution function at −|η|, mirrored where η > 0."""
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        negative = torch.where(self.logits > 0, -self.logits, self.logits)  # abs has slope 0 at 0
        flat = negative > -1e-3  # first-order correction of the uniform, to avoid 0 / 0
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
    """Compute log(sinh(a) / a) for |a| ≤ 0.1, to 1e-15."""
    square = a**2
    return square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))


def stirling_remainder(x: Tensor) -> Tensor:
    """Return δ(x) = log Γ(x + 1) − (x + ½) log x + x − ½ log 2π for x > 0, to rounding.

    Source: C. Loader (2000), Fast and accurate computation of binomial probabilities.

    Example:
        >>> stirling_remainder(torch.tensor(1e6, dtype=torch.float64))
        tensor(8.3333e-08, dtype=torch.float64)
    """
    large = x >= 16
    far, near = torch.where(large, x, 16.0), torch.where(large, 16.0, x)
    square = 1 / far**2
    series = 1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188)))
    direct = torch.lgamma(near + 1) - (near + 0.5) * torch.log(near) + near - 0.5 * math.log(2 * math.pi)
    return torch.where(large, series / far, direct)


def poisson_deviance(x: Tensor, rate: Tensor, difference: Tensor) -> Tensor:
    """Return D(x, λ) = x log(x/λ) + λ − x ≥ 0 for x, λ > 0, without cancellation where x is near λ.

    With v = (x − λ)/(x + λ), x log(x/λ) = 2x (v + v³/3 + v⁵/5 + …), a short series where |v| < 0.1.

    Args:
        x: Any shape (*).
        rate: λ, (*).
        difference: x − λ, (*), as exactly as it is known.

    Source: C. Loader (2000), Fast and accurate computation of binomial probabilities.

    Example:
        >>> x, rate = torch.tensor(1e6), torch.tensor(1.001e6)
        >>> poisson_deviance(x, rate, x - rate)  # about (x − λ)² / 2λ
        tensor(0.4997)
    """
    v = difference / (x + rate)
    is_near = v.abs() < 0.1
    near = torch.where(is_near, v, 0.0)
    square = near**2
    series = torch.zeros_like(near)
    for power in (17, 15, 13, 11, 9, 7, 5, 3):
        series = square * (1 / power + series)
    ratio = torch.where(is_near, 1.0, rate / x)  # not x/λ, whose gradient in λ overflows for small λ
    return torch.where(is_near, near * (difference + 2 * x * series), -x * torch.log(ratio) - difference)


class Poisson(_ConciseErrors, dist.Poisson):
    """Poisson on 0, 1, 2, …: log p(x) = −δ(x) − D(x, λ) − ½ log 2πx with rate λ > 0; −λ for x = 0.

    Torch computes x log λ − λ − log x!, whose terms cancel: in float32 it is off by 9 nats at a mean of 10⁷.
    δ is `stirling_remainder`, D `poisson_deviance`.

    Args:
        rate: λ, any shape (*).

    Source: C. Loader (2000), Fast and accurate computation of binomial probabilities.

    Example:
        >>> Poisson(torch.tensor(1e7)).log_prob(torch.tensor(1e7))  # torch's gives 0
        tensor(-8.9780)
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Poisson":
        """Return the same distribution with its rate expanded to a batch shape."""
        return _copy_validation(self, Poisson(self.rate.expand(batch_shape), validate_args=False))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of counts."""
        if self._validate_args:
            self._validate_sample(value)
        rate, value = torch.broadcast_tensors(self.rate, value)
        x = torch.where(value > 0, value, 1.0)
        positive_count = (
            -stirling_remainder(x) - poisson_deviance(x, rate, x - rate) - 0.5 * torch.log(2 * math.pi * x)
        )
        return torch.where(value > 0, positive_count, -rate)


class NegativeBinomial(_ConciseErrors, TorchDistribution):
    """Negative binomial on 0, 1, 2, …, with mean m and variance m + m²/r.

    log p(x) = log Γ(x + r)/(Γ(r) x!) + r log(r/(r + m)) + x log(m/(r + m)), which with n = x + r is

        δ(n) − δ(r) − δ(x) − D(r, nr/(r + m)) − D(x, nm/(r + m)) − ½ log(2πx n / r)

    and −r log(1 + m/r) for x = 0. Torch computes the first form, whose terms cancel for large r or x.
    δ is `stirling_remainder`, D `poisson_deviance`.

    Args:
        mean: m > 0, any shape (*).
        dispersion: r > 0, broadcast with the mean; r → ∞ is the Poisson.

    Source: C. Loader (2000), Fast and accurate computation of binomial probabilities.

    Example:
        >>> NegativeBinomial(torch.tensor(10.0), torch.tensor(1e7)).log_prob(torch.tensor(10.0))
        tensor(-2.0786)
    """

    arg_constraints: ClassVar = {"mean": constraints.positive, "dispersion": constraints.positive}
    support = constraints.nonnegative_integer

    def __init__(self, mean: Tensor, dispersion: Tensor, *, validate_args: bool | None = None):
        self._mean, self.dispersion = torch.broadcast_tensors(mean, dispersion)
        super().__init__(self._mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NegativeBinomial":
        """Return the same distribution with its parameters expanded to a batch shape."""
        mean, dispersion = self._mean.expand(batch_shape), self.dispersion.expand(batch_shape)
        return _copy_validation(self, NegativeBinomial(mean, dispersion, validate_args=False))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of counts."""
        if self._validate_args:
            self._validate_sample(value)
        m, r, value = torch.broadcast_tensors(self._mean, self.dispersion, value)
        x = torch.where(value > 0, value, 1.0)
        n, share = x + r, r / (r + m)
        difference = share * (m - x)  # of r from its expectation nr/(r + m), and of that of x from x
        positive_count = (
            stirling_remainder(n)
            - stirling_remainder(r)
            - stirling_remainder(x)
            - poisson_deviance(r, n * share, difference)
            - poisson_deviance(x, n * (m / (r + m)), -difference)
            - 0.5 * (torch.log(2 * math.pi * x) + torch.log1p(x / r))
        )
        return torch.where(value > 0, positive_count, -r * torch.log1p(m / r))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts: Poisson of a gamma rate with mean m and shape r."""
        m, r = (part.expand(self._extended_shape(sample_shape)) for part in (self._mean, self.dispersion))
        return torch.poisson(torch._standard_gamma(r) * (m / r))

    @property
    def mean(self) -> Tensor:
        """E[x] = m."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Var[x] = m + m²/r."""
        return self._mean + self._mean**2 / self.dispersion


class BetaBinomial(_ConciseErrors, TorchDistribution):
    """Beta-binomial on 0, 1, …, n: the number of successes in n trials of probability π ~ Beta(α, β).

    log p(x) = log C(n, x) + log B(x + α, n − x + β) − log B(α, β), which with y = n − x, s = α + β,
    N = n + s and shares A = (x + α)/N, B = (y + β)/N is

        λ(n) − λ(x) − λ(y) + δ(x + α) − δ(α) + δ(y + β) − δ(β) − δ(N) + δ(s)
        − ½ log((1 + x/α) (1 + y/β) / (1 + n/s)) − D(x, nA) − D(y, nB) − D(α, sA) − D(β, sB)

    in which no two terms cancel for large parameters; those of the first form do, in float32 by whole nats.
    δ is `stirling_remainder`, D `poisson_deviance`, λ(x) = δ(x) + ½ log 2πx, and λ(0) = 0.

    Args:
        alpha: α > 0, any shape (*).
        beta: β > 0, broadcast with α.
        total_count: n ≥ 1, 255 for 8-bit images.

    Source: the method of C. Loader (2000), Fast and accurate computation of binomial probabilities.

    Example:
        >>> d = BetaBinomial(torch.tensor(1.0), torch.tensor(1.0), total_count=255)  # uniform
        >>> (d.log_prob(torch.tensor([0.0, 100.0, 255.0])) + math.log(256)).abs() < 1e-5
        tensor([True, True, True])
    """

    arg_constraints: ClassVar = {"alpha": constraints.positive, "beta": constraints.positive}
    has_enumerate_support = True

    def __init__(
        self, alpha: Tensor, beta: Tensor, *, total_count: int = 255, validate_args: bool | None = None
    ):
        require_count("total_count", total_count)
        self.alpha, self.beta = torch.broadcast_tensors(alpha, beta)
        self.total_count = total_count
        super().__init__(self.alpha.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Counts 0 … n."""
        return constraints.integer_interval(0, self.total_count)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BetaBinomial":
        """Return the distribution with its parameters expanded to a batch shape."""
        alpha, beta = self.alpha.expand(batch_shape), self.beta.expand(batch_shape)
        return _copy_validation(
            self, BetaBinomial(alpha, beta, total_count=self.total_count, validate_args=False)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of counts."""
        if self._validate_args:
            self._validate_sample(value)
        a, b, x = torch.broadcast_tensors(self.alpha, self.beta, value)
        n = torch.full_like(a, self.total_count)
        y, s = n - x, a + b
        first, second = (x + a) / (n + s), (y + b) / (n + s)
        difference = (x * (b / s) - y * (a / s)) * (s / (n + s))  # of x from its expectation n A
        return (
            _log_factorial_remainder(n)
            - _log_factorial_remainder(x)
            - _log_factorial_remainder(y)
            + _growth_of_remainder(a, x)
            + _growth_of_remainder(b, y)
            - _growth_of_remainder(s, n)
            - _deviance_of_count(x, n * first, difference)
            - _deviance_of_count(y, n * second, -difference)
            - poisson_deviance(a, s * first, -difference)
            - poisson_deviance(b, s * second, difference)
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts: binomial of a beta probability."""
        shape = self._extended_shape(sample_shape)
        weights = torch.stack([self.alpha.expand(shape), self.beta.expand(shape)], -1)
        probability = torch._sample_dirichlet(weights)[..., 0]
        return torch.binomial(torch.full_like(probability, self.total_count), probability)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return the counts 0 … n, (n + 1, *1) or expanded to (n + 1, *)."""
        counts = torch.arange(self.total_count + 1, dtype=self.alpha.dtype, device=self.alpha.device)
        counts = counts.reshape(-1, *(1,) * len(self.batch_shape))
        return counts.expand(-1, *self.batch_shape) if expand else counts

    @property
    def mean(self) -> Tensor:
        """E[x] = n α / (α + β)."""
        return self.total_count * (self.alpha / (self.alpha + self.beta))

    @property
    def variance(self) -> Tensor:
        """Var[x] = n π (1 − π) (s + n) / (s + 1) with π = α/s and s = α + β."""
        s = self.alpha + self.beta
        spread = (self.alpha / s) * (self.beta / s)
        return self.total_count * spread * ((s + self.total_count) / (s + 1))


def _log_factorial_remainder(x: Tensor) -> Tensor:
    """Compute log x! − x log x + x for counts x ≥ 0, 0 at 0."""
    safe = torch.where(x > 0, x, 1.0)
    remainder = stirling_remainder(safe) + 0.5 * torch.log(2 * math.pi * safe)
    return torch.where(x > 0, remainder, 0.0)


def _growth_of_remainder(a: Tensor, x: Tensor) -> Tensor:
    """Compute δ(a + x) − δ(a) − ½ log(1 + x/a), the difference of log Γ less its terms in a log a and a."""
    return stirling_remainder(a + x) - stirling_remainder(a) - 0.5 * torch.log1p(x / a)


def _deviance_of_count(x: Tensor, rate: Tensor, difference: Tensor) -> Tensor:
    """Compute D(x, λ) for counts x ≥ 0; D(0, λ) = λ."""
    safe = torch.where(x > 0, x, 1.0)
    return torch.where(x > 0, poisson_deviance(safe, rate, difference), rate)


def grid(levels: int) -> constraints.Constraint:
    """Return the constraint to the values 0, 1/(levels − 1), …, 1."""
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


class DiscretizedLogistic(_ConciseErrors, TorchDistribution):
    """Logistic distribution rounded to a grid of grey levels: a probability for each 8-bit pixel value.

    With L levels the values are x = k / (L − 1), and with Δ = 1 / (L − 1)
    p(x) = σ((x + Δ/2 − μ)/s) − σ((x − Δ/2 − μ)/s), where the bin of 0 extends to −∞ and the bin of 1
    to +∞, so that the L probabilities sum to 1. The difference is computed in logarithms by
    σ(b) − σ(a) = σ(b) σ(−a) (1 − e^(a − b)), which does not cancel.

    Source: Kingma et al., 2016, Improved variational inference with inverse autoregressive flow,
    arXiv:1606.04934, appendix.

    Args:
        loc: μ, any shape (*), on the scale of the values.
        scale: s > 0, the same shape.
        levels: L ≥ 2, 256 for 8-bit images.

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
        """Grid of values."""
        return grid(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscretizedLogistic":
        """Return the distribution with its parameters expanded to a batch shape."""
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return _copy_validation(
            self, DiscretizedLogistic(loc, scale, levels=self.levels, validate_args=False)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of values on the grid."""
        if self._validate_args:
            self._validate_sample(value)
        half_bin = 0.5 / (self.levels - 1)
        distance = value - self.loc  # first, as it is small or exact: half a bin would be lost in rounding
        upper = (distance + half_bin) / self.scale
        lower = (distance - half_bin) / self.scale
        at_top, at_bottom = value > 1 - half_bin, value < half_bin
        below_top = torch.where(at_top, 0.0, F.logsigmoid(upper))
        above_bottom = torch.where(at_bottom, 0.0, F.logsigmoid(-lower))
        # computed from the scale alone, because the difference of the two edges would cancel
        log_width = torch.log(-torch.expm1(-2 * half_bin / self.scale))
        return below_top + above_bottom + torch.where(at_top | at_bottom, 0.0, log_width)

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
        for k in range(1, self.levels):  # a loop, to hold one level in memory at a time
            mean += torch.sigmoid((self.loc - (k - 0.5) * bin_width) / self.scale)
        return mean * bin_width


class Levels(TorchDistribution):
    """Distribution of one of k levels by its code 0 … k − 1, a floating-point number: p(x) = softmax(η)_x.

    Args:
        logits: η, (*, k); −inf for codes that do not exist, so that one tensor holds several k.

    Example:
        >>> Levels(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])).log_prob(torch.tensor([1.0, 0.0])).exp()
        tensor([0.5000, 1.0000])
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Codes that exist."""
        return constraints.integer_interval(0, self.logits.isfinite().sum(-1) - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Levels":
        """Return the distribution with its parameters expanded to a batch shape."""
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return _copy_validation(self, Levels(logits, validate_args=False))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of codes."""
        if self._validate_args:
            self._validate_sample(value)
        log_probs = F.log_softmax(self.logits, -1)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        index = value.expand(shape).long().unsqueeze(-1)
        return log_probs.expand(*shape, log_probs.shape[-1]).gather(-1, index).squeeze(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw codes."""
        return dist.Categorical(logits=self.logits).sample(sample_shape).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """E[x], of ordered levels the mean of their codes."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """Var[x]."""
        return (self._moment(2) - self._moment(1).square()).clamp(min=0.0)

    def _moment(self, power: int) -> Tensor:
        codes = torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        return self.logits.softmax(-1) @ codes**power


def ordinal_logits(location: Tensor, thresholds: Tensor, levels: Tensor) -> Tensor:
    """Return log p(c), (*, C, k), of ordered levels: P(x ≤ c) = σ(t_c − η), t_0 < t_1 < … < t_(k − 2).

    Differences of σ are computed in logarithms, as for `DiscretizedLogistic`.

    Args:
        location: η, (*, C).
        thresholds: t, (C, k − 1), increasing.
        levels: Number of levels of each of the C, at most k, (C,): thresholds beyond play no role.

    Source: P. McCullagh (1980), Regression models for ordinal data, J. R. Statist. Soc. B 42.

    Example:
        >>> thresholds = torch.tensor([[-1.0, 1.0], [0.0, 1.0]])
        >>> ordinal_logits(torch.zeros(2), thresholds, torch.tensor([3, 2])).exp()
        tensor([[0.2689, 0.4621, 0.2689],
                [0.5000, 0.5000, 0.0000]])
    """
    code = torch.arange(thresholds.shape[-1] + 1, device=thresholds.device)
    is_above, is_below = code > 0, code < levels[:, None] - 1  # a threshold below it, above it
    lower = torch.cat([thresholds[:, :1], thresholds], -1)
    upper = torch.cat([thresholds, thresholds[:, -1:]], -1)
    gap = torch.where(is_above & is_below, upper - lower, 1.0)
    log_prob = torch.where(is_below, F.logsigmoid(upper - location[..., None]), 0.0)
    log_prob = log_prob + torch.where(is_above, F.logsigmoid(location[..., None] - lower), 0.0)
    log_prob = log_prob + torch.where(is_above & is_below, torch.log(-torch.expm1(-gap)), 0.0)
    return log_prob.masked_fill(code >= levels[:, None], -torch.inf)


class Columns(_ConciseErrors, TorchDistribution):
    """Independent elements of several families: log p(x_j), of batch shape (*, D), for x (*, D).

    Args:
        parts: Distributions of single elements, of batch shapes (*, D_p), Σ_p D_p = D.
        positions: Column of each element of the parts, in their order, int64 (D,), a permutation.
        order: Its inverse.
        values: The support, by column.

    Example:
        >>> from pyro_vae.utils.columns import Column, ColumnValues
        >>> parts = [Levels(torch.zeros(4, 1, 3)), dist.Normal(torch.zeros(4, 1), 1.0)]
        >>> order = torch.tensor([1, 0])
        >>> p = Columns(parts, order, order, ColumnValues([Column("normal"), Column("categorical", 3)]))
        >>> p.log_prob(torch.tensor([0.0, 2.0]))[0]  # −½ log 2π, −log 3
        tensor([-0.9189, -1.0986])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        parts: Sequence[Any],
        positions: Tensor,
        order: Tensor,
        values: constraints.Constraint,
        *,
        validate_args: bool | None = None,
    ):
        self.parts, self.positions, self.order, self.values = tuple(parts), positions, order, values
        self.sizes = [part.batch_shape[-1] for part in parts]
        super().__init__((*parts[0].batch_shape[:-1], len(positions)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The values of each column."""
        return self.values

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Columns":
        """Return the distribution with its parameters expanded to a batch shape."""
        *batch, _ = batch_shape
        parts = [part.expand((*batch, size)) for part, size in zip(self.parts, self.sizes, strict=True)]
        expanded = Columns(parts, self.positions, self.order, self.values, validate_args=False)
        return _copy_validation(self, expanded)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density or probability of each element."""
        if self._validate_args:
            self._validate_sample(value)
        by_part = value.index_select(-1, self.positions).split(self.sizes, -1)
        return self._ordered([part.log_prob(x) for part, x in zip(self.parts, by_part, strict=True)])

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw each element."""
        return self._ordered([part.sample(sample_shape) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """E[x_j]; of categories the mean of their codes."""
        return self._ordered([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """Var[x_j]."""
        return self._ordered([part.variance for part in self.parts])

    def _ordered(self, by_part: list[Tensor]) -> Tensor:
        return torch.cat(by_part, -1).index_select(-1, self.order)


class NormalMixture(dist.MixtureSameFamily):
    r"""Mixture of normals with independent dimensions, p(z) = Σ_c π_c Π_k N(z_k; μ_ck, σ_ck²).

    Draws z carry gradients by implicit reparameterisation. The map from z to the conditional
    distribution functions

    .. math:: u_k = F(z_k \,|\, z_{<k}) = \sum_c w_{kc} \, \Phi((z_k - \mu_{ck}) / \sigma_{ck}), \qquad
        w_{kc} \propto \pi_c \prod_{j<k} \mathcal N(z_j; \mu_{cj}, \sigma_{cj}^2)

    makes u uniform whatever the parameters φ are, so that z(φ) at fixed u has the derivative
    ∂z/∂φ = −(∂u/∂z)⁻¹ ∂u/∂φ, in which ∂u/∂z is triangular. Once differentiable, like Pyro's
    `MixtureOfDiagNormals`, but also valid for K = 1 and coinciding components, and without underflow in
    many dimensions.

    Args:
        mixture_distribution: A `Categorical` of batch shape (*,) over C components.
        component_distribution: `Normal(μ, σ).to_event(1)` of batch shape (*, C), event shape (K,).

    Raises:
        TypeError: In `rsample`, if the components are not normals.

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
        if not isinstance(normal, Normal):
            raise TypeError(f"components must be Normal(loc, scale).to_event(1); got {components}")
        z = self.sample(sample_shape)
        return _ImplicitGradient.apply(z, self.mixture_distribution.logits, normal.loc, normal.scale)


class _ImplicitGradient(torch.autograd.Function):
    """Identity on a draw z, with the gradient of z in the parameters of its mixture."""

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
    preceding = log_density.cumsum(-1) - log_density  # log density of the dimensions before k, (*, C, K)
    weight = (logits.unsqueeze(-1) + preceding).softmax(-2)
    cdf = unit.cdf(standard)
    u = (weight * cdf).sum(-2)
    # u_k depends on z_k directly, and on the dimensions before it through the weights
    density = (weight * log_density.exp()).sum(-2)
    weighted_excess = weight * (cdf - u.unsqueeze(-2))
    through_weights = -torch.einsum("...ck,...cj->...kj", weighted_excess, standard / scale)
    return u, through_weights.tril(-1) + density.diag_embed()


FLOWS = ("maf", "iaf", "nsf")


def build_flow(
    flow: str, features: int, context: int = 0, *, num_transforms: int, hidden_features: Sequence[int]
) -> nn.Module:
    """Build a zuko flow: a module from context (*, context), or nothing, to a zuko distribution.

    A flow draws z = f⁻¹(u) with u ~ N(0, I), and has log p(z) = log N(f(z); 0, I) + log |det ∂f/∂z|.
    An autoregressive f takes one pass of its network in one direction and K passes in the other: "maf" and
    "nsf" evaluate the density of a given z in one pass and draw in K; "iaf" draws, and evaluates the density
    of its own draws, in one pass, and of any other z in K.

    Args:
        flow: "maf", masked autoregressive with affine maps; "iaf", its inverse; "nsf", neural spline, with
            rational-quadratic maps of [-5, 5] onto itself.
        features: K, the dimension of z.
        context: Size of the context, 0 for none.
        num_transforms: Number of transforms in a row; each takes the dimensions in the reverse order.
        hidden_features: Widths of the hidden layers of each transform's network.

    Raises:
        ValueError: If the flow is unknown, or a number is below 1.

    Source: Papamakarios, Pavlakou and Murray, 2017, Masked autoregressive flow for density estimation,
    arXiv:1705.07057; Kingma et al., 2016, Improved variational inference with inverse autoregressive flow,
    arXiv:1606.04934; Durkan et al., 2019, Neural spline flows, arXiv:1906.04032.

    Example:
        >>> flow = build_flow("maf", 3, num_transforms=2, hidden_features=(8,))
        >>> flow().sample((5,)).shape
        torch.Size([5, 3])
    """
    if flow not in FLOWS:
        raise ValueError(f"flow must be one of {', '.join(FLOWS)}; got {flow!r}")
    require_count("num_transforms", num_transforms)
    widths = require_shape("flow_features", hidden_features)  # the argument's name in guides and priors
    zuko = _import_zuko()
    family = zuko.flows.NSF if flow == "nsf" else zuko.flows.MAF
    built = family(features, context, transforms=num_transforms, hidden_features=widths)
    return zuko.flows.Flow(built.transform.inv, built.base) if flow == "iaf" else built


def _import_zuko() -> ModuleType:
    """Import zuko, and restore the validation of distributions, which zuko switches off for all of torch."""
    validate_args = Distribution._validate_args
    import zuko  # noqa: PLC0415

    Distribution.set_default_validate_args(validate_args)
    return zuko


class FlowDistribution(TorchDistribution):
    """Zuko flow as a Pyro distribution, shifted and scaled: z = loc + scale · f⁻¹(u), reparameterised.

    The density of the last draw is kept, because Pyro asks for it right after drawing, and inverting the flow
    would take K passes.

    Args:
        flow: A zuko distribution, as returned by a flow, of batch shape (*,) and event shape (K,).
        loc: (*, K), or a number or tensor that broadcasts to it.
        scale: Positive, of shapes as `loc`.

    Example:
        >>> flow = build_flow("iaf", 3, num_transforms=2, hidden_features=(8,))
        >>> q = FlowDistribution(flow())
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        flow: Any,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        *,
        validate_args: bool | None = None,
    ):
        self.flow = flow
        self.loc, self.scale = loc, scale
        self._last_draw: tuple[Tensor | None, Tensor | None] = (None, None)
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        """Return the distribution with its batch shape expanded: independent draws for each entry."""
        flow = self.flow.expand(torch.Size(batch_shape))
        return _copy_validation(self, FlowDistribution(flow, self.loc, self.scale, validate_args=False))

    @without_autocast()
    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw z, of shape (*sample_shape, *batch_shape, K), differentiable in all parameters."""
        standard, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        z = self.loc + self.scale * standard
        self._last_draw = z, log_prob - self._log_det_scale(standard)
        return z

    @without_autocast()
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at z (*, K)."""
        if self._validate_args:
            self._validate_sample(value)
        draw, log_prob = self._last_draw
        # a density computed under no_grad has no gradient, so it is computed again where one may be wanted
        if value is draw and log_prob is not None and (log_prob.requires_grad or not torch.is_grad_enabled()):
            return log_prob
        standard = (value - self.loc) / self.scale
        return self.flow.log_prob(standard) - self._log_det_scale(standard)

    def _log_det_scale(self, standard: Tensor) -> Tensor:
        """Compute the log determinant of the scaling: a sum over K dimensions, even of a shared scale."""
        scale = torch.as_tensor(self.scale, dtype=standard.dtype, device=standard.device)
        return scale.expand_as(standard).log().sum(-1)


@register_kl(torch.distributions.MultivariateNormal, Independent)
@register_kl(torch.distributions.LowRankMultivariateNormal, Independent)
def multivariate_to_diagonal_normal(
    p: torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal,
    q: "Independent[Any]",
) -> Tensor:
    """Compute the KL divergence of a normal of any covariance to a normal with independent dimensions.

    KL(N(μ, LLᵀ) ‖ N(m, diag s²)) = ½ Σ_k (a_kk² − 1 − log a_kk² + Σ_{j<k} a_kj² + (μ_k − m_k)² / s_k²) with
    a_kj = L_kj / s_k: no two terms cancel. Without it Pyro estimates the KL of a guide with correlated
    dimensions from draws. For a low-rank p it is the cross-entropy Σ_k ½ (log 2πs_k² + (Σ_kk + (μ_k − m_k)²)
    / s_k²) less the entropy, which needs only the diagonal and the determinant of Σ. These two cancel: the
    error is some units of rounding in each dimension, however small the KL.

    Args:
        p: Batch shape (*p), event shape (K,).
        q: An `Independent` of a `Normal`, batch shape (*q), event shape (K,).

    Returns:
        Nats, of the shape that (*p) and (*q) broadcast to.

    Raises:
        NotImplementedError: For another kind of `Independent`, as `register_kl` expects.

    Example:
        >>> p = MultivariateNormal(torch.zeros(5, 2), scale_tril=torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> q = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> multivariate_to_diagonal_normal(p, q)[0]  # (1 + 13 - 2) / 2 - log 2
        tensor(5.3069)
    """
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    loc, scale = q.base_dist.loc, q.base_dist.scale
    if isinstance(p, torch.distributions.LowRankMultivariateNormal):
        log_normaliser = torch.log(scale) + 0.5 * math.log(2 * math.pi)
        cross_entropy = log_normaliser + (p.variance + (p.mean - loc) ** 2) / (2 * scale**2)
        return cross_entropy.sum(-1) - p.entropy()
    factor = p._unbroadcasted_scale_tril
    below = (factor.tril(-1) / scale.unsqueeze(-1)).square().sum(-1)
    own = factor.diagonal(dim1=-2, dim2=-1)
    excess = ((own - scale) / scale) * ((own + scale) / scale)  # a² − 1, exact where a is near 1
    spread = _excess_over_log(excess, 2 * torch.log(own / scale))
    return 0.5 * (spread + below + ((p.loc - loc) / scale).square()).sum(-1)


def _excess_over_log(w: Tensor, log1p_w: Tensor) -> Tensor:
    """Compute w − log(1 + w), by its power series where the difference would cancel."""
    is_near = w.abs() < 0.03
    near = torch.where(is_near, w, 0.0)
    series = torch.zeros_like(near)
    for power in range(11, 1, -1):  # Σ (−w)ᵏ / k for k ≥ 2
        series = 1 / power - near * series
    return torch.where(is_near, near**2 * series, w - log1p_w)
