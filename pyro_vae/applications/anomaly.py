"""Detect anomalies with a trained VAE: scores, a threshold, p-values that hold their false-alarm rate.

Signs are scikit-learn's: a score is higher for more normal examples, a negative decision is an anomaly.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.applications.scores import LEARNED, Reference, compute_score, require_score
from pyro_vae.applications.statistics import element_log_likelihood, prepare, statistics
from pyro_vae.utils.isolation import derived_seed, evaluating
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE, require_vae

__all__ = ["AnomalyDetector", "conformal_threshold"]

_HALVES = 21  # a stream of random numbers
_AUTO = 0.05  # false-alarm rate of "auto"


class AnomalyDetector:
    r"""Anomaly detector on a trained VAE, with a threshold calibrated on examples it has not learned from.

    With sorted calibration scores :math:`s_{(1)} \le \dots \le s_{(n)}` and a false-alarm rate α, the
    threshold is :math:`s_{(k)}`, :math:`k = \lfloor \alpha (n + 1) \rfloor`. A new normal example scores
    below it with probability at most α, over the draw of calibration data and example, whatever the model.

    The default score, "statistics", is the density of four statistics of the VAE, E_q[log p(x|z)], the KL,
    the gap and the squared reconstruction error, among those of reference data. log p(x) alone may fail: a
    VAE of clothes gives digits a higher one than clothes.

    Args:
        vae: A trained VAE.
        score: A name in `applications.scores.SCORES`, or a function of (vae, x) that returns (N,), higher =
            more normal, each value a function of its own example.
        contamination: α, the share of normal examples that may be called anomalies, in (0, ½]; or "auto":
            5 %, or 1/(n + 1) where n < 19 calibration examples are too few to hold 5 %.
        num_particles: S, draws of z per example, with the same base noise for every example.
        seed: Seed of the base noise, and of the halving of the reference.

    Raises:
        TypeError: If `vae` is not a `VAE`.
        ValueError: If the score is unknown, or the contamination lies outside (0, ½].

    Attributes:
        offset_: The threshold, a score; set by `fit`.
        calibration_scores_: Sorted scores of the calibration data, (n,); set by `fit`.

    Source: for the p-values, H. Papadopoulos et al. (2002), Inductive confidence machines; S. Bates et al.
    (2023), Testing for outliers with conformal p-values, arXiv:2104.08279. For the score, W. Morningstar et
    al. (2021), Density of states estimation for out-of-distribution detection, arXiv:2006.09273.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> detector = AnomalyDetector(vae, contamination=0.05).fit(torch.randn(200, 6))
        >>> detector.predict(torch.cat([torch.zeros(1, 6), torch.full((1, 6), 20.0)]))
        tensor([ 1, -1])
    """

    def __init__(
        self,
        vae: VAE,
        *,
        score: str | Callable[[VAE, Any], Any] = "statistics",
        contamination: float | str = 0.05,
        num_particles: int = 50,
        seed: int = 0,
    ):
        require_vae("AnomalyDetector", vae)
        if not callable(score):
            require_score(score)
        if contamination != "auto" and not (
            isinstance(contamination, int | float) and 0 < contamination <= 0.5
        ):
            raise ValueError(
                f"contamination must lie in (0, 0.5], such as 0.05, or be 'auto'; got {contamination!r}: it "
                "is the share of normal examples that may be called anomalies"
            )
        require_count("num_particles", num_particles)
        require_count("seed", seed, minimum=0)
        self.vae = vae
        self.score = score
        self.contamination = contamination
        self.num_particles = num_particles
        self.seed = seed
        self.reference_: Reference | None = None
        self.calibration_scores_: Tensor | None = None
        self.offset_: float = math.nan

    def fit(self, reference: Any, calibration: Any = None) -> "AnomalyDetector":
        """Learn what is normal, without training the VAE.

        Pass examples that the VAE was not trained on: on its own training data the scores are too high, and
        new normal examples raise too many alarms.

        Args:
            reference: Normal examples (N, *event_shape), from which "statistics" and "typicality" learn.
            calibration: Normal examples that set the threshold. Without them the reference is split in two
                random halves, where the score learns from a reference; otherwise all of it calibrates.

        Returns:
            The detector.

        Raises:
            ValueError: If there are too few calibration examples for the contamination, 1/α − 1.
        """
        learns = self.score in LEARNED if isinstance(self.score, str) else False
        learned, scored = reference, calibration
        if calibration is None:
            learned, scored = self._halves(reference) if learns else (None, reference)
        if learns:
            self.reference_ = Reference.fit(
                statistics(self.vae, learned, num_particles=self.num_particles, seed=self.seed)
            )
        found = self.score_samples(scored)
        self.offset_ = conformal_threshold(found, self.contamination)
        self.calibration_scores_ = found.sort().values
        return self

    def _halves(self, reference: Any) -> tuple[Tensor, Tensor]:
        batches = prepare(self.vae, reference, seed=self.seed)
        if len(batches) < 4:
            raise ValueError(f"the reference needs at least 4 examples to be halved; got {len(batches)}")
        x = torch.cat(list(batches.in_order(1000)))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, _HALVES))
        order = torch.randperm(len(x), generator=generator)
        return x[order[: len(x) // 2]], x[order[len(x) // 2 :]]

    def score_samples(self, x: Any) -> Tensor:
        """Return the score of each example, (N,), float64: higher = more normal; nats for most scores.

        Raises:
            ValueError: If the data have another shape or lie outside the support, as NaN and ±inf do; or the
                score learns from a reference and `fit` was not called.
        """
        if callable(self.score):
            return self._call_score(x)
        options: dict[str, Any] = {"num_particles": self.num_particles, "seed": self.seed}
        return compute_score(self.score, self.vae, x, reference=self.reference_, **options)

    def _call_score(self, x: Any) -> Tensor:
        assert callable(self.score)
        batches = prepare(self.vae, x, seed=self.seed)
        whole = torch.cat(list(batches.in_order(1000)))
        with evaluating(self.vae, batches.device, self.seed):
            found = torch.as_tensor(self.score(self.vae, whole)).detach().double().cpu()
        if found.shape != (len(whole),) or not found.isfinite().all():
            raise ValueError(
                f"the score function must return {len(whole)} finite numbers, one per example; got shape "
                f"{tuple(found.shape)}" + (", not all finite" if found.shape == (len(whole),) else "")
            )
        return found

    def decision_function(self, x: Any) -> Tensor:
        """Return `score_samples(x)` − `offset_`, (N,): negative = anomaly. PyOD has the other sign."""
        self._require_fit()
        return self.score_samples(x) - self.offset_

    def predict(self, x: Any) -> Tensor:
        """Return −1 for anomalies and +1 for the others, (N,)."""
        return torch.where(self.decision_function(x) < 0, -1, 1)

    def p_value(self, x: Any) -> Tensor:
        """Return conformal p-values (1 + #{calibration scores ≤ score}) / (n + 1), (N,).

        For a new normal example P(p ≤ α) ≤ α, over the draw of calibration data and example.
        """
        calibration = self._require_fit()
        at_most = torch.searchsorted(calibration, self.score_samples(x), right=True)
        return (1 + at_most).double() / (len(calibration) + 1)

    def explain(self, x: Any) -> Tensor:
        """Return E_q[log p(x_d|z)] per element, (N, *event_shape), in nats: low where x is surprising.

        The sum over an example's elements is its score "reconstruction", the part of the ELBO that belongs to
        elements. `plots.heat_map` draws it over images.

        Raises:
            ValueError: If the likelihood's elements are not independent.
        """
        return element_log_likelihood(self.vae, x, num_particles=self.num_particles, seed=self.seed)

    def _require_fit(self) -> Tensor:
        if self.calibration_scores_ is None:
            raise ValueError("the detector has no threshold yet: call fit(reference) with normal data first")
        return self.calibration_scores_


def conformal_threshold(scores: Tensor, contamination: float | str) -> float:
    r"""Return the threshold below which a new normal example scores with probability at most α.

    .. math:: s_{(k)}, \qquad k = \lfloor \alpha (n + 1) \rfloor

    Args:
        scores: Scores of normal examples that nothing was learned from, (n,).
        contamination: α, or "auto"; see `AnomalyDetector`.

    Raises:
        ValueError: If n < 1/α − 1, so that k = 0.

    Example:
        >>> scores = torch.arange(1.0, 60.0)  # 1 to 59
        >>> conformal_threshold(scores, 0.1), conformal_threshold(scores, "auto")
        (6.0, 3.0)
    """
    rate = max(_AUTO, 1 / (len(scores) + 1)) if isinstance(contamination, str) else contamination
    rank = math.floor(rate * (len(scores) + 1) + 1e-9)
    if rank < 1:
        raise ValueError(
            f"{len(scores)} calibration examples cannot hold a false-alarm rate of {rate}: pass at least "
            f"{math.ceil(1 / rate) - 1}, or a higher contamination"
        )
    return float(scores.sort().values[rank - 1])
