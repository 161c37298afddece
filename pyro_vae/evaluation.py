"""Judging a trained VAE: how likely it finds data, and whether its guide can be trusted.

Notation: N data, S particles z_s ~ q(z|x) for each; w_s = p(x, z_s) / q(z_s|x) is an importance weight.
Values are in nats per datum, higher is better.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae.arviz_bridge import MIN_DRAWS, pareto_smooth
from pyro_vae.batches import Batches
from pyro_vae.data import Images
from pyro_vae.particles import require_count, terms
from pyro_vae.randomness import isolated_generators
from pyro_vae.svi import NonFiniteError

__all__ = ["Evaluation", "Pair", "PerDatum", "evaluate"]


class Pair(Protocol):
    """A generative model and a guide, such as a `VAE`: two Pyro functions of a batch x (N, *event_shape)."""

    def model(self, x: Tensor) -> Any:
        """p(z) p(x|z), with x observed."""

    def guide(self, x: Tensor) -> Any:
        """q(z|x)."""


@dataclass(frozen=True, eq=False)
class PerDatum:
    """Estimates for each datum, float64 on the CPU, each (N,), in nats but for the last two.

    Attributes:
        elbo: Mean over the particles of `Terms.elbo`: with the KL in closed form where it has one.
        elbo_sampled_kl: Mean over the particles of log w: the same bound with the KL sampled.
        log_evidence: log (1/S) Σ w_s: on average no more than log p(x), and below it by about half the
            square of its Monte Carlo error.
        log_evidence_mc_se: Its Monte Carlo error by the delta method, the standard deviation of w over
            √S times the mean of w. Too small where `pareto_k` is above 0.7; NaN for S = 1.
        effective_sample_size: (Σ w_s)² / Σ w_s², from 1 to S.
        pareto_k: Shape k̂ of the tail of w: below 0.5 good, up to 0.7 usable, above it the guide misses
            much of the posterior and neither `log_evidence` nor its error can be trusted. 0 where all
            weights are equal up to rounding, +∞ where a few outweigh all others beyond measure, NaN for
            fewer than 21 particles.
    """

    elbo: Tensor
    elbo_sampled_kl: Tensor
    log_evidence: Tensor
    log_evidence_mc_se: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` reports: means over the data in nats per datum, and estimates for each datum.

    A name that ends in `_se` is the standard error of a mean over the data: their standard deviation over
    √N. It says how far other data from the same source might lead, Monte Carlo noise included.

    Attributes:
        per_datum: The estimates for each datum.
        num_data: N.
        num_particles: S.
        seed: The seed of the draws.
    """

    per_datum: PerDatum
    num_data: int
    num_particles: int
    seed: int

    @property
    def elbo(self) -> float:
        """Mean ELBO, with the KL in closed form where it has one."""
        return float(self.per_datum.elbo.mean())

    @property
    def elbo_se(self) -> float:
        """Standard error of `elbo` over the data."""
        return _standard_error(self.per_datum.elbo)

    @property
    def log_evidence(self) -> float:
        """Mean importance-weighted estimate of log p(x)."""
        return float(self.per_datum.log_evidence.mean())

    @property
    def log_evidence_se(self) -> float:
        """Standard error of `log_evidence` over the data."""
        return _standard_error(self.per_datum.log_evidence)

    @property
    def log_evidence_mc_se(self) -> float:
        """Monte Carlo error of `log_evidence` for these very data, by the delta method."""
        return float(self.per_datum.log_evidence_mc_se.square().sum().sqrt() / self.num_data)

    @property
    def pareto_k(self) -> Tensor:
        """Pareto shape k̂ of each datum's importance weights, (N,)."""
        return self.per_datum.pareto_k


@torch.no_grad()
def evaluate(
    vae: Pair,
    data: Tensor | Images,
    *,
    num_particles: int = 1000,
    binarize: str | None = None,
    seed: int = 0,
    max_plate_nesting: int = 1,
    progress: bool = True,
) -> Evaluation:
    r"""Estimate the ELBO and the log-evidence of data, and diagnose the guide.

    .. math:: \log p(x) \approx \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s|x)}, \qquad z_s \sim q(z|x)

    Memory is bounded: the weights of a few data at a time are held, and a few thousand draws decoded at a
    time. The VAE is run in evaluation mode and left in the mode it was in; random numbers come from `seed`
    alone, and torch's generators are left as they were, so that evaluating does not change training.

    Args:
        vae: A `VAE`, or any object with Pyro functions `model` and `guide` of a batch x (N, *event_shape).
        data: N data, (N, *event_shape), in the support of the likelihood.
        num_particles: S, draws of z for each datum.
        binarize: "dynamic", "fixed" (both: one Bernoulli draw, from `seed`) or "threshold" (at ½), for grey
            levels under a Bernoulli likelihood.
        seed: Non-negative integer from which every random number is derived.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.
        progress: Show a progress bar.

    Raises:
        TypeError: If the data are no floating-point tensor or `Images`, or `num_particles` is no integer.
        ValueError: If `num_particles` is below 1, or the data are empty, have another shape than the
            likelihood, or lie outside its support.
        NonFiniteError: If an importance weight is infinite or NaN; names the data and how many.

    Source: Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519;
    Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018), Yes, but did it work?, arXiv:1802.02538.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> report = evaluate(vae, torch.randn(9, 6), num_particles=50, progress=False)
        >>> report.elbo <= report.log_evidence, report.pareto_k.shape
        (True, torch.Size([9]))
    """
    require_count("num_particles", num_particles)
    batches = _observed(vae, data, binarize, seed)
    columns: list[Tensor] = []
    with (
        _evaluation_mode(vae),
        isolated_generators(batches.device, seed),
        tqdm(total=len(batches) * num_particles, disable=not progress, unit=" draws", unit_scale=True) as bar,
    ):
        data_at_once, particles_at_once = _chunks(batches, num_particles)
        for x in batches.in_order(data_at_once):
            chunks = []
            for count in _split(num_particles, particles_at_once):
                t = terms(vae.model, vae.guide, x, num_particles=count, max_plate_nesting=max_plate_nesting)
                chunks.append(torch.stack([t.log_weight, t.elbo]))
                bar.update(count * len(x))
            log_weight, elbo = torch.cat(chunks, dim=1)
            _require_finite(log_weight, first=sum(part.shape[1] for part in columns))
            columns.append(_per_datum(log_weight, elbo))
    return Evaluation(
        per_datum=PerDatum(*torch.cat(columns, dim=1)),
        num_data=len(batches),
        num_particles=num_particles,
        seed=seed,
    )


def _per_datum(log_weight: Tensor, elbo: Tensor) -> Tensor:
    """Reduce log weights and ELBOs by each particle, (S, n), to the fields of `PerDatum`, (6, n)."""
    rounding = 100 * torch.finfo(log_weight.dtype).eps
    log_weight, elbo = log_weight.cpu().double(), elbo.cpu().double()
    num_particles = len(log_weight)
    log_evidence = log_weight.logsumexp(0) - math.log(num_particles)
    variance = (log_weight - log_evidence).expm1().square().mean(0)  # of weights with mean 1
    mc_variance = variance / (num_particles - 1) if num_particles > 1 else variance * math.nan
    return torch.stack(
        [
            elbo.mean(0),
            log_weight.mean(0),
            log_evidence,
            mc_variance.sqrt(),
            num_particles / (1 + variance),
            _pareto_k(log_weight, rounding),
        ]
    )


def _pareto_k(log_weight: Tensor, rounding: float) -> Tensor:
    """Pareto shape of each column of log weights (S, n)."""
    if len(log_weight) < MIN_DRAWS:
        return log_weight.new_full(log_weight.shape[1:], math.nan)
    k = torch.from_numpy(pareto_smooth(log_weight.T.numpy())[1])
    spread = log_weight.max(0).values - log_weight.min(0).values
    return k.where(spread > rounding * log_weight.abs().max(0).values.clamp(min=1), 0.0)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _observed(vae: Pair, data: Tensor | Images, binarize: str | None, seed: int) -> Batches:
    """Check the data, and binarise them once and for all."""
    if isinstance(data, Images) and data.binarize == "dynamic":
        data, binarize = dataclasses.replace(data, binarize=None), "dynamic"
    parameter = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
    device = getattr(data, "device", "cpu") if parameter is None else parameter.device
    binarize = "fixed" if binarize == "dynamic" else binarize
    batches = Batches(data, binarize=binarize, seed=seed, device=device)
    batches.check(getattr(vae, "check_data", _require_data))
    return batches


def _require_data(x: Tensor) -> None:
    if len(x) == 0:
        raise ValueError("the data are empty: there must be at least one datum")


def _require_finite(log_weight: Tensor, *, first: int) -> None:
    """Refuse log weights (S, n), of the data from the one numbered `first` on, that are not all finite."""
    wrong = (~log_weight.isfinite()).sum(0)
    if not wrong.any():
        return
    data = wrong.nonzero().flatten()
    shown = ", ".join(str(first + int(index)) for index in data[:5]) + (", …" if len(data) > 5 else "")
    raise NonFiniteError(
        f"the log importance weight is infinite or NaN for {len(data)} of the data {first} to "
        f"{first + log_weight.shape[1] - 1}: number {shown}; number {first + int(data[0])} has "
        f"{int(wrong[data[0]])} such weights of {len(log_weight)}. Check the parameters and these data"
    )


@contextlib.contextmanager
def _evaluation_mode(vae: Pair) -> Iterator[None]:
    modes = [(module, module.training) for module in vae.modules()] if isinstance(vae, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _chunks(batches: Batches, num_particles: int) -> tuple[int, int]:
    """How many data at once, and how many particles of each."""
    values = math.prod(batches.data.shape[1:])
    rows = max(1, min(2**13, 2**22 // values))
    particles = min(num_particles, 250, rows)
    return max(1, rows // particles), particles


def _split(total: int, size: int) -> list[int]:
    """Parts of a total, each of that size but the last."""
    return [min(size, total - start) for start in range(0, total, size)]
