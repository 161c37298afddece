"""A VAE for data that are only given by path: likelihood, units, networks, estimator."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import guides, likelihoods, objectives, priors
from pyro_vae.applications.commands.data import Data
from pyro_vae.applications.linear_start import NoisyNormal, factor_analysis_vae
from pyro_vae.applications.units import StandardisedGuide, StandardisedLikelihood
from pyro_vae.data import Images
from pyro_vae.vae import VAE

__all__ = [
    "ESTIMATORS",
    "GUIDES",
    "LIKELIHOODS",
    "PRIORS",
    "Choice",
    "build_estimator",
    "build_vae",
    "choose",
]

_FLOOR = 0.01  # smallest standard deviation of the noise, in units of the spread
_OVERDISPERSED = 2  # variance over mean of counts, above which the negative binomial is chosen
_PSEUDO_INPUTS = 100
_MISSING_PARTICLES = 20  # draws of z in the bound, where values are missing

REAL, COUNTS = ("normal", "student-t"), ("poisson", "negative-binomial")
LIKELIHOODS: dict[str, Callable[..., likelihoods.Likelihood]] = {
    "bernoulli": likelihoods.Bernoulli,
    "continuous-bernoulli": likelihoods.ContinuousBernoulli,
    "discretized-logistic": likelihoods.DiscretizedLogistic,
    "normal": NoisyNormal,
    "student-t": likelihoods.StudentT,
    "poisson": likelihoods.Poisson,
    "negative-binomial": likelihoods.NegativeBinomial,
}
GUIDES: dict[str, tuple[type[guides.Guide], dict[str, Any]]] = {
    "diagonal": (guides.DiagonalNormal, {}),
    "full": (guides.FullCovarianceNormal, {}),
    "low-rank": (guides.LowRankNormal, {}),
    "mixture": (guides.Mixture, {}),
    "iaf": (guides.Flow, {"flow": "iaf"}),
    "maf": (guides.Flow, {"flow": "maf"}),
    "nsf": (guides.Flow, {"flow": "nsf"}),
}
PRIORS: dict[str, Callable[[int], nn.Module] | None] = {
    "standard": priors.StandardNormal,
    "learned": priors.LearnedNormal,
    "mixture": priors.Mixture,
    "flow": priors.Flow,
    "vamp": None,  # made of the guide
}
ESTIMATORS: dict[str, Callable[[int], ELBO]] = {
    "trace": lambda S: Trace_ELBO(S, 1, vectorize_particles=S > 1),
    "trace-mean-field": lambda S: TraceMeanField_ELBO(S, 1, vectorize_particles=S > 1),
    "stl": objectives.STL,
    "iwae": objectives.IWAE,
    "dreg": objectives.DReG,
    "vimco": objectives.VIMCO,
}


class Choice(NamedTuple):
    """A likelihood by its name, why it, and how grey levels become bits."""

    likelihood: str
    reason: str
    binarize: str | None


def choose(data: Data, asked: str, binarize: str | None) -> Choice:
    """Choose the likelihood of data, or take the one that was asked for."""
    name, reason = (asked, "asked for") if asked != "auto" else _by_values(data)
    if binarize is None and name == "bernoulli" and data.grey and not _are_bits(data.values):
        binarize = "dynamic"
    return Choice(name, reason, None if binarize == "none" else binarize)


def _by_values(data: Data) -> tuple[str, str]:
    values = data.values
    if _are_bits(values):
        return "bernoulli", "all values are 0 or 1"
    if isinstance(values, Images):
        if values.shape[1] == 1:
            return "bernoulli", "the images have one channel; their grey levels are binarised"
        return "discretized-logistic", "the images have colours, each channel of 256 levels"
    if data.grey:
        if np.isnan(values).any():
            return "continuous-bernoulli", "the values lie in [0, 1], and some are missing"
        return "bernoulli", "the values lie in [0, 1] and are binarised, as grey levels"
    return _of_numbers(values)


def _of_numbers(values: NDArray[Any]) -> tuple[str, str]:
    """Choose by whether the values are counts: whole numbers with zeros in half of the columns."""
    present = values[~np.isnan(values)]
    zeros = (values == 0).reshape(len(values), -1).any(0)
    if len(present) and present.min() >= 0 and (present == np.rint(present)).all() and zeros.mean() >= 0.5:
        mean = np.nanmean(values, 0)
        dispersion = float(np.median(np.nanvar(values, 0)[mean > 0] / mean[mean > 0]))
        found = f"the values are counts, of variance {dispersion:.1f} times the mean"
        return ("negative-binomial" if dispersion > _OVERDISPERSED else "poisson"), found
    return "normal", "the values are real numbers"


def _are_bits(values: Images | NDArray[Any]) -> bool:
    if isinstance(values, Images):
        return bool(((values.pixels == 0) | (values.pixels == 255)).all())
    return bool(((values == 0) | (values == 1) | np.isnan(values)).all())


def build_estimator(name: str, particles: int | None, *, missing: bool) -> ELBO | None:
    """Return the estimator to train by; None for the default of the pair.

    Raises:
        ValueError: If a number of particles is given without an estimator that it belongs to.
    """
    if name != "auto":
        return ESTIMATORS[name](1 if particles is None else particles)
    if missing:
        return objectives.IWAE(_MISSING_PARTICLES if particles is None else particles)
    if particles is not None:
        raise ValueError("--particles goes with an --estimator: choose one, such as --estimator iwae")
    return None


def build_vae(data: Data, choice: Choice, args: argparse.Namespace) -> VAE:
    """Build a VAE of float64 for tables that are standardised, else of float32, with random weights."""
    event_shape, K, hidden = tuple(data.values.shape[1:]), args.latent_dim, tuple(args.hidden)
    name, is_missing = choice.likelihood, args.missing is not None
    has_units = name in COUNTS or (name in REAL and not data.grey)
    options: dict[str, Any] = {"hidden_features": hidden[::-1]}
    if name == "normal":
        options |= {"floor": _FLOOR, "variance": "per_element" if has_units else "shared"}
    elif name == "student-t":
        options |= {"min_scale": _FLOOR}
    likelihood: nn.Module = LIKELIHOODS[name](K, event_shape, **options)
    kind, settings = GUIDES[args.guide]
    inner = kind(event_shape, K, hidden_features=hidden, mask_input=is_missing, **settings)
    guide: nn.Module = inner
    if has_units:
        offset, scale = _units(data)
        if name == "normal" and _starts_linear(data, args):
            return _linear_start(data, args, offset, scale)
        guide = StandardisedGuide(inner, offset, scale)
        if name in REAL:
            likelihood = StandardisedLikelihood(likelihood, offset, scale)  # type: ignore[arg-type]
        else:
            _start_at_mean(likelihood, offset)
    make = PRIORS[args.prior]
    prior = _vamp_prior(inner, guide, data) if make is None else make(K)
    vae = VAE(prior=prior, likelihood=likelihood, guide=guide)
    return vae.double() if has_units else vae


def _starts_linear(data: Data, args: argparse.Namespace) -> bool:
    """Return whether factor analysis of a table is a start: the parts are its own, and nothing is missing."""
    ordinary = (args.prior, args.guide, args.missing) == ("standard", "diagonal", None)
    return ordinary and len(data.values.shape) == 2


def _linear_start(data: Data, args: argparse.Namespace, offset: list[float], scale: list[float]) -> VAE:
    """Return a VAE in the units of the data that starts as their factor analysis."""
    vae = factor_analysis_vae(
        (np.asarray(data.values, dtype=np.float64) - offset) / scale,
        args.latent_dim,
        hidden_features=tuple(args.hidden),
        activation="relu",
        floor=_FLOOR,
        dtype=torch.float64,
        seed=args.seed,
    )
    likelihood: Any = vae.likelihood
    posterior: Any = vae.posterior
    return VAE(
        prior=vae.prior,
        likelihood=StandardisedLikelihood(likelihood, offset, scale),
        guide=StandardisedGuide(posterior, offset, scale),
    ).double()


def _units(data: Data) -> tuple[list[float], list[float]]:
    """Return mean and spread of each column of a table, or of all values of arrays of more dimensions."""
    assert not isinstance(data.values, Images)
    values = np.asarray(data.values, dtype=np.float64)
    if values.ndim > 2:
        values = values.reshape(-1, 1)
    empty = np.flatnonzero(np.isnan(values).all(0))
    if len(empty):
        raise ValueError(f"{data.place((0, int(empty[0])))} and all below are missing: leave the column out")
    with np.errstate(over="ignore"):
        offset, scale = np.nanmean(values, 0), np.nanstd(values, 0)
    if not np.isfinite(scale).all():
        raise ValueError(f"the spread of values of {data.name} overflows: divide them by a constant")
    constant = scale <= 10 * np.finfo(np.float64).eps * np.abs(offset)
    return offset.tolist(), np.where(constant, 1.0, scale).tolist()


@torch.no_grad()
def _start_at_mean(likelihood: nn.Module, mean: list[float]) -> None:
    """Set the last bias of a likelihood of counts, so that its rates start at the means of the data."""
    last: Any = likelihood.network[-1]  # type: ignore[index]
    rate = torch.tensor(mean, dtype=torch.float64).clamp(min=1e-3).expand(len(last.bias))
    last.bias.copy_(rate + torch.log(-torch.expm1(-rate)))  # the inverse of softplus


def _vamp_prior(inner: guides.Guide, guide: nn.Module, data: Data) -> nn.Module:
    """Return the prior of a guide at some of the data, in the units that the inner guide sees."""
    count = min(_PSEUDO_INPUTS, len(data.values))
    rows = torch.randperm(len(data.values))[:count]
    if isinstance(data.values, Images):
        x = data.values[rows]
    else:
        x = torch.as_tensor(np.asarray(data.values[rows.numpy()]))
    if isinstance(guide, StandardisedGuide):
        x = (x - guide.offset) / guide.scale
    prior = priors.VampPrior(inner, num_components=count)
    prior.set_pseudo_inputs(x.nan_to_num(0.0).float())
    return prior
