"""Densities of the rows of a table, by estimators with a VAE inside."""

import math
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pyro_vae.applications.linear_start import factor_analysis_vae
from pyro_vae.applications.shared_noise import draw_with_shared_noise
from pyro_vae.applications.sklearn.estimator import CPU, FLOOR, FromVAE, one_thread_in_workers
from pyro_vae.evaluation import evaluate
from pyro_vae.utils.isolation import evaluating
from pyro_vae.vae import VAE

__all__ = ["SCORE", "DensityEstimator", "log_evidence", "rows_at_once"]

SCORE, _SAMPLE = 92, 93  # streams of random numbers
_VALUES = 2**21  # decoded at once, at most
_SUMMARISED = 5000  # rows, at most, that the summaries of latent dimensions are computed from


class DensityEstimator(FromVAE):
    """Estimators with a density of the rows: `score_samples`, `score`, `sample`, `partial_fit`."""

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train one epoch on X; the first call sets the centre and scale of the columns."""
        self._validate_params()
        first = not hasattr(self, "vae_")
        with self._unchanged_on_error():
            X = self._checked(X, reset=first, ensure_min_samples=2 if first else 1)
            if first:
                self._start(X)
            self._train(X, None, 1, None)
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[Any]:
        r"""Return an estimate of log p(X_n) for each row, (N,), in nats, as a density in the units of X.

        .. math:: \log \frac1S \sum_s \frac{p(x, z_s)}{q(z_s|x)} - \sum_d \log \mathrm{scale}_d

        with S = `num_particles` draws z_s ~ q(z|x), the same noise for every row: a row's value depends on no
        other row. On average a lower bound of log p(X_n).
        """
        x = self._inside(X)
        if self._is_bernoulli() and not ((x == 0) | (x == 1)).all():
            raise ValueError(
                'score_samples under likelihood="bernoulli" takes 0 and 1; X has other values: round X, or '
                'fit with likelihood="continuous_bernoulli"'
            )
        with one_thread_in_workers():
            values = log_evidence(self.vae_, x, num_particles=self.num_particles, seed=self._seed_of(SCORE))
        scale = np.broadcast_to(self.scale_x_, self.n_features_in_)
        return values.numpy() - np.log(scale.astype(np.float64)).sum()

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the mean of `score_samples` over the rows, in nats; higher is better."""
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> NDArray[Any]:
        """Draw rows (n_samples, D) from the model, noise included, in the units of X.

        Without `random_state` the draws are the same at each call.
        """
        check_is_fitted(self)
        seed = self._seed_of(_SAMPLE)
        if random_state is not None:
            seed = int(check_random_state(random_state).randint(2**31))
        with evaluating(self.vae_, CPU, seed):
            return self._outside(self.vae_.sample(n_samples))

    def _build(self, x: NDArray[Any], seed: int, dtype: torch.dtype) -> VAE:
        if self.vae_factory is not None or self.likelihood != "normal":
            return super()._build(x, seed, dtype)
        return factor_analysis_vae(
            x,
            self.n_components,
            hidden_features=tuple(self.hidden_layer_sizes),
            activation=self.activation,
            floor=FLOOR,
            variance="per_element" if self.standardize else "shared",
            dtype=dtype,
            seed=seed,
        )

    def _summarise(self, x: Tensor) -> None:
        """Summarise the latent dimensions; see `evaluate`."""
        binarize = "threshold" if self._is_bernoulli() else None
        options: dict[str, Any] = {"num_particles": 1, "aggregate_size": 0, "progress": False}
        report = evaluate(self.vae_, x[:_SUMMARISED], seed=self._seed, binarize=binarize, **options)
        self.kl_per_dimension_ = report.kl_per_dimension.numpy()
        self.active_units_ = int(report.active_units)


@torch.no_grad()
def log_evidence(vae: VAE, x: Tensor, *, num_particles: int, seed: int) -> Tensor:
    r"""Return estimates of log p(x), float64 (N,), in nats, with the same noise for all examples.

    .. math:: \log \frac1S \sum_s \frac{p(x, z_s)}{q(z_s|x)}

    An example's value is a function of the example and the seed, up to rounding, whatever else is in x; see
    `shared_noise`.

    Args:
        vae: The VAE, on the CPU.
        x: Examples, (N, *event_shape).
        num_particles: S.
        seed: Of the noise.

    Raises:
        ValueError: If x has another shape, or lies outside the likelihood's support.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(3),
        ...     likelihood=likelihoods.Normal(3, (4,)),
        ...     guide=guides.DiagonalNormal((4,), 3),
        ... )
        >>> x = torch.randn(5, 4)
        >>> some = log_evidence(vae, x[1:3], num_particles=7, seed=0)
        >>> torch.allclose(some, log_evidence(vae, x, num_particles=7, seed=0)[1:3])
        True
    """
    vae.check_data(x)
    values = []
    with evaluating(vae, CPU, seed):
        for part in x.split(rows_at_once(x, num_particles)):
            _, z, log_guide = draw_with_shared_noise(vae, part, num_particles, seed=seed)
            log_weight = vae.log_joint(part, z) - log_guide
            values.append(log_weight.double().logsumexp(0) - math.log(num_particles))
    return torch.cat(values)


def rows_at_once(x: Tensor, num_particles: int = 1) -> int:
    """Return how many examples are run at once."""
    return max(1, _VALUES // (num_particles * max(1, math.prod(x.shape[1:]))))
