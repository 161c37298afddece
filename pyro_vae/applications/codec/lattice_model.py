"""The base of a codec's models: a lattice of latent vectors, and integer tables of the densities on it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pyro_vae import likelihoods, priors
from pyro_vae.applications.codec.errors import UnsupportedModelError
from pyro_vae.applications.codec.exact_networks import UNIT
from pyro_vae.applications.codec.fixed_point import Integers
from pyro_vae.applications.codec.integer_probabilities import (
    BernoulliTables,
    BetaBinomialTables,
    CountTables,
    Lattice,
    LogisticTables,
    Tables,
)
from pyro_vae.networks import positive

__all__ = [
    "LARGEST_Z",
    "LatticeModel",
    "prior_units",
    "symbol_type",
    "tables_of",
    "unsupported_part",
]

LARGEST_Z = 1 << 24  # 4096 in units of 2⁻¹², larger than any latent of a learned prior


@dataclass(frozen=True)
class LatticeModel(ABC):
    """A VAE whose densities are integers that sum to 2²⁴; a subclass has the networks.

    Latent vectors are coordinates u of the prior, z = m + s u with p(u) = N(0, I), on a lattice.

    Args:
        event_shape: Shape of one example.
        latent_dim: K.
        tables: Tables of p(x|z).
        prior: m and s of each latent dimension, int64 (2, K) in units of 2⁻¹².
        lattice: Values of u.
    """

    event_shape: tuple[int, ...]
    latent_dim: int
    tables: Tables
    prior: Integers
    lattice: Lattice

    is_exact: ClassVar[bool] = True  # whether networks, too, are the same to the bit on every machine

    @abstractmethod
    def posterior(self, symbols: np.ndarray) -> tuple[Integers, Integers]:
        """Return location and scale of q(z|x), (N, K) each, in units of 2⁻¹² and 2⁻²⁰, for symbols (N, D)."""

    @abstractmethod
    def outputs(self, z: Integers) -> Integers:
        """Return the outputs of p(x|z)'s network, (N, num_parameters, D), for z (N, K), in units of 2⁻¹²."""

    @property
    @abstractmethod
    def digests(self) -> dict[str, str]:
        """What identifies the model: digests of structure, weights and settings, and what else it needs."""

    @property
    def size(self) -> int:
        """Number D of elements of one example."""
        return math.prod(self.event_shape)

    @cached_property
    def prior_tables(self) -> Integers:
        """Excess counts (K, L) of p(u), the same for each latent dimension."""
        table = self.lattice.excess(np.zeros(1, np.int64), np.full(1, 1 << 20, np.int64))
        return np.repeat(table, self.latent_dim, 0)

    def posterior_tables(self, symbols: np.ndarray) -> Integers:
        """Return excess counts (N, K, L) of q(u|x) for symbols (N, D)."""
        loc, scale = self.posterior(symbols)
        shift, unit = self.prior
        loc = np.clip(loc - shift, -(1 << 40), 1 << 40) * UNIT // unit
        return self.lattice.excess(loc, np.maximum(scale * UNIT // unit, 1))

    def latent_vectors(self, latents: np.ndarray) -> Integers:
        """Return z (N, K) at lattice positions (N, K), in units of 2⁻¹²."""
        shift, unit = self.prior
        return shift + ((unit * self.lattice.points[latents] + UNIT // 2) >> 12)

    def likelihood_tables(self, latents: np.ndarray) -> Integers:
        """Return tables of p(x|u), (N, D) counts of 0 or (N, D, levels) excess, for positions (N, K)."""
        return self.tables.of(self.outputs(self.latent_vectors(latents)))


def tables_of(likelihood: Any, max_count: int) -> Tables:
    """Return the tables of a likelihood of discrete data.

    Raises:
        UnsupportedModelError: If it is of another class, or its numbers are out of range.
    """
    if type(likelihood) not in _LIKELIHOODS:
        raise unsupported_part(
            "likelihood",
            likelihood,
            "likelihoods.Bernoulli, DiscretizedLogistic, BetaBinomial, Poisson or NegativeBinomial, "
            "which give each value of x a probability",
        )
    return _LIKELIHOODS[type(likelihood)](likelihood, max_count)


def symbol_type(levels: int) -> np.dtype:
    """Return the smallest unsigned integer type for symbols 0 … levels − 1, little-endian.

    Example:
        >>> symbol_type(256), symbol_type(257)
        (dtype('uint8'), dtype('uint16'))
    """
    return np.dtype("u1" if levels <= 256 else "<u2")


def prior_units(prior: Any) -> Integers:
    """Return m and s of a normal prior, int64 (2, K) in units of 2⁻¹².

    Raises:
        UnsupportedModelError: If the prior is of another class, or its numbers are not finite.
    """
    if type(prior) is priors.StandardNormal:
        zeros = np.zeros(prior.latent_dim, np.int64)
        return np.stack([zeros, zeros + UNIT])
    if type(prior) is not priors.LearnedNormal:
        raise unsupported_part("prior", prior, "priors.StandardNormal or LearnedNormal")
    with torch.no_grad():
        parts = torch.stack([prior.loc, positive(prior.raw_scale)]).double().cpu().numpy()
    if not (np.abs(parts) < LARGEST_Z / UNIT).all():
        raise UnsupportedModelError("the prior has a location or scale that is not finite, or beyond 4096")
    units = np.rint(parts * UNIT).astype(np.int64)
    return np.stack([units[0], np.maximum(units[1], 1)])


def unsupported_part(name: str, part: Any, expected: str) -> UnsupportedModelError:
    """Return an error that names a part of a VAE and what was expected of it."""
    return UnsupportedModelError(f"the {name} must be {expected}; got {type(part).__name__}")


def _negative_binomial(likelihood: Any, max_count: int) -> Tables:
    with torch.no_grad():
        dispersion = positive(likelihood.raw_dispersion).double().cpu().numpy().flatten()
    if not (dispersion < 2.0**20).all():
        raise UnsupportedModelError("the dispersion must be finite and below 2²⁰")
    return CountTables(max_count + 1, np.maximum(np.rint(dispersion * 2**20), 1).astype(np.int64))


def _beta_binomial(likelihood: Any, _: int) -> Tables:
    if likelihood.total_count >= 2**16:
        raise UnsupportedModelError(f"total_count must be below 65,536; got {likelihood.total_count}")
    return BetaBinomialTables(likelihood.total_count + 1)


_LIKELIHOODS: dict[type[nn.Module], Callable[[Any, int], Tables]] = {
    likelihoods.Bernoulli: lambda *_: BernoulliTables(),
    likelihoods.DiscretizedLogistic: lambda *_: LogisticTables(),
    likelihoods.BetaBinomial: _beta_binomial,
    likelihoods.Poisson: lambda _, max_count: CountTables(max_count + 1),
    likelihoods.NegativeBinomial: _negative_binomial,
}
