"""`ConditionalVAE`: densities given a context, against exact ones."""

import pyro.distributions as dist
import pytest
import torch
from contexts import C, D, K, N
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
