"""Impute missing entries with a trained VAE, and combine estimates from several imputations.

Missing entries are NaN. They never reach a network: the guide encodes zeros in their place.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.applications.corruptions import CorruptionError, LinearMap
from pyro_vae.applications.posterior_draws import Observed, Restored, draw_posterior
from pyro_vae.utils.frames import filled, frame_like, is_frame
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.validation import require_floating
from pyro_vae.vae import VAE, require_vae

__all__ = ["Pooled", "floating_tensor", "impute", "observe", "pool"]


def impute(
    vae: VAE,
    x: Any,
    *,
    num_particles: int = 1000,
    num_draws: int = 100,
    method: str = "auto",
    seed: int = 0,
) -> Restored:
    r"""Impute missing entries: mean, standard deviation, quantiles and draws of p(x_missing | x_observed).

    .. math:: E[x|x_{obs}] \approx \sum_s w_s E[x|z_s, x_{obs}], \qquad
        w_s \propto p(x_{obs}|z_s) p(z_s) / q(z_s|x_{obs}), \quad z_s \sim q(z|x_{obs})

    Observed entries come back bit for bit, in the mean and in every draw. An example without any observed
    entry gets draws from the prior. Valid if entries are missing at random: where the reason is the value
    itself, no method without a model of the reason is. The mean minimises the squared error; to estimate
    anything else, such as a variance or a regression, estimate it on each draw and `pool`: an average over
    the draws is too certain of itself.

    Of a data frame, mean and standard deviation are data frames with its columns and index.

    Args:
        vae: A trained VAE whose likelihood has independent elements.
        x: (N, *event_shape), NaN where missing: a floating-point tensor, array, sparse matrix or data frame.
        num_particles: S, draws of z per example; or as many states of 20 Markov chains.
        num_draws: M, draws of x that are kept.
        method: "importance"; "gibbs", pseudo-Gibbs, biased; "metropolis", Metropolis within Gibbs, exact in
            the long run; or "auto": importance, and Metropolis within Gibbs for examples with k̂ > 0.7.
        seed: Seed of the draws.

    Raises:
        TypeError: If `vae` is not a `VAE`, or x is not floating-point.
        ValueError: If x is empty, has another shape, is infinite, or has an observed entry outside the
            support; the message names the first. If the method is unknown, a number is below 1, or elements
            of x are not independent given z.

    Source: P.-A. Mattei, J. Frellsen (2019), MIWAE, arXiv:1812.02633; D. Rezende, S. Mohamed, D. Wierstra
    (2014), arXiv:1401.4082, appendix F (pseudo-Gibbs); P.-A. Mattei, J. Frellsen (2018), Leveraging the exact
    likelihood of deep latent variable models, arXiv:1802.04826 (Metropolis within Gibbs).

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.StudentT(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> x = torch.randn(5, 6)
        >>> x[0, 3] = torch.nan
        >>> imputed = impute(vae, x, num_particles=50)
        >>> bool(imputed.std[0, 3] > 0), bool((imputed.mean == x)[1:].all()), imputed.quantile(0.9).shape
        (True, True, torch.Size([5, 6]))
    """
    observed = observe(vae, "x", x, None)
    found = draw_posterior(
        observed, method=method, num_particles=num_particles, num_draws=num_draws, seed=seed
    )
    if not is_frame(x):
        return found
    mean, std = (values.double().cpu().numpy() for values in (found.mean, found.std))
    return dataclasses.replace(found, mean=filled(x, mean), std=frame_like(x, std))


def observe(vae: Any, name: str, y: Any, corruption: Any) -> Observed:
    """Check observations, NaN where missing, and return them on the device of the VAE.

    Raises:
        TypeError: As `impute`.
        ValueError: As `impute`.
    """
    require_vae(
        "impute" if corruption is None else "denoise",
        vae,
        instead=": draws of what is missing given y are in the group posterior_predictive of "
        "to_inference_data(vae, (x, y), missing='nan', oversample=10)" * (corruption is None),
    )
    parameter = next(vae.parameters(), torch.zeros(()))
    y = floating_tensor(vae, name, y).to(parameter.device)
    infinite = y.isinf().nonzero()
    if len(infinite):
        index = infinite[0].tolist()
        raise ValueError(
            f"{name}{index} is infinite, which is not missing: use NaN for missing, or leave it out"
        )
    missing = y.isnan()
    with evaluating(vae, y.device, 0):
        filler = vae.decode(
            vae.prior().sample((1,))
        ).sample()  # in the support, unlike 0 for some likelihoods
    if isinstance(corruption, LinearMap):
        expected = corruption(filler).batch_shape[1:]
        if y.shape[1:] != expected:
            raise CorruptionError(
                f"{name} must have shape (N, {expected[0]}), as the matrix gives it; got {tuple(y.shape)}"
            )
    elif y.shape[1:] != filler.shape[1:] or corruption is None:
        # another shape gets the VAE's own message, whatever the values
        vae.check_data(torch.where(missing, filler, y) if y.shape[1:] == filler.shape[1:] else y)
    if len(y) == 0:
        raise ValueError(f"{name} is empty: pass at least one example")
    return Observed(vae, torch.where(missing, 0.0, y), missing, corruption, filler.shape[1:])


def floating_tensor(vae: VAE, name: str, values: Any) -> Tensor:
    """Return values as a floating-point tensor; raise TypeError for what is none, as `impute`."""
    if isinstance(values, Tensor):
        require_floating(name, values)
        return values.detach()
    found = vae._as_tensor(values)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{name} must be a tensor, array or data frame with NaN where missing; got "
            f"{type(values).__name__}"
        )
    if not found.is_floating_point():
        raise TypeError(
            f"{name} must hold floating-point numbers; got {found.dtype}: convert by .astype(float)"
        )
    return found


class Pooled(NamedTuple):
    """Estimate pooled over M imputations; each entry has the shape of one estimate.

    Attributes:
        estimate: Mean of the estimates.
        standard_error: Root of within + (1 + 1/M) between, the total variance.
        within: Mean of the variances.
        between: Variance of the estimates over the imputations.
        degrees_of_freedom: (M − 1) (1 + within / ((1 + 1/M) between))², of Student's t.
    """

    estimate: Tensor
    standard_error: Tensor
    within: Tensor
    between: Tensor
    degrees_of_freedom: Tensor


def pool(estimates: Any, variances: Any) -> Pooled:
    """Pool estimates from M imputed data sets by Rubin's rules.

    Args:
        estimates: An estimate from each imputation, (M, *shape), M ≥ 2.
        variances: Its squared standard error, as if the data were complete, (M, *shape).

    Raises:
        ValueError: If the shapes differ, M < 2, or a value is not finite or a variance negative.

    Source: D. B. Rubin (1987), Multiple imputation for nonresponse in surveys, section 3.1.

    Example:
        >>> pooled = pool([1.0, 3.0], [0.5, 0.5])
        >>> pooled.estimate, pooled.standard_error**2  # ½ + (1 + ½) 2
        (tensor(2., dtype=torch.float64), tensor(3.5000, dtype=torch.float64))
    """
    estimate, variance = (torch.as_tensor(values, dtype=torch.float64) for values in (estimates, variances))
    if estimate.shape != variance.shape or estimate.dim() == 0 or len(estimate) < 2:
        raise ValueError(
            "estimates and variances must have the same shape (M, ...) with M ≥ 2 imputations; got "
            f"{tuple(estimate.shape)} and {tuple(variance.shape)}"
        )
    if not (estimate.isfinite() & variance.isfinite() & (variance >= 0)).all():
        raise ValueError("estimates must be finite, and variances finite and not negative")
    M = len(estimate)
    within, between = variance.mean(0), estimate.var(0)
    extra = (1 + 1 / M) * between
    degrees = (M - 1) * (1 + within / extra).square()  # infinite where all estimates agree
    return Pooled(estimate.mean(0), (within + extra).sqrt(), within, between, degrees)
