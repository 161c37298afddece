"""What repeated draws of a stochastic gradient tell of its mean, its noise and its bias.

Notation: R independent draws g_r of a vector, such as the gradient of a bound in the guide's parameters. They
are taken in one by one and not kept: memory is a few vectors, whatever R.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientMoments", "GradientSummary", "ZeroMeanTest"]

_BLOCKS = 10


@dataclass(frozen=True)
class GradientSummary:
    """Noise of a gradient; see `GradientMoments`. Standard errors by the jackknife."""

    variance: float
    variance_se: float
    snr: float
    snr_se: float


class GradientMoments:
    r"""Variance and signal-to-noise ratio of a random vector, from independent draws.

    .. math:: \mathrm{variance} = E \|g - E g\|^2 = \operatorname{tr} \operatorname{Cov} g, \qquad
        \mathrm{SNR} = \|E g\| / \sqrt{E \|g - E g\|^2}

    Both parts are estimated without bias, :math:`\|E g\|^2` by the mean of the inner products of *different*
    draws: the length of the mean of R draws of pure noise would show an SNR of about 1/√R. An SNR too small
    for R draws reads 0.

    For one coordinate this is the SNR of Rainforth et al. (2018); over several it weighs each by its
    variance, and scales with the number of particles as theirs does.

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
        self.sums: list[Tensor] = []  # of the draws of each block, by turns
        self.squares = torch.zeros(_BLOCKS, dtype=torch.float64)  # sums of their squared lengths

    def add(self, draw: Tensor) -> None:
        """Take in a draw (P,)."""
        block = self.num_draws % _BLOCKS
        if len(self.sums) <= block:
            self.sums.append(draw.clone())
        else:
            self.sums[block] += draw
        self.squares[block] += float(torch.linalg.vector_norm(draw, dtype=torch.float64)) ** 2
        self.num_draws += 1

    @property
    def mean_square(self) -> float:
        """Mean squared length of the draws."""
        return float(self.squares.sum()) / self.num_draws

    def summary(self, *, negligible: float = 0.0) -> GradientSummary:
        """Summarise the draws; those of a mean squared length up to `negligible` are rounding errors of 0.

        Raises:
            ValueError: For fewer than 4 draws.
        """
        if self.num_draws < 4:
            raise ValueError(f"the noise of a gradient needs at least 4 draws; got {self.num_draws}")
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
        # The delta method, but where the signal cannot be told from nothing
        snr_se = min(snr2_se / (2 * snr), math.sqrt(snr2_se)) if snr > 0 else math.sqrt(snr2_se)
        return GradientSummary(float(variance), variance_se, snr, snr_se)


def _moments(square_of_sum: Tensor, sum_of_squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and squared SNR, both parts unbiased."""
    square_of_mean = (square_of_sum - sum_of_squares) / (count * (count - 1))
    variance = (sum_of_squares - square_of_sum / count) / (count - 1)
    return variance, square_of_mean / variance


class ZeroMeanTest:
    """Tests whether the mean of a random vector is zero, by a t-statistic.

    One direction is tested: that of the mean of the first half of the draws. Along it the draws of the
    second half, independent of it, have mean zero if all have, in any number of dimensions; and if not, it is
    where this would show. Under the hypothesis the statistic follows Student's t with (half of the draws) − 1
    degrees of freedom. A small one says that no difference was found, not that there is none.

    Args:
        num_draws: R ≥ 4, how many will come.

    Example:
        >>> test = ZeroMeanTest(100)
        >>> for _ in range(100):
        ...     test.add(torch.randn(7) + 1)
        >>> test.t > 4
        True
    """

    def __init__(self, num_draws: int):
        if num_draws < 4:
            raise ValueError(f"a test by halves needs at least 4 draws; got {num_draws}")
        self.first_half = num_draws // 2
        self.seen = 0
        self.direction: Tensor | None = None
        self.lengths: list[float] = []

    def add(self, draw: Tensor) -> None:
        """Take in a draw (P,)."""
        if self.seen >= self.first_half and self.direction is not None:
            self.lengths.append(float(draw.double() @ self.direction))
        elif self.direction is None:
            self.direction = draw.double()
        else:
            self.direction += draw
        self.seen += 1

    @property
    def t(self) -> float:
        """The statistic; 0 if every draw along the direction is zero."""
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        mean, se = float(lengths.mean()), float(lengths.std()) / math.sqrt(len(lengths))
        return 0.0 if mean == 0 else mean / se if se > 0 else math.copysign(math.inf, mean)
