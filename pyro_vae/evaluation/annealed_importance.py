"""Annealed importance sampling: an estimate of the log-evidence in which the guide has no part.

Notation: N data, C chains for each, T steps through the inverse temperatures 0 = β_0 < … < β_T = 1.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.data.datasets import Images
from pyro_vae.evaluation.draws import Pair, chunk_sizes, observe, require_finite
from pyro_vae.evaluation.importance_weights import WeightSummary, summarise_weights
from pyro_vae.objectives.log_terms import PairSites, terms
from pyro_vae.objectives.sites import Site, run, sample_sites, site_family
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.validation import require_count

__all__ = ["AnnealedEvidence", "annealed_importance_sampling"]

_ACCEPTANCE = 0.65  # wanted of the moves
_PILOT_CHAINS = 4
Draws = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class AnnealedEvidence:
    """What `annealed_importance_sampling` reports.

    Attributes:
        weights: Of the chains: `log_mean` estimates log p(x) of each datum, in nats, (N,).
        acceptance: Mean probability with which the moves of each datum's chains were accepted, (N,).
        num_chains: C.
        num_temperatures: T.
        seed: The seed of the draws.
    """

    weights: WeightSummary
    acceptance: Tensor
    num_chains: int
    num_temperatures: int
    seed: int

    @property
    def log_evidence(self) -> float:
        """Mean estimate of log p(x) over the data, in nats per datum."""
        return float(self.weights.log_mean.mean())

    @property
    def log_evidence_mc_se(self) -> float:
        """Monte Carlo error of `log_evidence` for these very data."""
        errors = self.weights.standard_error
        return float(errors.square().sum().sqrt() / len(errors))


def annealed_importance_sampling(
    vae: Pair,
    data: Tensor | Images,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 10,
    binarize: str | None = None,
    seed: int = 0,
    max_plate_nesting: int = 1,
    progress: bool = True,
) -> AnnealedEvidence:
    r"""Estimate log p(x) by chains that lead from the prior to the posterior.

    .. math:: w = \prod_{t=1}^T p(x|z_{t-1})^{\beta_t - \beta_{t-1}}, \qquad z_0 \sim p(z), \qquad E[w] = p(x)

    z_t comes from z_{t−1} by a move of Hamiltonian Monte Carlo that leaves the distribution in proportion to
    p(z) p(x|z)^{β_t} as it is. The mean weight is unbiased, so that its logarithm is at most log p(x) on
    average, as in `evaluate`, but for other reasons: chains may mix too slowly, a guide may be too narrow.
    Where both estimates agree, both can be believed. The β_t lie along a sigmoid; the length of a
    leapfrog step, for each datum and t, is found by a pilot run of other chains, because steps that answer to
    the very chains they move would bias the estimate.

    Takes 2 C T (L + 1) gradients of the log-density for each datum, nearly: give it a subset of the data.

    Args:
        vae: A `VAE`, or any object with Pyro functions `model` and `guide`; the guide is not used.
        data: N data, (N, *event_shape), in the support of the likelihood.
        num_chains: C.
        num_temperatures: T.
        num_leapfrog: L, steps of a move.
        binarize: As in `evaluate`.
        seed: As in `evaluate`.
        max_plate_nesting: As in `evaluate`.
        progress: Show a progress bar, in a terminal or a notebook.

    Raises:
        TypeError: If the data are no floating-point tensor or `Images`, or a number is no integer.
        ValueError: If a number is below 1, the data are unfit, or a latent variable is not real.
        NonFiniteError: If an importance weight is infinite or NaN; names the data and how many.

    Source: R. M. Neal (2001), Annealed importance sampling, Statistics and Computing 11; Y. Wu, Y. Burda,
    R. Salakhutdinov, R. Grosse (2017), On the quantitative analysis of decoder-based generative models,
    arXiv:1611.04273.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> x = torch.randn(3, 6)
        >>> annealed_importance_sampling(vae, x, num_temperatures=20, progress=False).weights.log_mean.shape
        torch.Size([3])
    """
    counts = {"num_chains": num_chains, "num_temperatures": num_temperatures, "num_leapfrog": num_leapfrog}
    for name, count in counts.items():
        require_count(name, count)
    batches = observe(vae, data, binarize=binarize, seed=seed)
    at_once = max(1, math.prod(chunk_sizes(batches, num_chains)) // num_chains)
    betas = inverse_temperatures(num_temperatures).tolist()
    log_weight, acceptance = [], []
    with (
        evaluating(vae, batches.device, seed),
        progress_bar(2 * len(batches) * num_temperatures, shown=progress, unit=" steps") as bar,
    ):
        bar.set_description("annealing")
        bar.unit_scale = True
        for number, x in enumerate(batches.in_order(at_once)):
            run_chains = functools.partial(
                _run_chains,
                vae,
                x,
                betas,
                num_leapfrog=num_leapfrog,
                max_plate_nesting=max_plate_nesting,
                advance=bar.update,
            )
            pilot = run_chains(num_chains=_PILOT_CHAINS, steps=None)
            chains = run_chains(num_chains=num_chains, steps=pilot.steps)
            require_finite(chains.log_weight, first=number * at_once)
            log_weight.append(chains.log_weight)
            acceptance.append(chains.acceptance)
    return AnnealedEvidence(
        weights=summarise_weights(torch.cat(log_weight, dim=1)),
        acceptance=torch.cat(acceptance).cpu(),
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        seed=seed,
    )


def inverse_temperatures(count: int) -> Tensor:
    """β_0 … β_T along a sigmoid: closest together near the prior and near the posterior."""
    sigmoid = torch.sigmoid(torch.linspace(-4, 4, count + 1, dtype=torch.float64))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


@dataclass(frozen=True)
class _Chains:
    log_weight: Tensor  # (C, n)
    acceptance: Tensor  # (n,)
    steps: Tensor  # lengths of the leapfrog steps, (T, n)


def _run_chains(
    pair: Pair,
    x: Tensor,
    betas: list[float],
    *,
    num_chains: int,
    steps: Tensor | None,
    num_leapfrog: int,
    max_plate_nesting: int,
    advance: Callable[[int], object],
) -> _Chains:
    """Lead chains from prior to posterior by steps of given lengths (T, n), or find these on the way."""
    prior = poutine.block(pair.model, hide_fn=_is_observed)  # a guide of the latent sites alone
    start = terms(pair.model, prior, x, num_particles=num_chains, max_plate_nesting=max_plate_nesting)
    for name, site in start.sites.latent.items():
        _require_real(name, site)
    density = _Density(pair.model, x, start.sites)
    z, log_likelihood = dict(start.sites.draws), start.log_likelihood
    log_weight = torch.zeros_like(log_likelihood, dtype=torch.float64)
    lengths = log_likelihood.new_full((len(betas) - 1, len(x)), 0.5) if steps is None else steps
    accepted = log_likelihood.new_zeros(len(x))
    for t, beta in enumerate(betas[1:]):
        log_weight += (beta - betas[t]) * log_likelihood
        z, log_likelihood, probability = density.move(z, beta, lengths[t], num_leapfrog)
        accepted += probability.mean(0)
        if steps is None:
            lengths[t + 1 :] = lengths[t] * (0.5 * (probability.mean(0) - _ACCEPTANCE)).exp()
        advance(len(x))
    return _Chains(log_weight, accepted / len(lengths), lengths)


class _Density:
    """log p(z) + β log p(x|z) of chains z, {site: (C, …, n, …, *event)}, and moves that leave it as it is."""

    def __init__(self, model: Callable, x: Tensor, sites: PairSites):
        self.model, self.x, self.sites = model, x, sites

    def _terms(self, z: Draws) -> tuple[Tensor, Tensor]:
        """Log p(z) and log p(x|z), (C, n)."""
        chains = pyro.plate("chains", self.sites.num_particles, dim=-self.sites.rank)
        with chains if self.sites.num_particles > 1 else nullcontext():
            model_sites = sample_sites(run(poutine.condition(self.model, data=z), (self.x,), {}))
        log_probs = {
            name: scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
            for name, site in model_sites.items()
        }
        prior = self.sites.sum(log_prob for name, log_prob in log_probs.items() if name in z)
        return prior, self.sites.sum(log_prob for name, log_prob in log_probs.items() if name not in z)

    def _with_gradient(self, z: Draws, beta: float) -> tuple[Tensor, Tensor, Draws]:
        """The log-density and log p(x|z), (C, n), and the gradient of the log-density."""
        z = {name: values.detach().requires_grad_() for name, values in z.items()}
        with torch.enable_grad():
            log_prior, log_likelihood = self._terms(z)
            log_density = log_prior + beta * log_likelihood
            gradient = torch.autograd.grad(log_density.sum(), list(z.values()))
        return log_density.detach(), log_likelihood.detach(), dict(zip(z, gradient, strict=True))

    def move(self, z: Draws, beta: float, step: Tensor, num_leapfrog: int) -> tuple[Draws, Tensor, Tensor]:
        """Move by Hamiltonian Monte Carlo with steps of length (n,).

        Returns:
            The new z, their log p(x|z), (C, n), and the probabilities with which the moves were accepted.
        """
        lengths = {name: self._along(step.expand(self.sites.num_particles, -1), name) for name in z}
        momentum = {name: torch.randn_like(values) for name, values in z.items()}
        log_density, log_likelihood, gradient = self._with_gradient(z, beta)
        before = log_density - self._kinetic(momentum)
        new, new_likelihood = z, log_likelihood
        for _ in range(num_leapfrog):
            momentum = {name: p + lengths[name] / 2 * gradient[name] for name, p in momentum.items()}
            new = {name: values + lengths[name] * momentum[name] for name, values in new.items()}
            log_density, new_likelihood, gradient = self._with_gradient(new, beta)
            momentum = {name: p + lengths[name] / 2 * gradient[name] for name, p in momentum.items()}
        log_ratio = log_density - self._kinetic(momentum) - before
        probability = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)  # a move to nowhere is refused
        accept = torch.rand_like(probability) < probability
        z = {name: torch.where(self._along(accept, name), new[name], values) for name, values in z.items()}
        return z, torch.where(accept, new_likelihood, log_likelihood), probability

    def _kinetic(self, momentum: Draws) -> Tensor:
        """½ |p|² of each chain and datum, (C, n)."""
        squares = []
        for name, p in momentum.items():
            event_dim = self.sites.guide[name]["fn"].event_dim
            squares.append(p.square().sum(tuple(range(-event_dim, 0))) if event_dim else p.square())
        return self.sites.sum(squares) / 2

    def _along(self, value: Tensor, name: str) -> Tensor:
        return self.sites.along(value, self.sites.guide[name])


def _is_observed(site: Site) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def _require_real(name: str, site: Site) -> None:
    support = site["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is not constraints.real:
        raise ValueError(
            f"annealing moves latent variables along gradients, so that they must be real; {name!r}, a "
            f"{site_family(site)}, has the support {support}. Transform it in the model, or use evaluate"
        )
