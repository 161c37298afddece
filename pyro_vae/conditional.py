"""Conditional variational autoencoder: model p(z|y) p(x|z, y) and guide q(z|x, y), given a context y.

    model(x, y):  plate("data") → z ~ prior(y) → x ~ likelihood(z, y), observed
    guide(x, y):  plate("data") → z ~ posterior(x, y)

Notation: x (N, *event_shape), z (N, K), y (N, C), or classes (N,) of C.
"""

import inspect
import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.networks import as_context
from pyro_vae.utils.isolation import evaluating, seed_generators
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE

__all__ = ["ConditionalVAE"]

_MAX_ROWS = 8192  # decoded at once


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
        self, x: Tensor, num_classes: int, *, num_particles: int = 50, seed: int = 0
    ) -> Tensor:
        r"""Estimate log p(x|y) for each class y = 0 … C − 1, (N, C), in nats, by importance sampling.

        .. math:: \log \frac1S \sum_s \frac{p(x, z_s|y)}{q(z_s|x, y)}, \qquad z_s \sim q(z|x, y)

        All classes are given the same random numbers, which reduces the noise of their differences.

        Args:
            x: Data, (N, *event_shape).
            num_classes: C.
            num_particles: S, draws of z per example and class.
            seed: Non-negative integer from which every random number is derived.

        Raises:
            TypeError: If a count is not an integer.
            ValueError: If a count is below 1, or a part's context has another size than C.
        """
        require_count("num_classes", num_classes)
        require_count("num_particles", num_particles)
        rows = max(1, _MAX_ROWS // num_particles)
        with evaluating(self, x.device, seed):
            columns = [
                torch.cat([self._log_evidence(part, label, num_particles, seed) for part in x.split(rows)])
                for label in range(num_classes)
            ]
        return torch.stack(columns, -1)

    def _log_evidence(self, x: Tensor, label: int, num_particles: int, seed: int) -> Tensor:
        y = torch.full((len(x),), label, device=x.device)
        seed_generators(x.device, seed)
        q = self.encode(x, y)
        z = q.rsample((num_particles,)) if q.has_rsample else q.sample((num_particles,))
        log_weight = self.log_joint(x, z, y) - q.log_prob(z)
        return log_weight.logsumexp(0) - math.log(num_particles)

    def class_probabilities(
        self,
        x: Tensor,
        num_classes: int,
        *,
        class_log_prior: Tensor | None = None,
        num_particles: int = 50,
        seed: int = 0,
    ) -> Tensor:
        r"""Classify by the generative model, :math:`p(y|x) \propto p(y) p(x|y)`, (N, C).

        Args:
            x: Data, (N, *event_shape).
            num_classes: C.
            class_log_prior: log p(y), (C,); by default all classes are equally likely.
            num_particles: As in `class_log_evidence`.
            seed: As in `class_log_evidence`.

        Raises:
            ValueError: If `class_log_prior` has another shape; or as `class_log_evidence`.
        """
        scores = self.class_log_evidence(x, num_classes, num_particles=num_particles, seed=seed)
        if class_log_prior is not None:
            if class_log_prior.shape != (num_classes,):
                raise ValueError(
                    f"class_log_prior must have shape ({num_classes},); got {tuple(class_log_prior.shape)}"
                )
            scores = scores + class_log_prior
        return scores.softmax(-1)

    @torch.no_grad()
    def sample(self, num_samples: int, *, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draw examples, (N, *event_shape), from the model given y: z ~ p(z|y), then x ~ p(x|z, y).

        Args:
            num_samples: Number of examples, N.
            y: Contexts, (N, C) or classes (N,).
            mean: Return E[x|z, y] instead of a draw of x, as is common for images.

        Raises:
            ValueError: If y is missing, or has another length than N.
        """
        require_count("num_samples", num_samples)
        if y is None or len(y) != num_samples:
            found = "none" if y is None else str(len(y))
            raise ValueError(f"y must hold one context for each of the {num_samples} samples; got {found}")
        p_z = self.p_z(y)
        z = p_z.sample() if p_z.batch_shape else p_z.sample((num_samples,))
        p = self.decode(z, y)
        return p.mean if mean else p.sample()
