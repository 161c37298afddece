"""A `ConditionalVAE` whose evidence is exact, a `SemiSupervisedVAE`, and data for both."""

import torch
from torch import Tensor, nn

import pyro_vae as pv

N, D, K, C = 7, 5, 2, 3
PRIOR = (0.5, 0.3, 0.2)
ALPHA = 0.4


def conditional(*, learned_prior: bool = False, width: tuple[int, ...] = ()) -> pv.ConditionalVAE:
    """x = W z + V y + b + noise: log p(x|y) is exact."""
    prior = pv.priors.LearnedNormal(K, context_dim=C) if learned_prior else pv.priors.StandardNormal(K)
    cvae = pv.ConditionalVAE(
        prior=prior,
        likelihood=_likelihood(width),
        guide=pv.guides.FullCovarianceNormal((D,), K, hidden_features=(8,), context_dim=C),
    )
    if learned_prior:
        nn.init.normal_(prior.shift.weight, std=0.5)
    return cvae


def semi_supervised(*, width: tuple[int, ...] = (6,), **options) -> pv.SemiSupervisedVAE:
    """The same parameters at each call; with no hidden layer, log p(x, y) and log p(x) are exact."""
    torch.manual_seed(4)
    return pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=_likelihood(width),
        guide=pv.guides.DiagonalNormal((D,), K, hidden_features=(8,), context_dim=C),
        classifier=pv.networks.MLP(D, C, hidden_features=(9,)),
        num_classes=C,
        **{"class_prior": PRIOR, "classification_weight": ALPHA, **options},
    )


def _likelihood(width: tuple[int, ...]) -> nn.Module:
    return pv.likelihoods.Normal(K, (D,), variance=0.5, hidden_features=width, context_dim=C)


def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def with_classes() -> tuple[Tensor, Tensor]:
    return rows(), torch.arange(N) % C


def with_few_classes() -> tuple[Tensor, Tensor]:
    return rows(), torch.tensor([0, -1, 2, -1, -1, 1, -1])
