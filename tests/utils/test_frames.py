"""Data frames: the numbers of their columns give the results that an array gives, and come back as frames."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import pyro_vae as pv
from pyro_vae.applications import AnomalyDetector, anomaly_scores, impute
from pyro_vae.data.sources import as_source
from pyro_vae.utils import serialization
from pyro_vae.utils.frames import filled, frame_like, numbers, series_values

N, D, K = 7, 4, 2
ROWS = [f"row {number}" for number in range(N)]


def make(dtype=torch.float64):
    torch.manual_seed(1)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, (D,), hidden_features=(5,)),
        guide=pv.guides.DiagonalNormal((D,), K, hidden_features=(5,)),
    ).to(dtype)


def mixed(missing=False):
    """Columns of floats, integers, booleans and single floats, with an index."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "height": random.normal(size=N) / 3,
            "children": random.integers(0, 5, N),
            "insured": random.random(N) > 0.5,
            "wage": random.normal(size=N).astype(np.float32),
        },
        index=ROWS,
    )
    if missing:
        frame = frame.astype({"children": "Int64", "insured": "boolean"})
        frame.iloc[2, 0], frame.iloc[4, 1], frame.iloc[0, 2] = np.nan, pd.NA, pd.NA
    return frame


def array(frame):
    return np.array([[np.nan if pd.isna(value) else float(value) for value in row] for row in frame.values])


FRAMES = {
    "pandas": mixed,
    "nullable": lambda missing: mixed(missing).convert_dtypes(),
    "pyarrow": lambda missing: mixed(missing).convert_dtypes(dtype_backend="pyarrow"),
    "polars": lambda missing: pl.from_pandas(mixed(missing)),
}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", FRAMES)
def test_numbers_are_those_of_the_columns(kind, missing):
    np.testing.assert_array_equal(numbers(FRAMES[kind](missing)), array(mixed(missing)))


def test_columns_are_kept_in_a_file(tmp_path):
    vae, frame = make(), mixed()
    pv.fit(vae, frame, epochs=1, engine="eager", progress=False, checkpoint_dir=tmp_path)
    vae.save(tmp_path / "vae.pt")
    other = frame[frame.columns[::-1]]
    for path in (tmp_path / "vae.pt", tmp_path / "best.pt"):
        for loaded in (pv.VAE.load(path), pv.VAE.load(path, into=make())):
            assert torch.equal(loaded.encode(frame).mean, vae.encode(frame).mean)
            with pytest.raises(ValueError, match=r"training was on the columns \['height', "):
                pv.evaluate(loaded, other, num_particles=2, progress=False)
    into = pv.VAE.load(tmp_path / "vae.pt")
    make().save(tmp_path / "vae.pt")
    assert pv.VAE.load(tmp_path / "vae.pt", into=into).encode(other).batch_shape == (len(other),)
    content = serialization.read(tmp_path / "vae.pt", "VAE")
    del content["columns"]  # as files of earlier releases are
    serialization.write(tmp_path / "vae.pt", "VAE", content)
    assert pv.VAE.load(tmp_path / "vae.pt").encode(other).batch_shape == (len(other),)


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_frame_gives_what_its_array_gives(kind):
    frame, x = FRAMES[kind](False), array(mixed())
    found = []
    for data in (frame, x):
        vae = make()
        history = pv.fit(vae, data, epochs=1, batch_size=3, engine="eager", progress=False)
        detector = AnomalyDetector(vae, contamination=0.3, num_particles=3, score="elbo").fit(data)
        found.append(
            [
                history.column("train_bound"),
                pv.evaluate(vae, data, num_particles=3, progress=False).log_evidence,
                anomaly_scores(vae, data, num_particles=3).elbo.values.tolist(),
                detector.predict(data).tolist(),
            ]
        )
    assert found[0] == found[1]
    tensor = torch.from_numpy(x)
    assert torch.equal(vae.encode(frame).mean, vae.encode(tensor).mean)
    assert torch.equal(vae.reconstruct(frame), vae.reconstruct(tensor))
    assert torch.equal(vae.encode(x).mean, vae.encode(tensor).mean)
    assert make(torch.float32).encode(frame).mean.dtype == torch.float32


def test_encoding_refuses_a_frame_in_another_order():
    vae, frame = make(), mixed()
    pv.fit(vae, frame, epochs=1, engine="eager", progress=False)
    for method in (vae.encode, vae.reconstruct):
        with pytest.raises(ValueError, match="training was on the columns"):
            method(frame[frame.columns[::-1]])


def test_a_frame_with_holes_trains():
    runs = [
        pv.fit(make(), data, missing="nan", epochs=2, batch_size=3, progress=False).column("train_bound")
        for data in (mixed(missing=True), array(mixed(missing=True)))
    ]
    assert runs[0] == runs[1]


def test_a_comparison_takes_a_frame():
    options = {"num_repeats": 10, "progress": False}
    found = [
        pv.compare_estimators(make(torch.float32), data, [pv.STL()], **options).to_dataframe().value.tolist()
        for data in (mixed(), array(mixed()))
    ]
    assert found[0] == found[1]


def test_imputation_of_a_frame_is_a_frame():
    frame = mixed(missing=True)
    expected = impute(make(), array(frame), num_particles=30)
    found = impute(make(), frame, num_particles=30)
    for part in (found.mean, found.std):
        assert list(part.columns) == list(frame.columns)
        assert list(part.index) == ROWS
    np.testing.assert_allclose(array(found.mean), expected.mean.numpy(), rtol=1e-7)  # wage is of float32
    np.testing.assert_array_equal(array(found.std), expected.std.numpy())
    holes = frame.isna()
    assert (found.std.to_numpy() > 0).tolist() == holes.to_numpy().tolist()
    for name in frame:
        assert found.mean[name][~holes[name]].tolist() == frame[name][~holes[name]].tolist()
    assert found.mean["wage"].dtype == np.float32
    assert frame.equals(mixed(missing=True))  # which is left as it was


def test_imputation_in_single_precision_keeps_double_entries():
    frame = mixed().astype({"insured": float})
    frame.iloc[1, 2] = np.nan
    found = impute(make(torch.float32), frame, num_particles=30).mean
    assert found.drop(columns="insured").equals(frame.drop(columns="insured"))
    assert np.isfinite(found.iloc[1, 2])


def test_imputation_of_a_polars_frame_is_one():
    frame = pl.from_pandas(mixed(missing=True))
    found = impute(make(), frame, num_particles=30)
    expected = impute(make(), array(mixed(missing=True)), num_particles=30)
    assert isinstance(found.mean, pl.DataFrame)
    assert found.mean.columns == found.std.columns == frame.columns
    np.testing.assert_allclose(found.mean.to_numpy(), expected.mean.numpy(), rtol=1e-7)
    assert found.mean["wage"].equals(frame["wage"])


def test_filling_keeps_types_and_whole_numbers():
    frame = pd.DataFrame(
        {
            "single": np.array([0.1, np.nan], np.float32),
            "whole": np.array([2**53 + 1, 3]),
            "gone": pd.array([2**24 + 1, None], "Int32"),
        }
    )
    found = filled(frame, np.full((2, 3), 0.1))
    assert found["single"].tolist() == [np.float32(0.1)] * 2
    assert found["whole"].tolist() == [2**53 + 1, 3]
    assert found["gone"].tolist() == [2**24 + 1, 0.1]
    assert filled(frame, np.full((2, 1), 0.5), [2])["gone"].tolist() == [2**24 + 1, 0.5]
    assert filled(frame, np.full((2, 1), 0.5), [2])["single"].isna().tolist() == [False, True]
    of_polars = pl.DataFrame({"gone": pl.Series([2**24 + 1, None], dtype=pl.Int32)})
    assert filled(of_polars, np.full((2, 1), 0.1))["gone"].to_list() == [2**24 + 1, 0.1]


def test_names_that_stand_twice():
    frame = pd.DataFrame(np.array([[1.0, np.nan], [np.nan, 4.0]]), columns=["a", "a"])
    assert filled(frame, np.full((2, 2), 9.0)).to_numpy().tolist() == [[1, 9], [9, 4]]
    assert list(frame_like(frame, np.zeros((2, 2))).columns) == ["a", "a"]


def test_columns_that_are_not_numbers_are_named_and_the_remedy_works():
    frame = mixed().assign(town="Ulm", since=pd.Timestamp("2020-01-01"))
    message = r"the columns 'town' \(.*\), 'since' \(datetime.*by (frame.drop\(columns=\['town', 'since'\]\))"
    for call in (
        lambda: pv.fit(make(), frame, epochs=1, progress=False),
        lambda: pv.evaluate(make(), frame, progress=False),
        lambda: impute(make(), frame),
        lambda: make().encode(frame),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert make().encode(frame.drop(columns=["town", "since"])).mean.shape == (N, K)
    of_polars = pl.from_pandas(mixed().assign(town="Ulm"))
    with pytest.raises(TypeError, match=r"the column 'town' \(String\): .* by frame.drop\(\['town'\]\)"):
        make().encode(of_polars)
    assert make().encode(of_polars.drop(["town"])).mean.shape == (N, K)
    wide = pd.DataFrame([["a"] * 9])
    with pytest.raises(TypeError, match=r"'4' \(.*\), …: "):
        numbers(wide)


def test_what_takes_tensors_alone_says_how_to_make_one():
    frame = mixed()
    with pytest.raises(TypeError, match=r"torch.as_tensor\(numpy.asarray\(frame, dtype='float32'\)\)"):
        make().posterior(frame)
    assert torch.as_tensor(np.asarray(frame, dtype="float32")).shape == (N, D)


def test_series_are_arguments():
    classes = pd.Series([1, 0, 2], dtype="Int64")
    source = as_source((np.zeros((3, D)), classes), binarize=None, seed=0, dtype=torch.float32)
    _, y = source.batch(torch.arange(3), torch.Generator())
    assert y.dtype == torch.int64
    assert y.tolist() == [1, 0, 2]
    assert series_values(pd.Series([1.5, None], dtype="Float64")).tolist()[0] == 1.5
    assert series_values(pd.Series([True, False], dtype="boolean")).tolist() == [True, False]
    with pytest.raises(TypeError, match=r"a column of category: .*pandas.factorize\(column\)"):
        series_values(pd.Series(["a", "b"], dtype="category"))


def test_columns_in_another_order_are_refused_after_training():
    """Their positions would be taken for those of the columns trained on."""
    vae, frame = make(), mixed()
    turned = frame[[*frame.columns[::-1]]]
    with pytest.raises(ValueError, match="in this order; got"):
        pv.fit(vae, frame, validation=turned, epochs=1, progress=False)
    pv.fit(vae, frame, epochs=1, progress=False)
    pv.evaluate(vae, frame, num_particles=3, progress=False)
    pv.evaluate(vae, numbers(turned), num_particles=3, progress=False)  # an array has no names
    for call in (
        lambda: pv.evaluate(vae, turned, num_particles=3, progress=False),
        lambda: impute(vae, turned, num_particles=3),
        lambda: AnomalyDetector(vae).fit(turned),
        lambda: pv.evaluate(vae, frame.rename(columns={"wage": "pay"}), progress=False),
    ):
        with pytest.raises(ValueError, match=r"training was on the columns \['height'.*in this order; got"):
            call()
    pv.fit(vae, turned, epochs=1, progress=False)
    pv.evaluate(vae, turned, num_particles=3, progress=False)
