"""Compare the time of an epoch of `pyro_vae.fit` with that of a plain training loop, in turn.

    uv run benchmarks/fit_overhead.py --data-root DIR

The plain loop takes contiguous batches in order, without shuffling, binarisation or reporting.
"""

import argparse
import statistics
import time

import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv


def make_vae() -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )


def bare_epoch(vae: pv.VAE, optimizer: torch.optim.Optimizer, x: torch.Tensor, batch_size: int) -> float:
    loss = TraceMeanField_ELBO()(vae.model, vae.guide)
    started = time.perf_counter()
    for batch in x.split(batch_size):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    return time.perf_counter() - started


def fit_epoch(vae: pv.VAE, optimizer: torch.optim.Optimizer, x: object, batch_size: int) -> float:
    started = time.perf_counter()
    pv.fit(vae, x, epochs=1, batch_size=batch_size, optimizer=lambda _: optimizer, progress=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    images = pv.data.load("mnist", root=args.data_root, binarize="fixed")
    floats, dynamic = images[:], pv.data.load("mnist", root=args.data_root, binarize="dynamic")
    vaes = [make_vae() for _ in range(3)]
    optimizers = [torch.optim.Adam(vae.parameters(), 1e-3) for vae in vaes]
    seconds: list[list[float]] = [[], [], []]
    for _ in range(args.rounds):
        seconds[0].append(bare_epoch(vaes[0], optimizers[0], floats, args.batch_size))
        seconds[1].append(fit_epoch(vaes[1], optimizers[1], floats, args.batch_size))
        seconds[2].append(fit_epoch(vaes[2], optimizers[2], dynamic, args.batch_size))
    print(f"{len(floats):,} images, batch {args.batch_size}, {args.rounds} rounds; seconds an epoch, medians")
    print(f"bare loop on floats           {statistics.median(seconds[0]):6.2f}")
    for name, column in (("fit on floats", seconds[1]), ("fit, dynamic binarisation", seconds[2])):
        ratios = [a / b for a, b in zip(column, seconds[0], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name:28}  {statistics.median(column):6.2f}  ratio {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
