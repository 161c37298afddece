"""Weight the KL of an estimator: β, constant or scheduled, and free bits.

The value of a loss stays that of the estimator with β = 1; its gradient is weighted.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.objectives.estimators import Estimator, Loss, label, total_loss, with_gradient_of
from pyro_vae.objectives.sites import Program, Site, Sites, kl_by_table, kl_fault, site_family

__all__ = ["KLWeighted", "inner_estimator"]

# The weighted loss; the loss with β = 1; guide's and latent sites of each run; particles within a run
_Evaluated = tuple[Tensor, Tensor, list[tuple[Sites, Sites]], int]


class KLWeighted(Loss):
    r"""Another weight on the KL of an estimator: β, constant or scheduled, and free bits.

    .. math:: \text{minimised:}\quad -E_q[\log p(x|z)] + \beta \sum_k \max(\lambda, \mathrm{KL}_k), \qquad
        \text{reported:}\quad -E_q[\log p(x|z)] + \mathrm{KL}(q(z|x) \,\|\, p(z))

    Only the gradient is weighted: the value of every loss stays the wrapped estimator's own, the one with
    β = 1 and without free bits, on the same draws. So what is logged is comparable all through a schedule,
    and is a bound on log p(x). `objective` gives the weighted value.

    In a multi-sample bound β weighs log p(z) − log q(z|x) within each log w. With free bits, which only the
    ELBO can have, a latent dimension (or z as a whole) whose KL, averaged over the batch, is below λ is not
    pushed further down. (A bound of S particles pulls on the KL about 1/S as much: λ would push it up.)

    Args:
        estimator: An `Estimator`, or Pyro's `Trace_ELBO` or `TraceMeanField_ELBO`.
        beta: β ≥ 0, or a function from the step (0, 1, ...) to it. Each gradient is a step: it is counted in
            `steps`, which can be set to resume.
        free_bits: λ ≥ 0, in bits.
        per: Whether λ is for each latent "dimension" or for the "total".

    Raises:
        TypeError: If the estimator is another, or β neither a number nor a function.
        ValueError: If β or `free_bits` is negative or not finite; with free bits, if the estimator's bound
            is not the ELBO, and when differentiated, if the KL of a latent site has no closed form, or none
            by dimensions.

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
        # Not their subclasses: the surrogate of some is not affine in β, and Pyro's Jit classes would fix it.
        if not isinstance(estimator, Estimator) and type(estimator) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise TypeError(
                "KLWeighted takes one of this library's estimators, Trace_ELBO or TraceMeanField_ELBO; got "
                f"{estimator!r}"
            )
        if not callable(beta):
            _require_weight("beta", beta)
        _require_weight("free_bits", free_bits)
        if per not in ("dimension", "total"):
            raise ValueError(f'per must be "dimension" or "total"; got {per!r}')
        if free_bits and isinstance(estimator, Estimator) and not estimator.is_elbo:
            raise ValueError(
                f"free bits are for the ELBO, but {estimator!r} has the KL within its weights, whose pull on "
                "it is another: wrap Trace_ELBO, TraceMeanField_ELBO, STL, or IWAE(1, num_groups=...)"
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
        """Estimate the loss of the wrapped estimator, which has β = 1."""
        return self.estimator.loss(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the loss with β = 1, with the gradient of the weighted one; counts a step."""
        beta = self.beta
        self.steps += torch.is_grad_enabled()
        return self.differentiable_loss_at(beta, model, guide, *args, **kwargs)

    def differentiable_loss_at(
        self, beta: float | Tensor, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Give `differentiable_loss` with a β of the caller's, which may be a tensor; counts no step."""
        objective, value = self._evaluate(beta, model, guide, args, kwargs)
        return with_gradient_of(objective, value=value)

    def objective(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the weighted loss, value and gradient, with β of the next step; counts no step."""
        return self._evaluate(self.beta, model, guide, args, kwargs)[0]

    def _evaluate(
        self, beta: float | Tensor, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, and the value of the loss with β = 1 on the same draws."""
        evaluate = self._ours if isinstance(self.estimator, Estimator) else self._pyros
        objective, value, runs, particles = evaluate(beta, model, guide, args, kwargs)
        if self.free_bits:
            penalties = [self._free_bits_penalty(guide, latent, particles) for guide, latent in runs]
            objective = objective + beta * sum(penalties) / len(runs)
        return objective, value

    def _ours(
        self, beta: float | Tensor, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]
    ) -> _Evaluated:
        """Weigh an `Estimator`'s KL in its terms."""
        terms = self.estimator.terms(model, guide, *args, **kwargs)
        weighted = replace(terms, kl_weight=beta)
        objective = with_gradient_of(
            total_loss(terms, self.estimator.surrogate(weighted)),
            value=total_loss(terms, self.estimator.bound(weighted)),
        )
        value = total_loss(terms, self.estimator.bound(terms))
        return objective, value, [(terms.sites.guide, terms.sites.latent)], terms.sites.num_particles

    def _pyros(
        self, beta: float | Tensor, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]
    ) -> _Evaluated:
        """Weigh a Pyro estimator's KL by the scale of the latent sites, in all of its runs of the pair."""
        if isinstance(poutine.unwrap(guide), Messenger):
            raise TypeError("KLWeighted takes no GuideMessenger: give a guide that is a function")
        weighing = _WeighLatents(beta)
        with weighing:
            objective = self.estimator.differentiable_loss(
                weighing.model(model), weighing.guide(guide), *args, **kwargs
            )
        runs = [run for run in weighing.runs if run[0]]
        if not runs:
            raise ValueError("the guide has no sample site: there is no KL to weigh")
        # the loss is −E_q[log p(x|z)] + β KL; adding (1 − β) KL of the same draws makes it that with β = 1
        value = objective.detach() + (1 - beta) * self._kl(runs) / self.num_particles
        return objective, value, runs, self.num_particles // len(runs)

    @torch.no_grad()
    def _kl(self, runs: list[tuple[Sites, Sites]]) -> Tensor:
        """The KL as Pyro's estimator takes it, summed over the batch and particles, unweighted."""
        total = torch.zeros(())
        for guide, latent in runs:
            for name, q in guide.items():
                p = latent.get(name)
                kl = None
                if p is not None and isinstance(self.estimator, TraceMeanField_ELBO):
                    kl = kl_by_table(q, p)
                if kl is None:
                    total = total + _scaled(q["fn"].log_prob(q["value"]), q).sum()
                    if p is not None:
                        total = total - _scaled(p["fn"].log_prob(p["value"]), p).sum()
                else:
                    total = total + (kl * q["scale"]).sum()
        return total

    def _free_bits_penalty(self, guide: Sites, latent: Sites, particles: int) -> Tensor:
        """What max(λ, KL) adds to the KL, summed over the batch."""
        if list(guide) != list(latent):
            raise ValueError(
                f"free bits need the KL in closed form, but the guide draws {list(guide)} and the model "
                f"{list(latent)}: draw the same sites in the same order"
            )
        kls, counts = [], []
        for name, q in guide.items():
            if sum(frame.vectorized for frame in q["cond_indep_stack"]) > 1 + (particles > 1):
                raise ValueError(f"free bits are for sites in one plate, but {name!r} lies in several")
            kl = _closed_kl(name, q, latent[name], by_dimension=self.per == "dimension")
            batch_dims = tuple(range(kl.dim() - 1))
            kls.append(_scaled(kl, q, event_dim=1).sum(batch_dims) / particles)
            counts.append(_scaled(torch.ones_like(kl), q, event_dim=1).sum(batch_dims) / particles)
        floor = self.free_bits * math.log(2)
        if self.per == "total":
            return (floor * torch.cat(counts).max() - torch.cat(kls).sum()).relu()
        return (floor * torch.cat(counts) - torch.cat(kls)).relu().sum()

    def __repr__(self) -> str:
        beta = "schedule" if callable(self.schedule) else self.schedule
        free_bits = f", free_bits={self.free_bits}, per={self.per!r}" if self.free_bits else ""
        return f"KLWeighted({label(self.estimator)}, {beta}{free_bits})"


def inner_estimator(loss: ELBO) -> ELBO:
    """Return the estimator that a `KLWeighted` holds, or the loss itself.

    Example:
        >>> label(inner_estimator(KLWeighted(Trace_ELBO(), 0.5)))
        'Trace_ELBO()'
    """
    return loss.estimator if isinstance(loss, KLWeighted) else loss


class _WeighLatents(Messenger):
    """Scale the latent sites of model and guide by β, and keep them with the scale that they had.

    To be entered around an ELBO: Pyro's handlers see a site from the inside out before it is sampled, so that
    this one, the outermost, sees it last, with the scale that plates have given it; after it, the other way
    round.
    """

    def __init__(self, weight: float | Tensor):
        super().__init__()
        self.weight = weight
        self.runs: list[tuple[Sites, Sites]] = []
        self.in_guide = False
        self.scale: float | Tensor = 1.0  # of the site that is being sampled, without β

    def guide(self, program: Program) -> Program:
        def guide(*args: Any, **kwargs: Any) -> Any:
            self.in_guide = True
            self.runs.append(({}, {}))
            return program(*args, **kwargs)

        return guide

    def model(self, program: Program) -> Program:
        def model(*args: Any, **kwargs: Any) -> Any:
            self.in_guide = False
            return program(*args, **kwargs)

        return model

    def _weighs(self, site: Any) -> bool:
        return not site_is_subsample(site) and (self.in_guide or not site["is_observed"])

    def _pyro_sample(self, msg: Any) -> None:
        if self._weighs(msg):
            self.scale = msg["scale"]
            msg["scale"] = self.scale * self.weight

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._weighs(msg):
            guide, latent = self.runs[-1]
            (guide if self.in_guide else latent)[msg["name"]] = {**msg, "scale": self.scale}


def _scaled(tensor: Tensor, site: Site, *, event_dim: int = 0) -> Tensor:
    """Scale and mask a tensor of a site's batch shape, with event dimensions on the right."""
    scale, mask = (
        x[(..., *(None,) * event_dim)] if isinstance(x, Tensor) else x for x in (site["scale"], site["mask"])
    )
    return scale_and_mask(tensor, scale, mask)


def _closed_kl(name: str, q: Site, p: Site, *, by_dimension: bool) -> Tensor:
    """The KL of a latent site, (*batch_shape, K) by dimensions or (*batch_shape, 1) in total."""
    pair = q["fn"], p["fn"]
    if by_dimension and all(isinstance(fn, Independent) for fn in pair):
        pair = pair[0].base_dist, pair[1].base_dist
    try:
        if kl_fault(q, p) or (by_dimension and pair[0].event_dim > 0):
            raise NotImplementedError
        kl = kl_divergence(*pair)
    except NotImplementedError:
        raise ValueError(
            f"free bits need the KL of the site {name!r} in closed form{' by dimensions' * by_dimension}, "
            f"which is not known for {site_family(q)} and {site_family(p)}"
        ) from None
    return kl.reshape(*q["fn"].batch_shape, -1)


def _require_weight(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0; got {value}")
