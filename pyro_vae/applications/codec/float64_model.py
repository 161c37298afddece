"""A VAE whose networks are torch's, in float64: any network, and any guide of independent normals.

The same call gives the same bits on the same machine, and may give others elsewhere. So each example is a
call by itself, on one thread: neither the batch size nor the other examples change a bit. What torch returns
is rounded to the units of the exact model, whose tables then do the rest.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_vae.applications.codec.errors import UnsupportedModelError
from pyro_vae.applications.codec.exact_networks import UNIT
from pyro_vae.applications.codec.fixed_point import Integers
from pyro_vae.applications.codec.integer_probabilities import Lattice, LogisticTables
from pyro_vae.applications.codec.lattice_model import LatticeModel, prior_units, tables_of, unsupported_part
from pyro_vae.applications.codec.machine import machine, reproducible
from pyro_vae.utils.isolation import seed_generators
from pyro_vae.vae import VAE

__all__ = ["Float64Model"]

_LARGEST = 2.0**28  # of an output; the tables are flat long before
_SCALE_UNIT = 1 << 20
_PROBES = 3  # fixed inputs whose outputs identify the machine


@dataclass(frozen=True)
class Float64Model(LatticeModel):
    """A VAE in float64, on a lattice; arguments as for `LatticeModel`, and the VAE itself.

    Args:
        vae: A copy, in evaluation mode.
    """

    vae: VAE

    is_exact: ClassVar[bool] = False

    @classmethod
    def from_vae(cls, vae: VAE, lattice: Lattice, max_count: int) -> "Float64Model":
        """Copy a VAE with a guide of independent normals, a normal prior and a discrete likelihood.

        Raises:
            UnsupportedModelError: If a part of the VAE is of another class, or gives numbers that are not
                finite.
        """
        likelihood: Any = vae.likelihood
        tables, prior = tables_of(likelihood, max_count), prior_units(vae.prior)
        own = copy.deepcopy(vae).cpu().double().eval().requires_grad_(False)
        for tensor in chain(own.parameters(), own.buffers()):
            tensor.data = tensor.data.clone()  # in memory of its own, whose alignment kernels may depend on
        model = cls(likelihood.event_shape, likelihood.latent_dim, tables, prior, lattice, own)
        model.digests  # noqa: B018 (calls both networks, so that they fail here if they do)
        return model

    def posterior(self, symbols: np.ndarray) -> tuple[Integers, Integers]:
        """Return location and scale of q(z|x)."""
        parts = self._rows(self._moments, self._values(symbols), "guide")
        loc, scale = (np.concatenate(part) for part in zip(*parts, strict=True))
        whole = np.rint(np.clip(scale, 0, 1 << 20) * _SCALE_UNIT).astype(np.int64)
        return _units(loc), np.maximum(whole, 1)

    def _values(self, symbols: np.ndarray) -> Tensor:
        """Return x, (N, *event_shape)."""
        unit = 255 if isinstance(self.tables, LogisticTables) else 1
        return torch.from_numpy(symbols.astype(np.float64) / unit).reshape(-1, *self.event_shape)

    def outputs(self, z: Integers) -> Integers:
        """Return the outputs of the likelihood's network."""
        vectors = torch.from_numpy(z / UNIT)
        likelihood: Any = self.vae.likelihood
        outputs = [np.stack(row, 1) for row in self._rows(likelihood.outputs, vectors, "likelihood")]
        return _units(np.concatenate(outputs).reshape(len(z), self.tables.num_parameters, self.size))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.vae.encode(x)
        normal = q.base_dist if isinstance(q, Independent) else q
        if not isinstance(normal, Normal) or normal.batch_shape != (1, self.latent_dim):
            raise unsupported_part("guide", q, "one of independent normals, such as guides.DiagonalNormal")
        return normal.loc, normal.scale

    def _rows(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], inputs: Tensor, part: str
    ) -> Iterator[list[np.ndarray]]:
        """Yield what a function returns for each row (1, ...) of its inputs, in arrays."""
        with reproducible(self.vae):
            for row in inputs:
                seed_generators(row.device, 0)
                outputs = function(row[None].clone())
                if not all(output.isfinite().all() for output in outputs):
                    raise UnsupportedModelError(
                        f"the {part} gives numbers that are not finite: train the model first, or leave out "
                        "the rows of which it makes them"
                    )
                yield [output.detach().numpy() for output in outputs]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of structure, weights and settings; the machine; and a digest of outputs on it."""
        parts = [(name, type(module).__qualname__) for name, module in self.vae.named_modules()]
        state = {name: tensor for name, tensor in self.vae.state_dict().items() if isinstance(tensor, Tensor)}
        weights = b"".join(np.ascontiguousarray(tensor.numpy()).tobytes() for tensor in state.values())
        shapes = [(name, list(tensor.shape)) for name, tensor in state.items()]
        kind = [type(self.tables).__name__, self.tables.to_plain(), list(self.event_shape), self.latent_dim]
        settings = [self.lattice.bits, float(self.lattice.support), self.prior.tolist()]
        return {
            "structure": _digest(json.dumps([parts, shapes, kind]).encode()),
            "weights": _digest(weights),
            "settings": _digest(json.dumps(settings).encode() + self.prior_tables.astype("<i8").tobytes()),
            "machine": machine(),
            "probe": self._probe(),
        }

    def _probe(self) -> str:
        """Return a digest of all bits that both networks return for fixed inputs."""
        rows = np.arange(_PROBES)[:, None]
        symbols = (rows + 1) * (37 + np.arange(self.size)) * 101 % self.tables.levels
        positions = (rows + 1) * (29 + np.arange(self.latent_dim)) * 41 % len(self.lattice.points)
        z = torch.from_numpy(self.latent_vectors(positions) / UNIT)
        likelihood: Any = self.vae.likelihood
        found = hashlib.sha256()
        for outputs in chain(
            self._rows(self._moments, self._values(symbols), "guide"),
            self._rows(likelihood.outputs, z, "likelihood"),
        ):
            for output in outputs:
                found.update(np.ascontiguousarray(output, "<f8").tobytes())
        return found.hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _units(values: np.ndarray) -> Integers:
    return np.rint(np.clip(values, -_LARGEST, _LARGEST) * UNIT).astype(np.int64)
