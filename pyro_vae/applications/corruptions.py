"""Known corruptions p(y|x): from clean elements x to distributions over what is observed, y.

A corruption is to data what a likelihood is to latent vectors: a function that returns a distribution. It
acts on each element alone: for x of any shape it returns a distribution of batch shape x.shape; `LinearMap`
alone mixes the elements of an example. A user's own function of this kind takes part where the likelihood has
finitely many values, such as Bernoulli, DiscretizedLogistic and BetaBinomial. NaN in y means "not observed",
under every corruption. Constructors raise ValueError for a number out of range, naming the argument.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, constraints
from torch.distributions import Normal as TorchNormal
from torch.distributions import Poisson as TorchPoisson

__all__ = ["BitFlip", "Corruption", "CorruptionError", "Erase", "LinearMap", "Normal", "Poisson", "Quantise"]


class CorruptionError(ValueError):
    """A corruption that does not go with the likelihood, or observations that it cannot have produced."""


class Corruption(ABC):
    """Base class of corruptions; a user's own may be any function from x to a distribution over y."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Distribution:
        """Return p(y_d|x_d), of batch shape x.shape, for clean elements x of any shape."""

    def guess(self, y: Tensor) -> Tensor:
        """Return a rough estimate of x from y, which the guide encodes to start with."""
        return y


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise ValueError(f"{name} must be a number between {low:g} and {high:g}; got {value!r}")
    return float(value)


class Normal(Corruption):
    """Normal noise, y_d ~ N(x_d, σ²), not clipped.

    Args:
        scale: σ > 0, the standard deviation, in the units of x.

    Example:
        >>> Normal(0.3)(torch.zeros(5, 4)).stddev[0, 0]
        tensor(0.3000)
    """

    def __init__(self, scale: float):
        self.scale = _number("scale", scale, 0, math.inf)

    def __call__(self, x: Tensor) -> Distribution:
        """Return N(x, σ²)."""
        return TorchNormal(x, self.scale, validate_args=False)


class BitFlip(Corruption):
    """Flips of bits, y_d = 1 − x_d with probability p, else x_d, for x_d in {0, 1}.

    Args:
        probability: p, between 0 and 1.

    Example:
        >>> BitFlip(0.1)(torch.tensor([0.0, 1.0])).probs
        tensor([0.1000, 0.9000])
    """

    def __init__(self, probability: float):
        self.probability = _number("probability", probability, 0, 1)

    def __call__(self, x: Tensor) -> Distribution:
        """Return Bernoulli(p) at x = 0 and Bernoulli(1 − p) at x = 1."""
        if not ((x == 0) | (x == 1)).all():
            raise CorruptionError(
                "BitFlip corrupts bits, 0 or 1: use a Bernoulli likelihood, or another corruption"
            )
        return Bernoulli(probs=self.probability + x * (1 - 2 * self.probability), validate_args=False)


class Poisson(Corruption):
    """Photon noise, y_d ~ Poisson(r x_d), for x_d ≥ 0.

    Args:
        rate: r > 0, the mean count at x_d = 1.

    Example:
        >>> Poisson(20.0)(torch.tensor([0.0, 0.5])).mean
        tensor([ 0., 10.])
    """

    def __init__(self, rate: float = 1.0):
        self.rate = _number("rate", rate, 0, math.inf)

    def __call__(self, x: Tensor) -> Distribution:
        """Return Poisson(r x)."""
        if not (x >= 0).all():
            raise CorruptionError("Poisson corrupts values ≥ 0; the likelihood gives negative ones")
        return TorchPoisson(self.rate * x, validate_args=False)

    def guess(self, y: Tensor) -> Tensor:
        """Return y / r."""
        return y / self.rate


class Quantise(Corruption):
    """Rounding to multiples of a step, y_d = Δ round(x_d / Δ).

    Args:
        step: Δ > 0.

    Example:
        >>> Quantise(0.5)(torch.tensor([0.6, 0.9])).log_prob(torch.tensor([0.5, 0.5])).exp()
        tensor([1., 0.])
    """

    def __init__(self, step: float):
        self.step = _number("step", step, 0, math.inf)

    def __call__(self, x: Tensor) -> Distribution:
        """Return the distribution that is certain of the rounded value."""
        return _Rounded(x, self.step)


class _Rounded(TorchDistribution):
    """Certain of Δ round(x / Δ): log-probability 0 there, within Δ/1000, and −∞ elsewhere."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (as torch declares it)
    support = constraints.real

    def __init__(self, x: Tensor, step: float):
        self.x, self.step = x, step
        super().__init__(x.shape, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return the rounded values."""
        return ((self.x / self.step).round() * self.step).expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return 0 for x within half a step of the value, and −∞ elsewhere."""
        inside = (self.x - value).abs() <= self.step * (0.5 + 1e-3)
        return torch.where(inside, 0.0, -math.inf)


class LinearMap(Corruption):
    """Linear map of an example with normal noise, y = A x + σ ε, ε ~ N(0, I).

    Blurring, projections, or super-resolution, where A averages blocks of pixels. Takes a Normal likelihood.

    Args:
        matrix: A, (M, D), D elements of an example in the order of `flatten`.
        scale: σ > 0, the standard deviation of the noise.

    Raises:
        TypeError: If the matrix is not a floating-point tensor.
        ValueError: If it has another number of dimensions than 2, or a value that is not finite.

    Example:
        >>> blocks = torch.eye(16).reshape(16, 1, 4, 4)  # images of one white pixel
        >>> averages = LinearMap(torch.nn.functional.avg_pool2d(blocks, 2).flatten(1).T, scale=0.1)
        >>> averages(torch.ones(3, 1, 4, 4)).mean
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """

    def __init__(self, matrix: Tensor, scale: float):
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            found = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"matrix must be a floating-point tensor; got {found}")
        if matrix.dim() != 2 or not matrix.isfinite().all():
            raise ValueError(
                f"matrix must have shape (M, D), from D elements to M, and be finite; got "
                f"{tuple(matrix.shape)}"
            )
        self.matrix, self.scale = matrix, _number("scale", scale, 0, math.inf)

    def __call__(self, x: Tensor) -> Distribution:
        """Return N(A x, σ²) for x (N, *event_shape), of batch shape (N, M)."""
        flat = x.flatten(1)
        if flat.shape[1] != self.matrix.shape[1]:
            raise CorruptionError(
                f"the matrix {tuple(self.matrix.shape)} takes {self.matrix.shape[1]} elements; the "
                f"likelihood gives {flat.shape[1]}: give the matrix as many columns"
            )
        return TorchNormal(flat @ self.matrix.to(x).T, self.scale, validate_args=False)

    def guess(self, y: Tensor) -> Tensor:
        """Return Aᵀ (A Aᵀ + σ² I)⁻¹ y, the mean of x under N(0, I), (N, D)."""
        A = self.matrix.to(y)
        noise = self.scale**2 * torch.eye(len(A), dtype=y.dtype, device=y.device)
        return torch.linalg.solve(A @ A.T + noise, y.T).T @ A


class Erase:
    """Erased elements, where the mask is true; the others are observed, as they are or through a corruption.

    The value of y at an erased element is ignored. In-painting is this corruption.

    Args:
        mask: True where erased; broadcast to y, so that a mask of one example serves all.
        then: Corruption of the elements that are kept, or None.

    Raises:
        TypeError: If the mask is not a tensor of truth values.

    Example:
        >>> Erase(torch.tensor([True, False])).erased(torch.ones(3, 2))[0]
        tensor([nan, 1.])
    """

    def __init__(self, mask: Tensor, *, then: Any = None):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a tensor of truth values, True where erased; got {found}")
        self.mask = mask
        self.then = then

    def erased(self, y: Tensor) -> Tensor:
        """Return y with NaN where the mask is true."""
        try:
            mask = self.mask.expand(y.shape)
        except RuntimeError:
            raise ValueError(
                f"the mask of shape {tuple(self.mask.shape)} does not broadcast to y of shape "
                f"{tuple(y.shape)}: give it the shape of y, or of one example"
            ) from None
        return torch.where(mask.to(y.device), math.nan, y)
