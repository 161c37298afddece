"""Features of the rows of a table by a VAE."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pyro_vae.applications.sklearn.density import SCORE, DensityEstimator, rows_at_once
from pyro_vae.applications.sklearn.estimator import CPU, one_thread_in_workers
from pyro_vae.utils.isolation import evaluating

__all__ = ["VAETransformer"]


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityEstimator):
    r"""Features of the rows of a table by a VAE: a nonlinear factor analysis with a density.

    .. math:: p(x) = \int N(z; 0, I) \, p(x|z) \, dz, \qquad \mathrm{transform}(x) = E_q[z|x]

    With `likelihood="normal"` the networks are a linear map plus a perceptron that starts at zero, and
    training starts at the factor analysis of X (`standardize=True`: each column has its own unit and noise),
    or at its probabilistic principal components (`standardize=False`: all columns have one unit and one
    noise, as pixels do). On few rows the model thus stays close to the linear one. Other likelihoods start at
    random. The results depend on `random_state` and the data alone. Worker processes use one thread.

    Args:
        n_components: K, the number of latent dimensions.
        likelihood: "normal", or "student_t" with heavy tails, for any real numbers, which are standardised;
            "bernoulli" for 0 and 1, or for probabilities, of which each epoch draws bits;
            "continuous_bernoulli" for [0, 1]; "poisson" or "negative_binomial" for counts.
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

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """Return the means of q(z|x), (N, K), in the dtype of X."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        x = self._tensor(X)
        with evaluating(self.vae_, CPU, self._seed_of(SCORE)), one_thread_in_workers():
            means = [_mean(self.vae_.encode(part)) for part in x.split(rows_at_once(x))]
        return torch.cat(means).numpy().astype(X.dtype)

    def inverse_transform(self, X: ArrayLike) -> NDArray[Any]:
        """Return the means of p(x|z), (N, D), in the units of the data, for latent vectors X (N, K)."""
        check_is_fitted(self)
        Z = check_array(X, dtype=[np.float64, np.float32])
        if Z.shape[1] != self._n_features_out:
            raise ValueError(
                f"inverse_transform takes rows of {self._n_features_out} latent values, as transform returns "
                f"them; got {Z.shape[1]} columns"
            )
        z = torch.tensor(Z, dtype=next(self.vae_.parameters()).dtype)
        with evaluating(self.vae_, CPU, self._seed_of(SCORE)), one_thread_in_workers():
            x = [self.vae_.decode(part).mean for part in z.split(rows_at_once(z, self.n_features_in_))]
        return self._outside(torch.cat(x)).astype(Z.dtype)

    @property
    def _n_features_out(self) -> int:
        return self.vae_.prior().event_shape[0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _mean(q: Any) -> Tensor:
    try:
        return q.mean
    except NotImplementedError as error:
        raise ValueError(
            f"the guide's {type(q).__name__} has no mean in closed form, which transform returns: use a "
            "guide that has one, such as guides.DiagonalNormal"
        ) from error
