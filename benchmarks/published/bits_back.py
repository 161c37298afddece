"""Compress the MNIST test set without loss, binarised or grey, by a VAE with one layer of latents.

    uv run benchmarks/published/bits_back.py --data-root DIR
    uv run benchmarks/published/bits_back.py --data-root DIR --grey --epochs 30
    uv run benchmarks/published/bits_back.py --data-root DIR --model vae.pt    # read from it, or saved to it

Trains on the 50,000 first training images, grey levels drawn as bits at each step, with KL warm-up; writes
the 10,000 test images of Larochelle's fixed binarisation to one file, reads it back, and prints bits per
pixel beside general compressors. DIR holds MNIST and `binarized_mnist*.npz`, with bits packed along pixels.

With --grey it trains on the 256 grey levels by a beta-binomial likelihood, and writes those of the test set.

Published (Townsend, Bird, Barber 2019, arXiv:1901.04866, table 2): 0.19 bits per pixel, 1.41 for grey levels.
"""

import argparse
import bz2
import gzip
import lzma
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv
from pyro_vae.applications import Codec

IMAGE, K, TRAIN = (1, 28, 28), 50, 50_000


class Fractions(nn.Module):
    """A network of x/255, for grey levels x = 0 … 255."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.network(x / 255)


def binary_vae() -> pv.VAE:
    """Build the VAE of bits."""
    network = {"hidden_features": (600, 600), "activation": "softplus"}
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, IMAGE, **network),
        guide=pv.guides.DiagonalNormal(IMAGE, K, **network),
    )


def grey_vae() -> pv.VAE:
    """Build the VAE of grey levels 0 … 255."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.BetaBinomial(K, IMAGE),
        guide=pv.guides.DiagonalNormal(IMAGE, K, network=Fractions(pv.networks.MLP(784, 2 * K))),
    )


def train(root: Path, epochs: int, *, grey: bool) -> pv.VAE:
    """Train on grey levels, or on bits that are drawn from them at each step."""
    images = pv.data.load("mnist", split="train", root=root).subset(slice(TRAIN))
    torch.manual_seed(0)
    vae = grey_vae() if grey else binary_vae()
    pv.fit(
        vae,
        levels(images) if grey else images.binarized("dynamic"),
        epochs=epochs,
        batch_size=100,
        kl_warmup=int((0.2 if grey else 0.4) * epochs),
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, epochs, 1e-5),
    )
    if grey:  # divide in the first weights, as the exact codec has no layer that does
        network = vae.posterior.network.network
        with torch.no_grad():
            network[1].weight.div_(255)
        vae = vae.with_guide(pv.guides.DiagonalNormal(IMAGE, K, network=network))
    return vae


def levels(images: pv.data.Images) -> Tensor:
    """Return grey levels 0 … 255."""
    return (images[:] * 255).round()


def test_set(root: Path, *, grey: bool) -> tuple[Tensor, bytes]:
    """Return the test images, and the bytes that general compressors are given."""
    if grey:
        x = levels(pv.data.load("mnist", split="test", root=root))
        return x, x.byte().numpy().tobytes()
    (path,) = root.rglob("binarized_mnist*.npz")
    packed = np.load(path)["test"]
    return torch.from_numpy(np.unpackbits(packed, axis=1)).view(-1, *IMAGE).float(), packed.tobytes()


def main() -> None:
    """Train, compress, read back, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--grey", action="store_true", help="grey levels, not bits")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--model", type=Path, help="file that the VAE is read from, or else saved to")
    options = parser.parse_args()

    saved = options.model is not None and options.model.exists()
    vae = pv.VAE.load(options.model) if saved else train(options.data_root, options.epochs, grey=options.grey)
    if options.model is not None and not saved:
        vae.save(options.model)

    x, raw = test_set(options.data_root, grey=options.grey)
    codec, started = Codec(vae), time.perf_counter()
    blob = codec.compress(x)
    written = time.perf_counter()
    assert torch.equal(codec.decompress(blob), x)
    read = time.perf_counter()
    print(f"{len(x):,} images, read back without a difference")
    print(
        f"{len(x) / (written - started):.0f} images per second written, {len(x) / (read - written):.0f} read"
    )
    print(codec.rate(x))
    others = {
        "gzip -9": gzip.compress,
        "bz2 -9": bz2.compress,
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, compress in others.items():
        print(f"{name:8} {8 * len(compress(raw)) / x.numel():.4f} bits per pixel")


if __name__ == "__main__":
    main()
