"""Variational autoencoders with a context y: given for each example, or a class that is missing for most.

`ConditionalVAE`: y is given, and not modelled.

    model(x, y):  plate("data") → z ~ prior(y) → x ~ likelihood(z, y), observed
    guide(x, y):  plate("data") → z ~ posterior(x, y)

`SemiSupervisedVAE`: y is a class, −1 where it is missing.

    model(x, y):  plate("data") → y ~ p(y), observed if given → z ~ prior(y) → x ~ likelihood(z, y), observed
    guide(x, y):  plate("data") → y ~ classifier(x) if missing → z ~ posterior(x, y)

Notation: x (N, *event_shape), z (N, K), y (N, C), or classes (N,) of 0 … C − 1.
"""

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import Arguments, arguments
from pyro_vae.networks import as_context
from pyro_vae.utils.elements import check_observed
from pyro_vae.utils.isolation import evaluating, evaluation_mode, seed_generators
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.utils.validation import require_count, require_floating, require_tensor
from pyro_vae.vae import (
    VAE,
    check_event_shape,
    data_plate,
    emit_param_sites,
    explaining_nan,
    require_events,
    require_no_nan,
)

__all__ = ["ConditionalVAE", "SemiSupervisedVAE"]

_MISSING = -1
_READ = 4096  # rows read at once
_MAX_ROWS = 8192  # decoded at once

_Given = Tensor | None

logger = logging.getLogger("pyro_vae")


@rebuildable
class ConditionalVAE(VAE):
    r"""Conditional variational autoencoder: p(z|y) p(x|z, y) with guide q(z|x, y).

    .. math:: \mathrm{ELBO}(x, y) = E_q[\log p(x|z, y)] - \mathrm{KL}(q(z|x, y) \,\|\, p(z|y)) \le \log p(x|y)

    in nats per datum. `fit`, `evaluate` and all else take data (x, y). y is a context, not modelled: numbers
    (N, C), or classes (N,), which the library's parts encode as one-hot.

    Args:
        prior: Module that returns p(z|y), called with y, or p(z), called without, as its `forward` takes it.
        likelihood: Module from z (*, K) and y to p(x|z, y), such as those of `likelihoods` with
            `context_dim=C`.
        guide: Module from x and y to q(z|x, y), such as those of `guides` with `context_dim=C`.

    Raises:
        TypeError: If a part is not callable, or is a class or a distribution.
        ValueError: If prior and likelihood have different numbers of latent dimensions.

    Source: K. Sohn, H. Lee, X. Yan (2015), Learning structured output representation using deep conditional
    generative models, NeurIPS.

    Example:
        >>> from pyro_vae import fit, guides, likelihoods, priors
        >>> cvae = ConditionalVAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,), context_dim=3),
        ...     guide=guides.DiagonalNormal((6,), 2, context_dim=3),
        ... )
        >>> x, y = torch.randn(9, 6), torch.arange(9) % 3
        >>> history = fit(cvae, (x, y), epochs=1, progress=False)
        >>> cvae.sample(4, y=torch.tensor([0, 0, 1, 2])).shape, cvae.class_probabilities(x, 3).shape
        (torch.Size([4, 6]), torch.Size([9, 3]))
    """

    takes_context = True

    def __init__(self, *, prior: nn.Module, likelihood: nn.Module, guide: nn.Module):
        super().__init__(prior=prior, likelihood=likelihood, guide=guide)

    def model(  # type: ignore[override]
        self, x: Tensor, y: Tensor, *, observed: Tensor | None = None
    ) -> Tensor:
        """Run the generative model p(z|y) p(x|z, y) with x (N, *event_shape) observed; see `VAE.model`."""
        return super().model(x, y, observed=observed)

    def guide(  # type: ignore[override]
        self, x: Tensor, y: Tensor, *, observed: Tensor | None = None
    ) -> Tensor:
        """Run the guide q(z|x, y)."""
        return super().guide(x, y, observed=observed)

    def encode(  # type: ignore[override]
        self, x: Any, y: Any, *, observed: Any = None
    ) -> dist.Distribution:
        """Return q(z|x, y), with batch shape (N,) and event shape (K,); arguments as in `VAE.encode`."""
        return super().encode(x, y, observed=observed)

    def decode(self, z: Any, y: Any) -> dist.Distribution:
        """Return p(x|z, y), with batch shape (*,) and event shape `event_shape`, for z (*, K)."""
        return super().decode(z, y)

    def log_joint(self, x: Any, z: Any, y: Any, *, observed: Any = None) -> Tensor:  # type: ignore[override]
        """Return log p(x, z|y) = log p(x|z, y) + log p(z|y), (*, N), for z (*, N, K)."""
        return super().log_joint(x, z, y, observed=observed)

    def reconstruct(  # type: ignore[override]
        self, x: Any, y: Any, *, observed: Any = None
    ) -> Tensor:
        """Return E[x|z, y], (N, *event_shape), at the mean of q(z|x, y); see `VAE.reconstruct`."""
        return super().reconstruct(x, y, observed=observed)

    def p_z(self, *context: Tensor) -> dist.Distribution:
        """Return p(z|y), of batch shape () if the prior does not depend on y."""
        parameters = inspect.signature(self.prior.forward).parameters.values()
        takes_y = any(
            parameter.name == "y" or parameter.default is parameter.empty for parameter in parameters
        )
        if not takes_y or getattr(self.prior, "context_dim", None) == 0:
            return self.prior()
        return self.prior(*context)

    def check_data(self, batch: Any) -> None:
        """Raise as `VAE.check_data`, or if the parts cannot take y; names the first value that is wrong.

        Raises:
            ValueError: If y has another length or size, or a class is out of range.
        """
        (x, y, *_), _ = self._arguments(batch)
        if y is None:
            raise TypeError(f"a {type(self).__name__} takes x and y; got none for y")
        if len(y) != len(x) or (y.dim() > 1 and not y.is_floating_point()):
            raise ValueError(
                f"y must hold {len(x)} classes, shape ({len(x)},), or floating-point numbers, ({len(x)}, C); "
                f"got {y.dtype} {tuple(y.shape)}"
            )
        for part in (self.prior, self.likelihood, self.posterior):
            size = getattr(part, "context_dim", 0)
            if size:
                as_context(y, size, x.dtype)
        super().check_data(batch)

    @torch.no_grad()
    def class_log_evidence(
        self,
        x: Any,
        num_classes: int,
        *,
        observed: Any = None,
        num_particles: int = 50,
        seed: int = 0,
    ) -> Tensor:
        r"""Estimate log p(x|y) for each class y = 0 … C − 1, (N, C), in nats, by importance sampling.

        .. math:: \log \frac1S \sum_s \frac{p(x, z_s|y)}{q(z_s|x, y)}, \qquad z_s \sim q(z|x, y)

        All classes are given the same random numbers, which reduces the noise of their differences.

        Args:
            x: Data, (N, *event_shape).
            num_classes: C.
            observed: Where x is observed, bool (N, *event_shape); by default everywhere.
            num_particles: S, draws of z per example and class.
            seed: Non-negative integer from which every random number is derived.

        Raises:
            TypeError: If a count is not an integer, or x is not a floating-point tensor.
            ValueError: If a count is below 1, a part's context has another size than C, or x has another
                shape than the likelihood, or is NaN, or outside its support, where it is observed.
        """
        require_count("num_classes", num_classes)
        require_count("num_particles", num_particles)
        x, observed = self._as_tensor(x), self._as_tensor(observed)
        for part in (self.prior, self.likelihood, self.posterior):
            size = getattr(part, "context_dim", 0)
            if size not in (0, num_classes):
                raise ValueError(
                    f"num_classes must be {size}, the context_dim of the parts; got {num_classes}"
                )
        self._require_examples(x, observed)
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        super().check_data(Arguments((x, first), {"observed": observed}))
        parts = partial(_parts, x, observed, max(1, _MAX_ROWS // num_particles))
        estimate = partial(self._log_evidence, num_particles=num_particles, seed=seed)
        with evaluating(self, x.device, seed):
            columns = [
                torch.cat([estimate(part, label, observed=seen) for part, seen in parts()])
                for label in range(num_classes)
            ]
        return torch.stack(columns, -1)

    def _require_examples(self, x: Tensor, observed: Tensor | None) -> None:
        """Raise unless x holds examples (N, *event_shape), none of them NaN where it is observed."""
        self._require_events(x)
        if observed is not None:
            check_observed(x, observed)
        require_no_nan(x if observed is None else x.where(observed, 0.0))

    def _require_events(self, x: Tensor) -> None:
        require_floating("x", x)
        require_events(x, getattr(self.likelihood, "event_shape", x.shape[1:]))

    def _log_evidence(
        self, x: Tensor, label: int, *, observed: Tensor | None, num_particles: int, seed: int
    ) -> Tensor:
        y = torch.full((len(x),), label, device=x.device)
        seed_generators(x.device, seed)
        q = self.encode(x, y, observed=observed)
        z = q.rsample((num_particles,)) if q.has_rsample else q.sample((num_particles,))
        log_weight = self.log_joint(x, z, y, observed=observed) - q.log_prob(z)
        return log_weight.logsumexp(0) - math.log(num_particles)

    def class_probabilities(
        self,
        x: Any,
        num_classes: int,
        *,
        class_log_prior: Any = None,
        observed: Any = None,
        num_particles: int = 50,
        seed: int = 0,
    ) -> Tensor:
        r"""Classify by the generative model, :math:`p(y|x) \propto p(y) p(x|y)`, (N, C).

        Args:
            x: Data, (N, *event_shape).
            num_classes: C.
            class_log_prior: log p(y), (C,); by default all classes are equally likely.
            observed: As in `class_log_evidence`.
            num_particles: As in `class_log_evidence`.
            seed: As in `class_log_evidence`.

        Raises:
            ValueError: If `class_log_prior` has another shape, is NaN or +∞, or holds probabilities; or as
                `class_log_evidence`.
        """
        log_prior = 0.0 if class_log_prior is None else _as_log_prior(class_log_prior, num_classes)
        options: dict[str, Any] = {"observed": observed, "num_particles": num_particles, "seed": seed}
        scores = self.class_log_evidence(x, num_classes, **options)
        return (scores + torch.as_tensor(log_prior).to(scores)).softmax(-1)

    @torch.no_grad()
    def sample(self, num_samples: int, y: Any = None, *, mean: bool = False) -> Tensor:
        """Draw examples, (N, *event_shape), from the model given y: z ~ p(z|y), then x ~ p(x|z, y).

        Args:
            num_samples: Number of examples, N.
            y: Contexts, (N, C) or classes (N,).
            mean: Return E[x|z, y] instead of a draw of x, as is common for images.

        Raises:
            ValueError: If y is missing, or has another length than N.
        """
        require_count("num_samples", num_samples)
        y = self._as_tensor(y)
        if y is not None:
            require_tensor("y", y)
        if y is None or len(y) != num_samples:
            found = "none" if y is None else str(len(y))
            raise ValueError(f"y must hold one context for each of the {num_samples} samples; got {found}")
        p_z = self.p_z(y)
        z = p_z.sample() if p_z.batch_shape else p_z.sample((num_samples,))
        p = self.decode(z, y)
        return p.mean if mean else p.sample()


@rebuildable
class SemiSupervisedVAE(ConditionalVAE):
    r"""Variational autoencoder with a class y, missing for most examples: p(y) p(z|y) p(x|z, y), model M2.

    .. math::
        L(x, y) &= E_{q(z|x, y)}[\log p(x|z, y)] - \mathrm{KL}(q(z|x, y) \,\|\, p(z|y)) + \log p(y)
            \le \log p(x, y) \\
        U(x) &= \sum_y q(y|x) \, L(x, y) + H[q(y|x)] \le \log p(x)

    in nats per datum: a labelled example counts L, another one U, whose sum over the classes is exact
    (`TraceEnum_ELBO`, the default in `fit`). The classifier q(y|x) has no part in L. So that labels teach it,
    the gradient, but not the value, of every bound has a further term in training mode, α times the mean
    log q(y|x) of the labelled examples for each example.

    `fit` and `evaluate` take (x, y), with y = −1 where it is missing, as in scikit-learn; or x alone for
    none. In `fit` at least `labelled_share` of each batch is labelled: labelled examples are repeated, and
    weighted down, so that the expected loss is that of the data as they are.

    Args:
        prior: Module that returns p(z|y), or p(z), as in `ConditionalVAE`.
        likelihood: Module from z and y to p(x|z, y), such as those of `likelihoods` with `context_dim=C`.
        guide: Module from x and y to q(z|x, y), such as those of `guides` with `context_dim=C`.
        classifier: Module from x (N, *event_shape) to the logits of q(y|x), (N, C), such as `networks.MLP`.
        num_classes: C.
        class_prior: p(y), C positive numbers of sum 1; by default all equal.
        classification_weight: α. The weight of each labelled example is α N / N_labelled.
        labelled_share: Least share of labelled examples in a training batch, below 1.

    Raises:
        TypeError: If a part is not callable, or is a class or a distribution.
        ValueError: If numbers of dimensions or classes differ between parts, or a number is out of range.

    Source: D. P. Kingma, D. J. Rezende, S. Mohamed, M. Welling (2014), Semi-supervised learning with deep
    generative models, arXiv:1406.5298.

    Example:
        >>> from pyro_vae import fit, guides, likelihoods, networks, priors
        >>> vae = SemiSupervisedVAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,), context_dim=3),
        ...     guide=guides.DiagonalNormal((6,), 2, context_dim=3),
        ...     classifier=networks.MLP(6, 3),
        ...     num_classes=3,
        ... )
        >>> x, y = torch.randn(20, 6), torch.arange(20) % 3
        >>> y[5:] = -1  # missing
        >>> history = fit(vae, (x, y), epochs=1, batch_size=10, progress=False)
        >>> vae.predict_proba(x).shape, vae.sample(4).shape
        (torch.Size([20, 3]), torch.Size([4, 6]))
    """

    class_log_prior: Tensor

    def __init__(
        self,
        *,
        prior: nn.Module,
        likelihood: nn.Module,
        guide: nn.Module,
        classifier: nn.Module,
        num_classes: int,
        class_prior: Sequence[float] | None = None,
        classification_weight: float = 0.1,
        labelled_share: float = 0.1,
    ):
        super().__init__(prior=prior, likelihood=likelihood, guide=guide)
        require_count("num_classes", num_classes, minimum=2)
        for name, part in {"prior": prior, "likelihood": likelihood, "guide": guide}.items():
            size = getattr(part, "context_dim", None)
            if size not in (None, num_classes) and not (name == "prior" and size == 0):
                raise ValueError(f"the {name} has context_dim={size}; it must be num_classes, {num_classes}")
        if not classification_weight >= 0:
            raise ValueError(f"classification_weight must be at least 0; got {classification_weight}")
        if not 0 <= labelled_share < 1:
            raise ValueError(f"labelled_share must lie in [0, 1); got {labelled_share}")
        if isinstance(classifier, type) or not callable(classifier):
            raise TypeError(f"classifier must be a module from x to logits; got {classifier!r}")
        self.classifier = classifier
        self.num_classes = num_classes
        self.classification_weight = classification_weight
        self.labelled_share = labelled_share
        self.register_buffer("class_log_prior", _log_prior(class_prior, num_classes), persistent=False)

    def model(  # type: ignore[override]
        self, x: Tensor, y: _Given = None, weight: _Given = None, *, observed: _Given = None
    ) -> Tensor:
        """Run p(y) p(z|y) p(x|z, y) with x observed, and y where it is not missing.

        Args:
            x: Data, (N, *event_shape).
            y: Classes, (N,), −1 where missing; None if all are.
            weight: Positive weight of each example in a loss, (N,); by default 1. No bound depends on it.
            observed: Where x is observed, as in `VAE.model`. The classifier, too, sees 0 elsewhere.
        """
        given, labels = _given(x, y)
        x_seen = x if observed is None else torch.where(observed, x, 0.0)
        emit_param_sites(prior=self.prior, likelihood=self.likelihood)
        with data_plate(x), _weighted(weight):
            p_y = dist.Categorical(logits=self.class_log_prior)
            with poutine.mask(mask=given):
                pyro.sample("y_observed", p_y, obs=labels)
            with poutine.mask(mask=~given):
                label = torch.where(given, labels, pyro.sample("y_unobserved", p_y))
            z = pyro.sample("z", self.p_z(label))
            if self.training and self.classification_weight:
                self._teach_classifier(x_seen, given, labels, weight)
            p, x = self._observable(z, x, label, observed=observed)
            return pyro.sample("x", check_event_shape(p, x), obs=x)

    def guide(  # type: ignore[override]
        self, x: Tensor, y: _Given = None, weight: _Given = None, *, observed: _Given = None
    ) -> Tensor:
        """Run q(y|x) where y is missing, then q(z|x, y); arguments are those of the model."""
        given, labels = _given(x, y)
        x = x if observed is None else torch.where(observed, x, 0.0)
        emit_param_sites(posterior=self.posterior, classifier=self.classifier)
        with data_plate(x), _weighted(weight):
            # uniform where y is given: the draws of z there count equally, and without noise in the gradient
            q_y = dist.Categorical(logits=self.q_y(x).logits.masked_fill(given[:, None], 0.0))
            with poutine.mask(mask=~given):
                drawn = pyro.sample("y_unobserved", q_y, infer={"enumerate": "parallel"})
            q_z = self._call_posterior(x, torch.where(given, labels, drawn), observed=observed)
            if len(x) > 1 and drawn.shape[-1] == 1:  # all classes, (C, 1, ...), rather than draws (..., N)
                q_z = _with_shared_noise(q_z, -drawn.dim())
            return pyro.sample("z", q_z)

    def _teach_classifier(self, x: Tensor, given: Tensor, labels: Tensor, weight: Tensor | None) -> None:
        """Add α times the mean log q(y|x) of labelled examples per example, to the gradient of a bound alone.

        The factor has the value 0, is the same for all particles, and no latent variable depends on it, so
        that its gradient adds to that of any bound.
        """
        log_q = self.q_y(x).log_prob(labels)
        share = given.to(log_q.dtype).mean().clamp(min=0.5 / len(x))  # of a batch without labels, not 0
        log_q = log_q * given * (self.classification_weight / share)
        if weight is not None:
            log_q = log_q / weight  # which multiplies the site
        pyro.factor("classification", log_q - log_q.detach())

    def weights_by_share(self, x: Tensor, y: Tensor | None = None, *_: Any, **__: Any) -> bool:
        """Return whether the loss of an example depends on which others of its batch are labelled."""
        return bool(self.classification_weight) and not bool(_given(x, y)[0].all())

    def q_y(self, x: Any) -> dist.Distribution:
        """Return q(y|x), of batch shape (N,)."""
        x = self._as_tensor(x)
        self._require_events(x)
        logits = self.classifier(x)
        if logits.shape != (len(x), self.num_classes):
            raise ValueError(
                f"the classifier must return logits of shape (N, {self.num_classes}), one per class; got "
                f"{tuple(logits.shape)} for {len(x)} examples"
            )
        with explaining_nan(x):
            return dist.Categorical(logits=logits)

    def encode(  # type: ignore[override]
        self, x: Any, y: Any = None, *, observed: Any = None
    ) -> dist.Distribution:
        """Return q(z|x, y), with the most probable y where it is missing."""
        return super().encode(*self._filled(x, y, observed), observed=observed)

    def reconstruct(  # type: ignore[override]
        self, x: Any, y: Any = None, *, observed: Any = None
    ) -> Tensor:
        """Return E[x|z, y] at the mean of q(z|x, y), with the most probable y where it is missing."""
        with torch.no_grad():
            return super().reconstruct(*self._filled(x, y, observed), observed=observed)

    def _filled(self, x: Any, y: Any, observed: Any) -> tuple[Tensor, Tensor]:
        """Return x with 0 where it is missing, and y with the most probable class where that is."""
        x, y, observed = map(self._as_tensor, (x, y, observed))
        x = x if observed is None else torch.where(observed, x, 0.0)
        self._require_events(x)
        given, labels = _given(x, y)
        return x, torch.where(given, labels, self.q_y(x).probs.argmax(-1))

    @torch.no_grad()
    def predict_proba(self, x: Any, *, observed: Any = None) -> Tensor:
        """Return the classifier's q(y|x), (N, C), in evaluation mode.

        `class_probabilities` gives the model's own p(y|x) ∝ p(y) p(x|y) instead, which costs more.

        Args:
            x: Data, (N, *event_shape).
            observed: Where x is observed, bool (N, *event_shape); the classifier sees 0 elsewhere.

        Raises:
            TypeError: If x is not a floating-point tensor.
            ValueError: If x has another shape than the likelihood, or is NaN where it is observed.
        """
        x, observed = self._as_tensor(x), self._as_tensor(observed)
        self._require_examples(x, observed)
        with evaluation_mode(self):
            return self.q_y(x if observed is None else torch.where(observed, x, 0.0)).probs

    def class_probabilities(
        self,
        x: Any,
        num_classes: int | None = None,
        *,
        class_log_prior: Any = None,
        observed: Any = None,
        num_particles: int = 50,
        seed: int = 0,
    ) -> Tensor:
        """Classify by the model, p(y|x) ∝ p(y) p(x|y), (N, C), by default with its own p(y)."""
        if num_classes not in (None, self.num_classes):
            raise ValueError(f"num_classes must be that of the model, {self.num_classes}; got {num_classes}")
        return super().class_probabilities(
            x,
            self.num_classes,
            class_log_prior=self.class_log_prior if class_log_prior is None else class_log_prior,
            observed=observed,
            num_particles=num_particles,
            seed=seed,
        )

    @torch.no_grad()
    def sample(self, num_samples: int, y: Any = None, *, mean: bool = False) -> Tensor:
        """Draw examples given classes y (N,), or y ~ p(y); see `ConditionalVAE.sample`."""
        if y is None:
            require_count("num_samples", num_samples)
            y = dist.Categorical(logits=self.class_log_prior).sample((num_samples,))
        return super().sample(num_samples, y=y, mean=mean)

    def with_guide(self, guide: nn.Module) -> "SemiSupervisedVAE":  # type: ignore[override]
        """Return one with another q(z|x, y) that shares (does not copy) all else."""
        return type(self)(
            prior=self.prior,
            likelihood=self.likelihood,
            guide=guide,
            classifier=self.classifier,
            num_classes=self.num_classes,
            class_prior=self.class_log_prior.exp().tolist(),
            classification_weight=self.classification_weight,
            labelled_share=self.labelled_share,
        )

    def check_data(self, batch: Any) -> None:
        """Raise as `VAE.check_data`, or if y does not hold classes or −1.

        Raises:
            TypeError: If y does not hold integers.
            ValueError: If y has another shape than (N,), or a class is out of range; names the first such.
        """
        (x, y, _), observed = self._arguments(batch)
        _, labels = _given(x, y)
        outside = (labels < 0) | (labels >= self.num_classes)
        if outside.any():
            index = int(outside.nonzero()[0])
            raise ValueError(
                f"y[{index}] is {int(labels[index])}: classes must lie in 0 … {self.num_classes - 1}, or be "
                f"{_MISSING} where missing"
            )
        super().check_data(Arguments((x, labels), {"observed": observed}))

    def arrange(self, batches: Batches) -> Batches:
        """Return training data with `labelled_share` of labelled examples in each batch.

        Raises:
            ValueError: If no example is labelled.
        """
        with torch.no_grad():
            given = (self._arguments(batch) for batch in batches.in_order(_READ))
            parts = [torch.where(*_given(x, y), _MISSING).cpu() for (x, y, _), _ in given]
        y = torch.cat(parts)
        labelled = y != _MISSING
        if not labelled.any():
            raise ValueError(
                f"all classes are missing ({_MISSING}), so that those of the model would mean nothing: label "
                "some examples of each class, or use a VAE"
            )
        absent = sorted(set(range(self.num_classes)) - set(y[labelled].tolist()))
        if absent:
            logger.warning("no example of class %s is labelled", ", ".join(map(str, absent)))
        return batches if labelled.all() else batches.balanced(labelled, self.labelled_share)

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], Tensor | None]:
        args, kwargs = arguments(batch)
        try:
            bound = inspect.signature(self.model).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"a {type(self).__name__} takes (x, y), or x alone: {error}") from error
        bound.apply_defaults()
        return tuple(map(self._as_tensor, bound.args)), self._as_tensor(bound.kwargs["observed"])


def _parts(x: Tensor, observed: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield some rows at once of x, and of where it is observed."""
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield x[part], None if observed is None else observed[part]


def _as_log_prior(values: Any, num_classes: int) -> Tensor:
    """Return log p(y), (C,), up to a constant; raise for another shape, values, or for probabilities."""
    log_prior = torch.as_tensor(values)
    if log_prior.shape != (num_classes,):
        raise ValueError(f"class_log_prior must have shape ({num_classes},); got {tuple(log_prior.shape)}")
    if log_prior.isnan().any() or log_prior.isposinf().any() or log_prior.isneginf().all():
        raise ValueError(f"class_log_prior must hold logarithms of probabilities; got {log_prior.tolist()}")
    if (log_prior >= 0).all() and math.isclose(log_prior.sum(), 1, rel_tol=1e-5):
        raise ValueError(f"class_log_prior holds probabilities, {log_prior.tolist()}: pass their logarithms")
    return log_prior


def _given(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where y is given, (N,), and y with 0 where it is not."""
    if y is None:
        y = torch.full((len(x),), _MISSING, device=x.device)
    require_tensor("y", y)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        hint = ""
        if y.is_floating_point():
            hint = ": torch.where(y.isnan(), -1, y).long()" if y.isnan().any() else ": y.long()"
        raise TypeError(f"y must hold integers, classes or {_MISSING} where missing; got {y.dtype}{hint}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape ({len(x)},), a class for each example; got {tuple(y.shape)}")
    given = y != _MISSING
    return given, torch.where(given, y, 0).long()


class _SharedNoise(dist.Normal):
    """Normal whose draws have the same standard noise along one dimension of the batch."""

    def __init__(self, loc: Tensor, scale: Tensor, shared_dim: int):
        super().__init__(loc, scale)
        self.shared_dim = shared_dim

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_SharedNoise":
        return _SharedNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.shared_dim)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = list(self._extended_shape(torch.Size(sample_shape)))
        shape[self.shared_dim] = 1
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)


def _with_shared_noise(q: Any, dim: int) -> Any:
    """Return q(z|x, y) with the same noise for all classes along a dimension, if it is an independent normal.

    Each class has its law, and differences between classes, which teach the classifier, have less noise.
    """
    if not (isinstance(q, dist.Independent) and type(q.base_dist) is dist.Normal):
        return q
    event_dim = q.reinterpreted_batch_ndims
    return _SharedNoise(q.base_dist.loc, q.base_dist.scale, dim - event_dim).to_event(event_dim)


def _weighted(weight: Tensor | None) -> AbstractContextManager[Any]:
    return nullcontext() if weight is None else poutine.scale(scale=weight)


def _log_prior(probabilities: Sequence[float] | None, num_classes: int) -> Tensor:
    if probabilities is None:
        return torch.full((num_classes,), -math.log(num_classes))
    p = torch.tensor(list(probabilities), dtype=torch.float64)
    if p.shape != (num_classes,) or not (p > 0).all() or not math.isclose(p.sum(), 1, rel_tol=1e-5):
        raise ValueError(
            f"class_prior must hold {num_classes} positive numbers of sum 1; got {list(probabilities)}"
        )
    return p.log().to(torch.get_default_dtype())
