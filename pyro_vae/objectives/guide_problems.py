"""Model-guide mismatches as messages: site, expected, found, fix.

Notation: p is a site of the model, q the guide's site of the same name.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.objectives.sites import (
    Site,
    Sites,
    has_no_density,
    joint_mask,
    latent_sites,
    outer_family,
    same_masks,
    same_scale,
    vectorized_plates,
)
from pyro_vae.utils.validation import (
    elementwise_support,
    first_outside,
    known_support,
    outside_support,
    same_support,
)

__all__ = [
    "explain_failure",
    "mask_problems",
    "name_problems",
    "non_finite_inputs",
    "parameters",
    "plates",
    "problems",
    "scale_problems",
    "subsample_problems",
    "support",
    "validated_support",
    "value_problem",
]

_FIXED_SET = (
    "(train a guide with parameters per example on the whole data set at once: "
    "fit(..., batch_size=len(data)))"
)
_NUM_DRAWS = 1000  # with which supports are compared
_PLATE_MISMATCH = r"Shape mismatch inside plate\('(.*)'\) at site (.*) dim (-\d+), (\d+) vs (\d+)"


def explain_failure(error: Exception, trace: poutine.Trace, waiting: list[str], data: Iterable[Any]) -> str:
    """Explain why a guide raised an error.

    Args:
        error: The error.
        trace: The sites sampled before the error.
        waiting: Latent sites of the model that the guide had not sampled before the error.
        data: Arguments of the guide.
    """
    mismatch = re.match(_PLATE_MISMATCH, str(error))
    if mismatch:
        plate, site, dim, expected, found = mismatch.groups()
        return (
            f"the guide's site {site!r} has {found} entries at dim {dim} of its batch shape, expected "
            f"{expected}, one per example in the plate {plate!r}: declare the dimensions of an example as "
            f"event dimensions with .to_event(1), or return one entry per example {_FIXED_SET}"
        )
    before = f" before it draws {waiting[0]!r}" if waiting else ""
    tensors = [value for value in data if isinstance(value, Tensor)]
    shapes = ", ".join(f"{tuple(x.shape)} ({x.dtype}, {x.device})" for x in tensors)
    given = f", given data of shape {shapes}," if tensors else ""
    message = f"the guide fails{before}{given} with {type(error).__name__}: {error}"
    for parameter, stored in parameters(trace).items():
        name = stored.replace("$$$", ".")  # as pyro.module stores it
        for x in tensors:
            if x.device != parameter.device:
                return (
                    f"{message}\nIts parameter {name!r} is on {parameter.device}: move the guide or the data"
                )
            if x.is_floating_point() and x.dtype != parameter.dtype:
                return (
                    f"{message}\nIts parameter {name!r} is {parameter.dtype}: convert it and all others of "
                    f"another dtype than the data, by .to({x.dtype}) of their modules; or, if the model has "
                    f"{parameter.dtype} too, the data"
                )
    about_shapes = isinstance(error, RuntimeError) and re.search(r"shape|size|dim", str(error))  # torch's
    return message + "\nReshape or flatten the data to the shape its network expects" * bool(about_shapes)


def problems(
    model_sites: Sites,
    guide_sites: Sites,
    returned: Any = None,
    *,
    enumerated: Collection[int] = (),
    model_failed: bool = False,
) -> Iterator[str]:
    """Yield a message for each mismatch between the sample sites of a guide and a model run at its draws.

    Args:
        model_sites: Sample sites of the model.
        guide_sites: Sample sites of the guide.
        returned: Return value of the guide.
        enumerated: Batch dimensions that enumerate sites, counted from the right, negative.
        model_failed: Whether the model raised an error after these sites: the mismatches may explain it.
    """
    if not model_failed:
        yield from name_problems(model_sites, guide_sites, returned)
    latent = latent_sites(model_sites)
    renamed = _renamed(latent, model_sites, guide_sites)
    for name, q in guide_sites.items():
        p = latent.get(renamed.get(name, name))
        if p is not None:
            yield from _site_problems(f"the guide's site {name!r}", p, q, enumerated)
            if model_failed:
                yield from _type_problems(f"the guide's site {name!r}", p, q)


def name_problems(model_sites: Sites, guide_sites: Sites, returned: Any = None) -> Iterator[str]:
    """Yield a message for each unmatched latent site, and for each observed site that the guide samples.

    Arguments as for `problems`.
    """
    latent = latent_sites(model_sites)
    observed = [name for name, q in guide_sites.items() if q["is_observed"] and name not in model_sites]
    if observed and len(latent) == len(model_sites):
        yield f"the guide observes {observed[0]!r}, the model nothing: model and guide are exchanged"
        return
    renamed = _renamed(latent, model_sites, guide_sites)
    for name, p in latent.items():
        if name not in guide_sites and name not in renamed.values():
            yield _missing_site(name, p, guide_sites, returned)
    for name, q in guide_sites.items():
        if q["infer"].get("is_auxiliary") and name not in latent:
            continue  # such as a factor of an observed value, which Pyro's CEVAE names as the model does
        if name in renamed:
            expected = renamed[name]
            yield f"the guide draws {name!r}, expected {expected!r}: rename {name!r} to {expected!r}"
        elif name in model_sites and name not in latent:
            yield f"the guide draws {name!r}, which the model observes: remove the site from the guide"
        elif name not in model_sites:
            yield (
                f"the guide draws {name!r}, which the model does not; expected "
                f"{', '.join(map(repr, latent))}: rename or remove it, or mark it with "
                'infer={"is_auxiliary": True} if it is an auxiliary variable of the guide'
            )


def subsample_problems(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Iterator[str]:
    """Yield a message for each guide plate that subsamples other data than the model, as its name differs."""
    p, q = _subsamples(model_trace), _subsamples(guide_trace)
    for name in (name for name in q if name not in p):
        size, drawn = q[name]
        others = [other for other in p if other not in q and p[other][0] == size > len(p[other][1])]
        shared = any(torch.equal(drawn, p[other][1]) for other in others)
        if size > len(drawn) and others and not shared:
            yield (
                f"the guide's plate {name!r} subsamples {len(drawn)} of {size} examples, the model's "
                f"{others[0]!r} others, as plates share a subsample by name: rename {name!r} to {others[0]!r}"
            )


def mask_problems(
    model_sites: Sites, guide_sites: Sites, sources: Callable[[], dict[str, frozenset[str]]]
) -> Iterator[str]:
    """Yield a message for each latent site that guide and model mask differently: their bounds are wrong.

    A Delta passes, as its log density is 0 with any mask, unless its value comes from auxiliary draws.

    Args:
        model_sites: Sample sites of the model.
        guide_sites: Sample sites of the guide.
        sources: Returns the sites that each value of the guide is computed from; see `draw_sources`.
    """
    for name, p in latent_sites(model_sites).items():
        q = guide_sites.get(name)
        if q is None or same_masks(q, p):
            continue
        auxiliary = _auxiliary_sources(name, guide_sites, sources)
        unlike = [other for other in auxiliary if not same_masks(guide_sites[other], p)]
        if has_no_density(q) and not unlike:
            continue
        where = f"the guide's site {name!r}"
        if has_no_density(q):
            q, where = guide_sites[unlike[0]], f"{where}, drawn through {unlike[0]!r},"
        yield (
            f"{where} has {_shown_mask(q)}, the model's has {_shown_mask(p)}: a value that counts in one of "
            "them makes every bound wrong: put the same mask around both, `with poutine.mask(mask=...):`"
            + " (Pyro's automatic guides put none: write the guide as a function)"
            * bool(unlike)
        )


def scale_problems(
    model_sites: Sites, guide_sites: Sites, sources: Callable[[], dict[str, frozenset[str]]]
) -> Iterator[str]:
    """Yield a message for each latent site that guide and model scale differently; see `mask_problems`."""
    for name, p in latent_sites(model_sites).items():
        q = guide_sites.get(name)
        if q is None or same_scale(q["scale"], p["scale"]):
            continue
        if has_no_density(q) and not _auxiliary_sources(name, guide_sites, sources):
            continue
        yield (
            f"the guide's site {name!r} is scaled by {q['scale']}, the model's by {p['scale']}: their sum is "
            "not a log density. Scale model and guide as a whole, or weight the KL with KLWeighted"
        )


def _auxiliary_sources(
    name: str, guide_sites: Sites, sources: Callable[[], dict[str, frozenset[str]]]
) -> list[str]:
    """Return the auxiliary sites of a guide from which a site's value is computed."""
    auxiliary = [other for other, site in guide_sites.items() if site["infer"].get("is_auxiliary")]
    found = sources()[name] if auxiliary else ()
    return [other for other in auxiliary if other in found]


def _shown_mask(site: Site) -> str:
    mask = joint_mask(site)
    if mask.all():
        return "no mask"
    index, _ = _first_entry(~mask, mask)
    return (
        f"a mask that counts {int(mask.sum())} of {mask.numel()} values and is first False at index {index}"
    )


def _subsamples(trace: poutine.Trace) -> dict[str, tuple[int, Tensor]]:
    """Return the size and the subsampled indices of each plate, by name."""
    return {
        name: (site["fn"].size, torch.as_tensor(site["value"]))
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site)
    }


def non_finite_inputs(trace: poutine.Trace, data: Iterable[Any]) -> Iterator[str]:
    """Yield a message for each infinite or NaN input or parameter of a guide: a cause of other problems."""
    tensors = [("the data", "are", value) for value in data if isinstance(value, Tensor)]
    tensors += [(f"its parameter {name!r}", "is", value) for value, name in parameters(trace).items()]
    for what, verb, value in tensors:
        wrong = ~torch.isfinite(value)
        if wrong.any():
            index, found = _first_entry(wrong, value)
            yield f"{what}, of shape {tuple(value.shape)}, {verb} {found} at index {index}"


def parameters(*traces: poutine.Trace) -> dict[Tensor, str]:
    """Return the parameters of Pyro's "param" sites with their names, the first of several."""
    found: dict[Tensor, str] = {}
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "param":
                found.setdefault(site["value"].unconstrained(), name)
    return found


def plates(site: Site) -> list[tuple[str, int, int]]:
    """Return name, dimension and size of each plate of a site, outermost first."""
    return [(frame.name, frame.dim, frame.size) for frame in vectorized_plates(site)]


def support(site: Site) -> constraints.Constraint | None:
    """Return the constraint on each element of a site's value, or None if it is unknown."""
    found = known_support(site["fn"])
    return found and elementwise_support(found)


def validated_support(site: Site) -> constraints.Constraint | None:
    """Return the support in which all of a site's values must lie, or None if some need not.

    Where Pyro's validation is off, none need.
    """
    fn = site["fn"]
    while fn is not None:
        if not fn._validate_args and fn._validate_args is not None:
            return None
        fn = getattr(fn, "base_dist", None)
    return known_support(site["fn"]) if joint_mask(site).all() else None


def value_problem(name: str, site: Site) -> str | None:
    """Return a message if the value of an observed site has another shape, or lies outside the support."""
    fn, value = site["fn"], site["value"]
    if value.numel() == 0:
        return None  # a factor has none
    family = outer_family(site)
    try:
        torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)
    except RuntimeError:
        return (
            f"the model's site {name!r} observes a value of shape {tuple(value.shape)}, expected one of "
            f"{_shapes(site)}, as its {family} has: reshape the value, or declare event dimensions with "
            ".to_event(...)"
        )
    support = validated_support(site)
    outside = support and outside_support(name, value, family, support)
    return f"the model's site {name!r}: {outside}" if outside else None


def _renamed(latent: Sites, model_sites: Sites, guide_sites: Sites) -> dict[str, str]:
    """Map misspelt names of guide sites to the names of the model's sites of the same shapes."""
    missing = {name: p for name, p in latent.items() if name not in guide_sites}
    extra = {
        name: q
        for name, q in guide_sites.items()
        if name not in model_sites and not q["infer"].get("is_auxiliary")
    }
    intended: dict[str, str] = {}
    for name, q in extra.items():
        names = [other for other, p in missing.items() if _shapes(p) == _shapes(q)]
        names = [other for other in names if other not in intended.values()]
        if len(missing) > 1 or len(extra) > 1:
            names = difflib.get_close_matches(name, names, n=1)
        if names:
            intended[name] = names[0]
    return intended


def _missing_site(name: str, p: Site, guide_sites: Sites, returned: Any) -> str:
    message = f"the guide has no site {name!r}, expected one of {_shapes(p)} as in the model"
    if p["infer"].get("enumerate"):
        message += " (for a site that the model enumerates, use TraceEnum_ELBO)"
    if guide_sites or returned is None:
        return (
            f"{message}: add pyro.sample({name!r}, ...) to it, or rename one of its sites "
            f"{list(guide_sites)}; or, if {name!r} is data, pass them in the model as obs="
        )
    return (
        f"{message}; it returned a {type(returned).__name__}: return a distribution, such as "
        f"dist.Normal(loc, scale).to_event(1), or call pyro.sample({name!r}, ...)"
    )


def _site_problems(where: str, p: Site, q: Site, enumerated: Collection[int]) -> Iterator[str]:
    invalid = _invalid_parameter(q["fn"])
    if invalid:
        yield f"{where}: {invalid}"
        return
    same_plates = _same_plates(p, q)
    if not same_plates:
        missing = [plate for plate in plates(p) if plate not in plates(q)] or plates(p)
        inside = " and ".join(f'`with pyro.plate("{plate}", {size}):`' for plate, _, size in missing)
        fix = f"draw it inside {inside}" if inside else "draw it outside all plates"
        if [plate[:2] for plate in plates(p)] == [plate[:2] for plate in plates(q)]:
            fix += f" {_FIXED_SET}"
        yield f"{where} lies in plates {plates(q)}, expected {plates(p)} (name, dim, size): {fix}"
    if p["fn"].event_shape != q["fn"].event_shape:
        fewer_dims = q["fn"].event_dim < p["fn"].event_dim
        fix = (
            "add .to_event(1)" if fewer_dims else "give guide and model the same number of latent dimensions"
        )
        yield f"{where} has {_shapes(q)}, expected {_shapes(p)} as in the model: {fix}"
    elif same_plates and _plate_shape(p, enumerated) != _plate_shape(q, enumerated):
        yield (
            f"{where} has {_shapes(q)}, expected {_shapes(p)} as in the model: draw once per example, or "
            "declare the other dimensions as event dimensions with .to_event(1)"
        )
    elif same_plates:
        yield from _subsampling_problems(where, p, q)
        yield from _draw_problems(where, p, q)


def _subsampling_problems(where: str, p: Site, q: Site) -> Iterator[str]:
    for model, guide in zip(vectorized_plates(p), vectorized_plates(q), strict=True):
        if model.full_size != guide.full_size and not same_scale(p["scale"], q["scale"]):
            fix = "give the plate the model's size"
            if guide.size < model.full_size:
                fix += f" and subsample_size, {model.full_size} and {model.size}"
            if guide.size == guide.full_size:
                fix += f" {_FIXED_SET}"
            yield (
                f"{where} is scaled to {guide.full_size} examples by its plate {guide.name!r}, expected "
                f"{model.full_size} as in the model: {fix}"
            )


def _same_plates(p: Site, q: Site) -> bool:
    frames = [[(frame.dim, frame.size) for frame in vectorized_plates(site)] for site in (p, q)]
    return len(frames[0]) == len(frames[1]) and all(
        dim == other_dim and (size == other or -1 in (size, other))  # -1: a plate of any size
        for (dim, size), (other_dim, other) in zip(*frames, strict=True)
    )


def _plate_shape(site: Site, enumerated: Collection[int]) -> tuple[int, ...]:
    """Return a site's batch shape without the dimensions that enumerate sites."""
    shape = tuple(site["fn"].batch_shape)
    if not enumerated:
        return shape
    kept = [1 if axis - len(shape) in enumerated else size for axis, size in enumerate(shape)]
    while kept[:1] == [1]:
        del kept[0]
    return tuple(kept)


def _draw_problems(where: str, p: Site, q: Site) -> Iterator[str]:
    value = q["value"]
    if not torch.isfinite(value).all():
        index, found = _first_entry(~torch.isfinite(value), value)
        yield f"{where} draws {found} at index {index}, expected finite values: inspect its network's output"
        return
    fix = "use a distribution with that support, or transform one to it"
    family = f"the model's {outer_family(p)}"
    expected, own = known_support(p["fn"]), known_support(q["fn"])
    if expected is None or same_support(expected, own):
        return
    if own is not None and own.is_discrete and not expected.is_discrete:
        yield f"{where} has support {support(q)}, expected {support(p)} as {family}: {fix}"
        return
    for draws in (value, _more_draws(q["fn"], num_batch_dims=len(p["fn"].batch_shape))):
        outside = first_outside("its draw", draws, family, expected)
        if outside:
            yield f"{where}: {outside}: {fix}"
            return


def _more_draws(fn: Any, *, num_batch_dims: int) -> Tensor:
    """Draw about a thousand values, in a dimension left of `num_batch_dims` batch dimensions."""
    shape = (*fn.batch_shape, *fn.event_shape)
    missing = max(num_batch_dims - len(fn.batch_shape), 0)
    try:
        draws = fn.sample(torch.Size([_NUM_DRAWS // max(math.prod(shape), 1)]))
    except NotImplementedError:  # some distributions make single draws only
        draws = fn.sample()[None]
    return draws.reshape(len(draws), *[1] * missing, *shape)


def _type_problems(where: str, p: Site, q: Site) -> Iterator[str]:
    """Yield a message if the draws of the guide have another type than those of the model."""
    try:
        value, expected = q["value"], p["fn"].sample()
    except NotImplementedError:  # an improper prior
        return
    if (value.dtype, value.device) != (expected.dtype, expected.device):
        yield (
            f"{where} draws {value.dtype} on {value.device}, expected {expected.dtype} on {expected.device} "
            "as in the model: convert or move one of them with .to(...)"
        )


def _shapes(site: Site) -> str:
    return f"batch shape {tuple(site['fn'].batch_shape)} and event shape {tuple(site['fn'].event_shape)}"


def _invalid_parameter(fn: Any) -> str | None:
    """Return a message for the first parameter of a distribution that violates its constraint, or None."""
    for inner in ("base_dist", "component_distribution", "mixture_distribution"):
        found = _invalid_parameter(getattr(fn, inner)) if hasattr(fn, inner) else None
        if found:
            return found
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        value = fn.__dict__.get(name)  # absent: a lazy property, derived from the others
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        valid = constraint.check(value)
        if valid.all():
            continue
        where = f"the {name} of its {type(fn).__name__}, of shape {tuple(value.shape)},"
        if torch.isnan(value).any():
            index, _ = _first_entry(torch.isnan(value), value)
            return f"{where} is nan at index {index}: inspect the data and its network's output"
        event_dims = value.dim() - valid.dim()  # which the constraint checks jointly
        index, entry = _first_entry(~valid.reshape(valid.shape + (1,) * event_dims).expand_as(value), value)
        fix = "; pass the network's output through pyro_vae.networks.positive" if "scale" in name else ""
        return f"{where} must satisfy {constraint}; found {entry:.6g} at index {index}{fix}"
    return None


def _first_entry(wrong: Tensor, value: Tensor) -> tuple[list[int], float]:
    index = wrong.nonzero()[0].tolist()
    return index, value[tuple(index)].item()
