"""A (model, guide) pair as a Pyro program: its sample sites, and what must hold between them.

A site is what Pyro records of one `pyro.sample`: its distribution, value, mask, scale and plates.
"""

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

__all__ = [
    "Program",
    "Site",
    "Sites",
    "analytic_kl",
    "check_plates",
    "data_plate",
    "kl_by_table",
    "kl_fault",
    "masked_log_prob",
    "require_programs",
    "run",
    "same_scale",
    "sample_sites",
    "shared_scale",
    "site_family",
    "vectorized_plates",
]

Program = Callable[..., Any]  # a Pyro model or guide
Site = dict[str, Any]
Sites = dict[str, Site]


def require_programs(call: str, *programs: Any) -> None:
    """Refuse what is no Pyro program, such as a VAE in place of its model and guide.

    Raises:
        TypeError: Which shows the right call.
    """
    for program in programs:
        without_forward = isinstance(program, nn.Module) and type(program).forward is nn.Module.forward
        if without_forward or not callable(program):
            got = type(program).__name__
            raise TypeError(f"expected a model and a guide, two Pyro functions; got {got}: call {call}")


def run(program: Program, data: tuple, kwargs: dict[str, Any]) -> poutine.Trace:
    """Run a model or guide and record its sites."""
    try:
        return poutine.trace(program).get_trace(*data, **kwargs)
    except ZeroDivisionError as error:
        if str(error) != "size cannot be zero":
            raise
        raise ValueError("a plate has size 0: the batch must hold at least one datum") from error


def sample_sites(trace: poutine.Trace) -> Sites:
    """Give the sample sites of a trace in order, but for the plates' own and the deterministic ones."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
    }


def site_family(site: Site) -> str:
    """Name the family of a site's distribution."""
    *_, innermost = _layers(site)
    return type(innermost).__name__


def analytic_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """KL of a latent site's two distributions, masked, in their batch shape; None where it is not known."""
    kl = kl_by_table(guide_site, model_site)
    return None if kl is None or kl_fault(guide_site, model_site) else kl


def kl_by_table(guide_site: Site, model_site: Site) -> Tensor | None:
    """KL by `kl_divergence` and the guide's mask, right or wrong, as `TraceMeanField_ELBO` takes it."""
    try:
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(torch.as_tensor(kl), 1.0, guide_site["mask"])


def kl_fault(guide_site: Site, model_site: Site) -> str | None:
    """Say why what `kl_divergence` gives for a site is not its E[log q − log p], if it is not."""
    masks = zip_longest(_masks(guide_site), _masks(model_site))
    if not all(mask is other or _same_mask(mask, other) for mask, other in masks):
        return "guide and model carry different masks, and its KL has but one"
    *_, innermost = _layers(guide_site)
    if isinstance(innermost, Delta) and innermost.log_density.any():
        return "the guide's Delta carries a log_density, which its KL leaves out"
    q, p = guide_site["scale"], model_site["scale"]
    if not same_scale(q, p):
        return (
            f"the guide is scaled by {q} and the model by {p}, and its KL by the guide's scale alone (for a "
            "weight on the KL, see KLWeighted)"
        )
    return None


def check_plates(guide_sites: Sites, model_sites: Sites) -> None:
    """Refuse a pair of which a site lies in a plate of one name in the guide, and of another in the model.

    Pyro takes them for two: `Trace_ELBO` adds up the same terms, `TraceEnum_ELBO` some of them several times.
    """
    for name, q in guide_sites.items():
        if name not in model_sites:
            continue
        frames = zip(vectorized_plates(q), vectorized_plates(model_sites[name]), strict=False)
        for guide, model in frames:
            if guide.dim == model.dim and guide.name != model.name:
                raise ValueError(
                    f"the guide's site {name!r} lies in the plate {guide.name!r}, the model's in "
                    f"{model.name!r}, and Pyro takes them for two: rename the guide's to {model.name!r}"
                )


def data_plate(guide_sites: Sites, model_sites: Sites, *, max_plate_nesting: int, ignore: str) -> Any:
    """Find the plate that all sites lie in, the rightmost of several; `ignore` names the particles'."""
    frames = {
        where: {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name != ignore}
        for where, site in _labelled(guide_sites, model_sites)
    }
    for where, plates in frames.items():
        for frame in plates.values():
            if frame.dim < -max_plate_nesting:
                raise ValueError(
                    f"{where} lies in the plate {frame.name!r} at dim={frame.dim}; give "
                    f"max_plate_nesting={-frame.dim}, so that the particles stay left of it"
                )
    everywhere = set.intersection(*(set(plates) for plates in frames.values()))
    if everywhere:
        shared = [frame for name, frame in next(iter(frames.values())).items() if name in everywhere]
        return max(shared, key=lambda frame: frame.dim)

    check_plates(guide_sites, model_sites)
    counts = {name: sum(name in plates for plates in frames.values()) for p in frames.values() for name in p}
    if not counts:
        raise ValueError(
            "no site lies in a plate, so nothing tells one datum from the next: run the model's and the "
            'guide\'s sites inside `with pyro.plate("data", len(x)):`'
        )
    plate = max(counts, key=counts.__getitem__)
    outside = [where for where, plates in frames.items() if plate not in plates]
    raise ValueError(
        f"{outside[0]} lies outside the data plate {plate!r}: all data would share it, and have no terms of "
        "their own. Draw it inside the plate, or use pyro.infer.Trace_ELBO"
    )


def shared_scale(guide_sites: Sites, model_sites: Sites, num_data: int) -> float | Tensor:
    """Find the factor that all sites' log-probabilities carry: a number, or one a datum, (N,)."""
    (first, site), *others = _labelled(guide_sites, model_sites)
    scale = site["scale"]
    for where, other in others:
        if not same_scale(scale, other["scale"]):
            raise ValueError(
                f"{first} is scaled by {scale} and {where} by {other['scale']}: together they are no "
                "log-density. Scale the pair as a whole, weigh the KL by KLWeighted, and subsample no plate "
                "but the data's"
            )
    if isinstance(scale, Tensor) and scale.numel() > 1 and scale.shape != (num_data,):
        raise ValueError(f"a scale must be a number, or of shape ({num_data},); got {tuple(scale.shape)}")
    return scale


def _labelled(guide_sites: Sites, model_sites: Sites) -> list[tuple[str, Site]]:
    return [(f"the guide's site {name!r}", site) for name, site in guide_sites.items()] + [
        (f"the model's site {name!r}", site) for name, site in model_sites.items()
    ]


def _layers(site: Site) -> Iterator[Any]:
    """The distribution of a site and what it wraps, from the outside in."""
    fn = site["fn"]
    yield fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        yield fn


def _masks(site: Site) -> list[Tensor | bool | None]:
    """The masks of a site: by `poutine.mask`, and by `.mask` of its distribution."""
    return [site["mask"], *(fn._mask for fn in _layers(site) if isinstance(fn, MaskedDistribution))]


def _same_mask(a: Tensor | bool | None, b: Tensor | bool | None) -> bool:
    a, b = (torch.as_tensor(True if mask is None else mask) for mask in (a, b))
    return bool((a == b).all())


def same_scale(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two sites count alike."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return math.isclose(a, b)  # a plate multiplies and divides by its size, which may round


def vectorized_plates(site: Site) -> list[Any]:
    """The plates that a site lies in, as Pyro's frames, the outermost first."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda frame: frame.dim)


def masked_log_prob(site: Site, value: Tensor) -> Tensor:
    """Return the log-density of a value under a site's distribution: masked, not scaled."""
    return scale_and_mask(site["fn"].log_prob(value), 1.0, site["mask"])
