"""The terms of every bound, log p(x|z), log p(z) and log q(z|x), from one run of a (model, guide) pair.

Notation: S particles, N data in the batch. Terms are (S, N), one number a particle and datum, in nats. The
importance weight is w = p(x|z) p(z) / q(z|x). Of a pair with several latent sites, z stands for them all.

A pair is any Pyro model and guide whose sample sites share a plate, the *data plate*, with nothing outside
it. It is found by name: the plate that every sample site of both lies in, and of several such plates the
rightmost. Every other plate belongs to the datum, and its dimension is summed over. Subsampling the data
plate multiplies all log-probabilities alike by its size over the batch's; that factor is no part of a density
and may not enter a logarithm of weights, so it is kept apart, as `Terms.scale`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_vae.objectives.guide_problems import latent_sites, name_problems
from pyro_vae.objectives.sites import (
    Program,
    Site,
    Sites,
    analytic_kl,
    data_plate,
    require_programs,
    run,
    sample_sites,
    shared_scale,
    site_family,
)
from pyro_vae.utils.validation import require_count

__all__ = ["Terms", "terms"]


@dataclass(frozen=True)
class Terms:
    """What one run of a (model, guide) pair gives; see `terms`.

    Args:
        log_likelihood: log p(x|z), (S, N).
        log_prior: log p(z), (S, N).
        log_guide: log q(z|x), (S, N).
        scale: What each datum counts for in a loss, a number or (N,): the size of the data plate over that
            of the batch, and any `poutine.scale` around the whole pair. Not part of the terms above.
        sites: The sites behind the terms.
        kl_weight: β of `log_weight` and `elbo`; 1 but for `KLWeighted`.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    scale: float | Tensor
    sites: "PairSites" = field(repr=False)
    kl_weight: float | Tensor = 1.0

    @property
    def log_weight(self) -> Tensor:
        """Log importance weight, log p(x|z) + β (log p(z) − log q(z|x)), (S, N); with β = 1, log w."""
        return self.log_likelihood + self.kl_weight * (self.log_prior - self.log_guide)

    @property
    def elbo(self) -> Tensor:
        """ELBO by each particle, (S, N): with the KL in closed form where `kl` has it, else sampled."""
        return self.log_weight if self.kl is None else self.log_likelihood - self.kl_weight * self.kl

    @cached_property
    def kl(self) -> Tensor | None:
        """KL(q(z|x) ‖ p(z)) in closed form, (N,), or None where it has none.

        The sum of the sites' KLs. Where a site's distributions depend on the draws of others, its KL does
        too, and the mean over the particles is given: an unbiased estimate that varies less than a sampled
        KL. None where torch knows no KL for a site's two distributions, where the two carry different masks
        or the guide's is a Delta with a density, where the guide has auxiliary sites, and where guide and
        model draw their sites in different order (a site's prior might then depend on its descendants in the
        guide, and the sum would be wrong).
        """
        guide_sites, latent = self.sites.guide, self.sites.latent
        if list(guide_sites) != list(latent):
            return None
        kls = [analytic_kl(site, latent[name]) for name, site in guide_sites.items()]
        known = [kl for kl in kls if kl is not None]
        return self.sites.sum(known).mean(0) if len(known) == len(kls) else None

    @cached_property
    def log_score(self) -> Tensor:
        """The log q(z|x) of the same draws held fixed, (S, N): its gradient is the score ∂ log q(z|x) / ∂φ.

        Taking the score away from the whole gradient of log q(z(φ)|x; φ) leaves the part that comes through
        the draws. A guide of several sites is run again for it, its draws replayed, because later sites
        depend on earlier draws; it should then make no random choices of its own, such as dropout's.

        Raises:
            ValueError: If a site can score no other values than those it has just drawn, as with a
                transform that has no inverse, or is a Delta or factor with a density of its own.
        """
        return self.sites.log_score()

    @property
    def log_score_function(self) -> Tensor:
        """Sum of log q over the guide's sites that are not reparameterised, (S, N)."""
        parts = (site["score_function"] for site in self.sites.guide.values())
        return self.sites.sum(part for part in parts if not is_identically_zero(part))

    @property
    def unreparameterised(self) -> list[str]:
        """The guide's sites that depend on parameters to which their draws carry no gradient."""
        return [
            name
            for name, site in self.sites.guide.items()
            if getattr(site["score_function"], "requires_grad", False)
        ]

    def scale_path_gradients(self, weight: Tensor) -> None:
        """Multiply the gradients of log p(x|z) and log p(z) in the guide's parameters by `weight` (S, N).

        They come through z. Those in the model's own parameters stay as they are. To be called once, before
        the backward pass.
        """
        for name, draw in self.sites.draws.items():
            if draw.requires_grad:
                factor = self.sites.along(weight, self.sites.guide[name])
                draw.register_hook(lambda gradient, factor=factor: gradient * factor)


def terms(
    model: Program,
    guide: Program,
    *data: Any,
    num_particles: int = 1,
    max_plate_nesting: int = 1,
    **kwargs: Any,
) -> Terms:
    """Run a (model, guide) pair once and give log p(x|z), log p(z), log q(z|x) per particle and datum.

    With more than one particle, the pair runs inside one more plate, left of its own: draws, and all that
    depends on them, gain a dimension of size S on the left. Every term is differentiable in whatever it
    depends on, through the draws too where they are reparameterised.

    Args:
        model: A Pyro model. Its observed sites make up log p(x|z), its latent sites log p(z).
        guide: A Pyro guide of the same arguments, with the model's latent sites and no others, but for sites
            marked `infer={"is_auxiliary": True}`.
        *data: Arguments of both.
        num_particles: S, independent draws from the guide for each datum.
        max_plate_nesting: How many dimensions the pair's own plates take: 1 if it has a data plate alone.
        **kwargs: Keyword arguments of both.

    Returns:
        The terms, (S, N); the KL in closed form, (N,), or None; and the scale that a loss puts back.

    Raises:
        TypeError: If `num_particles` or `max_plate_nesting` is no integer.
        ValueError: If either is below 1; if no site is observed; if a latent site is missing in the guide or
            the guide has one too many; if a site lies outside the data plate; if the batch is empty; if
            sites are scaled differently; if a value lies outside its distribution's support or a
            distribution's batch shape has a dimension that is no plate's. The message names the site.
        Exception: Whatever the model or guide raises; `check_guide` explains it.

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
    require_programs("terms(vae.model, vae.guide, x)", model, guide)
    require_count("num_particles", num_particles)
    require_count("max_plate_nesting", max_plate_nesting)
    # Pyro's message shows the name where another plate claims the same dimension.
    name = f"particles, outside max_plate_nesting={max_plate_nesting} plates"
    particles: AbstractContextManager = nullcontext()
    if num_particles > 1:
        particles = pyro.plate(name, num_particles, dim=-1 - max_plate_nesting)
    guide_trace, model_trace, draws = _run_pair(model, guide, data, kwargs, particles)
    guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
    observed = {key: site for key, site in model_sites.items() if site["is_observed"]}
    latent = latent_sites(model_sites)
    _check_sites(latent, observed, model_sites, guide_sites)
    plate = data_plate(guide_sites, model_sites, max_plate_nesting=max_plate_nesting, ignore=name)
    check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    for key, site in guide_sites.items():  # each site is given its log_prob, summed over below
        site["score_function"] = _scored(f"the guide's site {key!r}", site).score_function
    for key, site in model_sites.items():
        _scored(f"the model's site {key!r}", site)

    def at_fixed_draws() -> Sites:
        fixed = _with_values(guide_trace, {key: site["value"].detach() for key, site in guide_sites.items()})
        if len(guide_sites) == 1:
            return sample_sites(fixed)
        with particles:
            return sample_sites(run(poutine.replay(guide, trace=fixed), data, kwargs))

    sites = PairSites(
        guide=guide_sites,
        latent=latent,
        draws=draws,
        num_particles=num_particles,
        num_data=next(iter(guide_sites.values()))["log_prob"].shape[plate.dim],
        rank=max_plate_nesting + 1,
        data_dim=plate.dim,
        at_fixed_draws=at_fixed_draws,
    )
    return Terms(
        log_likelihood=sites.sum(site["log_prob"] for site in observed.values()),
        log_prior=sites.sum(site["log_prob"] for site in latent.values()),
        log_guide=sites.sum(site["log_prob"] for site in guide_sites.values()),
        scale=shared_scale(guide_sites, model_sites, sites.num_data),
        sites=sites,
    )


def _run_pair(
    model: Program, guide: Program, data: tuple, kwargs: dict[str, Any], particles: AbstractContextManager
) -> tuple[poutine.Trace, poutine.Trace, dict[str, Tensor]]:
    """Run the guide, then the model at its draws; return both traces and the draws as the model saw them."""
    with particles, _advised():
        guide_trace = run(guide, data, kwargs)
        # other views of the draws for the model: `scale_path_gradients` tells the gradients apart by them
        draws = {
            key: site["value"].view_as(site["value"])
            for key, site in sample_sites(guide_trace).items()
            if not site["is_observed"]
        }
        return (
            guide_trace,
            run(poutine.replay(model, trace=_with_values(guide_trace, draws)), data, kwargs),
            draws,
        )


def _check_sites(latent: Sites, observed: Sites, model_sites: Sites, guide_sites: Sites) -> None:
    if not latent:
        raise ValueError("the model has no latent site: there is nothing to infer")
    if not observed:
        raise ValueError("the model observes nothing: give a site the data, by obs=...")
    for problem in name_problems(model_sites, guide_sites):
        raise ValueError(problem)


@contextmanager
def _advised() -> Iterator[None]:
    """Say where to ask, when a pair fails with an error of its own."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "pyro_vae.check_guide(model, guide, *data) tells what does not fit, and what to change"
        )
        raise


@dataclass(frozen=True)
class PairSites:
    """The sites of one run of a pair, and where particles and data lie in their batch shapes."""

    guide: Sites
    latent: Sites
    draws: dict[str, Tensor]  # the latent values, as the model saw them
    num_particles: int
    num_data: int
    rank: int  # batch dimensions; the particles' is the leftmost
    data_dim: int  # from the right, negative
    at_fixed_draws: Callable[[], Sites]  # the guide's sites, their values and what depends on them detached

    @property
    def data_axis(self) -> int:
        """The data's place in a batch shape of all dimensions, from the left."""
        return self.rank + self.data_dim

    @property
    def other_dims(self) -> list[int]:
        """The batch dimensions that are neither the particles' nor the data's, from the right, negative."""
        return [dim for dim in range(1 - self.rank, 0) if dim != self.data_dim]

    def in_full(self, values: Tensor, event_dim: int = 0) -> Tensor:
        """Give values (*batch, *event) all batch dimensions: the ones that are missing, of size 1."""
        missing = self.rank + event_dim - values.dim()
        return values.reshape((1,) * missing + values.shape)

    def sum(self, log_probs: Iterable[Tensor]) -> Tensor:
        """Add up sites' log-probabilities by particle and datum, other plates' dimensions too: (S, N)."""
        nothing = next(iter(self.guide.values()))["log_prob"].new_zeros(())
        total = sum((self._per_datum(log_prob) for log_prob in log_probs), nothing)
        return total.expand(self.num_particles, self.num_data)

    def _per_datum(self, log_prob: Tensor) -> Tensor:
        log_prob = self.in_full(log_prob)
        return log_prob.sum(self.other_dims) if self.other_dims else log_prob

    def along(self, weight: Tensor, site: Site) -> Tensor:
        """Shape `weight` (S, N) so that it multiplies the values of a site."""
        shape = [1] * self.rank
        shape[0], shape[self.data_dim] = self.num_particles, self.num_data
        batch_dim = site["value"].dim() - site["fn"].event_dim
        return weight.reshape(shape[self.rank - batch_dim :] + [1] * site["fn"].event_dim)

    def log_score(self) -> Tensor:
        """Score the fixed draws; see `Terms.log_score`."""
        parts = []
        for name, site in self.at_fixed_draws().items():
            try:
                log_prob = site["fn"].log_prob(site["value"])
            except (KeyError, NotImplementedError) as error:
                raise ValueError(
                    f"the guide's site {name!r}, a {site_family(site)}, cannot score a value that it has not "
                    "just drawn (its transform has no inverse); use Trace_ELBO or IWAE"
                ) from error
            if site_family(site) in ("Delta", "Unit") and log_prob.requires_grad:
                raise ValueError(
                    f"the guide's site {name!r} carries a Jacobian that depends on parameters, which tells "
                    "nothing of the density at fixed draws; draw from a TransformedDistribution, or use "
                    "Trace_ELBO or IWAE"
                )
            parts.append(scale_and_mask(log_prob, 1.0, site["mask"]))
        return self.sum(parts)


def _with_values(trace: poutine.Trace, values: dict[str, Tensor]) -> poutine.Trace:
    """Copy a trace, with other values at some of its sites."""
    copy = trace.copy()
    for name, value in values.items():
        copy.nodes[name] = {**copy.nodes[name], "value": value}
    return copy


def _scored(where: str, site: Site) -> Any:
    """Enter a site's log_prob, masked but not scaled, and return its parts by kind of gradient."""
    try:
        parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
        site["log_prob"] = scale_and_mask(parts.log_prob, 1.0, site["mask"])
        check_site_shape(site, math.inf)
    except ValueError as error:
        raise ValueError(
            f"{where} cannot score its value: {error}\n"
            "Values must lie in the support of their distribution (grey levels lie outside a Bernoulli's: "
            "binarise them), and a distribution's batch dimensions must be plates' (else .to_event(...))"
        ) from error
    return parts
