"""Seven properties of every estimator, and the particular properties of each."""

import contextlib
import itertools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import (
    CASES,
    LinearGaussianPair,
    N,
    assert_within_standard_errors,
    by_quadrature,
    linear_gaussian,
)
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.poutine.util import prune_subsample_sites
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.guides import DiagonalNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Renyi, label
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.priors import StandardNormal
from pyro_vae.vae import VAE

PARAMETERS = LinearGaussianPair.MODEL + LinearGaussianPair.GUIDE
OURS = {name: case for name, case in CASES.items() if "Trace" not in name}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=[name.replace("β", "b") for name in CASES])
each_of_ours = pytest.mark.parametrize("case", OURS.values(), ids=[name.replace("β", "b") for name in OURS])


def loss_and_gradients(estimator, pair, x, *, seed=0):
    torch.manual_seed(seed)
    loss = estimator.differentiable_loss(pair.model, pair.guide, x)
    return [loss.detach(), *torch.autograd.grad(loss, [getattr(pair, name) for name in PARAMETERS])]


def bounds(estimator, pair, x, repeats):
    """Independent estimates of the bound, (repeats, N)."""
    estimator = getattr(estimator, "estimator", estimator)  # KLWeighted reports the wrapped estimator's
    many = pair.repeat(repeats)
    with torch.no_grad():
        terms = estimator.terms(many.model, many.guide, x.repeat(repeats, 1))
        return estimator.bound(terms).reshape(repeats, N)


def assert_same(first, second, *, tolerance=1e-10):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


# The seven properties ---------------------------------------------------------------------------------------


@each_case
def test_zero_noise(case):
    """At the exact posterior every weight is p(x), so that every bound is log p(x) on every draw."""
    x, solved, pair = linear_gaussian(K=2, exact=True)
    loss = case.make().loss(pair.model, pair.guide, x)
    assert loss == pytest.approx(-solved.log_evidence(x).sum().item(), abs=1e-10)


@each_case
def test_oracle(case):
    """The value is the bound computed from Pyro's log-probabilities of the same draws."""
    x, _, pair = linear_gaussian(K=2, exact=False)
    torch.manual_seed(7)
    elbo = Trace_ELBO(num_particles=case.particles, vectorize_particles=True, max_plate_nesting=1)
    ((model_trace, guide_trace),) = elbo._get_traces(pair.model, pair.guide, (x,), {})
    log_weight = sum(
        sign * site["log_prob"].detach().reshape(case.particles, N)
        for sign, trace in ((1, model_trace), (-1, guide_trace))
        for site in prune_subsample_sites(trace).nodes.values()
        if site["type"] == "sample"
    )
    expected = pytest.approx(-case.bound(log_weight).sum().item(), rel=1e-10)
    estimator = case.make()
    for run in (
        estimator.loss,
        estimator.loss_and_grads,
        lambda *pair: estimator.differentiable_loss(*pair).item(),
        lambda model, guide, x: estimator(model, guide)(x).item(),
    ):
        torch.manual_seed(7)
        assert run(pair.model, pair.guide, x) == expected


@each_of_ours
def test_unbiased_value(case):
    """Estimates average to the bound computed by quadrature, for each example."""
    x, _, pair = linear_gaussian(K=1, exact=False)
    with torch.no_grad():
        expected = by_quadrature(case.bound, pair, x, particles=case.particles)
    assert_within_standard_errors(bounds(case.make(), pair, x, 20_000), expected)


@each_case
def test_unbiased_gradient(case):
    """Gradients average to the gradient of the bound by quadrature, for each example and parameter."""
    x, _, pair = linear_gaussian(K=1, exact=False)
    repeats = 20_000
    _, *found = loss_and_gradients(case.make(), pair.repeat(repeats), x.repeat(repeats, 1))
    samples = dict(zip(PARAMETERS, found, strict=True))
    for bound, names in ((case.bound, pair.MODEL), (case.guide_bound or case.bound, pair.GUIDE)):
        integral = by_quadrature(bound, pair, x, particles=case.particles, beta=case.beta).sum()
        expected = torch.autograd.grad(integral, [getattr(pair, name) for name in names])
        for name, exact in zip(names, expected, strict=True):
            assert_within_standard_errors(-samples[name].unflatten(0, (repeats, N)), exact)


@each_of_ours
def test_order_and_sign(case):
    """In expectation, ELBO ≤ bound ≤ log p(x)."""
    x, solved, pair = linear_gaussian(K=2, exact=False)
    estimates = bounds(case.make(), pair, x, 20_000)
    slack = 5 * estimates.std(0) / math.sqrt(len(estimates))
    elbo = solved.elbo(x, pair.loc, pair.tril @ pair.tril.mT)
    assert (elbo - slack <= estimates.mean(0)).all()
    assert (estimates.mean(0) <= solved.log_evidence(x) + slack).all()


def test_the_bound_rises_with_the_number_of_particles():
    x, solved, pair = linear_gaussian(K=2, exact=False)
    estimates = [bounds(IWAE(S), pair, x, 20_000).sum(1) for S in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(estimates):
        rise = more - fewer
        assert rise.mean() > 5 * rise.std() / math.sqrt(len(rise))
    assert estimates[-1].mean() < solved.log_evidence(x).sum()


@each_case
def test_isolation(case):
    """Two models with the same names train in one process under Pyro's SVI, without side effects."""
    x = torch.bernoulli(torch.full((N, 6), 0.4))
    for _ in range(2):
        vae = small_vae()
        before = [p.detach().clone() for p in vae.parameters()]
        svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), case.make())
        svi.step(x)
        assert all((p != q).any() for p, q in zip(vae.parameters(), before, strict=True))


# Limiting cases, values and gradients on the same draws -----------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (IWAE(1), Trace_ELBO()),
        (IWAE(1, 4), Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)),
        (PIWAE(4, 1), IWAE(4)),
        (PIWAE(1, 1), Trace_ELBO()),
        (CIWAE(1.0, 4), IWAE(1, 4)),
        (CIWAE(0.0, 4), IWAE(4)),
        (Renyi(0.0, 4), IWAE(4)),
        (DReG(1), STL(1)),
        (VIMCO(4), IWAE(4)),  # of a reparameterised guide
        (Renyi(0.0, 4), RenyiELBO(0.0, num_particles=4, vectorize_particles=True, max_plate_nesting=1)),
        (Renyi(0.4, 4), RenyiELBO(0.4, num_particles=4, vectorize_particles=True, max_plate_nesting=1)),
        (Renyi(-1.5, 4), RenyiELBO(-1.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1)),
    ],
    ids=label,
)
def test_limiting_cases(one, other):
    x, _, pair = linear_gaussian(K=2, exact=False)
    results = []
    for estimator in (one, other):
        pair.zero_grad()
        torch.manual_seed(3)
        with poutine.trace(param_only=True):  # RenyiELBO differentiates only if it sees a parameter
            loss = estimator.loss_and_grads(with_parameter(pair.model), pair.guide, x)
        results.append([torch.tensor(loss), *(getattr(pair, name).grad.clone() for name in PARAMETERS)])
    pyro.clear_param_store()
    assert_same(*results)


def with_parameter(model):
    def model_with_parameter(x):
        pyro.param("unused", torch.zeros(()))
        model(x)

    return model_with_parameter


@pytest.mark.parametrize("alpha", [1 - 1e-7, 1 + 1e-7])
def test_renyi_tends_to_the_elbo(alpha):
    x, _, pair = linear_gaussian(K=2, exact=False)
    one, other = (loss_and_gradients(e, pair, x) for e in (Renyi(alpha, 4), IWAE(1, 4)))
    assert_same(one, other, tolerance=1e-4)


@each_case
def test_weight_one_changes_nothing(case):
    estimator = case.make()
    if isinstance(estimator, KLWeighted):
        estimator = estimator.estimator
    x, _, pair = linear_gaussian(K=2, exact=False)
    assert_same(*(loss_and_gradients(e, pair, x) for e in (estimator, KLWeighted(estimator, 1.0))))


# Particular properties --------------------------------------------------------------------------------------


def test_sticking_the_landing_has_no_variance_at_the_posterior():
    x, _, pair = linear_gaussian(K=2, exact=True)
    _, *gradients = loss_and_gradients(STL(), pair, x)
    _, *plain = loss_and_gradients(IWAE(1), pair, x)
    for name, gradient, noisy in zip(PARAMETERS, gradients, plain, strict=True):
        if name in pair.GUIDE:
            assert gradient.abs().max() < 1e-13
            assert noisy.abs().max() > 0.1


def test_dreg_has_no_variance_at_the_posterior():
    x, _, pair = linear_gaussian(K=2, exact=True)
    _, *gradients = loss_and_gradients(DReG(4), pair, x)
    for name, gradient in zip(PARAMETERS, gradients, strict=True):
        if name in pair.GUIDE:
            assert gradient.abs().max() < 1e-13


def test_dreg_leaves_the_gradient_of_the_model_alone():
    x, _, pair = linear_gaussian(K=2, exact=False)
    dreg, iwae = (loss_and_gradients(e, pair, x) for e in (DReG(4), IWAE(4)))
    assert_same(dreg[1:4], iwae[1:4])
    assert (dreg[4] - iwae[4]).abs().min() > 1e-3


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("make", [STL, DReG])
def test_path_gradients_are_those_of_a_guide_with_fixed_parameters(make, beta):
    """The expected gradient, of the same draws, is written out: only z carries a gradient."""
    x, _, pair = linear_gaussian(K=2, exact=False)
    _, *found = loss_and_gradients(KLWeighted(make(4), beta), pair, x)
    torch.manual_seed(0)
    z = dist.MultivariateNormal(pair.loc, scale_tril=pair.tril).rsample((4,))
    q = dist.MultivariateNormal(pair.loc.detach(), scale_tril=pair.tril.detach())
    mean = (pair.W @ z.unsqueeze(-1)).squeeze(-1) + pair.b
    log_likelihood = dist.Normal(mean, (pair.log_c / 2).exp().unsqueeze(-1)).log_prob(x).sum(-1)
    log_weight = log_likelihood + beta * (dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z))
    weight = log_weight.detach().softmax(0) if make is DReG else torch.full_like(log_weight, 0.25)
    path_weight = (1 - beta) * weight + beta * weight**2 if make is DReG else weight
    expected = torch.autograd.grad(-(path_weight * log_weight).sum(), [pair.loc, pair.tril])
    assert_same(found[3:], list(expected))


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_piwae_is_iwae_for_the_model_and_miwae_for_the_guide(spread):
    """On the same draws, also if a weight underflows among all particles but not within its group."""
    x, _, pair = linear_gaussian(K=2, exact=False)
    pair, x = pair.float(), spread * x.float()
    log_weight = IWAE(8).terms(pair.model, pair.guide, x).log_weight
    assert ((log_weight - log_weight.amax(0)).amin() < -104) == (spread > 1)  # exp(-104) is 0 in float32
    piwae, iwae, miwae = (loss_and_gradients(e, pair, x) for e in (PIWAE(2, 4), IWAE(8), IWAE(2, 4)))
    assert_same(piwae[:4], iwae[:4], tolerance=2e-3)
    assert_same(piwae[4:], miwae[4:], tolerance=2e-3)


def test_a_hopeless_particle_adds_nothing_to_the_gradient_of_piwae_in_the_model():
    log_noise, loc = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1e3))
            pyro.sample("x", dist.Normal(z, log_noise.exp()), obs=x)

    def guide(x):  # log p(x|z) is about -1e6 at most draws, and so is its slope in the logarithm of the noise
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1e3))

    slopes = []
    for estimator in (PIWAE(2, 3), IWAE(6)):
        torch.manual_seed(0)
        loss = estimator.differentiable_loss(model, guide, torch.zeros(5))
        slopes.append(torch.autograd.grad(loss, log_noise)[0])
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_slopes_of_the_signal_to_noise_ratio():
    """Log-log slopes in S of the signal-to-noise ratios of gradients, in the toy model of Rainforth et al."""
    K, repeats, sizes = 20, 300, [64, 256, 1024]
    mu, x = torch.randn(K, dtype=torch.float64), 2 * torch.randn(K, dtype=torch.float64)
    x = x.expand(repeats, K)
    offset = 0.01 * torch.randn(2, K, dtype=torch.float64)
    prior_mean = (mu + offset[0]).repeat(repeats, 1).requires_grad_()
    guide_mean = ((x + mu) / 2 + offset[1]).requires_grad_()  # Ax + b

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(prior_mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(guide_mean, math.sqrt(2 / 3)).to_event(1))

    ratios = {"IWAE guide": [], "DReG guide": [], "IWAE model": []}
    for S in sizes:
        (iwae, model_gradient), (dreg, _) = (
            torch.autograd.grad(make(S).differentiable_loss(model, guide, x), [guide_mean, prior_mean])
            for make in (IWAE, DReG)
        )
        # DReG's mean is the signal of both, as the sample mean of IWAE's is mostly noise.
        ratios["IWAE guide"].append(dreg.mean(0).norm() / iwae.std(0).norm())
        ratios["DReG guide"].append(dreg.mean(0).norm() / dreg.std(0).norm())
        ratios["IWAE model"].append(model_gradient.mean(0).norm() / model_gradient.std(0).norm())
    slopes = {name: math.log(r[-1] / r[0], sizes[-1] / sizes[0]) for name, r in ratios.items()}
    assert slopes == pytest.approx({"IWAE guide": -0.5, "DReG guide": 0.5, "IWAE model": 0.5}, abs=0.1)


def small_vae():
    return VAE(
        prior=StandardNormal(2),
        likelihood=Bernoulli(2, (6,), hidden_features=(4,)),
        guide=DiagonalNormal((6,), 2, hidden_features=(4,)),
    )


# Sites that are not reparameterised, and pairs of several sites ---------------------------------------------


class DiscretePair(torch.nn.Module):
    """Pair of a discrete z1 in {0, 1, 2}, a Gaussian z2 given z1, and x, with parameters per example.

    With `constrained`, z1 = 0 is impossible under the model, but not under the guide.
    """

    def __init__(self, times=1, *, constrained=False):
        super().__init__()
        self.constrained = constrained
        noise = torch.Generator().manual_seed(4)

        def parameter(*shape):
            value = torch.randn(N, *shape, generator=noise, dtype=torch.float64)
            return torch.nn.Parameter(value.repeat(times, *[1] * len(shape)))

        self.logits, self.guide_logits = parameter(3), parameter(3)
        self.mean, self.guide_mean, self.slope = parameter(3), parameter(3), parameter()

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Categorical(logits=self.logits))
            z2 = pyro.sample("z2", dist.Normal(self.at(self.mean, z1), 1.0))
            pyro.sample("x", dist.Normal(self.slope * z2 + z1, 0.9), obs=x)
            if self.constrained:
                pyro.factor("possible", z1.double().log().clamp(max=0))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Categorical(logits=self.guide_logits))
            pyro.sample("z2", dist.Normal(self.at(self.guide_mean, z1), 0.7))

    @staticmethod
    def at(table, z):
        return table.expand(*z.shape, 3).gather(-1, z.long().unsqueeze(-1)).squeeze(-1)

    def integral(self, x, S):
        """Expected bound of S particles, by enumeration of z1 and quadrature over z2."""
        nodes = 14
        points, weights = map(torch.from_numpy, hermegauss(nodes))
        z1 = torch.arange(3).repeat_interleave(nodes).unsqueeze(-1).expand(-1, N)
        z2 = self.at(self.guide_mean, z1) + 0.7 * points.repeat(3).unsqueeze(-1)
        log_q1 = self.at(self.guide_logits.log_softmax(-1), z1)
        log_weight = (
            self.at(self.logits.log_softmax(-1), z1)
            + torch.distributions.Normal(self.at(self.mean, z1), 1.0).log_prob(z2)
            + torch.distributions.Normal(self.slope * z2 + z1, 0.9).log_prob(x)
            - log_q1
            - torch.distributions.Normal(self.at(self.guide_mean, z1), 0.7).log_prob(z2)
        )
        probability = log_q1.exp() * (weights / weights.sum()).repeat(3).unsqueeze(-1)
        grid = torch.cartesian_prod(*[torch.arange(3 * nodes)] * S)
        return (probability[grid].prod(1) * log_weight[grid].exp().mean(1).log()).sum(0)


def test_vimco_is_unbiased_for_discrete_and_mixed_sites():
    x, repeats = torch.tensor([0.4, -1.0, 2.5], dtype=torch.float64), 20_000
    pair, many = DiscretePair(), DiscretePair(repeats)
    loss = VIMCO(2).differentiable_loss(many.model, many.guide, x.repeat(repeats))
    samples = torch.autograd.grad(loss, list(many.parameters()))
    expected = torch.autograd.grad(pair.integral(x, 2).sum(), list(pair.parameters()))
    for gradient, exact in zip(samples, expected, strict=True):
        assert_within_standard_errors(-gradient.unflatten(0, (repeats, N)), exact)


@pytest.mark.parametrize(("constrained", "zeros"), [(False, [0, 0, 0]), (True, [2, 3, 1])])
def test_vimcos_learning_signal(constrained, zeros):
    """The signal, computed in a loop, is the bound minus that with the geometric mean of the other weights.

    Also if some or all of the other weights are 0; then there is no baseline.
    """
    x, S = torch.tensor([0.4, -1.0, 2.5], dtype=torch.float64), 4
    pair = DiscretePair(constrained=constrained)
    torch.manual_seed(17)
    terms = VIMCO(S).terms(pair.model, pair.guide, x)
    weight = terms.log_weight.detach().exp()
    assert (weight == 0).sum(0).tolist() == zeros
    surrogate = terms.log_weight.logsumexp(0)
    for s in range(S):
        others = torch.cat([weight[:s], weight[s + 1 :]])
        without = (others.sum(0) + others.prod(0) ** (1 / (S - 1))) / S
        baseline = torch.where(without > 0, without.log(), 0.0)
        surrogate = surrogate + (weight.mean(0).log() - baseline) * terms.log_score_function[s]
    found, expected = (
        torch.autograd.grad(value.sum(), list(pair.parameters()), retain_graph=True)
        for value in (VIMCO(S).surrogate(terms), surrogate)
    )
    assert_same(found, expected)


def test_vimcos_baseline_lowers_the_variance():
    x, repeats = torch.tensor([0.4, -1.0, 2.5], dtype=torch.float64), 2000
    many = DiscretePair(repeats)
    terms = VIMCO(5).terms(many.model, many.guide, x.repeat(repeats))
    bound = VIMCO(5).bound(terms)
    plain = bound + (bound.detach() * terms.log_score_function).sum(0)
    spread = [
        torch.autograd.grad(surrogate.sum(), many.guide_logits, retain_graph=True)[0].var(0)
        for surrogate in (VIMCO(5).surrogate(terms), plain)
    ]
    assert (spread[0] < 0.5 * spread[1]).all()


@pytest.mark.parametrize("estimator", [IWAE(2), PIWAE(2, 2), CIWAE(0.5, 2), Renyi(0.5, 2), STL(), DReG(2)])
def test_a_guide_that_is_not_reparameterised_raises(estimator):
    pair, x = DiscretePair(), torch.zeros(N, dtype=torch.float64)
    estimator.loss(pair.model, pair.guide, x)  # the value is correct
    for make in (estimator, KLWeighted(estimator, 0.5)):
        with pytest.raises(ValueError, match=r"'z1' is not reparameterised.*VIMCO"):
            make.differentiable_loss(pair.model, pair.guide, x)
        with pytest.raises(ValueError, match=r"'z1' is not reparameterised.*VIMCO"):
            make.loss_and_grads(pair.model, pair.guide, x)


def test_a_discrete_guide_without_parameters_is_valid():
    pair, x = DiscretePair(), torch.zeros(N, dtype=torch.float64)
    pair.guide_logits.requires_grad_(False)
    IWAE(2).loss_and_grads(pair.model, pair.guide, x)
    assert (pair.guide_mean.grad != 0).any()


class Chain(torch.nn.Module):
    """Pair z1 → z2 → x whose guide is the exact posterior, in either order, with parameters per example.

    z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1).
    """

    def __init__(self, *, bottom_up, times=1, offset=0.0):
        super().__init__()
        self.bottom_up = bottom_up
        # The guide's first site is N(a x, s²), its second N(u x + v first, t²).
        values = (2 / 3, 2 / 3, 0.0, 1 / 2, 1 / 2) if bottom_up else (1 / 3, 2 / 3, 1 / 2, 1 / 2, 1 / 2)
        values = torch.tensor(values, dtype=torch.float64) + torch.tensor([offset, 0, offset, 0, 0])
        self.phi = torch.nn.Parameter(values.repeat(N * times, 1))
        self.gain = torch.nn.Parameter(torch.ones(N * times, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.gain * z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(self, x):
        a, variance1, u, v, variance2 = self.phi.unbind(-1)
        first, second = ("z2", "z1") if self.bottom_up else ("z1", "z2")
        with pyro.plate("data", len(x)):
            z = pyro.sample(first, dist.Normal(a * x, variance1.sqrt()))
            pyro.sample(second, dist.Normal(u * x + v * z, variance2.sqrt()))

    @staticmethod
    def log_evidence(x):
        return torch.distributions.Normal(torch.zeros_like(x), math.sqrt(3)).log_prob(x)


both_orders = pytest.mark.parametrize("bottom_up", [True, False], ids=["bottom-up", "top-down"])


@both_orders
@pytest.mark.parametrize("estimator", [STL(), STL(2), DReG(4)], ids=repr)
def test_path_gradients_of_a_hierarchical_pair_vanish_at_its_posterior(bottom_up, estimator):
    chain, x = Chain(bottom_up=bottom_up), torch.tensor([0.3, -2.0, 1.1], dtype=torch.float64)
    loss = estimator.differentiable_loss(chain.model, chain.guide, x)
    assert loss.item() == pytest.approx(-Chain.log_evidence(x).sum().item(), abs=1e-10)
    assert torch.autograd.grad(loss, chain.phi)[0].abs().max() < 1e-13


@both_orders
@pytest.mark.parametrize("estimator", [STL(), DReG(3), PIWAE(3, 1)], ids=repr)
def test_gradients_of_a_hierarchical_pair_are_unbiased(bottom_up, estimator):
    """Compared with plain reparameterisation, which is unbiased for every pair."""
    x, repeats = torch.tensor([0.3, -2.0, 1.1], dtype=torch.float64).repeat(10_000), 10_000
    chain = Chain(bottom_up=bottom_up, times=repeats, offset=0.3)
    parameters = [chain.phi, chain.gain]
    plain = IWAE(estimator.num_particles)
    one, other = (
        torch.autograd.grad(e.differentiable_loss(chain.model, chain.guide, x), parameters)
        for e in (estimator, plain)
    )
    for gradient, reference in zip(one, other, strict=True):
        difference = (gradient - reference).unflatten(0, (repeats, N))
        assert_within_standard_errors(difference, torch.zeros_like(difference[0]))


def test_path_gradients_pass_through_a_flow():
    """The guide's parameters are those of a transform: N(a, s²) is an affine map of N(0, 1)."""
    x, _, pair = linear_gaussian(K=1, exact=True)

    def guide(x):
        transform = dist.transforms.AffineTransform(pair.loc, pair.tril[:, 0], event_dim=1)
        base = dist.Normal(torch.zeros_like(pair.loc), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    loss = STL().differentiable_loss(pair.model, guide, x)
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [pair.loc, pair.tril])) < 1e-13


def test_a_flow_without_an_inverse_raises():
    x, _, pair = linear_gaussian(K=2, exact=False)
    flow = dist.transforms.Planar(2).double()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(pair.loc, 1.0).to_event(1), [flow]))

    IWAE(2).loss_and_grads(pair.model, guide, x)
    with pytest.raises(ValueError, match="'z'.*has no inverse.*Trace_ELBO or IWAE"):
        STL().differentiable_loss(pair.model, guide, x)


@pytest.mark.parametrize("estimator", [STL(), DReG(2)], ids=repr)
def test_a_jacobian_with_parameters_raises(estimator):
    """z = s u with u ~ N(0, 1), with its density in a Delta: at fixed z, the Delta does not depend on s."""
    x, _, pair = linear_gaussian(K=1, exact=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros_like(pair.loc), 1.0).to_event(1)
            u = pyro.sample("u", noise, infer={"is_auxiliary": True})
            scale = pair.tril[:, 0]
            density = -scale.log().sum(-1)
            pyro.sample("z", dist.Delta(pair.loc + scale * u, log_density=density, event_dim=1))

    zero_noise = IWAE(2).loss(pair.model, guide, x)
    assert zero_noise == pytest.approx(STL().loss(pair.model, pair.guide, x), abs=1e-10)
    with pytest.raises(ValueError, match="'z' carries a Jacobian.*TransformedDistribution"):
        estimator.differentiable_loss(pair.model, guide, x)


# The weight on the KL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO])
def test_weighted_pyro_estimators(make, vectorize):
    """Compared with −E log p(x|z) + β KL written out, with the subsampling scale of the plate."""
    vae, x, S, beta = small_vae(), torch.bernoulli(torch.full((N, 6), 0.4)), 4, 0.3
    options = {"num_particles": S, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    inner = make(**options)
    model, guide = (poutine.scale(program, scale=2.5) for program in (vae.model, vae.guide))
    estimator = KLWeighted(inner, beta)
    losses = {}
    for name, run in {
        "plain": lambda: inner.differentiable_loss(model, guide, x),
        "reported": lambda: estimator.differentiable_loss(model, guide, x),
        "weighted": lambda: estimator.objective(model, guide, x),
    }.items():
        torch.manual_seed(5)
        losses[name] = run()
    q, p = vae.encode(x), vae.prior()
    torch.manual_seed(5)
    z = q.rsample((S,)) if vectorize else torch.stack([q.rsample() for _ in range(S)])
    sampled = (q.log_prob(z) - p.log_prob(z)).mean(0)
    kl = torch.distributions.kl_divergence(q, p.expand([N])) if make is TraceMeanField_ELBO else sampled
    written_out = -2.5 * (vae.decode(z).log_prob(x).mean(0) - beta * kl).sum()
    assert losses["weighted"].item() == pytest.approx(written_out.item(), rel=1e-5)
    assert losses["reported"].item() == pytest.approx(losses["plain"].item(), rel=1e-5)
    parameters = list(vae.parameters())
    expected = torch.autograd.grad(written_out, parameters)
    for name in ("weighted", "reported"):
        torch.testing.assert_close(
            torch.autograd.grad(losses[name], parameters), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("by", ["site", "distribution"])
def test_the_reported_value_of_a_masked_pair_is_the_wrapped_estimators(make, vectorize, by):
    """Also with different masks, for which the value of TraceMeanField_ELBO itself is wrong."""
    x = torch.randn(4)
    masks = torch.tensor([[True, False, True, True], [True, True, True, False]])
    guide_mask, model_mask = masks if by == "distribution" else (masks[0], masks[0])

    def draw(loc, mask):
        q = dist.Normal(loc, 0.6).to_event(1)
        with poutine.mask(mask=mask if by == "site" else True):
            return pyro.sample("z", q.mask(mask) if by == "distribution" else q)

    def model(x):
        with poutine.scale(scale=2.5), pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(draw(torch.zeros(2), model_mask).sum(-1), 1.0), obs=x)

    def guide(x):
        with poutine.scale(scale=2.5), pyro.plate("data", len(x)):
            draw(torch.tensor([1.0, -2.0]), guide_mask)

    inner = make(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    values = []
    for estimator in (inner, KLWeighted(inner, 0.3)):
        torch.manual_seed(0)
        values.append(estimator.differentiable_loss(model, guide, x))
    assert_same(*values, tolerance=1e-5)


def test_guides_without_a_kl_to_weight_raise():
    x, _, pair = linear_gaussian(K=2, exact=False)
    estimator = KLWeighted(Trace_ELBO(), 0.5)
    with pytest.raises(TypeError, match="GuideMessenger"):
        estimator.differentiable_loss(pair.model, AutoNormalMessenger(pair.model), x)
    with pytest.raises(ValueError, match="no sample site"):
        estimator.differentiable_loss(lambda x: None, lambda x: None, x)


def test_weight_zero_leaves_the_reconstruction():
    x, _, pair = linear_gaussian(K=2, exact=False)
    torch.manual_seed(0)
    objective = KLWeighted(IWAE(1), 0.0).objective(pair.model, pair.guide, x)
    torch.manual_seed(0)
    terms = IWAE(1).terms(pair.model, pair.guide, x)
    assert objective.item() == pytest.approx(-terms.log_likelihood.sum().item(), rel=1e-12)


def test_a_schedule_is_evaluated_once_per_gradient():
    x, _, pair = linear_gaussian(K=2, exact=False)
    evaluated = []
    estimator = KLWeighted(IWAE(2), lambda step: evaluated.append(step) or 0.1 * step)
    for step in range(3):
        estimator.differentiable_loss(pair.model, pair.guide, x)
        estimator.loss(pair.model, pair.guide, x)
        assert evaluated == list(range(step + 1))
    estimator.loss_and_grads(pair.model, pair.guide, x)
    assert estimator.steps == 4
    assert estimator.beta == pytest.approx(0.4)


@pytest.mark.parametrize(
    "inner",
    [
        IWAE(1),
        IWAE(1, 4),
        STL(4),
        TraceMeanField_ELBO(),
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=lambda e: f"{type(e).__name__}({e.num_particles}, {getattr(e, 'num_groups', 1)})",
)
@pytest.mark.parametrize("per", ["dimension", "total"])
def test_free_bits(inner, per):
    """The penalty of −E log p(x|z) + β Σ max(λ, KL) is that written out from the KLs of the batch."""
    vae, x = small_vae(), torch.bernoulli(torch.full((N, 6), 0.4))
    q, p = vae.encode(x), vae.prior()
    kl = torch.distributions.kl_divergence(q.base_dist, p.expand([N]).base_dist).mean(0)
    kl = kl.sum(0, keepdim=True) if per == "total" else kl
    threshold = kl.detach().mean().item()  # with two dimensions, one lies below and one above
    bits = threshold / math.log(2) * (1.5 if per == "total" else 1)
    results = []
    for free_bits in (0.0, bits):
        estimator = KLWeighted(inner, 0.5, free_bits=free_bits, per=per)
        torch.manual_seed(2)
        objective = estimator.objective(vae.model, vae.guide, x)
        torch.manual_seed(2)
        value = estimator.differentiable_loss(vae.model, vae.guide, x)
        results.append([objective, value, *torch.autograd.grad(objective, list(vae.posterior.parameters()))])
    (without, value, *gradients), (with_bits, same_value, *new_gradients) = results
    penalty = 0.5 * N * (bits * math.log(2) - kl).relu().sum()
    assert penalty > 0.001
    assert (with_bits - without).item() == pytest.approx(penalty.item(), rel=1e-3)
    assert same_value.item() == value.item()
    expected = torch.autograd.grad(penalty, list(vae.posterior.parameters()))
    for new, old, gradient in zip(new_gradients, gradients, expected, strict=True):
        torch.testing.assert_close(new - old, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inner", [IWAE(1, 2), Trace_ELBO()], ids=["IWAE", "Trace_ELBO"])
@pytest.mark.parametrize("per", ["dimension", "total"])
def test_free_bits_of_several_sites(inner, per):
    """Two sites, one masked and of two dimensions, with KL ½ m², averaged over unmasked examples."""
    x, mask, scale = torch.zeros(4), torch.tensor([True, True, False, True]), 2.5

    def sites(first, second):
        with poutine.mask(mask=mask):
            z1 = pyro.sample("z1", dist.Normal(first, 1.0).to_event(1))
        return z1.sum(-1) + pyro.sample("z2", dist.Normal(second, 1.0))

    def model(x):
        with poutine.scale(scale=scale), pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(sites(torch.zeros(2), torch.tensor(0.0)), 1.0), obs=x)

    def guide(x):
        with poutine.scale(scale=scale), pyro.plate("data", len(x)):
            sites(torch.tensor([1.0, 2.0]), torch.tensor(3.0))

    nats, penalty = {
        "dimension": (3.0, 3 * (3 - 0.5) + 3 * (3 - 2.0)),  # the KL of the third dimension is 4½
        "total": (9.0, 4 * 9 - 3 * (0.5 + 2.0) - 4 * 4.5),
    }[per]
    losses = []
    for bits in (0.0, nats / math.log(2)):
        torch.manual_seed(0)
        losses.append(KLWeighted(inner, 1.0, free_bits=bits, per=per).objective(model, guide, x))
    assert (losses[1] - losses[0]).item() == pytest.approx(scale * penalty, rel=1e-4)


def test_free_bits_hold_the_kl_at_its_threshold():
    """If the KL of a dimension is below λ, the gradient of its KL term is exactly zero."""
    x, _, pair = linear_gaussian(K=2, exact=False)
    loc = torch.nn.Parameter(0.1 * pair.loc.detach())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.9).to_event(1))

    estimator = KLWeighted(TraceMeanField_ELBO(), 0.7, free_bits=50.0)
    torch.manual_seed(0)
    (with_bits,) = torch.autograd.grad(estimator.objective(pair.model, guide, x), loc)
    torch.manual_seed(0)
    (without_kl,) = torch.autograd.grad(KLWeighted(IWAE(1), 0.0).objective(pair.model, guide, x), loc)
    torch.testing.assert_close(with_bits, without_kl, rtol=1e-10, atol=1e-10)


def test_free_bits_need_a_kl_in_closed_form():
    x, _, pair = linear_gaussian(K=2, exact=False)
    with pytest.raises(ValueError, match="'z' in closed form per dimension.*MultivariateNormal"):
        KLWeighted(IWAE(1), 1.0, free_bits=1.0).differentiable_loss(pair.model, pair.guide, x)
    chain, y = Chain(bottom_up=True), torch.zeros(N, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"guide draws \['z2', 'z1'\] and the model \['z1', 'z2'\]"):
        KLWeighted(Trace_ELBO(), 1.0, free_bits=1.0).differentiable_loss(chain.model, chain.guide, y)


@pytest.mark.parametrize(
    "estimator", [STL(2, max_plate_nesting=2), Trace_ELBO(max_plate_nesting=2)], ids=["STL", "Trace_ELBO"]
)
def test_free_bits_need_one_mask_and_one_plate(estimator):
    x = torch.randn(4)

    def program(*, mask=True, frames=1, observe=False):
        def run(x):
            plates = pyro.plate("data", len(x), dim=-1), pyro.plate("frames", frames, dim=-2)
            with plates[0], plates[1] if frames > 1 else contextlib.nullcontext():
                with poutine.mask(mask=mask):
                    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
                if observe:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    weighted = KLWeighted(estimator, 1.0, free_bits=0.1)
    weighted.differentiable_loss(program(observe=True), program(), x)
    mask = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match="free bits need the KL of the site 'z' in closed form|same mask"):
        weighted.differentiable_loss(program(observe=True), program(mask=mask), x)
    with pytest.raises(ValueError, match="free bits are for sites in one plate, but 'z' lies in several"):
        weighted.differentiable_loss(program(frames=3, observe=True), program(frames=3), x)


@pytest.mark.parametrize(
    "estimator", [IWAE(2), PIWAE(1, 2), CIWAE(0.5, 2), Renyi(0.5, 2), DReG(2), VIMCO(2)], ids=repr
)
def test_free_bits_raise_if_the_bound_is_not_the_elbo(estimator):
    with pytest.raises(ValueError, match=f"free bits are for the ELBO, but {re.escape(repr(estimator))}"):
        KLWeighted(estimator, 1.0, free_bits=0.1)


@pytest.mark.parametrize("estimator", [IWAE(1, 3), PIWAE(1, 1), Renyi(0.5, 1), DReG(1), STL(3)], ids=repr)
def test_estimators_whose_bound_is_the_elbo(estimator):
    x, _, pair = linear_gaussian(K=2, exact=False)
    terms = estimator.terms(pair.model, pair.guide, x)
    assert_same(estimator.bound(terms), terms.log_weight.mean(0))
    assert estimator.is_elbo
    KLWeighted(estimator, 1.0, free_bits=0.1)


# Subsampling ------------------------------------------------------------------------------------------------


@each_of_ours
def test_subsampling_scales_the_loss_and_nothing_else(case):
    """The factor N / B stays outside every logarithm: the loss is that of the batch times the factor."""
    x, _, pair = linear_gaussian(K=2, exact=False)

    size = 7 * N

    def model(x):
        with pyro.plate("data", size, subsample=torch.arange(N)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            mean = (pair.W @ z.unsqueeze(-1)).squeeze(-1) + pair.b
            pyro.sample("x", dist.Normal(mean, (pair.log_c / 2).exp().unsqueeze(-1)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", size, subsample=torch.arange(N)):
            pyro.sample("z", dist.MultivariateNormal(pair.loc, scale_tril=pair.tril))

    whole = loss_and_gradients(case.make(), pair, x)
    pair_of_functions = type("Pair", (), {"model": staticmethod(model), "guide": staticmethod(guide)})
    for name in PARAMETERS:
        setattr(pair_of_functions, name, getattr(pair, name))
    assert_same(loss_and_gradients(case.make(), pair_of_functions, x), [7 * t for t in whole])


@each_of_ours
def test_scaling_the_whole_pair(case):
    x, _, pair = linear_gaussian(K=2, exact=False)
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    estimator = case.make()
    torch.manual_seed(0)
    loss = estimator.loss(*(poutine.scale(p, scale=weight) for p in (pair.model, pair.guide)), x)
    torch.manual_seed(0)
    inner = getattr(estimator, "estimator", estimator)
    expected = -(weight * inner.bound(inner.terms(pair.model, pair.guide, x))).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-12)


# Use as a loss by Pyro --------------------------------------------------------------------------------------


@pytest.mark.slow
@each_case
def test_pyros_svi_drives_every_estimator(case):
    """200 steps of Pyro's SVI increase the ELBO of a small VAE."""
    x = torch.bernoulli(torch.full((40, 6), 0.5).index_fill(1, torch.tensor([0, 3]), 0.02))
    vae = small_vae()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), case.make())

    def elbo():
        return IWAE(1, 100).loss(vae.model, vae.guide, x) / -len(x)

    before = elbo()
    losses = [svi.step(x) for _ in range(200)]
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    assert elbo() > before + 0.5
    assert math.isfinite(svi.evaluate_loss(x))


@each_of_ours
def test_make_fx_traces_the_step(case):
    """Loss and gradients are one graph, bitwise equal when run: no host synchronisation or branch on data."""
    x, _, pair = linear_gaussian(K=2, exact=False)
    values = [getattr(pair, name) for name in PARAMETERS]

    def step(*values):
        return loss_and_gradients(case.make(), Bound(values), x)

    class Bound(LinearGaussianPair):
        def __init__(self, values):
            torch.nn.Module.__init__(self)
            vars(self).update(zip(PARAMETERS, values, strict=True))

    with pyro.validation_enabled(False):
        graph = make_fx(step)(*values)
        torch.manual_seed(0)
        eager = step(*values)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(graph(*values), eager, strict=True))


def test_the_weight_on_the_kl_can_be_an_input_of_the_graph():
    """A schedule then needs no new graph."""
    x, _, pair = linear_gaussian(K=2, exact=False)
    estimator = KLWeighted(DReG(3), 1.0)

    def step(beta):
        loss = estimator.differentiable_loss_at(beta, pair.model, pair.guide, x)
        return [loss.detach(), *torch.autograd.grad(loss, [pair.W, pair.loc])]

    with pyro.validation_enabled(False):
        graph = make_fx(step)(torch.tensor(0.5, dtype=torch.float64))
        for beta in torch.tensor([0.5, 0.1], dtype=torch.float64):
            torch.manual_seed(0)
            eager = step(beta.item())
            torch.manual_seed(0)
            assert_same(graph(beta), eager)
    assert estimator.steps == 0


def test_nan_warns():
    x, _, pair = linear_gaussian(K=2, exact=False)
    pair.b.data[0] = math.nan
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN: loss"):
        IWAE(2).loss(pair.model, pair.guide, x)
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN: loss"):
        IWAE(2).loss_and_grads(pair.model, pair.guide, x)


@pytest.mark.parametrize(
    ("estimator", "label"),
    [
        (IWAE(50), "IWAE(50)"),
        (IWAE(10, num_groups=5), "IWAE(10, num_groups=5)"),
        (PIWAE(10, 5), "PIWAE(10, num_groups=5)"),
        (CIWAE(0.5, 10), "CIWAE(0.5, 10)"),
        (Renyi(0.5, 10), "Renyi(0.5, 10)"),
        (STL(), "STL(1)"),
        (DReG(50), "DReG(50)"),
        (VIMCO(50), "VIMCO(50)"),
        (KLWeighted(DReG(5), 0.5), "KLWeighted(DReG(5), 0.5)"),
        (KLWeighted(Trace_ELBO(), lambda step: 1.0), "KLWeighted(Trace_ELBO(), schedule)"),
        (
            KLWeighted(STL(5), 1.0, free_bits=0.1, per="total"),
            "KLWeighted(STL(5), 1.0, free_bits=0.1, per='total')",
        ),
    ],
)
def test_labels(estimator, label):
    assert repr(estimator) == label


def test_labels_of_pyros_estimators_show_every_setting_but_the_plates():
    assert label(RenyiELBO(alpha=0.5, max_plate_nesting=1)) == "RenyiELBO(alpha=0.5)"
    assert label(Trace_ELBO(vectorize_particles=True, num_particles=3)) == (
        "Trace_ELBO(num_particles=3, vectorize_particles=True)"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IWAE(0), ValueError, "num_particles must be at least 1; got 0"),
        (lambda: IWAE(2.0), TypeError, "num_particles must be an integer; got 2.0"),
        (lambda: IWAE(True), TypeError, "num_particles must be an integer; got True"),
        (lambda: IWAE(2, 0), ValueError, "num_groups must be at least 1; got 0"),
        (lambda: PIWAE(2, -1), ValueError, "num_groups must be at least 1; got -1"),
        (lambda: STL(0), ValueError, "num_particles must be at least 1; got 0"),
        (lambda: DReG(0), ValueError, "num_particles must be at least 1; got 0"),
        (lambda: VIMCO(1), ValueError, "num_particles must be at least 2; got 1"),
        (lambda: IWAE(2, max_plate_nesting=0), ValueError, "max_plate_nesting must be at least 1; got 0"),
        (lambda: CIWAE(1.5, 2), ValueError, r"must lie in \[0, 1\]; got 1.5"),
        (lambda: CIWAE(math.nan, 2), ValueError, r"must lie in \[0, 1\]; got nan"),
        (lambda: Renyi(1.0, 2), ValueError, r"not 1 \(at 1 it is the ELBO: IWAE\(1\)\); got 1.0"),
        (lambda: Renyi(math.inf, 2), ValueError, "must be finite"),
        (lambda: KLWeighted(IWAE(2), -0.1), ValueError, "beta must be finite and at least 0; got -0.1"),
        (lambda: KLWeighted(IWAE(2), math.nan), ValueError, "beta must be finite and at least 0; got nan"),
        (lambda: KLWeighted(IWAE(2), "1"), TypeError, "beta must be a number; got '1'"),
        (lambda: KLWeighted(IWAE(2), 1.0, free_bits=-1.0), ValueError, "free_bits must be finite"),
        (lambda: KLWeighted(IWAE(2), 1.0, per="datum"), ValueError, 'per must be "dimension" or "total"'),
        (lambda: KLWeighted(TraceEnum_ELBO(), 1.0), TypeError, "takes one of this library's estimators"),
        (lambda: KLWeighted(JitTrace_ELBO(), 1.0), TypeError, "takes one of this library's estimators"),
        (lambda: KLWeighted(KLWeighted(IWAE(2), 1.0), 1.0), TypeError, "takes one of this library's"),
        (lambda: KLWeighted(IWAE, 1.0), TypeError, "takes one of this library's"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_negative_schedule_raises():
    x, _, pair = linear_gaussian(K=2, exact=False)
    with pytest.raises(ValueError, match="beta must be finite and at least 0; got -1"):
        KLWeighted(IWAE(2), lambda step: -1).differentiable_loss(pair.model, pair.guide, x)


@each_of_ours
def test_bad_pairs_raise_in_every_estimator(case):
    x, _, pair = linear_gaussian(K=2, exact=False)
    with pytest.raises(ValueError, match="guide has no site 'z', expected one of"):
        case.make().loss(pair.model, lambda x: None, x)
    with pytest.raises(ValueError, match="guide has no site 'z', expected one of"):
        case.make().differentiable_loss(pair.model, lambda x: None, x)
    with pytest.raises(ValueError, match="plate has size 0: the batch must hold at least one example"):
        case.make().loss_and_grads(pair.model, pair.guide, x[:0])
