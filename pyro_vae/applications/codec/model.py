"""A VAE in integers, its networks too: the same bits on every machine."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pyro_vae import guides
from pyro_vae.applications.codec.errors import UnsupportedModelError
from pyro_vae.applications.codec.exact_networks import ExactNetwork, convert
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
from pyro_vae.applications.codec.lattice_model import LatticeModel, prior_units, tables_of, unsupported_part
from pyro_vae.vae import VAE

__all__ = ["CodecModel"]


@dataclass(frozen=True)
class CodecModel(LatticeModel):
    """A VAE as integers: all that compression and decompression compute with.

    Arguments as for `LatticeModel`, and:

    Args:
        guide: From x (N, *event_shape) to 2K numbers.
        likelihood: From z (N, K) to `tables.num_parameters` numbers per element of x.
    """

    guide: ExactNetwork
    likelihood: ExactNetwork

    def posterior(self, symbols: np.ndarray) -> tuple[Integers, Integers]:
        """Return location and scale of q(z|x)."""
        raw = self.guide(self.tables.values(symbols).reshape(len(symbols), *self.event_shape))
        return raw[:, : self.latent_dim], positive_scale(raw[:, self.latent_dim :])

    def outputs(self, z: Integers) -> Integers:
        """Return the outputs of the likelihood's network."""
        return self.likelihood(z).reshape(len(z), self.tables.num_parameters, self.size)

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
            raise unsupported_part("guide", guide, 'guides.DiagonalNormal (or take precision="float64")')
        if guide.mask_input:
            raise UnsupportedModelError('a guide with mask_input has no exact form: take precision="float64"')
        tables = tables_of(likelihood, max_count)
        prior = prior_units(vae.prior)
        return cls(
            event_shape=likelihood.event_shape,
            latent_dim=likelihood.latent_dim,
            guide=convert(guide.network, tables.largest_value(), tables.input_unit),
            likelihood=convert(likelihood.network, _largest_z(prior, lattice)),
            tables=tables,
            prior=prior,
            lattice=lattice,
        )


def _largest_z(prior: Integers, lattice: Lattice) -> int:
    return int(np.abs(prior[0]).max() + prior[1].max() * np.ceil(lattice.support)) + 1


_TABLES: dict[str, Any] = {
    "bernoulli": BernoulliTables,
    "discretized logistic": LogisticTables,
    "beta-binomial": BetaBinomialTables,
    "counts": CountTables,
}


def _name_of(tables: Tables) -> str:
    return next(name for name, cls in _TABLES.items() if type(tables) is cls)
