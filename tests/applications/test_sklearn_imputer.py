"""VAEImputer: what comes back, its options, what it agrees with, and bad input."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

import pyro_vae as pv
from pyro_vae.applications.sklearn import VAEImputer

SMALL = {"max_epochs": 3, "hidden_layer_sizes": (8,), "num_particles": 50, "random_state": 0}


def table(count=60, dtype=np.float64):
    """Five columns of unlike units, of rank 2 and noise, with a third missing; and the truth."""
    random = np.random.default_rng(0)
    whole = random.normal(size=(count, 2)) @ random.normal(size=(2, 5)) + 0.2 * random.normal(size=(count, 5))
    whole = (whole * [1, 10, 100, 0.01, 1] + [0, 5, -1000, 0, 3]).astype(dtype)
    holes = np.where(random.random((count, 5)) < 0.3, np.nan, whole).astype(dtype)
    return holes, whole


def small(n_components=2, **parameters):
    return VAEImputer(n_components, **{**SMALL, **parameters})


def test_observed_values_come_back_bit_for_bit():
    for dtype in (np.float32, np.float64):
        X, _ = table(dtype=dtype)
        X[4] = np.nan
        imputer = small().fit(X)
        for filled in (imputer.transform(X), *imputer.draws(X, 3)):
            assert filled.dtype == dtype
            assert np.isfinite(filled).all()
            assert np.array_equal(filled[~np.isnan(X)], X[~np.isnan(X)])
        whole = table(dtype=dtype)[1]
        assert np.array_equal(imputer.transform(whole), whole)


def test_it_imputes_by_impute_in_standard_units():
    X, _ = table()
    imputer = small(method="importance").fit(X)
    centre, spread = np.nanmean(X, 0), np.nanstd(X, 0)
    rows = np.isnan(X).any(1)
    found = pv.applications.impute(
        imputer.vae_,
        torch.from_numpy((X[rows] - centre) / spread),
        num_particles=50,
        num_draws=7,
        method="importance",
        seed=imputer._seed_of(94),
    )
    expected = found.draws.numpy() * spread + centre
    missing = np.isnan(X[rows])
    np.testing.assert_allclose(imputer.draws(X, 7)[:, rows][:, missing], expected[:, missing], rtol=1e-12)
    one = clone(imputer).set_params(sample_posterior=True).fit(X)
    assert np.array_equal(one.transform(X), imputer.draws(X, 1)[0])
    assert not np.array_equal(one.transform(X), imputer.transform(X))


def test_it_is_better_than_the_means_and_its_intervals_cover():
    X, whole = table(300)
    imputer = VAEImputer(2, random_state=0, max_epochs=60, learning_rate=5e-3).fit(X)
    missing, spread = np.isnan(X), np.nanstd(X, 0)
    error = ((imputer.transform(X) - whole) / spread)[missing]
    of_means = ((np.nanmean(X, 0) - whole) / spread)[missing]
    assert (error**2).mean() < 0.4 * (of_means**2).mean()
    low, high = np.quantile(imputer.draws(X, 100), [0.05, 0.95], axis=0)
    assert 0.8 < ((low <= whole) & (whole <= high))[missing].mean() < 0.98


def test_empty_columns_are_dropped_or_filled_with_0():
    X, _ = table()
    X[:, 2] = np.nan
    assert small().fit(X).transform(X).shape == (60, 4)
    assert list(small().fit(X).get_feature_names_out()) == ["x0", "x1", "x3", "x4"]
    kept = small(keep_empty_features=True).fit(X)
    assert not kept.transform(X)[:, 2].any()
    assert np.array_equal(kept.transform(X)[:, [0, 1, 3, 4]], small().fit(X).transform(X))
    later = table()[1]
    assert np.array_equal(kept.transform(later), later)
    with pytest.raises(ValueError, match="every value of X is missing"):
        small().fit(np.full((5, 3), np.nan))


def test_indicators_and_names():
    X, _ = table()
    X[:, 1] = 7.0
    frame = pd.DataFrame(X, columns=list("abcde"))
    imputer = small(add_indicator=True).set_output(transform="pandas").fit(frame)
    filled = imputer.transform(frame)
    assert list(filled.columns) == [*"abcde", *(f"missingindicator_{name}" for name in "acde")]
    assert np.array_equal(filled.to_numpy()[:, 5:], np.isnan(X)[:, [0, 2, 3, 4]])
    assert (filled["b"] == 7).all()
    with pytest.raises(ValueError, match="feature names should match"):
        imputer.transform(frame.rename(columns={"a": "z"}))
    frame.loc[3, "b"] = np.nan  # missing at transform alone
    assert imputer.transform(frame).loc[3, "b"] == pytest.approx(7, abs=0.5)


def test_a_trained_vae_and_copies():
    X, _ = table()
    imputer = small().fit(X)
    for copy in (pickle.loads(pickle.dumps(imputer)), clone(imputer).fit(X)):
        assert np.array_equal(copy.transform(X), imputer.transform(X))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Normal(3, (5,)),
        guide=pv.guides.DiagonalNormal((5,), 3),
    )
    own = VAEImputer.from_vae(vae, num_particles=20, add_indicator=True)
    assert own.transform(X[:7]).shape == (7, 10)
    with pytest.raises(ValueError, match="warm_start=True"):
        own.fit(X)


@pytest.mark.slow  # as test_grid_search_by_log_likelihood_without_labels does for VAETransformer
def test_a_search_in_two_processes():
    X, y = load_wine(return_X_y=True)
    X, y = X[::3], y[::3]
    X = np.where(np.random.default_rng(0).random(X.shape) < 0.3, np.nan, X)
    pipe = make_pipeline(VAEImputer(max_epochs=2, num_particles=20, random_state=0), KNeighborsClassifier())
    grid = {"vaeimputer__n_components": [1, 3]}
    search = GridSearchCV(pipe, grid, n_jobs=2, cv=2).fit(X, y)
    again = GridSearchCV(pipe, grid, cv=2).fit(X, y)
    assert np.array_equal(search.cv_results_["mean_test_score"], again.cv_results_["mean_test_score"])


def test_other_likelihoods():
    X = np.random.default_rng(0).poisson(3, size=(50, 4)).astype(float)
    holes = np.where(np.random.default_rng(1).random(X.shape) < 0.3, np.nan, X)
    for likelihood in ("normal", "poisson", "negative_binomial"):
        drawn = small(likelihood=likelihood).fit(holes).draws(holes, 2)
        assert np.isfinite(drawn).all()
        assert likelihood == "normal" or (drawn == drawn.round()).all()
    bits = np.where(np.isnan(holes), np.nan, holes > 2)
    assert set(np.unique(small(likelihood="bernoulli").fit(bits).draws(bits, 2))) == {0, 1}


def test_bad_input():
    X, _ = table()
    imputer = small().fit(X)
    with pytest.raises(NotFittedError):
        small().transform(X)
    for wrong, message in [(np.where(np.isnan(X), math.inf, X), "infinity"), (X[:, :4], "4 features")]:
        with pytest.raises(ValueError, match=message):
            imputer.transform(wrong)
    with pytest.raises(ValueError, match="'method'"):
        small(method="mice").fit(X)
    with pytest.raises(ValueError, match="n_draws must be at least 1"):
        imputer.draws(X, 0)
