"""Evaluate a trained VAE: log-likelihood, guide diagnostics (Pareto k̂, ESS), KL per latent dimension.

Notation: N examples, S particles z_s ~ q(z|x) per example, importance weights w_s = p(x, z_s) / q(z_s|x).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import add
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_vae.data.batches import Batches
from pyro_vae.evaluation.draws import Chunk, Pair, chunks, prepare_data
from pyro_vae.evaluation.importance_weights import bound_by_particles, summarise_weights
from pyro_vae.evaluation.latents import AggregatePosterior, aggregate_posterior, summarise_latents
from pyro_vae.evaluation.result import Evaluation, PerDatum, standard_error
from pyro_vae.evaluation.whole import evaluate_whole, not_by_example
from pyro_vae.objectives.log_terms import PairSites
from pyro_vae.objectives.pair import as_programs
from pyro_vae.objectives.sites import joint_mask
from pyro_vae.utils.display import Estimate, progress_bar
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.processes import Processes, checksum, join
from pyro_vae.utils.validation import require_count

__all__ = ["evaluate"]


def evaluate(
    vae: Pair,
    data: Any,
    *,
    num_particles: int = 1000,
    binarize: str | None = None,
    missing: str | None = None,
    seed: int = 0,
    aggregate_size: int = 5000,
    max_plate_nesting: int = 1,
    progress: bool = True,
    group: Any = "auto",
) -> Any:
    r"""Estimate the log-evidence and the ELBO of data, and diagnose the guide and the latent dimensions.

    .. math:: \log p(x) \approx \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s|x)}, \qquad z_s \sim q(z|x)

    Memory is bounded: a few thousand draws are decoded at once. The VAE runs in evaluation mode, and its mode
    is restored. Random numbers come from `seed` alone, and torch's generators are restored, so that
    evaluation does not change training. Where there are many draws, and a compiler, a graph of these
    operations is compiled; it rounds differently.

    Args:
        vae: A `VAE`, a `Pair`, any object with Pyro functions `model` and `guide`, or a tuple of these two.
        data: N examples, (N, *event_shape), in the support of the likelihood; or a tuple or dict of several
            arguments, as in `fit`.
        num_particles: S, draws of z per example.
        binarize: "dynamic" or "fixed" (the same here: one Bernoulli draw, from `seed`), or "threshold" (at
            ½), for grey levels under a Bernoulli likelihood.
        missing: "nan" if NaN means missing, as in `fit`: log p(x) is then that of the observed values, and
            bits are per observed value.
        seed: Non-negative integer from which every random number is derived.
        aggregate_size: Number of examples, the first ones, whose aggregate posterior gives the mutual
            information; the cost grows with its square. 0 omits it.
        max_plate_nesting: Number of dimensions that the pair's own plates take; see `terms`.
        progress: Show a progress bar in a terminal or notebook.
        group: The processes of `torch.distributed` that share the work, as in `fit`: all call this with the
            same arguments, and get the same result, which does not depend on their number, to the bit. None
            for this process alone.

    Returns:
        The evaluation. Where a latent variable is shared by all examples there is no evidence of single ones,
        and where all are summed out there are no draws: then a `WholeEvaluation`, with the ELBO of the data
        as a whole, and None with the reason for the rest.

    Raises:
        TypeError: If the data are of a kind that `fit` does not take, or not floating-point; or if a number
            is not an integer.
        ValueError: If `num_particles` is below 1; the data are empty, have the wrong shape, or lie outside
            the likelihood's support; or the guide does not fit the model (`GuideError`).
        NonFiniteError: If a parameter or an importance weight is infinite or NaN; names it or its example.

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
    vae = as_programs("evaluate(pair, data)", vae)
    require_count("num_particles", num_particles)
    require_count("aggregate_size", aggregate_size, minimum=0)
    processes = join(group)
    batches = prepare_data(vae, data, binarize=binarize, seed=seed, missing=missing)
    _require_alike(vae, batches, processes, num_particles=num_particles, max_plate_nesting=max_plate_nesting)
    total, shown = len(batches) * num_particles, progress and processes.is_first
    with (
        evaluating(vae, batches.device, seed),
        progress_bar(total / processes.size, shown=shown, unit=" draws", unit_scale=True) as bar,
    ):
        reason = not_by_example(vae, batches, max_plate_nesting)
        if reason is not None:
            options: dict[str, Any] = {"num_particles": num_particles, "seed": seed, "advance": bar.update}
            return evaluate_whole(vae, batches, reason, **options)

        def reduce_own() -> Iterable[_Reduced]:
            own: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "processes": processes}
            return map(_reduce, chunks(vae, batches, num_particles, advance=bar.update, **own))

        several = processes.size > 1
        parts = processes.interleave(lambda: list(reduce_own())) if several else reduce_own()
        reduced = _joined(parts, len(batches))
    aggregate = None
    if aggregate_size:
        part = batches.first(aggregate_size)
        with (
            evaluating(vae, batches.device, seed),
            progress_bar(len(part) ** 2, shown=shown, unit=" densities", unit_scale=True) as bar,
        ):
            aggregate = aggregate_posterior(
                vae, part, max_plate_nesting=max_plate_nesting, advance=bar.update
            )
    return _evaluation(reduced, aggregate, num_particles=num_particles, seed=seed)


def _require_alike(pair: Pair, batches: Batches, processes: Processes, **settings: int) -> None:
    """Raise if processes that share the work have other parameters, data or settings."""
    if processes.size > 1:
        processes.require_same("settings of evaluate", {**settings, "seed": batches.seed})
        state = pair.state_dict().values() if isinstance(pair, nn.Module) else ()
        processes.require_same("the parameters, by their check sum", checksum(state))
        processes.require_same("the data of evaluate", batches.describe())


@dataclass(frozen=True)
class _Reduced:
    """Estimates for the examples of one chunk."""

    per_datum: PerDatum
    unit_mean_variance: Tensor  # summed over the examples, (U,)
    bounds: dict[int, tuple[Tensor, Tensor]]  # by number of particles: sums of bounds, and of squared errors
    unit_names: list[str]
    observed_names: list[str]
    num_observed: int
    is_discrete: bool
    has_analytic_kl: bool
    has_analytic_entropy: bool


def _reduce(chunk: Chunk) -> _Reduced:
    """Average over the particles; closed forms come from the first run of the pair."""
    log_likelihood, log_prior, log_guide, log_weight = (
        values.cpu() for values in (chunk.log_likelihood, chunk.log_prior, chunk.log_guide, chunk.log_weight)
    )
    weights, sites = summarise_weights(log_weight), chunk.first_terms.sites
    kl, entropy, latent = chunk.first_terms.kl, _entropy(sites), summarise_latents(sites)

    def mean(values: Tensor) -> Tensor:
        return values.double().mean(0)

    return _Reduced(
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
            site_log_likelihood=torch.stack(
                [mean(part.cpu()) for part in chunk.first_terms.by_site().values()], -1
            ),
        ),
        unit_mean_variance=latent.mean_variance.cpu().double().sum(0),
        bounds={
            size: (bound.sum(), error.square().sum())
            for size, (bound, error) in bound_by_particles(log_weight).items()
        },
        unit_names=latent.names,
        observed_names=list(chunk.first_terms.by_site()),
        num_observed=_num_observed(sites),
        is_discrete=all(_is_discrete(site["fn"]) for site in sites.observed.values()),
        has_analytic_kl=kl is not None,
        has_analytic_entropy=entropy is not None,
    )


def _num_observed(sites: PairSites) -> int:
    """Return the number of observed values of the chunk's examples."""
    total = 0
    for site in sites.observed.values():
        mask = joint_mask(site).expand(site["fn"].shape())
        while mask.dim() - site["fn"].event_dim >= sites.rank:  # the same for all particles and classes
            mask = mask[0]
        total += int(mask.sum())
    return total


def _is_discrete(distribution: Any) -> bool:
    try:
        return distribution.support.is_discrete
    except NotImplementedError:  # it does not say
        return False


def _entropy(sites: PairSites) -> Tensor | None:
    """Return H[q(z|x)] in closed form, (N,), averaged over the particles where sites depend on draws."""
    try:
        entropies = [scale_and_mask(site["fn"].entropy(), 1.0, site["mask"]) for site in sites.guide.values()]
    except NotImplementedError:
        return None
    return sites.sum(entropies).mean(0)


def _joined(parts: Iterable[_Reduced], total: int) -> _Reduced:
    """Concatenate the estimates of successive chunks, of `total` examples.

    Each chunk is written to columns of that length at once: its small tensors, kept between the buffers that
    the data are read into, would hold several times their memory.
    """
    begin, joined = 0, None
    for part in parts:
        columns = vars(part.per_datum)
        if joined is None:
            whole = {name: column.new_empty(total, *column.shape[1:]) for name, column in columns.items()}
            joined = replace(part, per_datum=PerDatum(**whole))
        else:
            joined = replace(
                joined,
                unit_mean_variance=joined.unit_mean_variance + part.unit_mean_variance,
                bounds=tree_map(add, joined.bounds, part.bounds),
                num_observed=joined.num_observed + part.num_observed,
                is_discrete=joined.is_discrete and part.is_discrete,
            )
        end = begin + len(part.per_datum.kl)
        for name, column in columns.items():
            whole[name][begin:end] = column
        begin = end
    assert joined is not None
    return joined


def _evaluation(reduced: _Reduced, aggregate: AggregatePosterior | None, **settings: int) -> Evaluation:
    """Average the estimates."""
    per_datum = reduced.per_datum
    num_data = len(per_datum.log_evidence)
    noise = reduced.unit_mean_variance / num_data
    return Evaluation(
        per_datum=per_datum,
        convergence={
            size: Estimate(float(bound) / num_data, float(squares.sqrt()) / num_data)
            for size, (bound, squares) in reduced.bounds.items()
        },
        unit_names=reduced.unit_names,
        observed_names=reduced.observed_names,
        num_dimensions=reduced.num_observed / num_data,
        is_discrete=reduced.is_discrete,
        activity=standard_error(per_datum.unit_mean).square() * num_data - noise,
        aggregate=aggregate,
        has_analytic_kl=reduced.has_analytic_kl,
        has_analytic_entropy=reduced.has_analytic_entropy,
        num_data=num_data,
        **settings,
    )
