"""Elements given what was observed of them: p(y_d|z) and p(x_d|y_d, z), in closed form.

The elements of x are independent given z, and a corruption acts on each alone, but for the last one below.
So log p(y|z) is a sum over elements of log ∫ p(x_d|z) p(y_d|x_d) dx_d, and the clean elements are drawn one
by one:

| observed | likelihood | p(y_d|z) |
|---|---|---|
| exactly | any | p(x_d|z) at y_d |
| not at all | any | 1 |
| with normal noise | Normal | N(y; m, s² + σ²) |
| rounded | Normal | Φ((y + Δ/2 − m)/s) − Φ((y − Δ/2 − m)/s) |
| through any corruption | finitely many values | Σ_v p(v|z) p(y_d|v) |
| through A x + σ ε | Normal | N(y; A m, A diag(s²) Aᵀ + σ² I), not per element |

Shapes: z (*, n, K); y, missing (n, *event_shape), or (n, M) through A (M, D); all results
(*, n, *event_shape), but log p(y|z) through A is (*, n, 1).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal as TorchNormal

from pyro_vae.applications.corruptions import CorruptionError, LinearMap, Normal, Quantise
from pyro_vae.distributions import DiscretizedLogistic

__all__ = ["Conditional", "condition"]


class Conditional(ABC):
    """Elements of x given z and y.

    Args:
        base: p(x_d|z), of batch shape (*, n, *event_shape).
        y: Observations (n, *event_shape), any finite value where missing.
        missing: True where nothing was observed, (n, *event_shape).
    """

    def __init__(self, base: Any, y: Tensor, missing: Tensor):
        self.base, self.y, self.missing = base, y, missing

    def log_prob(self) -> Tensor:
        """Return log p(y_d|z), 0 where missing."""
        return torch.where(self.missing, 0.0, self.observed_log_prob())

    @abstractmethod
    def observed_log_prob(self) -> Tensor:
        """Return log p(y_d|z); any value where missing."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of p(x_d|y_d, z); without formulas, a draw and 0.

        A draw has the same expectation of x and x², so that sums over many z have the right limit.
        """

    @abstractmethod
    def sample(self) -> Tensor:
        """Draw from p(x_d|y_d, z)."""


def condition(base: Any, y: Tensor, missing: Tensor, corruption: Any, *, event_dim: int = 1) -> Conditional:
    """Return the elements given y; `corruption` None means observed exactly.

    `event_dim`, the number of dimensions of an example, matters for linear maps alone.

    Raises:
        CorruptionError: If likelihood and corruption have no closed form together.
    """
    if corruption is None:
        return _Exact(base, y, missing)
    if isinstance(base, TorchNormal) and isinstance(corruption, Normal):
        return _NoisyNormal(base, y, missing, corruption.scale)
    if isinstance(base, TorchNormal) and isinstance(corruption, Quantise):
        return _RoundedNormal(base, y, missing, corruption.step)
    if isinstance(base, TorchNormal) and isinstance(corruption, LinearMap):
        return _MappedNormal(base, y, missing, corruption, event_dim)
    levels = None if isinstance(corruption, LinearMap) else _levels(base)
    if levels is None:
        raise CorruptionError(
            f"{type(corruption).__name__} has no closed form with a likelihood of {type(base).__name__} "
            "elements: train a likelihood of finitely many values (Bernoulli, DiscretizedLogistic, "
            "BetaBinomial), or, for normal noise, rounding and linear maps, a Normal one"
        )
    if isinstance(base, DiscretizedLogistic):
        fast = _GreyLevels(base, y, missing, corruption, levels)
        if fast.is_accurate:
            return fast
    return _Levels(base, y, missing, corruption, levels)


def _levels(base: Any) -> Tensor | None:
    """Return the values that elements can have, if there are finitely many, or None."""
    if isinstance(base, DiscretizedLogistic):
        return torch.arange(base.levels, dtype=base.loc.dtype, device=base.loc.device) / (base.levels - 1)
    if getattr(base, "has_enumerate_support", False):
        return base.enumerate_support(expand=False).flatten()
    return None


class _Exact(Conditional):
    """Elements observed as they are, or not at all."""

    def observed_log_prob(self) -> Tensor:
        return self.base.log_prob(self.y)

    def moments(self) -> tuple[Tensor, Tensor]:
        try:
            variance = torch.where(self.missing, self.base.variance, 0.0)
        except NotImplementedError:
            draw = self.sample()
            return draw, torch.zeros_like(draw)
        return torch.where(self.missing, self.base.mean, self.y), variance

    def sample(self) -> Tensor:
        return torch.where(self.missing, self.base.sample(), self.y)


class _NoisyNormal(Conditional):
    """Normal elements seen through normal noise."""

    def __init__(self, base: Any, y: Tensor, missing: Tensor, scale: float):
        super().__init__(base, y, missing)
        self.noise = scale

    def observed_log_prob(self) -> Tensor:
        total = (self.base.variance + self.noise**2).sqrt()
        return TorchNormal(self.base.loc, total, validate_args=False).log_prob(self.y)

    def moments(self) -> tuple[Tensor, Tensor]:
        share = self.base.variance / (self.base.variance + self.noise**2)  # of the observation in the mean
        share = torch.where(self.missing, 0.0, share)
        return self.base.loc + share * (self.y - self.base.loc), (1 - share) * self.base.variance

    def sample(self) -> Tensor:
        mean, variance = self.moments()
        return mean + variance.sqrt() * torch.randn_like(mean)


class _MappedNormal(Conditional):
    """Normal elements seen through y = A x + σ ε; rows of A where y is missing play no part.

    With C = A diag(s²) Aᵀ + σ² I = L Lᵀ: x|y has mean m + diag(s²) Aᵀ C⁻¹ (y − A m).
    """

    def __init__(self, base: Any, y: Tensor, missing: Tensor, corruption: LinearMap, event_dim: int):
        super().__init__(base, y, missing)
        self.noise = corruption.scale
        self.matrix = torch.where(missing[..., None], 0.0, corruption.matrix.to(y)).double()  # (n, M, D)
        self.first = base.loc.dim() - event_dim  # dimension of the event
        spread = self.matrix * base.variance.double().flatten(self.first)[..., None, :]
        diagonal = (self.noise**2 + (1 - self.noise**2) * missing.to(self.matrix)).diag_embed()
        self.scale_tril = torch.linalg.cholesky(spread @ self.matrix.mT + diagonal)
        self.gain = torch.linalg.solve_triangular(self.scale_tril, spread, upper=False)  # L⁻¹ A diag(s²)

    def _white_residual(self, x: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Return L⁻¹ (y − A x − noise), (*, n, M), 0 where y is missing."""
        mapped = (self.matrix @ x.double().flatten(self.first)[..., None])[..., 0]
        residual = torch.where(self.missing, 0.0, self.y - mapped - noise)
        return torch.linalg.solve_triangular(self.scale_tril, residual[..., None], upper=False)[..., 0]

    def _updated(self, x: Tensor, white: Tensor) -> Tensor:
        return x + (self.gain.mT @ white[..., None]).reshape(x.shape).to(x)

    def log_prob(self) -> Tensor:
        """Return log p(y|z) of what was observed, (*, n, 1)."""
        return self.observed_log_prob()

    def observed_log_prob(self) -> Tensor:
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * math.log(2 * math.pi) * (~self.missing).to(self.matrix).sum(-1)
        square = self._white_residual(self.base.loc).square().sum(-1)
        return (-0.5 * square - log_volume - constant)[..., None].to(self.y)

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self._updated(self.base.loc, self._white_residual(self.base.loc))
        explained = self.gain.square().sum(-2).reshape(mean.shape)
        return mean, (self.base.variance - explained).clamp(min=0.0).to(mean)

    def sample(self) -> Tensor:
        """Draw x and y from the model, and move x by what y lacks."""
        x = self.base.sample()
        noise = self.noise * torch.randn(*x.shape[: self.first], self.y.shape[-1]).to(self.matrix)
        return self._updated(x, self._white_residual(x, noise))


class _RoundedNormal(Conditional):
    """Normal elements known to lie within half a step of y."""

    def __init__(self, base: Any, y: Tensor, missing: Tensor, step: float):
        super().__init__(base, y, missing)
        low, high = ((y + side * step / 2 - base.loc) / base.scale for side in (-1, 1))
        # mirrored, so that the interval lies to the left of 0, or around it: there Φ does not cancel
        self.sign = torch.where(low + high > 0, -1.0, 1.0)
        self.low, self.high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)
        self.log_high = torch.special.log_ndtr(self.high)
        self.log_ratio = torch.special.log_ndtr(self.low) - self.log_high  # log Φ(low) / Φ(high) ≤ 0
        self.log_mass = self.log_high + torch.log(-torch.expm1(self.log_ratio))

    def observed_log_prob(self) -> Tensor:
        return self.log_mass

    def moments(self) -> tuple[Tensor, Tensor]:
        density_low, density_high = (
            (-0.5 * edge.square() - 0.5 * math.log(2 * math.pi) - self.log_mass).exp()
            for edge in (self.low, self.high)
        )
        mean = (density_low - density_high).clamp(self.low, self.high)
        variance = 1 + self.low * density_low - self.high * density_high - mean.square()
        variance = variance.clamp(min=0.0).minimum((self.high - self.low).square() / 4)
        x = self.base.loc + self.sign * self.base.scale * mean
        return (
            torch.where(self.missing, self.base.loc, x),
            torch.where(self.missing, self.base.variance, self.base.variance * variance),
        )

    def sample(self) -> Tensor:
        u = torch.rand_like(self.low)
        log_cdf = self.log_high + torch.log(u + (1 - u) * self.log_ratio.exp())
        standard = _inverse_log_ndtr(log_cdf).clamp(self.low, self.high)
        x = self.base.loc + self.sign * self.base.scale * standard
        return torch.where(self.missing, self.base.sample(), x)


def _inverse_log_ndtr(log_cdf: Tensor) -> Tensor:
    """Return t with log Φ(t) = `log_cdf`: a guess from the tail, then Newton steps."""
    direct = torch.special.ndtri(log_cdf.exp().clamp(1e-30, 1 - 1e-7))
    t = torch.where(log_cdf > -20, direct, -(-2 * log_cdf).sqrt())
    for _ in range(4):
        log_density = -0.5 * t.square() - 0.5 * math.log(2 * math.pi)
        value = torch.special.log_ndtr(t)
        t = t - (value - log_cdf) * (value - log_density).exp()
    return t


class _Levels(Conditional):
    """Elements of finitely many values, seen through any corruption; memory holds one value at a time."""

    def __init__(self, base: Any, y: Tensor, missing: Tensor, corruption: Any, levels: Tensor):
        super().__init__(base, y, missing)
        self.corruption, self.levels = corruption, levels

    def _joint(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each value v with log p(v|z) + log p(y_d|v), without the second where y is missing."""
        for value in self.levels:
            noise = self.corruption(value.expand(self.y.shape)).log_prob(self.y)
            yield value, self.base.log_prob(value) + torch.where(self.missing, 0.0, noise)

    def observed_log_prob(self) -> Tensor:
        total: Tensor | None = None
        for _, log_joint in self._joint():
            total = log_joint if total is None else torch.logaddexp(total, log_joint)
        assert total is not None
        return total

    def moments(self) -> tuple[Tensor, Tensor]:
        total = self.observed_log_prob()
        mean, square = torch.zeros_like(total), torch.zeros_like(total)
        for value, log_joint in self._joint():
            share = (log_joint - total).exp()
            mean += share * value
            square += share * value.square()
        return mean, (square - mean.square()).clamp(min=0.0)

    def sample(self) -> Tensor:
        """Draw by the largest of log-probabilities with Gumbel noise, one value at a time."""
        best: Tensor | None = None
        chosen = torch.zeros(())
        for value, log_joint in self._joint():
            key = log_joint - torch.log(torch.empty_like(log_joint).exponential_())
            chosen = value.expand(key.shape) if best is None else torch.where(key > best, value, chosen)
            best = key if best is None else torch.maximum(best, key)
        return chosen


class _GreyLevels(_Levels):
    """Grey levels of a discretised logistic, by differences of its distribution function in float64.

    A function value per level instead of six. Differences cancel where p(v|z) is below 1e-16, so it is for
    corruptions that allow every level to within a factor of 1e-8, such as normal noise of 0.2 and more.
    """

    def __init__(self, base: Any, y: Tensor, missing: Tensor, corruption: Any, levels: Tensor):
        super().__init__(base, y, missing, corruption, levels)
        self.largest = smallest = self._noise(levels[0])
        for value in levels[1:]:
            noise = self._noise(value)
            self.largest, smallest = torch.maximum(self.largest, noise), torch.minimum(smallest, noise)
        self.is_accurate = bool((smallest - self.largest > math.log(1e-8)).all())
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def _noise(self, value: Tensor) -> Tensor:
        log_noise = self.corruption(value.expand(self.y.shape)).log_prob(self.y)
        return torch.where(self.missing, 0.0, log_noise)

    def _shares(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each value v with p(v|z) p(y_d|v), divided by the largest p(y_d|v)."""
        loc, scale = self.base.loc.double(), self.base.scale.double()
        below = torch.zeros_like(loc)
        for index, value in enumerate(self.levels):
            edge = (index + 0.5) / (len(self.levels) - 1)
            up_to = (
                torch.sigmoid((edge - loc) / scale) if index + 1 < len(self.levels) else torch.ones_like(loc)
            )
            yield value, (up_to - below) * (self._noise(value) - self.largest).exp()
            below = up_to

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of the shares, and of them times v and v²."""
        if self._known is None:
            total, first, second = (torch.zeros_like(self.base.loc, dtype=torch.float64) for _ in range(3))
            for value, share in self._shares():
                total += share
                first += share * value
                second += share * value.square()
            self._known = total, first, second
        return self._known

    def observed_log_prob(self) -> Tensor:
        return (self._sums()[0].log() + self.largest).to(self.y)

    def moments(self) -> tuple[Tensor, Tensor]:
        total, first, second = self._sums()
        mean = first / total
        return mean.to(self.y), (second / total - mean.square()).clamp(min=0.0).to(self.y)

    def sample(self) -> Tensor:
        """Draw by the inverse of the distribution function."""
        total = self._sums()[0]
        bar, reached, index = torch.rand_like(total) * total, torch.zeros_like(total), torch.zeros_like(total)
        for _, share in self._shares():
            reached += share
            index += reached < bar
        return self.levels[index.long().clamp(max=len(self.levels) - 1)]
