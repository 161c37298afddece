"""Compare the time of an epoch of `pyro_vae.fit` with that of a loop of `pyro_vae.SVI.step`, epoch by epoch.

    uv run benchmarks/fit_overhead.py

The loop takes ready batches in order: no shuffling, binarisation, checks or reports. It runs inside a
callback of the fit, so that both alternate in one process. Engine "traced", so that none compiles during it.
"""

import argparse
import statistics
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv

SHAPE, LATENT = (1, 28, 28), 20


def digits_vae() -> pv.VAE:
    """The VAE of the main example."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(LATENT, SHAPE),
        guide=pv.guides.DiagonalNormal(SHAPE, LATENT),
    )


def labelled_pair() -> pv.Pair:
    """A model and a guide of two arguments, x and y, as plain functions."""
    encoder = pv.networks.MLP(784 + 10, 2 * LATENT, hidden_features=(400,))
    decoder = pv.networks.MLP(LATENT + 10, 784, hidden_features=(400,))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            logits = decoder(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    pair = pv.Pair(model, guide)
    pair.make_parameters(torch.zeros(2, 784), torch.zeros(2, 10))
    return pair


def compare(make: Any, data: Any, batches: list[tuple], batch_size: int, epochs: int) -> tuple[float, float]:
    """Return the median seconds of an epoch of fit, and of the loop."""
    torch.manual_seed(0)
    pair, other = make(), make()
    optimizer = torch.optim.Adam(other.parameters(), 1e-3)
    svi = pv.SVI(other, optimizer, TraceMeanField_ELBO(), engine="traced")
    seconds: tuple[list[float], list[float]] = ([], [])
    ended = time.perf_counter()

    def loop(_pair: Any, epoch: pv.Epoch) -> None:
        nonlocal ended
        started = time.perf_counter()
        other.train()
        for batch in batches:
            svi.step(*batch)
        if epoch.epoch > 1:  # both record in the first
            seconds[0].append(started - ended)
            seconds[1].append(time.perf_counter() - started)
        ended = time.perf_counter()

    pv.fit(
        pair, data, epochs=epochs, batch_size=batch_size, engine="traced", callbacks=[loop], progress=False
    )
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Print a line for each pair and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    images = pv.data.load("digits", split="train", binarize="fixed")
    x = images[:]
    y = torch.nn.functional.one_hot(images.labels, 10).to(x.dtype)
    print(f"{len(x):,} images, medians of {options.epochs - 1} epochs in turn, milliseconds a step")
    for batch_size in options.batch_sizes:
        cases: dict[str, tuple[Any, Any, tuple]] = {
            "VAE": (digits_vae, x, (x,)),
            "Pair of functions, (x, y)": (labelled_pair, (x.flatten(1), y), (x.flatten(1), y)),
        }
        for name, (make, data, leaves) in cases.items():
            batches = list(zip(*(leaf.split(batch_size) for leaf in leaves), strict=True))
            fit, loop = compare(make, data, batches, batch_size, options.epochs)
            each = 1e3 / len(batches)
            print(
                f"{name:27} batch {batch_size:3}: fit {fit * each:6.2f}, loop {loop * each:6.2f}, "
                f"ratio {fit / loop:.3f}"
            )


if __name__ == "__main__":
    main()
