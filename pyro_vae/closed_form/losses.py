"""Analytic Kullback-Leibler divergences, negative log-likelihoods and VAE losses.

Notation, batching and errors are described in :mod:`pyro_vae.closed_form`.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae.closed_form.checks import (
    as_tensors,
    elementwise,
    require,
    require_broadcast,
    require_last,
    require_positive,
    require_scale_tril,
)

__all__ = [
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

_LOG_2PI = math.log(2 * math.pi)


# Gaussians --------------------------------------------------------------------------------------------------


def normal_negentropy(scale: Tensor | float) -> Tensor:
    r"""Compute the negative entropy of a univariate Gaussian.

    .. math:: \int p \log p = -\tfrac12 (\log 2\pi\sigma^2 + 1)

    Args:
        scale: standard deviation σ > 0, any shape.

    Returns:
        Nats, element-wise, in the shape of ``scale``.

    Example:
        >>> normal_negentropy(1.0)
        tensor(-1.4189, dtype=torch.float64)
    """
    (scale,) = as_tensors(scale=scale)
    require_positive(scale=scale)
    return -0.5 * (_LOG_2PI + 1) - scale.log()


def normal_cross_entropy(
    loc1: Tensor | float, scale1: Tensor | float, loc2: Tensor | float, scale2: Tensor | float
) -> Tensor:
    r"""Compute the cross entropy of two univariate Gaussians.

    .. math:: -\int p_1 \log p_2
        = \tfrac12 \log 2\pi\sigma_2^2 + \frac{\sigma_1^2 + (\mu_1-\mu_2)^2}{2\sigma_2^2}

    Args:
        loc1: mean μ₁ of p₁, the distribution averaged over.
        scale1: standard deviation σ₁ > 0.
        loc2: mean μ₂ of p₂, whose log density is averaged.
        scale2: standard deviation σ₂ > 0. All four broadcast.

    Returns:
        Nats, element-wise, in the broadcast shape.

    Example:
        >>> normal_cross_entropy(0.0, 1.0, 0.0, 1.0) + normal_negentropy(1.0)
        tensor(0., dtype=torch.float64)
    """
    loc1, scale1, loc2, scale2 = elementwise(loc1=loc1, scale1=scale1, loc2=loc2, scale2=scale2)
    require_positive(scale1=scale1, scale2=scale2)
    second_moment = (scale1 / scale2) ** 2 + ((loc1 - loc2) / scale2) ** 2
    return 0.5 * (_LOG_2PI + second_moment) + scale2.log()


def normal_kl(
    loc1: Tensor | float, scale1: Tensor | float, loc2: Tensor | float, scale2: Tensor | float
) -> Tensor:
    r"""Compute the Kullback-Leibler divergence of two univariate Gaussians, element-wise.

    .. math:: \mathrm{KL}(p_1 \,\|\, p_2)
        = \log\frac{\sigma_2}{\sigma_1} + \frac{\sigma_1^2 + (\mu_1-\mu_2)^2}{2\sigma_2^2} - \frac12

    Equals :func:`normal_negentropy` plus :func:`normal_cross_entropy`, without the cancellation of those two
    where the distributions are close.

    Args:
        loc1: mean μ₁.
        scale1: standard deviation σ₁ > 0.
        loc2: mean μ₂.
        scale2: standard deviation σ₂ > 0. All four broadcast.

    Returns:
        Nats, element-wise, in the broadcast shape.

    Example:
        >>> normal_kl(1.0, 1.0, 0.0, 1.0)
        tensor(0.5000, dtype=torch.float64)
    """
    loc1, scale1, loc2, scale2 = elementwise(loc1=loc1, scale1=scale1, loc2=loc2, scale2=scale2)
    require_positive(scale1=scale1, scale2=scale2)
    excess = ((scale1 - scale2) / scale2) * ((scale1 + scale2) / scale2)  # σ1²/σ2² − 1, exact where σ1 ≈ σ2
    return 0.5 * (_excess_over_log(excess, 2 * (scale1 / scale2).log()) + ((loc1 - loc2) / scale2) ** 2)


def _excess_over_log(w: Tensor, log1p_w: Tensor) -> Tensor:
    """Return w − log(1 + w) ≥ 0, by its power series where the difference would cancel."""
    near = w.abs() < 1e-2
    small = torch.where(near, w, 0.0)  # an overflow in the unused branch would make the gradient 0 · ∞
    series = sum((-small) ** k / k for k in range(2, 10))
    return torch.where(near, series, w - log1p_w)


def standard_normal_kl(loc: Tensor | float, scale: Tensor | float) -> Tensor:
    r"""Compute the Kullback-Leibler divergence from a diagonal Gaussian to the standard normal.

    .. math:: \mathrm{KL}(\mathcal N(g, \mathrm{diag}\, h) \,\|\, \mathcal N(0, I))
        = \tfrac12 \sum_k (h_k + g_k^2 - \log h_k - 1), \qquad h = \mathrm{scale}^2

    Args:
        loc: mean g, (..., K).
        scale: standard deviation √h > 0, broadcast against ``loc``.

    Returns:
        Nats per datum, (...,), summed over the last dimension.

    Source:
        D. P. Kingma, M. Welling (2013), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix B.

    Example:
        >>> standard_normal_kl(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor(2.5000)
    """
    loc, scale = elementwise(loc=loc, scale=scale)
    return normal_kl(loc, scale, 0.0, 1.0).sum(-1)


def multivariate_normal_kl(loc1: Tensor, scale_tril1: Tensor, loc2: Tensor, scale_tril2: Tensor) -> Tensor:
    r"""Compute the Kullback-Leibler divergence of two Gaussians with covariances :math:`\Sigma = L L^\top`.

    .. math:: \mathrm{KL} = \tfrac12 \Big[ \mathrm{tr}(\Sigma_2^{-1}\Sigma_1)
        + (\mu_2-\mu_1)^\top \Sigma_2^{-1} (\mu_2-\mu_1) - K + \log\frac{|\Sigma_2|}{|\Sigma_1|} \Big]

    Args:
        loc1: mean μ₁, (..., K).
        scale_tril1: lower-triangular L₁ with a positive diagonal, (..., K, K).
        loc2: mean μ₂, (..., K).
        scale_tril2: lower-triangular L₂ with a positive diagonal, (..., K, K).

    Returns:
        Nats per datum, (...,).

    Example:
        >>> eye = torch.eye(3)
        >>> multivariate_normal_kl(torch.ones(3), eye, torch.zeros(3), eye)
        tensor(1.5000)
    """
    loc1, scale_tril1, loc2, scale_tril2 = as_tensors(
        loc1=loc1, scale_tril1=scale_tril1, loc2=loc2, scale_tril2=scale_tril2
    )
    require_scale_tril("scale_tril1", scale_tril1)
    require_scale_tril("scale_tril2", scale_tril2)
    K = scale_tril1.shape[-1]
    require_last("loc1", loc1, K)
    require_last("loc2", loc2, K)
    require_last("scale_tril2", scale_tril2, K, K)
    require_broadcast(
        loc1=loc1.shape[:-1],
        scale_tril1=scale_tril1.shape[:-2],
        loc2=loc2.shape[:-1],
        scale_tril2=scale_tril2.shape[:-2],
    )
    # With A = L2⁻¹ L1, lower triangular, tr(Σ2⁻¹Σ1) = ‖A‖² and |Σ1|/|Σ2| = Π a_kk²: the diagonal of A gives K
    # univariate divergences and the entries below it a sum of squares, so no two terms cancel.
    below = torch.linalg.solve_triangular(scale_tril2, scale_tril1, upper=False).tril(-1)
    shift = torch.linalg.solve_triangular(scale_tril2, (loc1 - loc2).unsqueeze(-1), upper=False)
    scale1, scale2 = (factor.diagonal(dim1=-2, dim2=-1) for factor in (scale_tril1, scale_tril2))
    return normal_kl(0.0, scale1, 0.0, scale2).sum(-1) + 0.5 * (
        below.square().sum((-2, -1)) + shift.square().sum((-2, -1))
    )


# Likelihoods ------------------------------------------------------------------------------------------------


def gaussian_reconstruction_loss(x: Tensor, x_hat: Tensor, weight: Tensor | float) -> Tensor:
    r"""Compute the weighted squared error :math:`C \lVert x - \hat x \rVert^2`.

    With C = 1/(2c) this is :func:`gaussian_nll` minus (D/2) log 2πc, with the same gradient in x̂. To learn c,
    use :func:`gaussian_nll`: the omitted constant depends on it.

    Args:
        x: data, (..., D).
        x_hat: reconstruction x̂ = f(z), broadcast against ``x``.
        weight: C > 0; a number, or broadcast against ``x``.

    Returns:
        (...,), summed over the last dimension. Not a log density, so not comparable between values of C.

    Example:
        >>> gaussian_reconstruction_loss(torch.tensor([1.0, 2.0]), torch.zeros(2), 0.5)
        tensor(2.5000)
    """
    x, x_hat, weight = elementwise(x=x, x_hat=x_hat, weight=weight)
    require_positive(weight=weight)
    return (weight * (x - x_hat) ** 2).sum(-1)


def gaussian_nll(x: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
    r"""Compute the negative log density of N(mean, cI), with every constant.

    .. math:: -\log p(x|z) = \frac{1}{2c} \lVert x - f(z) \rVert^2 + \frac D2 \log 2\pi c

    Args:
        x: data, (..., D).
        mean: f(z), broadcast against ``x``.
        variance: c > 0; a number, or broadcast against ``x`` for one variance per output.

    Returns:
        Nats per datum, (...,), summed over the last dimension.

    Example:
        >>> gaussian_nll(torch.zeros(1), torch.zeros(1), 1.0)
        tensor(0.9189)
    """
    x, mean, variance = elementwise(x=x, mean=mean, variance=variance)
    require_positive(variance=variance)
    return 0.5 * ((x - mean) ** 2 / variance + variance.log() + _LOG_2PI).sum(-1)


def bernoulli_nll(x: Tensor, logits: Tensor) -> Tensor:
    r"""Compute the binary cross entropy, the negative log probability of binary data, λ = sigmoid(logits).

    .. math:: -\log p(x|z) = -\sum_d x_d \log \lambda_d + (1-x_d) \log(1-\lambda_d)

    On grey levels x in [0, 1] this is not a normalised density: binarise them, or use
    :func:`continuous_bernoulli_nll`.

    Args:
        x: data in [0, 1], (..., D).
        logits: log λ/(1−λ), finite, broadcast against ``x``.

    Returns:
        Nats per datum, (...,), summed over the last dimension.

    Example:
        >>> bernoulli_nll(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor(1.3863)
    """
    return _cross_entropy(x, logits).sum(-1)


def continuous_bernoulli_log_normaliser(logits: Tensor | float) -> Tensor:
    r"""Compute the log normaliser log C of the continuous Bernoulli.

    .. math:: p(x) = C \lambda^x (1-\lambda)^{1-x}, \qquad
        \log C = \log \frac{2\,\mathrm{artanh}(1-2\lambda)}{1-2\lambda} = \log \frac{\eta}{\tanh(\eta/2)}

    An even function of the logit η, equal to log 2 at η = 0.

    Args:
        logits: η = log λ/(1−λ), any shape.

    Returns:
        Nats, element-wise, in the shape of ``logits``.

    Source:
        G. Loaiza-Ganem, J. P. Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders, arXiv:1907.06845.

    Example:
        >>> continuous_bernoulli_log_normaliser(0.0)
        tensor(0.6931, dtype=torch.float64)
    """
    (logits,) = as_tensors(logits=logits)
    near = logits.abs() < 0.1
    square = torch.where(near, logits, 0.0) ** 2
    series = math.log(2) + square * (
        1 / 12 - square * (7 / 1440 - square * (31 / 90720 - square * 127 / 4838400))
    )
    far = torch.where(near, 1.0, logits)  # avoids 0/0 at η = 0, and cancellation in the gradient near it
    return torch.where(near, series, (far / (far / 2).tanh()).log())


def continuous_bernoulli_nll(x: Tensor, logits: Tensor) -> Tensor:
    r"""Compute the negative log density of the continuous Bernoulli on [0, 1].

    .. math:: -\log p(x) = \sum_d \log\frac{e^{\eta_d} - 1}{\eta_d} - x_d \eta_d

    Equals :func:`bernoulli_nll` minus the sum of :func:`continuous_bernoulli_log_normaliser`.

    Args:
        x: data in [0, 1], (..., D).
        logits: η, finite, broadcast against ``x``.

    Returns:
        Nats per datum, (...,), summed over the last dimension.

    Source:
        G. Loaiza-Ganem, J. P. Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders, arXiv:1907.06845.

    Example:
        >>> continuous_bernoulli_nll(torch.tensor([0.3]), torch.tensor([0.0])).abs() < 1e-6  # uniform
        tensor(True)
    """
    cross_entropy = _cross_entropy(x, logits)
    # The sum of small differences keeps digits that the difference of two large sums would lose.
    return (cross_entropy - continuous_bernoulli_log_normaliser(logits)).sum(-1)


def _cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    x, logits = elementwise(x=x, logits=logits)
    require("x", x, (x >= 0) & (x <= 1), "values in [0, 1]")
    return -(x * logsigmoid(logits) + (1 - x) * logsigmoid(-logits))


# VAE losses -------------------------------------------------------------------------------------------------


def vae_loss(x: Tensor, x_hat: Tensor, loc: Tensor, variance: Tensor, weight: Tensor | float) -> Tensor:
    r"""Compute the usual loss of a Gaussian VAE, without the likelihood's constant.

    .. math:: C \lVert x - \hat x \rVert^2 + \tfrac12 \sum_k (h_k + g_k^2 - \log h_k - 1)

    With C = 1/(2c) this is :func:`negative_elbo` minus (D/2) log 2πc, with the same gradient in the networks.
    To learn c, use :func:`negative_elbo`: the omitted constant depends on it.

    Args:
        x: data, (..., D).
        x_hat: reconstruction x̂ = f(z) from z = g + √h ε, (..., D); several draws are leading dimensions.
        loc: guide's mean g(x), (..., K).
        variance: guide's variance h(x) > 0, (..., K).
        weight: C > 0; a number, or broadcast against ``x``.

    Returns:
        (...,), one value per draw and example.

    Source:
        D. P. Kingma, M. Welling (2013), Auto-Encoding Variational Bayes, arXiv:1312.6114, eq. 10.

    Example:
        >>> x = torch.ones(2, 3)
        >>> vae_loss(x, torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 1), 0.5)
        tensor([1.5000, 1.5000])
    """
    return _with_kl(gaussian_reconstruction_loss(x, x_hat, weight), loc, variance)


def negative_elbo(
    x: Tensor, x_hat: Tensor, loc: Tensor, variance: Tensor, noise_variance: Tensor | float
) -> Tensor:
    r"""Estimate the negative ELBO of a Gaussian VAE from one draw of z, with every constant.

    .. math:: \frac{1}{2c} \lVert x - \hat x \rVert^2 + \frac D2 \log 2\pi c
        + \tfrac12 \sum_k (h_k + g_k^2 - \log h_k - 1)

    Args:
        x: data, (..., D).
        x_hat: reconstruction x̂ = f(z) from z = g + √h ε, (..., D); several draws are leading dimensions.
        loc: guide's mean g(x), (..., K).
        variance: guide's variance h(x) > 0, (..., K).
        noise_variance: c > 0; a number, or broadcast against ``x``.

    Returns:
        Nats, (...,), one value per draw and example. The mean over draws estimates −ELBO.

    Source:
        D. P. Kingma, M. Welling (2013), Auto-Encoding Variational Bayes, arXiv:1312.6114, eq. 10.

    Example:
        >>> x = torch.ones(2, 3)
        >>> negative_elbo(x, torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 1), 1.0)
        tensor([4.2568, 4.2568])
    """
    x, x_hat, noise_variance = elementwise(x=x, x_hat=x_hat, noise_variance=noise_variance)
    require_positive(noise_variance=noise_variance)
    return _with_kl(gaussian_nll(x, x_hat, noise_variance), loc, variance)


def _with_kl(reconstruction: Tensor, loc: Tensor, variance: Tensor) -> Tensor:
    """Add the KL ½ Σ (h + g² − log h − 1), computed from h: through √h, h − 1 would lose half its digits."""
    loc, variance = elementwise(loc=loc, variance=variance)
    require_positive(variance=variance)
    kl = 0.5 * (_excess_over_log(variance - 1, variance.log()) + loc**2).sum(-1)
    require_broadcast(**{"x and x_hat": reconstruction.shape, "loc and variance": kl.shape})
    return reconstruction + kl


def naive_log_evidence(log_likelihood: Tensor) -> Tensor:
    r"""Estimate the log-evidence naively, from draws z_s of the prior.

    .. math:: \log p(x) \approx \log \frac1S \sum_s p(x|z_s)

    The estimate is consistent, and too low on average (Jensen). The S it needs grows exponentially with the
    latent dimension: see :meth:`LinearGaussian.log_naive_sample_size`.

    Args:
        log_likelihood: log p(x|z_s) of S ≥ 1 draws from the prior, (S, ...).

    Returns:
        Nats per datum, (...,).

    Example:
        >>> naive_log_evidence(torch.tensor([0.25, 0.75]).log()).exp()
        tensor(0.5000)
    """
    (log_likelihood,) = as_tensors(log_likelihood=log_likelihood)
    if log_likelihood.ndim == 0 or len(log_likelihood) == 0:
        raise ValueError(
            f"log_likelihood: expected shape (S, ...) with S ≥ 1, found {tuple(log_likelihood.shape)}"
        )
    return log_likelihood.logsumexp(0) - math.log(len(log_likelihood))
