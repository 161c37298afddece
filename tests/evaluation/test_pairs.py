"""`evaluate`, annealing and export for models of several arguments, latents and observed sites."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import config_enumerate

import pyro_vae as pv

N, NOISE = 9, 0.6

pytestmark = pytest.mark.usefixtures("double")


def covariates():
    """x = z w + y v + noise, z ~ N(0, 1), in three dimensions; the guide is near the posterior."""
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, 3, generator=generator)
    y, x = torch.randn(N, generator=generator), torch.randn(N, 3, generator=generator)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z[..., None] * w + y[:, None] * v
            pyro.sample("x", dist.Normal(mean[..., :2], NOISE).to_event(1), obs=x[:, :2])
            pyro.sample("last", dist.Normal(mean[..., 2], NOISE), obs=x[:, 2])

    def guide(x, y):
        precision = 1 + w.square().sum() / NOISE**2
        with pyro.plate("data", len(x)):
            loc = (x - y[:, None] * v) @ w / NOISE**2 / precision
            widen = pyro.param("widen", torch.tensor(1.2), constraint=constraints.positive)
            pyro.sample("z", dist.Normal(loc, widen * precision**-0.5))

    covariance = w.outer(w) + NOISE**2 * torch.eye(3)
    exact = dist.MultivariateNormal(y[:, None] * v, covariance).log_prob(x)
    return pv.Pair(model, guide), {"x": x, "y": y}, exact


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_the_evidence_of_a_model_with_covariates_is_exact(kind):
    pair, data, exact = covariates()
    data = data if kind == "dict" else (data["x"], data["y"])
    report = pv.evaluate(pair, data, num_particles=2000, progress=False)
    error = report.per_datum.log_evidence - exact
    assert (error.abs() < 5 * report.per_datum.log_evidence_mc_se + 1e-9).all()
    assert report.log_evidence == pytest.approx(exact.mean().item(), abs=5 * report.log_evidence_mc_se)
    assert report.num_dimensions == 3
    assert report.observed_names == ["x", "last"]
    few = pv.evaluate(pair, data, num_particles=200, progress=False)  # of one run, as those by site
    by_site = few.per_datum.site_log_likelihood.sum(1)
    torch.testing.assert_close(by_site, few.per_datum.expected_log_likelihood, rtol=0, atol=1e-10)
    assert report.kl_by_site["z"].value == pytest.approx(report.mean("kl").value)
    assert "of last" in repr(report)


def test_annealing_and_export_take_several_arguments():
    pair, data, exact = covariates()
    annealed = pv.annealed_importance_sampling(pair, data, num_temperatures=60, progress=False)
    error = annealed.weights.log_mean - exact
    assert (error.abs() < 6 * annealed.weights.standard_error + 0.02).all()
    idata = pv.to_inference_data(pair, data, num_samples=40, progress=False)
    assert idata["posterior"]["z"].shape == (1, 40, N)
    assert set(idata["observed_data"]) == {"x", "last"}


def test_a_tuple_of_functions_reads_pyros_store():
    pair, data, _ = covariates()
    model, guide = pair.written
    with pyro.get_param_store().scope():
        pyro.param("widen", torch.tensor(3.0), constraint=constraints.positive)
        wide = pv.evaluate((model, guide), data, num_particles=50, progress=False)
    assert wide.elbo < pv.evaluate(pair, data, num_particles=50, progress=False).elbo - 0.5


def test_what_has_no_evidence_of_single_data_gets_the_elbo_of_the_whole():
    x = torch.randn(N, generator=torch.Generator().manual_seed(1)) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        variance = 1 / (1 + len(x))
        pyro.sample("mean", dist.Normal(x.sum() * variance, variance**0.5))

    report = pv.evaluate((model, guide), x, num_particles=30, progress=False)
    covariance = torch.ones(N, N) + torch.eye(N)
    exact = dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(x).item()
    assert report.elbo == pytest.approx(exact / N, abs=5 * report.elbo_se)
    assert report.elbo_se < 0.1
    assert report.log_evidence is None
    assert report.pareto_k is None
    assert "'mean' lies outside the data plate" in report.reason
    assert report.reason in repr(report)


def test_the_elbo_of_the_whole_is_a_mean_over_runs_with_its_error(monkeypatch):
    losses = iter([-30.0, -36.0, 0.0, -6.0])
    estimator = SimpleNamespace(loss=lambda *pair_and_data: next(losses))
    monkeypatch.setattr("pyro_vae.evaluation.whole.default_loss", lambda *pair_and_data: estimator)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=len(x)):  # the loss speaks for 6 data, x are 3
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    report = pv.evaluate((model, guide), torch.zeros(3), num_particles=4, progress=False)
    assert report.elbo == pytest.approx(3.0, rel=1e-12)  # of 5, 6, 0 and 1 per datum
    assert report.elbo_se == pytest.approx((26 / 3 / 4) ** 0.5, rel=1e-12)


def test_an_enumerated_latent_is_summed_out():
    x = torch.tensor([0.3, -1.0, 2.0])
    probs, locs = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.5, 1.5])

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)

    report = pv.evaluate((model, lambda x: None), x, num_particles=3, progress=False)
    exact = (probs.log() + dist.Normal(locs, 0.5).log_prob(x[:, None])).logsumexp(1).mean()
    assert report.elbo == pytest.approx(exact.item(), abs=1e-10)
    assert math.isclose(report.elbo_se, 0.0, abs_tol=1e-12)
    assert "all latent sites, such as 'k', are summed out" in report.reason


def test_what_is_no_pair_is_refused():
    for wrong in (3, torch.nn.Linear(2, 2), (print,), (print, 3)):
        with pytest.raises(TypeError, match=r"expected (an object with|a model and) .*call evaluate"):
            pv.evaluate(wrong, torch.zeros(3, 2), progress=False)
