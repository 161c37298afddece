"""Models whose evidence, posterior and ELBO are known exactly.

Notation, batching and errors are described in :mod:`pyro_vae.closed_form`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.closed_form.checks import (
    as_tensors,
    cholesky,
    require_broadcast,
    require_distribution,
    require_last,
    require_positive,
    require_scale_tril,
    rounding,
)
from pyro_vae.closed_form.losses import gaussian_nll, multivariate_normal_kl

__all__ = ["ElboGradient", "GaussianMixture", "LinearGaussian", "MultivariateNormal"]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)  # the comparison of two tensors has no single truth value
class MultivariateNormal:
    """Batch of Gaussians N(loc, L Lᵀ), with the method names of ``torch.distributions``.

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
        loc, scale_tril = as_tensors(loc=self.loc, scale_tril=self.scale_tril)
        require_scale_tril("scale_tril", scale_tril)
        require_last("loc", loc, scale_tril.shape[-1])
        require_broadcast(loc=loc.shape[:-1], scale_tril=scale_tril.shape[:-2])

    @property
    def mean(self) -> Tensor:
        """Mean, (..., K)."""
        return self.loc

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance L Lᵀ, (..., K, K)."""
        return self.scale_tril @ self.scale_tril.mT

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log density of z (..., K), in nats, (...,)."""
        (z,) = as_tensors(z=z)
        K = self.loc.shape[-1]
        require_last("z", z, K)
        require_broadcast(z=z.shape[:-1], loc=self.loc.shape[:-1], scale_tril=self.scale_tril.shape[:-2])
        white = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).unsqueeze(-1), upper=False)
        return -0.5 * (white.square().sum((-2, -1)) + K * _LOG_2PI) - self._log_volume()

    def entropy(self) -> Tensor:
        """Compute the entropy ½ log |2πe Σ|, in nats, (...,)."""
        batch_shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale_tril.shape[:-2])
        return 0.5 * self.loc.shape[-1] * (_LOG_2PI + 1) + self._log_volume().expand(batch_shape)

    def _log_volume(self) -> Tensor:
        """Compute half the log determinant of the covariance."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True, eq=False)
class ElboGradient:
    """Exact per-example gradient of the ELBO in the parameters of model and guide.

    Attributes:
        W: (..., D, K).
        b: (..., D).
        noise_variance: (...,).
        loc: (..., K).
        covariance: (..., K, K), every entry treated as a free variable.
    """

    W: Tensor
    b: Tensor
    noise_variance: Tensor
    loc: Tensor
    covariance: Tensor


class LinearGaussian:
    r"""Linear-Gaussian model (probabilistic PCA), with exact evidence, posterior, ELBO and gradients.

    .. math:: z \sim \mathcal N(0, I), \qquad x \,|\, z \sim \mathcal N(Wz + b, cI)

    so that, with :math:`M = W^\top W + cI`,

    .. math:: x \sim \mathcal N(b, WW^\top + cI), \qquad
        z \,|\, x \sim \mathcal N(M^{-1} W^\top (x - b), cM^{-1}).

    No D × D matrix is formed. In every method x is (..., D), a Gaussian guide q(z|x) has mean ``loc``
    (..., K) and a symmetric, positive definite ``covariance`` (..., K, K), and results are in nats per datum,
    (...,).

    Args:
        W: loadings, (D, K).
        b: offset, (D,).
        noise_variance: c > 0, a number or a tensor of shape ().

    Raises:
        ValueError: in methods that use the posterior, also if ``noise_variance`` is so small relative to W
            that half the digits of the posterior are lost.

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
        W, b, noise_variance = as_tensors(W=W, b=b, noise_variance=noise_variance)
        if W.ndim != 2 or 0 in W.shape:
            raise ValueError(f"W: expected shape (D, K) with D, K ≥ 1, found {tuple(W.shape)}")
        if b.shape != W.shape[:1]:
            raise ValueError(f"b: expected shape ({len(W)},) for W {tuple(W.shape)}, found {tuple(b.shape)}")
        if noise_variance.ndim:
            raise ValueError(f"noise_variance: expected one value, found shape {tuple(noise_variance.shape)}")
        require_positive(noise_variance=noise_variance)
        self.W, self.b, self.noise_variance = W, b, noise_variance

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent_dim: int) -> "LinearGaussian":
        r"""Return the model of K = ``latent_dim`` with the largest mean log-evidence of data x (N, D).

        With λ and v the eigenvalues and eigenvectors of the data's covariance in descending order, c is the
        mean of the D − K smallest λ, and the k-th column of W is :math:`\sqrt{\lambda_k - c}\, v_k`. These
        columns are orthogonal, so a diagonal guide has no gap, and a linear VAE can reach this evidence.

        Raises:
            ValueError: ``latent_dim`` ≥ min(N, D), or the data vary in at most K directions.

        Source:
            M. E. Tipping, C. M. Bishop (1999), Probabilistic principal component analysis, JRSS B 61(3);
            J. Lucas, G. Tucker, R. Grosse, M. Norouzi (2019), Don't blame the ELBO! A linear VAE perspective
            on posterior collapse, arXiv:1911.02469.
        """
        (x,) = as_tensors(x=x)
        if x.ndim != 2 or not 1 <= latent_dim < min(x.shape):
            raise ValueError(
                f"latent_dim: expected 1 ≤ latent_dim < min(N, D) for x (N, D), "
                f"found {latent_dim} for {tuple(x.shape)}"
            )
        b = x.mean(0)
        _, singular, directions = torch.linalg.svd(x - b, full_matrices=False)
        variances = singular**2 / len(x)  # along the rows of directions
        noise_variance = variances[latent_dim:].sum() / (x.shape[1] - latent_dim)
        if noise_variance <= rounding(x) ** 2 * variances[0]:
            raise ValueError(f"x: expected data that vary in more than {latent_dim} directions")
        loadings = (variances[:latent_dim] - noise_variance).sqrt()
        return cls(directions[:latent_dim].mT * loadings, b, noise_variance)

    # The model

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw x (num_samples, D) from p(x|z) p(z), by default with torch's global generator."""

        def noise(size: int) -> Tensor:
            return torch.randn(
                num_samples, size, generator=generator, dtype=self.W.dtype, device=self.W.device
            )

        D, K = self.W.shape
        return noise(K) @ self.W.mT + self.b + self.noise_variance.sqrt() * noise(D)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute log p(x|z) at z (..., K)."""
        self._check(x=x, z=z)
        return -gaussian_nll(x, z @ self.W.mT + self.b, self.noise_variance)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute log p(x, z) = log p(x|z) + log p(z) at z (..., K)."""
        return self.log_likelihood(x, z) - gaussian_nll(z, torch.zeros_like(z), 1.0)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Compute the exact log p(x), the log density of N(b, WWᵀ + cI)."""
        # By Bayes' rule it is log p(x, z) − log p(z|x) at any z: at the posterior's mean nothing cancels, and
        # no D × D matrix is factorised.
        posterior = self.posterior(x)
        return self.log_joint(x, posterior.loc) - posterior.log_prob(posterior.loc)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """Compute the exact posterior p(z|x) = N(M⁻¹Wᵀ(x − b), cM⁻¹), with batch shape (...,)."""
        self._check(x=x)
        factor = self._posterior_factor()
        loc = (x - self.b) @ self.W @ factor @ factor.mT / self.noise_variance
        return MultivariateNormal(loc, factor.expand(*loc.shape[:-1], -1, -1))

    # The ELBO of any Gaussian guide, in three equal forms

    def elbo(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Compute the exact ELBO as reconstruction and KL to the prior, E_q[log p(x|z)] − KL(q ‖ p(z))."""
        factor = self._check_guide(x, loc, covariance)
        kl = multivariate_normal_kl(loc, factor, torch.zeros_like(loc), self._identity())
        return self.expected_log_likelihood(x, loc, covariance) - kl

    def elbo_by_entropy(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Compute the exact ELBO as joint and entropy, E_q[log p(x, z)] + H[q]."""
        factor = self._check_guide(x, loc, covariance)
        second_moment = loc.square().sum(-1) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        expected_log_prior = -0.5 * (second_moment + loc.shape[-1] * _LOG_2PI)
        entropy = MultivariateNormal(loc, factor).entropy()
        return self.expected_log_likelihood(x, loc, covariance) + expected_log_prior + entropy

    def elbo_by_gap(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Compute the exact ELBO as evidence and gap, log p(x) − KL(q ‖ p(z|x))."""
        return self.log_evidence(x) - self.gap(x, loc, covariance)

    def expected_log_likelihood(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Compute the exact E_q[log p(x|z)], with E_q‖x − Wz − b‖² = ‖x − Wμ − b‖² + tr(WᵀW Σ)."""
        self._check_guide(x, loc, covariance)
        spread = (self.W.mT @ self.W * covariance).sum((-2, -1))
        return self.log_likelihood(x, loc) - spread / (2 * self.noise_variance)

    def gap(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Compute the variational gap log p(x) − ELBO = KL(q ‖ p(z|x)) ≥ 0."""
        factor = self._check_guide(x, loc, covariance)
        posterior = self.posterior(x)
        return multivariate_normal_kl(loc, factor, posterior.loc, posterior.scale_tril)

    def elbo_gradient(self, x: Tensor, loc: Tensor, covariance: Tensor) -> ElboGradient:
        """Compute the exact ELBO gradient; at the posterior it equals that of log p(x) in W, b and c."""
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

    # The gap of diagonal guides

    def best_diagonal_guide(self, x: Tensor) -> MultivariateNormal:
        """Return the diagonal guide of largest ELBO: the posterior's mean, with variances c / M_kk."""
        loc = self.posterior(x).loc
        scale = self._posterior_precision().diagonal().rsqrt()
        return MultivariateNormal(loc, scale.diag().expand(*loc.shape[:-1], -1, -1))

    def diagonal_gap(self) -> Tensor:
        """Compute the gap of the best diagonal guide, ½ (Σ log M_kk − log |M|) ≥ 0, equal for all x: ()."""
        log_volume = self._posterior_factor().diagonal().log().sum()  # ½ log |cM⁻¹|
        return 0.5 * self._posterior_precision().diagonal().log().sum() + log_volume

    # The cost of sampling from the prior

    def log_naive_sample_size(self, x: Tensor) -> Tensor:
        r"""Compute log S, S the draws that give the naive estimate of p(x) a relative standard error of one.

        :math:`S = E[p(x|z)^2] / p(x)^2 - 1` over the prior, exact because :math:`\mathcal N(x; m, cI)^2 =
        (4\pi c)^{-D/2} \mathcal N(x; m, \tfrac c2 I)`. For a relative standard error of r,
        :func:`naive_log_evidence` needs S / r² draws. If W = 0, every draw is exact and the result is −∞.
        """
        sharper = LinearGaussian(self.W, self.b, self.noise_variance / 2)
        log_factor = -0.5 * len(self.W) * (4 * math.pi * self.noise_variance).log()
        log_ratio = (log_factor + sharper.log_evidence(x) - 2 * self.log_evidence(x)).clamp(min=0)
        return log_ratio + (-torch.expm1(-log_ratio)).log()

    # Parts

    def _identity(self) -> Tensor:
        return torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device)

    def _posterior_precision(self) -> Tensor:
        """Return M / c, (K, K)."""
        return self._identity() + self.W.mT @ self.W / self.noise_variance

    def _posterior_factor(self) -> Tensor:
        """Return the lower Cholesky factor of the posterior covariance cM⁻¹, (K, K)."""
        # If the precision is U Uᵀ with U upper triangular (a Cholesky factor with rows and columns reversed),
        # then U⁻ᵀ is the lower Cholesky factor of its inverse.
        precision = self._posterior_precision()
        reverse, info = torch.linalg.cholesky_ex(precision.flip(-2, -1))
        # Every eigenvalue is at least 1; the smallest vanish in the rounding error of a very large one.
        lost = torch.finfo(precision.dtype).eps * precision.diagonal().max() / reverse.diagonal().min() ** 2
        if info or lost > rounding(precision):
            raise ValueError(
                f"noise_variance: {self.noise_variance.item():.3g} is too small for W in {self.W.dtype}: "
                "half the digits of the posterior are lost; use float64, or a W with independent columns"
            )
        return torch.linalg.solve_triangular(reverse.flip(-2, -1).mT, self._identity(), upper=False)

    def _check(self, *, x: Tensor, **latents: Tensor) -> None:
        """Raise unless x is (..., D), every latent is (..., K), and they broadcast."""
        as_tensors(x=x, **latents)
        D, K = self.W.shape
        require_last("x", x, D)
        for name, latent in latents.items():
            require_last(name, latent, K)
        require_broadcast(x=x.shape[:-1], **{name: latent.shape[:-1] for name, latent in latents.items()})

    def _check_guide(self, x: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
        """Check the guide against the data and return the Cholesky factor of its covariance."""
        self._check(x=x, loc=loc)
        as_tensors(covariance=covariance)
        require_last("covariance", covariance, self.W.shape[1], self.W.shape[1])
        require_broadcast(x=x.shape[:-1], loc=loc.shape[:-1], covariance=covariance.shape[:-2])
        return cholesky("covariance", covariance)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""Mixture of Gaussians: with one categorical latent, evidence and posterior are finite sums.

    .. math:: p(x) = \sum_c \pi_c \, \mathcal N(x; \mu_c, \Sigma_c), \qquad
        p(c|x) = \pi_c \, \mathcal N(x; \mu_c, \Sigma_c) / p(x)

    Attributes:
        weights: π > 0, which sum to one, (C,).
        locs: means μ, (C, D).
        covariances: positive definite Σ, (C, D, D).

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
        weights, locs, covariances = as_tensors(
            weights=self.weights, locs=self.locs, covariances=self.covariances
        )
        if weights.ndim != 1:
            raise ValueError(f"weights: expected shape (C,), found {tuple(weights.shape)}")
        if locs.ndim != 2 or len(locs) != len(weights):
            raise ValueError(f"locs: expected shape ({len(weights)}, D), found {tuple(locs.shape)}")
        if covariances.shape != (*locs.shape, locs.shape[-1]):
            expected = (*locs.shape, locs.shape[-1])
            raise ValueError(f"covariances: expected shape {expected}, found {tuple(covariances.shape)}")
        require_positive(weights=weights)
        require_distribution("weights", weights)
        cholesky("covariances", covariances)

    def log_joint(self, x: Tensor) -> Tensor:
        """Compute log p(x, c) of x (..., D) with each component, (..., C)."""
        (x,) = as_tensors(x=x)
        require_last("x", x, self.locs.shape[-1])
        components = MultivariateNormal(self.locs, cholesky("covariances", self.covariances))
        return self.weights.log() + components.log_prob(x.unsqueeze(-2))

    def log_evidence(self, x: Tensor) -> Tensor:
        """Compute the exact log p(x) of x (..., D), in nats, (...,)."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """Compute the exact posterior probabilities p(c|x) of x (..., D), (..., C)."""
        return self.log_joint(x).softmax(-1)

    def elbo(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """Compute the exact ELBO of a guide q (..., C), Σ_c q(c) (log p(x, c) − log q(c)), in nats."""
        q = self._guide(x, probabilities)
        return (q * self.log_joint(x) - q.xlogy(q)).sum(-1)

    def gap(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """Compute the variational gap log p(x) − ELBO = KL(q ‖ p(c|x)) ≥ 0, in nats, (...,)."""
        q = self._guide(x, probabilities)
        return (q.xlogy(q) - q * self.log_joint(x).log_softmax(-1)).sum(-1)

    def _guide(self, x: Tensor, probabilities: Tensor) -> Tensor:
        x, q = as_tensors(x=x, probabilities=probabilities)
        require_last("probabilities", q, len(self.weights))
        require_broadcast(x=x.shape[:-1], probabilities=q.shape[:-1])
        require_distribution("probabilities", q)
        return q
