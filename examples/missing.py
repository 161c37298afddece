"""Impute a table with half of its entries missing, in training too, and compare with the column means.

    uv run python examples/missing.py

trains on scikit-learn's breast cancer table with half of it missing, and imputes what is.
"""

import torch
from sklearn.datasets import load_breast_cancer

import pyro_vae as pv


def main() -> None:
    """Train, impute and print."""
    torch.manual_seed(0)
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
    # more epochs make the intervals too narrow
    pv.fit(vae, x, estimator=pv.IWAE(num_particles=20), epochs=100, batch_size=64, seed=0, missing="nan")
    imputed = pv.applications.impute(vae, x, num_particles=500)
    low, high = imputed.quantile(0.05), imputed.quantile(0.95)
    covered = ((low <= truth) & (truth <= high))[missing].double().mean()
    print(imputed)
    print(f"mean squared error {(imputed.mean - truth)[missing].square().mean():.3f}")
    print(f"  of the column means {truth[missing].square().mean():.3f}")
    print(f"90 % intervals cover {covered:.1%}")


if __name__ == "__main__":
    main()
