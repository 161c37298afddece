"""Probabilities as integers that sum to 2²⁴, from network outputs in exact arithmetic.

Every symbol has a count of at least 1, so that every symbol can be coded. Tables hold the excess, count − 1,
of each of L symbols: integers ≥ 0 that sum to 2²⁴ − L. Locations and logits are in units of 2⁻¹², scales of
2⁻²⁰, logarithms of 2⁻³⁰.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pyro_vae.applications.codec.exact_networks import UNIT
from pyro_vae.applications.codec.fixed_point import (
    Integers,
    exp_negative,
    interpolate,
    log,
    log_by_table,
    logistic_cdf_table,
    normal_cdf_table,
    sigmoid,
    softplus,
)

__all__ = [
    "TOTAL",
    "BernoulliTables",
    "BetaBinomialTables",
    "CountTables",
    "Lattice",
    "LogisticTables",
    "Tables",
    "counts_at",
    "excess_of_weights",
    "log_of_counts",
    "positive_scale",
]

TOTAL = 1 << 24
_LARGEST = 1 << 20  # of |location| in units of 2⁻¹², 256 in the units of z or x
_TABLE_END = 18
_RAW_ONE = 2217  # log(e − 1), at which positive_scale is 1, in units of 2⁻¹²


def counts_at(excess: Integers, symbols: Integers) -> Integers:
    """Return the counts of symbols (*,) in tables of excess counts (*, L)."""
    return np.take_along_axis(excess, symbols[..., None].astype(np.int64), -1)[..., 0] + 1


def log_of_counts(counts: Integers) -> Integers:
    """Return log(count / 2²⁴), in units of 2⁻³⁰ nats."""
    return log(counts << 6)


def excess_of_weights(weights: Integers) -> Integers:
    """Return excess counts (*, L) in proportion to weights (*, L) in [0, 2³⁰]; the largest takes the rest.

    Example:
        >>> from pyro_vae.applications.codec.fixed_point import ONE
        >>> excess_of_weights(np.array([ONE, ONE, 2 * ONE])) / TOTAL
        array([0.24999994, 0.24999994, 0.49999994])
    """
    share = TOTAL - weights.shape[-1]
    excess = weights * share // weights.sum(-1, keepdims=True)
    remainder = share - excess.sum(-1, keepdims=True)
    top = excess.argmax(-1)[..., None]
    np.put_along_axis(excess, top, np.take_along_axis(excess, top, -1) + remainder, -1)
    return excess


def positive_scale(raw: Integers) -> Integers:
    """Return log(1 + e^raw) + 10⁻⁶ in units of 2⁻²⁰, as `networks.positive`.

    Example:
        >>> positive_scale(np.array([0, 40 * UNIT])) / 2**20
        array([ 0.69314766, 40.00000095])
    """
    end = _TABLE_END * UNIT
    inside = _positive_table()[np.clip(raw, -end, end) + end]
    return np.where(raw > end, np.minimum(raw, 1 << 30) << 8, inside) + 1


@cache
def _positive_table() -> Integers:
    return softplus(np.arange(-_TABLE_END * UNIT, _TABLE_END * UNIT + 1, dtype=np.int64) << 18) >> 10


def _excess_of_cdf(table: Integers, edges: Integers, loc: Integers, scale: Integers) -> Integers:
    """Return excess counts (*, L) of the L bins between edges (L − 1,), in units of 2⁻²⁰, for loc (*,)."""
    distance = edges - (np.clip(loc, -_LARGEST, _LARGEST) << 8)[..., None]
    below = interpolate(table, (distance << 20) // np.minimum(scale, 1 << 40)[..., None])
    share = TOTAL - len(edges) - 1
    ends = np.zeros((*loc.shape, 1), np.int64)
    return np.diff(below * share >> 30, prepend=ends, append=ends + share)


@dataclass(frozen=True)
class Lattice:
    """Grid of 2^bits points on [−support, support], the values that a latent dimension takes in a file.

    The first and last bins reach to infinity, so that a posterior outside the lattice is coded at its ends.

    Example:
        >>> lattice = Lattice(8, 6.0)
        >>> int(lattice.points[0]), int(lattice.points[-1])  # in units of 2⁻¹²
        (-24480, 24480)
    """

    bits: int
    support: float

    @property
    def points(self) -> Integers:
        """Middles of the bins, (2^bits,), in units of 2⁻¹²."""
        radius, size = round(self.support * UNIT), 1 << self.bits
        return (radius * (2 * np.arange(size, dtype=np.int64) + 1 - size)) // size

    def excess(self, loc: Integers, scale: Integers) -> Integers:
        """Return excess counts (*, 2^bits) of normals with loc (*,) and scale (*,)."""
        radius, size = round(self.support * UNIT) << 8, 1 << self.bits
        edges = (radius * (2 * np.arange(1, size, dtype=np.int64) - size)) // size
        return _excess_of_cdf(normal_cdf_table(), edges, loc, scale)


class Tables(ABC):
    """Tables of p(x|z) for a likelihood: symbols 0 … levels − 1 for each element of x.

    `of` returns what `codec_coder.Stack` codes with: counts of the symbol 0, (*,), for two symbols, and
    excess counts, (*, levels), for more.
    """

    num_parameters: int
    levels: int
    input_unit: int = UNIT  # 1/input_unit is the unit of x as the input of a guide

    @abstractmethod
    def of(self, outputs: Integers) -> Integers:
        """Return the tables for network outputs (N, num_parameters, D)."""

    def log_probability(self, tables: Integers, symbols: Integers) -> Integers:
        """Return Σ_d log p(x_d), (N,), for symbols (N, D), in units of 2⁻³⁰ nats."""
        return log_of_counts(counts_at(tables, symbols)).sum(-1)

    def largest_value(self) -> int:
        """Return the largest value of x in units of 1/input_unit."""
        return self.input_unit * (self.levels - 1)

    def values(self, symbols: Integers) -> Integers:
        """Return x in units of 1/input_unit, the input of a guide."""
        return symbols.astype(np.int64) * self.input_unit

    def to_plain(self) -> dict[str, Any]:
        """Return what rebuilds the tables, as plain values."""
        return {}


class BernoulliTables(Tables):
    """Bernoulli: the count of 0 is 2²⁴ σ(−η) for a logit η."""

    num_parameters = 1
    levels = 2

    def of(self, outputs: Integers) -> Integers:
        """Return the counts of 0, (N, D)."""
        end = _TABLE_END * UNIT
        return _zero_counts()[np.clip(outputs[:, 0], -end, end) + end]

    def log_probability(self, tables: Integers, symbols: Integers) -> Integers:
        """Return Σ_d log p(x_d), (N,), for symbols (N, D), in units of 2⁻³⁰ nats."""
        return log_of_counts(np.where(symbols == 0, tables, TOTAL - tables)).sum(-1)


@cache
def _zero_counts() -> Integers:
    logits = np.arange(-_TABLE_END * UNIT, _TABLE_END * UNIT + 1, dtype=np.int64) << 18
    return np.clip(sigmoid(-logits) >> 6, 1, TOTAL - 1)


class LogisticTables(Tables):
    """Discretised logistic with location f + ½ and scale positive(s − 2), as in `likelihoods`."""

    num_parameters = 2
    levels = 256

    def of(self, outputs: Integers) -> Integers:
        """Return excess counts (N, D, 256)."""
        edges = ((2 * np.arange(1, 256, dtype=np.int64) - 1) << 19) // 255
        scale = positive_scale(outputs[:, 1] - 2 * UNIT)
        return _excess_of_cdf(logistic_cdf_table(), edges, outputs[:, 0] + UNIT // 2, scale)

    def largest_value(self) -> int:
        """Return the largest value of x, 1."""
        return UNIT

    def values(self, symbols: Integers) -> Integers:
        """Return k / 255, rounded to units of 2⁻¹²."""
        return (symbols.astype(np.int64) * 2 * UNIT + 255) // 510


class CountTables(Tables):
    """Poisson, or negative binomial with dispersions r (D,), on counts 0 … levels − 1, normalised there.

    p(k) ∝ exp(a_k + k c), with a_k = −log k! and c = log λ for the Poisson, and a_k = Σ_{i<k} log((r + i)/(i
    + 1)) and c = log(m/(r + m)) for the negative binomial.

    Args:
        levels: Number of counts.
        dispersion: r (D,) in units of 2⁻²⁰, or None for the Poisson.
    """

    num_parameters = 1

    def __init__(self, levels: int, dispersion: Integers | None = None):
        self.levels = levels
        self.dispersion = dispersion
        steps = np.arange(levels - 1, dtype=np.int64)
        increments = -log((steps + 1) << 30)
        if dispersion is not None:
            increments = increments + log((dispersion[:, None] << 10) + (steps << 30))
        self.base = np.insert(np.cumsum(increments, -1), 0, 0, axis=-1)  # (levels,) or (D, levels)

    def of(self, outputs: Integers) -> Integers:
        """Return excess counts (N, D, levels)."""
        mean = np.minimum(positive_scale(outputs[:, 0]), 1 << 40) << 10
        slope = log(mean)
        if self.dispersion is not None:
            slope = slope - log(mean + (self.dispersion << 10))
        logs = self.base + slope[..., None] * np.arange(self.levels, dtype=np.int64)
        return excess_of_weights(exp_negative(logs.max(-1, keepdims=True) - logs))

    def to_plain(self) -> dict[str, Any]:
        """Return what rebuilds the tables, as plain values."""
        dispersion = None if self.dispersion is None else self.dispersion.tolist()
        return {"levels": self.levels, "dispersion": dispersion}


class BetaBinomialTables(Tables):
    """Beta-binomial on counts 0 … n = levels − 1, with α, β = positive(f + log(e − 1)), as in `likelihoods`.

    p(k) ∝ exp(a_k), with a_k = Σ_{i<k} log((n − i)/(i + 1)) + log(α + i) − log(β + n − 1 − i): sums of
    logarithms of integers, in place of differences of log Γ.

    Args:
        levels: Number of counts.
    """

    num_parameters = 2
    input_unit = 1  # whole numbers up to n, which need fine weights

    def __init__(self, levels: int):
        self.levels = levels
        self._steps = np.arange(levels - 1, dtype=np.int64)
        self._choices = log((levels - 1 - self._steps) << 30) - log((self._steps + 1) << 30)

    def of(self, outputs: Integers) -> Integers:
        """Return excess counts (N, D, levels)."""
        parameters = np.minimum(positive_scale(outputs + _RAW_ONE), 1 << 40) << 10
        alpha, beta = parameters[:, 0, :, None], parameters[:, 1, :, None]
        steps = self._steps << 30
        increments = self._choices + log_by_table(alpha + steps) - log_by_table(beta + steps[::-1])
        logs = np.zeros((*alpha.shape[:2], self.levels), np.int64)
        np.cumsum(increments, -1, out=logs[..., 1:])
        return excess_of_weights(exp_negative(logs.max(-1, keepdims=True) - logs))

    def to_plain(self) -> dict[str, Any]:
        """Return what rebuilds the tables, as plain values."""
        return {"levels": self.levels}
