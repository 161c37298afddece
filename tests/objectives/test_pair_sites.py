"""Positions of particles, examples and other plates in the batch shapes of a pair's sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import terms
from pyro_vae.objectives.sites import same_masks

S, N, P, K = 5, 3, 4, 2  # particles, examples, parts of an example, event


def model(x):
    with pyro.plate("data", N, dim=-2):
        pyro.sample("whole", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("parts", P, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x):
    with pyro.plate("data", N, dim=-2):
        pyro.sample("whole", dist.Normal(x.mean(-1)[:, None, None].expand(N, 1, K), 1.0).to_event(1))
        with pyro.plate("parts", P, dim=-1):
            pyro.sample("z", dist.Normal(x[..., None].expand(N, P, K), 0.5).to_event(1))


@pytest.fixture
def sites():
    return terms(model, guide, torch.randn(N, P), num_particles=S, max_plate_nesting=2).sites


def test_a_weight_multiplies_the_values_of_its_particle_and_example(sites):
    weight = torch.arange(1.0, 1 + S * N).reshape(S, N)
    for name, parts in (("z", P), ("whole", 1)):
        values = sites.guide[name]["value"]
        assert values.shape == (S, N, parts, K)
        expected = torch.stack(
            [torch.stack([weight[s, n] * values[s, n] for n in range(N)]) for s in range(S)]
        )
        assert torch.equal(sites.along(weight, sites.guide[name]) * values, expected)


def test_missing_batch_dimensions_are_added_on_the_left(sites):
    assert sites.in_full(torch.zeros(K), 1).shape == (1, 1, 1, K)
    assert sites.in_full(torch.zeros(N, P, K), 1).shape == (1, N, P, K)
    assert sites.in_full(torch.zeros(N, P)).shape == (1, N, P)
    assert sites.in_full(torch.zeros(S, N, P, K), 1).shape == (S, N, P, K)


def test_other_plates_are_summed_over(sites):
    log_prob = sites.guide["z"]["log_prob"]
    assert log_prob.shape == (S, N, P)
    total = sites.sum([log_prob, sites.guide["whole"]["log_prob"]])
    assert torch.equal(total, log_prob.sum(-1) + sites.guide["whole"]["log_prob"].squeeze(-1))


def test_masks_that_are_one_tensor_are_the_same_without_a_look_at_their_values():
    mask = torch.ones(4, dtype=torch.bool, device="meta")  # which has none

    one, other = ({"mask": mask, "fn": dist.Normal(torch.zeros(4, 3), 1.0).to_event(1)} for _ in range(2))
    assert same_masks(one, other)
