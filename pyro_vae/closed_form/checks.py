"""Validation of tensor arguments; every error names the argument."""

import math

import torch
from torch import Tensor

__all__ = [
    "as_tensors",
    "cholesky",
    "elementwise",
    "require",
    "require_broadcast",
    "require_distribution",
    "require_last",
    "require_positive",
    "require_scale_tril",
    "rounding",
]


def as_tensors(**arguments: Tensor | float) -> list[Tensor]:
    """Return the arguments as finite tensors; numbers take the widest dtype among the tensors."""
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
        require(name, tensor, torch.isfinite(tensor), "finite values")
    return tensors


def elementwise(**arguments: Tensor | float) -> list[Tensor]:
    """Return the arguments as tensors that broadcast together."""
    tensors = as_tensors(**arguments)
    require_broadcast(**{name: tensor.shape for name, tensor in zip(arguments, tensors, strict=True)})
    return tensors


def require(name: str, tensor: Tensor, holds: Tensor, expected: str) -> None:
    """Raise a ValueError with the first entry of the tensor where ``holds`` is false."""
    if not holds.all():
        where = tuple((~holds).nonzero()[0].tolist())
        at = f" at index {where}" if where else ""
        raise ValueError(f"{name}: expected {expected}, found {tensor.detach()[where].item():.6g}{at}")


def require_positive(**tensors: Tensor) -> None:
    """Raise a ValueError unless every entry is positive."""
    for name, tensor in tensors.items():
        require(name, tensor, tensor > 0, "positive values")


def require_distribution(name: str, probabilities: Tensor) -> None:
    """Raise a ValueError unless the last dimension holds probabilities that sum to one."""
    require(name, probabilities, probabilities >= 0, "non-negative probabilities")
    total = probabilities.detach().sum(-1)
    require(name, total, (total - 1).abs() <= rounding(total), "probabilities that sum to one")


def require_broadcast(**shapes: torch.Size) -> None:
    """Raise a ValueError unless the shapes broadcast together."""
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected shapes that broadcast, found {listed}") from None


def require_last(name: str, tensor: Tensor, *sizes: int) -> None:
    """Raise a ValueError unless the last dimensions have exactly these sizes, without broadcasting."""
    if tensor.shape[-len(sizes) :] != sizes:
        expected = ", ".join(str(size) for size in sizes)
        raise ValueError(f"{name}: expected shape (..., {expected}), found {tuple(tensor.shape)}")


def require_scale_tril(name: str, factor: Tensor) -> None:
    """Raise a ValueError unless the matrices are lower triangular with a positive diagonal."""
    _require_square(name, factor)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    require(name, factor, factor.triu(1) == 0, "a Cholesky factor, zero above its diagonal")
    require(name, diagonal, diagonal > 0, "a Cholesky factor with a positive diagonal")


def cholesky(name: str, covariance: Tensor) -> Tensor:
    """Return the lower-triangular L with L Lᵀ = covariance."""
    _require_square(name, covariance)
    size = covariance.detach().abs().amax((-2, -1), keepdim=True)
    symmetric = (covariance - covariance.mT).abs() <= rounding(covariance) * size
    require(name, covariance, symmetric, "symmetric matrices")
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info.any():
        smallest = torch.linalg.eigvalsh(covariance.detach()).min().item()
        raise ValueError(
            f"{name}: expected positive definite matrices, found an eigenvalue of {smallest:.3g}"
        )
    return factor


def rounding(tensor: Tensor) -> float:
    """Return the relative rounding error tolerated in a caller's result: √ε of the dtype."""
    return math.sqrt(torch.finfo(tensor.dtype).eps)


def _require_square(name: str, matrices: Tensor) -> None:
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name}: expected shape (..., K, K), found {tuple(matrices.shape)}")
