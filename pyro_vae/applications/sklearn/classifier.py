"""Classes of the rows of a table by a VAE that also learns from rows without a label."""

import dataclasses
import math
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils import _safe_indexing
from sklearn.utils._param_validation import Interval
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from pyro_vae.applications.sklearn.estimator import VAEEstimator, one_thread_in_workers
from pyro_vae.conditional import SemiSupervisedVAE
from pyro_vae.networks import MLP
from pyro_vae.vae import VAE

__all__ = ["VAEClassifier"]

_MISSING = -1


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class VAEClassifier(ClassifierMixin, VAEEstimator):
    r"""Classifier that learns from rows with and without a label: a semi-supervised VAE.

    .. math:: p(x, y, z) = p(y) \, N(z; 0, I) \, p(x|z, y), \qquad \mathrm{predict\_proba}(x) = q(y|x)

    A label of −1 is missing, as in scikit-learn's semi-supervised estimators, and so are None, NaN and
    `pandas.NA`; labels are numbers or strings, and an array of dtype object holds strings and marks. Rows
    without a label teach q(y|x) what the model thinks of them; p(y) is the frequency of the labels.
    `vae_.class_probabilities` gives the model's own p(y|x).

    Args:
        n_components: K, the number of latent dimensions.
        likelihood: As in `VAETransformer`, but "bernoulli" for 0 and 1 alone.
        classification_weight: α, the weight of log q(y|x) of the labelled rows; see `SemiSupervisedVAE`.
        early_stopping: Watches the bound of held-out rows, in which the classifier plays no part where a
            label is given.
        vae_factory: A function of a module from (D, K, C), C classes, to a `SemiSupervisedVAE`.
        parameters: The others of `VAETransformer`; `num_particles` plays no part.

    Attributes:
        classes_: The labels, sorted, (C,).
        vae_: The trained `SemiSupervisedVAE`; for the other attributes see `VAETransformer`.

    Source: D. P. Kingma, D. J. Rezende, S. Mohamed, M. Welling (2014), Semi-supervised learning with deep
    generative models, arXiv:1406.5298.

    Example:
        >>> y = np.arange(60) % 2
        >>> X = np.random.default_rng(0).normal(size=(60, 4)) + 4 * y[:, None]
        >>> labels = np.where(np.arange(60) < 10, y, -1)
        >>> model = VAEClassifier(learning_rate=0.01, max_epochs=50, random_state=0).fit(X, labels)
        >>> model.classes_, model.predict_proba(X).shape, model.score(X, y) > 0.9
        (array([0, 1]), (60, 2), True)
    """

    early_stopping: bool = False
    classification_weight: float = 0.1

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **VAEEstimator._parameter_constraints,
        "classification_weight": [Interval(Real, 0, None, closed="left")],
    }

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train on X (N, D), N ≥ 2, and labels y (N,), −1, None or NaN where missing.

        See `VAETransformer.fit`.

        Raises:
            ValueError: If y holds fewer than two classes, or, with `warm_start`, a new one; or if it is text
                in which a missing label has become "" or "-1".
        """
        return super().fit(X, y)

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Return q(y|x) of each class, (N, C), in the order of `classes_`."""
        x = self._inside(X)
        with one_thread_in_workers():
            assert isinstance(self.vae_, SemiSupervisedVAE)
            return self.vae_.predict_proba(x).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most probable label of each row, (N,)."""
        best = self.predict_proba(X).argmax(1)  # raises if not fitted
        return self.classes_[best]

    def score(self, X: ArrayLike, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy over the rows whose label is given."""
        labels = np.asarray(_with_missing_as_number(y))
        is_missing = np.full(len(labels), False) if labels.dtype.kind in "US" else labels == _MISSING
        if is_missing.any():
            given = np.flatnonzero(~is_missing)
            X, y = _safe_indexing(X, given), labels[given].tolist()
            sample_weight = None if sample_weight is None else np.asarray(sample_weight)[given]
        return float(super().score(X, y, sample_weight))

    def _checked_training(
        self, X: ArrayLike, y: Any, **options: Any
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        y = _with_missing_as_number(y)
        rows, y = validate_data(self, X, y, dtype=[np.float64, np.float32], **options)
        is_given = np.full(len(y), True) if y.dtype.kind in "US" else y != _MISSING
        labels = np.asarray(y[is_given].tolist())  # numbers or strings, also from dtype object
        check_classification_targets(labels)
        _require_no_mark_as_text(y)
        found = np.unique(labels)
        if options["reset"]:
            if len(found) < 2:
                raise ValueError(
                    f"y must hold at least 2 classes; got {found.tolist()}, and {(~is_given).sum()} times "
                    f"{_MISSING}, which means missing: give classes other numbers than {_MISSING}"
                )
            self.classes_ = found
            self._frequencies = np.unique(labels, return_counts=True)[1] / len(labels)
        new = sorted(set(found.tolist()) - set(self.classes_.tolist()))
        if new:
            raise ValueError(f"y has classes that were not in the first fit: {new}; set warm_start=False")
        codes = np.full(len(y), _MISSING)
        codes[is_given] = np.searchsorted(self.classes_, labels)
        return rows, codes

    def _training_options(self) -> dict[str, Any]:
        return {}  # no bits are drawn: fit does so for data of one argument alone

    def _build(self, x: NDArray[Any], seed: int, dtype: torch.dtype) -> VAE:
        features, classes = x.shape[1], len(self.classes_)
        vae = self._ask_factory(SemiSupervisedVAE, features, self.n_components, classes)
        if vae is not None:
            return vae
        return SemiSupervisedVAE(
            **self._parts(features, context_dim=classes),
            classifier=MLP(
                features,
                classes,
                hidden_features=tuple(self.hidden_layer_sizes),
                activation=self.activation,
            ),
            num_classes=classes,
            class_prior=self._frequencies.tolist(),
            classification_weight=self.classification_weight,
        )


def _with_missing_as_number(y: Any) -> Any:
    """Return labels with −1 for None, NaN and `pandas.NA`, or as they are if none is missing."""
    if isinstance(y, list) and any(isinstance(label, str) for label in y):
        y = np.asarray(y, dtype=object)  # else -1 and NaN would become text
    labels = np.asarray(y)
    if labels.ndim == 0 or labels.dtype.kind not in "fO":
        return y
    missing = np.isnan(labels) if labels.dtype.kind == "f" else _is_missing(labels).astype(bool)
    return np.where(missing, _MISSING, labels) if missing.any() else y


def _is_none_or_nan(label: Any) -> bool:
    try:
        return label is None or math.isnan(label)
    except TypeError:  # of text, and of pandas.NA
        return type(label).__name__ == "NAType"


_is_missing = np.frompyfunc(_is_none_or_nan, 1, 1)


def _require_no_mark_as_text(y: NDArray[Any]) -> None:
    """Raise if a mark of missing labels has become text, and would be a class."""
    texts = [label for label in set(y.tolist()) if isinstance(label, str)]
    wrong = [mark for mark in ("", str(_MISSING)) if mark in texts]
    if not wrong or (wrong == [str(_MISSING)] and all(map(_is_whole, texts))):
        return
    row = y.tolist().index(wrong[0])
    raise ValueError(
        f"y[{row}] is the text {wrong[0]!r}, which would be a class: if it means a missing "
        "label, mark it by None in an array of objects, as in numpy.where(given, y, None)"
    )


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdigit()
