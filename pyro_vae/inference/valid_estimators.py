"""Which estimators are valid for a pair, and why the others are not."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_dependencies

from pyro_vae.inference.guide_fit import FittingPair, sums_out
from pyro_vae.objectives.enumeration import enumerated_sites
from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Estimator, Renyi
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.pair import as_tensors
from pyro_vae.objectives.sites import (
    Program,
    check_plates,
    kl_invalid_reason,
    latent_sites,
    registered_kl,
    run_pair,
    sample_sites,
    site_family,
)

__all__ = [
    "check_mean_field",
    "every_estimator",
    "failure_reason",
    "invalid_reason",
]


def every_estimator(max_plate_nesting: int) -> list[ELBO]:
    """Return one estimator of each class, with as few particles as possible."""
    nesting = {"max_plate_nesting": max_plate_nesting}
    return [
        *(kind(**nesting) for kind in _PYRO_ESTIMATORS),
        TraceMeanField_ELBO(**nesting),
        IWAE(2, **nesting),
        PIWAE(1, 2, **nesting),
        CIWAE(0.5, 2, **nesting),
        Renyi(0.5, 2, **nesting),
        STL(2, **nesting),
        DReG(2, **nesting),
        VIMCO(2, **nesting),
    ]


_PYRO_ESTIMATORS = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)


def failure_reason(estimator: ELBO, pair: FittingPair) -> str | None:
    """Return the reason why an estimator is not valid for a pair or the error that it raises, or None."""
    try:
        return invalid_reason(estimator, pair)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"


def invalid_reason(estimator: ELBO, pair: FittingPair) -> str | None:
    """Run an estimator and return the reason why it is not valid for a pair, or None."""
    programs = pair.model, pair.guide
    summed = enumerated_sites(sample_sites(pair.model_trace), sample_sites(pair.guide_trace))
    if summed and not sums_out(estimator):
        return f"it does not sum over the values of {summed[0]!r}, which the guide lacks"
    try:
        if isinstance(estimator, TraceEnum_ELBO):
            check_plates(sample_sites(pair.guide_trace), sample_sites(pair.model_trace))
        if isinstance(estimator, TraceMeanField_ELBO):
            check_mean_field(*programs, *pair.data, **pair.kwargs)
        elif isinstance(estimator, Estimator | KLWeighted):
            estimator.differentiable_loss(*programs, *pair.data, **pair.kwargs)
        elif type(estimator) in _PYRO_ESTIMATORS:
            estimator.loss(*programs, *pair.data, **pair.kwargs)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def check_mean_field(model: Program, guide: Program, *data: Any, **kwargs: Any) -> None:
    """Raise if `pyro.infer.TraceMeanField_ELBO` is wrong for a pair.

    The estimator sums the KLs of single sites. This is correct if, for every latent site z, the sites that
    the model draws z from do not depend on z in the guide, and if each KL is valid for its site (the same
    masks and scales in guide and model, no Delta with a density). Its gradient is correct if every draw of
    the guide is reparameterised. Pyro only warns of the first condition, with its validation enabled.

    Sites drawn in the same order in both need no further check. Otherwise dependencies are tracked in one
    more run of each; writing draws into a tensor in place (`buffer[..., 0] = z`) is not tracked. Random
    generators are restored. Arguments are those of `terms`.

    Raises:
        ValueError: If the estimator is wrong for the pair; names the sites and an alternative.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def top_down(x):
        ...     with pyro.plate("data", len(x)):
        ...         z1 = pyro.sample("z1", dist.Normal(0, 1))
        ...         z2 = pyro.sample("z2", dist.Normal(z1, 1))
        ...         pyro.sample("x", dist.Normal(z2, 1), obs=x)
        >>> def bottom_up(x):
        ...     with pyro.plate("data", len(x)):
        ...         z2 = pyro.sample("z2", dist.Normal(x / 2, 1))
        ...         pyro.sample("z1", dist.Normal(z2 / 2, 1))
        >>> check_mean_field(top_down, bottom_up, torch.zeros(3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: TraceMeanField_ELBO is wrong here: the model draws 'z2' given 'z1', ...
    """
    data, kwargs = as_tensors(model, data, kwargs)
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        guide_trace, model_trace = run_pair(model, guide, data, kwargs)
        guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
        for name, site in guide_sites.items():
            if not is_identically_zero(site["fn"].score_parts(site["value"]).score_function):
                raise ValueError(
                    f"TraceMeanField_ELBO is wrong here: the guide's site {name!r}, a {site_family(site)}, "
                    "is not reparameterised, so its gradient would be lost; use Trace_ELBO, VIMCO, "
                    "or, for a site that can be enumerated, TraceEnum_ELBO"
                )
        latent = list(latent_sites(model_sites))
        for name in (name for name in latent if name in guide_sites):
            pair = guide_sites[name], model_sites[name]
            reason = kl_invalid_reason(*pair)
            if reason and registered_kl(*pair) is not None:
                raise ValueError(f"TraceMeanField_ELBO is wrong here: at {name!r}, {reason}; use Trace_ELBO")
        if latent == [name for name in guide_sites if name in latent]:
            return
        replayed = poutine.replay(model, trace=guide_trace)
        model_parents = get_dependencies(replayed, data, kwargs)["prior_dependencies"]
        guide_parents = get_dependencies(guide, data, kwargs)["prior_dependencies"]
    for name in latent:
        for parent in model_parents.get(name, ()):
            if parent != name and name in _ancestors(parent, guide_parents):
                raise ValueError(
                    f"TraceMeanField_ELBO is wrong here: the model draws {name!r} given {parent!r}, but the "
                    f"guide draws {parent!r} given {name!r}. Use Trace_ELBO, or a guide that draws its "
                    "sites in the model's order"
                )


def _ancestors(name: str, parents: dict[str, dict[str, Any]]) -> set[str]:
    """Return the sites that `name` depends on, directly or indirectly."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for parent in parents.get(waiting.pop(), {}):
            if parent not in found and parent != name:
                found.add(parent)
                waiting.append(parent)
    return found
