import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.closed_form import multivariate_normal_kl

K, N, S = 3, 5, 7


def full(*batch):
    scale_tril = (
        torch.randn(*batch, K, K).double().tril(-1) + torch.rand(*batch, K).double().diag_embed() + 0.1
    )
    return dist.MultivariateNormal(torch.randn(*batch, K).double(), scale_tril=scale_tril.tril())


def low_rank(*batch):
    return dist.LowRankMultivariateNormal(
        torch.randn(*batch, K).double(),
        torch.randn(*batch, K, 2).double(),
        torch.rand(*batch, K).double() + 0.1,
    )


def diagonal(*batch):
    return dist.Normal(torch.randn(*batch, K).double(), torch.rand(*batch, K).double() + 0.1).to_event(1)


@pytest.mark.parametrize("make", [full, low_rank])
@pytest.mark.parametrize(
    ("p_batch", "q_batch"), [((), ()), ((N,), ()), ((N,), (N,)), ((S, 1), (N,)), ((), (N,))]
)
def test_it_equals_the_kl_derived_by_hand(make, p_batch, q_batch):
    p, q = make(*p_batch), diagonal(*q_batch)
    by_hand = multivariate_normal_kl(
        p.loc, torch.linalg.cholesky(p.covariance_matrix), q.mean, q.stddev.diag_embed()
    )
    torch.testing.assert_close(kl_divergence(p, q), by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [full, low_rank])
def test_expanded_distributions_have_it_too(make):
    p, q = make(N), diagonal()
    expanded = kl_divergence(p.expand((S, N)), q.expand((S, N)))
    assert expanded.shape == (S, N)
    torch.testing.assert_close(expanded, kl_divergence(p, q).expand(S, N), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [full, low_rank])
@pytest.mark.parametrize(
    "q",
    [
        dist.Laplace(torch.zeros(K), 1.0).to_event(1),
        dist.Normal(torch.zeros(2, K), 1.0).to_event(2),
        diagonal().mask(False),
    ],
)
def test_other_distributions_stay_unknown(make, q):
    with pytest.raises(NotImplementedError):
        kl_divergence(make(), q)


@pytest.mark.parametrize("guide", [pv.guides.FullCovarianceNormal, pv.guides.LowRankNormal])
@pytest.mark.parametrize("prior", [pv.priors.StandardNormal, pv.priors.LearnedNormal])
@pytest.mark.parametrize("vectorize", [False, True])
def test_trace_mean_field_elbo_takes_the_kl_from_there(guide, prior, vectorize):
    vae = pv.VAE(
        prior=prior(K),
        likelihood=pv.likelihoods.Normal(K, (4,), network=nn.Linear(K, 4)),
        guide=guide((4,), K),
    ).double()
    nn.init.zeros_(vae.likelihood.network.weight)  # x tells nothing of z: the KL is all that might vary
    x = torch.randn(N, 4).double()
    q, p = vae.encode(x), vae.prior()
    reconstruction = vae.decode(torch.zeros(N, K).double()).log_prob(x)
    exact = reconstruction - multivariate_normal_kl(
        q.mean, torch.linalg.cholesky(q.covariance_matrix), p.mean, p.stddev.diag()
    )
    options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    loss = TraceMeanField_ELBO(**options).loss(vae.model, vae.guide, x)
    assert loss == pytest.approx(-exact.sum().item(), rel=1e-10)
    assert abs(Trace_ELBO(**options).loss(vae.model, vae.guide, x) - loss) > 1e-3  # which samples it
