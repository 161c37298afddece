"""Impute half of the values of scikit-learn's wine and breast_cancer tables.

    uv run benchmarks/uses/missing.py                          # VAEImputer and the column means
    uv run benchmarks/uses/missing.py --trees                  # and ExtraTrees, iterated (minutes more)

Values are missing at random, the same ones for all methods. Prints the mean squared error over the missing
values, in units of the columns' spread, and how many of them the 90 % intervals of `VAEImputer.draws` cover:
mean over the masks ± standard error.
"""

import argparse
import time

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, SimpleImputer

from pyro_vae.applications.sklearn import VAEImputer
from pyro_vae.utils.display import aligned

TABLES = {"wine": load_wine, "breast_cancer": load_breast_cancer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--masks", type=int, default=5)
    parser.add_argument("--trees", action="store_true", help="also IterativeImputer of ExtraTrees")
    parser.add_argument("--epochs", type=int, default=VAEImputer().max_epochs)
    options = parser.parse_args()
    torch.set_num_threads(1)

    for name in options.tables:
        whole = TABLES[name]().data
        whole = (whole - whole.mean(0)) / whole.std(0)
        found: dict[str, list[float]] = {}
        covered, started = [], time.perf_counter()
        for mask in range(options.masks):
            missing = np.random.default_rng(mask).random(whole.shape) < 0.5
            X = np.where(missing, np.nan, whole)
            imputer = VAEImputer(max_epochs=options.epochs, random_state=mask).fit(X)
            models = {"VAEImputer": imputer, "column means": SimpleImputer().fit(X)}
            if options.trees:
                trees = ExtraTreesRegressor(20, random_state=mask, n_jobs=1)
                models["ExtraTrees"] = IterativeImputer(trees, max_iter=10, random_state=mask, tol=0).fit(X)
            for method, model in models.items():
                error = (model.transform(X) - whole)[missing]
                found.setdefault(method, []).append(float((error**2).mean()))
            low, high = np.quantile(imputer.draws(X, 200), [0.05, 0.95], axis=0)
            covered.append(float(((low <= whole) & (whole <= high))[missing].mean()))
        rows = [[method, estimate(np.array(errors)), ""] for method, errors in found.items()]
        rows[0][2] = estimate(np.array(covered))
        if options.trees:
            difference = np.subtract(found["VAEImputer"], found["ExtraTrees"])
            rows.append(["VAE − trees", estimate(difference), ""])
        print(f"{name}, {time.perf_counter() - started:.0f} s")
        print("\n".join(aligned(["method", "squared error", "covered by 90 %"], rows)), flush=True)


def estimate(values: NDArray) -> str:
    """Return mean ± standard error."""
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


if __name__ == "__main__":
    main()
