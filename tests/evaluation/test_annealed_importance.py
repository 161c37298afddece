"""Annealed importance sampling against models whose evidence is known."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from solved import D, K, data, linear_gaussian, within

import pyro_vae as pv
from pyro_vae.evaluation import annealed_importance, draws
from pyro_vae.evaluation.annealed_importance import AnnealedEvidence, _Density
from pyro_vae.evaluation.importance_weights import WeightSummary
from pyro_vae.objectives.log_terms import terms

N, C, T = 3, 12, 40


def anneal(vae, x, **options):
    counts = {"num_chains": C, "num_temperatures": T, "num_leapfrog": 4}
    return pv.annealed_importance_sampling(vae, x, progress=False, **{**counts, **options})


def test_the_estimate_is_the_evidence_within_its_error():
    exact, vae = linear_gaussian(scale=0.1)  # a guide that would mislead, were it used
    x = data(exact, N)
    report = anneal(vae, x, num_chains=30, num_temperatures=120)
    truth = exact.log_evidence(x)
    within(report.weights.log_mean, truth, report.weights.standard_error)
    within(report.log_evidence, truth.mean(), report.log_evidence_mc_se)
    assert report.log_evidence_mc_se < 0.05  # the prior alone has an error of 0.5 nats
    within(report.acceptance, 0.65, 0.1, count=1)
    assert (report.num_chains, report.num_temperatures, report.seed) == (30, 120, 0)


def test_the_weights_are_unbiased_however_few_the_temperatures():
    exact, vae = linear_gaussian()
    x = data(exact, N)
    for temperatures in (1, 2, 6):
        report = anneal(vae, x, num_chains=4000, num_temperatures=temperatures, num_leapfrog=2)
        ratio = (report.weights.log_mean - exact.log_evidence(x)).exp()
        within(ratio, 1.0, report.weights.standard_error)


def test_a_move_is_that_of_hamiltonian_monte_carlo_written_out():
    exact, _ = linear_gaussian()
    W, width, noise = exact.W / 0.01, 0.01, 0.75  # so narrow a prior that log densities are positive
    x, beta, leapfrog = data(exact, N), 0.3, 3
    steps = torch.tensor([0.005, 0.008, 0.011]).double()  # of accepted and of rejected chains

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K).double(), width).to_event(1))
            pyro.sample("x", dist.Normal(exact.b + z @ W.T, noise).to_event(1), obs=x)

    start = terms(model, poutine.block(model, hide=["x"]), x, num_particles=C)
    z, shape = start.sites.draws["z"], (C, N, K)
    with torch.random.fork_rng(devices=[]):
        moved, log_likelihood, probability = _Density(model, x, start.sites).move(
            {"z": z}, beta, steps, leapfrog
        )

    def density(z):
        log_likelihood = dist.Normal(exact.b + z @ W.T, noise).log_prob(x).sum(-1)
        return log_likelihood, beta * log_likelihood - (z / width).square().sum(-1) / 2

    def gradient(z):
        return beta * (x - exact.b - z @ W.T) @ W / noise**2 - z / width**2

    length = steps[:, None]
    momentum = torch.randn(shape, dtype=torch.float64)
    new, p = z, momentum
    for _ in range(leapfrog):
        p = p + length / 2 * gradient(new)
        new = new + length * p
        p = p + length / 2 * gradient(new)
    energies = [density(at)[1] - m.square().sum(-1) / 2 for at, m in ((z, momentum), (new, p))]
    expected = (energies[1] - energies[0]).clamp(max=0).exp()
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-10)
    accepted = torch.rand(C, N, dtype=torch.float64) < expected
    assert 0 < accepted.sum() < C * N
    torch.testing.assert_close(moved["z"], torch.where(accepted[..., None], new, z), rtol=0, atol=1e-10)
    at_moved, _ = density(moved["z"])
    torch.testing.assert_close(log_likelihood, at_moved, rtol=0, atol=1e-10)


def test_it_agrees_with_importance_sampling():
    exact, vae = linear_gaussian(scale=1.2)
    x = data(exact, N)
    annealed, weighted = anneal(vae, x), pv.evaluate(vae, x, num_particles=500, progress=False)
    error = math.hypot(annealed.log_evidence_mc_se, weighted.log_evidence_mc_se)
    within(annealed.log_evidence, weighted.log_evidence, error)


def test_a_pair_of_two_layers_and_a_further_plate_is_annealed():
    def model(x):  # x (n, D); z1 (n,), each of D copies z2 with its own noise
        with pyro.plate("data", len(x), dim=-2):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0))
            with pyro.plate("copies", D, dim=-1):
                z2 = pyro.sample("z2", dist.Normal(z1, 0.5))
                pyro.sample("x", dist.Normal(z2, 0.8), obs=x)

    x = torch.randn(N, D).double()
    report = anneal(SimpleNamespace(model=model, guide=None), x, num_chains=40, max_plate_nesting=2)
    covariance = torch.ones(D, D).double() + (0.5**2 + 0.8**2) * torch.eye(D).double()
    truth = dist.MultivariateNormal(torch.zeros(D).double(), covariance).log_prob(x)
    within(report.weights.log_mean, truth, report.weights.standard_error)
    assert report.log_evidence_mc_se < 0.1


def test_chunks_and_single_chains(monkeypatch):
    exact, vae = linear_gaussian()
    x = data(exact, 5)
    monkeypatch.setattr("pyro_vae.evaluation.draws._ROWS", 2)  # two examples at a time
    report = anneal(vae, x, num_chains=1, num_temperatures=60)
    assert report.weights.log_mean.shape == report.acceptance.shape == (5,)
    within(report.weights.log_mean, exact.log_evidence(x), 0.6)  # the spread of single chains
    assert math.isnan(report.log_evidence_mc_se)


def test_four_pilot_chains_per_example_tune_the_steps(monkeypatch):
    exact, vae = linear_gaussian()
    runs, run_chains = [], annealed_importance._run_chains

    def recorded(*arguments, **options):
        chains = run_chains(*arguments, **options)
        runs.append((options["num_chains"], options["steps"], chains))
        return chains

    monkeypatch.setattr(annealed_importance, "_run_chains", recorded)
    anneal(vae, data(exact, N), num_temperatures=5)
    (pilots, none, tuned), (chains, steps, used) = runs
    assert (pilots, none, chains) == (4, None, C)
    assert steps is tuned.steps is used.steps
    assert steps.shape == (5, N)


def test_generators_modes_and_gradients_are_unchanged():
    exact, vae = linear_gaussian()
    vae.train()
    state = torch.get_rng_state()
    first, second = (anneal(vae, data(exact, N), num_temperatures=3) for _ in range(2))
    assert torch.equal(first.weights.log_mean, second.weights.log_mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_latents_that_are_not_real_raise():
    def model(x, latent):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", latent)
            pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    for latent, name in ((dist.Bernoulli(0.5), "Bernoulli"), (dist.LogNormal(0.0, 1.0), "LogNormal|Normal")):
        pair = SimpleNamespace(model=lambda x, latent=latent: model(x, latent), guide=None)
        with pytest.raises(ValueError, match=rf"must be real; 'z', a ({name}), has the support"):
            anneal(pair, torch.zeros(N))


def test_weights_that_are_not_finite_name_the_examples(monkeypatch):
    exact, vae = linear_gaussian()
    x = data(exact, 5)
    x[3] = 1e200
    with pytest.raises(
        pv.NonFiniteError, match=rf"examples 0 to 4, counted from 0: index 3; .* {C} such weights of {C}"
    ):
        anneal(vae, x, num_temperatures=2)
    monkeypatch.setattr(draws, "_ROWS", 2 * C)  # two examples at a time
    with pytest.raises(pv.NonFiniteError, match="of the examples 2 to 3, counted from 0: index 3; "):
        anneal(vae, x, num_temperatures=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1"),
        ({"num_temperatures": 0}, "num_temperatures must be at least 1"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1"),
    ],
)
def test_numbers_below_one_raise(options, message):
    exact, vae = linear_gaussian()
    with pytest.raises(ValueError, match=message):
        anneal(vae, data(exact, N), **options)


def test_the_monte_carlo_error_of_the_mean_is_that_of_a_mean():
    errors = torch.tensor([0.3, 0.4, 1.2], dtype=torch.float64)
    weights = WeightSummary(*[torch.zeros(3)] * 4)
    evidence = AnnealedEvidence(
        weights=replace(weights, standard_error=errors),
        acceptance=torch.ones(3),
        num_chains=4,
        num_temperatures=5,
        seed=0,
    )
    assert evidence.log_evidence_mc_se == pytest.approx(1.3 / 3, rel=1e-12)  # √(0.09 + 0.16 + 1.44) / 3
