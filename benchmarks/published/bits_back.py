"""Compress the binarised MNIST test set without loss by a VAE with one layer of latents.

    uv run benchmarks/published/bits_back.py --data-root DIR
    uv run benchmarks/published/bits_back.py --data-root DIR --model vae.pt    # read from it, or saved to it

Trains on the 50,000 first training images, grey levels drawn as bits at each step, with KL warm-up; writes
the 10,000 test images of Larochelle's fixed binarisation to one file, reads it back, and prints bits per
pixel beside general compressors. DIR holds MNIST and `binarized_mnist*.npz`, with bits packed along pixels.

Published (Townsend, Bird, Barber 2019, arXiv:1901.04866, table 2): 0.19 bits per pixel; its −ELBO 0.19.
"""

import argparse
import bz2
import gzip
import lzma
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv
from pyro_vae.applications import Codec

IMAGE, K, TRAIN = (1, 28, 28), 50, 50_000


def train(root: Path, epochs: int) -> pv.VAE:
    """Train on images that are drawn from the grey levels at each step."""
    images = pv.data.load("mnist", split="train", root=root, binarize="dynamic").subset(slice(TRAIN))
    torch.manual_seed(0)
    network = {"hidden_features": (600, 600), "activation": "softplus"}
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, IMAGE, **network),
        guide=pv.guides.DiagonalNormal(IMAGE, K, **network),
    )
    pv.fit(
        vae,
        images,
        epochs=epochs,
        batch_size=100,
        kl_warmup=int(0.4 * epochs),
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, epochs, 1e-5),
    )
    return vae


def main() -> None:
    """Train, compress, read back, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--model", type=Path, help="file that the VAE is read from, or else saved to")
    options = parser.parse_args()

    saved = options.model is not None and options.model.exists()
    vae = pv.VAE.load(options.model) if saved else train(options.data_root, options.epochs)
    if options.model is not None and not saved:
        vae.save(options.model)

    (path,) = options.data_root.rglob("binarized_mnist*.npz")
    packed = np.load(path)["test"]
    x = torch.from_numpy(np.unpackbits(packed, axis=1)).view(-1, *IMAGE).float()
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
    raw = packed.tobytes()
    others = {
        "gzip -9": gzip.compress,
        "bz2 -9": bz2.compress,
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, compress in others.items():
        print(f"{name:8} {8 * len(compress(raw)) / x.numel():.4f} bits per pixel, of the packed bits")


if __name__ == "__main__":
    main()
