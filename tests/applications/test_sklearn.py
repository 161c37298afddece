"""The scikit-learn estimators: scikit-learn's own checks, densities, reproducibility, searches, bad input."""

import io
import math
import pickle
import runpy
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from joblib import Parallel, delayed
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_vae as pv
from pyro_vae.applications.sklearn import (
    VAEClassifier,
    VAEImputer,
    VAEOutlierDetector,
    VAETransformer,
    log_evidence,
)
from pyro_vae.applications.sklearn import estimator as estimator_module

SMALL = {"max_epochs": 3, "hidden_layer_sizes": (8,), "num_particles": 5}
ESTIMATORS = [VAETransformer, VAEOutlierDetector]
both = pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)


def table(count=60, dtype=np.float64, seed=0):
    """Columns of unlike units, and a nonlinear dependence."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(count, 2))
    y = np.column_stack([z[:, 0], z[:, 0] ** 2, z[:, 1], z.sum(1), random.normal(size=count)])
    return (y * [1, 10, 100, 0.01, 1] + [0, 5, -1000, 0, 3] + 0.1 * random.normal(size=(count, 5))).astype(
        dtype
    )


def small(kind=VAETransformer, **parameters):
    return kind(**{**SMALL, "random_state": 0, **parameters})


def linear(features, latent):
    """A VAE whose guide and likelihood are single linear maps."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(latent),
        likelihood=pv.likelihoods.Normal(latent, (features,), hidden_features=()),
        guide=pv.guides.DiagonalNormal((features,), latent, hidden_features=()),
    )


def flow(features, latent):
    return linear(features, latent).with_guide(pv.guides.Flow((features,), latent, hidden_features=(4,)))


CHECKED = [kind(**SMALL) for kind in (*ESTIMATORS, VAEImputer)]
CHECKED += [VAEClassifier(hidden_layer_sizes=(8,), learning_rate=0.1, max_epochs=10)]
# scikit-learn exempts its own semi-supervised estimators from labels of -1 and 1 by their names
MISSING_LABELS = {"check_classifiers_classes": "labels of -1 are missing"}


@pytest.fixture
def _eager(monkeypatch):
    """Train without a graph, which takes the same steps, and longer to record than a check's few steps."""
    monkeypatch.setattr(
        estimator_module, "fit", lambda *data, **options: pv.fit(*data, **options | {"engine": "eager"})
    )


@pytest.mark.usefixtures("_eager")
@parametrize_with_checks(
    CHECKED,
    expected_failed_checks=lambda kind: MISSING_LABELS if isinstance(kind, VAEClassifier) else {},
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_shapes_names_and_attributes():
    X = pd.DataFrame(table(), columns=list("abcde"))
    model = small(n_components=3).set_output(transform="pandas").fit(X)
    Z = model.transform(X.iloc[:7])
    assert list(Z.columns) == [f"vaetransformer{k}" for k in range(3)] == list(model.get_feature_names_out())
    assert list(model.feature_names_in_) == list("abcde")
    assert model.inverse_transform(Z.to_numpy()).shape == (7, 5)
    assert model.sample(4).shape == (4, 5)
    assert isinstance(model.vae_, pv.VAE)
    assert model.n_iter_ == len(model.history_) == 3
    assert model.kl_per_dimension_.shape == (3,)
    assert 0 <= model.active_units_ <= 3


def test_transform_is_the_mean_of_the_guide():
    X = table()
    model = small(n_components=3).fit(X)
    x = torch.tensor((X[:7] - X.mean(0)) / X.std(0))
    np.testing.assert_allclose(model.transform(X[:7]), model.vae_.encode(x).mean.detach(), rtol=1e-10)


def test_the_score_is_a_density_in_the_units_of_x():
    """One latent dimension, an exact guide: the score is the normal density, and changes by log |scale|."""
    X = table()
    model = small(hidden_layer_sizes=(), max_epochs=1, learning_rate=1e-12, early_stopping=False).fit(X)
    network = model.vae_.likelihood.network.linear
    W = network.weight.detach().numpy() * X.std(0)[:, None]
    noise = (model.vae_.likelihood.scale.detach().numpy() * X.std(0)) ** 2
    covariance, difference = W @ W.T + np.diag(noise), X[:9] - X.mean(0)
    expected = -0.5 * (
        (difference * np.linalg.solve(covariance, difference.T).T).sum(1)
        + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    np.testing.assert_allclose(model.score_samples(X[:9]), expected, atol=1e-8)
    assert model.score(X[:9]) == pytest.approx(expected.mean(), abs=1e-8)


@pytest.mark.parametrize("standardize", [True, False])
def test_changing_units_changes_the_density_by_the_jacobian(standardize):
    X = table()
    first = small(standardize=standardize).fit(X)
    factor = 1000.0
    second = small(standardize=standardize).fit(factor * X + 7)
    expected = first.score_samples(X) - 5 * math.log(factor)
    np.testing.assert_allclose(second.score_samples(factor * X + 7), expected, atol=1e-6)


def test_the_density_integrates_to_one():
    X = table()[:, :1]
    model = small(n_components=2, num_particles=200, max_epochs=30).fit(X)
    grid = np.linspace(-8, 8, 801)[:, None]
    assert np.exp(model.score_samples(grid)).sum() * 0.02 == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factory", [linear, flow], ids=["normal", "flow"])
def test_a_score_depends_on_its_row_alone(factory):
    vae = factory(5, 2).double()
    x = torch.randn(11, 5, dtype=torch.float64)
    together = log_evidence(vae, x, num_particles=7, seed=3)
    torch.testing.assert_close(log_evidence(vae, x.flip(0), num_particles=7, seed=3).flip(0), together)
    torch.testing.assert_close(log_evidence(vae, x[4:5], num_particles=7, seed=3), together[4:5])
    assert not torch.allclose(log_evidence(vae, x, num_particles=7, seed=4), together, atol=1e-6)


def test_the_score_agrees_with_evaluate():
    vae, x = linear(5, 2).double(), torch.randn(11, 5, dtype=torch.float64)
    report = pv.evaluate(vae, x, num_particles=20_000, progress=False)
    value = log_evidence(vae, x, num_particles=20_000, seed=0)
    error = 5 * math.sqrt(2) * report.per_datum.log_evidence_mc_se
    assert ((value - report.per_datum.log_evidence).abs() < error).all()


def test_sample_has_the_units_of_x_and_its_own_random_state():
    X = table(400)
    model = small(max_epochs=20).fit(X)
    drawn = model.sample(2000)
    np.testing.assert_allclose(drawn.mean(0), X.mean(0), atol=0.3 * X.std(0).max())
    assert ((drawn.std(0) / X.std(0) > 0.7) & (drawn.std(0) / X.std(0) < 1.4)).all()
    assert np.array_equal(model.sample(3), model.sample(3))
    assert not np.array_equal(model.sample(3), model.sample(3, random_state=1))


@both
def test_float32_stays_float32(kind):
    X = table(dtype=np.float32)
    model = small(kind).fit(X)
    assert next(model.vae_.parameters()).dtype == torch.float32
    if kind is VAETransformer:
        Z = model.transform(X)
        assert Z.dtype == model.inverse_transform(Z).dtype == np.float32
        assert model.transform(X.astype(np.float64)).dtype == np.float64


def test_constant_columns_and_few_rows():
    X = table(9)
    X[:, 2] = 7.0
    model = small().fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    np.testing.assert_allclose(model.inverse_transform(model.transform(X))[:, 2], 7, atol=0.1)
    other = X.copy()
    other[:, 2] = 8.0
    assert (model.score_samples(other) < model.score_samples(X)).all()
    for rows in (2, 3):
        assert small(n_components=4).fit(X[:rows]).transform(X).shape == (9, 4)
    assert np.isfinite(small(standardize=False).fit(np.full((6, 3), 2.0)).score(np.full((2, 3), 2.0)))


def test_early_stopping_returns_to_the_best_epoch():
    X = table(200)
    model = small(max_epochs=300, n_iter_no_change=4, learning_rate=0.03, batch_size=32).fit(X)
    elbos = model.history_.column("validation_elbo")
    assert model.n_iter_ == elbos.index(max(elbos)) + 1 + 4 < 300
    assert all(
        math.isnan(elbo) for elbo in small(early_stopping=False).fit(X).history_.column("validation_elbo")
    )


def test_warm_start_continues_and_cold_start_does_not():
    X = table()
    model = small(warm_start=True).fit(X)
    vae, first = model.vae_, pickle.dumps(model)
    model.fit(X)
    assert model.vae_ is vae
    assert model.history_.column("epoch") == list(range(1, 7))
    assert model.n_iter_ == 6
    resumed = pickle.loads(first).fit(X)  # with the state of the optimiser
    assert np.array_equal(resumed.transform(X), model.transform(X))
    forgetful = pickle.loads(first)
    forgetful._optimizer = torch.optim.Adam(forgetful.vae_.parameters(), forgetful.learning_rate)
    assert not np.array_equal(forgetful.fit(X).transform(X), model.transform(X))
    cold = small().fit(X)
    before = cold.transform(X)
    assert np.array_equal(cold.fit(X).transform(X), before)


def test_partial_fit_takes_one_epoch_and_keeps_centre_and_optimiser():
    X = table()
    model = small().partial_fit(X[:30])
    centre = model.offset_x_
    resumed = pickle.loads(pickle.dumps(model)).partial_fit(X[30:])
    model.partial_fit(X[30:])
    assert model.n_iter_ == 2
    assert np.array_equal(model.offset_x_, centre)
    assert np.array_equal(model.transform(X), resumed.transform(X))
    model.partial_fit(X[:1])
    for _ in range(10):
        model.partial_fit(X)
    assert model.score(X) > resumed.score(X)


@both
def test_copies_are_equal_to_the_bit(kind):
    X = table()
    model = small(kind).fit(X)
    file = io.BytesIO()
    joblib.dump(model, file)
    file.seek(0)
    for copy in (pickle.loads(pickle.dumps(model)), joblib.load(file), clone(model).fit(X)):
        assert np.array_equal(copy.score_samples(X), model.score_samples(X))
        if kind is VAETransformer:
            assert np.array_equal(copy.transform(X), model.transform(X))


def test_results_do_not_depend_on_global_generators_or_change_them():
    X = table()
    first = small().fit(X)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    second = small().fit(X)
    assert np.array_equal(first.transform(X), second.transform(X))
    assert np.array_equal(first.sample(3), second.sample(3))
    assert np.array_equal(first.score_samples(X), second.score_samples(X))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert not np.array_equal(small(random_state=1).fit(X).transform(X), first.transform(X))


@pytest.mark.slow
def test_workers_give_the_same_results():
    X = load_wine().data
    models = [VAETransformer(2, max_epochs=4, random_state=seed) for seed in (0, 1, 0)]
    there = Parallel(n_jobs=2)(delayed(model.fit)(X) for model in models)
    here = [model.fit(X) for model in models]
    for one, other in zip(there, here, strict=True):
        assert np.array_equal(one.score_samples(X), other.score_samples(X))
    assert not np.array_equal(here[0].transform(X), here[1].transform(X))


@pytest.mark.slow
def test_grid_search_by_log_likelihood_without_labels():
    random = np.random.default_rng(0)
    X = random.normal(size=(240, 3)) @ random.normal(size=(3, 8)) + 0.1 * random.normal(size=(240, 8))
    grid = {"n_components": [1, 3]}
    search = GridSearchCV(small(), grid, n_jobs=2, cv=3).fit(X)
    assert search.best_params_ == {"n_components": 3}
    again = GridSearchCV(small(), grid, cv=3).fit(X)
    assert np.array_equal(search.cv_results_["mean_test_score"], again.cv_results_["mean_test_score"])


def test_a_pipeline_with_a_classifier():
    X, y = load_wine(return_X_y=True)
    pipe = make_pipeline(VAETransformer(random_state=0, max_epochs=20), KNeighborsClassifier())
    search = GridSearchCV(pipe, {"vaetransformer__n_components": [1, 3]}, cv=3).fit(X, y)
    assert search.best_score_ > 0.9


@pytest.mark.parametrize("seed", range(2))
def test_held_out_rows_are_likelier_than_under_pca(seed):
    X = load_breast_cancer().data
    order = np.random.default_rng(seed).permutation(len(X))
    train, test = X[order[:420]], X[order[420:]]
    scale = train.std(0)
    pca = PCA(2).fit(train / scale).score(test / scale) - np.log(scale).sum()
    assert VAETransformer(2, random_state=seed).fit(train).score(test) > pca + 5


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "poisson", "negative_binomial"])
def test_other_likelihoods(likelihood):
    random = np.random.default_rng(0)
    X = random.poisson(3, size=(50, 6)).astype(float)
    if "bernoulli" in likelihood:
        X = (X > 2).astype(float)
    model = small(likelihood=likelihood).fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    assert model.inverse_transform(model.transform(X)).min() >= 0
    if "bernoulli" not in likelihood:
        with pytest.raises(ValueError, match="support"):
            small(likelihood=likelihood).fit(X - 4)


def test_bernoulli_trains_on_probabilities_and_scores_bits():
    X = np.random.default_rng(0).uniform(size=(50, 6))
    model = small(likelihood="bernoulli").fit(X)
    assert model.transform(X).shape == (50, 2)
    with pytest.raises(ValueError, match="round X"):
        model.score_samples(X)
    assert np.isfinite(model.score_samples(X.round())).all()
    X[7, 4], X[9, 1] = -0.5, 3
    for likelihood in ("bernoulli", "continuous_bernoulli"):
        with pytest.raises(
            ValueError, match=f'"{likelihood}" takes numbers in .0, 1.; X.7, 4. is -0.5: scale'
        ):
            small(likelihood=likelihood).fit(X)
        assert small(likelihood=likelihood).fit(MinMaxScaler(clip=True).fit_transform(X)).n_iter_


def test_a_trained_vae_is_used_as_it_is():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Normal(3, (2, 4)),
        guide=pv.guides.DiagonalNormal((2, 4), 3),
    )
    X = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    model = VAETransformer.from_vae(vae, random_state=0, max_epochs=2)
    assert model.vae_ is vae
    expected = vae.encode(torch.tensor(X).reshape(9, 2, 4)).mean.detach()
    assert np.array_equal(model.transform(X), expected)
    assert model.inverse_transform(model.transform(X)).shape == (9, 8)
    with pytest.raises(ValueError, match="warm_start=True"):
        model.fit(X)
    model.set_params(warm_start=True).fit(X)
    assert model.vae_ is vae
    assert clone(model).set_params(warm_start=False).fit(X).vae_ is not vae
    with pytest.raises(TypeError, match="from_vae takes a pyro_vae.VAE; got int"):
        VAETransformer.from_vae(3)


def test_vae_factory():
    X = table()
    model = small(vae_factory=linear, n_components=3).fit(X)
    assert isinstance(model.vae_.likelihood, pv.likelihoods.Normal)
    assert np.isfinite(pickle.loads(pickle.dumps(model)).score_samples(X)).all()
    with pytest.raises(ValueError, match="no mean in closed form"):
        small(vae_factory=flow).fit(X).transform(X)
    with pytest.raises(TypeError, match="must return a pyro_vae.VAE; got NoneType"):
        small(vae_factory=no_vae).fit(X)
    with pytest.raises(ValueError, match=r"examples of shape \(6,\), 6 values; X has 5 columns"):
        small(vae_factory=too_wide).fit(X)


def no_vae(features, latent):
    return None


def too_wide(features, latent):
    return linear(features + 1, latent)


@both
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_components": 0}, "'n_components'"),
        ({"likelihood": "gaussian"}, "'likelihood'"),
        ({"hidden_layer_sizes": 8}, "'hidden_layer_sizes'"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden_features"),
        ({"learning_rate": -1.0}, "'learning_rate'"),
        ({"validation_fraction": 1.0}, "'validation_fraction'"),
        ({"vae_factory": 3}, "'vae_factory'"),
        ({"random_state": "a"}, "'random_state'"),
    ],
    ids=str,
)
def test_bad_parameters(kind, parameters, message):
    model = small(kind, **parameters)
    with pytest.raises((ValueError, TypeError), match=message):
        model.fit(table())
    with pytest.raises(NotFittedError):
        model.score_samples(table())


def test_bad_data():
    X = table()
    model = small().fit(pd.DataFrame(X, columns=list("abcde")))
    with pytest.raises(ValueError, match="feature names should match"):
        model.transform(pd.DataFrame(X, columns=list("abcdf")))
    model = small().fit(X)
    for wrong, message in [
        (np.where(X[3, 1] == X, np.nan, X), "contains NaN"),
        (np.where(X[3, 1] == X, np.inf, X), "infinity"),
        (X[:, :4], "4 features"),
        (X[0], "Reshape your data"),
        (X[:0], "0 sample"),
        (X.astype(str).astype(object) + "a", "could not convert|unable to"),
    ]:
        for method in (model.transform, model.score_samples):
            with pytest.raises(ValueError, match=message):
                method(wrong)
    with pytest.raises(TypeError, match="[Ss]parse"):
        model.transform(csr_matrix(X))
    with pytest.raises(ValueError, match="2 latent values"):
        model.inverse_transform(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="variance of column 1 of X overflows"):
        small().fit(X * [1, 1e300, 1, 1, 1])


def test_a_failed_fit_leaves_the_estimator_as_it_was():
    X = table()
    model = small(vae_factory=broken)
    with pytest.raises(ValueError, match="nan"):
        model.fit(X)
    with pytest.raises(NotFittedError):
        model.transform(X)
    model.set_params(vae_factory=None).fit(X)
    before = model.transform(X)
    with pytest.raises(ValueError, match="nan"):
        model.set_params(vae_factory=broken).fit(X)
    assert np.array_equal(model.transform(X), before)


def broken(features, latent):
    """Return a VAE that fails at the first step."""
    vae = linear(features, latent)
    torch.nn.init.constant_(vae.likelihood.network[-1].bias, torch.nan)
    return vae


def test_outliers():
    X = table(300)
    detector = small(VAEOutlierDetector, contamination=0.05, max_epochs=20).fit(X)
    outliers = np.tile(X.mean(0), (4, 1)) + 8 * X.std(0) * [[1, 0, 0, -1, 0]]
    assert (detector.predict(outliers) == -1).all()
    assert (detector.decision_function(outliers) < 0).all()
    np.testing.assert_allclose(detector.decision_function(X), detector.score_samples(X) - detector.offset_)
    assert (detector.predict(X) == -1).mean() == pytest.approx(0.05, abs=1 / 300)
    fresh = table(400, seed=1)
    detector.calibrate(fresh)
    assert (detector.predict(fresh) == -1).mean() == pytest.approx(0.05, abs=1 / 400)


def test_auto_sets_the_threshold_by_rows_that_are_held_out():
    X = table(300)
    detector = small(VAEOutlierDetector, contamination="auto", max_epochs=20).fit(pd.DataFrame(X))
    held_out = np.sort(np.random.default_rng(0).permutation(300)[:60])
    rest = np.setdiff1d(np.arange(300), held_out)
    trained = small(max_epochs=20).fit(X[rest])
    scores = trained.score_samples(X[held_out])
    assert np.allclose(detector.score_samples(X[held_out]), scores, rtol=1e-5)  # training has not seen them
    assert detector.offset_ == pytest.approx(np.sort(scores)[2], rel=1e-5)  # 0.05 × 61 = 3.05
    fresh = table(2000, seed=1)
    assert (detector.predict(fresh) == -1).mean() < 0.12  # about 0.05, over the draw of the 60 too
    for count, rank in ((50, 0), (10, 0)):  # of 19 and of 5 rows
        detector = small(VAEOutlierDetector, contamination="auto").fit(X[:count])
        held_out = np.random.default_rng(0).permutation(count)[: min(19, count // 2)]
        assert detector.offset_ == pytest.approx(np.sort(detector.score_samples(X[held_out]))[rank])
    with pytest.raises(ValueError, match="at least 4 samples"):
        small(VAEOutlierDetector, contamination="auto").fit(X[:3])
    partly = small(VAEOutlierDetector, contamination="auto").partial_fit(X)
    with pytest.raises(NotFittedError, match=r"calibrate\(X\)"):
        partly.predict(X)
    assert partly.calibrate(X[:19]).offset_ == partly.score_samples(X[:19]).min()


def test_a_detector_whose_threshold_fails_stays_unfitted():
    detector = small(VAEOutlierDetector, likelihood="bernoulli")
    with pytest.raises(ValueError, match="round X"):
        detector.fit(np.random.default_rng(0).uniform(size=(50, 6)))
    with pytest.raises(NotFittedError):
        detector.score_samples(np.zeros((3, 6)))


def test_a_detector_around_a_trained_vae_is_calibrated():
    detector = VAEOutlierDetector.from_vae(linear(5, 2), contamination=0.2)
    X = np.random.default_rng(0).normal(size=(50, 5))
    with pytest.raises(NotFittedError, match=r"call fit, or calibrate\(X\)"):
        detector.predict(X)
    assert (detector.calibrate(X).predict(X) == -1).sum() == 10


def test_the_benchmark(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "uses" / "scikit_learn.py"
    options = ["--part", "tables", "--seeds", "2", "--components", "1", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.count("VAE − PCA, paired") == 3
