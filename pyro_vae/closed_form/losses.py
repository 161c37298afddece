"""Kullback-Leibler divergences, likelihoods and the whole loss, each derived by hand.

Notation and conventions are those of :mod:`pyro_vae.closed_form`; ``docs/derivation.md`` has the derivations.
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
    r"""Negative entropy of a univariate Gaussian: :math:`\int p \log p = -\tfrac12 (\log 2\pi\sigma^2 + 1)`.

    Args:
        scale: standard deviation σ > 0, any shape.

    Returns:
        Nats, element by element, in the shape of ``scale``.

    Raises:
        ValueError: ``scale`` is not positive and finite.
        TypeError: ``scale`` is not floating-point.

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
    r"""Cross entropy of two univariate Gaussians.

    .. math:: -\int p_1 \log p_2
        = \tfrac12 \log 2\pi\sigma_2^2 + \frac{\sigma_1^2 + (\mu_1-\mu_2)^2}{2\sigma_2^2}

    Args:
        loc1: mean μ₁ of the distribution that is averaged over.
        scale1: its standard deviation σ₁ > 0.
        loc2: mean μ₂ of the distribution that is scored.
        scale2: its standard deviation σ₂ > 0. All four broadcast.

    Returns:
        Nats, element by element, in the broadcast shape.

    Raises:
        ValueError: a scale is not positive, a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

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
    r"""Kullback-Leibler divergence of two univariate Gaussians, element by element.

    .. math:: \mathrm{KL}(p_1 \,\|\, p_2)
        = \log\frac{\sigma_2}{\sigma_1} + \frac{\sigma_1^2 + (\mu_1-\mu_2)^2}{2\sigma_2^2} - \frac12

    It is :func:`normal_negentropy` plus :func:`normal_cross_entropy`, written so that nothing cancels where
    the two distributions are close.

    Args:
        loc1: mean μ₁.
        scale1: standard deviation σ₁ > 0.
        loc2: mean μ₂.
        scale2: standard deviation σ₂ > 0. All four broadcast.

    Returns:
        Nats, element by element, in the broadcast shape.

    Raises:
        ValueError: a scale is not positive, a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

    Example:
        >>> normal_kl(1.0, 1.0, 0.0, 1.0)
        tensor(0.5000, dtype=torch.float64)
    """
    loc1, scale1, loc2, scale2 = elementwise(loc1=loc1, scale1=scale1, loc2=loc2, scale2=scale2)
    require_positive(scale1=scale1, scale2=scale2)
    excess = ((scale1 - scale2) / scale2) * ((scale1 + scale2) / scale2)  # σ1²/σ2² − 1, exact where σ1 ≈ σ2
    return 0.5 * (_excess_over_log(excess, 2 * (scale1 / scale2).log()) + ((loc1 - loc2) / scale2) ** 2)


def _excess_over_log(w: Tensor, log1p_w: Tensor) -> Tensor:
    """Returns w − log(1 + w) ≥ 0, by its power series where the difference would cancel."""
    near = w.abs() < 1e-2
    small = torch.where(
        near, w, 0.0
    )  # else the power that is not chosen overflows, and 0 · ∞ spoils the gradient
    series = sum((-small) ** k / k for k in range(2, 10))
    return torch.where(near, series, w - log1p_w)


def standard_normal_kl(loc: Tensor | float, scale: Tensor | float) -> Tensor:
    r"""Kullback-Leibler divergence from a diagonal Gaussian to the standard normal.

    .. math:: \mathrm{KL}(\mathcal N(g, \mathrm{diag}\, h) \,\|\, \mathcal N(0, I))
        = \tfrac12 \sum_k (h_k + g_k^2 - \log h_k - 1), \qquad h = \mathrm{scale}^2

    Args:
        loc: mean g, (..., K).
        scale: standard deviation √h > 0, broadcasting against ``loc``.

    Returns:
        Nats per datum, (...,): summed over the last dimension.

    Raises:
        ValueError: ``scale`` is not positive, a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

    Source:
        D. P. Kingma, M. Welling (2013), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix B.

    Example:
        >>> standard_normal_kl(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor(2.5000)
    """
    loc, scale = elementwise(loc=loc, scale=scale)
    return normal_kl(loc, scale, 0.0, 1.0).sum(-1)


def multivariate_normal_kl(loc1: Tensor, scale_tril1: Tensor, loc2: Tensor, scale_tril2: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of two Gaussians given by Cholesky factors, :math:`\Sigma = L L^\top`.

    .. math:: \mathrm{KL} = \tfrac12 \Big[ \mathrm{tr}(\Sigma_2^{-1}\Sigma_1)
        + (\mu_2-\mu_1)^\top \Sigma_2^{-1} (\mu_2-\mu_1) - K + \log\frac{|\Sigma_2|}{|\Sigma_1|} \Big]

    Args:
        loc1: mean μ₁, (..., K).
        scale_tril1: lower-triangular L₁ with a positive diagonal, (..., K, K).
        loc2: mean μ₂, (..., K).
        scale_tril2: lower-triangular L₂ with a positive diagonal, (..., K, K).

    Returns:
        Nats per datum, (...,).

    Raises:
        ValueError: a factor is not lower triangular with a positive diagonal, a value is not finite, or the
            shapes do not fit.
        TypeError: an argument is not floating-point.

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
    # With A = L2⁻¹ L1, lower triangular, tr(Σ2⁻¹Σ1) = ‖A‖² and |Σ1|/|Σ2| = Π a_kk²: the diagonal of A makes
    # K univariate divergences, everything below it is a sum of squares, and no two terms cancel.
    below = torch.linalg.solve_triangular(scale_tril2, scale_tril1, upper=False).tril(-1)
    shift = torch.linalg.solve_triangular(scale_tril2, (loc1 - loc2).unsqueeze(-1), upper=False)
    scale1, scale2 = (factor.diagonal(dim1=-2, dim2=-1) for factor in (scale_tril1, scale_tril2))
    return normal_kl(0.0, scale1, 0.0, scale2).sum(-1) + 0.5 * (
        below.square().sum((-2, -1)) + shift.square().sum((-2, -1))
    )


# Likelihoods ------------------------------------------------------------------------------------------------


def gaussian_reconstruction_loss(x: Tensor, x_hat: Tensor, weight: Tensor | float) -> Tensor:
    r"""Weighted squared error :math:`C \lVert x - \hat x \rVert^2`: a Gaussian's nll without its constant.

    With C = 1/(2c) it is :func:`gaussian_nll` less (D/2) log 2πc, so it has the same gradient in x̂, but
    only while c is fixed: to learn c, use :func:`gaussian_nll`.

    Args:
        x: data, (..., D).
        x_hat: reconstruction x̂ = f(z), broadcasting against ``x``.
        weight: C > 0; a number, or broadcasting against ``x``.

    Returns:
        (...,): summed over the last dimension. Not a log density, so not comparable between different C.

    Raises:
        ValueError: ``weight`` is not positive, a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

    Example:
        >>> gaussian_reconstruction_loss(torch.tensor([1.0, 2.0]), torch.zeros(2), 0.5)
        tensor(2.5000)
    """
    x, x_hat, weight = elementwise(x=x, x_hat=x_hat, weight=weight)
    require_positive(weight=weight)
    return (weight * (x - x_hat) ** 2).sum(-1)


def gaussian_nll(x: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
    r"""Negative log density of N(mean, cI), every constant kept.

    .. math:: -\log p(x|z) = \frac{1}{2c} \lVert x - f(z) \rVert^2 + \frac D2 \log 2\pi c

    Args:
        x: data, (..., D).
        mean: f(z), broadcasting against ``x``.
        variance: c > 0; a number, or broadcasting against ``x`` for one variance per output.

    Returns:
        Nats per datum, (...,): summed over the last dimension.

    Raises:
        ValueError: ``variance`` is not positive, a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

    Example:
        >>> gaussian_nll(torch.zeros(1), torch.zeros(1), 1.0)
        tensor(0.9189)
    """
    x, mean, variance = elementwise(x=x, mean=mean, variance=variance)
    require_positive(variance=variance)
    return 0.5 * ((x - mean) ** 2 / variance + variance.log() + _LOG_2PI).sum(-1)


def bernoulli_nll(x: Tensor, logits: Tensor) -> Tensor:
    r"""Negative log probability of binary data, the binary cross entropy, with λ = sigmoid(logits).

    .. math:: -\log p(x|z) = -\sum_d x_d \log \lambda_d + (1-x_d) \log(1-\lambda_d)

    On grey levels x in [0, 1] it is no normalised density: those need :func:`continuous_bernoulli_nll`, or
    must be made binary.

    Args:
        x: data in [0, 1], (..., D).
        logits: log λ/(1−λ), finite, broadcasting against ``x``.

    Returns:
        Nats per datum, (...,): summed over the last dimension.

    Raises:
        ValueError: ``x`` leaves [0, 1], a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

    Example:
        >>> bernoulli_nll(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor(1.3863)
    """
    return _cross_entropy(x, logits).sum(-1)


def continuous_bernoulli_log_normaliser(logits: Tensor | float) -> Tensor:
    r"""Log normaliser log C of the continuous Bernoulli :math:`p(x) = C \lambda^x (1-\lambda)^{1-x}`.

    .. math:: \log C = \log \frac{2\,\mathrm{artanh}(1-2\lambda)}{1-2\lambda}
        = \log \frac{\eta}{\tanh(\eta/2)}

    It is an even function of the logit η, and log 2 at η = 0.

    Args:
        logits: η = log λ/(1−λ), any shape.

    Returns:
        Nats, element by element, in the shape of ``logits``.

    Raises:
        ValueError: ``logits`` are not finite.
        TypeError: ``logits`` are not floating-point.

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
    far = torch.where(near, 1.0, logits)  # else 0/0 at η = 0, and 1/η − 1/sinh η cancels in the gradient
    return torch.where(near, series, (far / (far / 2).tanh()).log())


def continuous_bernoulli_nll(x: Tensor, logits: Tensor) -> Tensor:
    r"""Negative log density of the continuous Bernoulli on [0, 1].

    .. math:: -\log p(x) = \sum_d \log\frac{e^{\eta_d} - 1}{\eta_d} - x_d \eta_d

    which is :func:`bernoulli_nll` less the sum of :func:`continuous_bernoulli_log_normaliser`.

    Args:
        x: data in [0, 1], (..., D).
        logits: η, finite, broadcasting against ``x``.

    Returns:
        Nats per datum, (...,): summed over the last dimension.

    Raises:
        ValueError: ``x`` leaves [0, 1], a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

    Source:
        G. Loaiza-Ganem, J. P. Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders, arXiv:1907.06845.

    Example:
        >>> continuous_bernoulli_nll(torch.tensor([0.3]), torch.tensor([0.0])).abs() < 1e-6  # uniform
        tensor(True)
    """
    cross_entropy = _cross_entropy(x, logits)
    # one sum of the small differences: the difference of two large sums loses digits
    return (cross_entropy - continuous_bernoulli_log_normaliser(logits)).sum(-1)


def _cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    x, logits = elementwise(x=x, logits=logits)
    require("x", x, (x >= 0) & (x <= 1), "values in [0, 1]")
    return -(x * logsigmoid(logits) + (1 - x) * logsigmoid(-logits))


# The whole loss ---------------------------------------------------------------------------------------------


def vae_loss(x: Tensor, x_hat: Tensor, loc: Tensor, variance: Tensor, weight: Tensor | float) -> Tensor:
    r"""The loss of a Gaussian VAE as it is usually written, without the likelihood's constant.

    .. math:: C \lVert x - \hat x \rVert^2 + \tfrac12 \sum_k (h_k + g_k^2 - \log h_k - 1)

    With C = 1/(2c) it is :func:`negative_elbo` less (D/2) log 2πc. It has the same gradient in the networks
    while c is fixed; a learned c needs :func:`negative_elbo`.

    Args:
        x: data, (..., D).
        x_hat: reconstruction x̂ = f(z) from one draw z = g + √h ε, (..., D). More draws go on the left.
        loc: guide's mean g(x), (..., K).
        variance: guide's variance h(x) > 0, (..., K).
        weight: C > 0; a number, or broadcasting against ``x``.

    Returns:
        (...,), one value per draw and datum.

    Raises:
        ValueError: ``variance`` or ``weight`` is not positive, a value is not finite, or the shapes do not
            broadcast.
        TypeError: an argument is not floating-point.

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
    r"""The negative ELBO of a Gaussian VAE by one draw of z, every constant kept.

    .. math:: \frac{1}{2c} \lVert x - \hat x \rVert^2 + \frac D2 \log 2\pi c
        + \tfrac12 \sum_k (h_k + g_k^2 - \log h_k - 1)

    Args:
        x: data, (..., D).
        x_hat: reconstruction x̂ = f(z) from one draw z = g + √h ε, (..., D). More draws go on the left.
        loc: guide's mean g(x), (..., K).
        variance: guide's variance h(x) > 0, (..., K).
        noise_variance: c > 0; a number, or broadcasting against ``x``.

    Returns:
        Nats, (...,), one value per draw and datum, whose mean over draws is −ELBO.

    Raises:
        ValueError: a variance is not positive, a value is not finite, or the shapes do not broadcast.
        TypeError: an argument is not floating-point.

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
    """Adds ½ Σ (h + g² − log h − 1), in the variance h itself: √h would lose half the digits of h − 1."""
    loc, variance = elementwise(loc=loc, variance=variance)
    require_positive(variance=variance)
    kl = 0.5 * (_excess_over_log(variance - 1, variance.log()) + loc**2).sum(-1)
    require_broadcast(**{"x and x_hat": reconstruction.shape, "loc and variance": kl.shape})
    return reconstruction + kl


def naive_log_evidence(log_likelihood: Tensor) -> Tensor:
    r"""Naive Monte Carlo estimate of the evidence, from draws z_s of the prior.

    .. math:: \log p(x) \approx \log \frac1S \sum_s p(x|z_s)

    It is right in the limit, and low on average before it (Jensen). The S it needs grows exponentially with
    the latent dimension; :meth:`LinearGaussian.log_naive_sample_size` says how fast.

    Args:
        log_likelihood: log p(x|z_s) of S draws from the prior, (S, ...).

    Returns:
        Nats per datum, (...,).

    Raises:
        ValueError: there are no draws, or a value is not finite.
        TypeError: ``log_likelihood`` is not floating-point.

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
