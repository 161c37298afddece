"""A VAE that starts as factor analysis: linear networks with a nonlinear correction that begins at zero.

Factor analysis is the linear VAE: p(x|z) = N(W z, diag ψ), z ~ N(0, I). Its posterior is normal with the
precision M = I + Wᵀ diag(ψ)⁻¹ W. Rotating z does not change p(x), so M can be made diagonal; a diagonal guide
is then exact, and the ELBO equals log p(x). Training begins at this solution.

Notation: y (N, D), standardised data; K latent dimensions; W (D, K) loadings; ψ (D,) noise variances.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_vae import likelihoods
from pyro_vae.guides import DiagonalNormal
from pyro_vae.networks import MLP, NetworkOptions, positive
from pyro_vae.priors import StandardNormal
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.vae import VAE

__all__ = ["LinearPlusMLP", "NoisyNormal", "factor_analysis_vae", "fit_factor_analysis"]

_ROWS = 5000  # of the data, at most, that the start is computed from
_ITERATIONS = 50  # of expectation maximisation
_OVERSAMPLES, _POWERS = 10, 7  # of the random projection that finds principal components


@rebuildable
class LinearPlusMLP(nn.Module):
    """Sum of a linear map and a multilayer perceptron whose last layer starts at zero.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        hidden_features: Widths of the hidden layers of the perceptron; empty for the linear map alone.
        activation: As in `networks.MLP`.

    Example:
        >>> network = LinearPlusMLP(3, 2, hidden_features=(5,))
        >>> x = torch.ones(4, 3)
        >>> torch.equal(network(x), network.linear(x))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (),
        activation: str = "relu",
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.correction: MLP | None = None
        if len(hidden_features) > 0:
            network = MLP(in_features, out_features, hidden_features=hidden_features, activation=activation)
            self.correction = network
            for parameter in network[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, in_features) to (N, out_features)."""
        return self.linear(x) if self.correction is None else self.linear(x) + self.correction(x)


@rebuildable
class NoisyNormal(likelihoods.Normal):
    """Normal likelihood with learned variances of at least `floor`².

    Without a floor the density is unbounded where a column is constant or takes few values.

    Args:
        latent_dim: K.
        event_shape: Shape of one example.
        floor: Smallest standard deviation.
        variance: "per_element" or "shared", as in `likelihoods.Normal`.
        network_options: As for `likelihoods.Likelihood`.

    Example:
        >>> p = NoisyNormal(2, (3,), floor=2.0)(torch.zeros(5, 2))
        >>> bool((p.stddev >= 2).all())
        True
    """

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        *,
        floor: float,
        variance: str = "per_element",
        **network_options: Unpack[NetworkOptions],
    ):
        super().__init__(latent_dim, event_shape, variance=variance, **network_options)
        self.floor = floor

    @property
    def scale(self) -> Tensor:
        """Standard deviation, of shape `event_shape` or ()."""
        assert self.raw_scale is not None
        return positive(self.raw_scale) + self.floor


def factor_analysis_vae(
    y: NDArray[Any],
    latent_dim: int,
    *,
    hidden_features: Sequence[int],
    activation: str,
    floor: float,
    variance: str = "per_element",
    dtype: torch.dtype = torch.float32,
    seed: int,
) -> VAE:
    """Return a VAE that is the factor analysis of y (N, D), with perceptrons that start at zero.

    With one shared variance it is probabilistic principal component analysis.

    Draws from torch's global generator.

    Args:
        y: Data, centred, in units of about their standard deviations.
        latent_dim: K.
        hidden_features: Widths of the hidden layers; the guide has them in this order, the likelihood in
            reverse.
        activation: As in `networks.MLP`.
        floor: Smallest standard deviation of the noise.
        variance: "per_element" or "shared": the noise of the columns.
        dtype: Of the parameters.
        seed: Of the rows that the start is computed from, if there are many.

    Example:
        >>> y = np.random.default_rng(0).normal(size=(50, 4))
        >>> vae = factor_analysis_vae(y, 2, hidden_features=(8,), activation="relu", floor=0.01, seed=0)
        >>> vae.reconstruct(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """
    count, features = y.shape
    if count > _ROWS:
        y = y[np.sort(np.random.default_rng(seed).choice(count, _ROWS, replace=False))]
    loadings, noise = fit_factor_analysis(y, latent_dim, floor=floor, shared=variance == "shared")
    widths, reverse = tuple(hidden_features), tuple(hidden_features)[::-1]
    encoder = LinearPlusMLP(features, 2 * latent_dim, hidden_features=widths, activation=activation)
    decoder = LinearPlusMLP(latent_dim, features, hidden_features=reverse, activation=activation)
    likelihood = NoisyNormal(latent_dim, (features,), floor=floor, variance=variance, network=decoder)
    guide = DiagonalNormal((features,), latent_dim, network=encoder)
    vae = VAE(prior=StandardNormal(latent_dim), likelihood=likelihood, guide=guide).to(dtype)
    _set_linear(encoder, decoder, likelihood, torch.as_tensor(loadings), torch.as_tensor(noise))
    return vae


def fit_factor_analysis(
    y: NDArray[Any], latent_dim: int, *, floor: float, shared: bool = False, iterations: int = _ITERATIONS
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return loadings W (D, K), rotated so that Wᵀ diag(ψ)⁻¹ W is diagonal, and noise variances ψ (D,).

    Expectation maximisation, started at the principal components. The latent dimensions are ordered by how
    well they are determined, and the largest loading of each is positive, so that the result is unique.

    Args:
        y: Centred data, (N, D).
        latent_dim: K; dimensions beyond the rank of the data get zero loadings.
        floor: ψ is at least four times the square of this.
        shared: The noise variance is the same for all columns.
        iterations: Number of iterations.

    Source: D. Rubin, D. Thayer (1982), EM algorithms for ML factor analysis, Psychometrika 47.

    Example:
        >>> y = np.random.default_rng(0).normal(size=(50, 4))
        >>> loadings, noise = fit_factor_analysis(y - y.mean(0), 2, floor=0.01)
        >>> loadings.shape, noise.shape
        ((4, 2), (4,))
    """
    y = y.astype(np.float64)
    count, features = y.shape
    variance, least = y.var(0), (2 * floor) ** 2
    rank = min(latent_dim, count, features)
    singular, directions = _leading(y, rank)
    rest = max(0.0, variance.sum() - (singular**2).sum() / count) / max(1, features - rank)
    loadings = directions * np.sqrt(np.maximum(singular**2 / count - rest, 0.0))

    def noise_of(explained: NDArray[Any]) -> NDArray[Any]:
        each = variance - explained
        return np.maximum(np.full_like(each, each.mean()) if shared else each, least)

    noise = noise_of((loadings**2).sum(1))
    for _ in range(iterations):
        weights, precision = _posterior(loadings, noise)
        z = np.linalg.solve(precision, (y @ weights).T).T
        second = z.T @ z / count + np.linalg.inv(precision)
        cross = y.T @ z / count
        loadings = np.linalg.solve(second, cross.T).T
        noise = noise_of((loadings * cross).sum(1))
    loadings = _rotated(loadings, noise)
    return np.pad(loadings, ((0, 0), (0, latent_dim - rank))), noise


def _leading(y: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the largest singular values of y (N, D), (rank,), and their directions, (D, rank)."""
    with torch.random.fork_rng(devices=[]):  # the method is a random projection
        torch.manual_seed(0)
        _, singular, directions = torch.svd_lowrank(
            torch.from_numpy(y), q=min(rank + _OVERSAMPLES, *y.shape), niter=_POWERS
        )
    return singular[:rank].numpy(), directions[:, :rank].numpy()


def _posterior(loadings: NDArray[Any], noise: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return diag(ψ)⁻¹ W, (D, K), and the posterior precision M = I + Wᵀ diag(ψ)⁻¹ W, (K, K)."""
    weights = loadings / noise[:, None]
    return weights, np.eye(loadings.shape[1]) + loadings.T @ weights


def _rotated(loadings: NDArray[Any], noise: NDArray[Any]) -> NDArray[Any]:
    """Rotate z so that M is diagonal and decreasing, with the largest loading of each dimension positive."""
    _, rotation = np.linalg.eigh(_posterior(loadings, noise)[1])
    loadings = loadings @ rotation[:, ::-1]
    largest = np.abs(loadings).argmax(0)
    signs = np.sign(loadings[largest, np.arange(loadings.shape[1])])
    return loadings * np.where(signs == 0, 1.0, signs)


@torch.no_grad()
def _set_linear(
    encoder: LinearPlusMLP,
    decoder: LinearPlusMLP,
    likelihood: NoisyNormal,
    loadings: Tensor,
    noise: Tensor,
) -> None:
    """Set the linear maps, and the scales of guide and likelihood, to factor analysis and its posterior."""
    latent_dim = loadings.shape[1]
    weights = loadings / noise[:, None]
    precision = 1 + (loadings * weights).sum(0)
    encoder.linear.weight.zero_()
    encoder.linear.weight[:latent_dim] = (weights / precision).T
    encoder.linear.bias.zero_()
    encoder.linear.bias[latent_dim:] = _inverse_positive(precision.rsqrt())
    decoder.linear.weight.copy_(loadings)
    decoder.linear.bias.zero_()
    assert likelihood.raw_scale is not None
    raw = _inverse_positive(noise.sqrt() - likelihood.floor)
    likelihood.raw_scale.copy_(raw if likelihood.raw_scale.dim() else raw[0])


def _inverse_positive(value: Tensor) -> Tensor:
    """Return raw with `networks.positive(raw)` = value, for values above 1e-6."""
    return value + torch.log(-torch.expm1(-(value - 1e-6))) - 1e-6
