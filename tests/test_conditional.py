"""`ConditionalVAE`: densities given a context, against exact ones."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from contexts import C, D, K, N, rows, semi_supervised
from contexts import conditional as linear
from contexts import with_classes as data
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv

pytestmark = pytest.mark.usefixtures("double")


def exact(cvae, x, y):
    layer = cvae.likelihood.network[-1]
    w, v = layer.weight[:, :K], layer.weight[:, K:]
    p_z = cvae.p_z(y).expand((len(x),))
    mean = p_z.mean @ w.T + v.T[y] + layer.bias
    covariance = w @ p_z.variance.diag_embed() @ w.T + 0.5 * torch.eye(D)
    return dist.MultivariateNormal(mean, covariance).log_prob(x).detach()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 0, 1, 3, 0]), r"y holds classes and must lie in 0 … 2.*got 3 at index \[5\]"),
        (torch.zeros(N, 1, dtype=torch.long), r"y must hold 7 classes, shape \(7,\)"),
        (torch.zeros(N, 4), r"y must have shape \(\*, 3\)"),
    ],
)
def test_contexts_are_checked_before_training(y, message):
    cvae, (x, _) = linear(), data()
    with pytest.raises(ValueError, match=message):
        pv.fit(cvae, (x, y), batch_size=2, progress=False)
    with pytest.raises(ValueError, match=message):
        pv.fit(cvae, data(), validation=(x, y), progress=False)


@pytest.mark.parametrize("learned_prior", [False, True], ids=["p(z)", "p(z|y)"])
def test_the_evidence_given_the_context_is_exact(learned_prior):
    cvae, (x, y) = linear(learned_prior=learned_prior), data()
    pv.fit(cvae, (x, y), epochs=200, batch_size=N, learning_rate=0.02, progress=False)
    report = pv.evaluate(cvae, (x, y), num_particles=3000, progress=False)
    error = report.per_datum.log_evidence - exact(cvae, x, y)
    assert (error.abs() < 5 * report.per_datum.log_evidence_mc_se + 1e-6).all()
    assert report.elbo < report.log_evidence


def test_classes_have_their_exact_probabilities():
    cvae, (x, y) = linear(), data()
    pv.fit(cvae, (x, y), epochs=200, batch_size=N, learning_rate=0.02, progress=False)
    scores = torch.stack([exact(cvae, x, torch.full((N,), label)) for label in range(C)], -1)
    found = cvae.class_log_evidence(x, C, num_particles=4000)
    torch.testing.assert_close(found, scores, rtol=0, atol=0.1)
    prior = torch.tensor([0.7, 0.2, 0.1]).log()
    probabilities = cvae.class_probabilities(x, C, class_log_prior=prior, num_particles=4000)
    torch.testing.assert_close(probabilities, (scores + prior).softmax(-1), rtol=0, atol=0.05)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(N))


def test_the_elbo_is_the_one_by_hand_and_that_of_pyro():
    cvae, (x, y) = linear(learned_prior=True), data()
    t = pv.terms(cvae.model, cvae.guide, x, y, num_particles=4)
    q, p_z = cvae.encode(x, y), cvae.p_z(y)
    z = t.sites.draws["z"]
    torch.testing.assert_close(t.log_likelihood, cvae.decode(z, y).log_prob(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(t.log_prior, p_z.log_prob(z), rtol=0, atol=1e-10)
    torch.testing.assert_close(t.log_guide, q.log_prob(z), rtol=0, atol=1e-10)
    torch.manual_seed(3)
    expected = TraceMeanField_ELBO().loss(cvae.model, cvae.guide, x, y)
    torch.manual_seed(3)
    t = pv.terms(cvae.model, cvae.guide, x, y)
    assert -t.elbo.sum().item() == pytest.approx(expected, abs=1e-10)


def test_classes_and_one_hot_contexts_are_the_same_and_numbers_are_taken():
    cvae, (x, y) = linear(), data()
    one_hot = nn.functional.one_hot(y, C).double()
    assert torch.equal(cvae.encode(x, y).mean, cvae.encode(x, one_hot).mean)
    pv.fit(cvae, {"x": x, "y": torch.randn(N, C)}, epochs=1, progress=False)


def test_samples_and_reconstructions_follow_the_context():
    cvae, (x, y) = linear(learned_prior=True), data()
    means = torch.stack(
        [cvae.sample(20_000, y=torch.full((20_000,), label), mean=True).mean(0) for label in range(C)]
    )
    layer = cvae.likelihood.network[-1]
    p_z = cvae.p_z(torch.arange(C))
    expected = p_z.mean @ layer.weight[:, :K].T + layer.weight[:, K:].T + layer.bias
    torch.testing.assert_close(means, expected.detach(), rtol=0, atol=0.05)
    assert cvae.reconstruct(x, y).shape == (N, D)


def test_saved_and_loaded_and_with_another_guide(tmp_path):
    cvae, (x, y) = linear(learned_prior=True), data()
    cvae.save(tmp_path / "cvae.pt")
    loaded = pv.VAE.load(tmp_path / "cvae.pt")
    assert isinstance(loaded, pv.ConditionalVAE)
    assert torch.equal(loaded.encode(x, y).mean, cvae.encode(x, y).mean)
    other = cvae.with_guide(pv.guides.DiagonalNormal((D,), K, context_dim=C))
    assert isinstance(other, pv.ConditionalVAE)
    pv.fit(other, (x, y), epochs=1, progress=False)


@pytest.mark.parametrize("kind", ["FullCovarianceNormal", "LowRankNormal", "Mixture", "Flow"])
def test_every_guide_takes_a_context(kind):
    x, y = data()
    q = getattr(pv.guides, kind)((D,), K, context_dim=C)
    assert q(x, y).rsample().shape == (N, K)
    assert not torch.equal(q.outputs(x, y)[0], q.outputs(x, (y + 1) % C)[0])


BAD = {
    "no context": (lambda cvae, x, y: pv.fit(cvae, x), TypeError, "takes x and y; got 1 arguments.*pass"),
    "a class out of range": (
        lambda cvae, x, y: pv.fit(cvae, (x, y + 1)),
        ValueError,
        r"0 … 2.*got 3 at index \[2\]",
    ),
    "another size": (
        lambda cvae, x, y: pv.fit(cvae, (x, torch.randn(N, 4))),
        ValueError,
        r"\(\*, 3\).*\(7, 4\)",
    ),
    "not finite": (
        lambda cvae, x, y: pv.fit(cvae, (x, torch.full((N, C), torch.nan))),
        ValueError,
        r"y must be finite; got nan at index \[0, 0\]",
    ),
    "another length": (lambda cvae, x, y: pv.fit(cvae, (x, y[1:])), ValueError, "same number of rows"),
    "samples without": (lambda cvae, x, y: cvae.sample(3), ValueError, "one context for each of the 3"),
    "samples of another length": (lambda cvae, x, y: cvae.sample(3, y=y), ValueError, "the 3 samples; got 7"),
    "a prior of classes": (
        lambda cvae, x, y: cvae.class_probabilities(x, C, class_log_prior=torch.zeros(2)),
        ValueError,
        r"shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_contexts_raise_with_what_and_where(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(linear(), *data())


def test_a_part_without_context_says_so():
    x, y = data()
    with pytest.raises(
        TypeError, match="DiagonalNormal takes no context y; got one: build it with context_dim"
    ):
        pv.guides.DiagonalNormal((D,), K)(x, y)
    with pytest.raises(TypeError, match="DiagonalNormal takes a context y; got none: pass y"):
        pv.guides.DiagonalNormal((D,), K, context_dim=C)(x)


def test_a_step_with_classes_is_recorded(caplog):
    x, y = data()
    pv.fit(linear(), (x, y), epochs=2, batch_size=4, engine="traced", progress=False)
    assert not caplog.records


def test_an_optional_argument_of_a_prior_is_not_the_context():
    class Tempered(nn.Module):
        def forward(self, temperature=1.0):
            return dist.Normal(torch.zeros(K), temperature).to_event(1)

    cvae = linear()
    cvae.prior = Tempered()
    assert torch.equal(cvae.p_z(data()[1]).stddev, torch.ones(K))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, 0.2, 0.7], "class_log_prior holds probabilities, .*: pass their logarithms"),
        (torch.tensor([0.0, torch.nan, -1.0]), "class_log_prior must hold logarithms"),
        ([0.0, 1.0], r"class_log_prior must have shape \(3,\); got \(2,\)"),
    ],
)
def test_a_prior_of_classes_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        linear().class_probabilities(data()[0], C, class_log_prior=values)


def test_a_prior_of_classes_may_be_a_list_or_an_array():
    cvae, x, values = linear(), data()[0], [-0.5, -1.5, -3.0]
    expected = cvae.class_probabilities(x, C, class_log_prior=torch.tensor(values))
    for given in (values, np.array(values)):
        assert torch.equal(cvae.class_probabilities(x, C, class_log_prior=given), expected)
    cvae.class_probabilities(x, C, class_log_prior=[0.0, 0.0, 0.0])  # not normalised
    assert (cvae.class_probabilities(x, C, class_log_prior=[0.0, -torch.inf, 0.0])[:, 1] == 0).all()


NAN = r"x\[2, 4\] is nan: where NaN means missing, pass observed=~x.isnan\(\) of a tensor"


def with_nan():
    x = rows()
    x[2, 4] = torch.nan
    return x


CALLS = {
    "encode": lambda vae, x: vae.encode(x, torch.arange(len(x)) % C),
    "reconstruct": lambda vae, x: vae.reconstruct(x, torch.arange(len(x)) % C),
    "class_log_evidence": lambda vae, x: vae.class_log_evidence(x, C),
    "class_probabilities": lambda vae, x: vae.class_probabilities(x, C),
    "predict_proba": lambda vae, x: vae.predict_proba(x),
}
DATA = {
    "a list": (lambda: rows().tolist(), TypeError, "x must be a tensor; got list"),
    "another width": (lambda: rows()[:, :3], ValueError, r"x must have shape \((N|\*), 5\).*; got \(7, 3\)"),
    "integers": (lambda: rows().long(), TypeError, "x must be floating point; got torch.int64"),
    "nan": (with_nan, ValueError, NAN),
}


@pytest.mark.parametrize("bad", DATA)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [linear, semi_supervised])
def test_what_is_wrong_with_data_is_said(make, call, bad):
    if call == "predict_proba" and make is linear:
        return
    values, error, message = DATA[bad]
    with pytest.raises(error, match=message) as found:
        CALLS[call](make(), values())
    assert "Trace Shapes" not in str(found.value)


def test_one_example_needs_a_dimension_for_the_batch():
    for call in (semi_supervised().predict_proba, lambda x: linear().class_probabilities(x, C)):
        with pytest.raises(ValueError, match=r"got \(5,\): add a dimension for the batch, x\[None\]"):
            call(rows()[0])


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_classes(count):
    with pytest.raises(ValueError, match=f"num_classes must be 3, the context_dim of the parts; got {count}"):
        linear().class_probabilities(rows(), count)
    with pytest.raises(ValueError, match=f"num_classes must be that of the model, 3; got {count}"):
        semi_supervised().class_probabilities(rows(), count)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([0] * N, TypeError, "y must be a tensor; got list: convert"),
        (torch.tensor([0, 1, 2]), ValueError, r"y has batch shape \(3,\), but the examples have \(7,\)"),
        (torch.arange(N) / 2, ValueError, r"y must have shape \(\*, 3\).*classes are integers, y.long\(\)"),
    ],
)
def test_contexts_of_another_kind(y, error, message):
    for call in (linear().encode, linear().reconstruct):
        with pytest.raises(error, match=message):
            call(rows(), y)
    with pytest.raises(error, match=r"y must|one context for each"):
        linear().sample(N, y=y)


def test_a_number_as_context_is_a_column():
    likelihood = pv.likelihoods.Normal(K, (D,), context_dim=1)
    guide = pv.guides.DiagonalNormal((D,), K, context_dim=1)
    cvae = pv.ConditionalVAE(prior=pv.priors.StandardNormal(K), likelihood=likelihood, guide=guide)
    y = torch.randn(N)
    with pytest.raises(ValueError, match=r"shape \(\*, 1\).*; got \(7,\): y\[:, None\] has it"):
        pv.fit(cvae, (rows(), y), progress=False)
    assert cvae.encode(rows(), y[:, None]).batch_shape == (N,)
    with pytest.raises(TypeError, match="a ConditionalVAE takes x and y; got none for y"):
        pv.fit(cvae, (rows(), None), progress=False)
    with pytest.raises(TypeError, match="got int: convert lists of numbers with torch.as_tensor"):
        pv.fit(cvae, (rows(), y.long().tolist()), progress=False)


def test_classes_of_examples_with_missing_values():
    from pyro_vae.utils.isolation import seed_generators

    cvae, x = linear().eval(), with_nan()
    observed = ~x.isnan()
    found = cvae.class_log_evidence(x, C, observed=observed, num_particles=4, seed=3)
    for label in range(C):
        y, filled = torch.full((N,), label), torch.where(observed, x, 0.0)
        seed_generators(x.device, 3)
        q = cvae.posterior(filled, y)
        z = q.rsample((4,))
        by_element = dist.Normal(cvae.decode(z, y).mean, 0.5**0.5).log_prob(filled).where(observed, 0.0)
        log_weight = by_element.sum(-1) + cvae.prior().log_prob(z) - q.log_prob(z)
        expected = log_weight.logsumexp(0) - math.log(4)
        torch.testing.assert_close(found[:, label], expected.detach(), rtol=0, atol=1e-10)
    vae = semi_supervised()
    filled = torch.where(observed, x, 0.0)
    assert torch.equal(vae.predict_proba(x, observed=observed), vae.predict_proba(filled))
    assert vae.class_probabilities(x, observed=observed).isfinite().all()


def test_what_takes_no_context_says_what_to_do():
    from pyro_vae.applications import AnomalyDetector, Codec, anomaly_scores, denoise, impute

    for call, remedy in (
        (impute, "posterior_predictive of to_inference_data"),
        (anomaly_scores, r"evaluate\(vae, \(x, y\)\)"),
        (lambda vae, x: denoise(vae, x, corruption=lambda x: dist.Normal(x, 1.0)), "depends on y$"),
        (lambda vae, x: Codec(vae), "depends on y$"),
        (lambda vae, x: AnomalyDetector(vae), "depends on y$"),
    ):
        with pytest.raises(
            TypeError, match=f"takes a pyro_vae.VAE of x alone; got a ConditionalVAE.*{remedy}"
        ):
            call(linear(), rows())


def test_classes_of_values_outside_the_support_are_refused():
    """As by `evaluate`; grey levels of a Bernoulli have no probability."""
    grey = torch.full((N, 6), 0.3)
    cvae = pv.ConditionalVAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(2, (6,), context_dim=C),
        guide=pv.guides.DiagonalNormal((6,), 2, context_dim=C),
    )
    with pytest.raises(ValueError, match=r"x\[0, 0\] = 0.3 lies outside the support of Bernoulli"):
        cvae.class_probabilities(grey, C)
    observed = torch.arange(6).expand(N, 6) > 0
    grey[:, 1:] = 1.0
    assert cvae.class_probabilities(grey, C, observed=observed).shape == (N, C)


def seeded(call):
    torch.manual_seed(6)
    return call()


BY_BOTH = {
    "encode": lambda vae, x, z, *y, **named: vae.encode(x, *y, **named).mean,
    "encode what is observed": lambda vae, x, z, *y, **named: vae.encode(x, *y, observed=x > 0, **named).mean,
    "decode": lambda vae, x, z, *y, **named: vae.decode(z, *y, **named).mean,
    "log_joint": lambda vae, x, z, *y, **named: vae.log_joint(x, z, *y, **named),
    "reconstruct": lambda vae, x, z, *y, **named: vae.reconstruct(x, *y, **named),
    "sample": lambda vae, x, z, *y, **named: seeded(lambda: vae.sample(N, *y, **named)),
    "class_log_evidence": lambda vae, x, *_, **named: vae.class_log_evidence(x, C, num_particles=3),
    "class_probabilities": lambda vae, x, *_, **named: vae.class_probabilities(x, C, num_particles=3),
}


@pytest.mark.parametrize("make", [linear, semi_supervised])
@pytest.mark.parametrize("call", BY_BOTH.values(), ids=BY_BOTH)
def test_y_has_both_spellings_and_arrays_give_what_tensors_give(make, call):
    vae, (x, y), z = make(), data(), torch.randn(N, K)
    expected = call(vae, x, z, y)
    for form in (torch.Tensor.clone, torch.Tensor.numpy):
        assert torch.equal(call(vae, form(x), form(z), form(y)), expected)
        assert torch.equal(call(vae, form(x), form(z), y=form(y)), expected)
    single = call(vae.float(), x.numpy(), z.numpy(), y.numpy())  # which fit converts, too
    assert single.dtype == torch.float32


def test_arrays_of_missing_classes_and_numbers_as_context():
    vae, x = semi_supervised(), rows()
    y = torch.tensor([0, -1, 2, -1, -1, 1, -1])
    for method in (vae.encode, vae.reconstruct):
        expected, found = (method(*arguments) for arguments in ((x, y), (x.numpy(), y.numpy())))
        first = (lambda q: q.mean) if method == vae.encode else (lambda q: q)
        assert torch.equal(first(found), first(expected))
    assert torch.equal(vae.predict_proba(x.numpy()), vae.predict_proba(x))
    assert torch.equal(vae.q_y(x.numpy()).logits, vae.q_y(x).logits)
    cvae, numbers = linear(), torch.rand(N, C)
    assert torch.equal(cvae.decode(x[:, :K], numbers.numpy()).mean, cvae.decode(x[:, :K], numbers).mean)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        cvae.encode(x)
