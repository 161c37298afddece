"""Which bound an estimator estimates, and that bound's gradient by its definition alone.

Estimators are shortcuts to the gradient of a bound. What they should give on average is known from the
bound: the gradient of its expectation, through the draws that are reparameterised and by the score function
for those that are not. It is noisier and takes more draws, and is all the plainer for it: the judge of the
shortcuts.
"""

import dataclasses
from dataclasses import dataclass

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor

from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Estimator, Renyi
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.log_terms import Terms

__all__ = ["Plain", "Target", "target"]

_PARTICLES = 16  # at least, in all groups of a plain estimate


class Plain(Estimator):
    r"""A bound's estimate and gradient by their definition, from several groups of particles.

    .. math:: \nabla E f(w) = E [ \nabla f + (f - f') \nabla \log q(z|x) ]

    with f the bound's estimate by a group, f' its mean over the other groups, and the second term for sites
    that are not reparameterised alone.

    Args:
        estimator: Gives the bound, by its `bound`.
        num_groups: Independent groups, at least 2.

    Example:
        >>> Plain(IWAE(5), num_groups=4)
        Plain(IWAE(5), num_groups=4)
    """

    def __init__(self, estimator: Estimator, *, num_groups: int = 2):
        super().__init__(
            estimator.num_particles * estimator.num_groups,
            max(2, num_groups),
            max_plate_nesting=estimator.max_plate_nesting,
        )
        self.estimator = estimator

    def bound(self, terms: Terms) -> Tensor:
        """Average the bound's estimates over groups."""
        return self._by_group(terms).mean(0)

    def surrogate(self, terms: Terms) -> Tensor:
        """Add the score function, each group's signal less that of the others."""
        f = self._by_group(terms)
        score = terms.log_score_function.unflatten(0, (self.num_particles, self.num_groups)).sum(0)
        signal = f.detach()
        baseline = (signal.sum(0) - signal) / (self.num_groups - 1)
        return (f + (signal - baseline) * score).mean(0)

    def _by_group(self, terms: Terms) -> Tensor:
        """The bound's estimate by each group, (G, N)."""
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
        return f"Plain({self.estimator!r}, num_groups={self.num_groups})"


@dataclass(frozen=True)
class Target:
    """What an estimator estimates.

    Args:
        bound: Name of the bound that its value estimates.
        gradients: Names of what its gradients in the "model" and "guide" parameters follow.
        plain: Plain estimators of these two; the first has the bound's value too.
        is_lower_bound: Whether the bound is below log p(x).
    """

    bound: str
    gradients: dict[str, str]
    plain: dict[str, Estimator | KLWeighted]
    is_lower_bound: bool


def target(estimator: ELBO, *, max_plate_nesting: int = 1) -> Target | None:
    """Say which bound an estimator estimates; None of one that is not known.

    Judged by class, a subclass by its parent: it is to estimate the same. An `Estimator` of another class
    is judged by its own `bound`.

    Args:
        estimator: Whatever is a `pyro.infer.ELBO`.
        max_plate_nesting: For the plain estimators; see `terms`.

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
        plain={"model": _plain(model), "guide": _plain(guide)},
        is_lower_bound=isinstance(model, IWAE | CIWAE) or (isinstance(model, Renyi) and model.alpha >= 0),
    )


def _bound(estimator: ELBO, max_plate_nesting: int) -> Estimator | None:
    """The estimator whose `bound` another's gradient should follow, in the guide's parameters at least."""
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


def _plain(estimator: Estimator) -> Plain:
    return Plain(estimator, num_groups=_PARTICLES // (estimator.num_particles * estimator.num_groups))


def _weighted(estimator: KLWeighted, max_plate_nesting: int) -> Target | None:
    """The value is that of the wrapped estimator; the gradients are weighted."""
    inner = target(estimator.estimator, max_plate_nesting=max_plate_nesting)
    if inner is None:
        return None
    beta, free_bits, per = estimator.beta, estimator.free_bits, estimator.per
    weight = f", β = {beta:g}" + (f", free bits {free_bits:g} per {per}" if free_bits else "")
    return dataclasses.replace(
        inner,
        gradients={name: bound + weight for name, bound in inner.gradients.items()},
        plain={
            name: KLWeighted(plain, beta, free_bits=free_bits, per=per) for name, plain in inner.plain.items()
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
