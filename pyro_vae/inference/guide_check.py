"""Check before training that a guide fits a model, and which estimators are valid for the pair."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import (
    ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.inspect import get_dependencies
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Estimator, Renyi, label
from pyro_vae.objectives.guide_problems import (
    explain_failure,
    mask_problems,
    non_finite_inputs,
    parameters,
    plates,
    problems,
    scale_problems,
    subsample_problems,
    support,
)
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.log_terms import particle_plate
from pyro_vae.objectives.pair import stored_parameters
from pyro_vae.objectives.sites import (
    Program,
    Sites,
    analytic_kl,
    check_plates,
    draw_sources,
    guide_messenger,
    kl_invalid_reason,
    latent_sites,
    registered_kl,
    require_programs,
    run_pair,
    sample_sites,
    site_family,
)
from pyro_vae.utils.display import aligned
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
    "untrained_parameters",
]


class DistributionReport(NamedTuple):
    """Family and shapes of a site's distribution."""

    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteReport:
    """Report on one latent site of a pair.

    Args:
        name: Name of the site.
        status: "match", "missing" (from the guide), "extra" (in the guide), "auxiliary" (in the guide), or
            "observed" (by the model, though the guide draws it).
        guide: The guide's distribution, or None.
        model: The model's distribution, or None.
        plates: Names of the guide's plates, outermost first.
        support: Constraint on each element of the guide's draws.
        reparameterised: Whether the guide's draws carry gradients.
        analytic_kl: Whether the KL of the two distributions has a closed form.
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
    """Result of `check_guide`, printed as a table.

    Args:
        sites: The latent sites of both.
        problems: Reasons why the guide does not fit, empty if it does.
        estimators: The reason why each estimator is not valid for the pair, by name, or None if it is valid.
        without_gradient: Names of parameters that the ELBO does not depend on.
        unregistered: Shapes of parameters that the ELBO depends on but that have no Pyro "param" site, for
            instance without `pyro.module`: Pyro's SVI and `fit` do not train them.
    """

    sites: tuple[SiteReport, ...]
    problems: tuple[str, ...] = ()
    estimators: dict[str, str | None] = field(default_factory=dict)
    without_gradient: tuple[str, ...] = ()
    unregistered: tuple[tuple[int, ...], ...] = ()

    @property
    def mean_field(self) -> bool:
        """Whether the KL is the sum of the KLs of the sites, as `TraceMeanField_ELBO` assumes."""
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
                "parameters without a Pyro statement, which Pyro does not train, have the shapes "
                f"{', '.join(map(str, self.unregistered))}: call pyro.module, or make their module the guide"
            )
        return "\n".join(lines)


_COLUMNS = [
    *("site", "status", "guide", "batch", "event", "model", "batch", "event"),
    *("plates", "support", "path", "KL"),
]


def _table(sites: tuple[SiteReport, ...]) -> Iterator[str]:
    rows = []
    for site in sites:
        gradient, kl = (
            ("reparameterised" if site.reparameterised else "score function") if site.guide else "-",
            ("closed form" if site.analytic_kl else "sampled") if site.status == "match" else "-",
        )
        distributions = [str(cell) for part in (site.guide, site.model) for cell in part or ("-", "-", "-")]
        about_guide = [", ".join(site.plates) or "-", site.support or "-", gradient, kl]
        rows.append([site.name, site.status, *distributions, *about_guide])
    return aligned(_COLUMNS, rows, left=len(_COLUMNS))


class GuideError(ValueError):
    """Error of a guide that does not fit its model.

    Args:
        message: The problems and how to fix them.
        report: The report with these problems, or None if the guide raised an error.
    """

    def __init__(self, message: str, report: GuideReport | None = None):
        super().__init__(message)
        self.report = report


def check_guide(
    model: Program, guide: Program, *data: Any, max_plate_nesting: int = 1, **kwargs: Any
) -> GuideReport:
    """Check a model and a guide on some data, and which estimators are valid for them.

    As in an estimator, the guide runs first, then the model at its draws. A guide fits if it draws the latent
    sites of the model, each in the same plates and with the same event shape as in the model, from a
    distribution with valid parameters whose draws lie in the model's support. Subsampled plates must draw the
    same data in both, which Pyro ensures for plates of the same name. An estimator that is wrong for plates
    of different names is reported as not valid.

    The check has no side effects: it restores random generators, Pyro's parameter store, and parameters,
    gradients, buffers and attributes of modules.

    Args:
        model: A Pyro model; for a VAE, `vae.model`.
        guide: A Pyro guide; for a VAE, `vae.guide`.
        *data: Arguments of both; a small batch is enough.
        max_plate_nesting: Number of batch dimensions of the pair's own plates, 1 for a data plate alone.
        **kwargs: Keyword arguments of both.

    Returns:
        The report, which can be printed.

    Raises:
        TypeError: If the model or the guide is not callable.
        GuideError: If the guide does not fit. The message names each wrong site, what was expected, what was
            found and how to fix it.

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
        pair = _run_fitting_pair(model, guide, data, kwargs)
        registered = parameters(pair.guide_trace, pair.model_trace)
        loss = Trace_ELBO().differentiable_loss(model, guide, *data, **kwargs)
        return GuideReport(
            pair.reports,
            estimators={
                type(estimator).__name__: _failure_reason(estimator, pair)
                for estimator in _every_estimator(max_plate_nesting)
            },
            without_gradient=_without_gradient(loss, registered),
            unregistered=tuple(tuple(leaf.shape) for leaf in _leaves(loss) if leaf not in registered),
        )


def require_fit(model: Program, guide: Program, *data: Any, **kwargs: Any) -> None:
    """Raise GuideError if a guide does not fit its model, as in `check_guide`, without trying estimators."""
    with isolated(model, guide):
        _run_fitting_pair(model, guide, data, kwargs)


def check_training(
    model: Program, guide: Program, estimator: ELBO, trained: Iterable[Tensor], *data: Any, **kwargs: Any
) -> None:
    """Raise if an estimator is not valid for a pair, or a part of the guide would not be trained.

    The pair runs as the estimator will run it, with its particles and its enumeration. The check has no side
    effects, as in `check_guide`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        estimator: A `pyro.infer.ELBO`.
        trained: The parameters of the optimiser.
        *data: Arguments of both.
        **kwargs: Keyword arguments of both.

    Raises:
        GuideError: If the guide does not fit the model; see `check_guide`.
        ValueError: If the estimator is not valid for the pair, or the guide depends on a parameter outside
            the optimiser.
    """
    tried = [copy.copy(estimator)]  # copies: some estimators keep what they learn from the first pair
    if isinstance(estimator, KLWeighted):
        tried[0].estimator = copy.copy(estimator.estimator)
        tried.insert(0, tried[0].estimator)
    with isolated(model, guide):
        pair = _run_fitting_pair(model, guide, data, kwargs, tried[0])
        untrained = _untrained_problem(pair, [*trained, *data])
        if untrained:
            raise ValueError(untrained)
        for each in tried:
            reason = _invalid_reason(each, pair)
            if reason:
                raise ValueError(f"{label(each)} is not valid for this model and guide: {reason}")


class _Pair(NamedTuple):
    """A pair, its arguments, traces of the guide and of the model at its draws, and site reports."""

    model: Program
    guide: Program
    data: tuple
    kwargs: dict[str, Any]
    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    reports: tuple[SiteReport, ...]


def _run_fitting_pair(
    model: Program, guide: Program, data: tuple, kwargs: dict[str, Any], estimator: ELBO | None = None
) -> _Pair:
    """Run a guide, then the model at its draws, as an estimator does; raise if the guide does not fit.

    Sites that the model marks for enumeration may be missing from the guide if the estimator enumerates.
    """
    programs = (model, guide)
    if estimator is not None:
        programs = _as_run_by(estimator, model, guide, data, kwargs)
    guide_trace, returned = _run_guide(*programs, data, kwargs)
    model_trace, error = _run_model(*programs, guide_trace, data, kwargs)
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    dims = {site["infer"].get("_enumerate_dim") for site in (*model_sites.values(), *guide_sites.values())}
    if isinstance(estimator, TraceEnum_ELBO | TraceTMC_ELBO):
        model_sites = {
            name: site
            for name, site in model_sites.items()
            if name in guide_sites or not site["infer"].get("enumerate")
        }
    mismatches = problems(
        model_sites, guide_sites, returned, enumerated=dims - {None}, model_failed=error is not None
    )
    found = (*mismatches, *subsample_problems(model_trace, guide_trace))
    if not found and error is None:
        weights = model_sites, guide_sites, partial(draw_sources, programs[1], data, kwargs)
        found = (*mask_problems(*weights), *scale_problems(*weights))
    reports = tuple(_site_reports(model_sites, guide_sites))
    if found:
        found += tuple(non_finite_inputs(guide_trace, data))
        raise GuideError("\n".join(found), GuideReport(reports, found)) from error
    if error is not None:
        error.add_note("The model raised this error when it was run at the guide's draws.")
        raise error
    return _Pair(model, guide, data, kwargs, guide_trace, model_trace, reports)


def _as_run_by(
    estimator: ELBO, model: Program, guide: Program, data: tuple, kwargs: dict[str, Any]
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
    model: Program, guide: Program, data: tuple, kwargs: dict[str, Any]
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
    model: Program, drawn: poutine.Trace, data: tuple, kwargs: dict[str, Any], error: Exception
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
    model: Program, guide: Program, guide_trace: poutine.Trace, data: tuple, kwargs: dict[str, Any]
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
        if p is None:
            status = "auxiliary" if site["infer"].get("is_auxiliary") else "extra"
        else:
            status = "match" if name in latent else "observed"
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


def _without_gradient(loss: Tensor, registered: dict[Tensor, str]) -> tuple[str, ...]:
    trainable = [parameter for parameter in registered if parameter.requires_grad]
    if not trainable:
        return ()
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True, retain_graph=True)
    return tuple(registered[p] for p, g in zip(trainable, gradients, strict=True) if g is None or not g.any())


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a backward pass from the loss reaches."""
    seen, waiting, leaves = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [parent for parent, _ in node.next_functions]
    return leaves


def _untrained_problem(pair: _Pair, held: Iterable[Tensor]) -> str | None:
    """Return a message for a parameter that a pair depends on and that is not among the tensors held.

    A parameter with a "param" site of a `VAE`, or one that the model takes from a module, may be omitted on
    purpose. One that `pyro.param` creates may not, and neither may the guide's parameters of a store or
    without a Pyro statement.
    """
    held = list(held)
    registered = parameters(pair.guide_trace, pair.model_trace)
    stored = {id(parameter) for parameter in stored_parameters(pair.model, pair.guide).values()}
    known = {id(tensor) for tensor in held} | {id(leaf) for leaf in registered if id(leaf) not in stored}
    draws = sample_sites(pair.guide_trace).values()
    terms = [site["value"].sum() + site["fn"].log_prob(site["value"]).sum() for site in draws]
    for leaf in [leaf for term in terms for leaf in _leaves(term)]:
        if id(leaf) not in known:
            what = f"a parameter of shape {tuple(leaf.shape)} without a Pyro statement"
            fix = "give the module that owns it to the VAE as the guide"
            if leaf in registered:
                what = f"the parameter {registered[leaf]!r} (of pyro.param or pyro.module)"
                fix = (
                    "run the guide once before you make the optimiser, if its first run creates its "
                    f"parameters, as in an autoguide; {fix}; train by pyro.infer.SVI"
                )
            return (
                f"the guide depends on {what}, but the optimiser does not hold it, so that it would not be "
                f"trained: {fix}; or freeze it with requires_grad_(False)"
            )
    created = stored - {id(leaf) for leaf in registered if isinstance(leaf, nn.Parameter)}
    waiting = created - {id(tensor) for tensor in held}
    names = [name for leaf, name in registered.items() if id(leaf) in waiting]
    return _untrained_message(names) if names else None


def untrained_parameters(trained: Iterable[Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """Return a message if stored parameters are not among those of an optimiser, or None.

    To be called when a store has grown during a step: a parameter that the programs first met then is in no
    optimiser that was made before.

    Args:
        trained: The parameters of the optimiser.
        stored: The unconstrained parameters by name.

    Example:
        >>> untrained_parameters([], {"late": torch.zeros(2, requires_grad=True)})  # doctest: +ELLIPSIS
        "the optimiser does not hold 'late' (of pyro.param or pyro.module), ..."
    """
    held = {id(tensor) for tensor in trained}
    names = [
        name
        for name, parameter in stored.items()
        if parameter.requires_grad
        and id(parameter) not in held
        and not name.startswith("__baseline_avg")  # state of TraceGraph_ELBO, which no gradient moves
    ]
    return _untrained_message(names) if names else None


def _untrained_message(names: list[str]) -> str:
    return (
        f"the optimiser does not hold {', '.join(map(repr, names))} (of pyro.param or pyro.module), so that "
        "it would not be trained: run guide and model with such arguments before you make the optimiser, add "
        "it by optimizer.add_param_group, or train by pyro.infer.SVI"
    )


def _every_estimator(max_plate_nesting: int) -> list[ELBO]:
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


def _failure_reason(estimator: ELBO, pair: _Pair) -> str | None:
    """Return the reason why an estimator is not valid for a pair or the error that it raises, or None."""
    try:
        return _invalid_reason(estimator, pair)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"


def _invalid_reason(estimator: ELBO, pair: _Pair) -> str | None:
    """Run an estimator and return the reason why it is not valid for a pair, or None."""
    programs = pair.model, pair.guide
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
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        guide_trace, model_trace = run_pair(model, guide, data, kwargs)
        guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
        for name, site in guide_sites.items():
            if not is_identically_zero(site["fn"].score_parts(site["value"]).score_function):
                raise ValueError(
                    f"TraceMeanField_ELBO is wrong here: the guide's site {name!r}, a {site_family(site)}, "
                    "is not reparameterised, so its gradient would be lost; use Trace_ELBO, or VIMCO"
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
