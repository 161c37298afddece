"""A VAE of a table: built in its families and units, trained on holes, imputed as a data frame."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.applications import impute, table_vae

N, K = 60, 2


def mixed():
    """Columns that depend on one hidden number, a quarter of the values missing."""
    random = np.random.default_rng(0)
    z = random.normal(size=N)
    frame = pd.DataFrame(
        {
            "height": 170 + 9 * z + random.normal(size=N),
            "visits": random.poisson(np.exp(z)),
            "smokes": z + 0.3 * random.normal(size=N) > 0,
            "town": np.array(["Bonn", "Jena", "Ulm"])[np.digitize(z, [-0.5, 0.5])],
            "grade": pd.Categorical.from_codes(
                np.digitize(z, [-0.4, 0.4]), ["low", "mid", "top"], ordered=True
            ),
        },
        index=[f"row {number}" for number in range(N)],
    )
    return frame.astype({"visits": "Int64", "smokes": "boolean"}).mask(random.random(frame.shape) < 0.25)


def test_the_vae_has_the_families_units_and_names_of_the_table():
    table = pv.data.table(mixed())
    vae = table_vae(table, K, hidden_features=(7, 5))
    assert [tuple(column) for column in vae.likelihood.columns] == [
        ("normal", 0),
        (table.columns[1].family, 0),
        ("binary", 0),
        ("categorical", 3),
        ("ordinal", 3),
    ]
    x = torch.nan_to_num(table.values, nan=1.0)
    x[3, 2] = 7
    with pytest.raises(ValueError, match=r"x\[3, 2\] = 7 .*0 or 1, as column 'smokes' is binary"):
        vae.check_data(x)
    p = vae.decode(torch.zeros(1, K).double())
    height = mixed()["height"]
    assert p.mean[0, 0].item() == pytest.approx(height.mean(), abs=2 * height.std())
    assert p.stddev[0, 0].item() == pytest.approx(height.std(ddof=0), rel=0.02)
    assert [layer.out_features for layer in list(vae.likelihood.network)[1::2]] == [5, 7, 1 + 1 + 1 + 3 + 1]
    assert [layer.out_features for layer in list(vae.posterior.network.network)[1::2]] == [7, 5, 2 * K]


def test_a_table_with_holes_is_trained_saved_and_imputed(tmp_path):
    frame = mixed()
    table = pv.data.table(frame)
    torch.manual_seed(0)
    vae = table_vae(table, K, hidden_features=(16,))
    options = {
        "missing": "nan",
        "estimator": pv.IWAE(5),
        "epochs": 60,
        "batch_size": 20,
        "learning_rate": 0.01,
    }
    history = pv.fit(vae, table.values, progress=False, **options)
    assert history[-1].train_bound > history[0].train_bound + 1
    vae.save(tmp_path / "vae.pt")
    loaded = pv.VAE.load(tmp_path / "vae.pt")
    imputed = impute(loaded, table.values, num_particles=50, num_draws=21, method="importance")
    found = table.frame(imputed, index=table.index)
    assert not found.isna().any(axis=None)
    for name in frame:
        known = frame[name].notna()
        assert found[name][known].tolist() == frame[name][known].tolist()
    assert found.dtypes.tolist() == frame.dtypes.tolist()
    drawn = table.frame(vae.sample(9))
    assert drawn["town"].isin(["Bonn", "Jena", "Ulm"]).all()
    assert drawn.shape == (9, 5)


def test_what_is_not_a_table_is_refused():
    with pytest.raises(TypeError, match=r"what pyro_vae.data.table returns; got DataFrame"):
        table_vae(mixed(), K)
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        table_vae(pv.data.table(mixed()), 0)


def test_a_table_in_the_place_of_its_values_is_refused_with_the_remedy():
    table = pv.data.table(mixed())
    with pytest.raises(TypeError, match=r"got Table: pass its tensor, table.values"):
        pv.fit(table_vae(table, K), table, missing="nan", epochs=1)
