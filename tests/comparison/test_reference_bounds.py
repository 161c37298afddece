"""Targets of estimators, reference estimators, labels and peak memory."""

import itertools
import math

import cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from pyro_vae import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, KLWeighted, Renyi, terms
from pyro_vae.comparison.experiment import peak_memory
from pyro_vae.comparison.reference_bounds import ReferenceEstimator, target
from pyro_vae.objectives.estimators import Estimator, family, label


@pytest.mark.parametrize(
    ("estimator", "bound", "guide"),
    [
        (Trace_ELBO(num_particles=3), "ELBO", "ELBO"),
        (TraceMeanField_ELBO(), "ELBO", "ELBO"),
        (TraceGraph_ELBO(), "ELBO", "ELBO"),
        (TraceEnum_ELBO(), "ELBO", "ELBO"),
        (STL(4), "ELBO", "ELBO"),
        (IWAE(1), "ELBO", "ELBO"),
        (IWAE(5, 3), "L_5", "L_5"),
        (PIWAE(5, 3), "L_15", "L_5"),
        (DReG(7), "L_7", "L_7"),
        (VIMCO(7), "L_7", "L_7"),
        (RenyiELBO(num_particles=4), "L_4", "L_4"),
        (RenyiELBO(alpha=0.5, num_particles=4), *2 * ["Rényi's of α = 0.5, S = 4"]),
        (Renyi(0.5, 4), *2 * ["Rényi's of α = 0.5, S = 4"]),
        (CIWAE(0.25, 6), *2 * ["0.25 ELBO + 0.75 L_6"]),
        (KLWeighted(DReG(7), 0.5), "L_7", "L_7, β = 0.5"),
        (
            KLWeighted(Trace_ELBO(), 2, free_bits=0.1, per="total"),
            "ELBO",
            "ELBO, β = 2, free bits 0.1 per total",
        ),
    ],
)
def test_targets(estimator, bound, guide):
    found = target(estimator)
    assert found.bound == bound
    assert found.gradients["guide"] == guide
    assert found.is_lower_bound


def test_not_every_bound_is_a_lower_bound():
    assert not target(Renyi(-1.0, 4)).is_lower_bound


class Own(Estimator):
    """The ELBO minus 1."""

    def bound(self, terms):
        return terms.log_weight.mean(0) - 1


def test_a_user_defined_estimator_targets_its_own_bound():
    found = target(Own(3))
    assert found.bound == "bound of Own(3)"
    assert not found.is_lower_bound


@pytest.mark.parametrize(
    ("estimator", "bound"),
    [(IWAE(3), cases.importance), (Renyi(0.4, 3), cases.powers), (CIWAE(0.3, 3), cases.mixed)],
)
def test_a_reference_estimate_averages_the_bound_over_groups(estimator, bound):
    x, _, pair = cases.linear_gaussian(2, exact=False)
    t = terms(pair.model, pair.guide, x, num_particles=12)
    groups = [bound(t.log_weight[group::4]) for group in range(4)]
    assert torch.allclose(ReferenceEstimator(estimator, num_groups=4).bound(t), sum(groups) / 4, rtol=1e-12)


def test_a_reference_gradient_is_unbiased_for_discrete_sites():
    logits = torch.tensor([0.4, -0.2], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-0.5, 0.2, 1.3], dtype=torch.float64)
    copies = 4000
    data = x.repeat(copies)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(2.0 * c - 1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=slope * x))

    def log_weight(c):
        log_q = dist.Bernoulli(logits=slope * x).log_prob(torch.tensor(float(c), dtype=torch.float64))
        log_prior = dist.Categorical(logits=logits).log_prob(torch.tensor(c))
        return log_q.exp(), log_prior + dist.Normal(2.0 * c - 1, 1.0).log_prob(x) - log_q

    # E log ½(w_1 + w_2) over the four pairs, exactly
    exact = 0.0
    for (q1, w1), (q2, w2) in itertools.product([log_weight(0), log_weight(1)], repeat=2):
        exact = exact + (q1 * q2 * (torch.logaddexp(w1, w2) - math.log(2))).mean()
    expected = flat(torch.autograd.grad(exact, [logits, slope]))
    samples = []
    for _ in range(20):
        loss = ReferenceEstimator(IWAE(2), num_groups=3).differentiable_loss(model, guide, data)
        samples.append(flat(torch.autograd.grad(-loss / len(data), [logits, slope])))
    cases.assert_within_standard_errors(torch.stack(samples), expected)
    assert abs(expected[-1]) > 0.05


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_labels_name_settings_that_differ_from_the_defaults():
    assert label(Trace_ELBO(num_particles=5, vectorize_particles=True)) == (
        "Trace_ELBO(num_particles=5, vectorize_particles=True)"
    )
    assert label(RenyiELBO(alpha=0.5)) == "RenyiELBO(alpha=0.5)"
    assert label(IWAE(5, num_groups=2)) == "IWAE(5, num_groups=2)"
    used = Trace_ELBO(num_particles=2)
    before = label(used)
    used.max_plate_nesting = 1  # as Pyro does at the first step
    assert label(used) == before


def test_families_omit_the_number_of_particles():
    assert family(IWAE(5, num_groups=2)) == "IWAE(S, num_groups=2)"
    assert family(CIWAE(0.5, 3)) == family(CIWAE(0.5, 9)) != family(CIWAE(0.1, 9))
    assert family(KLWeighted(DReG(3), 0.5)) == family(KLWeighted(DReG(9), 0.5)) == "KLWeighted(DReG(S), 0.5)"
    estimator = KLWeighted(DReG(3), 0.5)
    family(estimator)
    assert repr(estimator) == "KLWeighted(DReG(3), 0.5)"


def test_peak_memory_counts_simultaneous_storages():
    kept = torch.zeros(1000)

    def computation():
        a = kept + 1  # 4,000 bytes
        b = a * 2  # 8,000
        del a
        c = b.exp()  # 8,000 again
        c += kept  # in place
        c.view(10, 100)
        return (b + c).sum()  # 12,000, and a number

    assert peak_memory(computation) == 12_004


def test_peak_memory_includes_the_backward_pass():
    weight = torch.zeros(500, requires_grad=True)
    forward = peak_memory(lambda: (weight.exp().exp()).sum())
    both = peak_memory(lambda: torch.autograd.grad((weight.exp().exp()).sum(), weight))
    assert forward >= 4000
    assert both > forward
