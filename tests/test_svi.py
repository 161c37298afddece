import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv

EVENT, K, N = (6,), 3, 5


def make():
    torch.manual_seed(7)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, EVENT, hidden_features=(4,), variance="shared"),
        guide=pv.guides.DiagonalNormal(EVENT, K, hidden_features=(8,)),
    ).double()


def make_svi(vae, loss=None, **options):
    optimizer = torch.optim.Adam(vae.parameters(), 0.01)
    return pv.SVI(vae.model, vae.guide, optimizer, loss or TraceMeanField_ELBO(), **options)


@pytest.mark.parametrize(
    "estimator",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceGraph_ELBO(),
    ],
    ids=lambda e: f"{type(e).__name__}-{e.num_particles}-{e.vectorize_particles}",
)
def test_upstream_svi_takes_the_same_path_on_the_same_random_numbers(estimator):
    ours, theirs = make(), make()
    batches = torch.randn(4, N, *EVENT, dtype=torch.float64)
    losses = []
    for svi in (
        make_svi(ours, estimator),
        pyro.infer.SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), estimator),
    ):
        torch.manual_seed(11)
        losses.append([svi.step(batches[i % 4]) for i in range(20)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-10, atol=0)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_evaluate_loss_moves_nothing_and_agrees_with_the_estimator():
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    svi = make_svi(vae)
    before = copy.deepcopy(vae.state_dict())
    torch.manual_seed(2)
    found = svi.evaluate_loss(x)
    torch.manual_seed(2)
    assert found == TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_clipping_is_of_the_whole_gradient():
    x = 100 * torch.randn(N, *EVENT, dtype=torch.float64)
    gradients = []
    for clip_norm in (None, 0.5):
        vae = make()
        svi = pv.SVI(
            vae.model,
            vae.guide,
            torch.optim.SGD(vae.parameters(), 0.0),
            TraceMeanField_ELBO(),
            clip_norm=clip_norm,
        )
        torch.manual_seed(2)
        svi.step(x)
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
    free, clipped = gradients
    assert free.norm() > 100
    torch.testing.assert_close(clipped, free * 0.5 / free.norm(), rtol=1e-6, atol=0)


def test_any_pyro_pair_trains():
    weight = nn.Parameter(torch.tensor(0.0))

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("latent", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("latent", dist.Normal(weight * x, 0.7))

    svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.02), TraceMeanField_ELBO())
    x = torch.randn(40)
    for _ in range(200):
        svi.step(x)
    assert weight.item() == pytest.approx(0.5, abs=0.1)  # the posterior mean is x / 2


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's warning, before our error
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda vae: vae.likelihood.raw_scale.data.fill_(float("nan")),
            "parameter 'likelihood.raw_scale' is not",
        ),
        (
            lambda vae: next(vae.posterior.parameters()).data.fill_(float("inf")),
            "parameter 'posterior.network.1",
        ),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_a_loss_that_is_not_finite_stops_before_the_parameters(spoil, message, validate):
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    spoil(vae)
    before = copy.deepcopy(vae.state_dict())
    with pyro.validation_enabled(validate), pytest.raises(pv.NonFiniteError, match=message):
        make_svi(vae).step(x)
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("validate", [True, False])
def test_a_network_that_overflows_is_named_by_site_and_datum(validate):
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    x[3] = 1e200
    with (
        pyro.validation_enabled(validate),
        pytest.raises(pv.NonFiniteError, match=r"site '[xz]' has (value|log prob) .* at index \[3"),
    ):
        make_svi(vae).step(x)


def test_wrong_arguments_are_refused():
    vae = make()
    adam = torch.optim.Adam(vae.parameters())
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer.*got Adam|got PyroOptim"):
        pv.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(TypeError, match="got Trace_ELBO itself: call it"):
        pv.SVI(vae.model, vae.guide, adam, Trace_ELBO)
    with pytest.raises(TypeError, match=r"such as Trace_ELBO.*got function"):
        pv.SVI(vae.model, vae.guide, adam, lambda *_: 0)
    with pytest.raises(ValueError, match="clip_norm must be positive; got 0"):
        pv.SVI(vae.model, vae.guide, adam, Trace_ELBO(), clip_norm=0)
