"""`evaluate` against the linear-Gaussian model, in which the evidence and every bound are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.closed_form import LinearGaussian

D, K, N, S = 5, 2, 7, 400


class Affine(nn.Module):
    """q(z|x) = N(Ax + a, LLᵀ), in which the exact posterior of a linear-Gaussian model lies."""

    def __init__(self, q_of_zero, weight, scale_tril):
        super().__init__()
        self.offset, self.weight = nn.Parameter(q_of_zero), nn.Parameter(weight)
        self.scale_tril = nn.Parameter(scale_tril)

    def forward(self, x):
        return dist.MultivariateNormal(self.offset + x @ self.weight.T, scale_tril=self.scale_tril)


def linear_gaussian(*, scale=1.0, seed=1):
    """The solved model, a VAE that equals it, whose guide is the posterior with its scale multiplied."""
    generator = torch.Generator().manual_seed(seed)
    W, b = torch.randn(D, K, generator=generator).double(), torch.randn(D, generator=generator).double()
    exact = LinearGaussian(W, b, 0.75**2)  # its root is exact in float32, as the likelihood keeps it
    likelihood = pv.likelihoods.Normal(K, (D,), network=nn.Linear(K, D), variance=0.75**2).double()
    with torch.no_grad():
        likelihood.network.weight.copy_(W)
        likelihood.network.bias.copy_(b)
    at = exact.posterior(torch.cat([torch.zeros(1, D), torch.eye(D)]).double())
    guide = Affine(at.loc[0], (at.loc[1:] - at.loc[0]).T, scale * at.scale_tril[0])
    return exact, pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=likelihood, guide=guide).double()


def draw(exact):
    return exact.sample(N, generator=torch.Generator().manual_seed(2))


def evaluate(vae, x, **options):
    return pv.evaluate(vae, x, progress=False, **{"num_particles": S, **options})


def within(value, expected, standard_error, count=5):
    assert torch.as_tensor(abs(value - expected) <= count * standard_error).all(), (
        value,
        expected,
        standard_error,
    )


def test_with_the_exact_posterior_every_estimate_is_the_evidence():
    exact, vae = linear_gaussian()
    x = draw(exact)
    report = evaluate(vae, x)
    truth = exact.log_evidence(x)
    for estimate in (report.per_datum.log_evidence, report.per_datum.elbo_sampled_kl):
        torch.testing.assert_close(estimate, truth, rtol=0, atol=1e-10)
    assert report.log_evidence == pytest.approx(float(truth.mean()), abs=1e-10)
    assert report.log_evidence_se == pytest.approx(float(truth.std()) / math.sqrt(N), abs=1e-10)
    assert report.log_evidence_mc_se < 1e-10
    torch.testing.assert_close(report.per_datum.effective_sample_size, torch.full((N,), float(S)).double())
    assert (report.pareto_k == 0).all()
    assert (report.num_data, report.num_particles, report.seed) == (N, S, 0)


def test_an_inexact_guide_gives_the_exact_bounds_within_their_errors():
    exact, vae = linear_gaussian(scale=1.3)
    x = draw(exact)
    q = vae.encode(x)
    report = evaluate(vae, x, num_particles=2000)
    within(report.per_datum.log_evidence, exact.log_evidence(x), report.per_datum.log_evidence_mc_se)
    within(report.log_evidence, float(exact.log_evidence(x).mean()), report.log_evidence_mc_se)
    elbo = exact.elbo(x, q.mean, q.covariance_matrix)
    # the standard deviations of the two estimators differ; 3 nats bounds both
    within(report.per_datum.elbo, elbo, 3 / math.sqrt(2000))
    within(report.per_datum.elbo_sampled_kl, elbo, 3 / math.sqrt(2000))
    assert report.elbo < report.log_evidence
    assert (report.pareto_k < 0.5).all()


def test_the_monte_carlo_error_is_that_of_repeated_estimates():
    exact, vae = linear_gaussian(scale=1.3)
    x = draw(exact)
    reports = [evaluate(vae, x, seed=seed) for seed in range(60)]
    spread = torch.stack([report.per_datum.log_evidence for report in reports]).std(0)
    stated = torch.stack([report.per_datum.log_evidence_mc_se for report in reports]).mean(0)
    within(spread / stated, 1.0, 1 / math.sqrt(2 * 59))
    mean_spread = torch.tensor([report.log_evidence for report in reports]).std()
    within(mean_spread / reports[0].log_evidence_mc_se, 1.0, 1.1 / math.sqrt(2 * 59))


def test_a_narrow_guide_is_found_out():
    exact, vae = linear_gaussian(scale=0.3)
    report = evaluate(vae, draw(exact), num_particles=2000)
    assert (report.pareto_k > 0.7).all()


def test_the_estimate_is_the_one_written_out():
    exact, vae = linear_gaussian(scale=1.5)
    x = draw(exact)
    report = evaluate(vae, x, num_particles=9, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        t = pv.terms(vae.model, vae.guide, x, num_particles=9)
    w = t.log_weight.detach().exp()
    per_datum = report.per_datum
    torch.testing.assert_close(per_datum.log_evidence, w.mean(0).log())
    torch.testing.assert_close(per_datum.log_evidence_mc_se, w.std(0) / w.mean(0) / 3)
    torch.testing.assert_close(per_datum.effective_sample_size, w.sum(0) ** 2 / w.square().sum(0))
    torch.testing.assert_close(per_datum.elbo, t.elbo.detach().mean(0))
    torch.testing.assert_close(per_datum.elbo_sampled_kl, w.log().mean(0))
    assert report.pareto_k.isnan().all()  # too few draws to tell


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (lambda x: x[:0], {}, ValueError, "empty"),
        (lambda x: torch.arange(7), {}, TypeError, "floating point; got torch.int64"),
        (lambda x: x[:, :3], {}, ValueError, r"shape \(N, 5\).*got \(7, 3\)"),
        (lambda x: x.tolist(), {}, TypeError, "must be a tensor"),
        (lambda x: x, {"num_particles": 0}, ValueError, "num_particles must be at least 1; got 0"),
        (lambda x: x, {"num_particles": 2.5}, TypeError, "num_particles must be an integer"),
        (lambda x: x / 0, {}, ValueError, "inf lies outside"),
    ],
)
def test_bad_input_is_refused(spoil, options, error, message):
    exact, vae = linear_gaussian()
    with pytest.raises(error, match=message):
        evaluate(vae, spoil(draw(exact)), **options)


def test_weights_that_are_not_finite_name_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            blocked = torch.where(x > 90, -math.inf, 0.0)
            pyro.sample("x", dist.Normal(z, 1.0).mask(x < 1e9), obs=x)
            pyro.factor("blocked", blocked)

    class Pair:
        def __init__(self):
            self.model = model

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = torch.linspace(-1, 1, N)
    x[4], x[6] = 100.0, 200.0
    message = "for 2 of the data 0 to 6: number 4, 6; number 4 has 30 such weights of 30"
    with pytest.raises(pv.NonFiniteError, match=message):
        evaluate(Pair(), x, num_particles=30)
