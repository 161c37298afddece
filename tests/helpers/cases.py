"""Every estimator with a simple implementation of the bound it estimates, for the property tests.

A new estimator needs one line in `CASES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.closed_form import LinearGaussian
from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Renyi
from pyro_vae.objectives.kl_weighting import KLWeighted

N, D = 3, 5  # examples and their dimension; the numbers of particles and latent dimensions differ from both


def elbo(log_weight: Tensor) -> Tensor:
    return log_weight.mean(0)


def importance(log_weight: Tensor) -> Tensor:
    return log_weight.exp().mean(0).log()


def grouped(log_weight: Tensor) -> Tensor:
    return (importance(log_weight[0::2]) + importance(log_weight[1::2])) / 2


def mixed(log_weight: Tensor) -> Tensor:
    return 0.3 * elbo(log_weight) + 0.7 * importance(log_weight)


def powers(log_weight: Tensor) -> Tensor:
    return (log_weight.exp() ** 0.6).mean(0).log() / 0.6


@dataclass(frozen=True)
class Case:
    """An estimator and its bound.

    Args:
        make: Constructor of the estimator.
        bound: Function from log weights (particles, N) to the bound (N,).
        particles: Number of particles in all groups.
        guide_bound: Bound whose gradient trains the guide, if different.
        beta: Weight on the KL in the gradient.
    """

    make: Callable[[], ELBO]
    bound: Callable[[Tensor], Tensor]
    particles: int
    guide_bound: Callable[[Tensor], Tensor] | None = None
    beta: float = 1.0


CASES = {
    "Trace_ELBO": Case(Trace_ELBO, elbo, 1),  # Pyro's estimator, to test the tests
    "IWAE(1)": Case(lambda: IWAE(1), elbo, 1),
    "IWAE(2)": Case(lambda: IWAE(2), importance, 2),
    "IWAE(4)": Case(lambda: IWAE(4), importance, 4),
    "IWAE(2, 2)": Case(lambda: IWAE(2, 2), grouped, 4),
    "PIWAE(2, 2)": Case(lambda: PIWAE(2, 2), importance, 4, guide_bound=grouped),
    "CIWAE(0.3, 2)": Case(lambda: CIWAE(0.3, 2), mixed, 2),
    "Renyi(0.4, 2)": Case(lambda: Renyi(0.4, 2), powers, 2),
    "STL(1)": Case(STL, elbo, 1),
    "STL(2)": Case(lambda: STL(2), elbo, 2),
    "DReG(2)": Case(lambda: DReG(2), importance, 2),
    "DReG(4)": Case(lambda: DReG(4), importance, 4),
    "VIMCO(2)": Case(lambda: VIMCO(2), importance, 2),
    "β Trace_ELBO": Case(lambda: KLWeighted(Trace_ELBO(), 0.6), elbo, 1, beta=0.6),
    "β IWAE": Case(lambda: KLWeighted(IWAE(2), 0.6), importance, 2, beta=0.6),
    "β PIWAE": Case(lambda: KLWeighted(PIWAE(2, 2), 0.6), importance, 4, guide_bound=grouped, beta=0.6),
    "β STL": Case(lambda: KLWeighted(STL(), 0.6), elbo, 1, beta=0.6),
    "β DReG": Case(lambda: KLWeighted(DReG(2), 0.6), importance, 2, beta=0.6),
    "β VIMCO": Case(lambda: KLWeighted(VIMCO(2), 1.7), importance, 2, beta=1.7),
}


class LinearGaussianPair(nn.Module):
    """Pair z ~ N(0, I), x|z ~ N(Wz + b, c I) with guide N(loc, L Lᵀ), with parameters per example.

    Gradients of a sum over examples are therefore gradients per example.
    """

    MODEL, GUIDE = ("W", "b", "log_c"), ("loc", "tril")

    def __init__(self, W: Tensor, b: Tensor, log_c: Tensor, loc: Tensor, tril: Tensor):
        super().__init__()
        self.W, self.b, self.log_c = (nn.Parameter(t.clone()) for t in (W, b, log_c))
        self.loc, self.tril = nn.Parameter(loc.clone()), nn.Parameter(tril.clone())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.loc.shape[-1]), 1.0).to_event(1))
            mean = (self.W @ z.unsqueeze(-1)).squeeze(-1) + self.b
            pyro.sample("x", dist.Normal(mean, (self.log_c / 2).exp().unsqueeze(-1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=self.tril))

    def repeat(self, times: int) -> "LinearGaussianPair":
        """Return the pair for `times` copies of the data, with the same parameters for each."""
        parts = (getattr(self, name).detach() for name in self.MODEL + self.GUIDE)
        return LinearGaussianPair(*(t.repeat(times, *[1] * (t.dim() - 1)) for t in parts))


def linear_gaussian(K: int, *, exact: bool) -> tuple[Tensor, LinearGaussian, LinearGaussianPair]:
    """Data (N, D), the exact model, and the pair, whose guide is the exact posterior or close to it."""
    generator = torch.Generator().manual_seed(K)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W, b, c = 0.6 * noise(D, K), noise(D), 0.8
    solved = LinearGaussian(W, b, c)
    x = solved.sample(N, generator=generator)
    posterior = solved.posterior(x)
    loc, tril = posterior.loc, posterior.scale_tril
    if not exact:
        loc, tril = loc + 0.4 * noise(N, K), 1.3 * tril
    log_c = torch.full((N,), math.log(c), dtype=torch.float64)
    return x, solved, LinearGaussianPair(W.expand(N, D, K), b.expand(N, D), log_c, loc, tril)


def by_quadrature(
    bound: Callable[[Tensor], Tensor],
    pair: LinearGaussianPair,
    x: Tensor,
    *,
    particles: int,
    beta: float = 1.0,
    nodes: int = 20,
) -> Tensor:
    """Expected bound, (N,), over the draws of all particles, by quadrature in one latent dimension."""
    points, weights = map(torch.from_numpy, hermegauss(nodes))
    weights = weights / weights.sum()
    scale = pair.tril[:, 0, 0]
    z = pair.loc[:, 0] + scale * points.unsqueeze(-1)  # (nodes, N)
    c = pair.log_c.exp()
    residual = x - pair.W[:, :, 0] * z.unsqueeze(-1) - pair.b
    log_likelihood = -0.5 * (residual.square().sum(-1) / c + D * (2 * math.pi * c).log())
    log_prior = -0.5 * (z.square() + math.log(2 * math.pi))
    log_guide = -0.5 * (points.square().unsqueeze(-1) + math.log(2 * math.pi)) - scale.log()
    log_weight = log_likelihood + beta * (log_prior - log_guide)
    combinations = torch.cartesian_prod(*[torch.arange(nodes)] * particles).reshape(-1, particles)
    probability = weights[combinations].prod(-1)
    values = bound(log_weight[combinations.T].flatten(1)).unflatten(0, (len(combinations), len(x)))
    return (probability.unsqueeze(-1) * values).sum(0)


def assert_within_standard_errors(samples: Tensor, expected: Tensor, *, number: float = 5.0) -> None:
    """Assert that the mean of samples, over their first dimension, is as expected."""
    standard_error = samples.std(0) / math.sqrt(len(samples))
    excess = (samples.mean(0) - expected).abs() - number * standard_error
    worst = excess.max().item()
    assert worst <= 1e-9, f"{worst:.3g} beyond {number} standard errors"
