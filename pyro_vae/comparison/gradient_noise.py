"""Variance, signal-to-noise ratio and bias of a stochastic gradient, from repeated draws.

Notation: R independent draws g_r of a vector with P entries, such as the gradient of a bound in the
parameters of the guide. Draws are added one by one and not stored: memory does not grow with R.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientMoments", "GradientSummary", "ZeroMeanTest"]

_BLOCKS = 10


@dataclass(frozen=True)
class GradientSummary:
    """Variance and SNR of a gradient, as in `GradientMoments`, with standard errors by the jackknife."""

    variance: float
    variance_se: float
    snr: float
    snr_se: float


class GradientMoments:
    r"""Variance and signal-to-noise ratio of a random vector, from independent draws.

    .. math:: \mathrm{variance} = E \|g - E g\|^2 = \operatorname{tr} \operatorname{Cov} g, \qquad
        \mathrm{SNR} = \|E g\| / \sqrt{E \|g - E g\|^2}

    Both parts are estimated without bias: :math:`\|E g\|^2` by the mean inner product of *different* draws,
    as the norm of the mean of R draws of pure noise would give an SNR of about 1/√R. A negative estimate of
    :math:`\|E g\|^2` gives an SNR of 0.

    For one coordinate this is the SNR of Rainforth et al. (2018). For several it weights each coordinate by
    its variance, with the same scaling in the number of particles.

    Source: T. Rainforth et al. (2018), Tighter variational bounds are not necessarily better,
    arXiv:1802.04537.

    Example:
        >>> moments = GradientMoments()
        >>> for draw in torch.tensor([[3.0, 0.0], [5.0, 0.0], [3.0, 0.0], [5.0, 0.0]]):
        ...     moments.add(draw)
        >>> round(moments.summary().variance, 4)  # of 3, 5, 3 and 5
        1.3333
    """

    def __init__(self) -> None:
        self.num_draws = 0
        self.sums: list[Tensor] = []  # draw r goes into block r mod 10
        self.squares = torch.zeros(_BLOCKS, dtype=torch.float64)  # sums of squared norms

    def add(self, draw: Tensor) -> None:
        """Add a draw, (P,)."""
        block = self.num_draws % _BLOCKS
        if len(self.sums) <= block:
            self.sums.append(draw.clone())
        else:
            self.sums[block] += draw
        self.squares[block] += float(torch.linalg.vector_norm(draw, dtype=torch.float64)) ** 2
        self.num_draws += 1

    @property
    def mean_square(self) -> float:
        """Mean squared norm of the draws."""
        return float(self.squares.sum()) / self.num_draws

    def summary(self, *, negligible: float = 0.0) -> GradientSummary:
        """Estimate variance and SNR; a mean squared norm up to `negligible` is rounding error of 0.

        Raises:
            ValueError: If there are fewer than 4 draws.
        """
        if self.num_draws < 4:
            raise ValueError(f"the variance of a gradient needs at least 4 draws; got {self.num_draws}")
        if self.mean_square <= negligible:
            return GradientSummary(variance=0.0, variance_se=0.0, snr=math.nan, snr_se=math.nan)
        blocks = len(self.sums)
        sums = torch.stack(self.sums).double()
        products = (sums @ sums.T).cpu()
        squares = self.squares[:blocks]
        counts = torch.tensor([len(range(block, self.num_draws, _BLOCKS)) for block in range(blocks)])
        variance, snr2 = _moments(products.sum(), squares.sum(), counts.sum())
        without = _moments(
            products.sum() - 2 * products.sum(1) + products.diagonal(),
            squares.sum() - squares,
            counts.sum() - counts,
        )
        variance_se, snr2_se = (float(part.std() * (blocks - 1) / math.sqrt(blocks)) for part in without)
        snr = math.sqrt(max(float(snr2), 0.0))
        # Delta method, which diverges as the SNR goes to 0
        snr_se = min(snr2_se / (2 * snr), math.sqrt(snr2_se)) if snr > 0 else math.sqrt(snr2_se)
        return GradientSummary(float(variance), variance_se, snr, snr_se)


def _moments(square_of_sum: Tensor, sum_of_squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and squared SNR, from unbiased numerator and denominator."""
    square_of_mean = (square_of_sum - sum_of_squares) / (count * (count - 1))
    variance = (sum_of_squares - square_of_sum / count) / (count - 1)
    return variance, square_of_mean / variance


class ZeroMeanTest:
    """Test whether the mean of a random vector is zero, by a t-statistic.

    The second half of the draws is projected on the mean of the first half. Under the hypothesis the
    projections have mean zero, in any number of dimensions, and the statistic follows Student's t with
    (half of the draws) − 1 degrees of freedom. A small t does not show that the mean is zero.

    Args:
        num_draws: R ≥ 4, the number of draws that will be added.

    Example:
        >>> test = ZeroMeanTest(100)
        >>> for _ in range(100):
        ...     test.add(torch.randn(7) + 1)
        >>> test.t > 4
        True
    """

    def __init__(self, num_draws: int):
        if num_draws < 4:
            raise ValueError(f"a split-sample test needs at least 4 draws; got {num_draws}")
        self.first_half = num_draws // 2
        self.seen = 0
        self.direction: Tensor | None = None
        self.projections: list[float] = []

    def add(self, draw: Tensor) -> None:
        """Add a draw, (P,)."""
        if self.seen >= self.first_half and self.direction is not None:
            self.projections.append(float(draw.double() @ self.direction))
        elif self.direction is None:
            self.direction = draw.double()
        else:
            self.direction += draw
        self.seen += 1

    @property
    def t(self) -> float:
        """t-statistic; 0 if every projection is zero."""
        projections = torch.tensor(self.projections, dtype=torch.float64)
        mean, se = float(projections.mean()), float(projections.std()) / math.sqrt(len(projections))
        return 0.0 if mean == 0 else mean / se if se > 0 else math.copysign(math.inf, mean)
