import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MixtureSameFamily

from pyro_vae.distributions import NormalMixture, _conditional_distribution

S, N, C, K = 7, 5, 3, 4


def parameters(*batch):
    logits, loc = torch.randn(*batch, C).double(), torch.randn(*batch, C, K).double()
    return logits, loc, torch.rand(*batch, C, K).double() + 0.3


def mixture(logits, loc, scale):
    return NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


def test_the_density_equals_torch():
    logits, loc, scale = parameters(N)
    z = torch.randn(S, N, K).double()
    theirs = MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1),
    )
    assert torch.equal(mixture(logits, loc, scale).log_prob(z), theirs.log_prob(z))


def test_the_jacobian_of_the_distribution_functions():
    logits, loc, scale = parameters()
    z = torch.randn(K).double()
    _, du_dz = _conditional_distribution(z, logits, loc, scale)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: _conditional_distribution(z, logits, loc, scale)[0], z
    )
    torch.testing.assert_close(du_dz, jacobian, rtol=1e-10, atol=1e-12)
    # u is uniform: the density of z is the determinant
    log_density = mixture(logits, loc, scale).log_prob(z)
    torch.testing.assert_close(du_dz.diagonal().log().sum(), log_density, rtol=1e-10, atol=1e-10)


def test_draws_keep_their_distribution_function_when_parameters_move():
    """z(φ) extrapolated by its gradient to φ + δ has the same u as at φ, up to δ²."""
    phi = parameters(N)
    phi = [p.requires_grad_() for p in phi]
    z = mixture(*phi).rsample((S,))
    direction = [torch.randn_like(p) for p in phi]
    u = _conditional_distribution(z.detach(), *phi)[0]

    def error(step):
        moved = [p + step * d for p, d in zip(phi, direction, strict=True)]
        z_moved = z + step * derivative
        return (_conditional_distribution(z_moved, *moved)[0] - u).abs().max().item()

    # the derivative of z in this direction: J direction, from the rows of J
    derivative = torch.zeros_like(z)
    for index in range(S * N * K):
        row = torch.autograd.grad(z.flatten()[index], phi, retain_graph=True)
        derivative.flatten()[index] = sum((r * d).sum() for r, d in zip(row, direction, strict=True))
    assert error(1e-4) < 0.02 * error(1e-3)
    assert error(1e-4) < 1e-3


def test_one_component_is_the_plain_normal():
    loc, scale = torch.randn(N, 1, K, requires_grad=True), (torch.rand(N, 1, K) + 0.3).requires_grad_()
    logits = torch.zeros(N, 1, requires_grad=True)
    z = mixture(logits, loc, scale).rsample((S,))
    weight = torch.randn_like(z)
    found = torch.autograd.grad((weight * z).sum(), (logits, loc, scale))
    noise = (z.detach() - loc.squeeze(1)) / scale.squeeze(1)
    assert not found[0].any()
    torch.testing.assert_close(found[1].squeeze(1), weight.sum(0))
    torch.testing.assert_close(found[2].squeeze(1), (weight * noise).sum(0))


def test_moments_and_their_gradients():
    logits, loc, scale = (p.requires_grad_() for p in parameters())
    weight = logits.softmax(0).unsqueeze(-1)
    mean = (weight * loc).sum(0)
    second = ((weight * loc).mT @ loc) + (weight * scale**2).sum(0).diag()
    A, b = torch.randn(K, K).double(), torch.randn(K).double()
    exact = torch.cat(
        [g.flatten() for g in torch.autograd.grad((A * second).sum() + b @ mean, (logits, loc, scale))]
    )
    draws = []
    for _ in range(40):
        z = mixture(logits, loc, scale).rsample((500,))
        estimate = ((z @ A) * z).sum(-1).mean() + (z @ b).mean()
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(estimate, (logits, loc, scale))]))
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 5 * error).all()
    assert error.max() < 0.1 * exact.abs().max()  # otherwise the bound above is empty


def test_many_dimensions_and_coinciding_components_in_single_precision():
    loc = torch.zeros(N, C, 200, requires_grad=True)
    scale = torch.full((N, C, 200), 0.01, requires_grad=True)
    logits = torch.zeros(N, C, requires_grad=True)
    z = mixture(logits, loc, scale).rsample()
    gradients = torch.autograd.grad(z.sum(), (logits, loc, scale))
    assert all(torch.isfinite(g).all() for g in gradients)
    torch.testing.assert_close(gradients[1].sum(1), torch.ones(N, 200), rtol=0, atol=1e-3)


def test_a_second_derivative_raises():
    logits, loc, scale = (p.requires_grad_() for p in parameters())
    (gradient,) = torch.autograd.grad(
        (mixture(logits, loc, scale).rsample() ** 3).sum(), loc, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_other_components_raise():
    q = NormalMixture(
        dist.Categorical(logits=torch.zeros(C)), dist.Laplace(torch.zeros(C, K), 1.0).to_event(1)
    )
    with pytest.raises(TypeError, match=r"Normal\(loc, scale\).to_event\(1\); got"):
        q.rsample()
