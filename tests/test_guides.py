import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from parts import EVENT, GUIDES, K, N, S, plane
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.closed_form import LinearGaussian
from pyro_vae.objectives.estimators import STL
from pyro_vae.objectives.log_terms import terms
from pyro_vae.utils.serialization import rebuild, spec

every_guide = pytest.mark.parametrize("name", GUIDES)


def data(*batch):
    return torch.randn(*batch, *EVENT, dtype=torch.float64)


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def make_vae(guide, prior=None, likelihood=None):
    likelihood = likelihood or likelihoods.Normal(K, EVENT, hidden_features=(6,), variance=0.3)
    return pv.VAE(prior=prior or priors.StandardNormal(K), likelihood=likelihood, guide=guide).double()


# Properties of every guide


@every_guide
def test_shapes(name):
    guide = GUIDES[name](K=4).double()
    q = guide(data(N))
    assert (q.batch_shape, q.event_shape) == ((N,), (4,))
    assert q.rsample((S,)).shape == (S, N, 4)
    assert q.has_rsample
    x = data(S, N)
    z = torch.randn(S, N, 4).double()
    torch.testing.assert_close(guide(x).log_prob(z)[2], guide(x[2]).log_prob(z[2]), rtol=1e-10, atol=1e-10)
    assert GUIDES[name](K=1).double()(data(N)).rsample().shape == (N, 1)
    assert GUIDES[name]()(data(N).float()).rsample().dtype == torch.float32


@every_guide
def test_the_density_is_normalised_and_that_of_the_draws(name):
    q = GUIDES[name]().double()(data(N))
    grid, area = plane()
    density = q.log_prob(grid.unsqueeze(1)).detach().exp() * area  # (points, N)
    kinks = 2e-3 if "Flow" in name else 1e-10  # piecewise smooth functions of z cost the rule its accuracy
    torch.testing.assert_close(density.sum(0), torch.ones(N).double(), rtol=0, atol=kinks)

    def features(z):
        a, b = z[..., 0], z[..., 1]
        return torch.stack([a, b, a * b, a**2, b**2, (a + 2 * b).cos(), (a * b).sin()], -1)

    exact = (density.unsqueeze(-1) * features(grid).unsqueeze(1)).sum(0)
    draws = features(q.sample((20_000,)))
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 5 * error + kinks).all()


@every_guide
def test_gradients_through_the_draws_agree_with_the_score_function(name):
    """∇ E_q[f(z)] = E_q[∇ f(z(φ))] = E_q[f(z) ∇ log q(z)], which needs nothing but the density."""
    guide, x = GUIDES[name]().double(), data(1)

    def function(z):
        return (z[..., 0] * z[..., 1]).sin() + (z[..., 0] - 1) ** 2 + z.cos().sum(-1)

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(guide.parameters()))])

    def through_draws():
        return gradient(function(guide(x).rsample((500,))).mean())

    def through_density():
        q = guide(x)
        z = q.sample((2000,))
        values = function(z)
        return gradient(((values - values.mean()) * q.log_prob(z)).mean()) * 2000 / 1999

    found, expected = (torch.stack([draw() for _ in range(40)]) for draw in (through_draws, through_density))
    error = ((found.var(0) + expected.var(0)) / 40).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() <= 5 * error + 1e-12).all()
    assert error.norm() < 0.1 * expected.mean(0).norm()  # otherwise the bound above is empty


@every_guide
def test_vectorised_particles_are_independent_draws_of_the_same_density(name):
    vae, x = make_vae(GUIDES[name]()), data(N)
    run = terms(vae.model, vae.guide, x, num_particles=S)
    z = run.sites.draws["z"]
    assert z.shape == (S, N, K)
    assert len(torch.unique(z)) == S * N * K
    torch.testing.assert_close(run.log_guide, vae.encode(x).log_prob(z.clone()), rtol=1e-8, atol=1e-8)


@every_guide
def test_it_is_rebuilt_from_its_description(name):
    guide, x = GUIDES[name](), data(N).float()
    other = rebuild(spec(guide))
    other.load_state_dict(guide.state_dict())
    z = torch.randn(N, K)
    assert torch.equal(guide(x).log_prob(z), other(x).log_prob(z))


@every_guide
def test_it_trains_under_upstream_svi(name):
    vae, x = make_vae(GUIDES[name]()), data(N)
    old = copy.deepcopy(vae)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(60):
        svi.step(x)
    loss = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss
    assert loss(vae.model, vae.guide, x) < loss(old.model, old.guide, x)
    moved = [(p != q).any() for p, q in zip(vae.parameters(), old.parameters(), strict=True)]
    assert all(moved)


def test_every_guide_of_the_package_is_in_the_table():
    listed = {type(make()) for make in GUIDES.values()}
    assert listed == {getattr(guides, name) for name in guides.__all__} - {guides.Guide, guides.SemiAmortised}


# Each guide


def test_full_covariance_is_the_cholesky_factor_of_the_outputs():
    guide = guides.FullCovarianceNormal(EVENT, 3)
    loc, raw_diagonal, below = guide.outputs(data(N).float())
    L = torch.zeros(N, 3, 3)
    L[:, [1, 2, 2], [0, 0, 1]] = below
    L += torch.diag_embed(pv.networks.positive(raw_diagonal))
    q = guide.distribution(loc, raw_diagonal, below)
    assert torch.equal(q.loc, loc)
    torch.testing.assert_close(q.covariance_matrix, L @ L.mT)


def test_low_rank_is_the_diagonal_plus_the_factor():
    guide = guides.LowRankNormal(EVENT, 4, rank=2)
    loc, raw_scale, factor = guide.outputs(data(N).float())
    V = factor.reshape(N, 4, 2)
    expected = V @ V.mT + pv.networks.positive(raw_scale).square().diag_embed()
    torch.testing.assert_close(guide.distribution(loc, raw_scale, factor).covariance_matrix, expected)


def test_a_mixture_weighs_its_components():
    guide = guides.Mixture(EVENT, K, num_components=3).double()
    x, z = data(N), torch.randn(N, K).double()
    logits, loc, raw_scale = guide.outputs(x)
    expected = torch.zeros(N).double()
    for c, weight in enumerate(logits.softmax(-1).unbind(-1)):
        part = slice(c * K, (c + 1) * K)
        component = dist.Normal(loc[:, part], pv.networks.positive(raw_scale[:, part])).to_event(1)
        expected = expected + weight * component.log_prob(z).exp()
    torch.testing.assert_close(guide(x).log_prob(z), expected.log(), rtol=1e-10, atol=1e-10)


def test_a_flow_is_shifted_and_scaled():
    guide = guides.Flow(EVENT, K, flow="iaf").double()
    loc, raw_scale, context = guide.outputs(data(N))
    torch.manual_seed(0)
    z = guide.distribution(loc, raw_scale, context).rsample()
    torch.manual_seed(0)
    standard = guide.flow(context).rsample()
    torch.testing.assert_close(z, loc + pv.networks.positive(raw_scale) * standard, rtol=1e-12, atol=1e-12)


# Where the posterior is normal


def linear_gaussian(D=4, K=2, c=0.5):
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(D, K, generator=generator, dtype=torch.float64) + 0.7  # columns that are not orthogonal
    return LinearGaussian(W, torch.randn(D, generator=generator, dtype=torch.float64), c)


def linear_vae(model, make):
    """A VAE whose p(z) p(x|z) is the model and stays so, and whose guide is linear in x."""
    D, K = model.W.shape
    size = sum(make.sizes(K))
    likelihood = likelihoods.Normal(K, (D,), network=nn.Linear(K, D), variance=model.noise_variance.item())
    vae = make_vae(
        make((D,), K, network=nn.Linear(D, size)), prior=priors.StandardNormal(K), likelihood=likelihood
    )
    with torch.no_grad():
        likelihood.network.weight.copy_(model.W)
        likelihood.network.bias.copy_(model.b)
        vae.posterior.network.weight.mul_(0.1)
    likelihood.requires_grad_(False)
    return vae


def trained(vae, x, steps, loss=None, lr=0.05):
    optimizer = torch.optim.Adam(vae.posterior.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    svi = pv.SVI(vae.model, vae.guide, optimizer, loss or STL())
    for _ in range(steps):
        svi.step(x)
        schedule.step()
    return vae


def mean_gap(model, vae, x):
    q = vae.encode(x)
    covariance = q.variance.diag_embed() if hasattr(q, "base_dist") else q.covariance_matrix
    return model.gap(x, q.mean, covariance).mean().item()


@pytest.mark.parametrize("make", [guides.FullCovarianceNormal, guides.LowRankNormal])
def test_a_guide_with_correlations_closes_the_gap(make):
    model = linear_gaussian()
    x = model.sample(16)
    assert mean_gap(model, trained(linear_vae(model, make), x, 900), x) < 1e-3


def test_a_diagonal_guide_leaves_the_predicted_gap():
    model = linear_gaussian()
    x = model.sample(16)
    assert model.diagonal_gap() > 0.1
    found = mean_gap(model, trained(linear_vae(model, guides.DiagonalNormal), x, 900, STL(4)), x)
    assert found == pytest.approx(model.diagonal_gap().item(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "closes"), [(guides.FullCovarianceNormal, True), (guides.DiagonalNormal, False)]
)
def test_gaps_in_more_dimensions(make, closes):
    model = linear_gaussian(D=10, K=5)
    x = model.sample(200)
    found = mean_gap(model, trained(linear_vae(model, make), x, 6000, STL(4), lr=0.02), x)
    if closes:
        assert found < 1e-3
    else:
        assert found == pytest.approx(model.diagonal_gap().item(), rel=0.02)


# Where the posterior is a banana, and log p(x) known by quadrature


class Parabola(nn.Module):
    def forward(self, z):
        return z[..., 1:] + z[..., :1] ** 2


BANANA = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)


def banana_gaps(guide, steps):
    likelihood = likelihoods.Normal(2, (1,), network=Parabola(), variance=0.05)
    vae = trained(
        make_vae(guide, likelihood=likelihood), BANANA, steps, Trace_ELBO(16, 1, vectorize_particles=True)
    )
    grid, area = plane(401, 8.0)
    with torch.no_grad():
        grid = grid.unsqueeze(1).expand(-1, len(BANANA), -1)
        log_joint = vae.log_joint(BANANA, grid)
        log_guide = vae.encode(BANANA).log_prob(grid)
        log_evidence = log_joint.logsumexp(0) + math.log(area)
        return log_evidence + (log_guide.exp() * (log_guide - log_joint)).sum(0) * area


def test_a_flow_goes_along_the_banana():
    """By a fixed seed, of which the gap is 0.11; other starts take more steps to bend as far."""
    sizes = {"hidden_features": (16,), "num_context": 4, "flow_features": (32,), "num_transforms": 1}
    torch.manual_seed(0)
    flow = guides.Flow((1,), 2, flow="maf", **sizes)
    assert banana_gaps(flow, 300).max() < 0.2
    assert (banana_gaps(guides.DiagonalNormal((1,), 2, hidden_features=(16,)), 300) > 0.4).all()


@pytest.mark.slow
def test_a_flow_closes_what_the_diagonal_leaves_of_the_banana():
    diagonal = banana_gaps(guides.DiagonalNormal((1,), 2, hidden_features=(16,)), 2000)
    flow = banana_gaps(guides.Flow((1,), 2, flow="nsf", hidden_features=(16,), num_context=4), 3000)
    assert (diagonal > 0.4).all()
    assert (flow < 0.02).all()


# Semi-amortised


def test_refining_closes_the_amortisation_gap():
    """An untrained guide, refined for long, reaches the best of its family for each example."""
    model = linear_gaussian()
    x = model.sample(N)
    for make, left in [
        (guides.FullCovarianceNormal, 0.0),
        (guides.DiagonalNormal, model.diagonal_gap().item()),
    ]:
        vae = linear_vae(model, make)
        refined = vae.with_guide(
            guides.SemiAmortised(vae.posterior, num_steps=300, step_size=0.1, num_particles=8)
        )
        with torch.no_grad():
            gap = mean_gap(model, refined, x)
        assert mean_gap(model, vae, x) > 1
        assert gap == pytest.approx(left, abs=0.01)


def test_steps_on_a_constant_gradient_are_the_step_sizes_and_shrink_to_zero():
    """Adam, unbiased from its first step: mean and root mean square of one number are that number."""
    slope, guide = torch.tensor([2.0, -0.3]).double(), GUIDES["DiagonalNormal"]().double()
    x = data(N)
    refined = guides.SemiAmortised(guide, num_steps=4, step_size=0.05)
    moved = refined(x, lambda x, z: (z * slope).sum(-1)).mean - guide(x).mean
    steps = 0.05 * (1 + 3 / 4 + 2 / 4 + 1 / 4)
    torch.testing.assert_close(moved, (steps * slope.sign()).expand(N, K), rtol=1e-10, atol=0)


def test_refining_is_independent_for_each_example():
    model = linear_gaussian()
    x = model.sample(N)
    vae = linear_vae(model, guides.FullCovarianceNormal)
    refined = vae.with_guide(guides.SemiAmortised(vae.posterior, num_steps=4))

    def at(batch):
        torch.manual_seed(0)
        return refined.encode(batch).mean[0]

    changed = torch.cat([x[:1], x[1:] + 1])
    torch.testing.assert_close(at(x), at(changed), rtol=1e-12, atol=1e-12)
    assert (at(x) - vae.encode(x).mean[0]).abs().min() > 1e-3


def test_gradients_pass_through_the_steps():
    """End to end, against central differences, in parameters of the guide and of the likelihood."""
    model = linear_gaussian()
    x = model.sample(N)
    vae = linear_vae(model, guides.FullCovarianceNormal)
    vae.likelihood.requires_grad_(True)
    refined = vae.with_guide(guides.SemiAmortised(vae.posterior, num_steps=3, num_particles=2))

    def loss():
        torch.manual_seed(0)
        return Trace_ELBO().differentiable_loss(refined.model, refined.guide, x)

    for parameter in (vae.posterior.network.weight, vae.likelihood.network.weight):
        direction = torch.randn_like(parameter)
        (gradient,) = torch.autograd.grad(loss(), parameter)
        with torch.no_grad():
            above, below = (loss() for _ in map(parameter.add_, (1e-5 * direction, -2e-5 * direction)))
            parameter.add_(1e-5 * direction)
        assert (gradient * direction).sum().item() == pytest.approx((above - below).item() / 2e-5, rel=1e-5)


def test_without_end_to_end_the_steps_count_as_a_constant():
    model = linear_gaussian()
    x = model.sample(N)
    vae = linear_vae(model, guides.DiagonalNormal)
    refined = vae.with_guide(guides.SemiAmortised(vae.posterior, num_steps=3, end_to_end=False))
    q = refined.encode(x)
    (gradient,) = torch.autograd.grad(q.mean.sum(), vae.posterior.network.bias)
    assert torch.equal(gradient, torch.tensor([N, N, 0, 0]).double())  # that of the starting point


@pytest.mark.parametrize("end_to_end", [True, False])
@pytest.mark.parametrize("name", [n for n in GUIDES if n != "Mixture"])
def test_every_guide_can_be_refined_and_trained_so(name, end_to_end):
    vae, x = make_vae(guides.SemiAmortised(GUIDES[name](), num_steps=2, end_to_end=end_to_end)), data(N)
    old = parameters(vae.posterior)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    assert math.isfinite(svi.step(x))
    assert not torch.equal(parameters(vae.posterior), old)
    with torch.no_grad():
        assert terms(vae.model, vae.guide, x, num_particles=S).log_weight.shape == (S, N)
    other = rebuild(spec(vae))
    other.double().load_state_dict(vae.state_dict())


def test_a_mixture_can_be_refined_but_not_trained_through():
    vae, x = make_vae(guides.SemiAmortised(GUIDES["Mixture"](), num_steps=2, end_to_end=False)), data(N)
    Trace_ELBO().loss_and_grads(vae.model, vae.guide, x)
    vae = make_vae(guides.SemiAmortised(GUIDES["Mixture"](), num_steps=2))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        Trace_ELBO().loss_and_grads(vae.model, vae.guide, x)


def test_a_frozen_guide_can_be_refined():
    vae, x = make_vae(guides.SemiAmortised(GUIDES["DiagonalNormal"](), num_steps=2)), data(N)
    vae.posterior.requires_grad_(False)
    assert math.isfinite(Trace_ELBO().loss_and_grads(vae.model, vae.guide, x))


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: guides.LowRankNormal(EVENT, 3, rank=0), ValueError, "rank must be at least 1; got 0"),
        (
            lambda: guides.Mixture(EVENT, 3, num_components=2.0),
            TypeError,
            "num_components .*an integer; got 2.0",
        ),
        (lambda: guides.Flow(EVENT, 3, num_context=0), ValueError, "num_context must be at least 1; got 0"),
        (lambda: guides.Flow(EVENT, 3, flow="planar"), ValueError, "flow must be one of maf, iaf, nsf"),
        (lambda: guides.FullCovarianceNormal(EVENT, 0), ValueError, "latent_dim must be at least 1; got 0"),
        (lambda: guides.DiagonalNormal(EVENT, 3, rank=2), TypeError, "unexpected keyword argument 'rank'"),
        (lambda: guides.LowRankNormal(EVENT, 3, widths=(4,)), TypeError, "unexpected keyword .*'widths'"),
        (
            lambda: guides.Mixture(EVENT, 3, num_component=4),
            TypeError,
            "unexpected keyword .*'num_component'",
        ),
        (lambda: guides.Flow(EVENT, 3, activations="elu"), TypeError, "unexpected keyword .*'activations'"),
        (lambda: guides.SemiAmortised(nn.Linear(3, 2)), TypeError, "refines a guide .*; got Linear"),
        (
            lambda: guides.SemiAmortised(GUIDES["DiagonalNormal"](), num_steps=0),
            ValueError,
            "num_steps must be at least 1; got 0",
        ),
        (
            lambda: guides.SemiAmortised(GUIDES["DiagonalNormal"](), step_size=-0.5),
            ValueError,
            "step_size must be positive; got -0.5",
        ),
    ],
)
def test_wrong_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (guides.DiagonalNormal, r"\(5, 6\) \(3 \+ 3 "),
        (guides.FullCovarianceNormal, r"\(5, 9\) \(3 \+ 3 \+ 3 "),
        (guides.LowRankNormal, r"\(5, 12\) \(3 \+ 3 \+ 6 "),
        (guides.Mixture, r"\(5, 28\) \(4 \+ 12 \+ 12 "),
        (guides.Flow, r"\(5, 38\) \(3 \+ 3 \+ 32 "),
    ],
)
def test_a_network_with_another_number_of_outputs_raises(make, numbers):
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 7))
    with pytest.raises(ValueError, match=f"must return shape {numbers}numbers per example, .*got \\(5, 7\\)"):
        make(EVENT, 3, network=network)(torch.zeros(5, *EVENT))
