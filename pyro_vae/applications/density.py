"""A Gaussian mixture with full covariances, for the density of a few statistics.

Notation: N points of D numbers, C components.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GaussianMixtureDensity"]

_STEPS, _FLOOR = 200, 1e-3  # of EM; and the variance added to each direction, of points of variance 1


@dataclass(frozen=True, eq=False)
class GaussianMixtureDensity:
    """Density Σ_c π_c N(x; m_c, Σ_c) of points x, standardised by median and interquartile range first.

    Attributes:
        centre: Median of the points of the fit, (D,).
        width: Their interquartile range over 1.349, the standard deviation if they are normal, (D,).
        log_share: log π_c, (C,).
        loc: m_c, (C, D).
        scale_tril: Cholesky factor of Σ_c, (C, D, D).
    """

    centre: Tensor
    width: Tensor
    log_share: Tensor
    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def fit(cls, points: Tensor, *, num_components: int = 3) -> "GaussianMixtureDensity":
        """Fit by expectation-maximisation from components along the first principal direction.

        The start is a function of the points, so that equal points give equal fits. Where N is small, fewer
        components are used: at most N // (5 D), and at least one. Every covariance is floored, so that points
        that coincide give a finite density.

        Args:
            points: (N, D) with N ≥ 2, finite.
            num_components: C, at most.

        Raises:
            ValueError: If there are fewer than two points.

        Example:
            >>> density = GaussianMixtureDensity.fit(torch.randn(100, 2))
            >>> bool(density.log_prob(torch.zeros(1, 2)) > density.log_prob(torch.full((1, 2), 9.0)))
            True
        """
        N, D = points.shape
        if N < 2:
            raise ValueError(f"a density needs at least 2 points; got {N}: pass more reference data")
        centre, width = _standardisation(points)
        x = (points - centre) / width
        C = max(1, min(num_components, N // (5 * D)))
        direction = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][0]
        direction = direction * (1.0 if direction[direction.abs().argmax()] > 0 else -1.0)
        order = ((x - x.mean(0)) @ direction).argsort()
        share = torch.zeros(N, C, dtype=x.dtype)
        share[order, torch.arange(N) * C // N] = 1.0  # C parts of equal size
        for _ in range(_STEPS):
            log_share, loc, scale_tril = _maximise(x, share)
            log_joint = log_share + _log_normal(x, loc, scale_tril)
            share, previous = log_joint.softmax(1), share
            if (share - previous).abs().max() < 1e-8:
                break
        return cls(centre, width, log_share, loc, scale_tril)

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-density of points (N, D), (N,), in nats."""
        x = (points - self.centre) / self.width
        return (self.log_share + _log_normal(x, self.loc, self.scale_tril)).logsumexp(
            1
        ) - self.width.log().sum()


def _standardisation(points: Tensor) -> tuple[Tensor, Tensor]:
    low, centre, high = (points.quantile(q, dim=0) for q in (0.25, 0.5, 0.75))
    width = (high - low) / 1.349
    width = torch.where(width > 0, width, points.std(0))
    return centre, torch.where(width > 1e-12 * (1 + centre.abs()), width, 1.0)  # constant columns


def _maximise(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log weights (C,), locations (C, D) and Cholesky factors (C, D, D) for memberships (N, C)."""
    D = x.shape[1]
    count = share.sum(0) + 1e-9
    loc = share.T @ x / count[:, None]
    offset = x - loc[:, None]  # (C, N, D)
    covariance = offset.mT @ (offset * share.T[..., None]) / count[:, None, None]
    covariance = covariance + _FLOOR * torch.eye(D, dtype=x.dtype)
    return (count / count.sum()).log(), loc, torch.linalg.cholesky(covariance)


def _log_normal(x: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Return log N(x_n; m_c, L_c L_cᵀ), (N, C)."""
    white = torch.linalg.solve_triangular(scale_tril, (x - loc[:, None]).mT, upper=False)  # (C, D, N)
    log_volume = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (white.square().sum(1).T + x.shape[1] * math.log(2 * math.pi)) - log_volume
