"""Export of a VAE's posterior, predictive draws and evidence to ArviZ and netCDF.

Notation: N examples, S samples z_s per example, taken from P ≥ S draws of the guide.
"""

import importlib.metadata
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_vae.data.sources import arguments, num_rows
from pyro_vae.evaluation.arviz_compat import arviz_version, inference_data, write_netcdf
from pyro_vae.evaluation.arviz_whole import Groups, Variable, as_integers, counted, event_dims, whole_groups
from pyro_vae.evaluation.draws import Chunk, Pair, by_example, chunk_lengths, chunks, prepare_data
from pyro_vae.evaluation.importance_weights import pareto_smoothed, summarise_weights
from pyro_vae.evaluation.whole import not_by_example
from pyro_vae.objectives.log_terms import PairSites
from pyro_vae.objectives.pair import as_programs
from pyro_vae.objectives.sites import Program, Site, Sites, run, sample_sites
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.serialization import replacing
from pyro_vae.utils.validation import require_count

if TYPE_CHECKING:
    import xarray

__all__ = ["save_netcdf", "to_inference_data"]

_DRAWS = ("chain", "draw", "datum")


def to_inference_data(
    vae: Pair,
    data: Any,
    *,
    num_samples: int = 200,
    oversample: int = 1,
    binarize: str | None = None,
    missing: str | None = None,
    seed: int = 0,
    max_plate_nesting: int = 1,
    progress: bool = True,
) -> Any:
    r"""Convert a VAE's draws, predictions and log-evidence for some data to ArviZ's inference data.

    Groups, with the dimensions chain (of size 1), draw, datum and the sites' own, such as z_dim:

    - posterior: z ~ q(z|x); with `oversample` above 1, draws resampled by their importance weights, which
      approximate p(z|x) where k̂ is low; discrete sites y that the model enumerates and the guide lacks,
      from p(y|x, z);
    - posterior_predictive: x ~ p(x|z) for these z; prior, prior_predictive: z ~ p(z), x ~ p(x|z);
    - observed_data: the data;
    - sample_stats: log_weight = log w, log_conditional = log p(x|z) and lp = log p(x, z) of each draw;
      pareto_k and effective_sample_size of each datum, from all P draws;
    - log_likelihood: per draw, the log-evidence of each datum estimated from all *other* draws,

    .. math:: \log \frac1{S-1} \sum_{r \ne s} w_r, \qquad w_r = p(x, z_r) / q(z_r|x).

    Missing is NaN: observed values that a mask hides, in observed_data, and latent values that one hides,
    which count for nothing. So of a site with `obs_mask`, such as y of a `SemiSupervisedVAE`, the values of
    y_observed are NaN for the examples whose class is missing, and those of y_unobserved for the others.

    With this log-likelihood ArviZ's `loo` gives the importance-weighted log-evidence, as `evaluate` does,
    with its standard error over the data and the k̂ of the importance weights, and `compare` compares the
    evidence of two VAEs datum by datum. The conditional log p(x|z) is unsuitable: z belongs to the datum that
    is left out, so that `loo` would weight by 1 / p(x|z), whose mean seldom exists, and overrate the model.

    Where a latent site is shared by all examples, the pair runs on all of them together: dimensions have the
    names of the plates, sample_stats holds lp alone, and log_likelihood is left out, as no log p(x) of
    single examples exists.

    Args:
        vae: As in `evaluate`.
        data: As in `evaluate`. Each predictive group holds `num_samples` times as many values.
        num_samples: S, draws of z kept per example.
        oversample: P / S, guide draws per kept draw.
        binarize: As in `evaluate`.
        missing: As in `evaluate`. The predictive groups have values where x is missing, too.
        seed: As in `evaluate`.
        max_plate_nesting: As in `evaluate`.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        An `arviz.InferenceData` (ArviZ 0.x) or an `xarray.DataTree` (1.x).

    Raises:
        ValueError: If `num_samples` is below 2. Other invalid arguments raise as in `evaluate`.

    Source: A. Vehtari, A. Gelman, J. Gabry (2017), Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC, arXiv:1507.04544; E. Merkle, D. Furr, S. Rabe-Hesketh (2019), Bayesian
    comparison of latent variable models: conditional versus marginal likelihoods, arXiv:1802.04452.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> idata = to_inference_data(vae, torch.randn(9, 6), num_samples=50, progress=False)
        >>> dict(idata["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 50, 'datum': 9, 'z_dim': 2}
    """
    vae = as_programs("to_inference_data(pair, data)", vae)
    require_count("num_samples", num_samples, minimum=2)
    require_count("oversample", oversample)
    batches = prepare_data(vae, data, binarize=binarize, seed=seed, missing=missing)
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "keep_draws": True}
    parts: list[Groups] = []
    with (
        evaluating(vae, batches.device, seed),
        progress_bar(len(batches), shown=progress, unit=" data") as bar,
    ):
        reason = not_by_example(vae, batches, max_plate_nesting)
        if reason is None:
            for chunk in chunks(vae, batches, num_samples * oversample, **options):
                parts.append(_groups(vae, chunk, oversample))
                bar.update(num_rows(chunk.batch))
        elif oversample > 1:
            raise ValueError(f"oversample must be 1, as there are no weights of single examples: {reason}")
        else:
            parts.append(whole_groups(vae, batches.peek(len(batches)), num_samples))
    attrs = {
        "inference_library": "pyro_vae",
        "inference_library_version": importlib.metadata.version("pyro_vae"),
        "arviz_version": arviz_version(),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_samples": num_samples,
        "oversample": oversample,
        "binarize": str(binarize or getattr(data, "binarize", None)),
        "missing": str(missing),
        "seed": seed,
    }
    groups = {group: _dataset([part[group] for part in parts], attrs) for group in parts[0]}
    return inference_data(groups, attrs)


def save_netcdf(idata: Any, path: str | os.PathLike[str]) -> None:
    """Write the result of `to_inference_data` atomically to a netCDF file, for `arviz.from_netcdf`.

    Raises:
        OSError: If the file cannot be written; an existing file of that name is unchanged.
    """
    try:
        with replacing(path) as partial:
            write_netcdf(idata, partial)
    except OSError as error:
        raise OSError(
            f"cannot write the netCDF file {path}: {error}. Free space or choose another folder"
        ) from error


def _groups(pair: Pair, chunk: Chunk, oversample: int) -> Groups:
    """Compute all groups for one chunk of n examples."""
    log_weight, sites = chunk.log_weight, chunk.first_terms.sites
    kept = _resample(log_weight, oversample)
    z = {name: _take(values, kept) for name, values in chunk.draws.items()}
    counts = chunk_lengths(len(kept), sites.num_particles)  # as many at once as in the chunk's first run
    if sites.enumerated:
        z |= _draw_enumerated(pair.model, chunk.batch, z, counts, sites)
    posterior = _simulate(pair.model, chunk.batch, z, counts, sites)
    prior = _simulate(pair.model, chunk.batch, {}, counts, sites)
    observed = [name for name in posterior if name not in z]
    summary = summarise_weights(log_weight)
    log_conditional = _take(chunk.log_likelihood, kept)

    def per_draw(values: Tensor) -> Variable:
        return _DRAWS, values.cpu().numpy()[None]

    def per_datum(values: Tensor) -> Variable:
        return _DRAWS[2:], values.numpy()

    return {
        "posterior": {name: posterior[name].variable() for name in z},
        "posterior_predictive": {name: posterior[name].variable() for name in observed},
        "prior": {name: prior[name].variable() for name in z},
        "prior_predictive": {name: prior[name].variable() for name in observed},
        "observed_data": {name: posterior[name].observation() for name in observed},
        "log_likelihood": {"_".join(observed): per_draw(_log_mean_of_others(log_weight, oversample))},
        "sample_stats": {
            "log_weight": per_draw(_take(log_weight, kept)),
            "log_conditional": per_draw(log_conditional),
            "lp": per_draw(log_conditional + _take(chunk.log_prior, kept)),
            "pareto_k": per_datum(summary.pareto_k),
            "effective_sample_size": per_datum(summary.effective_sample_size),
        },
    }


def _resample(log_weight: Tensor, oversample: int) -> Tensor:
    """Return indices of the draws to keep, (S, n), out of P = S · oversample: all, or by smoothed weights."""
    num_draws, num_data = log_weight.shape
    if oversample == 1:
        return torch.arange(num_draws, device=log_weight.device)[:, None].expand(-1, num_data)
    smoothed, _ = pareto_smoothed(log_weight)
    kept = torch.multinomial(smoothed.T.softmax(1), num_draws // oversample, replacement=True)
    return kept.T.to(log_weight.device)


def _take(values: Tensor, kept: Tensor) -> Tensor:
    """Select draws `kept` (S, n) from values (P, n, ...): (S, n, ...)."""
    return values.take_along_dim(kept.reshape(*kept.shape, *[1] * (values.dim() - 2)), dim=0)


def _log_mean_of_others(log_weight: Tensor, block: int) -> Tensor:
    """Return the log mean weight with each block of draws left out: (P, n) to (P / block, n)."""
    blocks = log_weight.double().unflatten(0, (-1, block)).logsumexp(1)
    total, largest = blocks.logsumexp(0), blocks.argmax(0, keepdim=True)
    others = total + torch.log1p(-(blocks - total).exp())  # cancels for the largest block
    others.scatter_(0, largest, blocks.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True))
    return others - math.log(len(log_weight) - block)


@dataclass
class _Simulated:
    """Values of one site in simulations of n examples."""

    name: str
    site: Site
    sites: PairSites
    values: list[Tensor]  # each (S, n, *others, *event), as in `by_example`

    def variable(self) -> Variable:
        """Return all draws."""
        others, own = self._dims()
        values = torch.cat(self.values)
        return (*_DRAWS, *own), self._array(values.expand(-1, self.sites.num_data, *values.shape[2:]), others)

    def observation(self) -> Variable:
        """Return the observed value that the simulation replaced, NaN where it is missing."""
        others, own = self._dims()
        observed = self.site["infer"]["obs"].broadcast_to(self.site["value"].shape)
        observed = counted(self.site, observed)
        values = by_example(self.sites, self.site, observed)[:1]
        return (*_DRAWS[2:], *own), self._array(values, others)[0, 0]

    def _dims(self) -> tuple[list[bool], list[str]]:
        """Flag which other batch dimensions are plates; name these and the event dimensions."""
        plates = {frame.dim: frame.name for frame in self.site["cond_indep_stack"] if frame.vectorized}
        others = self.sites.other_dims
        names = [plates[dim] for dim in others if dim in plates]
        return [dim in plates for dim in others], names + event_dims(self.name, self.site["fn"].event_dim)

    def _array(self, values: Tensor, others: list[bool]) -> npt.NDArray[Any]:
        """Add the chain dimension to values (S, n, *others, *event); drop dimensions that are not plates."""
        without = [axis + 2 for axis, is_plate in enumerate(others) if not is_plate]
        array = as_integers(self.site, values.cpu().numpy())
        return array.squeeze(tuple(without))[None]


def _simulate(
    model: Program, batch: Any, z: dict[str, Tensor], counts: list[int], sites: PairSites
) -> dict[str, _Simulated]:
    """Run the model on n examples with x unobserved, at latent values z (S, n, ...) or at its own draws."""
    simulated: dict[str, _Simulated] = {}
    for part, plate in _parts(z, counts, sites):
        with plate:
            trace = run(poutine.condition(poutine.uncondition(model), data=part), *arguments(batch))
        found = sample_sites(trace)
        for name, site in found.items():
            if site["value"].numel():  # a factor has no value
                record = simulated.setdefault(name, _Simulated(name, site, sites, []))
                is_replaced = _is_observed_part(name, found)
                is_latent = not site["infer"].get("was_observed")
                value = counted(site, site["value"]) if is_latent or is_replaced else site["value"]
                record.values.append(by_example(sites, site, value))
    return simulated


def _draw_enumerated(
    model: Program, batch: Any, z: dict[str, Tensor], counts: list[int], sites: PairSites
) -> dict[str, Tensor]:
    """Draw the sites that the model enumerates given x and draws z (S, n, ...) of the others, (S, n, ...)."""
    draws: dict[str, list[Tensor]] = defaultdict(list)
    for part, plate in _parts(z, counts, sites):
        conditioned = infer_discrete(
            plate(poutine.condition(model, data=part)), first_available_dim=-1 - sites.rank
        )
        found = sample_sites(run(conditioned, *arguments(batch)))
        for name in sites.enumerated:
            value = by_example(sites, found[name], found[name]["value"])
            draws[name].append(value.expand(plate.size, sites.num_data, *value.shape[2:]))
    return {name: torch.cat(values) for name, values in draws.items()}


def _parts(
    z: dict[str, Tensor], counts: list[int], sites: PairSites
) -> Iterator[tuple[dict[str, Tensor], pyro.plate]]:
    """Yield latent values z (S, n, ...) in the shapes of their sites, some draws at once, and a plate."""
    start = 0
    for count in counts:
        part = {name: v[start : start + count].movedim(1, sites.data_axis) for name, v in z.items()}
        start += count
        yield part, pyro.plate("samples", count, dim=-sites.rank)


def _is_observed_part(name: str, sites: Sites) -> bool:
    """Return whether a site is what a statement with `obs_mask` observes: it counts there alone."""
    return name.endswith("_observed") and f"{name.removesuffix('_observed')}_unobserved" in sites


def _dataset(chunks: list[dict[str, Variable]], attrs: dict[str, Any]) -> "xarray.Dataset":
    """Concatenate chunks along the datum dimension."""
    import xarray  # noqa: PLC0415 (slow)

    variables = {}
    for name, (dims, values) in chunks[0].items():
        if len(chunks) == 1:
            variables[name] = (dims, values)
        else:
            axis = dims.index("datum")
            variables[name] = (dims, np.concatenate([chunk[name][1] for chunk in chunks], axis))
    sizes = {
        dim: size for dims, array in variables.values() for dim, size in zip(dims, array.shape, strict=True)
    }
    return xarray.Dataset(variables, {dim: np.arange(size) for dim, size in sizes.items()}, attrs)
