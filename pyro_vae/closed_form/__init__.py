"""Losses derived by hand, and models whose evidence, posterior and ELBO are known exactly.

These judge the rest of the library, so they stand on torch's arithmetic alone: they use neither Pyro, nor
``torch.distributions``, nor any other file of the package. ``docs/derivation.md`` derives every formula.

Notation: data x in R^D, latents z in R^K, prior p(z), likelihood p(x|z) ("decoder"), guide q(z|x)
("encoder"), evidence p(x) = ∫ p(x|z) p(z) dz, posterior p(z|x). Logarithms are natural, results in nats.

Every function is batched (dimensions on the left broadcast), differentiable, and takes float32 or float64
tensors; a Python number may stand for a tensor and takes the type of the tensors beside it. An argument
which is not floating-point raises a ``TypeError``; one which is not finite, not positive or positive definite
where it must be, or which does not broadcast, raises a ``ValueError``. Either names the argument.
"""

from pyro_vae.closed_form.losses import (
    bernoulli_nll,
    continuous_bernoulli_log_normaliser,
    continuous_bernoulli_nll,
    gaussian_nll,
    gaussian_reconstruction_loss,
    multivariate_normal_kl,
    naive_log_evidence,
    negative_elbo,
    normal_cross_entropy,
    normal_kl,
    normal_negentropy,
    standard_normal_kl,
    vae_loss,
)
from pyro_vae.closed_form.models import ElboGradient, GaussianMixture, LinearGaussian, MultivariateNormal

__all__ = [
    "ElboGradient",
    "GaussianMixture",
    "LinearGaussian",
    "MultivariateNormal",
    "bernoulli_nll",
    "continuous_bernoulli_log_normaliser",
    "continuous_bernoulli_nll",
    "gaussian_nll",
    "gaussian_reconstruction_loss",
    "multivariate_normal_kl",
    "naive_log_evidence",
    "negative_elbo",
    "normal_cross_entropy",
    "normal_kl",
    "normal_negentropy",
    "standard_normal_kl",
    "vae_loss",
]
