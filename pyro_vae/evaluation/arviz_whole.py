"""Draws for ArviZ of a pair whose latent sites are shared by all examples: the data as a whole."""

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_vae.data.sources import arguments
from pyro_vae.objectives.sites import (
    Program,
    Site,
    joint_mask,
    latent_sites,
    run,
    run_pair,
    sample_sites,
    vectorized_plates,
)
from pyro_vae.utils.validation import elementwise_support

__all__ = ["Groups", "Variable", "as_integers", "counted", "event_dims", "whole_groups"]

Variable = tuple[tuple[str, ...], npt.NDArray[Any]]  # names of the dimensions, values
Groups = dict[str, dict[str, Variable]]

_INTEGERS = (type(constraints.boolean), type(constraints.nonnegative_integer), constraints.integer_interval)


def whole_groups(pair: Any, batch: Any, num_samples: int) -> Groups:
    """Run a pair and its predictions S times on all the data at once; return ArviZ's groups.

    Sites that the model enumerates and the guide lacks have no posterior draws; the predictions draw them
    from the model.
    """
    args, kwargs = arguments(batch)
    draws: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
    log_joint = []

    def keep(group: str, sites: dict[str, Site], names: list[str]) -> None:
        for name in names:
            draws[group][name].append(sites[name])

    for _ in range(num_samples):
        with poutine.block():
            guide_trace, model_trace = run_pair(pair.model, pair.guide, args, kwargs)
            sites = sample_sites(model_trace)
            drawn = [name for name in sample_sites(guide_trace) if name in sites]
            observed = [name for name, site in sites.items() if site["is_observed"]]
            free = poutine.uncondition(pair.model)
            given = {name: sites[name]["value"] for name in drawn}
            keep("posterior", sites, drawn)
            keep("posterior_predictive", _sites(poutine.condition(free, data=given), args, kwargs), observed)
            prior = _sites(free, args, kwargs)
            keep("prior", prior, list(latent_sites(sites)))
            keep("prior_predictive", prior, observed)
        if set(drawn) >= set(latent_sites(sites)):
            log_joint.append(float(model_trace.log_prob_sum()))
    groups = {
        group: {name: _variable(name, of_name) for name, of_name in by_name.items()}
        for group, by_name in draws.items()
    }
    groups["observed_data"] = {name: _observation(name, sites[name]) for name in observed}
    if log_joint:
        groups["sample_stats"] = {"lp": (("chain", "draw"), np.array(log_joint)[None])}
    return groups


def _sites(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Site]:
    return sample_sites(run(model, args, kwargs))


def _variable(name: str, draws: list[Site]) -> Variable:
    dims, shape = _dims(name, draws[0])
    values = torch.stack([counted(site, site["value"]).reshape(shape) for site in draws])
    return ("chain", "draw", *dims), as_integers(draws[0], values.cpu().numpy())[None]


def _observation(name: str, site: Site) -> Variable:
    dims, shape = _dims(name, site)
    return tuple(dims), as_integers(site, counted(site, site["value"]).reshape(shape).cpu().numpy())


def _dims(name: str, site: Site) -> tuple[list[str], list[int]]:
    """Name the dimensions of a site's value by its plates; leave out those of length 1 without a plate."""
    fn, value = site["fn"], site["value"]
    plates = {frame.dim: frame.name for frame in vectorized_plates(site)}
    split = value.dim() - fn.event_dim
    batch = {axis - split: value.shape[axis] for axis in range(split)}
    kept = {dim: size for dim, size in batch.items() if dim in plates or size > 1}
    names = [plates.get(dim, f"{name}_batch_{-dim}") for dim in kept] + event_dims(name, fn.event_dim)
    return names, [*kept.values(), *value.shape[split:]]


def event_dims(name: str, count: int) -> list[str]:
    """Name the event dimensions of a site."""
    match count:
        case 1:
            own = ["dim"]
        case 3:
            own = ["channel", "row", "column"]
        case _:
            own = [f"dim_{number}" for number in range(count)]
    return [f"{name}_{dim}" for dim in own]


def counted(site: Site, value: torch.Tensor) -> torch.Tensor:
    """Return a site's value with NaN where masks hide it."""
    mask = joint_mask(site)
    if mask.all():
        return value
    return torch.where(mask, value if value.is_floating_point() else value.double(), torch.nan)


def as_integers(site: Site, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of a site over integers as integers, unless some are NaN."""
    support = elementwise_support(site["fn"].support)
    if isinstance(support, _INTEGERS) and not np.isnan(array).any():
        return array.astype(np.int8 if support is constraints.boolean else np.int32)
    return array
