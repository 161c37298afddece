"""The rate of a codec beside the negative ELBO of the same data."""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyro_vae.applications.codec.data import from_symbols, to_symbols
from pyro_vae.applications.codec.exact_networks import UNIT
from pyro_vae.objectives import terms
from pyro_vae.utils.display import Estimate, aligned
from pyro_vae.utils.isolation import evaluating, isolated_generators

__all__ = ["Rate", "rate_of"]


@dataclass(frozen=True)
class Rate:
    """Rates in bits per dimension, with standard errors over the examples.

    Args:
        num_rows: N.
        num_bytes: Length of the file.
        total: Bits of the file per dimension.
        net: −log p(x|z) − log p(z) + log q(z|x) by which the examples made the stacks grow; with S particles,
            −log (1/S) Σ_s w_s.
        minus_elbo: Negative ELBO of the VAE in floating point, by its own draws; None for a loaded codec.
        overhead: `net` minus the negative log weights of the VAE in floating point at the same z on the
            lattice: what lattice and integers cost. None for a loaded codec, for S > 1, for a guide that
            refines q(z|x), and where all rows are raw.
        initial: Bits of the stacks that are not of examples: what bits back borrows.
        header: Bits of header, index, check sums and lengths.
        num_raw: Rows stored without the model.
    """

    num_rows: int
    num_bytes: int
    total: Estimate
    net: Estimate
    minus_elbo: Estimate | None
    overhead: Estimate | None
    initial: float
    header: float
    num_raw: int

    def __str__(self) -> str:
        rows = [
            ("total", str(self.total), f"{self.num_bytes:,} bytes for {self.num_rows:,} rows"),
            ("net", str(self.net), "of the examples"),
            ("initial bits", f"{self.initial:.6f}", "borrowed by bits back"),
            ("header", f"{self.header:.6f}", "with index and check sums"),
        ]
        if self.minus_elbo is not None:
            rows.insert(2, ("−ELBO", str(self.minus_elbo), "of the VAE in floating point"))
        if self.overhead is not None:
            rows.insert(3, ("overhead", str(self.overhead), "of net over the VAE at the same z"))
        lines = list(aligned(["bits per dimension", "", ""], rows, left=3))
        return "\n".join([*lines, f"{self.num_raw:,} rows are stored without the model"])


def rate_of(codec: Any, x: Any, *, num_particles: int, seed: int) -> Rate:
    """Compress data with a `Codec`, and return its rate; see `Codec.rate`."""
    file = io.BytesIO()
    with codec.writer(file) as writer:
        writer.keep_encoded = True
        for start in range(0, max(len(x), 1), writer.rows_per_chunk):
            writer.write(x[start : start + writer.rows_per_chunk])
    bits = np.concatenate([chunk.bits for chunk in writer.encoded])
    words = sum(len(words) for chunk in writer.encoded for _, words in chunk.lanes)
    num_raw = sum(len(chunk.raw) for chunk in writer.encoded)
    elements, num_bytes = bits.size * codec.model.size, len(file.getvalue())
    minus_elbo, overhead = _float_rates(codec, x, writer.encoded, num_particles=num_particles, seed=seed)
    net = _estimate(bits / codec.model.size)
    total = Estimate(8 * num_bytes / elements, net.standard_error)
    initial = (32 * words - bits.sum()) / elements
    header = (8 * num_bytes - 32 * words) / elements
    return Rate(bits.size, num_bytes, total, net, minus_elbo, overhead, initial, header, num_raw)


def _float_rates(
    codec: Any, x: Any, encoded: list[Any], *, num_particles: int, seed: int
) -> tuple[Estimate | None, Estimate | None]:
    """Return the negative ELBO of the VAE, and how much more the examples cost than at the same z."""
    if codec.vae is None:
        return None, None
    model, vae = codec.model, codec.vae
    bits = np.concatenate([chunk.bits for chunk in encoded])
    latents = np.concatenate([chunk.latents for chunk in encoded])
    modelled = np.concatenate([~np.isin(np.arange(len(chunk.bits)), chunk.raw) for chunk in encoded])
    parameter = next(vae.parameters())
    elbos, costs = [], []
    with evaluating(vae, parameter.device, seed), isolated_generators(parameter.device, seed):
        for start in range(0, len(bits), 256):
            symbols, _ = to_symbols(model, x[start : start + 256])
            batch = torch.from_numpy(from_symbols(model, symbols, "float64", model.event_shape))
            batch = batch.to(parameter)
            draws = terms(vae.model, vae.guide, batch, num_particles=num_particles)
            elbos.append(-draws.log_weight.mean(0).double().cpu())
            shift, unit = model.prior / UNIT
            z = shift + unit * model.lattice.points[latents[start : start + 256]] / UNIT
            position = torch.from_numpy(z).to(parameter)
            log_weight = vae.log_joint(batch, position) - vae.encode(batch).log_prob(position)
            costs.append(-log_weight.double().cpu())
    scale = model.size * math.log(2)
    minus_elbo = _estimate(torch.cat(elbos).numpy() / scale)
    is_refined = getattr(vae.posterior, "needs_log_joint", False)  # by draws, other ones than the codec's
    if codec.particles > 1 or is_refined or not modelled.any():
        return minus_elbo, None
    difference = bits / model.size - torch.cat(costs).numpy() / scale
    return minus_elbo, _estimate(difference[modelled])


def _estimate(values: np.ndarray) -> Estimate:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), float(error))
