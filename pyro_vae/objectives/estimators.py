"""Bounds on the evidence, and estimators of their gradients: reductions of the terms of one run.

Notation: S particles in each of G groups, N data in the batch; w = p(x|z) p(z) / q(z|x), a number a particle
and datum; θ are the parameters of the model p, φ those of the guide q.

To add an estimator, derive from `Estimator` and write `bound`, and `surrogate` where the gradient wanted is
not that of the bound's own estimate.
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
from pyro_vae.utils.validation import require_count

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
    """A `pyro.infer.ELBO` by its `differentiable_loss`."""

    @abstractmethod
    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the loss, shape (), to be differentiated."""

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimate the loss, and add its gradient to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return warn_if_nan(float(loss.detach()), "loss")

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError("traces are not shown; see `terms`")


class Estimator(Loss):
    """What the estimators share: from terms to losses.

    Args:
        num_particles: S, in each group.
        num_groups: G, independent groups of particles.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is below 1.
    """

    def __init__(self, num_particles: int = 1, num_groups: int = 1, *, max_plate_nesting: int = 1):
        require_count("num_particles", num_particles)
        require_count("num_groups", num_groups)
        require_count("max_plate_nesting", max_plate_nesting)
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self.num_groups = num_groups

    @property
    def is_elbo(self) -> bool:
        """Whether the bound is the ELBO: of one particle, or of groups of one that are averaged."""
        return self.num_particles == 1

    @abstractmethod
    def bound(self, terms: Terms) -> Tensor:
        """Reduce terms (S · G, N) to the bound's estimate, (N,), in nats per datum."""

    def surrogate(self, terms: Terms) -> Tensor:
        """Reduce terms (S · G, N) to what is differentiated, (N,); by default the bound.

        Raises:
            ValueError: If a site of the guide is not reparameterised, and the estimator needs it to be.
        """
        self._require_reparameterised(terms)
        return self.bound(terms)

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimate the loss, minus the bound summed over the batch, in nats."""
        terms = self.terms(model, guide, *args, **kwargs)
        return warn_if_nan(float(total_loss(terms, self.bound(terms))), "loss")

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the loss, shape (), with the value of the bound and the gradient of the surrogate."""
        terms = self.terms(model, guide, *args, **kwargs)
        return with_gradient_of(
            total_loss(terms, self.surrogate(terms)), value=total_loss(terms, self.bound(terms))
        )

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Run the pair with all the particles of all groups."""
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
    """Turn a bound per datum into a loss: negated, scaled, summed over the batch."""
    return -(terms.scale * per_datum).sum()


def with_gradient_of(surrogate: Tensor, *, value: Tensor) -> Tensor:
    """Give a tensor with one tensor's value and another's gradient."""
    return value.detach() + (surrogate - surrogate.detach())


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """Log of the mean of weights over the first dimension."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


class IWAE(Estimator):
    r"""Importance-weighted bound; with groups, their mean (MIWAE).

    .. math:: L_S(x) = E \log \frac1S \sum_{s=1}^S w_s, \qquad z_s \sim q(z|x)

    in nats per datum. L_1 is the ELBO; the bound rises with S, to log p(x). Its signal-to-noise ratio rises
    as √S in the gradient of θ but falls as 1/√S in that of φ, which groups mend: the mean over G of them
    has L_S for its expectation, and a gradient of 1/G the variance.

    Args:
        num_particles: S, in each group.
        num_groups: G.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is below 1; when differentiated, if the guide is not reparameterised.

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
        """Average over groups the log mean weight of each."""
        groups = terms.log_weight.unflatten(0, (self.num_particles, self.num_groups))
        return log_mean_exp(groups).mean(0)


class PIWAE(IWAE):
    r"""Partially importance-weighted bound: θ learns by IWAE of all S · G particles, φ by MIWAE.

    .. math:: \nabla_\theta L_{SG}, \qquad \nabla_\phi \frac1G \sum_{g=1}^G \log \frac1S \sum_{s=1}^S w_{gs}

    The value is L_SG, in nats per datum. Arguments, errors and shapes as for `IWAE`.

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
        """Whether it is; the groups are not averaged."""
        return self.num_particles * self.num_groups == 1

    def bound(self, terms: Terms) -> Tensor:
        """Take the log mean weight of all particles."""
        return log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        """Weigh the gradients in θ over all particles, those in φ within groups."""
        self._require_reparameterised(terms)
        log_weight = terms.log_weight.detach()
        in_groups = log_weight.unflatten(0, (self.num_particles, self.num_groups)).softmax(0)
        guide_weight = in_groups.flatten(0, 1) / self.num_groups
        # The model's weight may underflow where the guide's is not small. Weights below eps² are lost in
        # rounding beside the largest, so that raising them to it changes no gradient.
        floor = torch.finfo(log_weight.dtype).eps ** 2
        model_weight = log_weight.softmax(0).clamp(min=floor)
        # The gradient of log p through z has the factor model_weight below, and is to have guide_weight.
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
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.

    Raises:
        TypeError: If `num_particles` is no integer.
        ValueError: If `num_particles` is below 1 or β outside [0, 1]; when differentiated, if the guide is
            not reparameterised.

    Source:
        T. Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> CIWAE(0.5, 10)
        CIWAE(0.5, 10)
    """

    def __init__(self, beta: float, num_particles: int, *, max_plate_nesting: int = 1):
        if not 0 <= beta <= 1:
            raise ValueError(f"beta, the weight of the ELBO, must lie in [0, 1]; got {beta}")
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.beta = beta

    def bound(self, terms: Terms) -> Tensor:
        """Mix the mean log weight and the log mean weight."""
        log_weight = terms.log_weight
        return self.beta * log_weight.mean(0) + (1 - self.beta) * log_mean_exp(log_weight)

    def __repr__(self) -> str:
        return f"CIWAE({self.beta}, {self.num_particles})"


class Renyi(Estimator):
    r"""Rényi's α-bound.

    .. math:: L_\alpha(x) = \frac1{1 - \alpha} E \log \frac1S \sum_{s=1}^S w_s^{1 - \alpha}

    in nats per datum. α = 0 is the importance-weighted bound, α → 1 the ELBO. It falls as α grows; for α < 0
    it may exceed log p(x).

    Args:
        alpha: α, any finite number but 1.
        num_particles: S.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.

    Raises:
        TypeError: If `num_particles` is no integer.
        ValueError: If `num_particles` is below 1, or α is 1 or not finite; when differentiated, if the guide
            is not reparameterised.

    Source:
        Y. Li, R. E. Turner (2016), Rényi divergence variational inference, arXiv:1602.02311.

    Example:
        >>> Renyi(0.5, 10)
        Renyi(0.5, 10)
    """

    def __init__(self, alpha: float, num_particles: int, *, max_plate_nesting: int = 1):
        if alpha == 1 or not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite and not 1 (at 1 it is the ELBO: IWAE(1)); got {alpha}")
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.alpha = alpha

    def bound(self, terms: Terms) -> Tensor:
        """Take the log mean of the weights' powers."""
        return log_mean_exp((1 - self.alpha) * terms.log_weight) / (1 - self.alpha)

    def __repr__(self) -> str:
        return f"Renyi({self.alpha}, {self.num_particles})"


class STL(Estimator):
    r"""ELBO whose gradient in φ comes through the draws alone: sticking the landing.

    .. math:: \mathrm{ELBO}(x) = E \log w, \qquad
        \nabla_\phi = E \, \frac{\partial \log w}{\partial z} \frac{\partial z}{\partial \phi}

    in nats per datum. What is left out, the score ∂ log q(z|x) / ∂φ at fixed z, has mean zero; without it the
    gradient is still unbiased, and where q(z|x) = p(z|x) it is zero for every single draw.

    Args:
        num_particles: S, averaged.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is below 1; when differentiated, if the guide is not reparameterised, or can
            only score what it has just drawn.

    Source:
        G. Roeder, Y. Wu, D. Duvenaud (2017), Sticking the landing, arXiv:1703.09194.

    Example:
        >>> STL()
        STL(1)
    """

    @property
    def is_elbo(self) -> bool:
        """Whether it is: always, for the particles are averaged."""
        return True

    def bound(self, terms: Terms) -> Tensor:
        """Average the log weights."""
        return terms.log_weight.mean(0)

    def surrogate(self, terms: Terms) -> Tensor:
        """Take the score away from the gradient."""
        self._require_reparameterised(terms)
        return (terms.log_weight + terms.kl_weight * terms.log_score).mean(0)


class DReG(Estimator):
    r"""Importance-weighted bound whose gradient in φ is doubly reparameterised.

    .. math:: \nabla_\theta = E \sum_s \tilde w_s \frac{\partial \log w_s}{\partial \theta}, \qquad
        \nabla_\phi = E \sum_s \tilde w_s^2 \, \frac{\partial \log w_s}{\partial z_s}
        \frac{\partial z_s}{\partial \phi}, \qquad \tilde w_s = \frac{w_s}{\sum_r w_r}

    in nats per datum. The bound is L_S, as for `IWAE`, and the gradient in θ is the same; that in φ has the
    same mean, and a signal-to-noise ratio that rises with S, as √S, where IWAE's falls. With weight β on the
    KL, w̃² becomes (1 − β) w̃ + β w̃². With S = 1 it is `STL`.

    Arguments and errors as for `STL`.

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
        """Take the log mean weight."""
        return log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        """Weigh gradients in θ by w̃, and those through the draws by w̃ once more."""
        self._require_reparameterised(terms)
        weight = terms.log_weight.detach().softmax(0)
        path_weight = 1 - terms.kl_weight + terms.kl_weight * weight
        terms.scale_path_gradients(path_weight)  # of the gradient of log p through z: w̃ becomes w̃²
        log_joint = terms.log_likelihood + terms.kl_weight * terms.log_prior
        path = terms.kl_weight * (
            terms.log_score - terms.log_guide
        )  # of −log q, its gradient through z alone
        return (weight * (log_joint + path_weight * path)).sum(0)


class VIMCO(Estimator):
    r"""Importance-weighted bound for guides that are not, or not all, reparameterised.

    .. math:: \nabla_\phi = E \sum_s (\hat L - \hat L_{-s}) \frac{\partial \log q(z_s|x)}{\partial \phi}
        + \sum_s \tilde w_s \frac{\partial \log w_s}{\partial \phi}, \qquad
        \hat L_{-s} = \log \frac1S \Big( \sum_{r \ne s} w_r + \prod_{r \ne s} w_r^{1/(S-1)} \Big)

    in nats per datum: the score-function estimator, in which each particle's signal is what it adds to the
    bound L_S over a baseline from the others. Sites that are reparameterised take no part in the first sum.

    Args:
        num_particles: S ≥ 2.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If `num_particles` is below 2, or `max_plate_nesting` below 1.

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
        """Take the log mean weight."""
        return log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        """Add the score, weighed by each particle's own contribution."""
        bound = self.bound(terms)
        signal = bound.detach() - _leave_one_out(terms.log_weight.detach())
        return bound + (signal * terms.log_score_function).sum(0)


def _leave_one_out(log_weight: Tensor) -> Tensor:
    """Log mean weight (S, N), each particle's weight replaced by the geometric mean of the others'.

    Where the others' weights are all 0 it is 0 and not −∞: a baseline may be any number that does not depend
    on the particle itself.
    """
    num_particles = len(log_weight)
    nothing = torch.full_like(log_weight[:1], -math.inf)
    # summed from both ends, and not by subtraction: a weight of 0 is −∞ here, and −∞ − (−∞) is NaN
    before = torch.cat([nothing, log_weight.logcumsumexp(0)[:-1]])
    after = torch.cat([log_weight.flip(0).logcumsumexp(0).flip(0)[1:], nothing])
    log_sum = torch.logaddexp(before, after)
    before = torch.cat([torch.zeros_like(nothing), log_weight.cumsum(0)[:-1]])
    after = torch.cat([log_weight.flip(0).cumsum(0).flip(0)[1:], torch.zeros_like(nothing)])
    geometric_mean = (before + after) / (num_particles - 1)
    baseline = torch.logaddexp(log_sum, geometric_mean) - math.log(num_particles)
    return baseline.where(log_sum > -math.inf, 0.0)


def label(estimator: ELBO) -> str:
    """Name an estimator by its class and the settings that differ from their defaults.

    Not by `max_plate_nesting`, which says something of the pair, and which Pyro's estimators change when
    they first see one.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> label(Trace_ELBO(max_plate_nesting=1)), label(Trace_ELBO(num_particles=5))
        ('Trace_ELBO()', 'Trace_ELBO(num_particles=5)')
    """
    if type(estimator).__repr__ is not object.__repr__:
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
    """Name an estimator but for its number of particles, S.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> family(Trace_ELBO(num_particles=5)) == family(Trace_ELBO())
        True
    """
    kind = copy.copy(estimator)
    kind.num_particles = "S"
    if isinstance(getattr(estimator, "estimator", None), ELBO):  # it is wrapped, as by KLWeighted
        kind.estimator = copy.copy(kind.estimator)
        kind.estimator.num_particles = "S"
    return label(kind)
