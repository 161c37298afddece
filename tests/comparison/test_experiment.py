"""Comparison of estimators: known values are reported, and wrong estimators are detected."""

import copy
import math
import re

import cases
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import solved
import torch
import xarray
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, KLWeighted, Renyi, compare_estimators, plots
from pyro_vae.comparison.result import Comparison
from pyro_vae.comparison.summary import recommendation
from pyro_vae.utils.display import Estimate

ESTIMATORS = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    STL(),
    IWAE(5),
    IWAE(3, 4),
    PIWAE(3, 4),
    CIWAE(0.5, 5),
    Renyi(0.5, 5),
    DReG(3),
    DReG(24),
    VIMCO(5),
    KLWeighted(DReG(3), 0.5),
]


def linear_gaussian(seed=3):
    """Return an exactly solved model, a VAE of it whose guide is not the posterior, and data; float64."""
    exact, vae = solved.linear_gaussian()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Linear(solved.D, 2 * solved.K)
        guide = pv.guides.DiagonalNormal((solved.D,), solved.K, network=network).double()
    with torch.no_grad():  # close to the posterior, so that the importance weights have low variance
        M = solved.K
        network.weight[:M] = vae.posterior.weight + 0.1 * network.weight[:M]
        network.bias[:M] = vae.posterior.offset
        network.weight[M:] *= 0.1
        network.bias[M:] = 0.3
    return exact, vae.with_guide(guide), solved.data(exact)


def compare(vae, x, estimators, **options):
    return compare_estimators(vae.model, vae.guide, x, estimators, progress=False, **options)


@pytest.fixture(scope="module")
def linear():
    exact, vae, x = linear_gaussian()
    with torch.random.fork_rng():
        found = compare(vae, x, ESTIMATORS, num_repeats=40, reference=exact.log_evidence(x))
    return exact, vae, x, found


def row(found, name, variable, **key):
    return found[variable].sel(estimator=name, **key).item()


# Exact results of the linear-Gaussian model


def test_unbiased_estimators_agree_with_the_exact_elbo(linear):
    exact, vae, x, found = linear
    with torch.no_grad():
        q = vae.encode(x)
        elbo = exact.elbo(x, q.mean, q.variance.diag_embed()).mean().item()
    names = found["estimator"].values[found["target"].values == "ELBO"]
    assert set(names) == {"Trace_ELBO()", "TraceMeanField_ELBO()", "TraceGraph_ELBO()", "STL(1)"}
    for name in names:
        t = (row(found, name, "value") - elbo) / row(found, name, "value_se")
        assert abs(t) < 4, name
        gap = exact.log_evidence(x).mean().item() - elbo
        assert abs(row(found, name, "bias") + gap) < 4 * row(found, name, "bias_se")
        assert gap > 0.1


def test_no_correct_estimator_is_called_wrong(linear):
    *_, found = linear
    assert abs(found["bound_bias_t"]).max() < 4
    assert abs(found["gradient_bias_t"]).max() < 4
    assert found["bound_bias_t"].notnull().all()
    assert found["gradient_bias_t"].notnull().all()
    assert not [sentence for sentence in found.findings() if "WRONG" in sentence]
    assert "No value was found to differ from its own bound." in found.findings()


def test_bounds_have_the_bias_given_by_quadrature():
    x, exact, pair = cases.linear_gaussian(1, exact=False)
    many = {1: IWAE(1, 60), 2: IWAE(2, 30), 3: IWAE(3, 30)}  # groups only reduce the noise
    evidence = exact.log_evidence(x)
    found = compare(pair, x, list(many.values()), num_repeats=40, reference=evidence)
    for particles, estimator in many.items():
        with torch.no_grad():
            bound = cases.by_quadrature(cases.importance, pair, x, particles=particles)
        bias = (bound - evidence).mean().item()
        assert abs(row(found, repr(estimator), "bias") - bias) < 4 * row(found, repr(estimator), "bias_se")
        assert row(found, repr(estimator), "bias_t") < -4
    assert "Not distinguishable" not in str(found)


def test_at_the_exact_posterior_only_rounding_errors_remain():
    exact, vae = solved.linear_gaussian()
    x = solved.data(exact)
    found = compare(vae, x, [STL(), IWAE(4)], num_repeats=10, reference=exact.log_evidence(x))
    assert abs(found["bias"]).max() < 1e-10
    assert abs(found["bias_t"]).max() < 4
    assert row(found, "STL(1)", "gradient_variance", parameters="guide") == 0
    assert math.isnan(row(found, "STL(1)", "snr", parameters="guide"))
    assert row(found, "IWAE(4)", "gradient_variance", parameters="guide") > 1e-3


def test_targets_are_named(linear):
    *_, found = linear
    assert row(found, "DReG(24)", "target") == "L_24"
    assert row(found, "IWAE(3, num_groups=4)", "target") == "L_3"
    assert row(found, "PIWAE(3, num_groups=4)", "target") == "L_12"
    assert row(found, "PIWAE(3, num_groups=4)", "gradient_target", parameters="guide") == "L_3"
    assert row(found, "KLWeighted(DReG(3), 0.5)", "target") == "L_3"
    assert row(found, "KLWeighted(DReG(3), 0.5)", "gradient_target", parameters="model") == "L_3, β = 0.5"


def test_common_random_numbers(linear):
    *_, found = linear
    bound = found["bound"]
    for one, other in (("Trace_ELBO()", "STL(1)"), ("IWAE(5)", "VIMCO(5)")):
        assert np.allclose(bound.sel(estimator=one), bound.sel(estimator=other), rtol=1e-12)


def test_signal_to_noise_rises_with_particles_and_with_double_reparameterisation(linear):
    *_, found = linear
    snr = found["snr"]
    assert snr.sel(estimator="DReG(24)", parameters="guide") > 2 * snr.sel(
        estimator="DReG(3)", parameters="guide"
    )
    assert snr.sel(estimator="DReG(3)", parameters="guide") > snr.sel(estimator="IWAE(5)", parameters="guide")
    assert row(found, "IWAE(5)", "snr", parameters="model") > row(
        found, "Trace_ELBO()", "snr", parameters="model"
    )


def test_time_per_effective_sample(linear):
    *_, found = linear
    expected = found["time_per_step"] / found["snr"] ** 2
    assert np.allclose(found["time_per_effective_sample"], expected)
    assert (found["time_per_step"] > 0).all()
    # 24 particles take 8 times the memory of 3, except for tensors without a particle dimension
    ratio = row(found, "DReG(24)", "peak_memory") / row(found, "DReG(3)", "peak_memory")
    assert 3 < ratio < 8.5


# Wrong estimators are detected


class Ascending(STL):
    """The gradient has the wrong sign."""

    def differentiable_loss(self, *args, **kwargs):
        loss = super().differentiable_loss(*args, **kwargs)
        return 2 * loss.detach() - loss


class OnceWeighted(DReG):
    """The guide's gradient is weighted by w̃, not by its square."""

    def surrogate(self, terms):
        weight = terms.log_weight.detach().softmax(0)
        return (weight * (terms.log_weight + terms.log_score)).sum(0)


class Doubled(Trace_ELBO):
    """The loss is too large by a factor of two; the gradient is correct."""

    def differentiable_loss(self, *args, **kwargs):
        loss = super().differentiable_loss(*args, **kwargs)
        return loss + loss.detach()


class Steep(STL):
    """The gradient is too large by a factor of two; the loss is correct."""

    def differentiable_loss(self, *args, **kwargs):
        loss = super().differentiable_loss(*args, **kwargs)
        return 2 * loss - loss.detach()


class Summed(IWAE):
    """Weights are summed, not averaged."""

    def bound(self, terms):
        return terms.log_weight.logsumexp(0)


@pytest.mark.parametrize(
    ("wrong", "value", "model", "guide"),
    [
        (Ascending(4), False, True, True),
        (OnceWeighted(4), False, False, True),
        (Doubled(), True, False, False),
        (Steep(9), False, True, True),
        (Summed(4), True, False, False),
    ],
)
def test_a_wrong_estimator_is_detected_where_it_is_wrong(wrong, value, model, guide):
    exact, vae, x = linear_gaussian()
    found = compare(
        vae, x, {"the wrong one": wrong, "STL": STL()}, num_repeats=60, reference=exact.log_evidence(x)
    )
    assert (abs(row(found, "the wrong one", "bound_bias_t")) > 4) == value
    for kind, expected in (("model", model), ("guide", guide)):
        assert (abs(row(found, "the wrong one", "gradient_bias_t", parameters=kind)) > 4) == expected
        assert abs(row(found, "STL", "gradient_bias_t", parameters=kind)) < 4
    wrong_findings = [sentence for sentence in found.findings() if sentence.startswith("WRONG")]
    assert len(wrong_findings) == value + model + guide + isinstance(wrong, Summed)  # exceeds log p(x) too
    assert all("the wrong one" in sentence for sentence in wrong_findings)


class Flat(ELBO):
    """An ELBO of unknown target."""

    def loss_and_grads(self, model, guide, x):
        return -math.nan if x[0, 0] > 1e6 else 0.0

    def _get_trace(self, *args):
        raise NotImplementedError


def test_an_estimator_with_an_unknown_target_is_not_tested_against_one():
    _, vae, x = linear_gaussian()
    found = compare(vae, x, [Flat(), STL()], num_repeats=10, num_reference_particles=5)
    assert row(found, "Flat()", "target") == "unknown"
    assert math.isnan(row(found, "Flat()", "bound_bias_t"))
    assert not [sentence for sentence in found.findings() if "WRONG" in sentence and "Flat" in sentence]
    assert "- " in str(found)


def test_values_that_are_not_finite_raise_with_the_name():
    _, vae, x = linear_gaussian()
    x[0, 0] = 1e7
    with pytest.raises(pv.NonFiniteError, match=r"Flat\(\) gave the value nan .* step 1"):
        compare(vae, x, [Flat()], num_repeats=10, reference=torch.zeros(len(x)))


# Discrete sites and subsampling


class Mixture(nn.Module):
    """c ~ Categorical, x|c ~ N(mean_c, 1) in one dimension, with a guide that is not the posterior."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.1, -0.4, 0.3], dtype=torch.float64))
        self.means = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))
        self.slopes = nn.Parameter(torch.tensor([0.7, 0.2, -0.4], dtype=torch.float64))

    def model(self, x):
        pyro.module("mixture.model", nn.ParameterDict({"logits": self.logits, "means": self.means}))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.means[c], 1.0), obs=x)

    def guide(self, x):
        pyro.module("mixture.guide", nn.ParameterDict({"slopes": self.slopes}))
        with pyro.plate("data", len(x)):
            q = dist.Categorical(logits=x.unsqueeze(-1) * self.slopes)
            pyro.sample("c", q, infer={"enumerate": "parallel"})

    def exact(self):
        return pv.closed_form.GaussianMixture(
            self.logits.detach().softmax(0),
            self.means.detach().unsqueeze(-1),
            torch.ones(3, 1, 1, dtype=torch.float64),
        )


@pytest.mark.filterwarnings("ignore:(?s).*use TraceEnum_ELBO instead")  # from Pyro's other estimators
def test_discrete_sites():
    pair, x = Mixture(), torch.tensor([-1.2, 0.1, 0.9, 2.5, 3.0], dtype=torch.float64)
    exact = pair.exact()
    found = compare(
        pair,
        x,
        {
            "graph": TraceGraph_ELBO(),
            "enumerated": TraceEnum_ELBO(max_plate_nesting=1),
            "VIMCO": VIMCO(2),
            "no gradient": RenyiELBO(num_particles=2, vectorize_particles=True),
        },
        num_repeats=80,
        reference=exact.log_evidence(x.unsqueeze(-1)),
    )
    q = (x.unsqueeze(-1) * pair.slopes.detach()).softmax(-1)
    elbo = exact.elbo(x.unsqueeze(-1), q).mean().item()
    assert row(found, "enumerated", "value") == pytest.approx(elbo, abs=1e-12)
    assert row(found, "enumerated", "value_se") < 1e-12
    assert abs(row(found, "graph", "value") - elbo) < 4 * row(found, "graph", "value_se")
    right = found.dataset.sel(estimator=["graph", "enumerated", "VIMCO"])
    assert abs(right["gradient_bias_t"]).max() < 4
    assert abs(right["bound_bias_t"]).max() < 4
    # Pyro's importance-weighted bound gives the guide no gradient here
    assert row(found, "no gradient", "gradient_variance", parameters="guide") == 0
    assert abs(row(found, "no gradient", "gradient_bias_t", parameters="guide")) > 4


def test_scales_of_the_plate_and_of_single_examples_are_divided_out():
    _, vae, x = linear_gaussian()
    weight = torch.arange(1.0, 1 + len(x)).double()

    def weighted(program):
        return pyro.poutine.scale(program, scale=weight)

    reference = torch.linspace(-9, -8, len(x)).double()
    plain = compare(vae, x, [STL(), Trace_ELBO()], num_repeats=10, reference=reference)
    scaled = compare_estimators(
        pyro.poutine.scale(vae.model, scale=3.0),
        pyro.poutine.scale(vae.guide, scale=3.0),
        x,
        [STL(), Trace_ELBO()],
        num_repeats=10,
        reference=reference,
        progress=False,
    )
    for name in ("value", "bias", "gradient_variance", "snr"):
        assert np.allclose(plain[name], scaled[name], rtol=1e-9), name
    uneven = compare_estimators(
        weighted(vae.model),
        weighted(vae.guide),
        x,
        [STL()],
        num_repeats=10,
        reference=reference,
        progress=False,
    )
    mean = (weight / weight.sum()) @ reference
    assert uneven.dataset.attrs["reference_value"] == pytest.approx(mean.item(), rel=1e-12)
    assert abs(uneven["bound_bias_t"]).max() < 4


# The reference


def test_an_estimated_reference_adds_its_error():
    exact, vae, x = linear_gaussian()
    found = compare(vae, x, [Trace_ELBO()], num_repeats=10, num_reference_particles=400)
    attrs = found.dataset.attrs
    assert "L_400" in attrs["reference"]
    truth = exact.log_evidence(x).mean().item()
    assert 0 < attrs["reference_se"] < 0.1
    assert abs(attrs["reference_value"] - truth) < 4 * attrs["reference_se"]
    total = math.hypot(row(found, "Trace_ELBO()", "value_se"), attrs["reference_se"])
    assert row(found, "Trace_ELBO()", "bias_se") == pytest.approx(total, rel=1e-9)


def test_a_lower_bound_above_the_reference_is_reported():
    exact, vae, x = linear_gaussian()
    found = compare(vae, x, [STL()], num_repeats=20, reference=exact.log_evidence(x) - 10)
    assert found.findings()[0].startswith("WRONG: STL(1) exceeds log p(x)")


def test_an_unreliable_reference_is_reported():
    _, vae, x = linear_gaussian()
    far = pv.guides.DiagonalNormal((solved.D,), solved.K, network=nn.Linear(solved.D, 2 * solved.K)).double()
    with torch.no_grad():
        far.network.bias[: solved.K] += 6.0
        far.network.bias[solved.K :] -= 2.0
    found = compare(vae.with_guide(far), x, [STL()], num_repeats=10, num_reference_particles=100)
    assert "likely too low" in found.findings()[0]


# Side effects


class Noisy(nn.Module):
    """A network of a guide that depends on the training mode: dropout and batch statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(solved.D), nn.Dropout(0.5), nn.Linear(solved.D, 2 * solved.K)
        )

    def forward(self, x):
        return self.layers(x)


def test_there_are_no_side_effects():
    _, vae, x = linear_gaussian()
    guide = pv.guides.DiagonalNormal((solved.D,), solved.K, network=Noisy()).double()
    vae = vae.with_guide(guide)
    vae.train()
    vae.posterior.network.layers[0].eval()
    for number, parameter in enumerate(vae.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number) if number % 2 else None
    gradients = {name: parameter.grad for name, parameter in vae.named_parameters()}
    values = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
    state = copy.deepcopy(vae.state_dict())
    modes = [module.training for module in vae.modules()]
    generator = torch.get_rng_state()
    weighted, trace = KLWeighted(IWAE(3), lambda step: 0.1 * step), Trace_ELBO()
    weighted.steps = 7

    compare(vae, x, [trace, TraceGraph_ELBO(), weighted], num_repeats=10, num_reference_particles=5)

    assert weighted.steps == 7
    assert trace.max_plate_nesting == math.inf
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in vae.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())
    for name, parameter in vae.named_parameters():
        assert parameter.grad is gradients[name]
        assert values[name] is None or torch.equal(parameter.grad, values[name])
    assert not pyro.get_param_store().keys()


def test_there_are_no_side_effects_after_an_error():
    _, vae, x = linear_gaussian()
    vae.train()
    x[0, 0] = 1e7
    with pytest.raises(pv.NonFiniteError):
        compare(vae, x, [Flat()], num_repeats=10, reference=torch.zeros(len(x)))
    assert vae.training


def test_parameters_in_pyros_store_are_compared_and_kept():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(loc, 1)), 1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.9).double(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    found = compare_estimators(model, guide, x, [Trace_ELBO(), STL()], num_repeats=40, progress=False)
    assert (found["gradient_variance"] > 0).all()
    assert abs(found["gradient_bias_t"]).max() < 4
    assert not pyro.get_param_store().keys()  # created during the comparison, so removed after it
    with pyro.get_param_store().scope():
        guide(x), model(x)
        before = dict(pyro.get_param_store().named_parameters())
        compare_estimators(model, guide, x, [Trace_ELBO()], num_repeats=10, progress=False)
        after = dict(pyro.get_param_store().named_parameters())
        assert before.keys() == after.keys() == {"loc", "scale"}
        assert all(before[name] is after[name] for name in before)


def test_results_depend_only_on_the_seed():
    exact, vae, x = linear_gaussian()
    options = {"num_repeats": 10, "reference": exact.log_evidence(x)}
    one = compare(vae, x, [STL(), IWAE(5)], **options)
    torch.manual_seed(99)
    other = compare(vae, x, [IWAE(5), DReG(2), STL()], **options)
    for name in ("bound", "snr", "gradient_variance", "gradient_bias_t", "bound_bias_t"):
        assert one[name].equals(other[name].sel(estimator=one["estimator"])), name
    assert not one["bound"].equals(compare(vae, x, [STL(), IWAE(5)], seed=1, **options)["bound"])


def test_a_schedule_is_held_at_its_present_step():
    _, vae, x = linear_gaussian()
    weighted = KLWeighted(STL(), lambda step: 0.25 * step)
    weighted.steps = 2
    found = compare(
        vae, x, {"now": weighted, "½": KLWeighted(STL(), 0.5)}, num_repeats=10, reference=torch.zeros(len(x))
    )
    assert row(found, "now", "gradient_target", parameters="guide") == "ELBO, β = 0.5"
    assert np.array_equal(*found["gradient_variance"].values)


# The result


def test_names_are_unique_and_given_names_are_kept():
    exact, vae, x = linear_gaussian()
    few = {"num_repeats": 10, "reference": exact.log_evidence(x)}
    found = compare(vae, x, [Trace_ELBO(), Trace_ELBO(num_particles=2), Trace_ELBO(), Trace_ELBO()], **few)
    names = ["Trace_ELBO()", "Trace_ELBO(num_particles=2)", "Trace_ELBO() #2", "Trace_ELBO() #3"]
    assert found["estimator"].values.tolist() == names
    assert found["family"].values.tolist() == ["Trace_ELBO(num_particles=S)"] * 4
    found = compare(vae, x, {"mine": STL()}, **few)
    assert found["estimator"].values.tolist() == ["mine"]


def test_every_variable_has_named_dimensions_units_and_a_meaning(linear):
    *_, found = linear
    sizes = {"estimator": len(ESTIMATORS), "repeat": 40, "parameters": 2}
    assert dict(found.dataset.sizes) == sizes
    for name, variable in found.dataset.data_vars.items():
        assert variable.attrs["units"], name
        assert variable.attrs["long_name"], name
        assert variable.dims[0] == "estimator", name
    assert found["value"].attrs["units"] == "nats per datum"


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_netcdf_keeps_everything(linear, tmp_path, engine):
    *_, found = linear
    found.dataset.to_netcdf(tmp_path / "found.nc", engine=engine)
    read = Comparison(xarray.load_dataset(tmp_path / "found.nc", engine=engine))
    assert str(read) == str(found)


def test_csv_has_one_row_per_estimator(linear, tmp_path):
    *_, found = linear
    found.write_csv(tmp_path / "found.csv")
    header, *lines = (tmp_path / "found.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(ESTIMATORS)
    names = header.split(",")
    assert {"estimator", "target", "value", "value_se", "bias_t", "snr_model", "snr_guide"} <= set(names)
    first = dict(zip(names, lines[0].split(","), strict=True))
    assert float(first["snr_guide"]) == row(found, "Trace_ELBO()", "snr", parameters="guide")


def test_the_tables_are_aligned_and_complete(linear):
    *_, found = linear
    lines = str(found).splitlines()
    for name in found["estimator"].values:
        assert sum(line.startswith(name + " ") for line in lines) == 3
    value = next(line for line in lines if line.startswith("DReG(24)"))
    assert str(Estimate(row(found, "DReG(24)", "value"), row(found, "DReG(24)", "value_se"))) in value
    assert lines[0].startswith("Which to use: ")
    assert lines[2].startswith("7 data, 40 repeats, seed 0")
    assert lines[3].startswith("reference: log p(x), as given")
    assert repr(found) == str(found)


def test_the_legend_explains_the_columns_that_are_shown(linear):
    *_, found = linear
    _, _, header, model_header, _, legend, _ = (part.splitlines() for part in str(found).split("\n\n"))
    headings = re.split("  +", header[0])[1:] + re.split("  +", model_header[0])[1:]
    assert [re.split("  +", line)[0] for line in legend[:-1]] == headings
    assert legend[1].endswith("  mean of the estimates ± standard error over the repeats, for this batch")
    assert all("±" in line for line in (legend[1], legend[2], legend[headings.index("SNR")]))
    x, exact, pair = cases.linear_gaussian(2, exact=False)  # no parameters, no gradients
    plain = str(compare(pair, x, [IWAE(3)], num_repeats=10, reference=exact.log_evidence(x)))
    assert "t, own bound" in plain
    assert "SNR  " not in plain


def test_the_recommendation_is_the_sharpest_gradient_for_its_time(linear):
    *_, found = linear
    dataset = found.dataset.copy(deep=True)
    names = dataset["estimator"].values
    snr = dataset["snr"].sel(parameters="guide").values
    dataset["time_per_step"][:] = 1e-3
    dataset["time_per_effective_sample"][:] = 1e-3 / dataset["snr"].values ** 2
    best = names[snr.argmax()]
    assert recommendation(dataset).startswith(f"Which to use: {best}, whose guide gradient is as large as")
    dataset["snr_se"][:] = 10.0
    assert "no worse for all that was measured" in recommendation(dataset)
    wrong = dataset.copy(deep=True)
    wrong["gradient_bias_t"].loc[{"estimator": best}] = 5.0
    assert not recommendation(wrong).startswith(f"Which to use: {best},")
    wrong["gradient_bias_t"][:] = -5.0
    assert "all were found to be wrong" in recommendation(wrong)
    assert "no gradient was measured" in recommendation(dataset.assign(snr=np.nan * dataset["snr"]))


def test_a_notebook_and_a_data_frame_show_what_the_text_does(linear):
    *_, found = linear
    html = found._repr_html_()
    assert html.startswith("Which to use: ")
    assert html.count("<table>") == 3
    for name in found["estimator"].values:
        assert html.count(f">{name}</td>") == 3
    assert found.to_dataframe().loc["DReG(24)", "value"] == row(found, "DReG(24)", "value")


def test_rankings_tell_apart_what_differs(linear):
    *_, found = linear
    values = next(sentence for sentence in found.findings() if sentence.startswith("Values: "))
    order = values.removeprefix("Values: ").removesuffix(".").replace("≈", ">").split(" > ")
    assert sorted(order) == sorted(found["estimator"].values)
    ranked = [row(found, name, "value") for name in order]
    assert ranked == sorted(ranked, reverse=True)
    assert "≈ STL(1)" in values or "STL(1) ≈" in values  # the same draws as others, the same value
    guide = next(sentence for sentence in found.findings() if sentence.startswith("SNR, guide"))
    assert guide.index("DReG(24)") < guide.index(">") < guide.index(" DReG(3)") < guide.index(" IWAE(5)")


def test_arviz_draws_have_the_standard_errors_of_the_values(linear):
    *_, found = linear
    posterior = found.to_inference_data(num_draws=4000)["posterior"]["value"]
    assert posterior.dims == ("chain", "draw", "estimator")
    draws = posterior.values[0]
    assert np.allclose(draws.mean(0), found["value"], atol=5 * found["value_se"].values.max() / 60)
    assert np.allclose(draws.std(0), found["value_se"], rtol=0.1)
    names = found["estimator"].values.tolist()
    same = draws[:, names.index("STL(1)")] - draws[:, names.index("Trace_ELBO()")]
    assert abs(same).max() < 1e-12
    observed = found.to_inference_data()["observed_data"]["bound"]
    assert np.array_equal(observed.values, found["bound"].values)


def test_the_forest_shows_every_estimator_and_the_reference(linear, tmp_path):
    *_, found = linear
    axes = found.plot_forest()
    assert {label.get_text() for label in axes.get_yticklabels()} >= set(found["estimator"].values)
    vertical = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert found.dataset.attrs["reference_value"] in vertical
    plots.save(axes, tmp_path / "forest.png")


def test_the_signal_to_noise_figure(linear, tmp_path):
    *_, found = linear
    axes = found.plot_snr("guide")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    x, y = lines["DReG(S)"].lines[0].get_data()
    assert list(x) == [3, 24]
    assert list(y) == found["snr"].sel(estimator=["DReG(3)", "DReG(24)"], parameters="guide").values.tolist()
    (left, right), (low, high) = lines["as √S"].get_data()
    assert math.log(high / low) / math.log(right / left) == pytest.approx(0.5)
    plots.save(axes, tmp_path / "snr.png")
    with pytest.raises(ValueError, match='"model" or "guide"'):
        found.plot_snr("decoder")


def test_an_snr_of_zero_is_drawn_as_an_arrow(linear):
    *_, found = linear
    dataset = found.dataset.copy(deep=True)
    dataset["snr"].loc[{"estimator": "IWAE(5)", "parameters": "guide"}] = 0.0
    axes = Comparison(dataset).plot_snr("guide")
    assert "arrows" in axes.get_title()
    assert "arrows" not in found.plot_snr("model").get_title()


def test_a_pair_without_parameters_is_compared_by_value():
    x, exact, pair = cases.linear_gaussian(2, exact=False)
    found = compare(pair, x, [IWAE(3)], num_repeats=10, reference=exact.log_evidence(x))
    assert found["snr"].isnull().all()
    assert any("The guide shows no parameters" in sentence for sentence in found.findings())
    with pytest.raises(ValueError, match="nothing to draw"):
        found.plot_snr("guide")


# Bad input


@pytest.mark.parametrize(
    ("estimators", "options", "error", "message"),
    [
        ([], {}, ValueError, "estimators is empty"),
        ([Trace_ELBO], {}, TypeError, "Trace_ELBO itself: call it"),
        (["IWAE"], {}, TypeError, "pyro.infer.ELBO"),
        ("IWAE", {}, TypeError, "estimators must be a list of .*; got 'IWAE'"),
        (STL(), {}, TypeError, "estimators must be a list of .*; got "),
        ([STL()], {"num_repeats": 9}, ValueError, "num_repeats must be at least 10"),
        ([STL()], {"num_repeats": 10.0}, TypeError, "num_repeats"),
        ([STL()], {"reference": torch.zeros(3)}, ValueError, r"shape \(7,\)"),
        ([STL()], {"reference": torch.full((7,), math.nan)}, ValueError, "finite"),
        ([STL()], {"num_reference_particles": 1}, ValueError, "num_reference_particles"),
    ],
)
def test_bad_arguments_raise(estimators, options, error, message):
    _, vae, x = linear_gaussian()
    with pytest.raises(error, match=message):
        compare(vae, x, estimators, **options)


def test_bad_data_raise():
    _, vae, x = linear_gaussian()
    with pytest.raises(TypeError, match="one batch"):
        compare(vae, [x], [STL()])
    with pytest.raises(ValueError, match="at least one example"):
        compare(vae, x[:0], [STL()])


def test_an_estimator_that_is_not_valid_for_the_pair_raises():
    pair, x = Mixture(), torch.zeros(2, dtype=torch.float64)
    for estimator in (TraceMeanField_ELBO(), KLWeighted(TraceMeanField_ELBO(), 0.5)):
        with pytest.raises(ValueError, match="TraceMeanField_ELBO is wrong here"):
            compare(pair, x, [estimator])
    with pytest.raises(ValueError, match="'c' is not reparameterised"):
        compare(pair, x, [IWAE(3)], num_reference_particles=5)


@pytest.mark.parametrize(
    "estimator",
    [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        TraceEnum_ELBO(strict_enumeration_warning=False),
        RenyiELBO(num_particles=2),
        IWAE(3),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_mask_that_the_guide_forgets_is_an_error_for_every_estimator(estimator):
    """Each alone, as no other of the list then brings the check."""
    weight = nn.Parameter(torch.tensor(0.5))
    mask = torch.tensor([True, False, True, True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.param("weight", weight)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.5**0.5))

    def masked_guide(x):
        with pyro.poutine.mask(mask=mask):
            guide(x)

    x, options = torch.zeros(6), {"num_repeats": 10, "reference": torch.zeros(6), "progress": False}
    with pytest.raises(ValueError, match=r"'z' has no mask, the model's has a mask that counts 4 of 6"):
        compare_estimators(model, guide, x, [estimator], **options)
    compare_estimators(model, masked_guide, x, [Trace_ELBO()], **options)


def test_a_latent_that_all_examples_share_leaves_no_reference():
    """Values and noise of Pyro's estimators, as measured by hand."""
    x = torch.linspace(-1.0, 3.0, 7, dtype=torch.float64)
    shift = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("components", 3):  # more sites than around the data
            pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 14, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(pyro.param("shift", shift), 0.3))
        with pyro.plate("components", 3):
            pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))

    with pyro.get_param_store().scope():
        compared = {"one": Trace_ELBO(), "two": Trace_ELBO(2), "exact": TraceMeanField_ELBO()}
        found = pv.compare_estimators(model, guide, x, compared, num_repeats=400, progress=False)
        with pytest.raises(ValueError, match=r"^IWAE\(3\) needs .*'mean' lies outside the data plate 'data'"):
            pv.compare_estimators(model, guide, x, [pv.IWAE(3)], progress=False)
    log_likelihood = -0.5 * (math.log(2 * math.pi) + (x - 0.5).square().mean().item() + 0.09)
    kl = -math.log(0.3) + 0.5 * (0.09 + 0.25 - 1)
    exact = log_likelihood - kl / 14  # of 14 data
    assert abs((found["value"] - exact) / found["value_se"]).max() < 5
    slope = (x - 0.5).mean().item() - 0.5 / 14  # of the ELBO per datum in the guide's mean, ± 0.3
    by_closed_form = found.dataset.sel(estimator="exact", parameters="guide")
    assert abs(by_closed_form["snr"] - slope / 0.3) < 5 * by_closed_form["snr_se"]
    assert found["bias"].isnull().all()
    assert "reference: none, as the guide's site 'mean' lies outside the data plate 'data'" in repr(found)
    assert not any("reference" in line or "own bound" in line for line in found.findings())
    assert "Which to use: " in repr(found)
