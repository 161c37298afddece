"""Remove known noise: the posterior of clean data given corrupted data, under a trained VAE."""

from typing import Any

import torch

from pyro_vae.applications.corruptions import CorruptionError, Erase
from pyro_vae.applications.imputation import floating_tensor, observe
from pyro_vae.applications.posterior_draws import Observed, Restored, draw_posterior
from pyro_vae.utils.elements import elementwise
from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.validation import known_support, outside_support
from pyro_vae.vae import VAE, require_vae

__all__ = ["denoise"]


def denoise(
    vae: VAE,
    y: Any,
    *,
    corruption: Any,
    num_particles: int = 1000,
    num_draws: int = 100,
    method: str = "auto",
    seed: int = 0,
) -> Restored:
    r"""Restore clean data x from corrupted data y, whose corruption p(y|x) is known.

    .. math:: p(x|y) \propto p(y|x) \int p(x|z) p(z) \, dz

    Given z the elements are independent, so that p(y|z) and p(x|y, z) have closed forms; see `conditioning`.
    The mean of p(x|y) has the least squared error of all estimates for data from the model; that of
    `vae.reconstruct(y)`, which takes y for clean, is larger. In-painting is `Erase(mask)`, super-resolution a
    `LinearMap`.

    Args:
        vae: A VAE trained on clean data, whose likelihood has independent elements.
        y: (N, *event_shape), or (N, M) through a `LinearMap`; NaN where nothing was observed: a
            floating-point tensor, array, sparse matrix or data frame.
        corruption: One of `corruptions`, or a function from x to a distribution over y, element by element.
        num_particles: S, draws of z per example; or as many states of 20 Markov chains.
        num_draws: M, draws of x that are kept.
        method: As for `impute`: "auto", "importance", "gibbs" or "metropolis".
        seed: Seed of the draws.

    Raises:
        TypeError: If `vae` is not a `VAE`, y is not floating-point, or the corruption is not a function.
        CorruptionError: If the corruption does not go with the likelihood, or cannot have produced y; a
            ValueError.
        ValueError: If y is empty, has another shape or is infinite; or as `impute`.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> from pyro_vae.applications.corruptions import Normal
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> clean = denoise(vae, torch.randn(5, 6), corruption=Normal(0.3), num_particles=50)
        >>> clean.mean.shape, bool((clean.std < 0.3).all())
        (torch.Size([5, 6]), True)
    """
    noise = corruption
    if isinstance(corruption, Erase):
        require_vae("denoise", vae)
        y = corruption.erased(floating_tensor(vae, "y", y))
        noise = corruption.then
    if (noise is not None and not callable(noise)) or isinstance(noise, type):
        raise TypeError(
            "corruption must be one of pyro_vae.applications.corruptions, such as Normal(0.3), or a function "
            f"from x to a distribution over y; got {noise!r}"
        )
    observed = observe(vae, "y", y, noise)
    if noise is not None:
        _check_corruption(observed)
    return draw_posterior(
        observed, method=method, num_particles=num_particles, num_draws=num_draws, seed=seed
    )


def _check_corruption(observed: Observed) -> None:
    """Raise unless the corruption acts on elements of the likelihood's data and can have produced y."""
    vae, y = observed.vae, observed.y
    with evaluating(vae, y.device, 0):
        z = vae.prior().sample((1,))
        x = elementwise(vae.decode(z)).sample()
        noise = observed.corruption(x)
    shape = (1, *y.shape[1:]) if observed.is_mapped else x.shape
    if getattr(noise, "batch_shape", None) != shape or len(noise.event_shape) > 0:
        raise CorruptionError(
            f"the corruption must return a distribution of each element, of batch shape {tuple(x.shape)} "
            f"for x of this shape; got {noise}"
        )
    support = known_support(noise)
    filled = torch.where(observed.missing, noise.sample()[0], y)
    message = support and outside_support("y", filled, type(observed.corruption).__name__, support)
    if message:
        raise CorruptionError(message)
    with evaluating(vae, y.device, 0):
        observed[:1].given(z[None])  # raises if the two have no closed form together
