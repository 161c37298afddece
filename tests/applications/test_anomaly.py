"""Anomaly scores: exact values, independence of the batch, signs, p-values, invalid input."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from solved import D, data, linear_gaussian, within
from torch import nn

import pyro_vae as pv
from pyro_vae.applications import AnomalyDetector, anomaly_scores, batch_typicality
from pyro_vae.applications.anomaly import conformal_threshold
from pyro_vae.applications.density import GaussianMixtureDensity
from pyro_vae.applications.scores import SCORES
from pyro_vae.utils.isolation import derived_seed

EVENT, K = (1, 6, 5), 3
SMALL = {"hidden_features": (7,)}
GUIDES = {
    "diagonal": lambda: pv.guides.DiagonalNormal(EVENT, K, **SMALL),
    "full covariance": lambda: pv.guides.FullCovarianceNormal(EVENT, K, **SMALL),
    "low rank": lambda: pv.guides.LowRankNormal(EVENT, K, rank=2, **SMALL),
    "mixture": lambda: pv.guides.Mixture(EVENT, K, num_components=2, **SMALL),
    "flow": lambda: pv.guides.Flow(EVENT, K, flow="nsf", num_context=4, num_transforms=2, **SMALL),
    "refined": lambda: pv.guides.SemiAmortised(pv.guides.DiagonalNormal(EVENT, K, **SMALL), num_steps=2),
}


def grey(count, seed=0):
    u = torch.rand(count, *EVENT, generator=torch.Generator().manual_seed(seed))
    return (u * 255).round() / 255


def vae_of(guide="diagonal"):
    torch.manual_seed(3)
    likelihood = pv.likelihoods.DiscretizedLogistic(K, EVENT, **SMALL)
    return pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=likelihood, guide=GUIDES[guide]())


def auroc(normal, odd):
    """Probability that a normal example scores above an odd one."""
    ranks = rankdata(np.concatenate([normal, odd]))[: len(normal)]
    return (ranks.sum() - len(normal) * (len(normal) + 1) / 2) / (len(normal) * len(odd))


# A score is a function of the example and the seed


@pytest.mark.parametrize("guide", GUIDES)
def test_scores_depend_on_the_example_alone(guide):
    vae, x, reference = vae_of(guide).double(), grey(11).double(), grey(60, seed=1).double()
    names = [name for name in SCORES if name != "regret"]
    if guide in ("diagonal", "full covariance", "low rank"):
        names.append("regret")

    def scores(part):
        found = anomaly_scores(vae, part, reference=reference, scores=names, num_particles=6, seed=4)
        return {name: torch.from_numpy(found[name].values) for name in names}

    whole, reverse, seven = scores(x), scores(x.flip(0)), scores(x[2:9])
    alone = scores(x[4:5])
    for name in names:
        close = {"rtol": 1e-7 if name == "regret" else 1e-9, "atol": 1e-7}
        torch.testing.assert_close(reverse[name].flip(0), whole[name], **close)
        torch.testing.assert_close(seven[name], whole[name][2:9], **close)
        torch.testing.assert_close(alone[name], whole[name][4:5], **close)
        assert len(whole[name].unique()) > 5


def test_scores_depend_on_the_seed_and_leave_generators_alone():
    vae, x = vae_of(), grey(5)
    state = torch.get_rng_state()
    first, again, other = (
        AnomalyDetector(vae, score="elbo", num_particles=4, seed=seed).score_samples(x) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_and_batch_normalisation_are_in_evaluation_mode():
    layers = [nn.Flatten(), nn.Linear(30, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2 * K)]
    guide = pv.guides.DiagonalNormal(EVENT, K, network=nn.Sequential(*layers))
    vae = vae_of().with_guide(guide).train()
    scores = AnomalyDetector(vae, score="log_evidence", num_particles=5).score_samples(grey(7))
    alone = AnomalyDetector(vae, score="log_evidence", num_particles=5).score_samples(grey(7)[3:4])
    torch.testing.assert_close(scores[3:4], alone, rtol=1e-6, atol=1e-5)
    assert vae.training
    assert guide.network[2].num_batches_tracked == 0


def test_draws_of_a_guide_have_its_distribution():
    from pyro_vae.applications.shared_noise import draw_with_shared_noise

    for name in GUIDES:
        vae, x = vae_of(name).double(), grey(3).double()
        _, z, _ = draw_with_shared_noise(vae, x, 4000, seed=0)
        assert z.shape == (4000, 3, K)
        torch.manual_seed(0)
        reference = vae.encode(x.repeat(600, 1, 1, 1)).sample().unflatten(0, (600, 3))
        within(z.mean(0), reference.mean(0), (z.var(0) / 4000 + reference.var(0) / 600).sqrt())
        torch.testing.assert_close(z.std(0), reference.std(0), rtol=0.2, atol=0.0)


# Exact values


def test_scores_are_exact_with_the_exact_posterior():
    exact, vae = linear_gaussian()
    x = data(exact, 9)
    found = anomaly_scores(vae, x, num_particles=3)
    np.testing.assert_allclose(found.log_evidence, exact.log_evidence(x), rtol=1e-10)
    q = exact.posterior(x)
    kl = exact.expected_log_likelihood(x, q.loc, q.covariance_matrix) - exact.log_evidence(x)
    np.testing.assert_allclose(found.kl, -kl, rtol=1e-8)
    error = (x - q.loc @ exact.W.T - exact.b).square().sum(1)
    np.testing.assert_allclose(found.reconstruction_error, -error, rtol=1e-8)
    np.testing.assert_allclose(found.reconstruction - exact.log_evidence(x).numpy(), -found.kl, atol=3.0)
    assert found.kl.attrs["units"] == "nats"


def test_the_scores_rank_as_the_exact_evidence():
    exact, vae = linear_gaussian(scale=1.3)
    normal = data(exact, 700)
    odd = normal.flip(0)[:300] + 1.5 * torch.randn(300, D, dtype=torch.float64)
    expected = auroc(exact.log_evidence(normal), exact.log_evidence(odd))
    detector = AnomalyDetector(vae, score="log_evidence", num_particles=2000)
    assert abs(auroc(detector.score_samples(normal), detector.score_samples(odd)) - expected) < 0.001
    assert 0.7 < expected < 0.95


def test_the_typicality_of_a_batch_is_exact_with_the_exact_posterior():
    exact, vae = linear_gaussian()
    x, reference = data(exact, 206)[200:], data(exact, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(derived_seed(5, 23)))
    log_p = exact.log_evidence(reference)[order]
    batches = log_p[100:196].reshape(16, 6).mean(1)  # 4 examples are left over
    for factor in (1.0, 0.0):  # what is too likely is not typical either
        found = batch_typicality(vae, exact.b + factor * (x - exact.b), reference=reference, seed=5)
        own = exact.log_evidence(exact.b + factor * (x - exact.b)).mean()
        distance = (own - log_p[:100].mean()).abs()
        assert found.score == pytest.approx(-float(distance), rel=1e-10)
        as_odd = int(((batches - log_p[:100].mean()).abs() >= distance).sum())
        assert found.p_value == (1 + as_odd) / 17
        assert found.num_batches == 16
    assert found.p_value == 1 / 17  # of the mode of p(x), six times
    # E log p(x) is minus the entropy, which a large reference estimates
    covariance = exact.W @ exact.W.T + exact.noise_variance * torch.eye(D)
    entropy = float(0.5 * torch.logdet(2 * math.pi * math.e * covariance))
    large = data(exact, 20_000)
    found = batch_typicality(vae, x, reference=large, num_particles=2, seed=5)
    expected = -abs(float(exact.log_evidence(x).mean()) + entropy)
    assert abs(found.score - expected) < 5 * math.sqrt(D / 2 / 10_000)  # Var log p = D/2


def test_the_p_values_of_batches_hold_their_rate():
    exact, vae = linear_gaussian()
    alarms = 0
    for trial in range(400):
        drawn = exact.sample(4 + 80, generator=torch.Generator().manual_seed(trial))
        found = batch_typicality(vae, drawn[:4], reference=drawn[4:], num_particles=1, seed=trial)
        alarms += found.p_value <= 1 / 11 + 1e-9
    assert abs(alarms / 400 - 1 / 11) < 5 * math.sqrt(1 / 11 * 10 / 11 / 400)


def test_a_batch_needs_a_reference_of_twice_its_size():
    exact, vae = linear_gaussian()
    with pytest.raises(ValueError, match="a batch of 6 examples needs a reference of at least 12; got 11"):
        batch_typicality(vae, data(exact, 6), reference=data(exact, 11))
    assert batch_typicality(vae, data(exact, 6), reference=data(exact, 12)).num_batches == 1


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (10, 1), (18, 1), (19, 1), (39, 2), (59, 3)])
def test_auto_holds_five_per_cent_or_what_the_data_can_hold(count, rank):
    exact, vae = linear_gaussian()
    x = data(exact, count)
    detector = AnomalyDetector(vae, score="log_evidence", contamination="auto").fit(x)
    assert detector.offset_ == pytest.approx(float(exact.log_evidence(x).sort().values[rank - 1]))
    assert conformal_threshold(exact.log_evidence(x), "auto") == pytest.approx(detector.offset_)
    assert ((detector.predict(x) == -1).sum(), detector.contamination) == (rank - 1, "auto")


def test_explanations_add_up_to_the_reconstruction():
    vae, x = vae_of().double(), grey(5).double()
    detector = AnomalyDetector(vae, num_particles=7, seed=2)
    explained = detector.explain(x)
    assert explained.shape == x.shape
    expected = anomaly_scores(vae, x, num_particles=7, seed=2).reconstruction.values
    np.testing.assert_allclose(explained.flatten(1).sum(1), expected, rtol=1e-12)


def test_an_odd_pixel_is_where_the_explanation_is_lowest():
    vae = vae_of()
    with torch.no_grad():  # a confident decoder of black images
        for parameter in vae.likelihood.parameters():
            parameter.zero_()
        vae.likelihood.network[-1].bias[:30] = -0.5
        vae.likelihood.network[-1].bias[30:] = -2.0
    x = torch.zeros(2, *EVENT)
    x[1, 0, 4, 2] = 1.0
    explained = AnomalyDetector(vae, num_particles=3).explain(x)
    assert int(explained[1].argmin()) == 4 * 5 + 2


def test_regret_of_the_exact_posterior_vanishes_and_of_another_does_not():
    D_, K_ = 4, 2
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Normal(K_, (D_,), network=nn.Linear(K_, D_), variance=0.5)
    guide = pv.guides.FullCovarianceNormal((D_,), K_, network=nn.Linear(D_, 5))
    vae = pv.VAE(prior=pv.priors.StandardNormal(K_), likelihood=likelihood, guide=guide).double()
    linear = likelihood.network
    exact = pv.closed_form.LinearGaussian(linear.weight.detach(), linear.bias.detach(), 0.5)
    x = exact.sample(6)
    regret = -AnomalyDetector(vae, score="regret", num_particles=200).score_samples(x)
    with torch.no_grad():
        q = vae.encode(x)
        gap = exact.gap(x, q.mean, q.covariance_matrix)
    assert (regret > 0.2 * gap).all()  # 100 small steps close part of the gap, and at most all of it
    assert (regret < gap + 0.5).all()


# Signs, threshold, p-values


@pytest.mark.parametrize("name", SCORES)
def test_outliers_have_negative_decisions(name):
    exact, _ = linear_gaussian()
    torch.manual_seed(5)
    if name == "complexity":
        vae, normal = vae_of(), torch.zeros(200, *EVENT) + grey(200) * 0.05
        normal, odd = (normal * 255).round() / 255, grey(20, seed=7)
        pv.fit(vae, normal, epochs=20, batch_size=50, learning_rate=0.01, progress=False, engine="eager")
    else:
        normal, odd = data(exact, 400).float(), 20 + 3 * torch.randn(20, D)
        parts = {"prior": pv.priors.StandardNormal(2), "likelihood": pv.likelihoods.Normal(2, (D,), **SMALL)}
        vae = pv.VAE(**parts, guide=pv.guides.DiagonalNormal((D,), 2, **SMALL))
        pv.fit(vae, normal[:200], epochs=20, learning_rate=0.01, progress=False, engine="eager")
    half = len(normal) // 2
    detector = AnomalyDetector(vae, score=name, contamination=0.1, num_particles=10)
    detector.fit(normal[:half])
    odd_decision = detector.decision_function(odd)
    assert (odd_decision < 0).double().mean() > (0.5 if name == "complexity" else 0.9)
    assert torch.equal(detector.predict(odd), torch.where(odd_decision < 0, -1, 1))
    share = (detector.predict(normal[half:]) < 0).double().mean()
    assert share < 0.1 + 5 * math.sqrt(0.09 / half) + 5 * math.sqrt(0.09 / (half / 2))
    torch.testing.assert_close(odd_decision + detector.offset_, detector.score_samples(odd))


@pytest.mark.parametrize("score", ["statistics", "typicality", "elbo"])
def test_p_values_hold_their_false_alarm_rate(score):
    exact, vae = linear_gaussian(scale=1.2)
    x = data(exact, 3600)
    alarms, rounds, each = {0.01: 0.0, 0.05: 0.0, 0.1: 0.0}, 12, 300
    for part in x.split(each):
        detector = AnomalyDetector(vae, score=score, num_particles=4).fit(part[:100], part[100:200])
        p = detector.p_value(part[200:])
        assert ((p > 0) & (p <= 1)).all()
        for alpha in alarms:
            alarms[alpha] += float((p <= alpha).double().mean()) / rounds
    for alpha, rate in alarms.items():
        # the rate of one detector varies with its 100 calibration scores, as a beta distribution
        se = math.sqrt(alpha * (1 - alpha) * (1 / 100 + 1 / 100) / rounds)
        assert rate <= alpha + 5 * se
        assert rate >= alpha - 1 / 101 - 5 * se


def test_the_threshold_agrees_with_the_p_value():
    exact, vae = linear_gaussian()
    detector = AnomalyDetector(vae, score="elbo", contamination=0.1, num_particles=3).fit(data(exact, 57))
    x = 2 * data(exact, 200)
    assert torch.equal(detector.predict(x) < 0, detector.p_value(x) <= 0.1)
    assert detector.offset_ == detector.calibration_scores_[4]  # the fifth of 57: 5 / 58 ≤ 0.1


def test_the_reference_is_halved_only_where_the_score_learns_from_it():
    exact, vae = linear_gaussian()
    x = data(exact, 41)
    assert len(AnomalyDetector(vae, score="elbo").fit(x).calibration_scores_) == 41
    assert len(AnomalyDetector(vae).fit(x).calibration_scores_) == 21
    assert len(AnomalyDetector(vae).fit(x, x[:30]).calibration_scores_) == 30


def test_a_detector_is_copied_and_pickled():
    detector = AnomalyDetector(vae_of(), num_particles=3).fit(grey(60))
    x = grey(4, seed=2)
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(twin.p_value(x), detector.p_value(x))


def test_a_function_is_a_score():
    vae, x = vae_of(), grey(40)
    detector = AnomalyDetector(vae, score=lambda vae, x: -vae.encode(x).mean.square().sum(1)).fit(x)
    torch.testing.assert_close(
        detector.score_samples(x), -vae.encode(x).mean.detach().square().sum(1).double()
    )
    with pytest.raises(ValueError, match="one per example"):
        AnomalyDetector(vae, score=lambda vae, x: x.mean()).score_samples(x)


# The density of the statistics


def test_the_density_is_normalised_and_floored():
    torch.manual_seed(0)
    points = torch.cat([torch.randn(300, 2), 6 + 0.5 * torch.randn(200, 2)]).double() * 50
    density = GaussianMixtureDensity.fit(points)
    axis = torch.linspace(-400, 900, 500, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = density.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total == pytest.approx(1, abs=1e-3)
    constant = torch.cat([points, torch.full((500, 1), 7.0).double()], dim=1)
    assert GaussianMixtureDensity.fit(constant).log_prob(constant).isfinite().all()
    with pytest.raises(ValueError, match="at least 2 points"):
        GaussianMixtureDensity.fit(points[:1])


# Invalid input


def nan_at(x, value):
    x = x.clone()
    x[2, 0, 3, 1] = value
    return x


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda x: nan_at(x, math.nan), ValueError, r"x\[2, 0, 3, 1\] = nan lies outside"),
        (lambda x: nan_at(x, math.inf), ValueError, r"x\[2, 0, 3, 1\] = inf lies outside"),
        (lambda x: nan_at(x, -math.inf), ValueError, "-inf lies outside"),
        (lambda x: x[:, :, 1:], ValueError, "must have shape"),
        (lambda x: x[0], ValueError, "must have shape"),
        (lambda x: (x * 255).to(torch.uint8), TypeError, "floating point"),
        (lambda x: x[:0], ValueError, "empty"),
        (lambda x: x.tolist(), TypeError, "torch.as_tensor"),
        (lambda x: x.to_sparse(), ValueError, "dense"),
        (lambda x: pv.data.from_array((x[:, 0] * 255).byte()).binarized("dynamic"), ValueError, "at random"),
    ],
    ids=["nan", "inf", "minus inf", "shape", "one", "bytes", "empty", "list", "sparse", "random bits"],
)
def test_invalid_data_get_an_error(bad, error, message):
    vae, x = vae_of(), grey(6)
    with pytest.raises(error, match=message):
        anomaly_scores(vae, bad(x))
    with pytest.raises(error, match=message):
        AnomalyDetector(vae, score="elbo", contamination=0.5).fit(bad(x))


def test_invalid_settings_get_an_error():
    vae, x = vae_of(), grey(6)
    with pytest.raises(TypeError, match=r"takes a pyro_vae\.VAE"):
        AnomalyDetector(vae.likelihood)
    with pytest.raises(ValueError, match="score must be one of statistics"):
        AnomalyDetector(vae, score="evidence")
    for wrong in (0, 0.6, "few"):
        with pytest.raises(ValueError, match="contamination must lie in"):
            AnomalyDetector(vae, contamination=wrong)
    with pytest.raises(ValueError, match="at least 19"):
        AnomalyDetector(vae, score="elbo").fit(x)
    with pytest.raises(ValueError, match="call fit"):
        AnomalyDetector(vae, score="elbo").predict(x)
    with pytest.raises(ValueError, match="needs reference data"):
        AnomalyDetector(vae).score_samples(x)
    with pytest.raises(ValueError, match="at least 4 examples"):
        AnomalyDetector(vae).fit(x[:3])
    with pytest.raises(TypeError, match="refines a guide"):
        AnomalyDetector(vae_of("refined"), score="regret").score_samples(x)
    with pytest.raises(TypeError, match="normal q"):
        AnomalyDetector(vae_of("mixture"), score="regret").score_samples(x)


def test_complexity_is_for_images():
    exact, vae = linear_gaussian()
    with pytest.raises(ValueError, match="compresses images"):
        AnomalyDetector(vae, score="complexity").score_samples(data(exact, 3))
    assert "complexity" not in anomaly_scores(vae, data(exact, 3), num_particles=2)
    assert "complexity" in anomaly_scores(vae_of(), grey(3), num_particles=2)


@pytest.mark.parametrize("value", [0.0, 128 / 255, 1.0])
def test_constant_and_one_pixel_images_have_finite_scores(value):
    x = torch.full((2, *EVENT), value)
    x[1, 0, 0, 0] = 1.0
    found = anomaly_scores(vae_of(), x, reference=grey(50), num_particles=5)
    assert all(np.isfinite(found[name]).all() for name in found if name != "pareto_k")
