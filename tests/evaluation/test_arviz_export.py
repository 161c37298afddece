"""Export to ArviZ: draws, weights and evidence that agree with the model, and netCDF files."""

import math
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from solved import D, K, N, data, linear_gaussian, within

import pyro_vae as pv
from pyro_vae.evaluation import draws
from pyro_vae.evaluation.arviz_compat import arviz_version, forest, inference_data
from pyro_vae.evaluation.arviz_export import _log_mean_of_others
from pyro_vae.evaluation.importance_weights import summarise_weights

S = 300
GENERATION_0 = arviz_version().startswith("0.")

import arviz as az  # noqa: E402 (after the library, which silences the announcement of ArviZ 1.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values"),  # by ArviZ 0.23
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
]


@pytest.fixture(autouse=True)
def no_window():
    backend = mpl.get_backend()
    mpl.use("Agg")
    yield
    mpl.pyplot.close("all")
    mpl.use(backend)


def convert(vae, x, **options):
    return pv.to_inference_data(vae, x, progress=False, **{"num_samples": S, **options})


def tensor(idata, group, name):
    """A variable without its chain."""
    values = idata[group][name]
    return torch.tensor(values.values[0] if "chain" in values.dims else values.values)


def evidence(loo):
    return float(loo.elpd_loo if GENERATION_0 else loo.elpd)


def test_the_groups_have_named_dimensions_coordinates_and_settings():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, (1, 2, 3), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((1, 2, 3), K, hidden_features=(4,)),
    )
    x = torch.bernoulli(torch.full((N, 1, 2, 3), 0.4))
    idata = convert(vae, x, seed=3)
    per_draw, pixels = ("chain", "draw", "datum"), ("x_channel", "x_row", "x_column")
    dims = {
        ("posterior", "z"): (*per_draw, "z_dim"),
        ("prior", "z"): (*per_draw, "z_dim"),
        ("posterior_predictive", "x"): (*per_draw, *pixels),
        ("prior_predictive", "x"): (*per_draw, *pixels),
        ("observed_data", "x"): ("datum", *pixels),
        ("log_likelihood", "x"): per_draw,
        ("sample_stats", "log_weight"): per_draw,
        ("sample_stats", "log_conditional"): per_draw,
        ("sample_stats", "lp"): per_draw,
        ("sample_stats", "pareto_k"): ("datum",),
        ("sample_stats", "effective_sample_size"): ("datum",),
    }
    sizes = {"chain": 1, "draw": S, "datum": N, "z_dim": K, "x_channel": 1, "x_row": 2, "x_column": 3}
    for (group, name), expected in dims.items():
        variable = idata[group][name]
        assert variable.dims == expected
        assert all(
            len(variable[dim]) == sizes[dim] and variable[dim][-1] == sizes[dim] - 1 for dim in expected
        )
    found = {(group, name) for group in {group for group, _ in dims} for name in idata[group].data_vars}
    assert found == set(dims)
    assert idata["posterior_predictive"]["x"].dtype == np.int8  # so that ArviZ treats them as discrete
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, x.numpy())
    assert idata.attrs["inference_library"] == "pyro_vae"
    assert (idata.attrs["num_samples"], idata.attrs["seed"]) == (S, 3)
    assert idata.attrs["torch_version"] == torch.__version__


@pytest.mark.parametrize(("rows", "oversample"), [(draws._ROWS, 1), (2 * S, 1), (100, 1), (7 * S, 3)])
def test_draws_data_and_weights_belong_together(monkeypatch, rows, oversample):
    monkeypatch.setattr(draws, "_ROWS", rows)
    monkeypatch.setattr(draws, "_PARTICLES", rows)
    exact, vae = linear_gaussian(scale=1.3)
    x = data(exact)
    idata = convert(vae, x, oversample=oversample)
    z = tensor(idata, "posterior", "z")
    log_conditional = vae.decode(z).log_prob(x)
    lp = log_conditional + vae.prior().log_prob(z)
    torch.testing.assert_close(tensor(idata, "sample_stats", "log_conditional"), log_conditional.detach())
    torch.testing.assert_close(tensor(idata, "sample_stats", "lp"), lp.detach())
    log_weight = (lp - vae.encode(x).log_prob(z)).detach()
    torch.testing.assert_close(tensor(idata, "sample_stats", "log_weight"), log_weight)
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, x.numpy())
    if oversample == 1:
        summary = summarise_weights(log_weight)
        torch.testing.assert_close(tensor(idata, "sample_stats", "pareto_k"), summary.pareto_k)
        ess = tensor(idata, "sample_stats", "effective_sample_size")
        torch.testing.assert_close(ess, summary.effective_sample_size)


@pytest.mark.parametrize("oversample", [1, 3])
def test_every_group_has_as_many_draws_as_asked_for(oversample):
    exact, vae = linear_gaussian()
    idata = convert(vae, data(exact), num_samples=7, oversample=oversample)
    for group in ("posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood"):
        for name, variable in idata[group].data_vars.items():
            assert variable.shape[:3] == (1, 7, N), (group, name)
    assert idata["sample_stats"]["log_weight"].shape == idata["sample_stats"]["lp"].shape == (1, 7, N)


def test_posterior_prior_and_predictive_draws_have_their_distributions():
    exact, vae = linear_gaussian(scale=1.3)
    x = data(exact)
    count = 4000
    idata = convert(vae, x, num_samples=count)
    resampled = convert(vae, x, num_samples=count, oversample=4)
    q, p = vae.encode(x), exact.posterior(x)
    noise = exact.noise_variance * torch.eye(D).double()

    def check(draws, mean, covariance):
        """Compare first and second moments over the draws, (S, N, ...), with Gaussian errors."""
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        within(draws.mean(0), mean, (variance / count).sqrt())
        within(draws.var(0) / variance, 1.0, math.sqrt(2 / count))

    def predicted(mean, covariance):
        return mean @ exact.W.T + exact.b, exact.W @ covariance @ exact.W.T + noise

    standard = torch.zeros(K).double(), torch.eye(K).double()
    check(tensor(idata, "posterior", "z"), q.mean.detach(), q.covariance_matrix.detach())
    predictive = predicted(q.mean.detach(), q.covariance_matrix.detach())
    check(tensor(idata, "posterior_predictive", "x"), *predictive)
    check(tensor(idata, "prior", "z"), *standard)
    check(tensor(idata, "prior_predictive", "x"), *predicted(*standard))
    # resampled with replacement from finitely many weights: the errors are about 1.5 times as large
    z = tensor(resampled, "posterior", "z")
    variance = p.covariance_matrix.diagonal(dim1=-2, dim2=-1)
    within(z.mean(0), p.mean, 1.5 * (variance / count).sqrt())
    within(z.var(0) / variance, 1.0, 1.5 * math.sqrt(2 / count))


def test_loo_is_the_importance_weighted_evidence_with_the_tail_of_its_weights():
    exact, vae = linear_gaussian(scale=1.3)
    x = data(exact, 40)
    for oversample in (1, 4):
        idata = convert(vae, x, num_samples=1000, oversample=oversample)
        loo = az.loo(idata, pointwise=True)
        weights = tensor(idata, "sample_stats", "log_weight")
        truth = exact.log_evidence(x)
        spread = weights.std(0) / math.sqrt(1000)
        assert evidence(loo) == pytest.approx(float(truth.sum()), abs=5 * float(spread.square().sum().sqrt()))
        within(torch.tensor(float(loo.se)), math.sqrt(40) * truth.std(correction=0), 0.2)
        if oversample == 1:
            summary = summarise_weights(weights)
            assert evidence(loo) == pytest.approx(float(summary.log_mean.sum()), abs=40 * 1e-4)
            np.testing.assert_allclose(loo.pareto_k.values, summary.pareto_k, atol=2e-3)


def test_loo_warns_of_a_narrow_guide():
    exact, vae = linear_gaussian(scale=0.1)  # k = 1 − 0.1²
    idata = convert(vae, data(exact), num_samples=20_000)
    with pytest.warns(UserWarning, match="Pareto"):
        loo = az.loo(idata, pointwise=True)
    assert (loo.pareto_k > 0.7).all()
    assert (tensor(idata, "sample_stats", "pareto_k") > 0.7).all()


def test_the_log_likelihood_leaves_each_block_out():
    log_weight = torch.randn(12, N).double()
    log_weight[5, 2] = 80.0  # outweighs all others beyond rounding
    for block in (1, 3):
        found = _log_mean_of_others(log_weight, block)
        assert found.shape == (12 // block, N)
        for number in range(12 // block):
            rest = torch.cat([log_weight[: number * block], log_weight[(number + 1) * block :]])
            torch.testing.assert_close(found[number], rest.logsumexp(0) - math.log(12 - block))


def test_two_vaes_are_compared_by_their_evidence():
    exact, vae = linear_gaussian(scale=1.1)
    _, worse = linear_gaussian(scale=1.1)
    with torch.no_grad():
        worse.likelihood.network.bias += 0.5
    x = data(exact, 40)
    table = az.compare({"worse": convert(worse, x), "true": convert(vae, x)})
    assert list(table.index) == ["true", "worse"]
    found = [float(row) for row in table["elpd_loo" if GENERATION_0 else "elpd"]]
    shifted = type(exact)(exact.W, exact.b + 0.5, exact.noise_variance)
    expected = [float(model.log_evidence(x).sum()) for model in (exact, shifted)]
    # the second guide is made for another offset; ArviZ 1.x rounds to what the error leaves
    assert found == pytest.approx(expected, abs=3.0)


def test_summaries_and_figures_of_arviz():
    exact, vae = linear_gaussian(scale=1.1)
    x = data(exact)
    idata = convert(vae, x)
    summary = az.summary(idata, var_names=["z"])
    assert len(summary) == N * K
    mean = vae.encode(x).mean.flatten().tolist()
    assert [float(value) for value in summary["mean"]] == pytest.approx(mean, abs=0.2)
    az.plot_khat(az.loo(idata, pointwise=True))
    if GENERATION_0:
        some = idata.sel(datum=[0, 1])
        az.plot_forest([some, some], model_names=["a", "b"], var_names=["z"])
        az.plot_ppc(idata)
        az.plot_ppc(idata, group="prior")
    else:
        some = idata["posterior"].to_dataset().isel(datum=slice(2))
        az.plot_forest({"a": some, "b": some})
        az.plot_ppc_dist(idata)
        az.plot_prior_posterior(idata, coords={"datum": [0]})


def two_layers_with_rows():
    """A site for each datum, one for each of its three rows, and two observed sites."""

    def latents(rows, loc):
        pyro.sample("b", dist.Normal(loc, 1.0))
        with rows:
            return pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def model(x):
        rows = pyro.plate("rows", 3, dim=-2)
        with pyro.plate("data", len(x), dim=-1):
            a = latents(rows, torch.zeros(()))
            pyro.sample("count", dist.Poisson(2.0), obs=torch.arange(len(x)).float())
            with rows:
                pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            latents(pyro.plate("rows", 3, dim=-2), x[:, 0])

    return SimpleNamespace(model=model, guide=guide)


def test_a_forest_has_a_row_per_index_with_the_chains_as_one():
    values = np.random.default_rng(0).normal(size=(2, 40, 5))  # chains, draws, rows
    values += np.array([0.0, 3.0])[:, None, None]
    dataset = xarray.Dataset({"value": (("chain", "draw", "row"), values)})
    axes = forest(inference_data({"posterior": dataset}, {}), "value", "row")
    assert tuple(axes.figure.get_size_inches()) == pytest.approx((8.0, 1.2 + 0.3 * 5))
    marked = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 1]
    if not GENERATION_0:
        marked = [points.get_offsets()[:, 0] for points in axes.collections]
    np.testing.assert_allclose(np.sort(np.ravel(marked)), np.sort(np.median(values, (0, 1))), atol=1e-10)


def test_plates_and_several_sites_are_named():
    x = torch.randn(N, 3)
    idata = convert(two_layers_with_rows(), x, max_plate_nesting=2)
    per_draw = ("chain", "draw", "datum")
    assert idata["posterior"]["b"].dims == per_draw
    assert idata["posterior"]["a"].dims == (*per_draw, "rows", "a_dim")
    assert idata["posterior_predictive"]["x"].shape == (1, S, N, 3)
    assert idata["posterior_predictive"]["count"].dtype == np.int32
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, x.numpy())
    np.testing.assert_array_equal(idata["observed_data"]["count"].values, np.arange(N))
    assert idata["log_likelihood"]["count_x"].dims == per_draw
    within(tensor(idata, "posterior", "b").mean(0), x[:, 0], 1 / math.sqrt(S))
    within(tensor(idata, "prior", "b").mean(0), 0.0, 1 / math.sqrt(S))


# Files ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_back_unchanged(tmp_path):
    exact, vae = linear_gaussian(scale=1.2)
    idata = convert(vae, data(exact))
    pv.save_netcdf(idata, tmp_path / "vae.nc")
    loaded = az.from_netcdf(tmp_path / "vae.nc")
    names = {name.strip("/") for name in (idata.groups() if GENERATION_0 else idata.groups)} - {""}
    assert len(names) == 7
    for group in names:
        assert set(loaded[group].data_vars) == set(idata[group].data_vars)
        for name, variable in idata[group].data_vars.items():
            assert loaded[group][name].dims == variable.dims
            np.testing.assert_array_equal(loaded[group][name].values, variable.values)
        assert loaded[group].attrs == idata[group].attrs
    assert dict(loaded.attrs) == dict(idata.attrs)
    assert evidence(az.loo(loaded)) == evidence(az.loo(idata))
    assert [path.name for path in tmp_path.iterdir()] == ["vae.nc"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    exact, vae = linear_gaussian()
    idata = convert(vae, data(exact), num_samples=3)
    with pytest.raises(OSError, match="cannot write the netCDF file .*missing"):
        pv.save_netcdf(idata, tmp_path / "missing" / "vae.nc")
    path = tmp_path / "vae.nc"
    path.write_text("an earlier file")

    def fail(data, partial):
        partial.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr("pyro_vae.evaluation.arviz_export.write_netcdf", fail)
    with pytest.raises(OSError, match="vae.nc: no space left"):
        pv.save_netcdf(idata, path)
    assert path.read_text() == "an earlier file"
    assert list(tmp_path.iterdir()) == [path]


# Invalid input and side effects -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (lambda x: x[:0], {}, ValueError, "empty"),
        (lambda x: torch.arange(N), {}, TypeError, "floating point; got torch.int64"),
        (lambda x: x[:, :3], {}, ValueError, r"shape \(N, 5\).*got \(7, 3\)"),
        (lambda x: x, {"num_samples": 1}, ValueError, "num_samples must be at least 2; got 1"),
        (lambda x: x, {"oversample": 0}, ValueError, "oversample must be at least 1; got 0"),
        (lambda x: x, {"num_samples": "9"}, TypeError, "num_samples must be an integer"),
    ],
)
def test_invalid_input_raises(spoil, options, error, message):
    exact, vae = linear_gaussian()
    with pytest.raises(error, match=message):
        convert(vae, spoil(data(exact)), **options)


def test_a_guide_that_does_not_fit_raises():
    pair = SimpleNamespace(model=two_layers_with_rows().model, guide=lambda x: None)
    for convert_or_evaluate in (convert, pv.evaluate):
        with pytest.raises(pv.GuideError, match="the guide has no site"):
            convert_or_evaluate(pair, torch.randn(N, 3), max_plate_nesting=2)


def test_weights_that_are_not_finite_name_the_examples():
    pair = two_layers_with_rows()
    x = torch.randn(N, 3)
    x[5] = 1e30
    with pytest.raises(
        pv.NonFiniteError, match="infinite or NaN for 1 of the examples 0 to 6, counted from 0: index 5; "
    ):
        convert(pair, x, max_plate_nesting=2)


def test_generators_and_modes_are_unchanged():
    exact, vae = linear_gaussian()
    vae.train()
    state = torch.get_rng_state()
    first, second = convert(vae, data(exact)), convert(vae, data(exact))
    assert torch.equal(tensor(first, "posterior", "z"), tensor(second, "posterior", "z"))
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
