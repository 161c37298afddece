"""Missing values of a table, imputed by a VAE."""

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.impute import MissingIndicator
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from pyro_vae.applications.imputation import impute
from pyro_vae.applications.posterior_draws import METHODS, Restored
from pyro_vae.applications.sklearn.estimator import FromVAE, one_thread_in_workers
from pyro_vae.objectives import IWAE
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE

__all__ = ["VAEImputer"]

_IMPUTE = 94  # a stream of random numbers
_BOUND = 20  # draws of z in the bound that is trained


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class VAEImputer(OneToOneFeatureMixin, TransformerMixin, FromVAE):
    r"""Imputation of missing values, NaN, by a VAE that is trained on the values that are there.

    .. math:: x_{missing} \to E[x_{missing} | x_{observed}], \qquad p(x) = \int N(z; 0, I) \, p(x|z) \, dz

    Trained by `fit(missing="nan", estimator=IWAE(20))`, imputed by `applications.impute`. Observed values
    come back bit for bit. Valid if values are missing at random: where the value itself is the reason, no
    method without a model of the reason is. The mean minimises the squared error; whatever else is estimated,
    such as a variance, is estimated on several `draws` and combined by `applications.pool`.

    The networks start at random, and training stops after `max_epochs`: with more, few rows make the decoder
    too certain, and intervals too narrow. `early_stopping` watches the ELBO of held-out rows, and may stop
    much too early, for the bound that is trained is another.

    Args:
        n_components: K, the number of latent dimensions.
        likelihood: "student_t" or "normal", for real numbers; the others as in `VAETransformer`, "bernoulli"
            for 0 and 1 alone.
        num_particles: S, draws of z per row, of which the mean is made.
        sample_posterior: Fill in a draw of p(x_missing | x_observed) instead of the mean; the same one at
            each `transform` of the same X.
        add_indicator: Append a column of 0 and 1 for each column with missing values in `fit`.
        keep_empty_features: Keep columns without any value in `fit`, filled with 0, which else are dropped.
        method: As in `applications.impute`; "auto" runs chains for rows that are hard.
        parameters: The others of `VAETransformer`.

    Attributes:
        indicator_: The `MissingIndicator`, or None.
        vae_: The trained `VAE` of the columns that are kept; for the others see `VAETransformer`.

    Source: P.-A. Mattei, J. Frellsen (2019), MIWAE, arXiv:1812.02633.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(60, 4))
        >>> X[::3, 1] = np.nan
        >>> imputer = VAEImputer(2, max_epochs=3, num_particles=50, random_state=0).fit(X)
        >>> filled = imputer.transform(X)
        >>> bool(np.isfinite(filled).all()), bool((filled == X)[:, 0].all()), imputer.draws(X, 5).shape
        (True, True, (5, 60, 4))
    """

    n_components: int = dataclasses.field(default=10, kw_only=False)
    likelihood: str = "student_t"
    hidden_layer_sizes: tuple[int, ...] = (128,)
    batch_size: int = 64
    max_epochs: int = 100
    early_stopping: bool = False
    num_particles: int = 1000
    sample_posterior: bool = False
    add_indicator: bool = False
    keep_empty_features: bool = False
    method: str = "auto"

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **FromVAE._parameter_constraints,
        "sample_posterior": ["boolean"],
        "add_indicator": ["boolean"],
        "keep_empty_features": ["boolean"],
        "method": [StrOptions(set(METHODS))],
    }

    @classmethod
    def from_vae(cls, vae: VAE, **parameters: Any) -> Self:
        """Return a fitted imputer around a trained VAE; see `VAETransformer.from_vae`.

        With `add_indicator` each column has an indicator.
        """
        imputer = super().from_vae(vae, **parameters)
        imputer._watch(np.full((1, imputer.n_features_in_), np.nan))
        imputer._kept[:] = True
        return imputer

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """Return X with means, or draws, in the place of NaN, and the indicators, if any.

        The random numbers of a row depend on the rows before it.
        """
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        filled = self._fill(X, num_draws=1)[int(self.sample_posterior)]
        if self.indicator_ is None:
            return filled
        return np.hstack([filled, self.indicator_.transform(X).astype(filled.dtype)])

    def draws(self, X: ArrayLike, n_draws: int = 20) -> NDArray[Any]:
        """Draw from p(x_missing | x_observed): complete copies of X without indicators, (n_draws, N, D)."""
        check_is_fitted(self)
        require_count("n_draws", n_draws)
        return self._fill(self._checked(X, reset=False), num_draws=n_draws)[1:]

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[Any]:
        """Return the names of the columns that `transform` returns."""
        names = super().get_feature_names_out(input_features)
        found = names if self.keep_empty_features else names[self._kept]
        if self.indicator_ is None:
            return found
        return np.concatenate([found, self.indicator_.get_feature_names_out(names)])

    def _fill(self, X: NDArray[Any], *, num_draws: int) -> NDArray[Any]:
        """Return X with missing values filled in, first by means, then by each draw, (1 + M, N, D)."""
        kept = X[:, self._kept]
        rows = np.isnan(kept).any(1)
        filled = np.repeat(kept[None], 1 + num_draws, 0)
        if rows.any():
            found = self._impute(kept[rows], num_draws)
            for copy, values in zip(filled, [found.mean, *found.draws], strict=True):
                copy[rows] = np.where(np.isnan(kept[rows]), self._outside(values), kept[rows])
        if not self.keep_empty_features:
            return filled
        whole = np.repeat(np.where(np.isnan(X), 0.0, X)[None].astype(X.dtype), 1 + num_draws, 0)
        whole[:, :, self._kept] = filled
        return whole

    def _impute(self, X: NDArray[Any], num_draws: int) -> Restored:
        with one_thread_in_workers():
            return impute(
                self.vae_,
                self._tensor(X),
                num_particles=self.num_particles,
                num_draws=num_draws,
                method=self.method,
                seed=self._seed_of(_IMPUTE),
            )

    def _checked(self, X: ArrayLike, **options: Any) -> NDArray[Any]:
        return super()._checked(X, ensure_all_finite="allow-nan", **options)

    def _checked_training(
        self, X: ArrayLike, y: Any, **options: Any
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        X = self._checked(X, **options)
        if options["reset"]:
            self._watch(X)
        return X[:, self._kept], None

    def _watch(self, X: NDArray[Any]) -> None:
        """Take note of which columns have values, and of which values are missing."""
        self._kept = ~np.isnan(X).all(0)
        self.indicator_ = MissingIndicator(error_on_new=False).fit(X) if self.add_indicator else None

    def _start(self, X: NDArray[Any]) -> None:
        if X.shape[1] == 0:
            raise ValueError("every value of X is missing: pass at least one column with values")
        super()._start(X)

    def _training_options(self) -> dict[str, Any]:
        return {"missing": "nan", "estimator": IWAE(num_particles=_BOUND)}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
