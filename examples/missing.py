"""Impute a table with half of its entries missing, and compare with the column means.

    uv run python examples/missing.py

trains on complete rows of scikit-learn's breast cancer table and imputes others.
"""

import torch
from sklearn.datasets import load_breast_cancer

import pyro_vae as pv


def main() -> None:
    """Train, impute and print."""
    torch.manual_seed(0)
    table = torch.tensor(load_breast_cancer().data)
    table = (table - table.mean(0)) / table.std(0)
    table = table[torch.randperm(len(table))].float()
    train, x = table[:400], table[400:]
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.StudentT(10, (30,), hidden_features=(128,)),
        guide=pv.guides.DiagonalNormal((30,), 10, hidden_features=(128,)),
    )
    pv.fit(vae, train, estimator=pv.IWAE(num_particles=5), epochs=100, batch_size=50, seed=0)
    missing = torch.rand(x.shape) < 0.5
    imputed = pv.applications.impute(vae, torch.where(missing, torch.nan, x), num_particles=500)
    low, high = imputed.quantile(0.05), imputed.quantile(0.95)
    covered = ((low <= x) & (x <= high))[missing].double().mean()
    print(imputed)
    print(f"mean squared error {(imputed.mean - x)[missing].square().mean():.3f}")
    print(f"  of the column means {x[missing].square().mean():.3f}")
    print(f"90 % intervals cover {covered:.1%}")


if __name__ == "__main__":
    main()
