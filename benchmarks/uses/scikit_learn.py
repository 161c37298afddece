"""VAEs in scikit-learn's pipelines and searches, next to PCA and factor analysis.

    uv run benchmarks/uses/scikit_learn.py                # all parts
    uv run benchmarks/uses/scikit_learn.py --part tables --seeds 10
    uv run benchmarks/uses/scikit_learn.py --part digits --seeds 5

Four parts: "search" chooses the number of latent dimensions by held-out log-likelihood without labels, and
by the accuracy of a classifier; "tables" compares held-out log-likelihoods; "digits" compares features of
4,000 handwritten digits by five neighbours and by logistic regression, on 1,000 others;
"outliers" tells malignant from benign rows of breast_cancer by models of half of the benign ones.

Values are means over random splits (tables, outliers) or seeds of the VAE (digits) ± standard errors. The
digits have one split, so PCA and factor analysis have no error there.
"""

import argparse
import math
import sys
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyro_vae as pv
from pyro_vae.applications.sklearn import VAEOutlierDetector, VAETransformer
from pyro_vae.utils.display import aligned

TABLES = {"breast_cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}


def main() -> None:
    """Run the parts requested and print their tables."""
    args = parse_arguments()
    if args.part in ("search", "all"):
        search(args.jobs)
    if args.part in ("tables", "all"):
        compare_densities(args.seeds, args.components or [2, 5, 8], args.epochs or 200)
    if args.part in ("digits", "all"):
        compare_features(args.seeds, args.components or [2, 10, 40], args.epochs or 60)
    if args.part in ("outliers", "all"):
        compare_outliers(args.seeds, args.components or [2, 8], args.epochs or 200)


def search(jobs: int) -> None:
    """Choose the number of latent dimensions, without labels and with them."""
    X, y = load_wine(return_X_y=True)
    folds = KFold(3, shuffle=True, random_state=0)  # the rows are sorted by class
    grid, options = [1, 2, 4, 6], {"n_jobs": jobs, "cv": folds}
    by_density = GridSearchCV(VAETransformer(random_state=0), {"n_components": grid}, **options).fit(X)
    pipe = make_pipeline(VAETransformer(random_state=0), KNeighborsClassifier())
    by_label = GridSearchCV(pipe, {"vaetransformer__n_components": grid}, **options).fit(X, y)
    found = [each.cv_results_["mean_test_score"] for each in (by_density, by_label)]
    rows = [[f"{k}", f"{nats:.2f}", f"{share:.3f}"] for k, nats, share in zip(grid, *found, strict=True)]
    print("wine, three folds: mean held-out log-likelihood without labels, and accuracy of five neighbours")
    show(["n_components", "nats per row", "accuracy"], rows)


def compare_densities(seeds: int, components: list[int], epochs: int) -> None:
    """Print held-out log-likelihoods of three tables, in nats per row."""
    for name, load in TABLES.items():
        X, rows = load().data, []
        for count in (each for each in components if each < X.shape[1]):
            splits = ShuffleSplit(seeds, test_size=0.25, random_state=0).split(X)
            scores = np.array(
                [
                    held_out(X[train], X[test], VAETransformer(count, max_epochs=epochs, random_state=seed))
                    for seed, (train, test) in enumerate(splits)
                ]
            )
            shown = [*scores.T, scores[:, 2] - scores[:, 0]]
            rows.append([str(count), *(estimate(values, ".2f") for values in shown)])
        if not rows:  # too few columns
            continue
        print(f"{name}: held-out log-likelihood, nats per row, columns over their spread, {seeds} splits")
        show(["n_components", "PCA", "FactorAnalysis", "VAE", "VAE − PCA, paired"], rows)


def held_out(train: NDArray, test: NDArray, vae: VAETransformer) -> list[float]:
    """Return the scores of PCA, factor analysis and a VAE on one split."""
    scale = train.std(0)  # else PCA, which has one noise for all columns, would see the largest alone
    models = [PCA(vae.n_components), FactorAnalysis(vae.n_components), vae]
    return [model.fit(train / scale).score(test / scale) for model in models]


def compare_features(seeds: int, components: list[int], epochs: int) -> None:
    """Print the accuracies of two classifiers on features of the bundled digits."""
    train, test = (pv.data.load("digits", split=split) for split in ("train", "test"))
    data = [images[:].flatten(1).numpy() for images in (train, test)]
    labels = [np.asarray(images.labels) for images in (train, test)]
    rows = []
    for count in components:
        models: dict[str, list[BaseEstimator]] = {
            "PCA": [PCA(count, random_state=0)],
            "FactorAnalysis": [FactorAnalysis(count, random_state=0)],
            "VAE": [
                VAETransformer(count, standardize=False, max_epochs=epochs, random_state=seed)
                for seed in range(seeds)
            ],
        }
        for name, runs in models.items():
            scores = np.array([accuracies(model, data, labels) for model in runs])
            rows.append([name, str(count), *(estimate(values, ".3f") for values in scores.T)])
    print(f"digits: accuracy on 1,000 of them, VAE over {seeds} seeds")
    show(["features", "n_components", "five neighbours", "logistic"], rows)


def compare_outliers(seeds: int, components: list[int], epochs: int) -> None:
    """Print areas under the ROC curve of malignant against benign rows, by models of benign ones."""
    X, y = load_breast_cancer(return_X_y=True)
    benign, malignant = X[y == 1], X[y == 0]
    found: dict[str, list[float]] = defaultdict(list)
    for seed, (train, test) in enumerate(ShuffleSplit(seeds, test_size=0.5, random_state=0).split(benign)):
        rows, is_outlier = (
            np.vstack([benign[test], malignant]),
            np.arange(len(test) + len(malignant)) >= len(test),
        )
        models = {"LocalOutlierFactor": make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True))}
        for k in components:
            models[f"FactorAnalysis({k})"] = make_pipeline(StandardScaler(), FactorAnalysis(k))
            models[f"VAE({k})"] = VAEOutlierDetector(k, max_epochs=epochs, random_state=seed)
        for name, model in models.items():
            scores = model.fit(benign[train]).score_samples(rows)
            found[name].append(roc_auc_score(is_outlier, -scores))
    print(f"breast_cancer: area under the ROC curve, {seeds} splits")
    show(["model", "area"], [[name, estimate(np.array(areas), ".3f")] for name, areas in found.items()])


def show(header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    print("\n".join(aligned(header, rows)), flush=True)
    print()


def accuracies(model: BaseEstimator, data: list[NDArray], labels: list[NDArray]) -> list[float]:
    """Return the accuracies of five neighbours and of logistic regression."""
    features = [model.fit(data[0]).transform(data[0]), model.transform(data[1])]
    classifiers = KNeighborsClassifier(), LogisticRegression(max_iter=5000)
    return [each.fit(features[0], labels[0]).score(features[1], labels[1]) for each in classifiers]


def estimate(values: NDArray, form: str) -> str:
    """Return the mean of some values, with its standard error if there are several."""
    error = f" ± {values.std(ddof=1) / math.sqrt(len(values)):{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{error}"


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--part",
        choices=("search", "tables", "digits", "outliers", "all"),
        default="all",
        help="(default: %(default)s)",
    )
    add("--seeds", type=int, default=3, help="splits, or seeds of the VAE (default: %(default)s)")
    add(
        "--components",
        type=int,
        nargs="+",
        metavar="K",
        help="latent dimensions (default: by part)",
    )
    add("--epochs", type=int, help="largest number of epochs (default: 200, 60 for digits)")
    add("--jobs", type=int, default=2, help="processes of the search (default: %(default)s)")
    args = parser.parse_args()
    if min([args.seeds, *(args.components or [1]), args.epochs or 1]) < 1:
        parser.error("--seeds, --components and --epochs must be at least 1")
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
