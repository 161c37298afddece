"""`evaluate`, annealing and export for models of several arguments, latents and observed sites."""

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contexts import semi_supervised, with_few_classes
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from solved import data as rows_of
from solved import linear_gaussian

import pyro_vae as pv
from pyro_vae.evaluation import draws

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


def test_a_shared_latent_is_exported_by_plates():
    x = torch.randn(N, generator=torch.Generator().manual_seed(1)) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("parts", 3):
            weight = pyro.sample("weight", dist.Normal(4.0, 0.5))
        with pyro.plate("data", len(x)):
            seen = poutine.mask(mask=torch.arange(len(x)) != 2)
            with seen:
                pyro.sample("x", dist.Normal(mean[0] + weight.sum(), 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(torch.tensor([1.0, -2.0]), 0.1).to_event(1))
        with pyro.plate("parts", 3):
            pyro.sample("weight", dist.Normal(0.0, 0.2))

    idata = pv.to_inference_data((model, guide), x, num_samples=200, progress=False)
    mean, weight = (idata["posterior"][name] for name in ("mean", "weight"))
    assert mean.dims == ("chain", "draw", "mean_dim")
    assert weight.dims == ("chain", "draw", "parts")
    assert abs(mean.values[0].mean(0) - [1.0, -2.0]).max() < 5 * 0.1 / 200**0.5
    predicted = idata["posterior_predictive"]["x"]
    assert predicted.sizes == {"chain": 1, "draw": 200, "data": N}
    error = predicted.values[0, :, 0] - mean.values[0, :, 0] - weight.values[0].sum(1)
    assert abs(error.mean()) < 5 / 200**0.5
    assert idata["prior"]["weight"].values.mean() == pytest.approx(4.0, abs=5 * 0.5 / 600**0.5)
    observed = idata["observed_data"]["x"].values
    assert np.isnan(observed[2])
    assert np.delete(observed - x.numpy(), 2) == pytest.approx(0)
    first = [dist.Normal(0.0, 1.0).log_prob(torch.tensor(mean.values[0, 5])).sum()]
    first.append(dist.Normal(4.0, 0.5).log_prob(torch.tensor(weight.values[0, 5])).sum())
    centre = torch.tensor(mean.values[0, 5, 0] + weight.values[0, 5].sum())
    first.append(dist.Normal(centre, 1.0).log_prob(x)[torch.arange(N) != 2].sum())
    assert idata["sample_stats"]["lp"].values[0, 5] == pytest.approx(float(sum(first)), abs=1e-10)
    assert "log_likelihood" not in list(idata.groups() if callable(idata.groups) else idata.groups)
    with pytest.raises(ValueError, match="oversample must be 1.*'mean' lies outside the data plate 'data'"):
        pv.to_inference_data((model, guide), x, oversample=2, progress=False)


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


LOCS, PROBS = torch.tensor([-2.0, 0.5, 1.0]), torch.tensor([0.5, 0.3, 0.2])


def guide_of_z(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.4 * x, 0.7))


def mixture(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Categorical(PROBS.double()), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + LOCS[y], 0.8), obs=x)


def test_sites_that_are_summed_out_are_exported_given_the_data_and_the_other_draws(monkeypatch):
    monkeypatch.setattr(draws, "_PARTICLES", 700)  # in parts
    x, count = torch.linspace(-2, 2, N), 2000
    idata = pv.to_inference_data((mixture, guide_of_z), x, num_samples=count, progress=False)
    assert set(idata["posterior"]) == set(idata["prior"]) == {"z", "y"}
    assert list(idata["observed_data"]) == list(idata["prior_predictive"]) == ["x"]
    z, y = (torch.tensor(idata["posterior"][name].values[0]) for name in ("z", "y"))
    joint = dist.Normal(z[..., None] + LOCS, 0.8).log_prob(x[:, None]) + PROBS.log()
    probability = joint.softmax(-1)
    difference = (y[..., None] == torch.arange(3)).double() - probability
    spread = (probability * (1 - probability)).mean(0).sqrt() / math.sqrt(count)
    assert (difference.mean(0).abs() < 5 * spread + 1e-9).all()
    predicted = torch.tensor(idata["posterior_predictive"]["x"].values[0]) - z - LOCS[y.long()]
    assert abs(predicted.mean()) < 5 * 0.8 / math.sqrt(N * count)
    assert predicted.std().item() == pytest.approx(0.8, rel=5 / math.sqrt(2 * N * count))
    shares = torch.tensor(idata["prior"]["y"].values[0]).long().flatten().bincount() / (N * count)
    assert (shares - PROBS).abs().max() < 5 * 0.5 / math.sqrt(N * count)


def test_sites_that_are_summed_out_in_a_chain_and_in_another_plate_are_exported():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            state = 0
            for t in pyro.markov(range(2)):
                p = (0.1 + torch.eye(3))[state]
                state = pyro.sample(f"y_{t}", dist.Categorical(p), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(z + 40 * LOCS[state], 0.1), obs=x + 40 * LOCS[t])
            with pyro.plate("repeats", 4, dim=-2):
                each = pyro.sample("each", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
                pyro.sample("w", dist.Normal(LOCS[each], 0.01), obs=LOCS[torch.arange(4)[:, None] % 3])

    idata = pv.to_inference_data(
        (model, lambda x: guide_of_z(2.5 * x)),
        torch.linspace(-2, 2, N),
        num_samples=6,
        max_plate_nesting=2,
        progress=False,
    )
    posterior = idata["posterior"]
    assert posterior["each"].shape == (1, 6, N, 4)
    assert (posterior["each"].values == [0, 1, 2, 0]).all()
    assert (posterior["y_0"].values == 0).all()
    assert (posterior["y_1"].values == 1).all()
    assert idata["posterior_predictive"]["w"].values == pytest.approx(
        LOCS.numpy()[[0, 1, 2, 0]] + np.zeros((1, 6, N, 4)), abs=0.06
    )


def test_classes_that_are_missing_are_missing_in_the_export():
    vae, (x, y) = semi_supervised(), with_few_classes()
    idata = pv.to_inference_data(vae, (x, y), num_samples=5, progress=False)
    missing = (y < 0).numpy()
    classes = idata["observed_data"]["y_observed"].values
    assert classes[~missing].tolist() == y[y >= 0].tolist()
    for group, name, expected in [
        ("observed_data", "y_observed", missing),
        ("posterior", "y_unobserved", ~missing),
        ("prior", "y_unobserved", ~missing),
        ("posterior_predictive", "y_observed", missing),
        ("prior_predictive", "y_observed", missing),
    ]:
        found = np.isnan(idata[group][name].values)
        assert (found == expected).all(), (group, name)
    assert not np.isnan(idata["posterior_predictive"]["x"].values).any()
    all_given = pv.to_inference_data(vae, (x, y.clamp(min=0)), num_samples=5, progress=False)
    assert all_given["observed_data"]["y_observed"].dtype == np.int32


def test_missing_values_are_missing_in_the_export_and_predicted():
    exact, vae = linear_gaussian(scale=1.2)
    x = rows_of(exact, N)
    x[2, 3] = x[5, 0] = torch.nan
    idata = pv.to_inference_data(vae, x, missing="nan", num_samples=3000, progress=False)
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, x.numpy())
    assert idata.attrs["missing"] == "nan"
    predicted = torch.tensor(idata["posterior_predictive"]["x"].values[0])
    mean = vae.decode(torch.tensor(idata["posterior"]["z"].values[0])).mean
    spread = exact.noise_variance**0.5 / math.sqrt(3000)
    assert ((predicted - mean).mean(0).abs() < 5 * spread).all()
    report = pv.evaluate(vae, x, missing="nan", num_particles=3000, progress=False)
    log_weight = torch.tensor(idata["sample_stats"]["log_weight"].values[0])
    log_mean = (log_weight.logsumexp(0) - math.log(3000)).mean()
    assert float(log_mean) == pytest.approx(report.log_evidence, abs=1e-4)


def test_annealing_estimates_the_evidence_of_what_is_observed():
    exact, vae = linear_gaussian()
    x = rows_of(exact, N)
    x[2, 3] = x[5, 0] = x[5, 1] = torch.nan
    report = pv.annealed_importance_sampling(
        vae, x, missing="nan", num_chains=40, num_temperatures=80, progress=False
    )
    for row, found, error in zip(x, report.weights.log_mean, report.weights.standard_error, strict=True):
        seen = ~row.isnan()
        part = type(exact)(exact.W[seen], exact.b[seen], exact.noise_variance)
        assert abs(found - part.log_evidence(row[None, seen])) < 5 * error
