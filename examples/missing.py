"""Impute a table with half of its entries missing, in training too, and compare with the column means.

    uv run examples/missing.py                  # half a minute on two idle cores

The table is scikit-learn's breast_cancer. Look at the squared error beside that of the column means, and at
the share of true values within the 90 % intervals: more epochs make the intervals too narrow.
"""

import argparse
import signal

import torch
from sklearn.datasets import load_breast_cancer

import pyro_vae as pv


def main() -> None:
    """Train, impute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100, help="passes over the data (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    table = torch.tensor(load_breast_cancer().data).float()
    missing = torch.rand(table.shape) < 0.5
    holes = torch.where(missing, torch.nan, table)
    centre = holes.nanmean(0)
    spread = (holes - centre).square().nanmean(0).sqrt()
    x, truth = (holes - centre) / spread, (table - centre) / spread
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.StudentT(10, (30,), hidden_features=(128,)),
        guide=pv.guides.DiagonalNormal((30,), 10, hidden_features=(128,)),
    )
    estimator = pv.IWAE(num_particles=20)
    pv.fit(vae, x, estimator=estimator, epochs=args.epochs, batch_size=64, seed=args.seed, missing="nan")
    imputed = pv.applications.impute(vae, x, num_particles=500)
    low, high = imputed.quantile(0.05), imputed.quantile(0.95)
    covered = ((low <= truth) & (truth <= high))[missing].double().mean()
    print(imputed)
    print(f"mean squared error {(imputed.mean - truth)[missing].square().mean():.3f}")
    print(f"  of the column means {truth[missing].square().mean():.3f}")
    print(f"90 % intervals cover {covered:.1%}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved
    main()
