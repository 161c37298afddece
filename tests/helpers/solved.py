"""Linear-Gaussian model as a VAE, with exact evidence, posterior and bounds."""

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.closed_form import LinearGaussian

D, K, N = 5, 2, 7


class Affine(nn.Module):
    """Guide q(z|x) = N(Ax + a, LLᵀ), which includes the exact posterior of a linear-Gaussian model."""

    def __init__(self, offset, weight, scale_tril):
        super().__init__()
        self.offset, self.weight = nn.Parameter(offset), nn.Parameter(weight)
        self.scale_tril = nn.Parameter(scale_tril)

    def forward(self, x):
        return dist.MultivariateNormal(self.offset + x @ self.weight.T, scale_tril=self.scale_tril)


def linear_gaussian(*, scale=1.0, diagonal=False):
    """The exact model and an equal VAE, whose guide has the posterior's scales times `scale`."""
    generator = torch.Generator().manual_seed(1)
    W, b = torch.randn(D, K, generator=generator).double(), torch.randn(D, generator=generator).double()
    exact = LinearGaussian(W, b, 0.75**2)  # with a root that is exact in the likelihood's float32
    likelihood = pv.likelihoods.Normal(K, (D,), network=nn.Linear(K, D), variance=0.75**2).double()
    with torch.no_grad():
        likelihood.network.weight.copy_(W)
        likelihood.network.bias.copy_(b)
    at = exact.posterior(torch.cat([torch.zeros(1, D), torch.eye(D)]).double())
    scale_tril = (
        exact.best_diagonal_guide(torch.zeros(1, D).double()).scale_tril if diagonal else at.scale_tril
    )
    guide = Affine(at.loc[0], (at.loc[1:] - at.loc[0]).T, scale * scale_tril[0])
    return exact, pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=likelihood, guide=guide).double()


def data(exact, count=N):
    return exact.sample(count, generator=torch.Generator().manual_seed(2))


def within(value, expected, standard_error, count=5):
    """Assert that a Monte Carlo value lies within `count` standard errors of the expected value."""
    difference = torch.as_tensor(value - expected).abs()
    assert (difference <= count * torch.as_tensor(standard_error)).all(), (value, expected, standard_error)
