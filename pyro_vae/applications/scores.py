"""Anomaly scores of a VAE, higher = more normal, each a function of one example and the seed alone.

| score | formula |
|---|---|
| statistics | log-density of four statistics of the VAE under a mixture fitted to reference data |
| log_evidence | log p(x), importance-weighted |
| elbo | E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)) |
| reconstruction | E_q[log p(x|z)], the reconstruction probability |
| reconstruction_error | −‖x − E[x|z]‖² at the mean of q |
| kl | −KL(q(z|x) ‖ p(z)) |
| typicality | −|log p(x) − its mean over reference data| |
| complexity | log p(x) + code length of the image under PNG or WebP |
| regret | −(max_λ ELBO(x; λ) − ELBO(x)) |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.applications.complexity import code_length, is_image_shape
from pyro_vae.applications.density import GaussianMixtureDensity
from pyro_vae.applications.regret import likelihood_regret
from pyro_vae.applications.statistics import Statistics, prepare, statistics
from pyro_vae.vae import VAE

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["LEARNED", "SCORES", "Reference", "anomaly_scores", "compute_score", "require_score"]

SCORES = {
    "statistics": ("log-density of four statistics among those of the reference", "nats"),
    "log_evidence": ("log p(x)", "nats"),
    "elbo": ("E_q[log p(x|z)] − KL(q(z|x) ‖ p(z))", "nats"),
    "reconstruction": ("E_q[log p(x|z)]", "nats"),
    "reconstruction_error": ("−‖x − E[x|z]‖²", "units of the data, squared"),
    "kl": ("−KL(q(z|x) ‖ p(z))", "nats"),
    "typicality": ("−|log p(x) − mean over the reference|", "nats"),
    "complexity": ("log p(x) + code length", "nats"),
    "regret": ("−(max ELBO − ELBO)", "nats"),
}
LEARNED = ("statistics", "typicality")  # from reference data
_FROM_STATISTICS: dict[str, Callable[[Statistics], Tensor]] = {
    "log_evidence": lambda s: s.log_evidence,
    "elbo": lambda s: s.elbo,
    "reconstruction": lambda s: s.log_likelihood,
    "reconstruction_error": lambda s: -s.squared_error,
    "kl": lambda s: -s.kl,
}


@dataclass(frozen=True, eq=False)
class Reference:
    """What the scores "statistics" and "typicality" learn from reference data.

    Attributes:
        mean_log_evidence: Mean of log p(x) over the reference, in nats.
        density: Density of the statistics.
    """

    mean_log_evidence: float
    density: GaussianMixtureDensity

    @classmethod
    def fit(cls, reference: Statistics) -> "Reference":
        """Learn from the statistics of reference data, normal examples."""
        return cls(float(reference.log_evidence.mean()), GaussianMixtureDensity.fit(_columns(reference)))


def _columns(s: Statistics) -> Tensor:
    """Return the four statistics whose density is a score, (N, 4)."""
    return torch.stack([s.log_likelihood, s.kl, s.gap, s.squared_error], dim=1)


def compute_score(
    name: str,
    vae: VAE,
    data: Any,
    *,
    reference: Reference | None,
    num_particles: int,
    seed: int,
    known: Statistics | None = None,
) -> Tensor:
    """Compute one score of data (N, *event_shape), (N,), float64, higher = more normal.

    Args:
        name: A key of `SCORES`.
        vae: The model.
        data: (N, *event_shape).
        reference: Needed by the scores in `LEARNED`.
        num_particles: S.
        seed: Seed of the base noise.
        known: Statistics of the data, if they are known.
    """
    if name == "regret":
        return -likelihood_regret(vae, data, num_particles=num_particles, seed=seed)
    s = statistics(vae, data, num_particles=num_particles, seed=seed) if known is None else known
    if name in _FROM_STATISTICS:
        return _FROM_STATISTICS[name](s)
    if name == "complexity":
        batches = prepare(vae, data, seed=seed)
        return s.log_evidence + torch.cat([code_length(x) for x in batches.in_order(1000)])
    if reference is None:
        raise ValueError(f"the score {name!r} needs reference data: fit a detector, or pass reference=")
    if name == "typicality":
        return -(s.log_evidence - reference.mean_log_evidence).abs()
    return reference.density.log_prob(_columns(s))


def anomaly_scores(
    vae: VAE,
    x: Any,
    *,
    reference: Any = None,
    scores: Sequence[str] | None = None,
    num_particles: int = 50,
    seed: int = 0,
) -> "Dataset":
    """Compute several anomaly scores of data at once; each is higher for more normal examples.

    The same base noise is used for every example, so that a score does not depend on the other examples, nor
    on their order. Which score fits depends on the data: log p(x) of a VAE can be higher for images of
    another kind than for those it was trained on.

    Args:
        vae: A trained VAE.
        x: N examples, (N, *event_shape), in the support of the likelihood.
        reference: Normal examples, not those the VAE was trained on, for "statistics" and "typicality".
        scores: Names of the scores; by default all, except "regret", which takes 100 gradient steps,
            "complexity" of data that are not images in [0, 1], and without a reference the two that need one.
        num_particles: S, draws of z per example.
        seed: Seed of the base noise.

    Returns:
        An `xarray.Dataset` with one variable per score, over the dimension "example", in nats unless its
        attribute `units` says otherwise, and the diagnostics `pareto_k` (above 0.7 log p(x) is likely too
        low) and `effective_sample_size`. `.to_dataframe()` gives a table.

    Raises:
        TypeError: If `vae` is not a `VAE`, or data are not floating-point.
        ValueError: If a score is unknown or needs reference data, or data have another shape or lie outside
            the support, as NaN and ±inf do.

    Source: J. An, S. Cho (2015), Variational autoencoder based anomaly detection using reconstruction
    probability; E. Nalisnick et al. (2019), Do deep generative models know what they don't know?,
    arXiv:1810.09136; W. Morningstar et al. (2021), Density of states estimation for out-of-distribution
    detection, arXiv:2006.09273; and those of `code_length` and `likelihood_regret`.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> found = anomaly_scores(vae, torch.randn(5, 6), reference=torch.randn(50, 6))
        >>> found.sizes["example"], found.log_evidence.units
        (5, 'nats')
    """
    from xarray import DataArray, Dataset  # noqa: PLC0415 (slow)

    for name in scores or ():
        require_score(name)
    s = statistics(vae, x, num_particles=num_particles, seed=seed)
    learned = None
    if reference is not None:
        learned = Reference.fit(statistics(vae, reference, num_particles=num_particles, seed=seed))
    names = _default_scores(vae, x, seed, learned) if scores is None else scores
    options: dict[str, Any] = {"reference": learned, "num_particles": num_particles, "seed": seed, "known": s}
    columns = {name: (compute_score(name, vae, x, **options), *SCORES[name]) for name in names}
    columns["pareto_k"] = (s.pareto_k, "tail shape of the importance weights", "1")
    columns["effective_sample_size"] = (s.effective_sample_size, "(Σ w)² / Σ w²", "draws")
    return Dataset(
        {
            name: DataArray(values.numpy(), dims="example", attrs={"long_name": meaning, "units": units})
            for name, (values, meaning, units) in columns.items()
        },
        attrs={"num_particles": num_particles, "seed": seed, "sign": "higher is more normal"},
    )


def require_score(name: Any) -> None:
    """Raise unless `name` is the name of a score."""
    if name not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, or a function; got {name!r}")


def _default_scores(vae: VAE, x: Any, seed: int, reference: Reference | None) -> list[str]:
    first = prepare(vae, x, seed=seed).peek(1000)
    is_image = is_image_shape(tuple(first.shape[1:])) and bool(((first >= 0) & (first <= 1)).all())
    left_out = (
        {"regret"} | (set() if is_image else {"complexity"}) | (set(LEARNED) if reference is None else set())
    )
    return [name for name in SCORES if name not in left_out]
