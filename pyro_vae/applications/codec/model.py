"""The model that a codec runs: exact networks, integer tables, and a lattice of latent vectors."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_vae import guides, likelihoods, priors
from pyro_vae.applications.codec.errors import UnsupportedModelError
from pyro_vae.applications.codec.exact_networks import UNIT, ExactNetwork, convert
from pyro_vae.applications.codec.fixed_point import Integers, logistic_cdf_table, normal_cdf_table
from pyro_vae.applications.codec.integer_probabilities import (
    BernoulliTables,
    BetaBinomialTables,
    CountTables,
    Lattice,
    LogisticTables,
    Tables,
    positive_scale,
)
from pyro_vae.networks import positive
from pyro_vae.vae import VAE

__all__ = ["CodecModel", "symbol_type"]

_LARGEST_Z = 1 << 24  # 4096 in units of 2⁻¹², larger than any latent of a learned prior


@dataclass(frozen=True)
class CodecModel:
    """A VAE as integers: all that compression and decompression compute with.

    Latent vectors are coordinates u of the prior, z = m + s u with p(u) = N(0, I), on a lattice.

    Args:
        event_shape: Shape of one example.
        latent_dim: K.
        guide: From x (N, *event_shape) to 2K numbers.
        likelihood: From z (N, K) to `tables.num_parameters` numbers per element of x.
        tables: Tables of p(x|z).
        prior: m and s of each latent dimension, int64 (2, K) in units of 2⁻¹².
        lattice: Values of u.
    """

    event_shape: tuple[int, ...]
    latent_dim: int
    guide: ExactNetwork
    likelihood: ExactNetwork
    tables: Tables
    prior: Integers
    lattice: Lattice

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
        x = self.tables.values(symbols).reshape(len(symbols), *self.event_shape)
        raw = self.guide(x)
        loc, scale = raw[:, : self.latent_dim], positive_scale(raw[:, self.latent_dim :])
        shift, unit = self.prior
        loc = np.clip(loc - shift, -(1 << 40), 1 << 40) * UNIT // unit
        return self.lattice.excess(loc, np.maximum(scale * UNIT // unit, 1))

    def likelihood_tables(self, latents: np.ndarray) -> Integers:
        """Return tables of p(x|u), (N, D) counts of 0 or (N, D, levels) excess, for positions (N, K)."""
        shift, unit = self.prior
        z = shift + ((unit * self.lattice.points[latents] + UNIT // 2) >> 12)
        outputs = self.likelihood(z).reshape(len(latents), self.tables.num_parameters, self.size)
        return self.tables.of(outputs)

    def to_plain(self) -> dict[str, Any]:
        """Return the model as nested plain values and tensors, for a file."""
        return {
            "event_shape": list(self.event_shape),
            "latent_dim": self.latent_dim,
            "guide": self.guide.to_plain(),
            "likelihood": self.likelihood.to_plain(),
            "family": _name_of(self.tables),
            "tables": self.tables.to_plain(),
            "prior": torch.from_numpy(self.prior),
            "lattice": [self.lattice.bits, float(self.lattice.support)],
        }

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "CodecModel":
        """Return the model described by `to_plain`."""
        settings = dict(content["tables"])
        if settings.get("dispersion") is not None:
            settings["dispersion"] = np.array(settings["dispersion"], np.int64)
        lattice = Lattice(int(content["lattice"][0]), float(content["lattice"][1]))
        prior = content["prior"].numpy()
        tables = _TABLES[content["family"]](**settings)
        return cls(
            event_shape=tuple(content["event_shape"]),
            latent_dim=int(content["latent_dim"]),
            guide=ExactNetwork.from_plain(content["guide"], tables.largest_value()),
            likelihood=ExactNetwork.from_plain(content["likelihood"], _largest_z(prior, lattice)),
            tables=tables,
            prior=prior,
            lattice=lattice,
        )

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests, 12 hexadecimal digits each: of the structure, the weights, the lattice with its tables."""
        content = self.to_plain()
        weights, settings = hashlib.sha256(), hashlib.sha256()

        def structure(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                weights.update(np.ascontiguousarray(value.numpy(), "<i8").tobytes())
                return list(value.shape)
            if isinstance(value, dict):
                return {key: structure(item) for key, item in value.items()}
            return [structure(item) for item in value] if isinstance(value, list | tuple) else value

        settings.update(json.dumps(content.pop("lattice")).encode())
        for table in (normal_cdf_table(), logistic_cdf_table(), self.prior_tables):
            settings.update(np.ascontiguousarray(table, "<i8").tobytes())
        described = json.dumps(structure(content), sort_keys=True).encode()
        digests = {"structure": hashlib.sha256(described), "weights": weights, "settings": settings}
        return {name: digest.hexdigest()[:12] for name, digest in digests.items()}

    @classmethod
    def from_vae(cls, vae: VAE, lattice: Lattice, max_count: int) -> "CodecModel":
        """Convert a VAE with a `DiagonalNormal` guide, a normal prior and a discrete likelihood.

        Raises:
            UnsupportedModelError: If a part of the VAE is of another class, or its network has no exact form.
        """
        likelihood: Any = vae.likelihood
        guide: Any = vae.posterior
        if type(guide) is not guides.DiagonalNormal:
            raise _unsupported("guide", guide, "guides.DiagonalNormal")
        if type(likelihood) not in _LIKELIHOODS:
            raise _unsupported(
                "likelihood",
                likelihood,
                "likelihoods.Bernoulli, DiscretizedLogistic, BetaBinomial, Poisson or NegativeBinomial, "
                "which give each value of x a probability",
            )
        tables = _LIKELIHOODS[type(likelihood)](likelihood, max_count)
        prior = _prior_units(vae.prior)
        return cls(
            event_shape=likelihood.event_shape,
            latent_dim=likelihood.latent_dim,
            guide=convert(guide.network, tables.largest_value()),
            likelihood=convert(likelihood.network, _largest_z(prior, lattice)),
            tables=tables,
            prior=prior,
            lattice=lattice,
        )


def symbol_type(levels: int) -> np.dtype:
    """Return the smallest unsigned integer type for symbols 0 … levels − 1, little-endian.

    Example:
        >>> symbol_type(256), symbol_type(257)
        (dtype('uint8'), dtype('uint16'))
    """
    return np.dtype("u1" if levels <= 256 else "<u2")


def _largest_z(prior: Integers, lattice: Lattice) -> int:
    return int(np.abs(prior[0]).max() + prior[1].max() * np.ceil(lattice.support)) + 1


def _prior_units(prior: Any) -> Integers:
    if type(prior) is priors.StandardNormal:
        zeros = np.zeros(prior.latent_dim, np.int64)
        return np.stack([zeros, zeros + UNIT])
    if type(prior) is not priors.LearnedNormal:
        raise _unsupported("prior", prior, "priors.StandardNormal or LearnedNormal")
    with torch.no_grad():
        parts = torch.stack([prior.loc, positive(prior.raw_scale)]).double().cpu().numpy()
    if not (np.abs(parts) < _LARGEST_Z / UNIT).all():
        raise UnsupportedModelError("the prior has a location or scale that is not finite, or beyond 4096")
    units = np.rint(parts * UNIT).astype(np.int64)
    return np.stack([units[0], np.maximum(units[1], 1)])


def _unsupported(name: str, part: Any, expected: str) -> UnsupportedModelError:
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
_TABLES: dict[str, Any] = {
    "bernoulli": BernoulliTables,
    "discretized logistic": LogisticTables,
    "beta-binomial": BetaBinomialTables,
    "counts": CountTables,
}


def _name_of(tables: Tables) -> str:
    return next(name for name, cls in _TABLES.items() if type(tables) is cls)
