"""Outliers of a table by the density of a VAE."""

import dataclasses
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import OutlierMixin
from sklearn.utils import _safe_indexing
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _num_samples, check_is_fitted

from pyro_vae.applications.anomaly import conformal_threshold
from pyro_vae.applications.sklearn.density import DensityEstimator

__all__ = ["VAEOutlierDetector"]

_HELD_OUT, _ENOUGH = 0.2, 19  # share and number of the rows that set the threshold with "auto"; 19 hold 5 %


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class VAEOutlierDetector(OutlierMixin, DensityEstimator):
    r"""Outliers as rows of low density under a VAE.

    .. math:: \mathrm{decision}(x) = \log p(x) - \mathrm{offset}, \qquad \mathrm{predict} = \pm 1

    Signs are scikit-learn's: `score_samples` is higher for normal rows, `decision_function` negative and
    `predict` −1 for outliers. The threshold is a quantile of the training rows' own scores, which are higher
    than those of new rows: more than `contamination` of new normal rows may be flagged. With "auto" a fifth
    of the rows (at least 19, at most half) is held out from training, always the same ones, and sets the
    threshold: new normal rows are flagged with probability 0.05 at most, see `AnomalyDetector`. `calibrate`
    sets it by other rows.

    On images, log p(x) is a poor score for outliers of another kind: simple images are likely under any VAE.

    Args:
        n_components: K, the number of latent dimensions.
        contamination: Fraction of the training rows below the threshold, in (0, 0.5], or "auto".
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

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **DensityEstimator._parameter_constraints,
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
    }

    contamination: float | str = 0.1

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train on X (N, D), N ≥ 2, or 4 with "auto", and set the threshold; y is ignored."""
        train, held_out = self._split(X) if self.contamination == "auto" else (X, X)
        with self._unchanged_on_error():
            super().fit(train, y)
            return self._set_threshold(held_out)

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train one epoch on X, and set the threshold by X; with "auto", `calibrate` sets it."""
        with self._unchanged_on_error():
            super().partial_fit(X, y)
            if self.contamination != "auto":
                return self._set_threshold(X)
            self.__dict__.pop("offset_", None)  # of an earlier state of the VAE
            return self

    def calibrate(self, X: ArrayLike) -> Self:
        """Set the threshold by X (N, D), such as normal rows that were held out; trains nothing."""
        self._validate_params()
        return self._set_threshold(X)

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
        """Return `score_samples(X)` − `offset_`, (N,), in nats; negative for outliers."""
        check_is_fitted(self, "offset_", msg="This %(name)s has no threshold yet: call fit, or calibrate(X)")
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return −1 for outliers and 1 for the other rows, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _split(self, X: ArrayLike) -> tuple[Any, Any]:
        """Return the rows to train on and those that set the threshold, of the kind of X."""
        count = _num_samples(X)
        if count < 4:
            raise ValueError(f'contamination="auto" needs at least 4 samples (rows); got {count}')
        held_out = min(max(round(_HELD_OUT * count), _ENOUGH), count // 2)
        order = np.random.default_rng(0).permutation(count)  # the same rows if training continues
        return _safe_indexing(X, np.sort(order[held_out:])), _safe_indexing(X, np.sort(order[:held_out]))

    def _set_threshold(self, X: ArrayLike) -> Self:
        scores = self.score_samples(X)
        if isinstance(self.contamination, str):
            self.offset_ = conformal_threshold(torch.from_numpy(scores), self.contamination)
        else:
            self.offset_ = float(np.percentile(scores, 100 * self.contamination))
        return self
