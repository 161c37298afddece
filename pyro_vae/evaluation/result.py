"""Evaluation results: per-example estimates, means with standard errors, summary table.

Notation: N examples, S particles z_s ~ q(z|x) per example, importance weights w_s = p(x, z_s) / q(z_s|x), U
latent dimensions ("units", as in active units). Values are in nats per datum, higher is better.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.evaluation.arviz_compat import MIN_DRAWS
from pyro_vae.evaluation.latents import AggregatePosterior
from pyro_vae.utils.display import Estimate, data_frame, html_table
from pyro_vae.utils.serialization import to_plain

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Evaluation", "PerDatum", "standard_error"]

_ACTIVE = 0.01  # minimum variance of an active unit's posterior mean over the data (Burda et al. 2016)


@dataclass(frozen=True, eq=False)
class PerDatum:
    """Estimates per example: float64 on the CPU, (N,) and in nats unless stated otherwise.

    Attributes:
        expected_log_likelihood: E_q[log p(x|z)].
        expected_log_joint: E_q[log p(x, z)].
        kl: KL(q(z|x) ‖ p(z)), in closed form if `Evaluation.has_analytic_kl`, else sampled.
        entropy: H[q(z|x)], in closed form if `Evaluation.has_analytic_entropy`, else sampled.
        elbo_sampled_kl: E_q[log w], the ELBO with every term sampled, as in `pyro.infer.Trace_ELBO`.
        log_evidence: log (1/S) Σ w_s. At most log p(x) on average, and below it by about half the square of
            its Monte Carlo error.
        log_evidence_mc_se: Monte Carlo error of `log_evidence`; see `importance_weights.WeightSummary`.
        effective_sample_size: (Σ w_s)² / Σ w_s², from 1 to S.
        pareto_k: Shape k̂ of the tail of w; see `importance_weights.pareto_smoothed`.
        unit_kl: KL of each latent dimension, (N, U); see `latents.LatentSummary`.
        unit_mean: Posterior mean of each latent dimension, (N, U).
        site_log_likelihood: E_q[log p] of each observed site, (N, O), from at most 250 of the particles.
    """

    expected_log_likelihood: Tensor
    expected_log_joint: Tensor
    kl: Tensor
    entropy: Tensor
    elbo_sampled_kl: Tensor
    log_evidence: Tensor
    log_evidence_mc_se: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    unit_kl: Tensor
    unit_mean: Tensor
    site_log_likelihood: Tensor

    @property
    def elbo(self) -> Tensor:
        """E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)), as in `pyro.infer.TraceMeanField_ELBO`."""
        return self.expected_log_likelihood - self.kl

    @property
    def elbo_by_entropy(self) -> Tensor:
        """ELBO from the entropy, E_q[log p(x, z)] + H[q(z|x)]."""
        return self.expected_log_joint + self.entropy

    @property
    def gap(self) -> Tensor:
        """Gap log p(x) − ELBO = KL(q(z|x) ‖ p(z|x)), estimated by `log_evidence` − `elbo`."""
        return self.log_evidence - self.elbo


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Result of `evaluate`; its repr is a table.

    `…_se` is the standard error of a mean over the data as a sample, their standard deviation over √N, Monte
    Carlo noise included; `…_mc_se` is the Monte Carlo error alone, the data held fixed.

    Attributes:
        per_datum: Estimates per example.
        convergence: For S = 1, 10, 100, … the mean bound L_S and its Monte Carlo error.
        unit_names: Names of the U latent dimensions, such as "z[3]".
        observed_names: Names of the O observed sites.
        activity: Variance of the posterior means over the data, Var_x(E_q[z_u]), (U,).
        aggregate: Log-densities under the aggregate posterior of the first examples; None if not requested.
        has_analytic_kl: True if the KL is in closed form.
        has_analytic_entropy: True if the entropy is in closed form.
        num_data: N.
        num_particles: S.
        num_dimensions: Mean number of observed values per example.
        is_discrete: True if all observed values are discrete, so that log p(x) is a code length.
        seed: Seed of the draws.
    """

    per_datum: PerDatum
    convergence: dict[int, Estimate]
    unit_names: list[str]
    observed_names: list[str]
    activity: Tensor
    aggregate: AggregatePosterior | None
    has_analytic_kl: bool
    has_analytic_entropy: bool
    num_data: int
    num_particles: int
    num_dimensions: float
    is_discrete: bool
    seed: int

    def mean(self, name: str) -> Estimate:
        """Return the mean of a field or property of `per_datum` and its standard error over the data.

        Example: `report.mean("gap")`.
        """
        return _mean(getattr(self.per_datum, name))

    @property
    def elbo(self) -> float:
        """Mean ELBO, with the KL in closed form where there is one."""
        return self.mean("elbo").value

    @property
    def elbo_se(self) -> float:
        """Standard error of `elbo` over the data."""
        return self.mean("elbo").standard_error

    @property
    def log_evidence(self) -> float:
        """Mean importance-weighted estimate of log p(x)."""
        return self.mean("log_evidence").value

    @property
    def log_evidence_se(self) -> float:
        """Standard error of `log_evidence` over the data."""
        return self.mean("log_evidence").standard_error

    @property
    def log_evidence_mc_se(self) -> float:
        """Monte Carlo error of `log_evidence` by the delta method, the data held fixed."""
        return float(self.per_datum.log_evidence_mc_se.square().sum().sqrt() / self.num_data)

    @property
    def bits_per_dimension(self) -> Estimate:
        """−log₂ p(x) per data dimension: a code length for discrete data, of which less is better.

        Of a density it depends on the unit of x, and is not shown in the table.
        """
        nats, se = self.mean("log_evidence")
        scale = math.log(2) * self.num_dimensions
        return Estimate(-nats / scale, se / scale)

    @property
    def pareto_k(self) -> Tensor:
        """Pareto shape k̂ of the importance weights per example, (N,)."""
        return self.per_datum.pareto_k

    @property
    def unreliable(self) -> float:
        """Fraction of examples with k̂ > 0.7, whose `log_evidence` is likely too low; 0 if k̂ is unknown."""
        return float((self.pareto_k > 0.7).double().mean())

    @property
    def kl_per_dimension(self) -> Tensor:
        """Mean KL of each latent dimension, (U,)."""
        return self.per_datum.unit_kl.mean(0)

    @property
    def kl_per_dimension_se(self) -> Tensor:
        """Standard error of `kl_per_dimension` over the data, (U,)."""
        return standard_error(self.per_datum.unit_kl)

    @property
    def kl_by_site(self) -> dict[str, Estimate]:
        """KL of each latent site, summed over its dimensions: mean over the data and standard error."""
        sites = [name.split("[")[0] for name in self.unit_names]
        return {
            site: _mean(self.per_datum.unit_kl[:, [name == site for name in sites]].sum(1))
            for site in dict.fromkeys(sites)
        }

    @property
    def log_likelihood_by_site(self) -> dict[str, Estimate]:
        """E_q[log p] of each observed site: mean over the data, and its standard error."""
        columns = self.per_datum.site_log_likelihood.unbind(1)
        return dict(zip(self.observed_names, map(_mean, columns), strict=True))

    @property
    def active(self) -> Tensor:
        """True for each active latent dimension, Var_x(E_q[z_u]) > 0.01, (U,); never for a class."""
        return self.activity > _ACTIVE

    @property
    def active_units(self) -> int:
        """Number of active latent dimensions."""
        return int(self.active.sum())

    @property
    def mutual_information(self) -> Estimate | None:
        """I(x; z) under the guide and the first examples, at most the logarithm of their number."""
        return None if self.aggregate is None else _mean(self.aggregate.information)

    @property
    def marginal_kl(self) -> Estimate | None:
        """KL of the aggregate posterior over the first examples from the prior."""
        return None if self.aggregate is None else _mean(self.aggregate.marginal_kl)

    def as_dict(self) -> dict[str, Any]:
        """Return all but per-example values for JSON: numbers, (value, error) pairs, None if undefined."""
        means = {name: self.mean(name) for name in [*_columns(), "elbo", "elbo_by_entropy", "gap"]}
        k = self.pareto_k
        return to_plain(
            {
                "num_data": self.num_data,
                "num_particles": self.num_particles,
                "seed": self.seed,
                **means,
                "log_evidence_mc_se": self.log_evidence_mc_se,
                "bits_per_dimension": self.bits_per_dimension if self.is_discrete else None,
                "mutual_information": self.mutual_information,
                "marginal_kl": self.marginal_kl,
                "pareto_k": {"good": int((k < 0.5).sum()), "bad": int((k > 0.7).sum())},
                "active_units": self.active_units,
                "units": self.unit_names,
                "kl_per_dimension": self.kl_per_dimension,
                "kl_per_dimension_se": self.kl_per_dimension_se,
                "activity": self.activity,
                "bound_by_particles": {str(size): list(bound) for size, bound in self.convergence.items()},
            },
            _for_json,
        )

    def __repr__(self) -> str:
        return "\n".join([_caption(self), *(_line(*row) for row in _table(self))])

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        rows = [(name, str(value), note) for name, value, note in _table(self)]
        return html_table(_caption(self), ["", "value", ""], rows, left=(0, 2))

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return the estimates of each example as a data frame, a row for each, indexed by its number."""
        names = [*_columns(), "elbo", "gap"]
        columns = {name: getattr(self.per_datum, name).numpy() for name in names}
        return data_frame({"datum": range(self.num_data), **columns}, "datum")

    def plot(self, **options: Any) -> "Axes":
        """Draw the KL of each latent dimension by `plots.kl_per_dimension`, which takes the options."""
        if self.num_data > 1:
            options.setdefault("se", self.kl_per_dimension_se)
        return plots.kl_per_dimension(self.kl_per_dimension, **options)


def _columns() -> list[str]:
    """Return the names of the fields with one number for each example."""
    fields = dataclasses.fields(PerDatum)
    return [field.name for field in fields if not field.name.startswith(("unit", "site"))]


def _for_json(value: Any) -> Any:
    """Convert tensors to lists, and NaN and infinities, which JSON lacks, to None."""
    if isinstance(value, Tensor):
        return to_plain(value.tolist(), _for_json)
    return None if isinstance(value, float) and not math.isfinite(value) else NotImplemented


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over the first dimension."""
    if len(values) == 1:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / math.sqrt(len(values))


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(standard_error(values)))


def _caption(report: Evaluation) -> str:
    return (
        f"{report.num_data:,} data, S = {report.num_particles:,} particles, seed {report.seed}; "
        "nats per datum ± standard error over the data"
    )


_Row = tuple[str, object, str]  # name, value, note


def _table(report: Evaluation) -> Iterator[_Row]:
    """Yield the rows of the summary table; estimates are marked where k̂ makes them unreliable."""
    yield from _bound_rows(report)
    yield from _latent_rows(report)
    yield from _weight_rows(report)
    yield "bound by particles ± Monte Carlo error", "", ""
    for size, bound in report.convergence.items():
        yield f"  S = {size:,}", bound, ""


def _line(name: str, value: object, note: str) -> str:
    return f"{name:<32}{value!s:>20}  {note}".rstrip()


def _bound_rows(report: Evaluation) -> Iterator[_Row]:
    evidence_note = f"Monte Carlo error {report.log_evidence_mc_se:.2g}" if report.num_particles > 1 else ""
    bits_note, gap_note = "lower is better", "log p(x) − ELBO"
    if report.unreliable > 0.5:
        reason = f"Pareto k > 0.7 for {report.unreliable:.0%} of the data"
        evidence_note = f"UNRELIABLE, likely too low: {reason}; {evidence_note}"
        bits_note = f"UNRELIABLE, likely too high; {bits_note}"
        gap_note = f"UNRELIABLE, likely too low; {gap_note}"
    kl = "KL in closed form" if report.has_analytic_kl else "KL sampled"
    entropy = "entropy in closed form" if report.has_analytic_entropy else "entropy sampled"
    yield "log p(x), importance-weighted", report.mean("log_evidence"), evidence_note
    if report.is_discrete:
        yield "  bits per dimension", report.bits_per_dimension, bits_note
    yield "ELBO", report.mean("elbo"), f"E[log p(x|z)] − KL(q‖p(z)), {kl}"
    yield "  the same by the entropy", report.mean("elbo_by_entropy"), f"E[log p(x,z)] + H[q], {entropy}"
    yield "  the same, all sampled", report.mean("elbo_sampled_kl"), "log p(x) − KL(q‖p(z|x))"
    yield "gap, KL(q‖p(z|x))", report.mean("gap"), gap_note
    yield "E[log p(x|z)]", report.mean("expected_log_likelihood"), ""
    if len(report.observed_names) > 1:
        for name, estimate in report.log_likelihood_by_site.items():
            yield f"  of {name}", estimate, ""


def _latent_rows(report: Evaluation) -> Iterator[_Row]:
    yield "KL to the prior", report.mean("kl"), ""
    if len(report.kl_by_site) > 1:
        for name, estimate in report.kl_by_site.items():
            yield f"  of {name}, its dimensions summed", estimate, ""
    if report.aggregate is not None:
        count = len(report.aggregate.log_prior)
        limit = f"of the first {count:,} data; at most log {count:,} = {math.log(count):.2f}"
        yield "  mutual information of x and z", report.mutual_information, limit
        yield "  KL of the aggregate to prior", report.marginal_kl, ""
    # a class has no mean, so that it counts as no unit
    counted = len(report.unit_names) - (int(report.activity.isnan().sum()) if report.num_data > 1 else 0)
    active = f"{report.active_units} of {counted}"
    yield "active units", active, f"Var(E[z|x]) > {_ACTIVE}"


def _weight_rows(report: Evaluation) -> Iterator[_Row]:
    S, k, ess = report.num_particles, report.pareto_k, report.per_datum.effective_sample_size
    if S < MIN_DRAWS:
        yield "Pareto k", "-", f"needs {MIN_DRAWS} particles"
    else:
        good, bad = int((k < 0.5).sum()), int((k > 0.7).sum())
        counts = f"< 0.5: {good:,}, to 0.7: {len(k) - good - bad:,}, above: {bad:,}"
        yield "Pareto k, median", f"{k.median():.2f}", counts
        if bad:
            advice = "there the guide misses much of the posterior, and log p(x) is likely higher"
            yield f"  k > 0.7: {advice}", "", ""
    yield "effective sample size, median", f"{ess.median():.1f}", f"of {S:,}; least {ess.min():.1f}"
