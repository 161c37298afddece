"""Terms of every bound, log p(x|z), log p(z) and log q(z|x), from one run of a (model, guide) pair.

Notation: S particles, N examples per batch, terms (S, N) in nats per datum; z stands for all latent sites.
The importance weight is w = p(x|z) p(z) / q(z|x).

A pair is any Pyro model and guide whose sample sites all lie in one plate, the *data plate*: the rightmost
plate that contains every sample site of both. Any other plate is a dimension of the example, and terms are
summed over it. Subsampling the data plate scales all log-probabilities by its size over the batch size; the
factor is not part of a density and would be wrong in a logarithm of weights, so that it is kept apart as
`Terms.scale`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_vae.objectives.calls import as_arguments, explaining_calls
from pyro_vae.objectives.enumeration import enumerated_sites, sum_out
from pyro_vae.objectives.guide_problems import mask_problems, name_problems, value_problem
from pyro_vae.objectives.pair import as_tensors, split_pair
from pyro_vae.objectives.sites import (
    NotSeparableError,
    Program,
    Site,
    Sites,
    analytic_kl,
    data_plate,
    draw_sources,
    guide_messenger,
    joint_mask,
    latent_sites,
    masked_log_prob,
    run,
    sample_sites,
    shared_scale,
    site_family,
)
from pyro_vae.utils.elements import elementwise
from pyro_vae.utils.validation import require_count

__all__ = ["PairSites", "Terms", "particle_plate", "terms"]


@dataclass(frozen=True)
class Terms:
    """Terms of one run of a (model, guide) pair; see `terms`.

    Args:
        log_likelihood: log p(x|z), (S, N).
        log_prior: log p(z), (S, N).
        log_guide: log q(z|x), (S, N).
        scale: Weight of each example in a loss, a number or (N,): the size of the data plate over that of
            the batch, times any `poutine.scale` around the whole pair. Not included in the terms above.
        sites: The sample sites of the run.
        kl_weight: β of `log_weight` and `elbo`, 1 except under `KLWeighted`.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    scale: float | Tensor
    sites: "PairSites" = field(repr=False)
    kl_weight: float | Tensor = 1.0

    @property
    def log_weight(self) -> Tensor:
        """Log importance weight log p(x|z) + β (log p(z) − log q(z|x)), (S, N); log w if β = 1."""
        return self.log_likelihood + self.kl_weight * (self.log_prior - self.log_guide)

    @property
    def elbo(self) -> Tensor:
        """Estimate of the ELBO by each particle, (S, N), with the KL `kl` if there is one, else sampled."""
        return self.log_weight if self.kl is None else self.log_likelihood - self.kl_weight * self.kl

    @cached_property
    def kl(self) -> Tensor | None:
        """KL(q(z|x) ‖ p(z)) in closed form, (N,), or None.

        The sum of the KLs of the sites. If the distributions of a site depend on draws of other sites, so
        does its KL, and the mean over particles is returned: an unbiased estimate with less variance than a
        sampled KL. None if torch has no KL for the two distributions of a site, if their masks differ, if the
        guide has a Delta with a density or an auxiliary site, if the prior of a site is a sum over enumerated
        values, or if guide and model draw their sites in different order (the prior of a site might then
        depend on its descendants in the guide, and the sum would be wrong).
        """
        guide_sites, latent = self.sites.guide, self.sites.latent
        if list(guide_sites) != list(latent) or self.sites.summed & set(latent):
            return None
        kls = [analytic_kl(site, latent[name]) for name, site in guide_sites.items()]
        known = [kl for kl in kls if kl is not None]
        return self.sites.sum(known).mean(0) if len(known) == len(kls) else None

    @cached_property
    def log_score(self) -> Tensor:
        """Log q(z|x) at the same draws held fixed, (S, N); its gradient is the score ∂ log q(z|x) / ∂φ.

        The gradient of log q(z(φ)|x; φ) minus the score is the path gradient, through the draws. A guide of
        several sites is run again with its draws replayed, since later sites depend on earlier draws, and
        should not use other random numbers, such as those of dropout.

        Raises:
            ValueError: If a site cannot score fixed values: its transform has no inverse, or it is a Delta or
                factor whose density depends on parameters.
        """
        return self.sites.log_score()

    @property
    def log_score_function(self) -> Tensor:
        """Sum of log q over the sites of the guide that are not reparameterised, (S, N)."""
        parts = (site["score_function"] for site in self.sites.guide.values())
        return self.sites.sum(part for part in parts if not is_identically_zero(part))

    @property
    def unreparameterised(self) -> list[str]:
        """Names of the guide's sites with parameters that get no gradient through the draws."""
        return [
            name
            for name, site in self.sites.guide.items()
            if getattr(site["score_function"], "requires_grad", False)
        ]

    def by_site(self) -> dict[str, Tensor]:
        """Return log p of each observed site, (S, N), of sum `log_likelihood`.

        Sites that depend on values which are summed out have one entry together.
        """
        parts = {name: self.sites.sum([part]) for name, part in self.sites.apart(self.sites.observed).items()}
        together = [name for name in self.sites.observed if name in self.sites.summed]
        if together:
            parts[" and ".join(together)] = self.log_likelihood - sum(parts.values())
        return parts

    def by_element(self, site: str) -> Tensor:
        """Return log p of each element of an observed site, (S, N, *event), 0 where it is missing.

        Its sum over the elements is the site's part of `log_likelihood`. Dimensions of other plates precede
        those of the event.

        Raises:
            ValueError: If there is no such site, or its elements are not independent given z.
        """
        if site not in self.sites.observed:
            known = ", ".join(map(repr, self.sites.observed))
            raise ValueError(f"{site!r} is not an observed site: {known}")
        if site in self.sites.summed:
            raise ValueError(
                f"{site!r} depends on values that are summed out, so that elements are not apart"
            )
        return self.sites.by_element(self.sites.observed[site])

    def scale_path_gradients(self, weight: Tensor) -> None:
        """Multiply the gradients of log p(x|z) and log p(z) through z by `weight`, (S, N).

        Gradients of the model's own parameters are unchanged. Call once, before the backward pass.
        """
        for name, draw in self.sites.draws.items():
            if draw.requires_grad:
                factor = self.sites.along(weight, self.sites.guide[name])
                draw.register_hook(lambda gradient, factor=factor: gradient * factor)


def terms(
    model: Any,
    *data: Any,
    num_particles: int = 1,
    max_plate_nesting: int = 1,
    **kwargs: Any,
) -> Terms:
    """Compute log p(x|z), log p(z) and log q(z|x) per particle and example, from one run of a pair.

    Several particles are an additional plate, left of the pair's own: draws and all that depends on them get
    a dimension of size S on the left. Every term is differentiable, also through reparameterised draws.

    Args:
        model: A Pyro model, followed by a guide; or a pair of the two, such as a `VAE`. The model's observed
            sites make up log p(x|z), its latent sites log p(z); discrete ones that it marks by
            `infer={"enumerate": "parallel"}`, and the guide lacks, are summed out of both. The guide has the
            same arguments and latent sites, possibly with additional ones marked
            `infer={"is_auxiliary": True}`.
        *data: The guide, if a model came first; then the arguments of both, or a tuple or dict of them. The
            programs of a `VAE` or a `Pair` take arrays, sparse matrices, data frames and `Images`, too.
        num_particles: S, independent draws from the guide per example.
        max_plate_nesting: Number of batch dimensions of the pair's own plates, 1 for a data plate alone.
        **kwargs: Keyword arguments of both.

    Returns:
        The terms, (S, N), the KL in closed form, (N,) or None, and the scale to apply in a loss.

    Raises:
        TypeError: If `num_particles` or `max_plate_nesting` is not an integer.
        ValueError: If either is below 1, the batch is empty, or the pair does not fit: no observed site, a
            missing or additional latent site, a site outside the data plate, different masks or scales, a
            value outside its support, or a batch dimension without plate. The message names the site.
        Exception: Any error of the model or guide; `check_guide` explains it.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0, 1))
        ...         pyro.sample("x", dist.Normal(z, 1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> t = terms(model, guide, torch.tensor([0.0, 1.0, 2.0]), num_particles=4)
        >>> t.log_likelihood.shape, t.kl.shape
        (torch.Size([4, 3]), torch.Size([3]))
        >>> t.log_weight[0]  # the guide is the exact posterior: every weight is p(x)
        tensor([-1.2655, -1.5155, -2.2655])
    """
    model, guide, data = split_pair("terms(pair, x) or terms(model, guide, x)", model, *data)
    data, kwargs = as_tensors(model, *as_arguments(model, data, kwargs))
    require_count("num_particles", num_particles)
    require_count("max_plate_nesting", max_plate_nesting)
    _require_apart(guide)
    particles = particle_plate(num_particles, max_plate_nesting) if num_particles > 1 else nullcontext()
    runs = partial(_run_pair, model, guide, data, kwargs, particles)
    with explaining_calls(model, guide, data, kwargs):
        guide_trace, model_trace, draws = runs()
    enumerated = enumerated_sites(sample_sites(model_trace), sample_sites(guide_trace))
    nesting = max_plate_nesting + 1 if enumerated else math.inf  # of batch dimensions that plates explain
    if enumerated:
        guide_trace, model_trace, draws = runs(enumeration=poutine.enum(first_available_dim=-1 - nesting))
    guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
    observed = {key: site for key, site in model_sites.items() if site["is_observed"]}
    latent = {key: site for key, site in latent_sites(model_sites).items() if key not in enumerated}
    _check_sites(latent, observed, model_sites, guide_sites, enumerated)
    plate = data_plate(
        guide_sites, model_sites, max_plate_nesting=max_plate_nesting, ignore=_particles(max_plate_nesting)
    )
    for problem in mask_problems(model_sites, guide_sites, partial(draw_sources, guide, data, kwargs)):
        raise ValueError(problem)
    check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    for key, site in guide_sites.items():
        site["score_function"] = _set_log_prob(f"the guide's site {key!r}", site).score_function
    for key, site in model_sites.items():
        _set_log_prob(f"the model's site {key!r}", site, nesting)
    sums = sum_out(model_trace, enumerated)

    sites = PairSites(
        guide=guide_sites,
        latent=latent,
        observed=observed,
        enumerated=enumerated,
        summed=sums.names,
        draws=draws,
        num_particles=num_particles,
        num_data=next(iter(guide_sites.values()))["log_prob"].shape[plate.dim],
        rank=max_plate_nesting + 1,
        data_dim=plate.dim,
        at_fixed_draws=partial(_sites_at_fixed_draws, guide, guide_trace, data, kwargs, particles),
    )
    return Terms(
        log_likelihood=sites.sum([*sites.apart(observed).values(), *sums.log_likelihood]),
        log_prior=sites.sum([*sites.apart(latent).values(), *sums.log_prior]),
        log_guide=sites.sum(site["log_prob"] for site in guide_sites.values()),
        scale=shared_scale(guide_sites, model_sites, sites.num_data),
        sites=sites,
    )


def _require_apart(guide: Program) -> None:
    """Raise ValueError if a guide runs the model itself."""
    if guide_messenger(guide) is not None:
        raise ValueError(
            "the guide runs the model itself, as AutoNormalMessenger does, so that their terms cannot be "
            "separated: pass a guide that is a function, such as AutoNormal, or use Trace_ELBO"
        )


def particle_plate(num_particles: int, max_plate_nesting: int) -> pyro.plate:
    """Return the plate of particles, left of the plates of a pair."""
    return pyro.plate(_particles(max_plate_nesting), num_particles, dim=-1 - max_plate_nesting)


def _particles(max_plate_nesting: int) -> str:
    # Pyro quotes the plate's name in its error if another plate uses the same dimension.
    return f"particles, outside max_plate_nesting={max_plate_nesting} plates"


def _run_pair(
    model: Program,
    guide: Program,
    data: tuple[Any, ...],
    kwargs: dict[str, Any],
    particles: AbstractContextManager[Any],
    *,
    enumeration: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 (it has no state)
) -> tuple[poutine.Trace, poutine.Trace, dict[str, Tensor]]:
    """Run the guide, then the model at its draws; return both traces and the draws passed to the model.

    Only the model runs within `enumeration`, inside the replay of the draws and outside the plates, as
    Pyro's handler has to be.
    """
    with particles, _suggesting_check_guide():
        guide_trace = run(guide, data, kwargs)
        # The model gets views of the draws, so that `scale_path_gradients` scales its gradients alone.
        draws = {
            key: site["value"].view_as(site["value"])
            for key, site in sample_sites(guide_trace).items()
            if not site["is_observed"]
        }

    def enumerated(*args: Any, **kwargs: Any) -> Any:
        with enumeration, particles:
            return model(*args, **kwargs)

    with _suggesting_check_guide():
        replayed = poutine.replay(enumerated, trace=_with_values(guide_trace, draws))
        return guide_trace, run(replayed, data, kwargs), draws


def _sites_at_fixed_draws(
    guide: Program,
    trace: poutine.Trace,
    data: tuple[Any, ...],
    kwargs: dict[str, Any],
    particles: AbstractContextManager[Any],
) -> Sites:
    """Run a guide again at the detached draws of a trace; a single site depends on no draw and is reused."""
    draws = {name: site["value"].detach() for name, site in sample_sites(trace).items()}
    fixed = _with_values(trace, draws)
    if len(draws) == 1:
        return sample_sites(fixed)
    with particles:
        return sample_sites(run(poutine.replay(guide, trace=fixed), data, kwargs))


def _check_sites(
    latent: Sites, observed: Sites, model_sites: Sites, guide_sites: Sites, enumerated: list[str]
) -> None:
    if enumerated and not guide_sites:
        raise NotSeparableError(
            f"all latent sites, such as {enumerated[0]!r}, are summed out, so that the guide draws nothing: "
            "use pyro.infer.TraceEnum_ELBO, whose loss is −log p(x)"
        )
    if not latent:
        raise ValueError("the model has no latent site: there is nothing to infer")
    if not observed:
        raise ValueError("the model observes nothing: pass the data to a site as obs=...")
    for problem in name_problems({**latent, **observed}, guide_sites):
        raise ValueError(problem)


@contextmanager
def _suggesting_check_guide() -> Iterator[None]:
    """Add a note on `check_guide` to any error raised within the block."""
    try:
        yield
    except Exception as error:
        error.add_note("pyro_vae.check_guide(model, guide, *data) explains the error and how to fix it")
        raise


@dataclass(frozen=True)
class PairSites:
    """Sites of one run of a pair, and the positions of particles and examples in their batch shapes."""

    guide: Sites
    latent: Sites
    observed: Sites
    enumerated: list[str]  # latent sites of the model that are summed out
    summed: frozenset[str]  # sites whose log-densities are replaced by a sum over enumerated values
    draws: dict[str, Tensor]  # latent values, as passed to the model
    num_particles: int
    num_data: int
    rank: int  # number of batch dimensions; the leftmost is the particles'
    data_dim: int  # counted from the right, negative
    at_fixed_draws: Callable[[], Sites]  # the guide's sites, computed from detached draws

    @property
    def data_axis(self) -> int:
        """Index of the data dimension in a full batch shape, counted from the left."""
        return self.rank + self.data_dim

    @property
    def other_dims(self) -> list[int]:
        """Batch dimensions other than the particles' and the data's, counted from the right, negative."""
        return [dim for dim in range(1 - self.rank, 0) if dim != self.data_dim]

    def in_full(self, values: Tensor, event_dim: int = 0) -> Tensor:
        """Reshape values (*batch, *event) to all batch dimensions, with size 1 for the missing ones."""
        missing = self.rank + event_dim - values.dim()
        return values.reshape((1,) * missing + values.shape)

    def apart(self, sites: Sites) -> dict[str, Tensor]:
        """Return the log-densities of those of some sites that depend on no enumerated value."""
        return {name: site["log_prob"] for name, site in sites.items() if name not in self.summed}

    def sum(self, log_probs: Iterable[Tensor]) -> Tensor:
        """Sum log-probabilities over sites and the dimensions of other plates, to (S, N)."""
        zero = next(iter(self.guide.values()))["log_prob"].new_zeros(())
        total = sum((self._per_example(log_prob) for log_prob in log_probs), zero)
        return total.expand(self.num_particles, self.num_data)

    def _per_example(self, log_prob: Tensor) -> Tensor:
        log_prob = self.in_full(log_prob)
        return log_prob.sum(self.other_dims) if self.other_dims else log_prob

    def along(self, weight: Tensor, site: Site) -> Tensor:
        """Reshape `weight`, (S, N), to broadcast against the values of a site."""
        shape = [1] * self.rank
        shape[0], shape[self.data_dim] = self.num_particles, self.num_data
        batch_dim = site["value"].dim() - site["fn"].event_dim
        return weight.reshape(shape[self.rank - batch_dim :] + [1] * site["fn"].event_dim)

    def by_element(self, site: Site) -> Tensor:
        """Return the masked log density of each element of a site, (S, N, *others, *event)."""
        log_prob = elementwise(site["fn"]).log_prob(site["value"])
        log_prob = log_prob.where(joint_mask(site), 0.0)
        values = self.in_full(log_prob, site["fn"].event_dim).movedim(self.data_axis, 1)
        return values.expand(self.num_particles, self.num_data, *values.shape[2:])

    def log_score(self) -> Tensor:
        """Compute log q at fixed draws, (S, N); see `Terms.log_score`."""
        log_probs = []
        for name, site in self.at_fixed_draws().items():
            try:
                log_prob = masked_log_prob(site, site["value"])
            except (KeyError, NotImplementedError) as error:
                raise ValueError(
                    f"the guide's site {name!r}, a {site_family(site)}, cannot score given values, since its "
                    "transform has no inverse; use Trace_ELBO or IWAE"
                ) from error
            if site_family(site) in ("Delta", "Unit") and log_prob.requires_grad:
                raise ValueError(
                    f"the guide's site {name!r} carries a Jacobian that depends on parameters, so that its "
                    "density at fixed draws is unknown; use a TransformedDistribution, or Trace_ELBO or IWAE"
                )
            log_probs.append(log_prob)
        return self.sum(log_probs)


def _with_values(trace: poutine.Trace, values: dict[str, Tensor]) -> poutine.Trace:
    """Return a copy of a trace with new values at some of its sites."""
    copy = trace.copy()
    for name, value in values.items():
        copy.nodes[name] = {**copy.nodes[name], "value": value}
    return copy


def _set_log_prob(where: str, site: Site, nesting: float = math.inf) -> Any:
    """Set a site's `log_prob`, masked but not scaled, and return Pyro's `ScoreParts` of it.

    Plates must explain the rightmost `nesting` batch dimensions.
    """
    try:
        parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
        site["unscaled_log_prob"] = parts.log_prob
        site["log_prob"] = scale_and_mask(parts.log_prob, 1.0, site["mask"])
        check_site_shape(site, nesting)
    except ValueError as error:
        problem = value_problem(site["name"], site) if site["is_observed"] else None
        if problem:
            raise ValueError(problem) from error
        raise ValueError(
            f"{where} cannot score its value: {error}\n"
            "Values must lie in the support of their distribution (for a Bernoulli, binarise grey levels), "
            "and every batch dimension of a distribution must belong to a plate (else use .to_event(...))"
        ) from error
    return parts
