"""Outliers of breast_cancer and of single digits, against six other methods; false alarms of p-values.

    uv run benchmarks/uses/anomalies.py --part breast      # benign rows are normal
    uv run benchmarks/uses/anomalies.py --part digits      # each digit in turn is normal
    uv run benchmarks/uses/anomalies.py --part alarms      # p-values on real data

Areas under the ROC curve: mean over splits (breast_cancer), or over the ten digits, ± standard error, and the
difference from `VAEOutlierDetector`, paired. All get standardised columns, or pixels (digits), and the same
number of components.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import ShuffleSplit
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM

import pyro_vae as pv
from pyro_vae.applications.sklearn import VAEOutlierDetector
from pyro_vae.utils.display import aligned

Scores = Callable[[NDArray], NDArray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=("breast", "digits", "alarms"), required=True)
    parser.add_argument("--components", type=int, help="default: 2 (breast), 16 (digits)")
    parser.add_argument("--splits", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    {"breast": breast, "digits": digits, "alarms": alarms}[options.part](options)
    print(f"{time.perf_counter() - started:.0f} s")


def breast(options: argparse.Namespace) -> None:
    """Train on half of the benign rows; the other half against all malignant ones."""
    X, y = load_breast_cancer(return_X_y=True)
    benign, malignant = X[y == 1], X[y == 0]
    found: dict[str, list[float]] = {}
    for seed, (train, test) in enumerate(
        ShuffleSplit(options.splits, test_size=0.5, random_state=0).split(benign)
    ):
        centre, spread = benign[train].mean(0), benign[train].std(0)
        parts = [(part - centre) / spread for part in (benign[train], benign[test], malignant)]
        vae = VAEOutlierDetector(options.components or 2, random_state=seed)
        compare(found, vae, *parts)
    report(found)


def digits(options: argparse.Namespace) -> None:
    """Train on the 400 images of each digit; 100 others of it against 900 of the other digits."""
    train, test = (pv.data.load("digits", split=split) for split in ("train", "test"))
    X, X_test = (images[:].flatten(1).double().numpy() for images in (train, test))
    y, y_test = (np.asarray(images.labels) for images in (train, test))
    found: dict[str, list[float]] = {}
    for digit in range(10):
        vae = VAEOutlierDetector(options.components or 16, standardize=False, random_state=digit)
        compare(found, vae, X[y == digit], X_test[y_test == digit], X_test[y_test != digit])
    report(found)


def compare(
    found: dict[str, list[float]], vae: VAEOutlierDetector, train: NDArray, normal: NDArray, odd: NDArray
) -> None:
    """Add the area under the ROC curve of each method."""
    rows, is_odd = np.vstack([normal, odd]), np.arange(len(normal) + len(odd)) >= len(normal)
    for name, score in methods(vae, train).items():
        found.setdefault(name, []).append(float(roc_auc_score(is_odd, -score(rows))))


def methods(vae: VAEOutlierDetector, train: NDArray) -> dict[str, Scores]:
    """Fit all methods and return their scores, higher = more normal."""
    k = vae.n_components
    pca = PCA(k).fit(train)
    found: dict[str, Scores] = {
        "IsolationForest": IsolationForest(random_state=0).fit(train).score_samples,
        "LocalOutlierFactor": LocalOutlierFactor(novelty=True).fit(train).score_samples,
        "OneClassSVM": OneClassSVM().fit(train).score_samples,
        "PCA reconstruction": lambda X: -((X - pca.inverse_transform(pca.transform(X))) ** 2).sum(1),
        "PPCA": pca.score_samples,
        "FactorAnalysis": FactorAnalysis(k).fit(train).score_samples,
    }
    vae.fit(train)
    found["VAEOutlierDetector"] = vae.score_samples
    # the default detector of the package around the same VAE; it has seen these rows, for lack of others
    scaled = torch.from_numpy((train - vae.offset_x_) / vae.scale_x_)
    detector = pv.applications.AnomalyDetector(vae.vae_, contamination="auto").fit(scaled, scaled)
    found["AnomalyDetector"] = lambda X: detector.score_samples(
        torch.from_numpy((X - vae.offset_x_) / vae.scale_x_)
    ).numpy()
    return found


def alarms(options: argparse.Namespace) -> None:
    """Print how often p-values of new normal examples are at most α."""
    X, y = load_breast_cancer(return_X_y=True)
    images = pv.data.load("digits", split="train")[:].flatten(1).double().numpy()
    tables = {"benign rows": X[y == 1], "wine": load_wine().data, "digits": images[:1200]}
    rows = []
    for name, data in tables.items():
        rates: list[list[float]] = []
        for seed in range(options.splits):
            order = np.random.default_rng(seed).permutation(len(data))
            train, reference, fresh = np.array_split(data[order], 3)
            model = VAEOutlierDetector(2, standardize=name != "digits", max_epochs=30, random_state=seed)
            model.fit(train)
            inside: Any = [
                torch.from_numpy((part - model.offset_x_) / model.scale_x_) for part in (reference, fresh)
            ]
            detector = pv.applications.AnomalyDetector(model.vae_, contamination="auto", seed=seed)
            p = detector.fit(inside[0]).p_value(inside[1])
            rates.append([float((p <= alpha).double().mean()) for alpha in (0.01, 0.05, 0.1)])
        rows.append([name, *(estimate(values) for values in np.array(rates).T)])
    print(f"share of p-values of new normal rows ≤ α, {options.splits} splits")
    print("\n".join(aligned(["data", "α = 0.01", "α = 0.05", "α = 0.1"], rows)))


def report(found: dict[str, list[float]]) -> None:
    """Print the areas, and how far each method is from ours."""
    ours = np.array(found["VAEOutlierDetector"])
    rows = [[name, estimate(np.array(areas)), estimate(ours - areas)] for name, areas in found.items()]
    print("\n".join(aligned(["method", "area", "VAEOutlierDetector − it"], rows)), flush=True)


def estimate(values: NDArray) -> str:
    """Return mean ± standard error."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
