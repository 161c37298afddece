"""What the scikit-learn estimators share: parameters, units of the columns, building and training.

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
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyro_vae import likelihoods
from pyro_vae.applications.linear_start import NoisyNormal
from pyro_vae.guides import DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.training import History, fit
from pyro_vae.utils.isolation import derived_seed, evaluating, isolated_generators
from pyro_vae.vae import VAE, require_vae

__all__ = ["CPU", "FLOOR", "REAL", "FromVAE", "VAEEstimator", "event_shape_of", "one_thread_in_workers"]

CPU = torch.device("cpu")
FLOOR = 0.01  # smallest standard deviation of the noise, in units of `scale_`
REAL = ("normal", "student_t")  # likelihoods of real numbers, which are standardised
_BUILD, _TRAIN = 90, 91  # streams of random numbers
_LIKELIHOODS: dict[str, Callable[..., likelihoods.Likelihood]] = {
    "normal": lambda *sizes, **options: NoisyNormal(*sizes, floor=FLOOR, **options),
    "student_t": lambda *sizes, **options: likelihoods.StudentT(*sizes, min_scale=FLOOR, **options),
    "bernoulli": likelihoods.Bernoulli,
    "continuous_bernoulli": likelihoods.ContinuousBernoulli,
    "poisson": likelihoods.Poisson,
    "negative_binomial": likelihoods.NegativeBinomial,
}


# scikit-learn reads the parameters from the signature of __init__: a data class writes it, so that a subclass
# states its own parameters alone
@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class VAEEstimator(BaseEstimator):
    """Base of the estimators: a VAE inside, and the units of the columns around it; see `VAETransformer`."""

    n_components: int = dataclasses.field(default=2, kw_only=False)
    likelihood: str = "normal"
    standardize: bool = True
    hidden_layer_sizes: tuple[int, ...] = (256, 128)
    activation: str = "relu"
    learning_rate: float = 1e-3
    batch_size: int = 128
    max_epochs: int = 200
    early_stopping: bool = True
    validation_fraction: float = 0.1
    n_iter_no_change: int = 10
    warm_start: bool = False
    num_particles: int = 50
    vae_factory: Callable[..., VAE] | None = None
    random_state: int | np.random.RandomState | None = None
    verbose: bool = False

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "likelihood": [StrOptions(set(_LIKELIHOODS))],
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
            X, classes = self._checked_training(X, y, reset=not continues, ensure_min_samples=2)
            if not continues:
                self._start(X)
            held_out = self.validation_fraction if self.early_stopping else None
            self._train(X, classes, self.max_epochs, held_out)
        return self

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

    def _checked(self, X: ArrayLike, **options: Any) -> NDArray[Any]:
        return validate_data(self, X, dtype=[np.float64, np.float32], **options)

    def _checked_training(
        self, X: ArrayLike, y: Any, **options: Any
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return checked training data, and the numbers of their classes if the VAE takes them."""
        return self._checked(X, **options), None

    def _start(self, X: NDArray[Any]) -> None:
        """Choose centre and scale, and build the VAE."""
        self._trained_elsewhere = False
        self.offset_x_, self.scale_x_ = self._standard_units(X)
        seed = int(check_random_state(self.random_state).randint(2**31))
        dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        with isolated_generators(CPU, derived_seed(seed, _BUILD)), one_thread_in_workers():
            vae = self._build(self._standardized(X), seed, dtype).to(dtype)
        shape = event_shape_of(vae)
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

    def _standard_units(self, X: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return centre and scale of the values that are not NaN, (D,) or (1,), in float64."""
        if self.likelihood not in REAL and self.vae_factory is None:
            return np.zeros(1), np.ones(1)
        with np.errstate(over="ignore", invalid="ignore"):
            offset = np.asarray(np.nanmean(X, 0, dtype=np.float64))
            scale = np.asarray(np.nanstd(X, 0, dtype=np.float64))
            if not np.isfinite(scale).all():
                column = int((~np.isfinite(scale)).argmax())
                raise ValueError(f"the variance of column {column} of X overflows: divide X by a constant")
        rounding = 10 * np.finfo(X.dtype).eps * np.abs(offset)
        constant = scale <= rounding
        if not self.standardize:
            scale = np.sqrt(np.mean(np.where(constant, 0.0, scale) ** 2, keepdims=True))
            constant = scale == 0
        return offset, np.where(constant, 1.0, scale)

    def _build(self, x: NDArray[Any], seed: int, dtype: torch.dtype) -> VAE:
        """Build the VAE for standardised data."""
        vae = self._ask_factory(VAE, x.shape[1], self.n_components)
        return self._with_networks(x.shape[1]) if vae is None else vae

    def _ask_factory(self, kind: type[VAE], *sizes: int) -> VAE | None:
        """Return what `vae_factory` makes, or None without one."""
        if self.vae_factory is None:
            return None
        vae = self.vae_factory(*sizes)
        if not isinstance(vae, kind) or (kind is VAE and vae.takes_context):
            raise TypeError(f"vae_factory must return a pyro_vae.{kind.__name__}; got {type(vae).__name__}")
        return vae

    def _parts(self, features: int, **options: Any) -> dict[str, Any]:
        """Return prior, likelihood and guide, with options for the networks of both."""
        sizes = tuple(self.hidden_layer_sizes)
        of_likelihood = {**options, "hidden_features": sizes[::-1], "activation": self.activation}
        if self.likelihood == "normal":
            of_likelihood["variance"] = "per_element" if self.standardize else "shared"
        return {
            "prior": StandardNormal(self.n_components),
            "likelihood": _LIKELIHOODS[self.likelihood](self.n_components, (features,), **of_likelihood),
            "guide": DiagonalNormal(
                (features,), self.n_components, hidden_features=sizes, activation=self.activation, **options
            ),
        }

    def _with_networks(self, features: int) -> VAE:
        return VAE(**self._parts(features))

    def _training_options(self) -> dict[str, Any]:
        """Return keyword arguments of `fit` that depend on the kind of the estimator."""
        return {"binarize": "dynamic" if self._is_bernoulli() else None}

    def _require_range(self, X: NDArray[Any], *, has_classes: bool) -> None:
        """Raise ValueError if the likelihood is of bits, or of numbers in [0, 1], and X holds others."""
        if self.vae_factory is not None or "bernoulli" not in self.likelihood:
            return
        bits = has_classes and self.likelihood == "bernoulli"  # which are not drawn where there are classes
        outside = (X != 0) & (X != 1) if bits else (X < 0) | (X > 1)
        outside &= ~np.isnan(X)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise ValueError(
                f'likelihood="{self.likelihood}" takes {"0 and 1 here" if bits else "numbers in [0, 1]"}; '
                f"X[{row}, {column}] is {X[row, column]:.6g}: "
                + ("round X" if bits else "scale the columns, as MinMaxScaler(clip=True) does")
                + ', or set likelihood="normal"'
            )

    def _train(
        self, X: NDArray[Any], classes: NDArray[Any] | None, epochs: int, held_out: float | None
    ) -> None:
        self._require_range(X, has_classes=classes is not None)
        x = self._tensor(X)
        fraction = None
        count = 0
        if held_out is not None:
            count = min(max(1, round(held_out * len(x))), len(x) - 1)
            fraction = count / len(x)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        with one_thread_in_workers():
            history = fit(
                self.vae_,
                x if classes is None else (x, torch.from_numpy(classes)),
                epochs=epochs,
                batch_size=min(self.batch_size, len(x) - count),
                seed=self._seed_of(_TRAIN, self._fits),
                optimizer=lambda parameters: self._optimizer,
                validation=fraction,
                engine="traced",
                patience=self.n_iter_no_change if held_out is not None else None,
                progress=self.verbose,
                **self._training_options(),
            )
            self._summarise(x)
        done = len(self.history_)
        self.history_ += [dataclasses.replace(epoch, epoch=epoch.epoch + done) for epoch in history]
        self._fits += 1
        self.n_iter_ = len(self.history_)

    def _summarise(self, x: Tensor) -> None:
        """Set attributes that describe the trained VAE."""

    def _is_bernoulli(self) -> bool:
        return isinstance(self.vae_.likelihood, likelihoods.Bernoulli)

    def _seed_of(self, *key: int) -> int:
        return derived_seed(self._seed, *key)

    def _inside(self, X: ArrayLike) -> Tensor:
        """Check X against what was fitted, and return it as data of the VAE."""
        check_is_fitted(self)
        return self._tensor(self._checked(X, reset=False))

    def _tensor(self, X: NDArray[Any]) -> Tensor:
        dtype = next(self.vae_.parameters()).dtype
        return torch.tensor(self._standardized(X), dtype=dtype).reshape(len(X), *event_shape_of(self.vae_))

    def _standardized(self, X: NDArray[Any]) -> NDArray[Any]:
        """Return (X − offset) / scale, in float64."""
        return (X - self.offset_x_) / self.scale_x_

    def _outside(self, x: Tensor) -> NDArray[Any]:
        """Return data of the VAE in the units of X, (N, D)."""
        values = x.reshape(len(x), -1).numpy()
        return (values * self.scale_x_ + self.offset_x_).astype(values.dtype)


class FromVAE(VAEEstimator):
    """Estimators that a trained VAE can be put in."""

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
            >>> from pyro_vae.applications.sklearn import VAETransformer
            >>> vae = VAE(
            ...     prior=priors.StandardNormal(3),
            ...     likelihood=likelihoods.Normal(3, (4,)),
            ...     guide=guides.DiagonalNormal((4,), 3),
            ... )
            >>> VAETransformer.from_vae(vae).transform(np.zeros((5, 4))).shape
            (5, 3)
        """
        require_vae("from_vae", vae)
        event_shape = event_shape_of(vae)
        estimator = cls(vae.prior().event_shape[0], **parameters)
        estimator._validate_params()
        estimator.n_features_in_ = math.prod(event_shape)
        estimator.offset_x_, estimator.scale_x_ = np.zeros(1), np.ones(1)
        estimator._hold(vae, random_seed=check_random_state(estimator.random_state).randint(2**31))
        estimator._trained_elsewhere = True
        return estimator


def event_shape_of(vae: VAE) -> tuple[int, ...]:
    """Return the shape of one example."""
    shape = getattr(vae.likelihood, "event_shape", None)
    if shape is None:
        with evaluating(vae, CPU, 0):
            shape = vae.decode(vae.prior().sample((1,))).event_shape
    return tuple(shape)


@contextmanager
def one_thread_in_workers() -> Iterator[None]:
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
