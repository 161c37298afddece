"""`SemiSupervisedVAE`: its bound against sums by hand, exact evidences, batches, and what it refuses."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from contexts import ALPHA, PRIOR, C, D, K, N
from contexts import semi_supervised as make
from contexts import with_few_classes as data
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.data.balance import Balance
from pyro_vae.data.batches import Batches

pytestmark = pytest.mark.usefixtures("double")


def by_hand(vae, x, y, z=None):
    """Return the bound of each example: the mean over draws where y is given, else the sum over classes."""
    classes = torch.arange(C)[:, None].expand(C, len(x))
    label = torch.where(y >= 0, y, classes)
    q = vae.posterior(x, label)
    z = q.mean + q.stddev * torch.randn(1, len(x), K) if z is None else z  # one draw for all classes
    joint = vae.likelihood(z, label).log_prob(x) + vae.prior().log_prob(z) + torch.tensor(PRIOR).log()[label]
    bound = joint - q.log_prob(z)
    q_y = vae.classifier(x).log_softmax(-1).T
    return torch.where(y >= 0, bound.mean(0), (q_y.exp() * (bound - q_y)).sum(0))


def gradients(vae):
    return [parameter.grad.clone() for parameter in vae.parameters()]


def test_float64_trains_whatever_the_default_dtype():
    """Pyro's deterministic sites of integers have log-densities of the default dtype."""
    vae, (x, y) = make(), data()
    torch.set_default_dtype(torch.float32)
    history = pv.fit(vae, (x, y), epochs=1, batch_size=4, progress=False, engine="eager")
    assert math.isfinite(history[-1].train_bound)


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_those_of_the_sum_over_classes(weighted):
    vae, (x, y) = make(), data()
    weight = torch.rand(N) + 0.5 if weighted else None
    torch.manual_seed(3)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, x, y, weight)
    loss.backward()
    found = gradients(vae)

    vae.zero_grad()
    torch.manual_seed(3)
    expected = -((1 if weight is None else weight) * by_hand(vae, x, y)).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    given = y >= 0
    cross_entropy = nn.functional.cross_entropy(vae.classifier(x[given]), y[given])
    (expected + ALPHA * N * cross_entropy).backward()
    for own, hand in zip(found, gradients(vae), strict=True):
        torch.testing.assert_close(own, hand, rtol=0, atol=1e-10)


def test_without_labels_or_in_evaluation_no_classification_term():
    vae, (x, y) = make(), data()
    for training, labels, sites in [(True, y, 1), (False, y, 0), (True, torch.full((N,), -1), 1)]:
        vae.train(training)
        trace = pyro.poutine.trace(vae.model).get_trace(x, labels)
        assert ("classification" in trace.nodes) == sites
        if sites:
            assert trace.nodes["classification"]["fn"].log_factor.abs().max() == 0
    trace.nodes["classification"]["fn"].log_factor.sum().backward()
    assert max(parameter.grad.abs().max() for parameter in vae.classifier.parameters()) == 0


def test_with_all_labels_the_loss_is_the_conditional_elbo_and_log_p_y():
    vae, (x, _) = make(classification_weight=0.0), data()
    y = torch.arange(N) % C
    cvae = pv.ConditionalVAE(prior=vae.prior, likelihood=vae.likelihood, guide=vae.posterior)
    torch.manual_seed(5)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x, y)
    torch.manual_seed(5)
    q = cvae.encode(x, y)
    z = q.mean + q.stddev * torch.randn(1, N, K)
    elbo = cvae.log_joint(x, z, y) - q.log_prob(z)
    expected = elbo.mean(0).sum() + torch.tensor(PRIOR).log()[y].sum()
    assert loss == pytest.approx(-expected.item(), abs=1e-10)


def test_names_of_classes_do_not_matter():
    vae, (x, y) = make(), data()
    torch.manual_seed(5)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x, y)

    order = torch.tensor([2, 0, 1])  # class c is named order[c]
    renamed = make(class_prior=[PRIOR[old] for old in order.argsort()])
    renamed.load_state_dict(vae.state_dict())
    with torch.no_grad():
        for first in (renamed.likelihood.network[1], renamed.posterior.network[1]):
            first.weight[:, -C:] = first.weight[:, -C:].clone()[:, order.argsort()]
        last = renamed.classifier[-1]
        last.weight.copy_(last.weight.clone()[order.argsort()])
        last.bias.copy_(last.bias.clone()[order.argsort()])
    other = torch.where(y >= 0, order[y.clamp(min=0)], -1)
    torch.manual_seed(5)
    renamed_loss = TraceEnum_ELBO(max_plate_nesting=1).loss(renamed.model, renamed.guide, x, other)
    assert renamed_loss == pytest.approx(loss, abs=1e-10)


def test_a_first_layer_is_applied_before_classes_multiply_the_rows():
    vae, (x, _) = make(), data()
    classes = torch.arange(C)[:, None]
    apart = vae.posterior(x, classes)
    whole = vae.posterior(x.expand(C, N, D), classes.expand(C, N))
    torch.testing.assert_close(apart.mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(apart.stddev, whole.stddev, rtol=0, atol=1e-12)


def test_evidence_of_labelled_and_unlabelled_examples_is_exact():
    vae, (x, y) = make(width=()), data()
    pv.fit(vae, (x, y), epochs=60, batch_size=N, learning_rate=0.03, progress=False)
    layer = vae.likelihood.network[-1]
    w, v = layer.weight.detach()[:, :K], layer.weight.detach()[:, K:]
    covariance = w @ w.T + 0.5 * torch.eye(D)
    each = dist.MultivariateNormal(v.T + layer.bias.detach(), covariance).log_prob(x[:, None])  # (N, C)
    joint = each + torch.tensor(PRIOR).log()
    exact = torch.where(y >= 0, joint.gather(1, y.clamp(min=0)[:, None])[:, 0], joint.logsumexp(1))
    report = pv.evaluate(vae, (x, y), num_particles=4000, progress=False)
    error = report.per_datum.log_evidence - exact
    assert (error.abs() < 5 * report.per_datum.log_evidence_mc_se + 1e-6).all()
    assert report.observed_names == ["y_observed", "x"]
    alone = pv.evaluate(vae, x, num_particles=4000, progress=False)
    assert alone.log_evidence == pytest.approx(float(joint.logsumexp(1).mean()), abs=0.1)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_svi_takes_the_steps_of_pyro(engine):
    x, y = data()
    vae, other = make(), make()
    svi = pv.SVI(vae, torch.optim.Adam(vae.parameters(), 0.01), engine=engine)
    svi.check(x, y)
    upstream = pyro.infer.SVI(
        other.model, other.guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1)
    )
    losses = []
    for step in [lambda: svi.step(x, y), lambda: upstream.step(x, y)]:
        torch.manual_seed(6)
        losses.append([step() for _ in range(8)])
    assert isinstance(svi.loss, TraceEnum_ELBO)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_two_clusters_are_told_apart_by_five_labels_each():
    x = torch.cat([torch.randn(60, D) + 2, torch.randn(60, D) - 2])
    classes = torch.arange(2).repeat_interleave(60)
    y = torch.full((120,), -1)
    y[7:12], y[80:85] = 0, 1
    vae = pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, (D,), context_dim=2, hidden_features=(8,)),
        guide=pv.guides.DiagonalNormal((D,), K, context_dim=2, hidden_features=(8,)),
        classifier=pv.networks.MLP(D, 2, hidden_features=(8,)),
        num_classes=2,
        classification_weight=1.0,
    )
    history = pv.fit(vae, (x, y), epochs=15, batch_size=20, learning_rate=0.01, progress=False)
    probabilities = vae.predict_proba(x)
    assert (probabilities.argmax(-1) == classes).double().mean() > 0.95
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(120))
    assert history[-1].train_bound > history[0].train_bound


def test_training_batches_hold_their_share_of_labels_and_every_other_example_once():
    y = torch.where(torch.arange(53) % 11 == 0, 1, -1)  # 5 labelled, 48 others
    x = torch.arange(53.0)[:, None].expand(53, D)
    train = make(labelled_share=0.25).arrange(Batches((x, y), seed=2))
    batches = list(train.epoch(0, batch_size=8))
    assert [len(x) for x, _, _ in batches] == [8] * 8 == train.lengths(8)
    assert all(int((y >= 0).sum()) == 2 for _, y, _ in batches)
    seen = torch.cat([x[y < 0, 0] for x, y, _ in batches])
    assert sorted(seen.tolist()) == [float(row) for row in range(53) if row % 11]
    repeated = torch.cat([x[y >= 0, 0] for x, y, _ in batches])
    counts = repeated.long().bincount(minlength=53)
    assert set(counts[::11].tolist()) == {3, 4}  # 16 places for 5 examples
    assert counts.sum() == counts[::11].sum() == 16
    for _, y, weight in batches:
        assert weight.sum().item() == pytest.approx(8)
        assert weight[y >= 0].sum().item() == pytest.approx(8 * 5 / 53)
    other = torch.cat([x for x, _, _ in train.epoch(1, batch_size=8)])
    assert not torch.equal(torch.cat([x for x, _, _ in batches]), other)
    (late,) = train.epoch(0, batch_size=8, start=7)
    torch.testing.assert_close(late[0], batches[7][0])


@pytest.mark.parametrize(
    ("size", "lengths", "labelled"), [(4, [4, 4, 4, 2], 1), (2, [2] * 10, 1), (9, [9, 5], 2)]
)
def test_lengths_of_balanced_batches(size, lengths, labelled):
    balance = Balance(torch.arange(3), torch.arange(3, 13), share=0.1)
    assert balance.num_labelled(size) == labelled
    assert balance.lengths(size) == lengths


def test_batches_of_one_read_every_example():
    y = torch.where(torch.arange(9) < 3, torch.arange(9) % C, -1)
    x = torch.arange(9.0)[:, None].expand(9, D)
    train = make().arrange(Batches((x, y), seed=2))
    assert train.lengths(1) == [1] * 9
    assert sorted(float(batch[0][0, 0]) for batch in train.epoch(0, batch_size=1)) == list(range(9))


def test_the_model_classifies_with_its_own_prior():
    vae, (x, _) = make(), data()
    given = vae.class_probabilities(x, class_log_prior=torch.tensor(PRIOR).log(), num_particles=5)
    torch.testing.assert_close(vae.class_probabilities(x, num_particles=5), given)
    flat = pv.ConditionalVAE.class_probabilities(vae, x, C, class_log_prior=torch.zeros(C), num_particles=5)
    expected = flat * torch.tensor(PRIOR)
    torch.testing.assert_close(given, expected / expected.sum(-1, keepdim=True))


def test_the_reported_bound_is_that_of_the_data_as_they_are():
    x = torch.randn(200, D)
    y = torch.where(torch.arange(200) < 10, torch.arange(200) % C, -1)
    vae = make()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    history = pv.fit(vae, (x, y), epochs=40, batch_size=50, learning_rate=1e-12, progress=False)
    vae.load_state_dict(before)
    report = pv.evaluate(vae, (x, y), num_particles=500, progress=False)
    bounds = torch.tensor([epoch.train_bound for epoch in history])
    error = float(bounds.std()) / math.sqrt(40)
    assert abs(float(bounds.mean()) - report.elbo) < 5 * error


def test_resumed_training_ends_with_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, D, generator=generator)
    y = torch.where(torch.arange(40) < 6, torch.arange(40) % C, -1)
    options = {"batch_size": 10, "progress": False, "validation": 0.2}
    whole, parts = make(), make()
    pv.fit(whole, (x, y), epochs=4, **options)
    pv.fit(parts, (x, y), epochs=2, checkpoint_dir=tmp_path, **options)
    history = pv.fit(parts, (x, y), epochs=4, checkpoint_dir=tmp_path, resume=True, **options)
    for own, other in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, other)
    assert math.isfinite(history[-1].validation_elbo)
    vae = pv.SemiSupervisedVAE.load(tmp_path / "best.pt")
    assert vae.predict_proba(x).shape == (40, C)


def test_saved_and_loaded(tmp_path):
    vae, (x, y) = make(), data()
    vae.save(tmp_path / "vae.pt")
    loaded = pv.SemiSupervisedVAE.load(tmp_path / "vae.pt")
    torch.testing.assert_close(loaded.predict_proba(x), vae.predict_proba(x))
    torch.testing.assert_close(loaded.class_log_prior, torch.tensor(PRIOR).log())
    assert loaded.classification_weight == ALPHA
    assert torch.equal(loaded.reconstruct(x, y), vae.reconstruct(x, y))


def test_missing_classes_are_filled_in_and_drawn():
    vae, (x, y) = make(), data()
    predicted = vae.predict_proba(x).argmax(-1)
    filled = torch.where(y >= 0, y, predicted)
    assert torch.equal(vae.encode(x, y).mean, vae.posterior(x, filled).mean)
    assert torch.equal(vae.reconstruct(x), vae.likelihood(vae.posterior(x, predicted).mean, predicted).mean)
    assert vae.sample(4).shape == (4, D)
    assert vae.sample(3, y=torch.tensor([0, 0, 2]), mean=True).shape == (3, D)
    other = vae.with_guide(pv.guides.FullCovarianceNormal((D,), K, context_dim=C))
    assert other.classifier is vae.classifier
    torch.testing.assert_close(other.class_log_prior, vae.class_log_prior)


@pytest.mark.filterwarnings("ignore:y_unobserved")  # Pyro's, that it is not enumerated
@pytest.mark.parametrize("estimator", [Trace_ELBO(), pv.VIMCO(3)])
def test_other_estimators_sample_the_class(estimator):
    x, y = torch.randn(40, D), torch.where(torch.arange(40) < 6, torch.arange(40) % C, -1)
    history = pv.fit(make(), (x, y), epochs=2, batch_size=10, estimator=estimator, progress=False)
    assert math.isfinite(history[-1].train_bound)


def test_a_class_without_labels_is_told(caplog):
    x, _ = data()
    with caplog.at_level(logging.WARNING):
        pv.fit(make(), (x, torch.tensor([0, 2, -1, -1, -1, -1, -1])), epochs=1, progress=False)
    assert "no example of class 1 is labelled" in caplog.text


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(N, dtype=torch.bool), TypeError, r"y must hold integers, .*got torch\.bool$"),
        (torch.zeros(N), TypeError, r"y must hold integers, .*y\.long\(\)"),
        (
            torch.tensor([0, 1, 2, 3, 0, 1, 2]),
            ValueError,
            r"y\[3\] is 3: classes must lie in 0 … 2, or be -1",
        ),
        (torch.tensor([0, 1, -2, 0, 0, 1, 2]), ValueError, r"y\[2\] is -2"),
        (torch.zeros(N, 1, dtype=torch.long), ValueError, r"y must have shape \(7,\)"),
        (torch.full((N,), -1), ValueError, "all classes are missing .*label some"),
        (None, ValueError, "all classes are missing"),
    ],
)
def test_wrong_labels(y, error, message):
    x, _ = data()
    with pytest.raises(error, match=message):
        pv.fit(make(), (x, y), epochs=1, progress=False)


def test_wrong_numbers_of_arguments():
    x, y = data()
    with pytest.raises(TypeError, match=r"takes \(x, y\), or x alone"):
        pv.evaluate(make(), (x, y, x, x), progress=False)
    with pytest.raises(TypeError, match="labels"):
        pv.evaluate(make(), {"x": x, "labels": y}, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_prior": [0.5, 0.5]}, "class_prior must hold 3 positive numbers"),
        ({"class_prior": [0.5, 0.4, 0.3]}, "of sum 1"),
        ({"classification_weight": -1}, "classification_weight must be at least 0"),
        ({"classification_weight": math.nan}, "classification_weight must be at least 0"),
        ({"labelled_share": 1.0}, r"labelled_share must lie in \[0, 1\)"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_parts_of_other_sizes():
    parts = {
        "prior": pv.priors.StandardNormal(K),
        "likelihood": pv.likelihoods.Normal(K, (D,), context_dim=C),
        "guide": pv.guides.DiagonalNormal((D,), K, context_dim=C),
        "classifier": pv.networks.MLP(D, C),
    }
    with pytest.raises(ValueError, match="the likelihood has context_dim=3; it must be num_classes, 4"):
        pv.SemiSupervisedVAE(**parts, num_classes=4)
    with pytest.raises(TypeError, match="classifier must be a module"):
        pv.SemiSupervisedVAE(**{**parts, "classifier": nn.Linear}, num_classes=C)
    vae = pv.SemiSupervisedVAE(**{**parts, "classifier": nn.Linear(D, 2)}, num_classes=C)
    with pytest.raises(ValueError, match=r"the classifier must return logits of shape \(N, 3\)"):
        vae.predict_proba(data()[0])


def test_a_class_is_no_unit():
    report = pv.evaluate(make(), data(), num_particles=20, progress=False)
    assert report.activity.isnan().tolist() == [True, False, False]
    assert f"{report.active_units} of 2 " in repr(report)


@pytest.mark.filterwarnings("ignore:y_unobserved")
def test_a_weight_on_the_kl_needs_an_estimator_that_draws_the_class():
    x, y = data()
    with pytest.raises(TypeError, match="got TraceEnum_ELBO.*, which sums over values .*: use .* Trace_ELBO"):
        pv.fit(make(), (x, y), kl_warmup=1, progress=False)
    history = pv.fit(make(), (x, y), kl_warmup=2, estimator=Trace_ELBO(), epochs=1, progress=False)
    assert history[0].beta == 0.5
