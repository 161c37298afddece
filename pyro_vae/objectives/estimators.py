"""Bounds on the evidence and estimators of their gradients: reductions of the terms of one run.

Notation: S particles in each of G groups, N examples per batch; w = p(x|z) p(z) / q(z|x), one weight per
particle and example; θ are the parameters of the model p, φ those of the guide q. Bounds are in nats per
datum.

A number of particles or groups that is not an integer raises TypeError, one below the minimum ValueError.
Estimators other than `VIMCO` raise ValueError when differentiated if a site of the guide is not
reparameterised. `max_plate_nesting` is the number of batch dimensions of the pair's own plates; see `terms`.

A new estimator derives from `Estimator` and implements `bound`, and `surrogate` if the gradient is not that
of the bound's estimate.
"""

import copy
import inspect
import math
from abc import abstractmethod
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vae.objectives.log_terms import Terms, terms
from pyro_vae.objectives.sites import Program
from pyro_vae.utils.validation import require_count, require_number

__all__ = [
    "CIWAE",
    "IWAE",
    "PIWAE",
    "STL",
    "VIMCO",
    "DReG",
    "Estimator",
    "Loss",
    "Renyi",
    "family",
    "label",
    "total_loss",
    "with_gradient_of",
]


class Loss(ELBO):
    """Base class of `pyro.infer.ELBO`s defined by their `differentiable_loss`."""

    @abstractmethod
    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the loss, shape (), with its gradient."""

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimate the loss and accumulate its gradient in the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return warn_if_nan(float(loss.detach()), "loss")

    def _get_trace(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        raise NotImplementedError("traces are not available; see `terms`")


class Estimator(Loss):
    """Base class of estimators that reduce terms to losses.

    Args:
        num_particles: S, per group.
        num_groups: G, number of independent groups of particles.
        max_plate_nesting: Number of batch dimensions of the pair's own plates.
    """

    def __init__(self, num_particles: int = 1, num_groups: int = 1, *, max_plate_nesting: int = 1):
        require_count("num_particles", num_particles)
        require_count("num_groups", num_groups)
        require_count("max_plate_nesting", max_plate_nesting)
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self.num_groups = num_groups

    @property
    def is_elbo(self) -> bool:
        """Whether the bound is the ELBO: that of groups of one particle is."""
        return self.num_particles == 1

    @abstractmethod
    def bound(self, terms: Terms) -> Tensor:
        """Reduce terms (S · G, N) to an estimate of the bound, (N,), in nats per datum."""

    def surrogate(self, terms: Terms) -> Tensor:
        """Reduce terms (S · G, N) to a tensor, (N,), with the estimator's gradient; by default the bound."""
        self._require_reparameterised(terms)
        return self.bound(terms)

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimate the loss, the negative bound summed over the batch, in nats."""
        terms = self.terms(model, guide, *args, **kwargs)
        return warn_if_nan(float(total_loss(terms, self.bound(terms))), "loss")

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the loss, shape (), with the value of the bound and the gradient of the surrogate."""
        terms = self.terms(model, guide, *args, **kwargs)
        return with_gradient_of(
            total_loss(terms, self.surrogate(terms)), value=total_loss(terms, self.bound(terms))
        )

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Compute the terms of all S · G particles."""
        return terms(
            model,
            guide,
            *args,
            num_particles=self.num_particles * self.num_groups,
            max_plate_nesting=self.max_plate_nesting,
            **kwargs,
        )

    def _require_reparameterised(self, terms: Terms) -> None:
        for name in terms.unreparameterised:
            raise ValueError(
                f"{self!r} needs draws that carry gradients, but the guide's site {name!r} is not "
                "reparameterised: its parameters would get no gradient. Use VIMCO, or Pyro's Trace_ELBO"
            )

    def __repr__(self) -> str:
        groups = f", num_groups={self.num_groups}" if self.num_groups > 1 else ""
        return f"{type(self).__name__}({self.num_particles}{groups})"


def total_loss(terms: Terms, per_datum: Tensor) -> Tensor:
    """Return the loss of a bound per datum: negated, scaled and summed over the batch."""
    return -(terms.scale * per_datum).sum()


def with_gradient_of(surrogate: Tensor, *, value: Tensor) -> Tensor:
    """Return a tensor with the value of `value` and the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """Return the log of the mean weight over the first dimension.

    The weights of its gradient have the relative error that rounding gives to log w: 1e-3 for 10⁴ in float32.
    """
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def _centred_log_mean_exp(small: Tensor) -> Tensor:
    """Return `log_mean_exp` of values around 0, with its relative accuracy kept where all are near 0."""
    is_near = small.detach().abs().amax(0) < 0.5
    near = torch.where(is_near, small, 0.0)  # an overflow in the unused branch would make the gradient NaN
    return torch.where(is_near, torch.log1p(torch.expm1(near).mean(0)), log_mean_exp(small))


class IWAE(Estimator):
    r"""Importance-weighted bound; with groups, the mean of their bounds (MIWAE).

    .. math:: L_S(x) = E \log \frac1S \sum_{s=1}^S w_s, \qquad z_s \sim q(z|x)

    in nats per datum. L_1 is the ELBO; the bound increases with S, to log p(x). The signal-to-noise ratio
    of the gradient increases as √S for θ but decreases as 1/√S for φ. Groups counter the latter: the mean of
    G groups has the expectation L_S, and a gradient of 1/G the variance.

    Args:
        num_particles: S, per group.
        num_groups: G.
        max_plate_nesting: Number of batch dimensions of the pair's own plates.

    Source:
        Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519.
        T. Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> IWAE(10, num_groups=5)
        IWAE(10, num_groups=5)
    """

    def __init__(self, num_particles: int, num_groups: int = 1, *, max_plate_nesting: int = 1):
        super().__init__(num_particles, num_groups, max_plate_nesting=max_plate_nesting)

    def bound(self, terms: Terms) -> Tensor:
        """Average the log mean weights of the groups."""
        groups = terms.log_weight.unflatten(0, (self.num_particles, self.num_groups))
        return log_mean_exp(groups).mean(0)


class PIWAE(IWAE):
    r"""Partially importance-weighted bound: θ is trained by IWAE of all S · G particles, φ by MIWAE.

    .. math:: \nabla_\theta L_{SG}, \qquad \nabla_\phi \frac1G \sum_{g=1}^G \log \frac1S \sum_{s=1}^S w_{gs}

    The value is L_SG, in nats per datum. Arguments are those of `IWAE`.

    Source:
        T. Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> PIWAE(10, 5)
        PIWAE(10, num_groups=5)
    """

    def __init__(self, num_particles: int, num_groups: int, *, max_plate_nesting: int = 1):
        super().__init__(num_particles, num_groups, max_plate_nesting=max_plate_nesting)

    @property
    def is_elbo(self) -> bool:
        """Whether the bound is the ELBO: that of one particle in all is, as groups are not averaged."""
        return self.num_particles * self.num_groups == 1

    def bound(self, terms: Terms) -> Tensor:
        """Return the log mean weight of all particles."""
        return log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        """Weight gradients in θ over all particles, and gradients in φ within groups."""
        self._require_reparameterised(terms)
        log_weight = terms.log_weight.detach()
        in_groups = log_weight.unflatten(0, (self.num_particles, self.num_groups)).softmax(0)
        guide_weight = in_groups.flatten(0, 1) / self.num_groups
        # The model's weight may underflow where the guide's does not, and is a divisor below. A weight below
        # eps² is lost in rounding next to the largest, so that clamping it there changes no gradient.
        floor = torch.finfo(log_weight.dtype).eps ** 2
        model_weight = log_weight.softmax(0).clamp(min=floor)
        # The sum below gives the gradient of log p through z the factor model_weight, not guide_weight.
        terms.scale_path_gradients(guide_weight / model_weight)
        log_joint = terms.log_likelihood + terms.kl_weight * terms.log_prior
        return (model_weight * log_joint - guide_weight * terms.kl_weight * terms.log_guide).sum(0)


class CIWAE(Estimator):
    r"""Combination of the ELBO and the importance-weighted bound.

    .. math:: \beta \, \mathrm{ELBO}(x) + (1 - \beta) \, L_S(x)

    in nats per datum, both from the same particles.

    Args:
        beta: Weight of the ELBO, 0 ≤ β ≤ 1.
        num_particles: S.
        max_plate_nesting: Number of batch dimensions of the pair's own plates.

    Raises:
        ValueError: If β lies outside [0, 1].

    Source:
        T. Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> CIWAE(0.5, 10)
        CIWAE(0.5, 10)
    """

    def __init__(self, beta: float, num_particles: int, *, max_plate_nesting: int = 1):
        require_number("beta", beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta, the weight of the ELBO, must lie in [0, 1]; got {beta}")
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.beta = beta

    def bound(self, terms: Terms) -> Tensor:
        """Combine the mean log weight and the log mean weight."""
        log_weight = terms.log_weight
        return self.beta * log_weight.mean(0) + (1 - self.beta) * log_mean_exp(log_weight)

    def __repr__(self) -> str:
        return f"CIWAE({self.beta}, {self.num_particles})"


class Renyi(Estimator):
    r"""Rényi's α-bound.

    .. math:: L_\alpha(x) = \frac1{1 - \alpha} E \log \frac1S \sum_{s=1}^S w_s^{1 - \alpha}

    in nats per datum. α = 0 is the importance-weighted bound, α → 1 the ELBO. It decreases with α, and may
    exceed log p(x) if α < 0.

    Args:
        alpha: α, any finite number except 1.
        num_particles: S.
        max_plate_nesting: Number of batch dimensions of the pair's own plates.

    Raises:
        ValueError: If α is 1 or not finite.

    Source:
        Y. Li, R. E. Turner (2016), Rényi divergence variational inference, arXiv:1602.02311.

    Example:
        >>> Renyi(0.5, 10)
        Renyi(0.5, 10)
    """

    def __init__(self, alpha: float, num_particles: int, *, max_plate_nesting: int = 1):
        require_number("alpha", alpha)
        if alpha == 1 or not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite and not 1 (at 1 it is the ELBO: IWAE(1)); got {alpha}")
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.alpha = alpha

    def bound(self, terms: Terms) -> Tensor:
        """Return the log mean of the weights to the power 1 − α, over 1 − α."""
        log_weight, power = terms.log_weight, 1 - self.alpha
        centre = log_weight.detach().mean(0).nan_to_num(0.0, posinf=0.0, neginf=0.0)
        return centre + _centred_log_mean_exp(power * (log_weight - centre)) / power

    def __repr__(self) -> str:
        return f"Renyi({self.alpha}, {self.num_particles})"


class STL(Estimator):
    r"""ELBO with the path gradient in φ, through the draws alone: sticking the landing.

    .. math:: \mathrm{ELBO}(x) = E \log w, \qquad
        \nabla_\phi = E \, \frac{\partial \log w}{\partial z} \frac{\partial z}{\partial \phi}

    in nats per datum. The omitted score, ∂ log q(z|x) / ∂φ at fixed z, has mean zero. The gradient is
    therefore unbiased, and it is zero for every draw if q(z|x) = p(z|x).

    Args:
        num_particles: S, averaged.
        max_plate_nesting: Number of batch dimensions of the pair's own plates.

    Raises:
        ValueError: When differentiated, if the guide cannot score given values; see `Terms.log_score`.

    Source:
        G. Roeder, Y. Wu, D. Duvenaud (2017), Sticking the landing, arXiv:1703.09194.

    Example:
        >>> STL()
        STL(1)
    """

    @property
    def is_elbo(self) -> bool:
        """Always True: the bound averages single-sample ELBOs."""
        return True

    def bound(self, terms: Terms) -> Tensor:
        """Average the log weights."""
        return terms.log_weight.mean(0)

    def surrogate(self, terms: Terms) -> Tensor:
        """Remove the score from the gradient."""
        self._require_reparameterised(terms)
        return (terms.log_weight + terms.kl_weight * terms.log_score).mean(0)


class DReG(Estimator):
    r"""Importance-weighted bound with a doubly reparameterised gradient in φ.

    .. math:: \nabla_\theta = E \sum_s \tilde w_s \frac{\partial \log w_s}{\partial \theta}, \qquad
        \nabla_\phi = E \sum_s \tilde w_s^2 \, \frac{\partial \log w_s}{\partial z_s}
        \frac{\partial z_s}{\partial \phi}, \qquad \tilde w_s = \frac{w_s}{\sum_r w_r}

    in nats per datum. The bound L_S and the gradient in θ are those of `IWAE`. The gradient in φ has the same
    mean, and its signal-to-noise ratio increases as √S, where that of IWAE decreases. A weight β on the KL
    changes w̃² to (1 − β) w̃ + β w̃². S = 1 gives `STL`. Arguments and errors are those of `STL`.

    Source:
        G. Tucker, D. Lawson, S. Gu, C. J. Maddison (2019), Doubly reparameterized gradient estimators for
        Monte Carlo objectives, arXiv:1810.04152.

    Example:
        >>> DReG(50)
        DReG(50)
    """

    def __init__(self, num_particles: int, *, max_plate_nesting: int = 1):
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)

    def bound(self, terms: Terms) -> Tensor:
        """Return the log mean weight."""
        return log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        """Weight gradients in θ by w̃, and gradients through the draws by w̃²."""
        self._require_reparameterised(terms)
        weight = terms.log_weight.detach().softmax(0)
        path_weight = 1 - terms.kl_weight + terms.kl_weight * weight
        terms.scale_path_gradients(path_weight)  # changes the factor w̃ of log p's gradient in z to w̃²
        log_joint = terms.log_likelihood + terms.kl_weight * terms.log_prior
        path = terms.kl_weight * (terms.log_score - terms.log_guide)  # the path gradient of −log q
        return (weight * (log_joint + path_weight * path)).sum(0)


class VIMCO(Estimator):
    r"""Importance-weighted bound for guides with sites that are not reparameterised.

    .. math:: \nabla_\phi = E \sum_s (\hat L - \hat L_{-s}) \frac{\partial \log q(z_s|x)}{\partial \phi}
        + \sum_s \tilde w_s \frac{\partial \log w_s}{\partial \phi}, \qquad
        \hat L_{-s} = \log \frac1S \Big( \sum_{r \ne s} w_r + \prod_{r \ne s} w_r^{1/(S-1)} \Big)

    in nats per datum: the score-function estimator, with the other particles as baseline of each particle's
    learning signal. The first sum is over sites that are not reparameterised.

    Args:
        num_particles: S ≥ 2.
        max_plate_nesting: Number of batch dimensions of the pair's own plates.

    Source:
        A. Mnih, D. J. Rezende (2016), Variational inference for Monte Carlo objectives, arXiv:1602.06725.

    Example:
        >>> VIMCO(10)
        VIMCO(10)
    """

    def __init__(self, num_particles: int, *, max_plate_nesting: int = 1):
        require_count("num_particles", num_particles, minimum=2)
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)

    def bound(self, terms: Terms) -> Tensor:
        """Return the log mean weight."""
        return log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        """Add the score, weighted by the learning signal of each particle."""
        bound = self.bound(terms)
        signal = bound.detach() - _leave_one_out(terms.log_weight.detach())
        return bound + (signal * terms.log_score_function).sum(0)


def _leave_one_out(log_weight: Tensor) -> Tensor:
    """Compute the log mean weight, (S, N), with each weight replaced by the geometric mean of the others.

    If the other weights are all 0 the result is 0, not −∞: any baseline that does not depend on the particle
    itself is valid.
    """
    num_particles = len(log_weight)
    log_zero = torch.full_like(log_weight[:1], -math.inf)
    # Sum from both ends: subtracting a particle from the total gives −∞ − (−∞) = NaN for a weight of 0.
    before = torch.cat([log_zero, log_weight.logcumsumexp(0)[:-1]])
    after = torch.cat([log_weight.flip(0).logcumsumexp(0).flip(0)[1:], log_zero])
    log_sum = torch.logaddexp(before, after)
    before = torch.cat([torch.zeros_like(log_zero), log_weight.cumsum(0)[:-1]])
    after = torch.cat([log_weight.flip(0).cumsum(0).flip(0)[1:], torch.zeros_like(log_zero)])
    geometric_mean = (before + after) / (num_particles - 1)
    baseline = torch.logaddexp(log_sum, geometric_mean) - math.log(num_particles)
    return baseline.where(log_sum > -math.inf, 0.0)


def label(estimator: ELBO) -> str:
    """Return an estimator's class name and the settings that differ from their defaults.

    Omits `max_plate_nesting`: it describes the model, and Pyro sets it at the first call.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> label(Trace_ELBO(max_plate_nesting=1)), label(Trace_ELBO(num_particles=5))
        ('Trace_ELBO()', 'Trace_ELBO(num_particles=5)')
    """
    if type(estimator).__repr__ is not object.__repr__:  # type: ignore[comparison-overlap]
        return repr(estimator)
    settings = [
        f"{name}={getattr(estimator, name)}"
        for name, parameter in inspect.signature(type(estimator)).parameters.items()
        if name != "max_plate_nesting"
        and isinstance(getattr(estimator, name, None), bool | int | float | str)
        and getattr(estimator, name) != parameter.default
    ]
    return f"{type(estimator).__name__}({', '.join(settings)})"


def family(estimator: ELBO) -> str:
    """Return an estimator's label with S in place of its number of particles.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> family(Trace_ELBO(num_particles=5)) == family(Trace_ELBO())
        True
    """
    kind = copy.copy(estimator)
    kind.num_particles = "S"
    if isinstance(getattr(estimator, "estimator", None), ELBO):  # wrapped, as by KLWeighted
        kind.estimator = copy.copy(kind.estimator)
        kind.estimator.num_particles = "S"
    return label(kind)
