"""What is reported of a model that has been judged: estimates for each datum, means with errors, a table.

Notation: N data, S particles z_s ~ q(z|x) for each; w_s = p(x, z_s) / q(z_s|x) is an importance weight; U
latent units. Values are in nats per datum, higher is better.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.aggregate import AggregatePosterior
from pyro_vae.evaluation.arviz_compat import MIN_DRAWS
from pyro_vae.utils.display import Estimate
from pyro_vae.utils.serialization import to_plain

__all__ = ["Evaluation", "PerDatum", "standard_error"]

_ACTIVE = 0.01  # least variance over the data of an active unit's posterior mean (Burda et al. 2016)


@dataclass(frozen=True, eq=False)
class PerDatum:
    """Estimates for each datum, float64 on the CPU; (N,) in nats where nothing else is said.

    Attributes:
        expected_log_likelihood: E_q[log p(x|z)].
        expected_log_joint: E_q[log p(x, z)].
        kl: KL(q(z|x) ‖ p(z)), in closed form if `Evaluation.has_analytic_kl`, else sampled.
        entropy: H[q(z|x)], in closed form if `Evaluation.has_analytic_entropy`, else sampled.
        elbo_sampled_kl: E_q[log w], the ELBO with nothing in closed form, as `pyro.infer.Trace_ELBO` has it.
        log_evidence: log (1/S) Σ w_s. On average no more than log p(x), and below it by about half the square
            of its Monte Carlo error.
        log_evidence_mc_se: Its Monte Carlo error, by the delta method; see `weights.WeightSummary`.
        effective_sample_size: (Σ w_s)² / Σ w_s², from 1 to S.
        pareto_k: Shape k̂ of the tail of w; see `weights.pareto_smoothed`.
        unit_kl: KL of each latent unit, (N, U); see `units.Units`.
        unit_mean: Posterior mean of each latent unit, (N, U).
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

    @property
    def elbo(self) -> Tensor:
        """E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)), as `pyro.infer.TraceMeanField_ELBO` has it."""
        return self.expected_log_likelihood - self.kl

    @property
    def elbo_by_entropy(self) -> Tensor:
        """E_q[log p(x, z)] + H[q(z|x)]: the ELBO again."""
        return self.expected_log_joint + self.entropy

    @property
    def gap(self) -> Tensor:
        """The gap log p(x) − ELBO = KL(q(z|x) ‖ p(z|x)), estimated by what `log_evidence` is above `elbo`."""
        return self.log_evidence - self.elbo


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What `evaluate` reports; shown as a table.

    A standard error `…_se` is that of a mean over the data, as a sample of their source: their standard
    deviation over √N, which the Monte Carlo noise of each datum's estimate enters. `…_mc_se` is the Monte
    Carlo error alone, for these very data.

    Attributes:
        per_datum: The estimates for each datum.
        convergence: For S = 1, 10, 100, … the mean bound L_S and its Monte Carlo error.
        unit_names: Of the U latent units, as in "z[3]".
        activity: Variance over the data of the units' posterior means, Var_x(E_q[z_u]), (U,).
        aggregate: Densities of the aggregate posterior over the first data; None if not asked for.
        has_analytic_kl: Whether the KL is in closed form.
        has_analytic_entropy: Whether the entropy is in closed form.
        num_data: N.
        num_particles: S.
        num_dimensions: Numbers that make up one datum.
        seed: The seed of the draws.
    """

    per_datum: PerDatum
    convergence: dict[int, Estimate]
    unit_names: list[str]
    activity: Tensor
    aggregate: AggregatePosterior | None
    has_analytic_kl: bool
    has_analytic_entropy: bool
    num_data: int
    num_particles: int
    num_dimensions: int
    seed: int

    def mean(self, name: str) -> Estimate:
        """Mean over the data of a field or property of `per_datum`, with its standard error.

        Example: `report.mean("gap")`.
        """
        return _mean(getattr(self.per_datum, name))

    @property
    def elbo(self) -> float:
        """Mean ELBO, with the KL in closed form where it has one."""
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
        """Monte Carlo error of `log_evidence` for these very data, by the delta method."""
        return float(self.per_datum.log_evidence_mc_se.square().sum().sqrt() / self.num_data)

    @property
    def bits_per_dimension(self) -> Estimate:
        """−log₂ p(x) over the number of dimensions: lower is better; a code length for discrete data."""
        nats, se = self.mean("log_evidence")
        scale = math.log(2) * self.num_dimensions
        return Estimate(-nats / scale, se / scale)

    @property
    def pareto_k(self) -> Tensor:
        """Pareto shape k̂ of each datum's importance weights, (N,)."""
        return self.per_datum.pareto_k

    @property
    def unreliable(self) -> float:
        """Fraction of the data whose k̂ is above 0.7, so that `log_evidence` is likely too low for them.

        0 where k̂ is not known, for want of particles.
        """
        return float((self.pareto_k > 0.7).double().mean())

    @property
    def kl_per_dimension(self) -> Tensor:
        """Mean KL of each latent unit, (U,)."""
        return self.per_datum.unit_kl.mean(0)

    @property
    def kl_per_dimension_se(self) -> Tensor:
        """Standard error of `kl_per_dimension` over the data, (U,)."""
        return standard_error(self.per_datum.unit_kl)

    @property
    def active(self) -> Tensor:
        """Which latent units are active, Var_x(E_q[z_u]) > 0.01, (U,)."""
        return self.activity > _ACTIVE

    @property
    def active_units(self) -> int:
        """How many latent units are active."""
        return int(self.active.sum())

    @property
    def mutual_information(self) -> Estimate | None:
        """I(x; z) under the guide and the first data, at most the logarithm of their number."""
        return None if self.aggregate is None else _mean(self.aggregate.information)

    @property
    def marginal_kl(self) -> Estimate | None:
        """KL of the aggregate posterior over the first data from the prior."""
        return None if self.aggregate is None else _mean(self.aggregate.marginal_kl)

    def as_dict(self) -> dict[str, Any]:
        """Everything but what is kept of each datum, as plain values, for a JSON file; None where undefined.

        Estimates are pairs: a value and its standard error.
        """
        fields = [field.name for field in dataclasses.fields(PerDatum) if not field.name.startswith("unit")]
        means = {name: self.mean(name) for name in [*fields, "elbo", "elbo_by_entropy", "gap"]}
        k = self.pareto_k
        return to_plain(
            {
                "num_data": self.num_data,
                "num_particles": self.num_particles,
                "seed": self.seed,
                **means,
                "log_evidence_mc_se": self.log_evidence_mc_se,
                "bits_per_dimension": self.bits_per_dimension,
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
        return "\n".join(_table(self))


def _for_json(value: Any) -> Any:
    """Turn tensors into lists, and NaN and infinities, which JSON lacks, into None."""
    if isinstance(value, Tensor):
        return to_plain(value.tolist(), _for_json)
    return None if isinstance(value, float) and not math.isfinite(value) else NotImplemented


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension."""
    if len(values) == 1:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / math.sqrt(len(values))


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(standard_error(values)))


def _table(report: Evaluation) -> Iterator[str]:
    """Lines that say what was found, how sure it is, and what of it cannot be trusted."""
    S, k = report.num_particles, report.pareto_k
    most = report.unreliable > 0.5

    def line(name: str, value: object, note: str = "") -> str:
        return f"{name:<32}{value!s:>20}  {note}".rstrip()

    yield (
        f"{report.num_data:,} data, S = {S:,} particles, seed {report.seed}; "
        "nats per datum ± standard error over the data"
    )
    monte_carlo = f"Monte Carlo error {report.log_evidence_mc_se:.2g}" if S > 1 else ""
    doubt = f"UNRELIABLE, likely too low: Pareto k > 0.7 for {report.unreliable:.0%} of the data; "
    yield line(
        "log p(x), importance-weighted", report.mean("log_evidence"), (doubt if most else "") + monte_carlo
    )
    doubt = "UNRELIABLE, likely too high; " if most else ""
    yield line("  bits per dimension", report.bits_per_dimension, doubt + "lower is better")
    exact_kl = "KL in closed form" if report.has_analytic_kl else "KL sampled"
    exact_entropy = "entropy in closed form" if report.has_analytic_entropy else "entropy sampled"
    yield line("ELBO", report.mean("elbo"), f"E[log p(x|z)] − KL(q‖p(z)), {exact_kl}")
    yield line(
        "  the same by the entropy", report.mean("elbo_by_entropy"), f"E[log p(x,z)] + H[q], {exact_entropy}"
    )
    yield line("  the same, all sampled", report.mean("elbo_sampled_kl"), "log p(x) − KL(q‖p(z|x))")
    doubt = "UNRELIABLE, likely too low; " if most else ""
    yield line("gap, KL(q‖p(z|x))", report.mean("gap"), doubt + "log p(x) − ELBO")
    yield line("E[log p(x|z)]", report.mean("expected_log_likelihood"))
    yield line("KL to the prior", report.mean("kl"))
    if report.aggregate is not None:
        count = len(report.aggregate.log_prior)
        limit = f"of the first {count:,} data; at most log {count:,} = {math.log(count):.2f}"
        yield line("  mutual information of x and z", report.mutual_information, limit)
        yield line("  KL of the aggregate to prior", report.marginal_kl)
    yield line(
        "active units", f"{report.active_units} of {len(report.unit_names)}", f"Var(E[z|x]) > {_ACTIVE}"
    )
    if S < MIN_DRAWS:
        yield line("Pareto k", "-", f"needs {MIN_DRAWS} particles")
    else:
        good, bad = int((k < 0.5).sum()), int((k > 0.7).sum())
        yield line(
            "Pareto k, median",
            f"{k.median():.2f}",
            f"< 0.5: {good:,}, to 0.7: {len(k) - good - bad:,}, above: {bad:,}",
        )
        if bad:
            yield "  k > 0.7: there the guide misses much of the posterior, and log p(x) is likely higher"
    ess = report.per_datum.effective_sample_size
    yield line("effective sample size, median", f"{ess.median():.1f}", f"of {S:,}; least {ess.min():.1f}")
    yield "bound by particles ± Monte Carlo error"
    for size, bound in report.convergence.items():
        yield line(f"  S = {size:,}", bound)
