"""Judging a trained VAE: how likely it finds data, whether its guide can be trusted, which latents it uses.

Notation: N data, S particles z_s ~ q(z|x) for each; w_s = p(x, z_s) / q(z_s|x) is an importance weight.
"""

import math
from dataclasses import dataclass

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.data.datasets import Images
from pyro_vae.evaluation.aggregate import AggregatePosterior, aggregate_posterior
from pyro_vae.evaluation.draws import Pair, chunk_sizes, head, observe, parts, require_finite
from pyro_vae.evaluation.importance_weights import bound_by_particles, summarise_weights
from pyro_vae.evaluation.latents import units
from pyro_vae.evaluation.result import Evaluation, PerDatum, standard_error
from pyro_vae.inference.guide_check import require_fit
from pyro_vae.objectives.log_terms import PairSites, Terms, terms
from pyro_vae.utils.display import Estimate, progress_bar
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.validation import require_count

__all__ = ["evaluate"]


def evaluate(
    vae: Pair,
    data: Tensor | Images,
    *,
    num_particles: int = 1000,
    binarize: str | None = None,
    seed: int = 0,
    aggregate_size: int = 5000,
    max_plate_nesting: int = 1,
    progress: bool = True,
) -> Evaluation:
    r"""Estimate the log-evidence and the ELBO of data, and diagnose the guide and the latent units.

    .. math:: \log p(x) \approx \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s|x)}, \qquad z_s \sim q(z|x)

    Memory is bounded: the weights of a few data are held at a time, and a few thousand draws decoded at a
    time. The VAE runs in evaluation mode and is left in the mode it was in; random numbers come from `seed`
    alone, and torch's generators are left as they were, so that evaluating does not change training.

    Args:
        vae: A `VAE`, or any object with Pyro functions `model` and `guide` of a batch x (N, *event_shape).
        data: N data, (N, *event_shape), in the support of the likelihood.
        num_particles: S, draws of z for each datum.
        binarize: "dynamic", "fixed" (these two alike: one Bernoulli draw, from `seed`) or "threshold" (at ½),
            for grey levels under a Bernoulli likelihood.
        seed: Non-negative integer from which every random number is derived.
        aggregate_size: How many of the data, the first, make up the aggregate posterior for the mutual
            information; the cost is its square. 0 leaves it out.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.
        progress: Show a progress bar, in a terminal or a notebook.

    Raises:
        TypeError: If the data are no floating-point tensor or `Images`, or a number is no integer.
        ValueError: If `num_particles` is below 1, or the data are empty, have another shape than the
            likelihood, or lie outside its support; or the guide does not fit (a `GuideError`).
        NonFiniteError: If an importance weight is infinite or NaN; names the data and how many.

    Source: Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519;
    M. Hoffman, M. Johnson (2016), ELBO surgery; Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018), Yes, but
    did it work?, arXiv:1802.02538.

    Example:
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> report = evaluate(vae, torch.randn(9, 6), num_particles=50, progress=False)
        >>> report.elbo <= report.log_evidence, report.pareto_k.shape, report.kl_per_dimension.shape
        (True, torch.Size([9]), torch.Size([2]))
    """
    require_count("num_particles", num_particles)
    require_count("aggregate_size", aggregate_size, minimum=0)
    batches = observe(vae, data, binarize=binarize, seed=seed)
    chunks: list[_Chunk] = []
    with (
        evaluating(vae, batches.device, seed),
        progress_bar(len(batches) * num_particles, shown=progress, unit=" draws", unit_scale=True) as bar,
    ):
        data_at_once, particles_at_once = chunk_sizes(batches, num_particles)
        for number, x in enumerate(batches.in_order(data_at_once)):
            if number == 0:
                require_fit(vae.model, vae.guide, x)
            log_terms: list[Tensor] = []
            for count in parts(num_particles, particles_at_once):
                t = terms(vae.model, vae.guide, x, num_particles=count, max_plate_nesting=max_plate_nesting)
                if not log_terms:
                    first = t
                log_terms.append(torch.stack([t.log_likelihood, t.log_prior, t.log_guide]))
                bar.update(count * len(x))
            log_likelihood, log_prior, log_guide = torch.cat(log_terms, dim=1).cpu()
            require_finite(log_likelihood + log_prior - log_guide, first=number * data_at_once)
            chunks.append(_reduce(first, log_likelihood, log_prior, log_guide))
    aggregate = None
    if aggregate_size:
        part = head(batches, aggregate_size)
        with (
            evaluating(vae, batches.device, seed),
            progress_bar(len(part) ** 2, shown=progress, unit=" densities", unit_scale=True) as bar,
        ):
            aggregate = aggregate_posterior(
                vae, part, max_plate_nesting=max_plate_nesting, advance=bar.update
            )
    return _evaluation(
        chunks,
        aggregate=aggregate,
        num_particles=num_particles,
        num_dimensions=math.prod(batches.data.shape[1:]),
        seed=seed,
    )


@dataclass(frozen=True)
class _Chunk:
    """What is kept of a few data."""

    per_datum: PerDatum
    unit_mean_variance: Tensor
    bounds: dict[int, tuple[Tensor, Tensor]]
    unit_names: list[str]
    has_analytic_kl: bool
    has_analytic_entropy: bool


def _reduce(first: Terms, log_likelihood: Tensor, log_prior: Tensor, log_guide: Tensor) -> _Chunk:
    """Reduce the terms of S particles, (S, n); what has a closed form is taken from the first of them."""
    log_weight = log_likelihood + log_prior - log_guide
    weights = summarise_weights(log_weight)
    kl, entropy, latent = first.kl, _entropy(first.sites), units(first.sites)

    def mean(values: Tensor) -> Tensor:
        return values.double().mean(0)

    return _Chunk(
        per_datum=PerDatum(
            expected_log_likelihood=mean(log_likelihood),
            expected_log_joint=mean(log_likelihood + log_prior),
            kl=mean(log_guide - log_prior) if kl is None else kl.cpu().double(),
            entropy=mean(-log_guide) if entropy is None else entropy.cpu().double(),
            elbo_sampled_kl=mean(log_weight),
            log_evidence=weights.log_mean,
            log_evidence_mc_se=weights.standard_error,
            effective_sample_size=weights.effective_sample_size,
            pareto_k=weights.pareto_k,
            unit_kl=latent.kl.cpu().double(),
            unit_mean=latent.mean.cpu().double(),
        ),
        unit_mean_variance=latent.mean_variance.cpu().double(),
        bounds=bound_by_particles(log_weight),
        unit_names=latent.names,
        has_analytic_kl=kl is not None,
        has_analytic_entropy=entropy is not None,
    )


def _entropy(sites: PairSites) -> Tensor | None:
    """H[q(z|x)] in closed form, (N,): the mean over the particles, where a site depends on others' draws."""
    try:
        entropies = [scale_and_mask(site["fn"].entropy(), 1.0, site["mask"]) for site in sites.guide.values()]
    except NotImplementedError:
        return None
    return sites.sum(entropies).mean(0)


def _evaluation(
    chunks: list[_Chunk],
    *,
    aggregate: AggregatePosterior | None,
    num_particles: int,
    num_dimensions: int,
    seed: int,
) -> Evaluation:
    """Put the chunks together."""
    columns = zip(*(vars(chunk.per_datum).values() for chunk in chunks), strict=True)
    per_datum = PerDatum(*map(torch.cat, columns))
    noise = torch.cat([chunk.unit_mean_variance for chunk in chunks]).mean(0)
    bounds = {
        size: [torch.cat(column) for column in zip(*(chunk.bounds[size] for chunk in chunks), strict=True)]
        for size in chunks[0].bounds
    }
    num_data = len(per_datum.log_evidence)
    return Evaluation(
        per_datum=per_datum,
        convergence={
            size: Estimate(float(bound.mean()), float(mc_se.square().sum().sqrt()) / num_data)
            for size, (bound, mc_se) in bounds.items()
        },
        unit_names=chunks[0].unit_names,
        activity=standard_error(per_datum.unit_mean).square() * num_data - noise,
        aggregate=aggregate,
        has_analytic_kl=chunks[0].has_analytic_kl,
        has_analytic_entropy=chunks[0].has_analytic_entropy,
        num_data=num_data,
        num_particles=num_particles,
        num_dimensions=num_dimensions,
        seed=seed,
    )
