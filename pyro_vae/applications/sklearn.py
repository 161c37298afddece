"""VAEs as scikit-learn estimators: features, densities and outliers of tables, in pipelines and searches.

Needs scikit-learn, the extra `pyro_vae[sklearn]`. Densities are in nats per row, in the units of X. Errors
are scikit-learn's own kinds: `NotFittedError`, and ValueError or TypeError for parameters and data.

Notation: X (N, D), rows and columns; K = n_components latent dimensions; x = (X − offset) / scale, the data
that the VAE inside is trained on.
"""

import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyro_vae import likelihoods
from pyro_vae.applications.linear_start import factor_analysis_vae
from pyro_vae.applications.shared_noise import draw_with_shared_noise
from pyro_vae.evaluation import evaluate
from pyro_vae.guides import DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.training import History, fit
from pyro_vae.utils.isolation import derived_seed, evaluating, isolated_generators
from pyro_vae.vae import VAE, require_vae

__all__ = ["VAEOutlierDetector", "VAETransformer", "log_evidence"]

_CPU = torch.device("cpu")
_BUILD, _TRAIN, _SCORE, _SAMPLE = 90, 91, 92, 93  # streams of random numbers
_FLOOR = 0.01  # smallest standard deviation of the noise, in units of `scale_`
_VALUES = 2**21  # decoded at once, at most
_SUMMARISED = 5000  # rows, at most, that the summaries of latent dimensions are computed from
_LIKELIHOODS: dict[str, Callable[..., likelihoods.Likelihood]] = {
    "bernoulli": likelihoods.Bernoulli,
    "continuous_bernoulli": likelihoods.ContinuousBernoulli,
    "poisson": likelihoods.Poisson,
    "negative_binomial": likelihoods.NegativeBinomial,
}


class _VAEEstimator(BaseEstimator):
    """Parameters, training and densities that the estimators share; see `VAETransformer`."""

    _parameter_constraints: ClassVar[dict[str, list]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "likelihood": [StrOptions({"normal", *_LIKELIHOODS})],
        "standardize": ["boolean"],
        "hidden_layer_sizes": ["array-like"],
        "activation": [StrOptions({"elu", "gelu", "leaky_relu", "relu", "silu", "softplus", "tanh"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "num_particles": [Interval(Integral, 1, None, closed="left")],
        "vae_factory": [callable, None],
        "random_state": ["random_state"],
        "verbose": ["boolean"],
    }

    def __init__(
        self,
        n_components: int = 2,
        *,
        likelihood: str = "normal",
        standardize: bool = True,
        hidden_layer_sizes: tuple[int, ...] = (256, 128),
        activation: str = "relu",
        learning_rate: float = 1e-3,
        batch_size: int = 128,
        max_epochs: int = 200,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        warm_start: bool = False,
        num_particles: int = 50,
        vae_factory: Callable[[int, int], VAE] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ):
        self.n_components = n_components
        self.likelihood = likelihood
        self.standardize = standardize
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.num_particles = num_particles
        self.vae_factory = vae_factory
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def from_vae(cls, vae: VAE, **parameters: Any) -> Self:
        """Return a fitted estimator around a trained VAE, which it uses as it is and does not copy.

        X is then what the VAE was trained on, an example a row. `fit` raises, unless `warm_start=True`.

        Args:
            vae: The VAE, on the CPU.
            parameters: Of the constructor, `n_components` excepted.

        Raises:
            TypeError: If `vae` is not a `VAE`.

        Example:
            >>> from pyro_vae import guides, priors
            >>> vae = VAE(
            ...     prior=priors.StandardNormal(3),
            ...     likelihood=likelihoods.Normal(3, (4,)),
            ...     guide=guides.DiagonalNormal((4,), 3),
            ... )
            >>> VAETransformer.from_vae(vae).transform(np.zeros((5, 4))).shape
            (5, 3)
        """
        require_vae("from_vae", vae)
        event_shape = _event_shape(vae)
        estimator = cls(vae.prior().event_shape[0], **parameters)
        estimator._validate_params()
        estimator.n_features_in_ = math.prod(event_shape)
        estimator.offset_x_, estimator.scale_x_ = np.zeros(1), np.ones(1)
        estimator._hold(vae, random_seed=check_random_state(estimator.random_state).randint(2**31))
        estimator._trained_elsewhere = True
        return estimator

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train on X (N, D), N ≥ 2; y is ignored. With `warm_start`, continue an earlier training."""
        self._validate_params()
        continues = self.warm_start and hasattr(self, "vae_")
        if getattr(self, "_trained_elsewhere", False) and not continues:
            raise ValueError(
                f"this {type(self).__name__} holds a VAE that was trained elsewhere, which fit would "
                "replace: set warm_start=True to train it further, or fit a clone of this estimator"
            )
        with self._unchanged_on_error():
            X = self._checked(X, reset=not continues, ensure_min_samples=2)
            if not continues:
                self._start(X)
            held_out = self.validation_fraction if self.early_stopping else None
            self._train(X, self.max_epochs, held_out)
        return self

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train one epoch on X; the first call sets the centre and scale of the columns."""
        self._validate_params()
        first = not hasattr(self, "vae_")
        with self._unchanged_on_error():
            X = self._checked(X, reset=first, ensure_min_samples=2 if first else 1)
            if first:
                self._start(X)
            self._train(X, 1, None)
        return self

    def score_samples(self, X: ArrayLike) -> NDArray:
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
        with _one_thread_in_workers():
            values = log_evidence(self.vae_, x, num_particles=self.num_particles, seed=self._seed_of(_SCORE))
        scale = np.broadcast_to(self.scale_x_, self.n_features_in_)
        return values.numpy() - np.log(scale.astype(np.float64)).sum()

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the mean of `score_samples` over the rows, in nats; higher is better."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> NDArray:
        """Draw rows (n_samples, D) from the model, noise included, in the units of X.

        Without `random_state` the draws are the same at each call.
        """
        check_is_fitted(self)
        seed = self._seed_of(_SAMPLE)
        if random_state is not None:
            seed = int(check_random_state(random_state).randint(2**31))
        with evaluating(self.vae_, _CPU, seed):
            return self._outside(self.vae_.sample(n_samples))

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Restore the attributes if a block fails, so that an unfitted estimator stays unfitted."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _checked(self, X: ArrayLike, *, reset: bool, ensure_min_samples: int = 1) -> NDArray:
        kinds = [np.float64, np.float32]
        return validate_data(self, X, reset=reset, dtype=kinds, ensure_min_samples=ensure_min_samples)

    def _start(self, X: NDArray) -> None:
        """Choose centre and scale, and build the VAE."""
        self._trained_elsewhere = False
        self.offset_x_, self.scale_x_ = self._standard_units(X)
        seed = int(check_random_state(self.random_state).randint(2**31))
        dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        with isolated_generators(_CPU, derived_seed(seed, _BUILD)), _one_thread_in_workers():
            vae = self._build(self._standardized(X), seed, dtype).to(dtype)
        shape = _event_shape(vae)
        if math.prod(shape) != X.shape[1]:
            raise ValueError(
                f"vae_factory returned a VAE of examples of shape {shape}, {math.prod(shape)} values; X has "
                f"{X.shape[1]} columns"
            )
        self._hold(vae, random_seed=seed)

    def _hold(self, vae: VAE, *, random_seed: int) -> None:
        self.vae_, self._seed = vae, int(random_seed)
        self._optimizer = torch.optim.Adam(vae.parameters(), self.learning_rate)
        self._fits = 0
        self.history_ = History()
        self.n_iter_ = 0

    def _standard_units(self, X: NDArray) -> tuple[NDArray, NDArray]:
        """Return centre and scale, (D,) or (1,), in float64."""
        if self.likelihood != "normal" and self.vae_factory is None:
            return np.zeros(1), np.ones(1)
        with np.errstate(over="ignore", invalid="ignore"):
            offset, scale = X.mean(0, dtype=np.float64), X.std(0, dtype=np.float64)
            if not np.isfinite(scale).all():
                column = int((~np.isfinite(scale)).argmax())
                raise ValueError(f"the variance of column {column} of X overflows: divide X by a constant")
        rounding = 10 * np.finfo(X.dtype).eps * np.abs(offset)
        constant = scale <= rounding
        if not self.standardize:
            scale = np.sqrt(np.mean(np.where(constant, 0.0, scale) ** 2, keepdims=True))
            constant = scale == 0
        return offset, np.where(constant, 1.0, scale)

    def _build(self, x: NDArray, seed: int, dtype: torch.dtype) -> VAE:
        features, sizes = x.shape[1], tuple(self.hidden_layer_sizes)
        if self.vae_factory is not None:
            vae = self.vae_factory(features, self.n_components)
            if not isinstance(vae, VAE) or vae.takes_context:
                raise TypeError(f"vae_factory must return a pyro_vae.VAE; got {type(vae).__name__}")
            return vae
        if self.likelihood == "normal":
            return factor_analysis_vae(
                x,
                self.n_components,
                hidden_features=sizes,
                activation=self.activation,
                floor=_FLOOR,
                variance="per_element" if self.standardize else "shared",
                dtype=dtype,
                seed=seed,
            )
        likelihood = _LIKELIHOODS[self.likelihood](
            self.n_components, (features,), hidden_features=sizes[::-1], activation=self.activation
        )
        guide = DiagonalNormal(
            (features,), self.n_components, hidden_features=sizes, activation=self.activation
        )
        return VAE(prior=StandardNormal(self.n_components), likelihood=likelihood, guide=guide)

    def _train(self, X: NDArray, epochs: int, held_out: float | None) -> None:
        x = self._tensor(X)
        fraction = None
        count = 0
        if held_out is not None:
            count = min(max(1, round(held_out * len(x))), len(x) - 1)
            fraction = count / len(x)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        with _one_thread_in_workers():
            history = fit(
                self.vae_,
                x,
                epochs=epochs,
                batch_size=min(self.batch_size, len(x) - count),
                seed=self._seed_of(_TRAIN, self._fits),
                optimizer=lambda parameters: self._optimizer,
                validation=fraction,
                binarize="dynamic" if self._is_bernoulli() else None,
                engine="traced",
                patience=self.n_iter_no_change if held_out is not None else None,
                progress=self.verbose,
            )
            self._summarise(x[:_SUMMARISED])
        done = len(self.history_)
        self.history_ += [dataclasses.replace(epoch, epoch=epoch.epoch + done) for epoch in history]
        self._fits += 1
        self.n_iter_ = len(self.history_)

    def _is_bernoulli(self) -> bool:
        return isinstance(self.vae_.likelihood, likelihoods.Bernoulli)

    def _summarise(self, x: Tensor) -> None:
        """Summarise the latent dimensions; see `evaluate`."""
        binarize = "threshold" if self._is_bernoulli() else None
        report = evaluate(
            self.vae_,
            x,
            num_particles=1,
            aggregate_size=0,
            seed=self._seed,
            binarize=binarize,
            progress=False,
        )
        self.kl_per_dimension_ = report.kl_per_dimension.numpy()
        self.active_units_ = int(report.active_units)

    def _seed_of(self, *key: int) -> int:
        return derived_seed(self._seed, *key)

    def _inside(self, X: ArrayLike) -> Tensor:
        """Check X against what was fitted, and return it as data of the VAE."""
        check_is_fitted(self)
        return self._tensor(self._checked(X, reset=False))

    def _tensor(self, X: NDArray) -> Tensor:
        dtype = next(self.vae_.parameters()).dtype
        return torch.tensor(self._standardized(X), dtype=dtype).reshape(len(X), *_event_shape(self.vae_))

    def _standardized(self, X: NDArray) -> NDArray:
        """Return (X − offset) / scale, in float64."""
        return (X - self.offset_x_) / self.scale_x_

    def _outside(self, x: Tensor) -> NDArray:
        """Return data of the VAE in the units of X, (N, D)."""
        values = x.reshape(len(x), -1).numpy()
        return (values * self.scale_x_ + self.offset_x_).astype(values.dtype)


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _VAEEstimator):
    r"""Features of the rows of a table by a VAE: a nonlinear factor analysis with a density.

    .. math:: p(x) = \int N(z; 0, I) \, p(x|z) \, dz, \qquad \mathrm{transform}(x) = E_q[z|x]

    With `likelihood="normal"` the networks are a linear map plus a perceptron that starts at zero, and
    training starts at the factor analysis of X (`standardize=True`: each column has its own unit and noise),
    or at its probabilistic principal components (`standardize=False`: all columns have one unit and one
    noise, as pixels do). On few rows the model thus stays close to the linear one. Other likelihoods start at
    random. The results depend on `random_state` and the data alone. Worker processes use one thread.

    Args:
        n_components: K, the number of latent dimensions.
        likelihood: "normal", for any real numbers; "bernoulli" for 0 and 1, or for probabilities, of which
            each epoch draws bits; "continuous_bernoulli" for [0, 1]; "poisson" or "negative_binomial" for
            counts. X is standardised for "normal" alone.
        standardize: Divide each column by its standard deviation; else all by one number.
        hidden_layer_sizes: Widths of the hidden layers of the guide; those of the likelihood are in reverse.
        activation: As in `networks.MLP`.
        learning_rate: Of Adam.
        batch_size: Rows per step.
        max_epochs: Largest number of passes over X, of each `fit`.
        early_stopping: Hold out rows, stop when their ELBO no longer improves, and return to the best epoch.
        validation_fraction: Fraction of the rows held out.
        n_iter_no_change: Epochs without improvement before stopping.
        warm_start: Let `fit` continue, from parameters, optimiser state, centre and scale of the last one.
        num_particles: S, draws per row of `score_samples`.
        vae_factory: A function of a module, so that it pickles, from (D, K) to a `VAE` of standardised rows
            (raw with `standardize=False` up to centre and one scale); replaces likelihood and layers.
        random_state: Seed, or generator, of every random number.
        verbose: Show a progress bar.

    Attributes:
        vae_: The trained `VAE`, of (X − offset_x_) / scale_x_.
        offset_x_: Centre of the columns.
        scale_x_: Scale of the columns.
        history_: `History` of all epochs; its values are nats per row in standardised units.
        n_iter_: Number of epochs.
        kl_per_dimension_: KL(q(z_k|x) ‖ p(z_k)), mean over the rows of the last `fit`, nats, (K,).
        active_units_: Number of latent dimensions in use, with Var(E_q[z_k]) > 0.01.
        n_features_in_: D.
        feature_names_in_: Names of the columns, if X was a data frame.

    Source: D. P. Kingma, M. Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(60, 4)) @ np.diag([1.0, 10.0, 100.0, 0.1])
        >>> model = VAETransformer(2, max_epochs=3, random_state=0).fit(X)
        >>> Z = model.transform(X)
        >>> Z.shape, model.inverse_transform(Z).shape, model.score_samples(X).shape
        ((60, 2), (60, 4), (60,))
    """

    def transform(self, X: ArrayLike) -> NDArray:
        """Return the means of q(z|x), (N, K), in the dtype of X."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        x = self._tensor(X)
        with evaluating(self.vae_, _CPU, self._seed_of(_SCORE)), _one_thread_in_workers():
            means = [_mean(self.vae_.encode(part)) for part in x.split(_rows(x))]
        return torch.cat(means).numpy().astype(X.dtype)

    def inverse_transform(self, X: ArrayLike) -> NDArray:
        """Return the means of p(x|z), (N, D), in the units of the data, for latent vectors X (N, K)."""
        check_is_fitted(self)
        Z = check_array(X, dtype=[np.float64, np.float32])
        if Z.shape[1] != self._n_features_out:
            raise ValueError(
                f"inverse_transform takes rows of {self._n_features_out} latent values, as transform returns "
                f"them; got {Z.shape[1]} columns"
            )
        z = torch.tensor(Z, dtype=next(self.vae_.parameters()).dtype)
        with evaluating(self.vae_, _CPU, self._seed_of(_SCORE)), _one_thread_in_workers():
            x = [self.vae_.decode(part).mean for part in z.split(max(1, _VALUES // self.n_features_in_))]
        return self._outside(torch.cat(x)).astype(Z.dtype)

    @property
    def _n_features_out(self) -> int:
        return self.vae_.prior().event_shape[0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class VAEOutlierDetector(OutlierMixin, _VAEEstimator):
    r"""Outliers as rows of low density under a VAE.

    .. math:: \mathrm{decision}(x) = \log p(x) - \mathrm{offset}, \qquad \mathrm{predict} = \pm 1

    Signs are scikit-learn's: `score_samples` is higher for normal rows, `decision_function` negative and
    `predict` −1 for outliers. The threshold is a quantile of the training rows' own scores, which are higher
    than those of new rows: more than `contamination` of new normal rows may be flagged. `calibrate` sets it
    by other rows.

    On images, log p(x) is a poor score for outliers of another kind: simple images are likely under any VAE.

    Args:
        n_components: K, the number of latent dimensions.
        contamination: Fraction of the training rows below the threshold, in (0, 0.5].
        parameters: The others of `VAETransformer`.

    Attributes:
        offset_: The threshold, in nats.
        vae_: The trained `VAE`; for the other attributes see `VAETransformer`.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(60, 4))
        >>> detector = VAEOutlierDetector(max_epochs=3, random_state=0).fit(X)
        >>> detector.predict([[0, 0, 0, 0], [9, -9, 9, 9]])
        array([ 1, -1])
    """

    _parameter_constraints: ClassVar[dict[str, list]] = {
        **_VAEEstimator._parameter_constraints,
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
    }

    def __init__(
        self,
        n_components: int = 2,
        *,
        contamination: float = 0.1,
        likelihood: str = "normal",
        standardize: bool = True,
        hidden_layer_sizes: tuple[int, ...] = (256, 128),
        activation: str = "relu",
        learning_rate: float = 1e-3,
        batch_size: int = 128,
        max_epochs: int = 200,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        warm_start: bool = False,
        num_particles: int = 50,
        vae_factory: Callable[[int, int], VAE] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ):
        super().__init__(
            n_components,
            likelihood=likelihood,
            standardize=standardize,
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_epochs=max_epochs,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            warm_start=warm_start,
            num_particles=num_particles,
            vae_factory=vae_factory,
            random_state=random_state,
            verbose=verbose,
        )
        self.contamination = contamination

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train on X (N, D), N ≥ 2, and set the threshold; y is ignored."""
        with self._unchanged_on_error():
            super().fit(X, y)
            return self._set_threshold(X)

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train one epoch on X, and set the threshold by X."""
        with self._unchanged_on_error():
            super().partial_fit(X, y)
            return self._set_threshold(X)

    def calibrate(self, X: ArrayLike) -> Self:
        """Set the threshold by X (N, D), such as normal rows that were held out; trains nothing."""
        self._validate_params()
        return self._set_threshold(X)

    def decision_function(self, X: ArrayLike) -> NDArray:
        """Return `score_samples(X)` − `offset_`, (N,), in nats; negative for outliers."""
        check_is_fitted(self, "offset_", msg="This %(name)s has no threshold yet: call fit, or calibrate(X)")
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> NDArray:
        """Return −1 for outliers and 1 for the other rows, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _set_threshold(self, X: ArrayLike) -> Self:
        self.offset_ = float(np.percentile(self.score_samples(X), 100 * self.contamination))
        return self


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
        >>> from pyro_vae import guides, priors
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
    with evaluating(vae, _CPU, seed):
        for part in x.split(_rows(x, num_particles)):
            _, z, log_guide = draw_with_shared_noise(vae, part, num_particles, seed=seed)
            log_weight = vae.log_joint(part, z) - log_guide
            values.append(log_weight.double().logsumexp(0) - math.log(num_particles))
    return torch.cat(values)


def _rows(x: Tensor, num_particles: int = 1) -> int:
    """Return how many examples are run at once."""
    return max(1, _VALUES // (num_particles * max(1, math.prod(x.shape[1:]))))


def _event_shape(vae: VAE) -> tuple[int, ...]:
    shape = getattr(vae.likelihood, "event_shape", None)
    if shape is None:
        with evaluating(vae, _CPU, 0):
            shape = vae.decode(vae.prior().sample((1,))).event_shape
    return tuple(shape)


def _mean(q: Any) -> Tensor:
    try:
        return q.mean
    except NotImplementedError as error:
        raise ValueError(
            f"the guide's {type(q).__name__} has no mean in closed form, which transform returns: use a "
            "guide that has one, such as guides.DiagonalNormal"
        ) from error


@contextmanager
def _one_thread_in_workers() -> Iterator[None]:
    """Use one thread in a block, if this is a worker process: the workers share the cores."""
    threads = torch.get_num_threads()
    in_worker = multiprocessing.parent_process() is not None
    try:
        if in_worker:
            torch.set_num_threads(1)
        yield
    finally:
        if in_worker:
            torch.set_num_threads(threads)
