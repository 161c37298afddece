"""Impute a third of the values of tables of mixed columns: a VAE of `table_vae` against column mean or mode.

    uv run benchmarks/uses/tables.py

`wine` is scikit-learn's, some of its columns made coarse; `drawn` has 600 rows from a model of two latent
dimensions. Values are missing at random, the same ones for both methods. Errors are those of the missing
values: of numbers and counts squared, in units of the column's variance (of a log-normal column, of its
logarithm); of levels the share of wrong ones. Mean over the seeds ± standard error.
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_wine

import pyro_vae as pv
from pyro_vae.applications import impute, table_vae
from pyro_vae.data import Table
from pyro_vae.utils.display import aligned

FAMILIES = {
    "wine": {"magnesium": "counts", "ash": "ordinal"},
    "drawn": {"stars": "ordinal", "visits": "counts"},
}


def wine() -> pd.DataFrame:
    """Wine with one column coarse to five levels, one to two, and the cultivar as a name."""
    found = load_wine(as_frame=True)
    frame = found.data[
        ["alcohol", "malic_acid", "flavanoids", "color_intensity", "magnesium", "proline"]
    ].copy()
    frame["magnesium"] = frame["magnesium"].astype(int)
    frame["ash"] = pd.qcut(found.data["ash"], 5, labels=False) + 1
    frame["is_light"] = found.data["hue"] > found.data["hue"].median()
    frame["cultivar"] = found.target.map({0: "Barolo", 1: "Grignolino", 2: "Barbera"})
    return frame


def drawn() -> pd.DataFrame:
    """Rows of a known model: every column depends on two latent numbers and noise."""
    random, N = np.random.default_rng(0), 600
    z = random.normal(size=(N, 2))
    a, b = z.T
    scores = np.stack([2 * a, 2 * b, -a - b], 1) + random.gumbel(size=(N, 3))
    return pd.DataFrame(
        {
            "height": 170 + 8 * a + 3 * random.normal(size=N),
            "income": np.exp(10 + 0.8 * b + 0.3 * random.normal(size=N)),
            "change": 2 * (a - b) + random.standard_t(3, size=N),
            "visits": random.poisson(np.exp(0.7 + 0.7 * a)),
            "smokes": 2 * b + random.logistic(size=N) > 0,
            "town": np.array(["Bonn", "Jena", "Ulm"])[scores.argmax(1)],
            "stars": 1 + np.digitize(2 * (a + b) + random.logistic(size=N), [-3.0, -1.0, 1.0, 3.0]),
        }
    )


def errors(table: Table, found: torch.Tensor, missing: NDArray) -> dict[str, float]:
    """Return the error of each column over its missing values."""
    result = {}
    for place, column in enumerate(table.columns):
        x, guess = (values[:, place].numpy().astype(float) for values in (table.values, found))
        if column.levels:
            wrong = (x != guess).astype(float)
        else:
            x, guess = (np.log(x), np.log(guess)) if column.family == "log-normal" else (x, guess)
            wrong = (x - guess) ** 2 / x.var()
        result[f"{column.name}: {column.family}"] = float(wrong[missing[:, place]].mean())
    return result


def baseline(table: Table, holes: torch.Tensor) -> torch.Tensor:
    """Return the mean of each column, of the logarithm where it is log-normal, or its most frequent level."""
    found = holes.clone()
    for place, column in enumerate(table.columns):
        present = holes[:, place][~holes[:, place].isnan()]
        if column.levels:
            fill = present.mode().values
        else:
            fill = present.log().mean().exp() if column.family == "log-normal" else present.mean()
        found[:, place] = torch.where(holes[:, place].isnan(), fill, holes[:, place])
    return found


def by_vae(table: Table, holes: torch.Tensor, options: argparse.Namespace, seed: int) -> torch.Tensor:
    """Return means of numbers, medians of log-normal ones, and the most frequent levels, of draws."""
    torch.manual_seed(seed)
    vae = table_vae(table, options.latent_dim, hidden_features=(options.hidden,))
    settings = {"epochs": options.epochs, "batch_size": 64, "learning_rate": 3e-3, "seed": seed}
    pv.fit(vae, holes, missing="nan", estimator=pv.IWAE(10), progress=False, **settings)
    imputed = impute(vae, holes, num_particles=300, num_draws=200, method="importance", seed=seed)
    found = imputed.mean.clone()
    for place, column in enumerate(table.columns):
        if column.levels:
            found[:, place] = imputed.draws[..., place].mode(0).values
        elif column.family == "log-normal":
            found[:, place] = imputed.draws[..., place].median(0).values
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)

    for name in options.tables:
        frame = {"wine": wine, "drawn": drawn}[name]()
        whole = pv.data.table(frame, families=FAMILIES[name])
        started, found = time.perf_counter(), []
        for seed in range(options.seeds):
            missing = np.random.default_rng(seed).random(frame.shape) < 1 / 3
            # units are those of the values that are there
            table = pv.data.table(frame.mask(missing), families={c.name: c.family for c in whole.columns})
            assert [column.levels for column in table.columns] == [c.levels for c in whole.columns]
            holes = table.values
            both = by_vae(table, holes, options, seed), baseline(whole, holes)
            found.append([list(errors(whole, guess, missing).values()) for guess in both])
        numbers = np.array(found)  # (seeds, 2, columns)
        rows = []
        for place, column in enumerate(errors(whole, whole.values, missing)):
            ours, theirs = numbers[:, :, place].T
            rows.append([column, *map(estimate, (ours, theirs, ours - theirs))])
        print(f"{name}: {options.epochs} epochs, {time.perf_counter() - started:.0f} s")
        print("\n".join(aligned(["column", "VAE", "mean or mode", "difference"], rows, left=1)), flush=True)


def estimate(values: NDArray) -> str:
    """Return mean ± standard error."""
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


if __name__ == "__main__":
    main()
