import copy
import subprocess
import sys

import pytest
import torch
from parts import plane
from torch.distributions import Distribution

from pyro_vae.distributions import FLOWS, FlowDistribution, build_flow

S, N, K, CONTEXT = 7, 5, 3, 2


def conditional(flow):
    built = build_flow(flow, K, CONTEXT, num_transforms=2, hidden_features=(6,)).double()
    return FlowDistribution(built(torch.randn(N, CONTEXT).double()))


@pytest.mark.parametrize("flow", FLOWS)
def test_the_density_is_the_change_of_variables_of_the_noise(flow):
    q = conditional(flow)
    torch.manual_seed(1)
    z = q.rsample()
    torch.manual_seed(1)
    noise = torch.randn(N, K, dtype=torch.float64)
    to_z = q.flow.transform.inv
    torch.testing.assert_close(z, to_z(noise), rtol=0, atol=0)
    jacobian = torch.autograd.functional.jacobian(lambda u: to_z(u).sum(0), noise)  # (K, N, K)
    log_density = (
        torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) - jacobian.transpose(0, 1).slogdet()[1]
    )
    torch.testing.assert_close(q.log_prob(z), log_density, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_kept_density_of_a_draw_is_the_computed_one(flow):
    q = conditional(flow).expand((S, N))
    z = q.rsample()
    kept, computed = q.log_prob(z), q.log_prob(z.clone())
    assert kept.shape == (S, N)
    torch.testing.assert_close(kept, computed, rtol=1e-9, atol=1e-9)


def test_a_density_kept_without_gradient_is_computed_where_one_is_wanted():
    q = conditional("maf")
    z = q.sample()
    with torch.no_grad():
        assert q.log_prob(z) is q.log_prob(z)
    assert q.log_prob(z).requires_grad


@pytest.mark.parametrize(
    "scale", [0.7, torch.tensor(0.7), torch.tensor([0.7]).double(), torch.tensor([0.7, 1.2]).double()]
)
def test_a_scaled_density_integrates_to_one_whatever_the_shape_of_the_scale(scale):
    built = build_flow("maf", 2, num_transforms=2, hidden_features=()).double()  # smooth: no ReLU
    q = FlowDistribution(built(), 0.3, scale)
    z, area = plane()
    with torch.no_grad():
        assert (q.log_prob(z).exp().sum() * area).item() == pytest.approx(1, abs=1e-8)
        draws = q.sample((S,))
        torch.testing.assert_close(q.log_prob(draws), q.log_prob(draws.clone()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
def test_particles_are_independent(flow):
    z = conditional(flow).expand((S, N)).rsample()
    assert z.shape == (S, N, K)
    assert len(torch.unique(z)) == S * N * K


def test_values_outside_the_support_raise_where_validation_is_on():
    with pytest.raises(ValueError, match="within the support"):
        conditional("maf").log_prob(torch.full((N, K), float("nan")).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flow": "glow"}, "flow must be one of maf, iaf, nsf; got 'glow'"),
        ({"num_transforms": 0}, "num_transforms must be at least 1; got 0"),
        ({"hidden_features": (4, 0)}, r"flow_features\[1\] must be at least 1; got 0"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_flow(
            **{"flow": "maf", "features": K, "num_transforms": 2, "hidden_features": (4,), **arguments}
        )


def test_zuko_is_imported_late_and_leaves_validation_as_it_was():
    """In copies of a process, as the first flow alone imports it."""
    code = """
import os, torch, sys, pyro_vae as pv
assert "zuko" not in sys.modules
for validate in (True, False):
    if os.fork() == 0:
        torch.distributions.Distribution.set_default_validate_args(validate)
        pv.priors.Flow(2)
        assert "zuko" in sys.modules
        assert torch.distributions.Distribution._validate_args is validate
        sys.exit()
    assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_validation_is_on_here():
    assert Distribution._validate_args


@pytest.mark.parametrize(
    ("flow", "to_draw", "for_density_of_draw", "for_density"),
    [("iaf", 1, 0, K), ("maf", K + 1, 0, 1), ("nsf", K + 1, 0, 1)],
)
def test_passes_of_the_networks(flow, to_draw, for_density_of_draw, for_density):
    """Costs stated in the docstrings: passes of one transform's network, its density included."""
    built = build_flow(flow, K, num_transforms=1, hidden_features=(6,))
    count = []
    built.transform.apply(
        lambda module: (
            hasattr(module, "hyper") and module.hyper.register_forward_hook(lambda *_: count.append(1))
        )
    )

    def passes(function, *arguments):
        count.clear()
        result = function(*arguments)
        return result, len(count)

    q = FlowDistribution(built())
    z, drawing = passes(q.rsample, (N,))
    _, density_of_draw = passes(q.log_prob, z)
    _, density = passes(q.log_prob, z.clone())
    assert (drawing, density_of_draw) == (to_draw, for_density_of_draw)
    assert density - for_density in (0, 1)  # after inverting, the Jacobian takes one more pass


@pytest.mark.parametrize("context_size", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 4.0, 30.0, 1e3])
@pytest.mark.parametrize(("kind", "tolerance"), [("maf", 1e-5), ("nsf", 1e-4)])  # knots of splines lie close
def test_densities_hold_their_digits_in_float32(kind, tolerance, spread, context_size):
    torch.manual_seed(0)
    flow = build_flow(kind, 3, 2, num_transforms=3, hidden_features=(16, 16))
    context, x = context_size * torch.randn(40, 2), spread * torch.randn(40, 3)
    with torch.no_grad():
        found = FlowDistribution(flow(context)).log_prob(x)
        wide = FlowDistribution(copy.deepcopy(flow).double()(context.double())).log_prob(x.double())
    error = (found - wide) / wide.abs().clamp(min=1)
    assert error.abs().max() < tolerance
