"""Reference estimators: the bound that an estimator targets, with value and gradient by the definition.

A gradient estimator must agree in expectation with the gradient of the expected bound: through
reparameterised draws, and by the score function for other draws. `ReferenceEstimator` computes this gradient
directly. It has more variance than the estimators under comparison, and shares none of their shortcuts.
"""

import dataclasses
from dataclasses import dataclass

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor

from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Estimator, Renyi
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.log_terms import Terms

__all__ = ["ReferenceEstimator", "Target", "target"]

_PARTICLES = 16  # in all groups of a reference estimate, unless the bound takes more


class ReferenceEstimator(Estimator):
    r"""Estimate a bound and its gradient by their definition, from independent groups of particles.

    .. math:: \nabla E f(w) = E [ \nabla f + (f - f') \nabla \log q(z|x) ]

    with f the estimate of the bound from one group and f' the mean over the other groups. The second term
    covers only sites without reparameterisation.

    Args:
        estimator: The bound is that of its `bound` method.
        num_groups: Number of groups, at least 2.

    Example:
        >>> ReferenceEstimator(IWAE(5), num_groups=4)
        ReferenceEstimator(IWAE(5), num_groups=4)
    """

    def __init__(self, estimator: Estimator, *, num_groups: int = 2):
        super().__init__(
            estimator.num_particles * estimator.num_groups,
            max(2, num_groups),
            max_plate_nesting=estimator.max_plate_nesting,
        )
        self.estimator = estimator

    def bound(self, terms: Terms) -> Tensor:
        """Average the estimates of the bound over groups."""
        return self._by_group(terms).mean(0)

    def surrogate(self, terms: Terms) -> Tensor:
        """Add the score-function term, with the mean of the other groups as the baseline."""
        f = self._by_group(terms)
        score = terms.log_score_function.unflatten(0, (self.num_particles, self.num_groups)).sum(0)
        signal = f.detach()
        baseline = (signal.sum(0) - signal) / (self.num_groups - 1)
        return (f + (signal - baseline) * score).mean(0)

    def _by_group(self, terms: Terms) -> Tensor:
        """Estimate the bound from each group, (G, N)."""
        return torch.stack(
            [
                self.estimator.bound(
                    dataclasses.replace(
                        terms,
                        log_likelihood=terms.log_likelihood[group :: self.num_groups],
                        log_prior=terms.log_prior[group :: self.num_groups],
                        log_guide=terms.log_guide[group :: self.num_groups],
                    )
                )
                for group in range(self.num_groups)
            ]
        )

    def __repr__(self) -> str:
        return f"ReferenceEstimator({self.estimator!r}, num_groups={self.num_groups})"


@dataclass(frozen=True)
class Target:
    """Bounds that an estimator targets.

    Args:
        bound: Name of the bound estimated by the value.
        gradients: Names of the bounds whose gradients are estimated, in "model" and "guide" parameters.
        reference_estimators: Reference estimators of these gradients; "model" also estimates `bound`.
        is_lower_bound: Whether the bound is known to be at most log p(x).
    """

    bound: str
    gradients: dict[str, str]
    reference_estimators: dict[str, ReferenceEstimator | KLWeighted]
    is_lower_bound: bool


def target(estimator: ELBO, *, max_plate_nesting: int = 1) -> Target | None:
    """Return the bounds that an estimator targets, or None if they are unknown.

    The class decides, and a subclass has the target of its parent. A user-defined `Estimator` targets its own
    `bound`.

    Args:
        estimator: Any `pyro.infer.ELBO`.
        max_plate_nesting: Setting of the reference estimators; see `terms`.

    Example:
        >>> target(DReG(5)).bound, target(Trace_ELBO()).bound, target(PIWAE(5, 3)).gradients["guide"]
        ('L_5', 'ELBO', 'L_5')
    """
    if isinstance(estimator, KLWeighted):
        return _weighted(estimator, max_plate_nesting)
    model = guide = _bound(estimator, max_plate_nesting)
    if model is None or guide is None:
        return None
    if isinstance(estimator, PIWAE):
        total = estimator.num_particles * estimator.num_groups
        model = IWAE(total, max_plate_nesting=max_plate_nesting)
    return Target(
        bound=_name(model),
        gradients={"model": _name(model), "guide": _name(guide)},
        reference_estimators={"model": _reference(model), "guide": _reference(guide)},
        is_lower_bound=isinstance(model, IWAE | CIWAE) or (isinstance(model, Renyi) and model.alpha >= 0),
    )


def _bound(estimator: ELBO, max_plate_nesting: int) -> Estimator | None:
    """Return the estimator whose `bound` has the gradient, in guide parameters, that `estimator` targets."""
    S, plates = estimator.num_particles, {"max_plate_nesting": max_plate_nesting}
    bound: Estimator | None = None
    match estimator:
        case IWAE() | DReG() | VIMCO() | RenyiELBO(alpha=0):
            bound = IWAE(S, **plates)
        case STL() | Trace_ELBO() | TraceGraph_ELBO() | TraceEnum_ELBO():
            bound = IWAE(1, **plates)
        case CIWAE():
            bound = CIWAE(estimator.beta, S, **plates)
        case Renyi() | RenyiELBO():
            bound = Renyi(estimator.alpha, S, **plates)
        case Estimator():
            bound = estimator
    return bound


def _reference(estimator: Estimator) -> ReferenceEstimator:
    num_groups = _PARTICLES // (estimator.num_particles * estimator.num_groups)
    return ReferenceEstimator(estimator, num_groups=num_groups)


def _weighted(estimator: KLWeighted, max_plate_nesting: int) -> Target | None:
    """Return the target of the wrapped estimator, with weighted gradients."""
    inner = target(estimator.estimator, max_plate_nesting=max_plate_nesting)
    if inner is None:
        return None
    beta, free_bits, per = estimator.beta, estimator.free_bits, estimator.per
    weight = f", β = {beta:g}" + (f", free bits {free_bits:g} per {per}" if free_bits else "")
    return dataclasses.replace(
        inner,
        gradients={name: bound + weight for name, bound in inner.gradients.items()},
        reference_estimators={
            name: KLWeighted(reference, beta, free_bits=free_bits, per=per)
            for name, reference in inner.reference_estimators.items()
        },
    )


def _name(estimator: Estimator) -> str:
    match estimator:
        case IWAE(num_particles=1):
            return "ELBO"
        case IWAE(num_particles=S):
            return f"L_{S}"
        case CIWAE(num_particles=S, beta=beta):
            return f"{beta:g} ELBO + {1 - beta:g} L_{S}"
        case Renyi(num_particles=S, alpha=alpha):
            return f"Rényi's of α = {alpha:g}, S = {S}"
        case _:
            return f"bound of {estimator!r}"
