"""Sample sites of a (model, guide) pair: families, plates, scales, masks and analytic KL.

A site is Pyro's record of one `pyro.sample`: its distribution, value, mask, scale and plates.
"""

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.inspect import TrackProvenance
from pyro.nn import PyroModule
from pyro.ops.provenance import get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.objectives.calls import explaining_calls

__all__ = [
    "NotSeparableError",
    "Program",
    "Site",
    "Sites",
    "analytic_kl",
    "check_plates",
    "data_plate",
    "draw_sources",
    "guide_messenger",
    "has_no_density",
    "joint_mask",
    "kl_invalid_reason",
    "latent_sites",
    "masked_log_prob",
    "outer_family",
    "plate_nesting",
    "registered_kl",
    "require_programs",
    "run",
    "run_pair",
    "same_masks",
    "same_scale",
    "sample_sites",
    "shared_latent",
    "shared_scale",
    "site_family",
    "subsamples",
    "subsampling_factor",
    "vectorized_plates",
]


class NotSeparableError(ValueError):
    """The terms of a pair are not a sum over examples: a site is shared by all of them."""


Program = Callable[..., Any]  # a Pyro model or guide
Site = dict[str, Any]
Sites = dict[str, Site]
Mask = Tensor | bool | None

_WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)


def require_programs(call: str, *programs: Any) -> None:
    """Raise TypeError, showing the right call, unless all programs are callable: a VAE, for one, is not."""
    for program in programs:
        kind = type(program)
        without_forward = (
            isinstance(program, nn.Module)
            and kind.forward is nn.Module.forward
            and kind.__call__ in (nn.Module.__call__, PyroModule.__call__)
        )
        if without_forward or not callable(program):
            got = type(program).__name__
            raise TypeError(f"expected a model and a guide, two Pyro functions; got {got}: call {call}")


def run(program: Program, data: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """Run a model or guide and record its sites."""
    try:
        return poutine.trace(program).get_trace(*data, **kwargs)
    except ZeroDivisionError as error:
        if str(error) != "size cannot be zero":
            raise
        raise ValueError("a plate has size 0: the batch must hold at least one example") from error


def run_pair(
    model: Program, guide: Program, data: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run a guide, then the model at its draws and subsamples, as Pyro's estimators do; record both."""
    messenger = guide_messenger(guide)
    with explaining_calls(model, guide, data, kwargs):
        if messenger is not None:
            guide(*data, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
            return guide_trace, model_trace
        guide_trace = run(guide, data, kwargs)
        return guide_trace, run(poutine.replay(model, trace=guide_trace), data, kwargs)


def guide_messenger(guide: Program) -> Any:
    """Return the handler that a guide is, if it runs the model itself as an `AutoNormalMessenger` does."""
    unwrapped = poutine.unwrap(guide)
    return unwrapped if isinstance(unwrapped, Messenger) else None


def sample_sites(trace: poutine.Trace) -> Sites:
    """Return the sample sites of a trace in order, without subsampling and deterministic sites."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
    }


def subsampling_factor(model_trace: poutine.Trace, num_rows: int) -> float:
    """Return the number of data that a model speaks for, over those in its batch, `num_rows`.

    It is 1 unless the plate of the data subsamples: the plate around all sites, if there is one, and else
    that of the batch's size. A plate of pixels, say, may subsample without speaking for other data.
    """
    stacks = [
        {frame.name: frame for frame in site["cond_indep_stack"]}
        for site in sample_sites(model_trace).values()
    ]
    around_all = set.intersection(*map(set, stacks)) if stacks else set()
    sizes = [
        (frame.full_size or frame.size, frame.size)
        for stack in stacks
        for name, frame in stack.items()
        if name in around_all or not around_all
    ]
    of_batch = [full for full, size in sizes if size == num_rows]
    return max(of_batch or [full for full, size in sizes if full != size], default=num_rows) / num_rows


def subsamples(guide_trace: poutine.Trace, model_trace: poutine.Trace, num_rows: int) -> bool:
    """Return whether the plate of the data subsamples, so that a loss speaks for others than its batch.

    Else it is a sum over the data of its batch, `num_rows`.

    Raises:
        NotSeparableError: If it is neither, as a site is shared by the data of a batch.
    """
    model_sites = sample_sites(model_trace)
    if subsampling_factor(model_trace, num_rows) != 1:
        return True
    nesting = plate_nesting(guide_trace, model_trace)
    data_plate(sample_sites(guide_trace), model_sites, max_plate_nesting=nesting, ignore="")
    return False


def shared_latent(model_trace: poutine.Trace) -> str | None:
    """Return the name of a latent site that all data share, whose KL each batch counts in full, or None.

    That is one in none of the plates of the observed sites, if these have plates and are not scaled, as by a
    plate that subsamples.
    """
    sites = sample_sites(model_trace)
    if any(site["is_observed"] and not same_scale(site["scale"], 1.0) for site in sites.values()):
        return None
    of_data = {
        frame.name for site in sites.values() if site["is_observed"] for frame in site["cond_indep_stack"]
    }
    for name, site in latent_sites(sites).items():
        if of_data and not of_data & {frame.name for frame in site["cond_indep_stack"]}:
            return name
    return None


def latent_sites(model_sites: Sites) -> Sites:
    """Return the sites that the model does not observe."""
    return {name: site for name, site in model_sites.items() if not site["is_observed"]}


def site_family(site: Site) -> str:
    """Return the class name of a site's innermost base distribution."""
    *_, innermost = _layers(site)
    return type(innermost).__name__


def outer_family(site: Site) -> str:
    """Return the class name of a site's distribution inside `.to_event`, `.mask` and `.expand`."""
    return next(type(fn).__name__ for fn in _layers(site) if not isinstance(fn, _WRAPPERS))


def analytic_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """Return the masked KL(q ‖ p) of a latent site, in its batch shape, or None if it is unknown."""
    kl = registered_kl(guide_site, model_site)
    return None if kl is None or kl_invalid_reason(guide_site, model_site) else kl


def registered_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """Return the KL registered with torch, under the guide's mask as in `TraceMeanField_ELBO`, or None.

    It may be wrong for the site; see `kl_invalid_reason`.
    """
    try:
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(torch.as_tensor(kl), 1.0, guide_site["mask"])


def kl_invalid_reason(guide_site: Site, model_site: Site) -> str | None:
    """Explain why a site's registered KL differs from its E[log q − log p], or return None if it does not."""
    pairs = zip_longest(_masks(guide_site), _masks(model_site), fillvalue=(None, 0))
    if not all(mask is other or _same_mask(mask, other) for (mask, _), (other, _) in pairs):
        return "guide and model have different masks, but a KL applies only one"
    *_, innermost = _layers(guide_site)
    if isinstance(innermost, Delta) and innermost.log_density.any():
        return "the guide's Delta has a log_density, which its KL leaves out"
    q, p = guide_site["scale"], model_site["scale"]
    if not same_scale(q, p):
        return (
            f"the guide is scaled by {q} and the model by {p}, but its KL by the guide's scale alone (to "
            "weight the KL, use KLWeighted)"
        )
    return None


def check_plates(guide_sites: Sites, model_sites: Sites) -> None:
    """Raise if a site's plate has different names in guide and model.

    Pyro treats these as two plates. `Trace_ELBO` is unaffected; `TraceEnum_ELBO` counts terms repeatedly.
    """
    for name, q in guide_sites.items():
        if name not in model_sites:
            continue
        frames = zip(vectorized_plates(q), vectorized_plates(model_sites[name]), strict=False)
        for guide, model in frames:
            if guide.dim == model.dim and guide.name != model.name:
                raise ValueError(
                    f"the guide's site {name!r} lies in the plate {guide.name!r}, the model's in "
                    f"{model.name!r}: rename the guide's to {model.name!r}, as Pyro matches plates by name"
                )


def data_plate(guide_sites: Sites, model_sites: Sites, *, max_plate_nesting: int, ignore: str) -> Any:
    """Return the plate that contains all sites, the rightmost of several; `ignore` is the particle plate."""
    frames = {
        where: {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name != ignore}
        for where, site in _labelled(guide_sites, model_sites)
    }
    for where, plates in frames.items():
        for frame in plates.values():
            if frame.dim < -max_plate_nesting:
                raise ValueError(
                    f"{where} lies in the plate {frame.name!r} at dim={frame.dim}; set "
                    f"max_plate_nesting={-frame.dim}, so that the particle plate stays left of it"
                )
    everywhere = set.intersection(*(set(plates) for plates in frames.values()))
    if everywhere:
        shared = [frame for name, frame in next(iter(frames.values())).items() if name in everywhere]
        return max(shared, key=lambda frame: frame.dim)

    check_plates(guide_sites, model_sites)
    counts = {name: sum(name in plates for plates in frames.values()) for p in frames.values() for name in p}
    if not counts:
        raise NotSeparableError(
            "no site lies in a plate, so that examples cannot be separated: draw the sites of the model and "
            'the guide inside `with pyro.plate("data", len(x)):`'
        )
    observed = {  # plates around data, rather than around components of the model
        name for where, site in _labelled({}, model_sites) if site["is_observed"] for name in frames[where]
    }
    plate = max(counts, key=lambda name: (name in observed, counts[name]))
    outside = [where for where, plates in frames.items() if plate not in plates]
    raise NotSeparableError(
        f"{outside[0]} lies outside the data plate {plate!r}: all examples would share it, so that terms per "
        "example do not exist. Draw it inside the plate; or train with pyro.infer.Trace_ELBO, and let "
        "evaluate give the ELBO of the whole"
    )


def shared_scale(guide_sites: Sites, model_sites: Sites, num_data: int) -> float | Tensor:
    """Return the scale shared by all sites, a number or (N,); raise if they differ."""
    (first, site), *others = _labelled(guide_sites, model_sites)
    scale = site["scale"]
    for where, other in others:
        if not same_scale(scale, other["scale"]):
            raise ValueError(
                f"{first} is scaled by {scale} and {where} by {other['scale']}: their sum is not a log "
                "density. Scale model and guide as a whole, weight the KL with KLWeighted, and subsample "
                "only the data plate"
            )
    if isinstance(scale, Tensor) and scale.numel() > 1 and scale.shape != (num_data,):
        raise ValueError(f"a scale must be a number or have shape ({num_data},); got {tuple(scale.shape)}")
    return scale


def _labelled(guide_sites: Sites, model_sites: Sites) -> list[tuple[str, Site]]:
    return [(f"the guide's site {name!r}", site) for name, site in guide_sites.items()] + [
        (f"the model's site {name!r}", site) for name, site in model_sites.items()
    ]


def _layers(site: Site) -> Iterator[Any]:
    """Yield a site's distribution and its nested base distributions, outermost first."""
    fn = site["fn"]
    yield fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        yield fn


def _masks(site: Site) -> list[tuple[Mask, int]]:
    """Return a site's masks, that of `poutine.mask` first, each with the number of event dims it lacks."""
    masked = (fn for fn in _layers(site) if isinstance(fn, MaskedDistribution))
    return [(site["mask"], site["fn"].event_dim), *((fn._mask, fn.event_dim) for fn in masked)]


def joint_mask(site: Site) -> Tensor:
    """Return all masks of a site as a mask that broadcasts against its values."""
    joint = torch.tensor(True)
    for mask, event_dim in _masks(site):
        if mask is not None:
            tensor = torch.as_tensor(mask)
            joint = joint.to(tensor.device) & tensor.reshape(tensor.shape + (1,) * event_dim).bool()
    return joint


def same_masks(a: Site, b: Site) -> bool:
    """Return whether two sites count the same values."""
    pairs = list(zip_longest(_masks(a), _masks(b), fillvalue=(None, 0)))
    if all(mask is other for (mask, _), (other, _) in pairs) and a["fn"].event_dim == b["fn"].event_dim:
        return True  # without a look at values, which would wait for the device
    return _same_mask(joint_mask(a), joint_mask(b))


def _same_mask(a: Mask, b: Mask) -> bool:
    a, b = (torch.as_tensor(True if mask is None else mask) for mask in (a, b))
    try:
        return bool((a == b.to(a.device)).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def same_scale(a: float | Tensor, b: float | Tensor) -> bool:
    """Return whether two scales are equal, up to rounding: plates multiply and divide by their size."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = (torch.as_tensor(scale, dtype=torch.get_default_dtype()) for scale in (a, b))
        return bool(torch.isclose(a, b.to(a.device)).all())
    return math.isclose(a, b)


def has_no_density(site: Site) -> bool:
    """Return whether a site is a Delta whose log density is 0, whatever its mask and scale."""
    *layers, innermost = _layers(site)
    plain = all(isinstance(fn, _WRAPPERS) for fn in layers)
    return plain and isinstance(innermost, Delta) and not innermost.log_density.any()


def draw_sources(
    program: Program, data: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, frozenset[str]]:
    """Run a program once more and return the sites that each of its values is computed from."""
    with torch.random.fork_rng(), torch.no_grad(), poutine.block(), TrackProvenance():
        trace = run(program, data, kwargs)
    return {name: get_provenance(site["value"]) for name, site in sample_sites(trace).items()}


def vectorized_plates(site: Site) -> list[Any]:
    """Return the vectorized plates of a site, as Pyro's frames, outermost first."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda frame: frame.dim)


def plate_nesting(*traces: poutine.Trace) -> int:
    """Return the number of dimensions that the plates of traces take."""
    sites = (site for trace in traces for site in sample_sites(trace).values())
    return max((-frame.dim for site in sites for frame in vectorized_plates(site)), default=0)


def masked_log_prob(site: Site, value: Tensor) -> Tensor:
    """Return the log density of a value under a site's distribution, masked but not scaled."""
    return scale_and_mask(site["fn"].log_prob(value), 1.0, site["mask"])
