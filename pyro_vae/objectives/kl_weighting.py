"""Weight on the KL of an estimator: β, constant or scheduled, and free bits.

A loss keeps the value of the wrapped estimator, with β = 1; only its gradient is weighted.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.objectives.estimators import Estimator, Loss, label, total_loss, with_gradient_of
from pyro_vae.objectives.pair import as_tensors
from pyro_vae.objectives.sites import (
    Program,
    Site,
    Sites,
    guide_messenger,
    kl_invalid_reason,
    masked_log_prob,
    registered_kl,
    site_family,
)

__all__ = ["KLWeighted", "inner_estimator"]


class KLWeighted(Loss):
    r"""Estimator with a weight β on its KL, constant or scheduled, and with free bits.

    .. math:: \text{minimised:}\quad -E_q[\log p(x|z)] + \beta \sum_k \max(\lambda, \mathrm{KL}_k), \qquad
        \text{reported:}\quad -E_q[\log p(x|z)] + \mathrm{KL}(q(z|x) \,\|\, p(z))

    Only the gradient is weighted. The value of a loss is that of the wrapped estimator on the same draws,
    with β = 1 and without free bits, so that it is a bound on log p(x) and comparable throughout a schedule.
    `objective` returns the weighted value.

    In a multi-sample bound, β weights log p(z) − log q(z|x) within each log w. Free bits are only for the
    ELBO: the gradient does not reduce the KL of a latent dimension (or of z), averaged over the batch, below
    λ. In a bound of S particles, the gradient of the KL is about 1/S as large, so that λ would increase it.

    Args:
        estimator: An `Estimator`, or Pyro's `Trace_ELBO` or `TraceMeanField_ELBO`.
        beta: β ≥ 0, or a function from the step (0, 1, ...) to β. Each gradient is one step; set `steps`, the
            number of steps taken, to resume a schedule.
        free_bits: λ ≥ 0, in bits.
        per: "dimension" for λ per latent dimension, "total" for λ in all.

    Raises:
        TypeError: If the estimator is of another class, or β is neither a number nor a function.
        ValueError: If β or `free_bits` is negative or not finite; with free bits, if the bound is not the
            ELBO, or, when differentiated, if the KL of a latent site has no closed form (per dimension).

    Source:
        I. Higgins et al. (2017), beta-VAE; S. R. Bowman et al. (2016), Generating sentences from a continuous
        space, arXiv:1511.06349 (schedules); D. P. Kingma et al. (2016), Improving variational inference with
        inverse autoregressive flow, arXiv:1606.04934 (free bits).

    Example:
        >>> KLWeighted(TraceMeanField_ELBO(), beta=lambda step: min(1.0, step / 1000)).beta
        0.0
        >>> KLWeighted(Trace_ELBO(), 1.0, free_bits=0.1)
        KLWeighted(Trace_ELBO(), 1.0, free_bits=0.1, per='dimension')
    """

    def __init__(
        self,
        estimator: Estimator | ELBO,
        beta: float | Callable[[int], float],
        *,
        free_bits: float = 0.0,
        per: Literal["dimension", "total"] = "dimension",
    ):
        # Subclasses of Pyro's estimators are excluded: some have surrogates that are not affine in β, and the
        # Jit classes would record β as a constant.
        if not isinstance(estimator, Estimator) and type(estimator) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise TypeError(
                "KLWeighted, and so kl_warmup of fit, takes one of this library's estimators, Trace_ELBO or "
                f"TraceMeanField_ELBO; got {label(estimator)}{_of_enumeration(estimator)}"
            )
        if not callable(beta):
            _require_weight("beta", beta)
        _require_weight("free_bits", free_bits)
        if per not in ("dimension", "total"):
            raise ValueError(f'per must be "dimension" or "total"; got {per!r}')
        if free_bits and isinstance(estimator, Estimator) and not estimator.is_elbo:
            raise ValueError(
                f"free bits are for the ELBO, but {estimator!r} has the KL within its weights, where its "
                "gradient differs: wrap Trace_ELBO, TraceMeanField_ELBO, STL, or IWAE(1, num_groups=...)"
            )
        super().__init__(num_particles=estimator.num_particles, retain_graph=estimator.retain_graph)
        self.estimator = estimator
        self.schedule = beta
        self.free_bits = free_bits
        self.per = per
        self.steps = 0

    @property
    def beta(self) -> float:
        """β of the next step."""
        beta = self.schedule(self.steps) if callable(self.schedule) else self.schedule
        _require_weight("beta", beta)
        return beta

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimate the loss of the wrapped estimator, with β = 1."""
        args, kwargs = as_tensors(model, args, kwargs)
        return self.estimator.loss(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the loss with β = 1, with the gradient of the weighted loss; count a step."""
        beta = self.beta
        self.steps += torch.is_grad_enabled()
        return self.differentiable_loss_at(beta, model, guide, *args, **kwargs)

    def differentiable_loss_at(
        self, beta: float | Tensor, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Estimate `differentiable_loss` for a given β, which may be a tensor; count no step."""
        objective, value = self._evaluate(beta, model, guide, args, kwargs)
        return with_gradient_of(objective, value=value)

    def objective(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the weighted loss, value and gradient, with β of the next step; count no step."""
        return self._evaluate(self.beta, model, guide, args, kwargs)[0]

    def _evaluate(
        self,
        beta: float | Tensor,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted loss, and the loss with β = 1 on the same draws."""
        args, kwargs = as_tensors(model, args, kwargs)
        weight_kl = _weight_terms if isinstance(self.estimator, Estimator) else _weight_scales
        objective, value, runs, particles = weight_kl(self.estimator, beta, model, guide, *args, **kwargs)
        if self.free_bits:
            penalties = [_free_bits_penalty(run, particles, self.free_bits, self.per) for run in runs]
            objective = objective + beta * sum(penalties) / len(runs)
        return objective, value

    def __repr__(self) -> str:
        beta = "schedule" if callable(self.schedule) else self.schedule
        free_bits = f", free_bits={self.free_bits}, per={self.per!r}" if self.free_bits else ""
        return f"KLWeighted({label(self.estimator)}, {beta}{free_bits})"


def _of_enumeration(estimator: Any) -> str:
    if not isinstance(estimator, TraceEnum_ELBO):
        return ""
    return (
        ", which sums over values with the very densities that a weight would change: use IWAE(1), which "
        "sums over sites that the model alone enumerates, or Trace_ELBO, which draws those of the guide"
    )


def inner_estimator(loss: ELBO) -> ELBO:
    """Return the estimator that a `KLWeighted` wraps, or the loss itself.

    Example:
        >>> label(inner_estimator(KLWeighted(Trace_ELBO(), 0.5)))
        'Trace_ELBO()'
    """
    return loss.estimator if isinstance(loss, KLWeighted) else loss


def _require_weight(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0; got {value}")


# Weighting --------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Sites of the guide and latent sites of the model in one run of a pair."""

    guide: Sites
    latent: Sites


class _Weighted(NamedTuple):
    """Weighted loss, its value with β = 1 on the same draws, and the sites of each run of the pair."""

    objective: Tensor
    value: Tensor
    runs: list[_Run]
    particles: int  # of each run


def _weight_terms(
    estimator: Estimator, beta: float | Tensor, model: Program, guide: Program, /, *args: Any, **kwargs: Any
) -> _Weighted:
    """Weight the KL of an `Estimator` in its terms."""
    terms = estimator.terms(model, guide, *args, **kwargs)
    weighted = replace(terms, kl_weight=beta)
    surrogate = total_loss(terms, estimator.surrogate(weighted))
    objective = with_gradient_of(surrogate, value=total_loss(terms, estimator.bound(weighted)))
    value = total_loss(terms, estimator.bound(terms))
    runs = [_Run(terms.sites.guide, terms.sites.latent)]
    return _Weighted(objective, value, runs, terms.sites.num_particles)


def _weight_scales(
    estimator: ELBO, beta: float | Tensor, model: Program, guide: Program, /, *args: Any, **kwargs: Any
) -> _Weighted:
    """Weight the KL of one of Pyro's estimators by the scale of the latent sites, in each run of the pair."""
    if guide_messenger(guide) is not None:
        raise TypeError("KLWeighted takes no GuideMessenger: pass a guide that is a function")
    scaling = _ScaleLatentSites(beta)
    with scaling:
        pair = scaling.in_model(model), scaling.in_guide(guide)
        objective = estimator.differentiable_loss(*pair, *args, **kwargs)
    runs = [run for run in scaling.runs if run.guide]
    if not runs:
        raise ValueError("the guide has no sample site and therefore no KL to weight")
    # The objective is −E_q[log p(x|z)] + β KL. Adding (1 − β) KL of the same draws gives the loss with β = 1.
    kl = _sum_of_kls(runs, analytic=isinstance(estimator, TraceMeanField_ELBO))
    value = objective.detach() + (1 - beta) * kl / estimator.num_particles
    return _Weighted(objective, value, runs, estimator.num_particles // len(runs))


class _ScaleLatentSites(Messenger):
    """Multiply the scale of latent sites by a weight, and record the sites with their unweighted scale.

    Must be entered outside an ELBO. Pyro's handlers process a site from the innermost to the outermost before
    sampling, and in reverse order after it: this one therefore reads the scale after the plates have set it.
    """

    def __init__(self, weight: float | Tensor):
        super().__init__()
        self.weight = weight
        self.runs: list[_Run] = []
        self.is_guide = False
        self.scale: float | Tensor = 1.0  # of the current site, unweighted

    def in_guide(self, program: Program) -> Program:
        def guide(*args: Any, **kwargs: Any) -> Any:
            self.is_guide = True
            self.runs.append(_Run({}, {}))
            return program(*args, **kwargs)

        return guide

    def in_model(self, program: Program) -> Program:
        def model(*args: Any, **kwargs: Any) -> Any:
            self.is_guide = False
            return program(*args, **kwargs)

        return model

    def _is_latent(self, site: Any) -> bool:
        return not site_is_subsample(site) and (self.is_guide or not site["is_observed"])

    def _pyro_sample(self, msg: Any) -> None:
        if self._is_latent(msg):
            self.scale = msg["scale"]
            msg["scale"] = self.scale * self.weight

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._is_latent(msg):
            run = self.runs[-1]
            (run.guide if self.is_guide else run.latent)[msg["name"]] = {**msg, "scale": self.scale}


@torch.no_grad()
def _sum_of_kls(runs: list[_Run], *, analytic: bool) -> Tensor:
    """Sum the unweighted KL over sites, batch and particles, sampled or (if known) analytic."""
    total = torch.zeros(())
    for guide, latent in runs:
        for name, q in guide.items():
            p = latent.get(name)
            kl = registered_kl(q, p) if p is not None and analytic else None
            if kl is None:
                total = total + (masked_log_prob(q, q["value"]) * q["scale"]).sum()
                if p is not None:
                    total = total - (masked_log_prob(p, p["value"]) * p["scale"]).sum()
            else:
                total = total + (kl * q["scale"]).sum()
    return total


# Free bits --------------------------------------------------------------------------------------------------


def _free_bits_penalty(run: _Run, particles: int, free_bits: float, per: str) -> Tensor:
    """Compute the excess of max(λ, KL) over the KL, summed over the batch."""
    guide, latent = run
    if list(guide) != list(latent):
        raise ValueError(
            f"free bits need the KL in closed form, but the guide draws {list(guide)} and the model "
            f"{list(latent)}: draw the same sites in the same order"
        )
    kls, counts = [], []
    for name, q in guide.items():
        if sum(frame.vectorized for frame in q["cond_indep_stack"]) > 1 + (particles > 1):
            raise ValueError(f"free bits are for sites in one plate, but {name!r} lies in several")
        kl = _closed_form_kl(name, q, latent[name], per_dimension=per == "dimension")
        kls.append(_sum_over_batch(kl, q) / particles)
        counts.append(_sum_over_batch(torch.ones_like(kl), q) / particles)
    floor = free_bits * math.log(2)
    if per == "total":
        return (floor * torch.cat(counts).max() - torch.cat(kls).sum()).relu()
    return (floor * torch.cat(counts) - torch.cat(kls)).relu().sum()


def _closed_form_kl(name: str, q: Site, p: Site, *, per_dimension: bool) -> Tensor:
    """Compute the KL of a latent site, (*batch_shape, K) per dimension or (*batch_shape, 1) in total."""
    pair = q["fn"], p["fn"]
    if per_dimension and all(isinstance(fn, Independent) for fn in pair):
        pair = pair[0].base_dist, pair[1].base_dist
    try:
        if kl_invalid_reason(q, p) or (per_dimension and pair[0].event_dim > 0):
            raise NotImplementedError
        kl = kl_divergence(*pair)
    except NotImplementedError:
        raise ValueError(
            f"free bits need the KL of the site {name!r} in closed form{' per dimension' * per_dimension}, "
            f"which is not known for {site_family(q)} and {site_family(p)}"
        ) from None
    return kl.reshape(*q["fn"].batch_shape, -1)


def _sum_over_batch(values: Tensor, site: Site) -> Tensor:
    """Scale and mask values (*batch_shape, K) of a site, and sum them over the batch, to (K,)."""
    scale, mask = (x.unsqueeze(-1) if isinstance(x, Tensor) else x for x in (site["scale"], site["mask"]))
    return scale_and_mask(values, scale, mask).sum(tuple(range(values.dim() - 1)))
