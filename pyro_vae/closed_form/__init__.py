"""Analytic losses, and models whose evidence, posterior and ELBO are known exactly.

These are the ground truth that the rest of the library is tested against. They use only torch's arithmetic:
neither Pyro, nor ``torch.distributions``, nor any other file of the package. ``docs/derivation.md`` derives
every formula.

Notation: data x in R^D, latents z in R^K, prior p(z), likelihood p(x|z) ("decoder"), guide q(z|x)
("encoder"), evidence p(x) = ∫ p(x|z) p(z) dz, posterior p(z|x). Logarithms are natural, results in nats.

Every function is batched (leading dimensions broadcast), differentiable, and takes float32 or float64
tensors. A Python number may replace a tensor and takes the dtype of the tensor arguments, float64 if there
are none. Invalid arguments raise an error that names the argument:

- ``TypeError``: not a tensor or a number, or a tensor that is not float32 or float64.
- ``ValueError``: not finite, outside the range stated under Args (such as σ > 0), not positive definite, or
  of a shape that does not fit.
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
