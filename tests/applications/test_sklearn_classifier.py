"""VAEClassifier: labels that are missing, of any type; what the classes mean; searches; bad input."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyro_vae as pv
from pyro_vae.applications.sklearn import VAEClassifier

SMALL = {"max_epochs": 20, "learning_rate": 0.02, "hidden_layer_sizes": (16,), "random_state": 0}


def blobs(count=120, classes=3):
    random = np.random.default_rng(0)
    y = np.arange(count) % classes
    return random.normal(size=(count, 5)) + 3.0 * np.eye(classes, 5)[y], y


def hidden(y, count=30):
    """Labels of the first rows, −1 for the others."""
    return np.where(np.arange(len(y)) < count, y, -1)


def small(**parameters):
    return VAEClassifier(**{**SMALL, **parameters})


def test_it_predicts_by_the_classifier_of_the_model():
    X, y = blobs()
    model = small().fit(X, hidden(y))
    assert isinstance(model.vae_, pv.SemiSupervisedVAE)
    assert model.score(X, y) > 0.85
    probabilities = model.predict_proba(X[:7])
    expected = model.vae_.predict_proba(model._tensor(X[:7])).numpy()
    assert np.array_equal(probabilities, expected)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert np.array_equal(model.predict(X[:7]), model.classes_[probabilities.argmax(1)])
    for copy in (pickle.loads(pickle.dumps(model)), clone(model).fit(X, hidden(y))):
        assert np.array_equal(copy.predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize(
    "names", [np.array(["red", "blue", "green"]), np.array([7, 30, 2]), [0.5, -2.0, 1.0]]
)
def test_labels_of_any_type(names):
    X, y = blobs()
    names = np.asarray(names)
    if names.dtype.kind == "f":
        names = names.round() + 3  # whole numbers, for floating-point labels must be
    model = small().fit(X, names[y])
    assert list(model.classes_) == sorted(names.tolist())
    assert (model.predict(X) == names[y]).mean() > 0.9
    mixed = np.where(np.arange(len(y)) < 60, names[y].astype(object), -1)
    assert list(small().fit(X, mixed).classes_) == sorted(names.tolist())


@pytest.mark.parametrize("mark", [None, np.nan, pd.NA, -1], ids=["None", "NaN", "NA", "-1"])
@pytest.mark.parametrize("names", [["red", "blue", "green"], [4, 0, 7]], ids=["text", "numbers"])
def test_all_marks_of_missing_labels_mean_the_same(names, mark):
    X, y = blobs()
    given = np.arange(len(y)) < 31
    labels = np.where(given, np.array(names, dtype=object)[y], mark)
    expected = np.where(given, np.argsort(np.argsort(names))[y], -1)
    forms = [labels, labels.tolist(), pd.Series(labels)]
    if isinstance(names[0], int):
        forms.append(np.where(given, np.array(names, dtype=float)[y], np.nan))
    for form in forms:
        model = small()
        _, codes = model._checked_training(X, form, reset=True)
        assert codes.tolist() == expected.tolist()
        assert list(model.classes_) == sorted(names)
    assert small(max_epochs=2).fit(X, labels).predict(X).shape == y.shape


@pytest.mark.parametrize("mark", ["", -1])
def test_marks_that_became_text_are_refused(mark):
    X, y = blobs()
    names = ["red", "blue", "green"]
    labels = np.array([names[label] if row < 31 else mark for row, label in enumerate(y)])
    assert labels.dtype.kind == "U"
    with pytest.raises(ValueError, match=rf"y\[31\] is the text '{mark}', which would be a class"):
        small().fit(X, labels)
    given = labels != str(mark)
    quick = small(max_epochs=1)
    assert list(quick.fit(X, np.where(given, labels, None)).classes_) == ["blue", "green", "red"]
    assert list(quick.fit(X, np.array(["-1", "0", "1"])[y]).classes_) == ["-1", "0", "1"]


def test_rows_without_labels_matter_and_frequencies_are_the_prior():
    X, y = blobs()
    labels = hidden(y)
    labels[:10][labels[:10] == 2] = -1
    model = small().fit(X, labels)
    counts = np.bincount(labels[labels >= 0])
    np.testing.assert_allclose(model.vae_.class_log_prior.exp(), counts / counts.sum(), rtol=1e-6)
    alone = small().fit(X[labels >= 0], labels[labels >= 0])
    assert not np.allclose(alone.predict_proba(X), model.predict_proba(X))


def test_warm_start_keeps_the_classes():
    X, y = blobs()
    model = small(warm_start=True).fit(X, y)
    model.fit(X, np.where(y == 1, -1, y))  # no label of a class
    assert list(model.classes_) == [0, 1, 2]
    assert model.n_iter_ == 40
    with pytest.raises(ValueError, match=r"classes that were not in the first fit: \[3\]"):
        model.fit(X, y + 1)


@pytest.mark.slow  # as test_grid_search_by_log_likelihood_without_labels does for VAETransformer
def test_a_search_in_two_processes():
    X, y = blobs(60)
    pipe = make_pipeline(StandardScaler(), small(max_epochs=10))
    grid = {"vaeclassifier__n_components": [1, 2]}
    search = GridSearchCV(pipe, grid, n_jobs=2, cv=2).fit(X, y)
    again = GridSearchCV(pipe, grid, cv=2).fit(X, y)
    assert np.array_equal(search.cv_results_["mean_test_score"], again.cv_results_["mean_test_score"])


def test_other_likelihoods_and_options():
    X, y = blobs()
    assert small(likelihood="student_t", standardize=False, early_stopping=True).fit(X, y).score(X, y) > 0.8
    bits = (blobs()[0] > 1).astype(float)
    assert small(likelihood="bernoulli").fit(bits, y).score(bits, y) > 0.7
    bits[5, 2] = 0.25
    with pytest.raises(ValueError, match=r'"bernoulli" takes 0 and 1 here; X\[5, 2\] is 0.25: round X'):
        small(likelihood="bernoulli").fit(bits, y)


def factory(features, latent, classes):
    network = {"context_dim": classes, "hidden_features": (8,)}
    return pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(latent),
        likelihood=pv.likelihoods.Normal(latent, (features,), **network),
        guide=pv.guides.DiagonalNormal((features,), latent, **network),
        classifier=pv.networks.MLP(features, classes),
        num_classes=classes,
    )


def plain(features, latent, classes):
    return pv.VAE(
        prior=pv.priors.StandardNormal(latent),
        likelihood=pv.likelihoods.Normal(latent, (features,)),
        guide=pv.guides.DiagonalNormal((features,), latent),
    )


def test_a_model_of_ones_own():
    X, y = blobs()
    assert small(vae_factory=factory).fit(X, y).score(X, y) > 0.8
    with pytest.raises(TypeError, match=r"must return a pyro_vae\.SemiSupervisedVAE; got VAE"):
        small(vae_factory=plain).fit(X, y)


def test_bad_labels():
    X, y = blobs()
    with pytest.raises(
        ValueError, match=r"at least 2 classes; got \[1\], and 80 times -1, which means missing"
    ):
        small().fit(X, np.where(y == 1, 1, -1))
    with pytest.raises(ValueError, match=r"at least 2 classes; got \[\]"):
        small().fit(X, np.full(len(y), -1))
    with pytest.raises(ValueError, match="Unknown label type"):
        small().fit(X, X[:, 0])
    with pytest.raises(ValueError, match="inconsistent numbers"):
        small().fit(X, y[:-1])
    with pytest.raises(ValueError, match="'classification_weight'"):
        small(classification_weight=-1.0).fit(X, y)
    with pytest.raises(NotFittedError):
        small().predict(X)


def test_the_score_is_over_the_rows_whose_label_is_given():
    X, classes = blobs()
    y = np.array(["red", "blue", "green"], dtype=object)[classes]
    model = small(max_epochs=1).fit(X, y)
    correct, given = model.predict(X) == y, np.arange(len(X)) % 3 > 0
    assert 0 < correct[given].mean() != correct.mean()
    weight = 1.0 + np.arange(len(X)) % 5
    half = np.where(given, y, None)
    assert model.score(X, half) == pytest.approx(correct[given].mean())
    assert model.score(X, half, weight) == pytest.approx(np.average(correct[given], weights=weight[given]))
    assert model.score(X, y) == pytest.approx(correct.mean())
