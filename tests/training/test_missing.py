"""`missing="nan"`: bounds of the observed values alone, against exact ones; no NaN in a network."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

N, D, K = 9, 5, 2

pytestmark = pytest.mark.usefixtures("double")


def table(count: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, D, generator=generator)
    return torch.where(torch.rand(count, D, generator=generator) < 0.3, torch.nan, x)


def make(*, width: tuple[int, ...] = (), **options) -> pv.VAE:
    torch.manual_seed(2)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, (D,), variance=0.5, hidden_features=width),
        guide=pv.guides.FullCovarianceNormal((D,), K, hidden_features=(16,), **options),
    )


def exact(vae, x):
    """Return log p(x_observed) of a linear VAE: its observed rows are linear too."""
    layer = vae.likelihood.network[-1]
    w, b = layer.weight.detach(), layer.bias.detach()
    rows = []
    for row in x:
        seen = ~row.isnan()
        if not seen.any():
            rows.append(torch.zeros(()))
            continue
        covariance = w[seen] @ w[seen].T + 0.5 * torch.eye(int(seen.sum()))
        rows.append(dist.MultivariateNormal(b[seen], covariance).log_prob(row[seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("mask_input", [False, True])
def test_evidence_of_what_is_observed_is_exact(mask_input):
    vae, x = make(mask_input=mask_input), table()
    x[4] = torch.nan
    history = pv.fit(
        vae, x, missing="nan", epochs=150, batch_size=N, learning_rate=0.02, validation=x, progress=False
    )
    report = pv.evaluate(vae, x, missing="nan", num_particles=4000, progress=False)
    error = report.per_datum.log_evidence - exact(vae, x)
    assert (error.abs() < 5 * report.per_datum.log_evidence_mc_se + 1e-6).all()
    assert report.num_dimensions == float((~x.isnan()).sum()) / N
    assert report.elbo < report.log_evidence + 1e-6
    assert math.isfinite(history[-1].validation_elbo)


def test_terms_are_those_of_the_observed_values():
    vae, x = make(width=(7,)), table()
    observed = ~x.isnan()
    filled = torch.where(observed, x, 123.0)  # plays no role
    t = pv.terms(vae.model, vae.guide, filled, observed=observed, num_particles=3)
    z = t.sites.draws["z"]
    mean = vae.decode(z).mean
    by_element = dist.Normal(mean, math.sqrt(0.5)).log_prob(torch.where(observed, x, 0.0))
    expected = torch.where(observed, by_element, 0.0).sum(-1)
    torch.testing.assert_close(t.log_likelihood, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(t.by_element("x"), torch.where(observed, by_element, 0.0), rtol=0, atol=1e-10)
    q = vae.posterior(torch.where(observed, x, 0.0))
    torch.testing.assert_close(t.log_guide, q.log_prob(z), rtol=0, atol=1e-10)


def test_terms_by_element_of_what_is_complete():
    vae, x = make(width=(7,)), torch.randn(N, D)
    t = pv.terms(vae, x, num_particles=3)
    assert t.by_element("x").shape == (3, N, D)
    torch.testing.assert_close(t.by_element("x").sum(-1), t.log_likelihood, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="'y' is not an observed site: 'x'"):
        t.by_element("y")


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_steps_and_gradients_do_not_depend_on_what_is_missing(engine):
    x = table(24)
    finals = []
    for garbage in (0.0, -55.5):
        vae = make(width=(7,), mask_input=True)
        svi = pv.SVI(vae, torch.optim.Adam(vae.parameters(), 0.01), engine=engine)
        torch.manual_seed(3)
        observed = ~x.isnan()
        filled = torch.where(observed, x, garbage)
        losses = [svi.step(filled, observed=observed) for _ in range(12)]
        assert all(math.isfinite(loss) for loss in losses)
        finals.append([*losses, *(p.sum().item() for p in vae.parameters())])
    assert finals[0] == pytest.approx(finals[1], rel=1e-12)


def test_nothing_missing_changes_nothing():
    x = torch.randn(20, D)
    plain, told = make(width=(7,)), make(width=(7,))
    first = pv.fit(plain, x, epochs=2, batch_size=8, progress=False)
    second = pv.fit(told, x, epochs=2, batch_size=8, missing="nan", progress=False)
    assert first[-1].train_bound == pytest.approx(second[-1].train_bound, abs=1e-10)
    for own, other in zip(plain.parameters(), told.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "likelihood",
    [
        pv.likelihoods.Bernoulli(K, (D,)),
        pv.likelihoods.Poisson(K, (D,)),
        pv.likelihoods.StudentT(K, (D,)),
        pv.likelihoods.DiscretizedLogistic(K, (D,)),
        pv.likelihoods.BetaBinomial(K, (D,)),
        pv.likelihoods.NegativeBinomial(K, (D,)),
        pv.likelihoods.ContinuousBernoulli(K, (D,)),
    ],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_every_likelihood_of_the_library(likelihood):
    x = torch.where(table(12).isnan(), torch.nan, torch.ones(12, D))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K), likelihood=likelihood, guide=pv.guides.DiagonalNormal((D,), K)
    ).double()
    history = pv.fit(vae, x, missing="nan", epochs=2, batch_size=5, progress=False)
    assert math.isfinite(history[-1].train_bound)


def test_zero_need_not_lie_in_the_support():
    class LogNormal(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(K, D)

        def forward(self, z):
            return dist.LogNormal(self.network(z), 1.0).to_event(1)

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K), likelihood=LogNormal(), guide=pv.guides.DiagonalNormal((D,), K)
    )
    history = pv.fit(vae, table(12).exp(), missing="nan", epochs=2, batch_size=5, progress=False)
    assert math.isfinite(history[-1].train_bound)
    x = table(12).exp()
    x[3, 1] = -1.0
    with pytest.raises(ValueError, match=r"x\[3, 1\] = -1"):
        pv.fit(vae, x, missing="nan", epochs=1, progress=False)


def test_images_with_masks_as_channels():
    x = (torch.rand(10, 1, 8, 8) < 0.5).double()
    x[:, :, :3] = torch.nan
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, (1, 8, 8)),
        guide=pv.guides.DiagonalNormal(
            (1, 8, 8), K, mask_input=True, network=pv.networks.ConvEncoder((2, 8, 8), 2 * K, channels=(3,))
        ),
    )
    pv.fit(vae, x, missing="nan", epochs=1, batch_size=4, progress=False)
    imputed = pv.applications.impute(vae, x, num_particles=20)
    assert torch.equal(imputed.mean[:, :, 3:], x[:, :, 3:])


def test_a_context_and_labels_go_along():
    x, y = table(20), torch.arange(20) % 3
    network = {"context_dim": 3, "hidden_features": (8,)}
    parts = {
        "prior": pv.priors.StandardNormal(K),
        "likelihood": pv.likelihoods.Normal(K, (D,), **network),
        "guide": pv.guides.DiagonalNormal((D,), K, mask_input=True, **network),
    }
    cvae = pv.ConditionalVAE(**parts)
    assert math.isfinite(pv.fit(cvae, (x, y), missing="nan", epochs=1, progress=False)[-1].train_bound)
    report = pv.evaluate(cvae, {"x": x, "y": y}, missing="nan", num_particles=10, progress=False)
    assert math.isfinite(report.elbo)
    y[6:] = -1
    vae = pv.SemiSupervisedVAE(**parts, classifier=pv.networks.MLP(D, 3), num_classes=3)
    history = pv.fit(vae, (x, y), missing="nan", epochs=2, batch_size=10, progress=False)
    assert math.isfinite(history[-1].train_bound)
    assert math.isfinite(pv.evaluate(vae, (x, y), missing="nan", num_particles=10, progress=False).elbo)


def test_a_pair_is_told():
    def model(x, observed):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0, 1))
            p = dist.Normal(z[..., None].expand(*z.shape, D), scale)
            pyro.sample("x", p.mask(observed).to_event(1), obs=x)

    def guide(x, observed):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) / (1 + observed.sum(-1)), 0.5))

    pair = pv.Pair(model, guide)
    pv.fit(pair, table(20), missing="nan", epochs=1, progress=False)
    report = pv.evaluate(pair, table(20), missing="nan", num_particles=200, progress=False)
    assert report.num_dimensions == float((~table(20).isnan()).sum()) / 20


def test_what_is_refused():
    vae, x = make(), table()
    with pytest.raises(ValueError, match=r"x\[.*\] = nan .*pass missing='nan'"):
        pv.fit(vae, x, progress=False)
    with pytest.raises(ValueError, match="missing must be None or 'nan'"):
        pv.fit(vae, x, missing="zero", progress=False)
    infinite = torch.where(x.isnan(), torch.inf, x)
    with pytest.raises(ValueError, match=r"x\[.*\] = inf"):
        pv.fit(vae, infinite, missing="nan", progress=False)
    with pytest.raises(TypeError, match="data with missing values must be floating point"):
        pv.fit(vae, torch.zeros(N, D, dtype=torch.long), missing="nan", progress=False)
    with pytest.raises(TypeError, match="this model takes no such argument"):
        pv.fit(pv.Pair(lambda x: None, lambda x: None), x, missing="nan", progress=False)
    mask = torch.ones(N, D)
    with pytest.raises(TypeError, match="observed must be boolean"):
        pv.fit(vae, {"x": torch.zeros(N, D), "observed": mask}, progress=False)
    with pytest.raises(ValueError, match=r"observed must have the shape of x, \(9, 5\); got \(9,\)"):
        pv.evaluate(vae, {"x": torch.zeros(N, D), "observed": mask[:, 0] > 0}, progress=False)
    with pytest.raises(ValueError, match=r"observed must have the shape of x, \(9, 5\); got \(9,\)"):
        vae.model(torch.zeros(N, D), observed=torch.ones(N, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"observed must be boolean; .*observed\.bool\(\)"):
        vae.model(torch.zeros(N, D), observed=torch.ones(N, D))


def test_elements_that_are_not_independent():
    class Correlated(nn.Module):
        def forward(self, z):
            return dist.MultivariateNormal(z, torch.eye(K))

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K), likelihood=Correlated(), guide=pv.guides.DiagonalNormal((K,), K)
    )
    with pytest.raises(ValueError, match="expected independent elements"):
        vae.model(torch.zeros(N, K), observed=torch.ones(N, K, dtype=torch.bool))


def test_data_without_a_value_are_refused():
    """Rows without any are fine, as is a batch of them."""
    x = table()
    x[:4] = torch.nan
    pv.fit(make(), x, missing="nan", epochs=1, batch_size=2, progress=False)
    with pytest.raises(ValueError, match=r"every value of the data is missing \(NaN\)"):
        pv.fit(make(), x[:4], missing="nan", epochs=1, progress=False)
