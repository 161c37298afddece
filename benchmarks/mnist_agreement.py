"""Compare test ELBOs of the same VAE on MNIST, trained with two estimators and in hand-written PyTorch.

    uv run benchmarks/mnist_agreement.py --data-root DIR

784-400-20, ReLU, dynamic binarisation, Adam 1e-3. The hand-written VAE uses only the data loading of this
library; its test ELBO is computed by its own code, the other two by `fit`.
"""

import argparse
import math

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn import functional as F  # noqa: N812

import pyro_vae as pv


class HandWritten(nn.Module):
    """VAE of Kingma and Welling in plain PyTorch, with softplus scales."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def elbo(self, x: torch.Tensor) -> torch.Tensor:
        loc, raw = self.encoder(x).chunk(2, dim=1)
        scale = F.softplus(raw) + 1e-6
        logits = self.decoder(loc + scale * torch.randn_like(scale))
        kl = 0.5 * (scale**2 + loc**2 - 1).sum(1) - torch.log(scale).sum(1)
        return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1) - kl


def train_by_hand(
    train: pv.data.Images, test: pv.data.Images, args: argparse.Namespace
) -> tuple[float, float]:
    torch.manual_seed(args.seed)
    vae = HandWritten()
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    for _ in range(args.epochs):
        for index in torch.randperm(len(train)).split(args.batch_size):
            optimizer.zero_grad()
            (-vae.elbo(train[index].flatten(1)).sum()).backward()
            optimizer.step()
    with torch.no_grad():
        elbo = vae.elbo(test[:].flatten(1))
    return elbo.mean().item(), (elbo.std() / math.sqrt(len(elbo))).item()


def train_by_svi(
    estimator: ELBO, train: pv.data.Images, test: pv.data.Images, args: argparse.Namespace
) -> tuple[float, float]:
    torch.manual_seed(args.seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )
    history = pv.fit(
        vae,
        train,
        validation=test,
        estimator=estimator,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    return history[-1].validation_elbo, history[-1].validation_elbo_se


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, test = (
        pv.data.load("mnist", split=s, root=args.data_root, binarize="dynamic") for s in ("train", "test")
    )
    print(f"{test.name}, {len(test):,} binarised dynamically; {args.epochs} epochs, batch {args.batch_size}")
    for name, (elbo, se) in {
        "Trace_ELBO": train_by_svi(Trace_ELBO(), train, test, args),
        "TraceMeanField_ELBO": train_by_svi(TraceMeanField_ELBO(), train, test, args),
        "PyTorch by hand": train_by_hand(train, test, args),
    }.items():
        print(f"{name:22} test ELBO {elbo:8.2f} ± {se:.2f} nats per image")


if __name__ == "__main__":
    main()
