"""`evaluate` against the linear-Gaussian model, in which the evidence and every bound are known."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from solved import D, K, N, data, linear_gaussian, within
from torch import nn

import pyro_vae as pv
from pyro_vae import closed_form
from pyro_vae.evaluation import draws
from pyro_vae.utils.isolation import derived_seed, seed_at

S = 400


def evaluate(vae, x, **options):
    return pv.evaluate(vae, x, progress=False, **{"num_particles": S, **options})


def test_with_the_exact_posterior_every_estimate_is_the_evidence():
    exact, vae = linear_gaussian()
    x = data(exact)
    report = evaluate(vae, x)
    truth = exact.log_evidence(x)
    for estimate in (report.per_datum.log_evidence, report.per_datum.elbo_sampled_kl):
        torch.testing.assert_close(estimate, truth, rtol=0, atol=1e-10)
    assert report.log_evidence == pytest.approx(float(truth.mean()), abs=1e-10)
    assert report.log_evidence_se == pytest.approx(float(truth.std()) / math.sqrt(N), abs=1e-10)
    assert report.log_evidence_mc_se < 1e-10
    torch.testing.assert_close(report.per_datum.effective_sample_size, torch.full((N,), float(S)).double())
    assert (report.pareto_k == 0).all()
    assert all(abs(bound.value - report.log_evidence) < 1e-10 for bound in report.convergence.values())


def test_chunks_of_examples_and_particles_are_concatenated_in_order(monkeypatch):
    exact, vae = linear_gaussian()
    x = data(exact)
    whole = evaluate(vae, x)
    monkeypatch.setattr(draws, "_ROWS", 300)  # particles in chunks of 250 and 150
    split = evaluate(vae, x)
    monkeypatch.setattr(draws, "_ROWS", 3 * S)
    monkeypatch.setattr(draws, "_PARTICLES", 2 * S)  # examples in chunks of 3, 3 and 1
    for report in (split, evaluate(vae, x)):
        for name in ("log_evidence", "kl", "entropy", "unit_kl", "unit_mean"):
            found, expected = getattr(report.per_datum, name), getattr(whole.per_datum, name)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert report.convergence.keys() == whole.convergence.keys() == {1, 10, 100, 400}


def test_an_inexact_guide_gives_the_exact_bounds_within_their_errors():
    exact, vae = linear_gaussian(scale=1.3)
    x = data(exact)
    q = vae.encode(x)
    moments = (x, q.mean, q.covariance_matrix)
    report = evaluate(vae, x, num_particles=2000)
    per_datum = report.per_datum
    truth = exact.log_evidence(x)
    within(per_datum.log_evidence, truth, per_datum.log_evidence_mc_se)
    within(report.log_evidence, truth.mean(), report.log_evidence_mc_se)
    t = pv.terms(vae.model, vae.guide, x, num_particles=2000)
    for found, expected, particles in (
        (per_datum.expected_log_likelihood, exact.expected_log_likelihood(*moments), t.log_likelihood),
        (per_datum.elbo, exact.elbo(*moments), t.log_likelihood),
        (per_datum.elbo_by_entropy, exact.elbo(*moments), t.log_likelihood + t.log_prior),
        (per_datum.elbo_sampled_kl, exact.elbo(*moments), t.log_weight),
    ):
        within(found, expected, particles.detach().std(0) / math.sqrt(2000))
    kl = exact.expected_log_likelihood(*moments) - exact.elbo(*moments)
    torch.testing.assert_close(per_datum.kl, kl, rtol=0, atol=1e-10)
    gap = (t.log_likelihood.detach().var(0) / 2000 + per_datum.log_evidence_mc_se**2).sqrt()
    within(per_datum.gap, exact.gap(*moments), gap)
    assert report.has_analytic_kl
    assert report.has_analytic_entropy
    assert (report.pareto_k < 0.5).all()


def test_the_bound_rises_with_the_particles_from_the_elbo_to_the_evidence():
    exact, vae = linear_gaussian(scale=0.8)
    x = data(exact)
    q = vae.encode(x)
    report = evaluate(vae, x, num_particles=5000)
    bounds = list(report.convergence.values())
    assert list(report.convergence) == [1, 10, 100, 1000, 5000]
    within(bounds[0].value, exact.elbo(x, q.mean, q.covariance_matrix).mean(), bounds[0].standard_error)
    within(bounds[-1].value, exact.log_evidence(x).mean(), bounds[-1].standard_error)
    for lower, upper in itertools.pairwise(bounds):
        assert lower.value < upper.value + 2 * math.hypot(lower.standard_error, upper.standard_error)
    assert bounds[0].value < bounds[2].value - 5 * bounds[2].standard_error


def test_the_monte_carlo_errors_are_those_of_repeated_estimates():
    exact, vae = linear_gaussian(scale=1.3)
    x = data(exact)
    reports = [evaluate(vae, x, seed=seed, aggregate_size=0) for seed in range(60)]
    spread = torch.stack([report.per_datum.log_evidence for report in reports]).std(0)
    stated = torch.stack([report.per_datum.log_evidence_mc_se for report in reports]).mean(0)
    within(spread / stated, 1.0, 1 / math.sqrt(2 * 59))
    mean_spread = torch.tensor([report.log_evidence for report in reports]).std()
    within(mean_spread / reports[0].log_evidence_mc_se, 1.0, 1.1 / math.sqrt(2 * 59))
    for size in (1, 10, 100):
        spread = torch.tensor([report.convergence[size].value for report in reports]).std()
        stated = sum(report.convergence[size].standard_error for report in reports) / 60
        within(spread / stated, 1.0, 1.2 / math.sqrt(2 * 59))


def test_a_narrow_guide_has_a_high_pareto_k():
    exact, vae = linear_gaussian(scale=0.1)  # k = 1 − 0.1²
    report = evaluate(vae, data(exact), num_particles=20_000)
    assert (report.pareto_k > 0.7).all()
    assert f"above: {N}" in str(report)
    assert report.unreliable == 1
    headline = next(line for line in str(report).splitlines() if line.startswith("log p(x)"))
    assert "UNRELIABLE, likely too low: Pareto k > 0.7 for 100% of the data; Monte Carlo error" in headline


def test_the_log_evidence_is_marked_unreliable_where_it_is_for_most_data():
    exact, vae = linear_gaussian(scale=1.3)
    report = evaluate(vae, data(exact), num_particles=400)
    for bad, marks in ((3, 0), (4, 2)):  # of 7; with the evidence and the gap
        k = torch.full((N,), 0.2).double()
        k[:bad] = 0.9
        doubtful = dataclasses.replace(report, per_datum=dataclasses.replace(report.per_datum, pareto_k=k))
        assert doubtful.unreliable == pytest.approx(bad / N)
        assert str(doubtful).count("UNRELIABLE") == marks
    assert "for 57% of the data" in str(doubtful).splitlines()[1]
    assert "UNRELIABLE" not in str(
        evaluate(vae, data(exact), num_particles=10)
    )  # too few draws to estimate it


def test_bits_per_dimension_are_shown_for_discrete_data_alone():
    exact, vae = linear_gaussian(scale=1.3)
    density = evaluate(vae, data(exact), num_particles=10)
    assert "bits per dimension" not in str(density)
    assert density.as_dict()["bits_per_dimension"] is None
    bits = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(2, (5,)),
        guide=pv.guides.DiagonalNormal((5,), 2),
    )
    report = evaluate(bits, torch.ones(4, 5), num_particles=30)
    assert "bits per dimension" in str(report)
    k = torch.full((4,), 0.9).double()
    doubtful = dataclasses.replace(report, per_datum=dataclasses.replace(report.per_datum, pareto_k=k))
    assert str(doubtful).count("UNRELIABLE") == 3


def test_a_notebook_and_a_data_frame_show_what_the_text_does():
    exact, vae = linear_gaussian(scale=1.3)
    report = evaluate(vae, data(exact), num_particles=40)
    html = report._repr_html_().replace("  ", "")
    for line in str(report).splitlines()[1:]:
        assert f">{re.split('  +', line.strip())[0]}</td>" in html
    assert f'<td style="text-align:right; white-space:nowrap">{report.mean("elbo")}</td>' in html
    assert '<td style="text-align:left">E[log p(x|z)]' in html  # a note
    frame = report.to_dataframe()
    assert list(frame.index) == list(range(N))
    assert frame["elbo"].mean() == pytest.approx(report.elbo)
    assert frame["pareto_k"].to_numpy() == pytest.approx(report.pareto_k.numpy())
    ax = report.plot(title="KL")
    assert len(ax.get_xticklabels()) == len(report.unit_names)
    [errors] = [container for container in ax.containers if hasattr(container, "has_yerr")]
    heights = [high - low for (_, low), (_, high) in errors.lines[2][0].get_segments()]
    order = report.kl_per_dimension.argsort(descending=True)
    assert heights == pytest.approx((2 * report.kl_per_dimension_se[order]).tolist())


def test_the_estimates_are_those_written_out():
    exact, vae = linear_gaussian(scale=1.5)
    x = data(exact)
    report = evaluate(vae, x, num_particles=9, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(seed_at(derived_seed(4, draws._DRAWS), 0))
        t = pv.terms(vae.model, vae.guide, x, num_particles=9)
    w = t.log_weight.detach().exp()
    per_datum = report.per_datum
    torch.testing.assert_close(per_datum.log_evidence, w.mean(0).log())
    errors = w.std(0) / w.mean(0) / 3
    torch.testing.assert_close(per_datum.log_evidence_mc_se, errors)
    assert errors.max() > 1.5 * errors.min()  # so that no other formula gives the same error
    of_the_mean = math.sqrt(sum(error**2 for error in errors.tolist())) / N
    assert report.log_evidence_mc_se == pytest.approx(of_the_mean, rel=1e-10)
    assert report.convergence[9].standard_error == pytest.approx(of_the_mean, rel=1e-10)
    torch.testing.assert_close(per_datum.effective_sample_size, w.sum(0) ** 2 / w.square().sum(0))
    torch.testing.assert_close(per_datum.elbo, t.elbo.detach().mean(0))
    torch.testing.assert_close(per_datum.elbo_sampled_kl, w.log().mean(0))
    assert report.pareto_k.isnan().all()  # too few draws to estimate it
    bits = -report.log_evidence / D / math.log(2)
    assert report.bits_per_dimension.value == pytest.approx(bits)
    assert report.bits_per_dimension.standard_error == pytest.approx(report.log_evidence_se / D / math.log(2))


def test_without_a_closed_form_the_entropy_and_the_kl_are_those_of_the_draws():
    class Unknown(dist.MultivariateNormal):
        def entropy(self):
            raise NotImplementedError

    class Guide(nn.Module):
        def forward(self, x):
            return Unknown(x[:, :K], scale_tril=torch.diag(torch.tensor([0.3, 1.7]).double()))

    exact, vae = linear_gaussian()
    report = evaluate(vae.with_guide(Guide()), data(exact), num_particles=2000)
    each = report.per_datum
    assert not report.has_analytic_entropy
    elbo = each.expected_log_joint + each.entropy
    torch.testing.assert_close(elbo, each.elbo_sampled_kl, rtol=0, atol=1e-10)
    truth = 1 + math.log(2 * math.pi * 0.3 * 1.7)
    within(each.entropy, truth, math.sqrt(K / 2 / 2000))  # a sum of K squares of normals, over 2


def test_the_report_states_its_uncertainty():
    exact, vae = linear_gaussian(scale=1.3)
    text = str(evaluate(vae, data(exact), seed=3))
    assert repr(evaluate(vae, data(exact), seed=3)) == text
    assert text.startswith("7 data, S = 400 particles, seed 3; nats per datum ± standard error")
    for line in ("log p(x)", "ELBO", "KL to the prior", "mutual information", "  S = 100 "):
        assert any(row.strip().startswith(line.strip()) and "±" in row for row in text.splitlines()), line


def test_examples_are_counted_by_their_pareto_k():
    exact, vae = linear_gaussian()
    report = evaluate(vae, data(exact), num_particles=40)
    k = torch.tensor([0.1, 0.49, -0.3, 0.5, 0.7, 0.71, math.inf], dtype=torch.float64)
    report = dataclasses.replace(report, per_datum=dataclasses.replace(report.per_datum, pareto_k=k))
    assert report.as_dict()["pareto_k"] == {"good": 3, "bad": 2}
    assert report.unreliable == pytest.approx(2 / 7, rel=1e-12)
    assert re.search(r"Pareto k, median +0\.50  < 0\.5: 3, to 0\.7: 2, above: 2\n", repr(report))


def test_the_numbers_go_into_json():
    exact, vae = linear_gaussian(scale=1.3)
    report = evaluate(vae, data(exact), num_particles=10)
    numbers = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert numbers["log_evidence"] == [report.log_evidence, report.log_evidence_se]
    assert numbers["elbo"] == [report.elbo, report.elbo_se]
    assert numbers["kl_per_dimension"] == report.kl_per_dimension.tolist()
    assert list(numbers["bound_by_particles"]) == ["1", "10"]
    assert numbers["mutual_information"] == list(report.mutual_information)
    assert numbers["pareto_k"] == {"good": 0, "bad": 0}  # too few draws to estimate it
    assert (numbers["num_data"], numbers["num_particles"], numbers["seed"]) == (N, 10, 0)


def test_one_datum_and_one_particle_have_no_standard_errors():
    exact, vae = linear_gaussian(scale=1.3)
    report = evaluate(vae, data(exact)[:1], num_particles=1)
    assert report.log_evidence == pytest.approx(report.mean("elbo_sampled_kl").value)
    assert math.isnan(report.log_evidence_se)
    assert math.isnan(report.log_evidence_mc_se)
    assert "nan" not in str(report)  # a value without an error stands alone
    assert re.search(r"log p\(x\), importance-weighted +-?\d+\.\d\d\n", str(report))


# Latent dimensions ------------------------------------------------------------------------------------------


def diagonal_vae(offset=0.0):
    """A VAE whose guide is N(Ax + offset, diag s²) in three dimensions, the second of which ignores x."""

    class Guide(nn.Module):
        def forward(self, x):
            loc = torch.stack([x[:, 0], 0 * x[:, 1], 0.5 * x[:, 2]], -1)
            return dist.Normal(loc + offset, torch.tensor([0.5, 1.0, 0.8], dtype=x.dtype)).to_event(1)

    likelihood = pv.likelihoods.Normal(3, (D,), hidden_features=(4,))
    return pv.VAE(prior=pv.priors.StandardNormal(3), likelihood=likelihood, guide=Guide()).double()


def test_latent_dimensions_are_distinguished():
    vae, x = diagonal_vae(), torch.randn(N, D).double()
    report = evaluate(vae, x)
    q = vae.encode(x)
    loc, scale = q.mean.detach(), q.stddev.detach()
    by_unit = closed_form.normal_kl(loc, scale, torch.zeros(3).double(), torch.ones(3).double())
    torch.testing.assert_close(report.per_datum.unit_kl, by_unit, rtol=0, atol=1e-10)
    torch.testing.assert_close(report.kl_per_dimension, by_unit.mean(0))
    torch.testing.assert_close(report.kl_per_dimension_se, by_unit.std(0) / math.sqrt(N))
    torch.testing.assert_close(report.per_datum.kl, by_unit.sum(1))
    torch.testing.assert_close(report.activity, loc.var(0))
    assert report.active.tolist() == [True, False, True]
    assert report.active_units == 2
    assert report.unit_names == ["z[0]", "z[1]", "z[2]"]


def two_layers():
    """A top-down model with a bottom-up guide, whose second site depends on the draw of the first."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2.sum(-1, keepdim=True), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1.expand(*z1.shape[:-1], D), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x.mean(-1, keepdim=True)
            z1 = pyro.sample("z1", dist.Normal(loc, 0.4).to_event(1))
            pyro.sample("z2", dist.Normal(torch.cat([z1 / 3, 0 * z1], -1), 0.7).to_event(1))

    return SimpleNamespace(model=model, guide=guide)


def test_a_pair_of_two_layers_is_evaluated():
    x = torch.randn(N, D).double()
    report = evaluate(two_layers(), x, num_particles=3000)
    covariance = torch.eye(D).double() + 3.0  # x | z1 has variance 1, z1 = sum of two + noise variance 3
    truth = dist.MultivariateNormal(torch.zeros(D).double(), covariance).log_prob(x)
    within(report.per_datum.log_evidence, truth, report.per_datum.log_evidence_mc_se)
    assert not report.has_analytic_kl  # the orders differ
    torch.testing.assert_close(report.per_datum.elbo, report.per_datum.elbo_sampled_kl)
    assert report.unit_names == ["z2[0]", "z2[1]", "z1"]
    # E[z2|x] = (E[z1|x] / 3, 0): the draws of z1 do not make an inactive dimension active
    expected = torch.stack([x.mean(1) / 3, torch.zeros(N), x.mean(1)], -1)
    noise = torch.tensor([0.4 / 3, 0.0, 0.0]).double() / math.sqrt(250)
    within(report.per_datum.unit_mean, expected, noise + 1e-12)
    within(report.activity[0], expected[:, 0].var(), 2 * expected[:, 0].std() * noise[0] * 1.5)


def test_draws_of_an_inactive_dimension_do_not_make_it_active():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0 * x, 1.0))
            pyro.sample("z", dist.Normal(a, 1.0))

    report = evaluate(SimpleNamespace(model=model, guide=guide), torch.randn(300).double(), num_particles=10)
    assert report.per_datum.unit_mean[:, 1].var() > 0.08  # the noise of ten draws alone
    within(report.activity[1], 0.0, 0.1 * math.sqrt(2 / 300))


# The aggregate posterior ------------------------------------------------------------------------------------


def test_the_kl_splits_into_information_and_marginal_kl():
    x = torch.linspace(-1, 1, N).double()[:, None].expand(N, D)
    same, apart = evaluate(diagonal_vae(), 0 * x), evaluate(diagonal_vae(), 1e4 * x)
    torch.testing.assert_close(same.aggregate.information, torch.zeros(N).double(), rtol=0, atol=1e-10)
    expected = torch.full((N,), math.log(N), dtype=torch.float64)
    torch.testing.assert_close(apart.aggregate.information, expected, rtol=0, atol=1e-10)
    for report in (same, apart):
        split = report.aggregate.information + report.aggregate.marginal_kl
        torch.testing.assert_close(split, report.aggregate.log_guide - report.aggregate.log_prior)


def test_the_mutual_information_is_that_found_by_quadrature():
    x = torch.zeros(2, D).double()
    x[0, 0] = 0.9  # the posteriors N(±0.9, ½²) of the first unit; the others ignore x
    x[1, 0] = -0.9
    z = torch.linspace(-8, 8, 20001).double()
    q = dist.Normal(x[:, :1], 0.5).log_prob(z)
    aggregate = q.logsumexp(0) - math.log(2)
    information = torch.trapezoid(q.exp() * (q - aggregate), z).mean()
    marginal_kl = torch.trapezoid(aggregate.exp() * (aggregate - dist.Normal(0.0, 1.0).log_prob(z)), z)
    third = closed_form.normal_kl(*torch.tensor([0.0, 0.8, 0.0, 1.0]).double())
    reports = [evaluate(diagonal_vae(), x, num_particles=1, seed=seed) for seed in range(200)]
    found = torch.tensor([report.mutual_information.value for report in reports])
    within(found.mean(), information, found.std() / math.sqrt(200))
    found = torch.tensor([report.marginal_kl.value for report in reports])
    within(found.mean(), marginal_kl + third, found.std() / math.sqrt(200))


def test_the_aggregate_of_a_pair_of_two_layers_in_small_chunks(monkeypatch):
    monkeypatch.setattr("pyro_vae.evaluation.latents._NUMBERS", 3 * 3**2)  # three by three at a time
    x = torch.linspace(-1e4, 1e4, N).double()[:, None].expand(N, D)
    report = evaluate(two_layers(), x, num_particles=3)
    expected = torch.full((N,), math.log(N), dtype=torch.float64)
    torch.testing.assert_close(report.aggregate.information, expected, rtol=0, atol=1e-10)
    near = evaluate(two_layers(), x / 1e4, num_particles=3)
    monkeypatch.undo()
    whole = evaluate(two_layers(), x / 1e4, num_particles=3)
    for name in ("log_guide", "log_aggregate", "log_prior"):
        torch.testing.assert_close(getattr(near.aggregate, name), getattr(whole.aggregate, name))
    some = evaluate(two_layers(), x / 1e4, num_particles=3, aggregate_size=4)
    assert len(some.aggregate.log_prior) == 4
    assert evaluate(two_layers(), x, num_particles=3, aggregate_size=0).mutual_information is None


# Evaluation has no side effects -----------------------------------------------------------------------------


def vae_with_modes():
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * K)
    )
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, (1, 2, 2), hidden_features=(5,)),
        guide=pv.guides.DiagonalNormal((1, 2, 2), K, network=encoder),
    )


def test_modes_and_statistics_of_modules_are_unchanged():
    torch.manual_seed(1)
    vae, x = vae_with_modes(), torch.bernoulli(torch.full((N, 1, 2, 2), 0.4))
    vae.train()
    vae.posterior.network[2].eval()
    before = [module.training for module in vae.modules()]
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    generator = torch.get_rng_state()
    first, second = evaluate(vae, x, num_particles=5), evaluate(vae, x, num_particles=5)
    assert torch.equal(first.per_datum.kl, second.per_datum.kl)  # no dropout
    assert [module.training for module in vae.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in vae.parameters())
    with pytest.raises(ValueError, match="num_particles"):
        evaluate(vae, x, num_particles=0)
    assert [module.training for module in vae.modules()] == before


def test_training_is_the_same_to_the_bit_with_evaluations_in_between():
    x = torch.bernoulli(torch.full((20, 1, 2, 2), 0.4))
    results = []
    for callbacks in ([], [lambda vae, epoch: evaluate(vae, x, num_particles=3) and None]):
        torch.manual_seed(1)
        vae = vae_with_modes()
        pv.fit(vae, x, epochs=2, batch_size=6, progress=False, callbacks=callbacks)
        results.append(vae.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_data_are_binarised_once_from_the_seed():
    vae, grey = vae_with_modes(), torch.rand(N, 1, 2, 2)
    reports = [evaluate(vae, grey, binarize="dynamic", num_particles=3, seed=seed) for seed in (0, 0, 1)]
    elbos = [report.per_datum.elbo for report in reports]
    assert torch.equal(elbos[0], elbos[1])
    assert not torch.equal(elbos[0], elbos[2])
    images = pv.data.from_array(grey.numpy())
    from_images = [
        evaluate(vae, images, binarize="fixed", num_particles=3),
        evaluate(vae, images, binarize="dynamic", num_particles=3),
        evaluate(vae, images.binarized("dynamic"), num_particles=3),
        evaluate(vae, images.binarized("fixed")[:], num_particles=3),
    ]
    assert all(torch.equal(report.per_datum.elbo, from_images[0].per_datum.elbo) for report in from_images)


# Invalid input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (lambda x: x[:0], {}, ValueError, "empty"),
        (lambda x: torch.arange(N), {}, TypeError, "floating point; got torch.int64"),
        (lambda x: x[:, :3], {}, ValueError, r"shape \(N, 5\).*got \(7, 3\)"),
        (lambda x: x.tolist(), {}, TypeError, "must be a tensor"),
        (lambda x: x, {"num_particles": 0}, ValueError, "num_particles must be at least 1; got 0"),
        (lambda x: x, {"num_particles": 2.5}, TypeError, "num_particles must be an integer"),
        (lambda x: x, {"aggregate_size": -1}, ValueError, "aggregate_size must be at least 0; got -1"),
        (lambda x: x / 0, {}, ValueError, "inf lies outside"),
    ],
)
def test_invalid_input_raises(spoil, options, error, message):
    exact, vae = linear_gaussian()
    with pytest.raises(error, match=message):
        evaluate(vae, spoil(data(exact)), **options)


def test_data_of_a_pair_without_check_data_are_validated():
    with pytest.raises(ValueError, match="the data are empty"):
        evaluate(two_layers(), torch.zeros(0, D))
    with pytest.raises(ValueError, match=r"given data of shape \(7,\) \(torch.int64, cpu\)"):
        evaluate(two_layers(), torch.arange(N))
    with pytest.raises(ValueError, match=r"x\[3\] is inf"):
        evaluate(two_layers(), torch.tensor([0.0, 1.0, 2.0, math.inf]))
    with pytest.raises(TypeError, match="functions model and guide, such as a VAE .* got Linear"):
        evaluate(nn.Linear(D, K), torch.zeros(N, D))


def test_weights_that_are_not_finite_name_the_examples(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("blocked", torch.where(x > 90, -math.inf, 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = torch.linspace(-1, 1, N)
    x[4], x[6] = 100.0, 200.0
    pair = SimpleNamespace(model=model, guide=guide)
    message = "for 2 of the examples 0 to 6, counted from 0: index 4, 6; example 4 has 30 such weights of 30"
    with pytest.raises(pv.NonFiniteError, match=message):
        evaluate(pair, x, num_particles=30)
    monkeypatch.setattr(draws, "_ROWS", 60)  # two examples at a time
    with pytest.raises(pv.NonFiniteError, match="for 1 of the examples 4 to 5, counted from 0: index 4; "):
        evaluate(pair, x, num_particles=30)


def test_parameters_that_are_not_finite_are_named():
    exact, vae = linear_gaussian()
    with torch.no_grad():
        vae.likelihood.network.bias[1] = math.nan
    with pytest.raises(pv.NonFiniteError, match="parameter 'likelihood.network.bias' is not finite"):
        evaluate(vae, data(exact))


@pytest.mark.parametrize("whole", [True, False])
def test_the_draws_of_a_chunk_depend_on_no_earlier_chunk(monkeypatch, whole):
    """What is drawn between chunks, or before them, changes nothing."""
    exact, vae = linear_gaussian()
    x = data(exact)
    monkeypatch.setattr(draws, "_ROWS", 3 * 40)  # three examples at a time
    expected = pv.evaluate(vae, x, num_particles=40, seed=4, progress=False)
    require_finite = draws.require_finite

    def disturb(log_weight, first_index):
        torch.rand(first_index + 1)
        require_finite(log_weight, first_index=first_index)

    monkeypatch.setattr(draws, "require_finite", disturb)
    part = x if whole else x[:6]
    found = pv.evaluate(vae, part, num_particles=40, seed=4, progress=False)
    for name in ("log_evidence", "elbo_sampled_kl", "unit_mean"):
        one, other = (getattr(report.per_datum, name)[: len(part)] for report in (found, expected))
        assert torch.equal(one, other), name
