"""Annealed importance sampling: an estimate of the log-evidence that does not use the guide.

Notation: N examples, C chains per example, inverse temperatures 0 = β_0 < … < β_T = 1.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.data.sources import arguments, num_rows
from pyro_vae.evaluation.draws import Pair, chunk_sizes, in_chunks, prepare_data, require_finite
from pyro_vae.evaluation.importance_weights import WeightSummary, summarise_weights
from pyro_vae.objectives.log_terms import PairSites, terms
from pyro_vae.objectives.pair import as_programs
from pyro_vae.objectives.sites import Site, masked_log_prob, run, sample_sites, site_family
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.validation import elementwise_support, require_count

__all__ = ["AnnealedEvidence", "annealed_importance_sampling"]

_CHAINS = 51  # a stream of random numbers
_ACCEPTANCE = 0.65  # target probability of accepting a move
_PILOT_CHAINS = 4
Draws = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class AnnealedEvidence:
    """Log-evidence estimates by annealed importance sampling.

    Attributes:
        weights: Summary of the chains' weights: `log_mean` estimates log p(x) per example, in nats, (N,).
        acceptance: Mean acceptance probability of the moves, per example, (N,).
        num_chains: C.
        num_temperatures: T.
        seed: Seed of the draws.
    """

    weights: WeightSummary
    acceptance: Tensor
    num_chains: int
    num_temperatures: int
    seed: int

    @property
    def log_evidence(self) -> float:
        """Mean estimate of log p(x), in nats per datum."""
        return float(self.weights.log_mean.mean())

    @property
    def log_evidence_mc_se(self) -> float:
        """Monte Carlo error of `log_evidence`, the data held fixed."""
        errors = self.weights.standard_error
        return float(errors.square().sum().sqrt() / len(errors))


def annealed_importance_sampling(
    vae: Pair,
    data: Any,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 10,
    binarize: str | None = None,
    missing: str | None = None,
    seed: int = 0,
    max_plate_nesting: int = 1,
    progress: bool = True,
) -> AnnealedEvidence:
    r"""Estimate log p(x) by Markov chains from the prior to the posterior.

    .. math:: w = \prod_{t=1}^T p(x|z_{t-1})^{\beta_t - \beta_{t-1}}, \qquad z_0 \sim p(z), \qquad E[w] = p(x)

    z_t comes from z_{t−1} by a move of Hamiltonian Monte Carlo that leaves p(z) p(x|z)^{β_t}, normalised,
    invariant. The mean weight is unbiased, so that its logarithm is at most log p(x) on average. The same
    holds for `evaluate`, but the causes of a low estimate differ: chains that mix too slowly here, a guide
    that is too narrow there. Agreement of the two supports both. The β_t lie along a sigmoid. The length of
    a leapfrog step, per example and t, is tuned on pilot chains, because steps adapted to the chains that
    they move would bias the estimate. Cost per example: (C + 4) T (L + 1) gradients of the log-density.

    Args:
        vae: As in `evaluate`; the guide is not used.
        data: As in `evaluate`.
        num_chains: C.
        num_temperatures: T.
        num_leapfrog: L, leapfrog steps per move.
        binarize: As in `evaluate`.
        missing: As in `evaluate`.
        seed: As in `evaluate`.
        max_plate_nesting: As in `evaluate`.
        progress: Show a progress bar in a terminal or notebook.

    Raises:
        ValueError: If a latent variable is not real. Invalid arguments raise as in `evaluate`.

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
    if not callable(getattr(vae, "model", None)):  # a guide is not needed
        vae = as_programs("annealed_importance_sampling(pair, data)", vae)
    for name, count in counts.items():
        require_count(name, count)
    batches = prepare_data(vae, data, binarize=binarize, seed=seed, missing=missing)
    at_once = max(1, math.prod(chunk_sizes(batches, num_chains)) // num_chains)
    betas = inverse_temperatures(num_temperatures).tolist()
    log_weight, acceptance = [], []
    total = 2 * len(batches) * num_temperatures
    options: dict[str, Any] = {"num_leapfrog": num_leapfrog, "max_plate_nesting": max_plate_nesting}
    with (
        evaluating(vae, batches.device, seed),
        progress_bar(total, shown=progress, unit=" steps", unit_scale=True, desc="annealing") as bar,
    ):
        options["advance"] = bar.update
        for first_index, batch in in_chunks(batches, at_once, _CHAINS):
            pilot = _run_chains(vae, batch, betas, num_chains=_PILOT_CHAINS, steps=None, **options)
            chains = _run_chains(vae, batch, betas, num_chains=num_chains, steps=pilot.steps, **options)
            require_finite(chains.log_weight, first_index=first_index)
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
    """Return β_0 … β_T along a sigmoid: densest near the prior and near the posterior."""
    sigmoid = torch.sigmoid(torch.linspace(-4, 4, count + 1, dtype=torch.float64))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


@dataclass(frozen=True)
class _Chains:
    log_weight: Tensor  # (C, n)
    acceptance: Tensor  # (n,)
    steps: Tensor  # leapfrog step lengths, (T, n)


def _run_chains(
    pair: Pair,
    batch: Any,
    betas: list[float],
    *,
    num_chains: int,
    steps: Tensor | None,
    num_leapfrog: int,
    max_plate_nesting: int,
    advance: Callable[[int], object],
) -> _Chains:
    """Run chains from prior to posterior with leapfrog step lengths (T, n), or tune these if None."""
    prior = poutine.block(pair.model, hide_fn=_is_observed)  # serves as the guide
    args, kwargs = arguments(batch)
    plates = {"num_particles": num_chains, "max_plate_nesting": max_plate_nesting}
    start = terms(pair.model, prior, *args, **plates, **kwargs)
    for name, site in start.sites.latent.items():
        _require_real(name, site)
    density = _Density(pair.model, batch, start.sites)
    z, log_likelihood = dict(start.sites.draws), start.log_likelihood
    log_weight = torch.zeros_like(log_likelihood, dtype=torch.float64)
    lengths = log_likelihood.new_full((len(betas) - 1, num_rows(batch)), 0.5) if steps is None else steps
    accepted = log_likelihood.new_zeros(num_rows(batch))
    for t, beta in enumerate(betas[1:]):
        log_weight += (beta - betas[t]) * log_likelihood
        z, log_likelihood, probability = density.move(z, beta, lengths[t], num_leapfrog)
        accepted += probability.mean(0)
        if steps is None:
            lengths[t + 1 :] = lengths[t] * (0.5 * (probability.mean(0) - _ACCEPTANCE)).exp()
        advance(num_rows(batch))
    return _Chains(log_weight, accepted / len(lengths), lengths)


class _Density:
    """log p(z) + β log p(x|z) of chains z, {site: (C, …, n, …, *event)}, with invariant moves."""

    def __init__(self, model: Callable[..., Any], batch: Any, sites: PairSites):
        self.model, self.batch, self.sites = model, batch, sites

    def _terms(self, z: Draws) -> tuple[Tensor, Tensor]:
        """Compute log p(z) and log p(x|z), (C, n)."""
        chains = pyro.plate("chains", self.sites.num_particles, dim=-self.sites.rank)
        with chains if self.sites.num_particles > 1 else nullcontext():
            model_sites = sample_sites(run(poutine.condition(self.model, data=z), *arguments(self.batch)))
        log_probs = {name: masked_log_prob(site, site["value"]) for name, site in model_sites.items()}
        prior = self.sites.sum(log_prob for name, log_prob in log_probs.items() if name in z)
        return prior, self.sites.sum(log_prob for name, log_prob in log_probs.items() if name not in z)

    def _with_gradient(self, z: Draws, beta: float) -> tuple[Tensor, Tensor, Draws]:
        """Compute the log-density and log p(x|z), (C, n), and the gradient of the log-density."""
        z = {name: values.detach().requires_grad_() for name, values in z.items()}
        with torch.enable_grad():
            log_prior, log_likelihood = self._terms(z)
            log_density = log_prior + beta * log_likelihood
            gradient = torch.autograd.grad(log_density.sum(), list(z.values()))
        return log_density.detach(), log_likelihood.detach(), dict(zip(z, gradient, strict=True))

    def move(self, z: Draws, beta: float, step: Tensor, num_leapfrog: int) -> tuple[Draws, Tensor, Tensor]:
        """Move by Hamiltonian Monte Carlo with leapfrog steps of length `step` (n,).

        Returns:
            The new z, their log p(x|z), (C, n), and the acceptance probabilities, (C, n).
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
        probability = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)  # a divergent move is rejected
        accept = torch.rand_like(probability) < probability
        z = {name: torch.where(self._along(accept, name), new[name], values) for name, values in z.items()}
        return z, torch.where(accept, new_likelihood, log_likelihood), probability

    def _kinetic(self, momentum: Draws) -> Tensor:
        """Compute ½ |p|² per chain and example, (C, n)."""
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
    support = elementwise_support(site["fn"].support)
    if support is not constraints.real:
        raise ValueError(
            f"annealing follows gradients in the latent variables, so they must be real; {name!r}, a "
            f"{site_family(site)}, has the support {support}. Transform it in the model, or use evaluate"
        )
