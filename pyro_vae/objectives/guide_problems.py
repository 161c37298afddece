"""How a guide can fail to fit a model, each told in a sentence: site, expected, found, remedy.

p is a site of the model, q the guide's of the same name.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.objectives.sites import Site, Sites, same_scale, site_family, vectorized_plates
from pyro_vae.utils.validation import elementwise_support

__all__ = [
    "explain_failure",
    "latent_sites",
    "name_problems",
    "not_finite",
    "parameters",
    "plates",
    "problems",
    "separate_subsamples",
    "support",
]

_FIXED_SET = (
    "(a guide with parameters for each datum of a fixed set goes with SVI on that whole set, not with fit, "
    "which shuffles)"
)
_PLATE_MISMATCH = r"Shape mismatch inside plate\('(.*)'\) at site (.*) dim (-\d+), (\d+) vs (\d+)"


def explain_failure(error: Exception, trace: poutine.Trace, waiting: list[str], data: Iterable[Any]) -> str:
    """Tell why a guide raised an error.

    Args:
        error: What it raised.
        trace: Its sites until then.
        waiting: The model's latent sites that it had not drawn yet.
        data: Its arguments.
    """
    mismatch = re.match(_PLATE_MISMATCH, str(error))
    if mismatch:
        plate, site, dim, expected, found = mismatch.groups()
        return (
            f"the guide's site {site!r} has {found} entries at dim {dim} of its batch shape, expected "
            f"{expected}, one for each datum in the plate {plate!r}: make what belongs to a datum its event "
            f"shape, by .to_event(1), or give as many entries as there are data {_FIXED_SET}"
        )
    before = f" before it draws {waiting[0]!r}" if waiting else ""
    tensors = [value for value in data if isinstance(value, Tensor)]
    shapes = ", ".join(f"{tuple(x.shape)} ({x.dtype}, {x.device})" for x in tensors)
    given = f", given data of shape {shapes}," if tensors else ""
    message = f"the guide fails{before}{given} with {type(error).__name__}: {error}"
    for parameter, name in parameters(trace).items():
        for x in tensors:
            if x.device != parameter.device:
                return (
                    f"{message}\nIts parameter {name!r} is on {parameter.device}: move the guide or the data"
                )
            if x.is_floating_point() and x.dtype != parameter.dtype:
                return (
                    f"{message}\nIts parameter {name!r} is {parameter.dtype}: convert it, guide.to({x.dtype})"
                )
    about_shapes = isinstance(error, RuntimeError) and re.search(r"shape|size|dim", str(error))  # torch's
    return f"{message}\nReshape or flatten the data as its network expects them" if about_shapes else message


def problems(model_sites: Sites, guide_sites: Sites, returned: Any = None) -> Iterator[str]:
    """Describe each mismatch between the sites of a model and those of a guide run on the same data.

    Args:
        model_sites: The model's sample sites.
        guide_sites: The guide's.
        returned: What the guide returned.
    """
    yield from name_problems(model_sites, guide_sites, returned)
    latent = latent_sites(model_sites)
    renamed = _renamed(latent, model_sites, guide_sites)
    for name, q in guide_sites.items():
        p = latent.get(renamed.get(name, name))
        if p is not None:
            yield from _site_problems(f"the guide's site {name!r}", p, q)


def name_problems(model_sites: Sites, guide_sites: Sites, returned: Any = None) -> Iterator[str]:
    """Describe the sites that only one of the two has, or that the guide draws and the model observes.

    Arguments as for `problems`.
    """
    latent = latent_sites(model_sites)
    renamed = _renamed(latent, model_sites, guide_sites)
    for name, p in latent.items():
        if name not in guide_sites and name not in renamed.values():
            yield _missing(name, p, guide_sites, returned)
    for name, q in guide_sites.items():
        if name in renamed:
            expected = renamed[name]
            yield f"the guide draws {name!r}, expected {expected!r}: rename {name!r} to {expected!r}"
        elif name in model_sites and name not in latent:
            yield f"the guide draws {name!r}, which the model observes: remove the site from the guide"
        elif name not in model_sites and not q["infer"].get("is_auxiliary"):
            yield (
                f"the guide draws {name!r}, which the model does not; expected "
                f"{', '.join(map(repr, latent))}: rename or remove it, or mark it by "
                'infer={"is_auxiliary": True} if it is part of how the guide draws'
            )


def separate_subsamples(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Iterator[str]:
    """Tell of plates in which a guide draws other data than the model, for they differ in name."""
    p, q = _subsamples(model_trace), _subsamples(guide_trace)
    for name in (name for name in q if name not in p):
        size, drawn = q[name]
        others = [other for other in p if other not in q and p[other][0] == size > len(p[other][1])]
        shared = any(torch.equal(drawn, p[other][1]) for other in others)
        if size > len(drawn) and others and not shared:
            yield (
                f"the guide's plate {name!r} draws {len(drawn)} of {size} data, the model's {others[0]!r} "
                f"draws others, as plates share them by name: rename {name!r} to {others[0]!r}"
            )


def _subsamples(trace: poutine.Trace) -> dict[str, tuple[int, Tensor]]:
    """From each plate's name to its size, and which of its data were drawn."""
    return {
        name: (site["fn"].size, torch.as_tensor(site["value"]))
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site)
    }


def not_finite(trace: poutine.Trace, data: Iterable[Any]) -> Iterator[str]:
    """Tell which data or parameters of a guide are infinite or NaN: its other faults may come of that."""
    tensors = [("the data", "are", value) for value in data if isinstance(value, Tensor)]
    tensors += [(f"its parameter {name!r}", "is", value) for value, name in parameters(trace).items()]
    for what, verb, value in tensors:
        wrong = ~torch.isfinite(value)
        if wrong.any():
            index, found = _first_entry(wrong, value)
            yield f"{what}, of shape {tuple(value.shape)}, {verb} {found} at index {index}"


def latent_sites(model_sites: Sites) -> Sites:
    """The sites that the model does not observe."""
    return {name: site for name, site in model_sites.items() if not site["is_observed"]}


def parameters(*traces: poutine.Trace) -> dict[Tensor, str]:
    """The parameters that Pyro's statements show, and their names, of several the first."""
    found: dict[Tensor, str] = {}
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "param":
                found.setdefault(site["value"].unconstrained(), name)
    return found


def plates(site: Site) -> list[tuple[str, int, int]]:
    """Name, dimension and size of each plate that a site lies in, the outermost first."""
    return [(frame.name, frame.dim, frame.size) for frame in vectorized_plates(site)]


def support(site: Site) -> constraints.Constraint | None:
    """The constraint on each element of a draw, or None where it is not known."""
    try:
        return elementwise_support(site["fn"].support)
    except NotImplementedError:
        return None


def _renamed(latent: Sites, model_sites: Sites, guide_sites: Sites) -> dict[str, str]:
    """From names that only the guide has to those of the model's sites, of the same shapes, that it meant."""
    missing = {name: p for name, p in latent.items() if name not in guide_sites}
    extra = {
        name: q
        for name, q in guide_sites.items()
        if name not in model_sites and not q["infer"].get("is_auxiliary")
    }
    meant: dict[str, str] = {}
    for name, q in extra.items():
        names = [other for other, p in missing.items() if _shapes(p) == _shapes(q)]
        names = [other for other in names if other not in meant.values()]
        if len(missing) > 1 or len(extra) > 1:
            names = difflib.get_close_matches(name, names, n=1)
        if names:
            meant[name] = names[0]
    return meant


def _missing(name: str, p: Site, guide_sites: Sites, returned: Any) -> str:
    message = f"the guide has no site {name!r}, expected one of {_shapes(p)} as in the model"
    if p["infer"].get("enumerate"):
        message += " (a site that the model enumerates goes with TraceEnum_ELBO)"
    if guide_sites or returned is None:
        return (
            f"{message}: add pyro.sample({name!r}, ...) to it, or rename one of its sites {list(guide_sites)}"
        )
    return (
        f"{message}; it returned a {type(returned).__name__}: return a distribution, such as "
        f"dist.Normal(loc, scale).to_event(1), or draw by pyro.sample({name!r}, ...)"
    )


def _site_problems(where: str, p: Site, q: Site) -> Iterator[str]:
    invalid = _invalid_parameter(q["fn"])
    if invalid:
        yield f"{where}: {invalid}"
        return
    same_plates = [plate[1:] for plate in plates(p)] == [plate[1:] for plate in plates(q)]
    if not same_plates:
        inside = " and ".join(f'`with pyro.plate("{plate}", {size}):`' for plate, _, size in plates(p))
        remedy = f"draw it inside {inside}" if inside else "draw it outside of plates"
        if [plate[:2] for plate in plates(p)] == [plate[:2] for plate in plates(q)]:
            remedy += f" {_FIXED_SET}"
        yield f"{where} lies in plates {plates(q)}, expected {plates(p)} (name, dim, size): {remedy}"
    if p["fn"].event_shape != q["fn"].event_shape:
        fewer_dims = q["fn"].event_dim < p["fn"].event_dim
        remedy = "add .to_event(1)" if fewer_dims else "give guide and model the same latent size"
        yield f"{where} has {_shapes(q)}, expected {_shapes(p)} as in the model: {remedy}"
    elif same_plates and p["fn"].batch_shape != q["fn"].batch_shape:
        yield (
            f"{where} has {_shapes(q)}, expected {_shapes(p)} as in the model: draw once for each datum, or "
            "make the rest event shape, by .to_event(1)"
        )
    elif same_plates:
        yield from _subsampling_problems(where, p, q)
        yield from _draw_problems(where, p, q)


def _subsampling_problems(where: str, p: Site, q: Site) -> Iterator[str]:
    for model, guide in zip(vectorized_plates(p), vectorized_plates(q), strict=True):
        if model.full_size != guide.full_size and not same_scale(p["scale"], q["scale"]):
            yield (
                f"{where} is scaled to {guide.full_size} data by its plate {guide.name!r}, expected "
                f"{model.full_size} as in the model: give the plate the size and the subsample_size that the "
                f"model's has, {model.full_size} and {model.size}"
            )


def _draw_problems(where: str, p: Site, q: Site) -> Iterator[str]:
    value, expected = q["value"], p["value"]
    if (value.dtype, value.device) != (expected.dtype, expected.device):
        yield (
            f"{where} draws {value.dtype} on {value.device}, expected {expected.dtype} on {expected.device} "
            "as in the model: convert or move one of them, by .to(...)"
        )
    elif not torch.isfinite(value).all():
        index, found = _first_entry(~torch.isfinite(value), value)
        yield f"{where} draws {found} at index {index}, expected finite values: look at its network's output"
    elif not _covers(support(p), support(q)):
        yield (
            f"{where} draws from {support(q)}, expected {support(p)} as the model's {site_family(p)} has it: "
            "choose a distribution of that support, or transform one to it"
        )


def _shapes(site: Site) -> str:
    return f"batch shape {tuple(site['fn'].batch_shape)} and event shape {tuple(site['fn'].event_shape)}"


def _covers(p: constraints.Constraint | None, q: constraints.Constraint | None) -> bool:
    """Whether a model of support p can have made what a guide of support q draws, as far as is known."""
    if p is None or q is None or str(p) == str(q):
        return True
    return str(p) == str(constraints.real) and not q.is_discrete


def _invalid_parameter(fn: Any) -> str | None:
    """Describe the first parameter of a distribution that breaks its constraint."""
    for inner in ("base_dist", "component_distribution", "mixture_distribution"):
        found = _invalid_parameter(getattr(fn, inner)) if hasattr(fn, inner) else None
        if found:
            return found
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        value = fn.__dict__.get(name)  # what is not there is derived from what was given
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        valid = constraint.check(value)
        if valid.all():
            continue
        where = f"the {name} of its {type(fn).__name__}, of shape {tuple(value.shape)},"
        if torch.isnan(value).any():
            index, _ = _first_entry(torch.isnan(value), value)
            return f"{where} is nan at index {index}: look at the data, and at what its network computes"
        event_dims = value.dim() - valid.dim()  # which the constraint judges together
        index, entry = _first_entry(~valid.reshape(*valid.shape, *[1] * event_dims).expand_as(value), value)
        remedy = "; pass the network's output through pyro_vae.networks.positive" if "scale" in name else ""
        return f"{where} must satisfy {constraint}; found {entry:.6g} at index {index}{remedy}"
    return None


def _first_entry(wrong: Tensor, value: Tensor) -> tuple[list[int], float]:
    index = wrong.nonzero()[0].tolist()
    return index, value[tuple(index)].item()
