r"""Losses derived by hand, and models whose evidence, posterior and ELBO are known exactly.

This file judges the rest of the library, so it stands on torch's arithmetic alone: it uses neither Pyro,
nor ``torch.distributions``, nor any other file of the package. ``docs/derivation.md`` derives every formula.

Notation: data x in R^D, latents z in R^K, prior p(z), likelihood p(x|z) ("decoder"), guide q(z|x)
("encoder"), evidence p(x) = ∫ p(x|z) p(z) dz, posterior p(z|x). Logarithms are natural, results in nats.

Every function is batched (dimensions on the left broadcast), differentiable, and takes float32 or float64
tensors; a Python number may stand for a tensor and takes the type of the tensors beside it. An argument
which is not floating-point raises a ``TypeError``; one which is not finite, not positive or positive definite
where it must be, or which does not broadcast, raises a ``ValueError``. Either names the argument.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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

_LOG_2PI = math.log(2 * math.pi)


# Checks -----------------------------------------------------------------------------------------------------


def _tensors(**arguments: Tensor | float) -> list[Tensor]:
    """Returns the arguments as finite floating-point tensors, numbers in the type of their neighbours."""
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Tensor | float | int):
            raise TypeError(f"{name}: expected a torch.Tensor or a number, found {type(value).__name__}")
        if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: expected float32 or float64, found {value.dtype}; convert it by .double()"
            )
    dtype = max((tensor.dtype for tensor in given), key=lambda dtype: dtype.itemsize, default=torch.float64)
    device = given[0].device if given else None
    tensors = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device=device)
        for value in arguments.values()
    ]
    for name, tensor in zip(arguments, tensors, strict=True):
        _require(name, tensor, torch.isfinite(tensor), "finite values")
    return tensors


def _elementwise(**arguments: Tensor | float) -> list[Tensor]:
    """Returns the arguments as tensors which broadcast against each other."""
    tensors = _tensors(**arguments)
    _require_broadcast(**{name: tensor.shape for name, tensor in zip(arguments, tensors, strict=True)})
    return tensors


def _require(name: str, tensor: Tensor, holds: Tensor, expected: str) -> None:
    """Raises a ValueError which names the first entry of the tensor where ``holds`` is false."""
    if not holds.all():
        where = tuple((~holds).nonzero()[0].tolist())
        at = f" at index {where}" if where else ""
        raise ValueError(f"{name}: expected {expected}, found {tensor.detach()[where].item():.6g}{at}")


def _require_positive(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _require(name, tensor, tensor > 0, "positive values")


def _require_distribution(name: str, probabilities: Tensor) -> None:
    _require(name, probabilities, probabilities >= 0, "probabilities of at least zero")
    total = probabilities.detach().sum(-1)
    _require(name, total, (total - 1).abs() <= _rounding(total), "probabilities which sum to one")


def _require_broadcast(**shapes: torch.Size) -> None:
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected shapes that broadcast, found {listed}") from None


def _require_last(name: str, tensor: Tensor, *sizes: int) -> None:
    """Raises a ValueError unless the last dimensions have these sizes: here nothing may broadcast."""
    if tensor.shape[-len(sizes) :] != sizes:
        expected = ", ".join(str(size) for size in sizes)
        raise ValueError(f"{name}: expected shape (..., {expected}), found {tuple(tensor.shape)}")


def _require_square(name: str, matrices: Tensor) -> None:
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name}: expected shape (..., K, K), found {tuple(matrices.shape)}")


def _require_scale_tril(name: str, factor: Tensor) -> None:
    _require_square(name, factor)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    _require(name, factor, factor.triu(1) == 0, "a Cholesky factor, which is zero above its diagonal")
    _require(name, diagonal, diagonal > 0, "a Cholesky factor, whose diagonal is positive")


def _cholesky(name: str, covariance: Tensor) -> Tensor:
    """Returns L, lower triangular, with L Lᵀ = covariance."""
    _require_square(name, covariance)
    size = covariance.detach().abs().amax((-2, -1), keepdim=True)
    symmetric = (covariance - covariance.mT).abs() <= _rounding(covariance) * size
    _require(name, covariance, symmetric, "symmetric matrices")
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info.any():
        smallest = torch.linalg.eigvalsh(covariance.detach()).min().item()
        raise ValueError(
            f"{name}: expected positive definite matrices, found an eigenvalue of {smallest:.3g}"
        )
    return factor


def _rounding(tensor: Tensor) -> float:
    """What rounding may amount to, relatively, in a value that was computed elsewhere."""
    return math.sqrt(torch.finfo(tensor.dtype).eps)


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
    (scale,) = _tensors(scale=scale)
    _require_positive(scale=scale)
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
    loc1, scale1, loc2, scale2 = _elementwise(loc1=loc1, scale1=scale1, loc2=loc2, scale2=scale2)
    _require_positive(scale1=scale1, scale2=scale2)
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
    loc1, scale1, loc2, scale2 = _elementwise(loc1=loc1, scale1=scale1, loc2=loc2, scale2=scale2)
    _require_positive(scale1=scale1, scale2=scale2)
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
    loc, scale = _elementwise(loc=loc, scale=scale)
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
    loc1, scale_tril1, loc2, scale_tril2 = _tensors(
        loc1=loc1, scale_tril1=scale_tril1, loc2=loc2, scale_tril2=scale_tril2
    )
    _require_scale_tril("scale_tril1", scale_tril1)
    _require_scale_tril("scale_tril2", scale_tril2)
    K = scale_tril1.shape[-1]
    _require_last("loc1", loc1, K)
    _require_last("loc2", loc2, K)
    _require_last("scale_tril2", scale_tril2, K, K)
    _require_broadcast(
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
    x, x_hat, weight = _elementwise(x=x, x_hat=x_hat, weight=weight)
    _require_positive(weight=weight)
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
    x, mean, variance = _elementwise(x=x, mean=mean, variance=variance)
    _require_positive(variance=variance)
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
    (logits,) = _tensors(logits=logits)
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
    x, logits = _elementwise(x=x, logits=logits)
    _require("x", x, (x >= 0) & (x <= 1), "values in [0, 1]")
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
    x, x_hat, noise_variance = _elementwise(x=x, x_hat=x_hat, noise_variance=noise_variance)
    _require_positive(noise_variance=noise_variance)
    return _with_kl(gaussian_nll(x, x_hat, noise_variance), loc, variance)


def _with_kl(reconstruction: Tensor, loc: Tensor, variance: Tensor) -> Tensor:
    """Adds ½ Σ (h + g² − log h − 1), in the variance h itself: √h would lose half the digits of h − 1."""
    loc, variance = _elementwise(loc=loc, variance=variance)
    _require_positive(variance=variance)
    kl = 0.5 * (_excess_over_log(variance - 1, variance.log()) + loc**2).sum(-1)
    _require_broadcast(**{"x and x_hat": reconstruction.shape, "loc and variance": kl.shape})
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
    (log_likelihood,) = _tensors(log_likelihood=log_likelihood)
    if log_likelihood.ndim == 0 or len(log_likelihood) == 0:
        raise ValueError(
            f"log_likelihood: expected shape (S, ...) with S ≥ 1, found {tuple(log_likelihood.shape)}"
        )
    return log_likelihood.logsumexp(0) - math.log(len(log_likelihood))


# Exactly solved models --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class MultivariateNormal:
    """A batch of Gaussians N(loc, L Lᵀ): the names of ``torch.distributions``, by arithmetic of its own.

    Attributes:
        loc: mean, (..., K).
        scale_tril: lower-triangular Cholesky factor L with a positive diagonal, (..., K, K).

    Example:
        >>> MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    loc: Tensor
    scale_tril: Tensor

    def __post_init__(self) -> None:
        loc, scale_tril = _tensors(loc=self.loc, scale_tril=self.scale_tril)
        _require_scale_tril("scale_tril", scale_tril)
        _require_last("loc", loc, scale_tril.shape[-1])
        _require_broadcast(loc=loc.shape[:-1], scale_tril=scale_tril.shape[:-2])

    @property
    def mean(self) -> Tensor:
        """Mean, (..., K)."""
        return self.loc

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance L Lᵀ, (..., K, K)."""
        return self.scale_tril @ self.scale_tril.mT

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (..., K), in nats, (...,)."""
        (z,) = _tensors(z=z)
        K = self.loc.shape[-1]
        _require_last("z", z, K)
        _require_broadcast(z=z.shape[:-1], loc=self.loc.shape[:-1], scale_tril=self.scale_tril.shape[:-2])
        white = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).unsqueeze(-1), upper=False)
        return -0.5 * (white.square().sum((-2, -1)) + K * _LOG_2PI) - self._log_volume()

    def entropy(self) -> Tensor:
        """Entropy ½ log |2πe Σ|, in nats, (...,)."""
        batch_shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale_tril.shape[:-2])
        return 0.5 * self.loc.shape[-1] * (_LOG_2PI + 1) + self._log_volume().expand(batch_shape)

    def _log_volume(self) -> Tensor:
        """Half the log determinant of the covariance."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True, eq=False)
class ElboGradient:
    """Exact gradient of each datum's ELBO in the parameters of the model and of its guide.

    Attributes:
        W: (..., D, K).
        b: (..., D).
        noise_variance: (...,).
        loc: (..., K).
        covariance: (..., K, K), every entry taken as a free variable.
    """

    W: Tensor
    b: Tensor
    noise_variance: Tensor
    loc: Tensor
    covariance: Tensor


class LinearGaussian:
    r"""The linear-Gaussian model (probabilistic PCA): evidence, posterior, ELBO and gradients are known.

    .. math:: z \sim \mathcal N(0, I), \qquad x \,|\, z \sim \mathcal N(Wz + b, cI)

    so that, with :math:`M = W^\top W + cI`,

    .. math:: x \sim \mathcal N(b, WW^\top + cI), \qquad
        z \,|\, x \sim \mathcal N(M^{-1} W^\top (x - b), cM^{-1}).

    Nothing of size D × D is formed. In every method x is (..., D), a Gaussian guide q(z|x) is given by its
    mean ``loc`` (..., K) and its ``covariance`` (..., K, K), and results are in nats per datum, (...,).

    Args:
        W: loadings, (D, K).
        b: offset, (D,).
        noise_variance: c > 0, a number or a tensor of shape ().

    Raises:
        ValueError: a shape does not fit, a value is not finite, ``noise_variance`` is not positive, or a
            covariance is not symmetric and positive definite.
        TypeError: an argument is not floating-point.

    Source:
        M. E. Tipping, C. M. Bishop (1999), Probabilistic principal component analysis, JRSS B 61(3).

    Example:
        >>> model = LinearGaussian(torch.tensor([[3.0], [4.0]]), torch.zeros(2), 1.0)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> model.log_evidence(x)
        tensor([-3.9477, -3.4669])
        >>> q = model.posterior(x)
        >>> torch.allclose(model.elbo(x, q.loc, q.covariance_matrix), model.log_evidence(x))
        True
    """

    def __init__(self, W: Tensor, b: Tensor, noise_variance: Tensor | float) -> None:
        W, b, noise_variance = _tensors(W=W, b=b, noise_variance=noise_variance)
        if W.ndim != 2 or 0 in W.shape:
            raise ValueError(f"W: expected shape (D, K) with D, K ≥ 1, found {tuple(W.shape)}")
        if b.shape != W.shape[:1]:
            raise ValueError(
                f"b: expected shape ({len(W)},) beside W {tuple(W.shape)}, found {tuple(b.shape)}"
            )
        if noise_variance.ndim:
            raise ValueError(f"noise_variance: expected one value, found shape {tuple(noise_variance.shape)}")
        _require_positive(noise_variance=noise_variance)
        self.W, self.b, self.noise_variance = W, b, noise_variance

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent_dim: int) -> "LinearGaussian":
        r"""The model with the largest mean log-evidence of data x (N, D), among those of K = ``latent_dim``.

        With λ and v the eigenvalues and eigenvectors of the data's covariance, the largest first: c is the
        mean of the D − K smallest λ, and the k-th column of W is :math:`\sqrt{\lambda_k - c}\, v_k`. These
        columns are orthogonal, so a diagonal guide leaves no gap, and a linear VAE can reach this value.

        Raises:
            ValueError: ``latent_dim`` is not below N and D, or the data vary in no more than K directions.

        Source:
            M. E. Tipping, C. M. Bishop (1999), as above; J. Lucas, G. Tucker, R. Grosse, M. Norouzi (2019),
            Don't blame the ELBO! A linear VAE perspective on posterior collapse, arXiv:1911.02469.
        """
        (x,) = _tensors(x=x)
        if x.ndim != 2 or not 1 <= latent_dim < min(x.shape):
            raise ValueError(
                f"latent_dim: expected 1 ≤ latent_dim < min(N, D) for x (N, D), "
                f"found {latent_dim} for {tuple(x.shape)}"
            )
        b = x.mean(0)
        _, singular, directions = torch.linalg.svd(x - b, full_matrices=False)
        variances = singular**2 / len(x)  # along the directions, which are the rows
        noise_variance = variances[latent_dim:].sum() / (x.shape[1] - latent_dim)
        if noise_variance <= _rounding(x) ** 2 * variances[0]:
            raise ValueError(
                f"x: expected data which vary in more than {latent_dim} directions, found no more"
            )
        loadings = (variances[:latent_dim] - noise_variance).sqrt()
        return cls(directions[:latent_dim].mT * loadings, b, noise_variance)

    # The model

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws x (num_samples, D), through z; without a generator, from torch's global one."""

        def noise(size: int) -> Tensor:
            return torch.randn(
                num_samples, size, generator=generator, dtype=self.W.dtype, device=self.W.device
            )

        D, K = self.W.shape
        return noise(K) @ self.W.mT + self.b + self.noise_variance.sqrt() * noise(D)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log density log p(x|z) at z (..., K)."""
        self._check(x=x, z=z)
        return -gaussian_nll(x, z @ self.W.mT + self.b, self.noise_variance)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log density log p(x, z) = log p(x|z) + log p(z) at z (..., K)."""
        return self.log_likelihood(x, z) - gaussian_nll(z, torch.zeros_like(z), 1.0)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), the log density of N(b, WWᵀ + cI).

        By Bayes' rule it is log p(x, z) − log p(z|x) at any z. At the posterior's mean nothing cancels, and
        there is no D × D matrix to factorise.
        """
        posterior = self.posterior(x)
        return self.log_joint(x, posterior.loc) - posterior.log_prob(posterior.loc)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """Exact posterior p(z|x) = N(M⁻¹Wᵀ(x − b), cM⁻¹), with batch shape (...,)."""
        self._check(x=x)
        factor = self._posterior_factor()
        loc = (x - self.b) @ self.W @ factor @ factor.mT / self.noise_variance
        return MultivariateNormal(loc, factor.expand(*loc.shape[:-1], -1, -1))

    # The ELBO of any Gaussian guide, in three equal forms

    def elbo(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Exact ELBO, as reconstruction and KL to the prior: E_q[log p(x|z)] − KL(q ‖ p(z))."""
        factor = self._check_guide(x, loc, covariance)
        kl = multivariate_normal_kl(loc, factor, torch.zeros_like(loc), self._identity())
        return self.expected_log_likelihood(x, loc, covariance) - kl

    def elbo_by_entropy(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Exact ELBO, as joint and entropy: E_q[log p(x, z)] + H[q]."""
        factor = self._check_guide(x, loc, covariance)
        second_moment = loc.square().sum(-1) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        expected_log_prior = -0.5 * (second_moment + loc.shape[-1] * _LOG_2PI)
        entropy = MultivariateNormal(loc, factor).entropy()
        return self.expected_log_likelihood(x, loc, covariance) + expected_log_prior + entropy

    def elbo_by_gap(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Exact ELBO, as evidence and gap: log p(x) − KL(q ‖ p(z|x))."""
        return self.log_evidence(x) - self.gap(x, loc, covariance)

    def expected_log_likelihood(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Exact E_q[log p(x|z)], by E_q‖x − Wz − b‖² = ‖x − Wμ − b‖² + tr(WᵀW Σ)."""
        self._check_guide(x, loc, covariance)
        spread = (self.W.mT @ self.W * covariance).sum((-2, -1))
        return self.log_likelihood(x, loc) - spread / (2 * self.noise_variance)

    def gap(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """What the guide loses: log p(x) − ELBO = KL(q ‖ p(z|x)) ≥ 0."""
        factor = self._check_guide(x, loc, covariance)
        posterior = self.posterior(x)
        return multivariate_normal_kl(loc, factor, posterior.loc, posterior.scale_tril)

    def elbo_gradient(self, x: Tensor, loc: Tensor, covariance: Tensor) -> ElboGradient:
        """Exact gradient of the ELBO, by hand; at the exact posterior, in W, b and c, that of log p(x)."""
        factor = self._check_guide(x, loc, covariance)
        batch_shape = torch.broadcast_shapes(x.shape[:-1], loc.shape[:-1], covariance.shape[:-2])
        loc = loc.expand(*batch_shape, -1)
        precision = torch.cholesky_inverse(factor).expand(*batch_shape, -1, -1)
        W, c = self.W, self.noise_variance
        residual = x - loc @ W.mT - self.b
        squared_error = residual.square().sum(-1) + (W.mT @ W * covariance).sum((-2, -1))
        return ElboGradient(
            W=(residual.unsqueeze(-1) * loc.unsqueeze(-2) - W @ covariance) / c,
            b=residual / c,
            noise_variance=(squared_error / c - len(W)) / (2 * c),
            loc=residual @ W / c - loc,
            covariance=0.5 * (precision - self._posterior_precision()),
        )

    # What a diagonal guide cannot reach

    def best_diagonal_guide(self, x: Tensor) -> MultivariateNormal:
        """The best guide of independent dimensions: the posterior's mean, with variances c / M_kk."""
        loc = self.posterior(x).loc
        scale = self._posterior_precision().diagonal().rsqrt()
        return MultivariateNormal(loc, scale.diag().expand(*loc.shape[:-1], -1, -1))

    def diagonal_gap(self) -> Tensor:
        """The gap the best diagonal guide leaves, ½ (Σ log M_kk − log |M|) ≥ 0, alike at all x: shape ()."""
        log_volume = self._posterior_factor().diagonal().log().sum()  # ½ log |cM⁻¹|
        return 0.5 * self._posterior_precision().diagonal().log().sum() + log_volume

    # What drawing from the prior costs

    def log_naive_sample_size(self, x: Tensor) -> Tensor:
        r"""Log of the number S of draws with which the naive estimate of p(x) has a relative error of one.

        :math:`S = E[p(x|z)^2] / p(x)^2 - 1` over the prior, exact because :math:`\mathcal N(x; m, cI)^2 =
        (4\pi c)^{-D/2} \mathcal N(x; m, \tfrac c2 I)`. For a relative standard error of r,
        :func:`naive_log_evidence` takes S / r² draws. Where W = 0 every draw is right, and the result is −∞.
        """
        sharper = LinearGaussian(self.W, self.b, self.noise_variance / 2)
        log_factor = -0.5 * len(self.W) * (4 * math.pi * self.noise_variance).log()
        log_ratio = (log_factor + sharper.log_evidence(x) - 2 * self.log_evidence(x)).clamp(min=0)
        return log_ratio + (-torch.expm1(-log_ratio)).log()

    # Parts

    def _identity(self) -> Tensor:
        return torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device)

    def _posterior_precision(self) -> Tensor:
        """M / c, (K, K)."""
        return self._identity() + self.W.mT @ self.W / self.noise_variance

    def _posterior_factor(self) -> Tensor:
        """The lower Cholesky factor of the posterior covariance cM⁻¹, (K, K)."""
        # Let the precision be U Uᵀ with U upper triangular: a Cholesky factor, rows and columns reversed.
        # Then U⁻ᵀ is lower triangular, and it factorises the inverse.
        precision = self._posterior_precision()
        reverse, info = torch.linalg.cholesky_ex(precision.flip(-2, -1))
        # Every eigenvalue is at least 1, which rounding may bury under the largest.
        lost = torch.finfo(precision.dtype).eps * precision.diagonal().max() / reverse.diagonal().min() ** 2
        if info or lost > _rounding(precision):
            raise ValueError(
                f"noise_variance: {self.noise_variance.item():.3g} is too small beside W in {self.W.dtype}: "
                "half the digits of the posterior are lost; use float64, or a W with independent columns"
            )
        return torch.linalg.solve_triangular(reverse.flip(-2, -1).mT, self._identity(), upper=False)

    def _check(self, *, x: Tensor, **latents: Tensor) -> None:
        """Raises an error unless x is (..., D), every latent is (..., K), and they broadcast."""
        _tensors(x=x, **latents)
        D, K = self.W.shape
        _require_last("x", x, D)
        for name, latent in latents.items():
            _require_last(name, latent, K)
        _require_broadcast(x=x.shape[:-1], **{name: latent.shape[:-1] for name, latent in latents.items()})

    def _check_guide(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Checks a guide against the data and returns its covariance's Cholesky factor."""
        self._check(x=x, loc=loc)
        _tensors(covariance=covariance)
        _require_last("covariance", covariance, self.W.shape[1], self.W.shape[1])
        _require_broadcast(x=x.shape[:-1], loc=loc.shape[:-1], covariance=covariance.shape[:-2])
        return _cholesky("covariance", covariance)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""A mixture of Gaussians: one categorical latent, so evidence and posterior are finite sums.

    .. math:: p(x) = \sum_c \pi_c \, \mathcal N(x; \mu_c, \Sigma_c), \qquad
        p(c|x) = \pi_c \, \mathcal N(x; \mu_c, \Sigma_c) / p(x)

    Attributes:
        weights: π > 0, summing to one, (C,).
        locs: μ, (C, D).
        covariances: Σ, positive definite, (C, D, D).

    Raises:
        ValueError: a shape does not fit, a value is not finite, a weight is not positive, the weights do not
            sum to one, or a covariance is not positive definite.
        TypeError: an argument is not floating-point.

    Example:
        >>> weights, locs = torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]])
        >>> mixture = GaussianMixture(weights, locs, torch.ones(2, 1, 1))
        >>> mixture.posterior(torch.tensor([[0.0], [9.0]]))
        tensor([[5.0000e-01, 5.0000e-01],
                [1.5230e-08, 1.0000e+00]])
    """

    weights: Tensor
    locs: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        weights, locs, covariances = _tensors(
            weights=self.weights, locs=self.locs, covariances=self.covariances
        )
        if weights.ndim != 1:
            raise ValueError(f"weights: expected shape (C,), found {tuple(weights.shape)}")
        if locs.ndim != 2 or len(locs) != len(weights):
            raise ValueError(f"locs: expected shape ({len(weights)}, D), found {tuple(locs.shape)}")
        if covariances.shape != (*locs.shape, locs.shape[-1]):
            expected = (*locs.shape, locs.shape[-1])
            raise ValueError(f"covariances: expected shape {expected}, found {tuple(covariances.shape)}")
        _require_positive(weights=weights)
        _require_distribution("weights", weights)
        _cholesky("covariances", covariances)

    def log_joint(self, x: Tensor) -> Tensor:
        """Log density log p(x, c) of x (..., D) with each component, (..., C)."""
        (x,) = _tensors(x=x)
        _require_last("x", x, self.locs.shape[-1])
        components = MultivariateNormal(self.locs, _cholesky("covariances", self.covariances))
        return self.weights.log() + components.log_prob(x.unsqueeze(-2))

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of x (..., D), in nats, (...,)."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """Exact posterior probabilities p(c|x) of x (..., D), (..., C)."""
        return self.log_joint(x).softmax(-1)

    def elbo(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """Exact ELBO of a categorical guide q (..., C), Σ_c q(c) (log p(x, c) − log q(c)), in nats."""
        q = self._guide(x, probabilities)
        return (q * self.log_joint(x) - q.xlogy(q)).sum(-1)

    def gap(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """What the guide loses: log p(x) − ELBO = KL(q ‖ p(c|x)) ≥ 0, in nats, (...,)."""
        q = self._guide(x, probabilities)
        return (q.xlogy(q) - q * self.log_joint(x).log_softmax(-1)).sum(-1)

    def _guide(self, x: Tensor, probabilities: Tensor) -> Tensor:
        x, q = _tensors(x=x, probabilities=probabilities)
        _require_last("probabilities", q, len(self.weights))
        _require_broadcast(x=x.shape[:-1], probabilities=q.shape[:-1])
        _require_distribution("probabilities", q)
        return q
