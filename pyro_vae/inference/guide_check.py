"""Whether a guide fits a model, told before training, and which estimators are valid for the two."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from pyro_vae.objectives.estimators import (
    CIWAE,
    IWAE,
    PIWAE,
    STL,
    VIMCO,
    DReG,
    Estimator,
    Renyi,
    label,
)
from pyro_vae.objectives.guide_problems import (
    explain_failure,
    latent_sites,
    not_finite,
    parameters,
    plates,
    separate_subsamples,
    support,
)
from pyro_vae.objectives.guide_problems import (
    problems as problems_of,
)
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.sites import (
    Program,
    Sites,
    analytic_kl,
    check_plates,
    kl_by_table,
    kl_fault,
    require_programs,
    run,
    sample_sites,
    site_family,
)
from pyro_vae.utils.isolation import isolated

__all__ = [
    "DistributionReport",
    "GuideError",
    "GuideReport",
    "SiteReport",
    "check_guide",
    "check_mean_field",
    "check_training",
    "require_fit",
]


class DistributionReport(NamedTuple):
    """A site's distribution: its family and shapes."""

    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteReport:
    """What is known of one latent site of a pair.

    Args:
        name: The site's.
        status: "match", "missing" in the guide, "extra" in the guide, "auxiliary" to the guide, or "observed"
            by the model though the guide draws it.
        guide: The guide's distribution, or None.
        model: The model's distribution, or None.
        plates: Names of the guide's plates, the outermost first.
        support: What each element of the guide's draws satisfies.
        reparameterised: Whether the guide's draws carry gradients.
        analytic_kl: Whether the KL of the two distributions is known in closed form.
    """

    name: str
    status: str
    guide: DistributionReport | None
    model: DistributionReport | None
    plates: tuple[str, ...] = ()
    support: str = ""
    reparameterised: bool = False
    analytic_kl: bool = False


@dataclass(frozen=True)
class GuideReport:
    """What `check_guide` found; printed, a table.

    Args:
        sites: The latent sites of both.
        problems: Why the guide does not fit: empty if it does.
        estimators: From each estimator's name to why it is not valid for the pair; None if it is.
        without_gradient: Names of parameters that the ELBO does not depend on.
        unregistered: Shapes of parameters that the ELBO depends on but that no Pyro statement shows, as when
            `pyro.module` is forgotten: Pyro's SVI and `fit` do not train them.
    """

    sites: tuple[SiteReport, ...]
    problems: tuple[str, ...] = ()
    estimators: dict[str, str | None] = field(default_factory=dict)
    without_gradient: tuple[str, ...] = ()
    unregistered: tuple[tuple[int, ...], ...] = ()

    @property
    def mean_field(self) -> bool:
        """Whether the KL is the sum of the sites' KLs, as `TraceMeanField_ELBO` takes it to be."""
        return self.estimators.get("TraceMeanField_ELBO", "not tried") is None

    def __str__(self) -> str:
        lines = ["the guide does not fit the model" if self.problems else "the guide fits the model"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += _table(self.sites)
        if self.estimators:
            valid = (name for name, reason in self.estimators.items() if reason is None)
            lines.append(f"valid estimators: {', '.join(valid)}")
            for reason in dict.fromkeys(filter(None, self.estimators.values())):
                names = ", ".join(name for name, other in self.estimators.items() if other == reason)
                lines.append(f"not {names}: {reason}")
        if self.without_gradient:
            lines.append(f"parameters without gradient: {', '.join(self.without_gradient)}")
        if self.unregistered:
            lines.append(
                "parameters that no Pyro statement shows, so that Pyro does not train them: of shapes "
                f"{', '.join(map(str, self.unregistered))}; call pyro.module, or make their module the guide"
            )
        return "\n".join(lines)


def _table(sites: tuple[SiteReport, ...]) -> list[str]:
    def cells(part: DistributionReport | None) -> list[str]:
        return [str(cell) for cell in part] if part else ["-"] * 3

    rows = [
        [
            "site",
            "status",
            "guide",
            "batch",
            "event",
            "model",
            "batch",
            "event",
            "plates",
            "support",
            "path",
            "KL",
        ]
    ]
    for site in sites:
        path, kl = (
            ("reparameterised" if site.reparameterised else "score function") if site.guide else "-",
            ("closed form" if site.analytic_kl else "sampled") if site.status == "match" else "-",
        )
        about_guide = [", ".join(site.plates) or "-", site.support or "-", path, kl]
        rows.append([site.name, site.status, *cells(site.guide), *cells(site.model), *about_guide])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


class GuideError(ValueError):
    """A guide that does not fit its model.

    Args:
        message: What is wrong, and what to change.
        report: What was found; None if the guide did not run.
    """

    def __init__(self, message: str, report: GuideReport | None = None):
        super().__init__(message)
        self.report = report


def check_guide(
    model: Program, guide: Program, *data: Any, max_plate_nesting: int = 1, **kwargs: Any
) -> GuideReport:
    """Run a model and a guide on some data and tell whether, and under which estimators, they go together.

    A guide fits if it draws the model's latent sites, each in plates and of an event shape as in the model,
    from a distribution with valid parameters, of which the model's covers the support. Plates that are
    subsampled must draw the same data in both; Pyro shares them by the plates' name. An estimator that
    is wrong for plates of other names than the model's is reported as not valid.

    Random numbers, parameters, gradients, buffers such as running means, attributes of the modules that run,
    and Pyro's parameter store are left as they were.

    Args:
        model: A Pyro model; for a VAE, `vae.model`.
        guide: A Pyro guide; for a VAE, `vae.guide`.
        *data: Arguments of both; a small batch is enough.
        max_plate_nesting: How many dimensions the pair's own plates take: 1 if it has a data plate alone.
        **kwargs: Keyword arguments of both.

    Returns:
        The report: read it by `print(report)`, or by its fields.

    Raises:
        TypeError: If the model or the guide cannot be called.
        GuideError: If the guide does not fit. The message names each site that is wrong, what was expected,
            what was found, and what to change; the report is the error's `report`.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.Flow((6,), 2),
        ... )
        >>> report = check_guide(vae.model, vae.guide, torch.zeros(5, 6))
        >>> report.sites[0].reparameterised, report.sites[0].analytic_kl
        (True, False)
        >>> report.estimators["DReG"] is None
        True
    """
    require_programs("check_guide(vae.model, vae.guide, x)", model, guide)
    with isolated(model, guide):
        model_trace, guide_trace, sites = _fitting(model, guide, data, kwargs)
        shown = parameters(guide_trace, model_trace)
        loss = Trace_ELBO().differentiable_loss(model, guide, *data, **kwargs)
        return GuideReport(
            sites,
            estimators={
                type(estimator).__name__: _reason_against(estimator, model, guide, data, kwargs)
                for estimator in _every_estimator(max_plate_nesting)
            },
            without_gradient=_without_gradient(loss, shown),
            unregistered=tuple(tuple(leaf.shape) for leaf in _leaves(loss) if leaf not in shown),
        )


def require_fit(model: Program, guide: Program, *data: Any, **kwargs: Any) -> None:
    """Refuse a guide that does not fit its model, as `check_guide` does, and try no estimator.

    Raises:
        GuideError: See `check_guide`.
    """
    with isolated(model, guide):
        _fitting(model, guide, data, kwargs)


def check_training(
    model: Program, guide: Program, estimator: ELBO, trained: Iterable[Tensor], *data: Any, **kwargs: Any
) -> None:
    """Refuse a pair that would train wrongly under an estimator, or a guide of which a part would not train.

    Leaves behind what `check_guide` does: nothing.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        estimator: A `pyro.infer.ELBO`.
        trained: The parameters that the optimiser holds.
        *data: Arguments of both.
        **kwargs: Keyword arguments of both.

    Raises:
        GuideError: If the guide does not fit the model; see `check_guide`.
        ValueError: If the estimator is not valid for the pair, or the guide depends on a parameter that
            nobody trains.
    """
    tried = [copy.copy(estimator)]  # a copy, for some learn from the pair that they see first
    if isinstance(estimator, KLWeighted):
        tried[0].estimator = copy.copy(estimator.estimator)
        tried.insert(0, tried[0].estimator)
    enumerates = isinstance(estimator, TraceEnum_ELBO)
    with isolated(model, guide):
        model_trace, guide_trace, _ = _fitting(model, guide, data, kwargs, enumerates=enumerates)
        untrained = _untrained(model_trace, guide_trace, [*trained, *data])
        if untrained:
            raise ValueError(untrained)
        for each in tried:
            reason = _reason_against(each, model, guide, data, kwargs)
            if reason:
                raise ValueError(f"{label(each)} is not valid for this model and guide: {reason}")


def _fitting(
    model: Program, guide: Program, data: tuple, kwargs: dict[str, Any], *, enumerates: bool = False
) -> tuple[poutine.Trace, poutine.Trace, tuple[SiteReport, ...]]:
    """Run a model and a guide, and refuse the guide if it does not fit.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        data: Arguments of both.
        kwargs: Keyword arguments of both.
        enumerates: Whether sites that the model marks for enumeration need not be the guide's.
    """
    model_trace = poutine.trace(model).get_trace(*data, **kwargs)
    model_sites = sample_sites(model_trace)
    guide_trace, returned = _run_guide(guide, model_sites, data, kwargs)
    guide_sites = sample_sites(guide_trace)
    if enumerates:
        model_sites = {
            name: site
            for name, site in model_sites.items()
            if name in guide_sites or not site["infer"].get("enumerate")
        }
    problems = (
        *problems_of(model_sites, guide_sites, returned),
        *separate_subsamples(model_trace, guide_trace),
    )
    sites = tuple(_site_reports(model_sites, guide_sites))
    if problems:
        problems += tuple(not_finite(guide_trace, data))
        raise GuideError("\n".join(problems), GuideReport(sites, problems))
    return model_trace, guide_trace, sites


def _run_guide(
    guide: Program, model_sites: Sites, data: tuple, kwargs: dict[str, Any]
) -> tuple[poutine.Trace, Any]:
    """Record the guide's sites, and what it returns."""
    tracer = poutine.trace()
    try:
        with tracer:
            returned = guide(*data, **kwargs)
    except Exception as error:
        drawn = sample_sites(tracer.trace)
        waiting = [name for name in latent_sites(model_sites) if name not in drawn]
        raise GuideError(explain_failure(error, tracer.trace, waiting, data)) from error
    return tracer.trace, returned


def _site_reports(model_sites: Sites, guide_sites: Sites) -> Iterator[SiteReport]:
    latent = latent_sites(model_sites)
    for name in [*latent, *(name for name in guide_sites if name not in latent)]:
        p, q = (
            DistributionReport(
                site_family(s[name]), tuple(s[name]["fn"].batch_shape), tuple(s[name]["fn"].event_shape)
            )
            if name in s
            else None
            for s in (model_sites, guide_sites)
        )
        if q is None:
            yield SiteReport(name, "missing", q, p)
            continue
        site = guide_sites[name]
        if p is None:
            status = "auxiliary" if site["infer"].get("is_auxiliary") else "extra"
        else:
            status = "match" if name in latent else "observed"
        comparable = p is not None and status == "match" and p[1:] == q[1:]  # of the same shapes
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


def _without_gradient(loss: Tensor, shown: dict[Tensor, str]) -> tuple[str, ...]:
    trainable = [parameter for parameter in shown if parameter.requires_grad]
    if not trainable:
        return ()
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True, retain_graph=True)
    return tuple(shown[p] for p, g in zip(trainable, gradients, strict=True) if g is None or not g.any())


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves that a backward pass from the loss reaches."""
    seen, waiting, leaves = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [parent for parent, _ in node.next_functions]
    return leaves


def _untrained(model_trace: poutine.Trace, guide_trace: poutine.Trace, held: Iterable[Tensor]) -> str | None:
    """Tell of a parameter that the guide depends on, and that is none of the tensors held.

    One that a `VAE` shows may be left out on purpose, but not one in Pyro's store, or that nothing shows.
    """
    shown = parameters(guide_trace, model_trace)
    stored = {id(parameter) for _, parameter in pyro.get_param_store().named_parameters()}
    known = {id(tensor) for tensor in held} | {id(leaf) for leaf in shown if id(leaf) not in stored}
    draws = sample_sites(guide_trace).values()
    terms = [site["value"].sum() + site["fn"].log_prob(site["value"]).sum() for site in draws]
    for leaf in [leaf for term in terms for leaf in _leaves(term)]:
        if id(leaf) not in known:
            what = f"a parameter of shape {tuple(leaf.shape)} that no Pyro statement shows"
            remedy = "give the module that owns it to the VAE as the guide"
            if leaf in shown:
                what = f"the parameter {shown[leaf]!r} of Pyro's global store (by pyro.param or pyro.module)"
                remedy = (
                    "run the guide once before you make the optimiser, if its first run makes its "
                    f"parameters, as an autoguide's does; {remedy}; train by pyro.infer.SVI"
                )
            return (
                f"the guide depends on {what}, and the optimiser does not hold it, so that it would not be "
                f"trained: {remedy}; or freeze it by requires_grad_(False)"
            )
    return None


def _every_estimator(max_plate_nesting: int) -> list[ELBO]:
    """One of each kind, as small as it can be."""
    nesting = {"max_plate_nesting": max_plate_nesting}
    return [
        *(kind(**nesting) for kind in _UPSTREAM),
        TraceMeanField_ELBO(**nesting),
        IWAE(2, **nesting),
        PIWAE(1, 2, **nesting),
        CIWAE(0.5, 2, **nesting),
        Renyi(0.5, 2, **nesting),
        STL(2, **nesting),
        DReG(2, **nesting),
        VIMCO(2, **nesting),
    ]


_UPSTREAM = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)


def _reason_against(
    estimator: ELBO, model: Program, guide: Program, data: tuple, kwargs: dict[str, Any]
) -> str | None:
    """Why an estimator, Pyro's or this library's, is not valid for a pair: it is tried."""
    try:
        if isinstance(estimator, TraceEnum_ELBO):
            check_plates(*(sample_sites(run(program, data, kwargs)) for program in (guide, model)))
        if isinstance(estimator, TraceMeanField_ELBO):
            check_mean_field(model, guide, *data, **kwargs)
        elif isinstance(estimator, Estimator | KLWeighted):
            estimator.differentiable_loss(model, guide, *data, **kwargs)
        elif type(estimator) in _UPSTREAM:
            estimator.loss(model, guide, *data, **kwargs)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def check_mean_field(model: Program, guide: Program, *data: Any, **kwargs: Any) -> None:
    """Refuse a pair for which `pyro.infer.TraceMeanField_ELBO` is wrong.

    That estimator adds up the KLs of single sites. This is right if, for every latent site z, none of the
    sites that the model draws z from depends on z in the guide, and if each KL is that of its site, see
    `kl_fault`; and its gradient is right if every draw of the guide is reparameterised. Pyro warns of the
    first, and only while its validation is on. Sites drawn in the same order in both need no closer look.
    Otherwise their dependencies are tracked through one more run of each; writing draws into a tensor in
    place (`buffer[..., 0] = z`) escapes that tracking.

    Random numbers are left as they were. Arguments as for `terms`.

    Raises:
        ValueError: If the estimator is wrong for the pair; names the sites, and what to use instead.

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
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        guide_trace = run(guide, data, kwargs)
        model_trace = run(poutine.replay(model, trace=guide_trace), data, kwargs)
        guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
        for name, site in guide_sites.items():
            if not is_identically_zero(site["fn"].score_parts(site["value"]).score_function):
                raise ValueError(
                    f"TraceMeanField_ELBO is wrong here: the guide's site {name!r}, a {site_family(site)}, "
                    "is not reparameterised, so its gradient would be lost; use Trace_ELBO, or VIMCO"
                )
        latent = [name for name, site in model_sites.items() if not site["is_observed"]]
        for name in (name for name in latent if name in guide_sites):
            pair = guide_sites[name], model_sites[name]
            fault = kl_fault(*pair)
            if fault and kl_by_table(*pair) is not None:
                raise ValueError(f"TraceMeanField_ELBO is wrong here: at {name!r}, {fault}; use Trace_ELBO")
        if latent == [name for name in guide_sites if name in latent]:
            return
        model_parents = get_dependencies(model, data, kwargs)["prior_dependencies"]
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
    """Whatever `name` depends on, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for parent in parents.get(waiting.pop(), {}):
            if parent not in found and parent != name:
                found.add(parent)
                waiting.append(parent)
    return found
