"""Run a guide, then the model at its draws, as an estimator does; raise if the guide does not fit."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO, TraceTMC_ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample

from pyro_vae.inference.guide_report import DistributionReport, GuideError, GuideReport, SiteReport
from pyro_vae.objectives.calls import explaining_calls, left_out
from pyro_vae.objectives.enumeration import enumerated_sites
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.guide_problems import (
    explain_failure,
    mask_problems,
    non_finite_inputs,
    plates,
    problems,
    scale_problems,
    subsample_problems,
    support,
    value_problem,
)
from pyro_vae.objectives.kl_weighting import inner_estimator
from pyro_vae.objectives.log_terms import particle_plate
from pyro_vae.objectives.sites import (
    Program,
    Sites,
    analytic_kl,
    draw_sources,
    guide_messenger,
    latent_sites,
    sample_sites,
    site_family,
)
from pyro_vae.utils.isolation import isolated

__all__ = [
    "FittingPair",
    "require_fit",
    "run_fitting_pair",
    "sums_out",
]


def require_fit(model: Program, guide: Program, *data: Any, **kwargs: Any) -> None:
    """Raise GuideError if a guide does not fit its model, as in `check_guide`, without trying estimators."""
    with isolated(model, guide):
        run_fitting_pair(model, guide, data, kwargs)


class FittingPair(NamedTuple):
    """A pair, its arguments, traces of the guide and of the model at its draws, and site reports."""

    model: Program
    guide: Program
    data: tuple[Any, ...]
    kwargs: dict[str, Any]
    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    reports: tuple[SiteReport, ...]


def run_fitting_pair(
    model: Program,
    guide: Program,
    data: tuple[Any, ...],
    kwargs: dict[str, Any],
    estimator: ELBO | None = None,
) -> FittingPair:
    """Run a guide, then the model at its draws, as an estimator does; raise if the guide does not fit.

    Sites that the model enumerates may be missing from the guide, except for an estimator that does not sum
    over their values.
    """
    programs = (model, guide)
    if estimator is not None:
        programs = _as_run_by(estimator, model, guide, data, kwargs)
    with explaining_calls(model, guide, data, kwargs):
        guide_trace, returned = _run_guide(*programs, data, kwargs)
        model_trace, error = _run_model(*programs, guide_trace, data, kwargs)
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    dims = {site["infer"].get("_enumerate_dim") for site in (*model_sites.values(), *guide_sites.values())}
    if estimator is None or sums_out(estimator):
        summed = enumerated_sites(model_sites, guide_sites)
        model_sites = {name: site for name, site in model_sites.items() if name not in summed}
    mismatches = problems(
        model_sites, guide_sites, returned, enumerated=dims - {None}, model_failed=error is not None
    )
    found = (*mismatches, *subsample_problems(model_trace, guide_trace))
    observed = ((name, site) for name, site in model_sites.items() if site["is_observed"])
    for problem in (value_problem(*each) for each in observed):
        if problem and not found:
            raise ValueError(problem) from error
    if not found and error is None:
        weights = model_sites, guide_sites, partial(draw_sources, programs[1], data, kwargs)
        found = (*mask_problems(*weights), *scale_problems(*weights))
    reports = tuple(_site_reports(model_sites, guide_sites))
    if found:
        found += tuple(non_finite_inputs(guide_trace, data))
        if {"missing"} == {report.status for report in reports} - {"match"}:
            found += tuple(left_out(model, data, kwargs))
        raise GuideError("\n".join(found), GuideReport(reports, found)) from error
    if error is not None:
        error.add_note("The model raised this error when it was run at the guide's draws.")
        with explaining_calls(model, guide, data, kwargs):
            raise error
    return FittingPair(model, guide, data, kwargs, guide_trace, model_trace, reports)


def sums_out(estimator: ELBO) -> bool:
    """Return whether an estimator sums over the values of sites that the model alone enumerates."""
    return isinstance(inner_estimator(estimator), TraceEnum_ELBO | TraceTMC_ELBO | Estimator)


def _as_run_by(
    estimator: ELBO, model: Program, guide: Program, data: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, Program]:
    """Return a pair in the particle plate and with the enumeration of an estimator."""
    if isinstance(estimator, Estimator):
        count = estimator.num_particles * estimator.num_groups
        plate = particle_plate(count, estimator.max_plate_nesting)
        return (plate(model), plate(guide)) if count > 1 else (model, guide)
    enumerates = isinstance(estimator, TraceEnum_ELBO | TraceTMC_ELBO)
    vectorizes = estimator.vectorize_particles and estimator.num_particles > 1
    if (enumerates or vectorizes) and estimator.max_plate_nesting == math.inf:
        try:
            estimator._guess_max_plate_nesting(model, guide, data, kwargs)
        except Exception:  # the run of the pair as it is will explain the error
            return model, guide
    if vectorizes:
        model, guide = (estimator._vectorized_num_particles(program) for program in (model, guide))
    if enumerates:  # the model's enumeration dimensions lie left of the guide's
        guide = EnumMessenger(first_available_dim=-1 - estimator.max_plate_nesting)(guide)
        model = EnumMessenger()(model)
    return model, guide


def _run_guide(
    model: Program, guide: Program, data: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, Any]:
    """Return the trace and the return value of a guide."""
    tracer = poutine.trace()
    try:
        with tracer:
            returned = guide(*data, **kwargs)
    except Exception as error:
        waiting = _waiting(model, tracer.trace, data, kwargs, error)
        raise GuideError(explain_failure(error, tracer.trace, waiting, data)) from error
    messenger = guide_messenger(guide)
    return (tracer.trace if messenger is None else messenger.get_traces()[1]), returned


def _waiting(
    model: Program, drawn: poutine.Trace, data: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> list[str]:
    """Return the latent sites that a guide had not drawn before it failed; raise if the model fails too."""
    subsamples = drawn.copy()
    for name, site in drawn.nodes.items():
        if not (site["type"] == "sample" and site_is_subsample(site)):
            subsamples.remove_node(name)
    tracer = poutine.trace()
    try:
        with tracer:
            poutine.replay(model, trace=subsamples)(*data, **kwargs)
    except NotImplementedError:  # an improper prior has no draws
        pass
    except Exception as models_own:
        raise models_own from error
    return [name for name in latent_sites(sample_sites(tracer.trace)) if name not in drawn]


def _run_model(
    model: Program, guide: Program, guide_trace: poutine.Trace, data: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, Exception | None]:
    """Return the trace of a model at a guide's draws and subsamples, and the error that ended it, if any."""
    messenger = guide_messenger(guide)
    if messenger is not None:
        return messenger.get_traces()[0], None
    tracer = poutine.trace()
    try:
        with tracer:
            poutine.replay(model, trace=guide_trace)(*data, **kwargs)
    except Exception as error:
        return tracer.trace, error
    return tracer.trace, None


def _site_reports(model_sites: Sites, guide_sites: Sites) -> Iterator[SiteReport]:
    latent = latent_sites(model_sites)
    for name in [*latent, *(name for name in guide_sites if name not in latent)]:
        p, q = _distribution_report(model_sites, name), _distribution_report(guide_sites, name)
        if q is None:
            yield SiteReport(name, "missing", q, p)
            continue
        site = guide_sites[name]
        if name in latent:
            status = "match"
        elif site["infer"].get("is_auxiliary"):
            status = "auxiliary"
        else:
            status = "extra" if p is None else "observed"
        comparable = p is not None and status == "match" and p[1:] == q[1:]  # the same shapes
        yield SiteReport(
            name,
            status,
            q,
            p,
            plates=tuple(plate for plate, _, _ in plates(site)),
            support=str(support(site) or "unknown"),
            reparameterised=bool(site["fn"].has_rsample),
            analytic_kl=comparable and analytic_kl(site, latent[name]) is not None,
        )


def _distribution_report(sites: Sites, name: str) -> DistributionReport | None:
    if name not in sites:
        return None
    fn = sites[name]["fn"]
    return DistributionReport(site_family(sites[name]), tuple(fn.batch_shape), tuple(fn.event_shape))
