"""Compress images by a VAE without loss, beside gzip and xz.

    uv run examples/compress.py                                # half a minute on two idle cores
    uv run examples/compress.py --particles 10                 # fewer bits, in more time
    uv run examples/compress.py --epochs 300

Look at bits per pixel, and at how far the file is from the negative ELBO. The model is not part of the rate:
its size is printed apart. `benchmarks/uses/compression.py` measures more formats.
"""

import argparse
import gzip
import lzma
import signal
from pathlib import Path

import numpy as np
import torch

import pyro_vae as pv
from pyro_vae.applications import Codec


def train(epochs: int, seed: int) -> pv.VAE:
    """Train a VAE on digits in black and white."""
    torch.manual_seed(seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(40),
        likelihood=pv.likelihoods.Bernoulli(40, (1, 28, 28), hidden_features=(200,)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 40, hidden_features=(200,)),
    )
    pv.fit(vae, pv.data.load("digits", binarize="threshold"), epochs=epochs, batch_size=100, seed=seed)
    return vae


def main() -> None:
    """Train, compress, decompress, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=60, help="passes over the training images (default: 60)")
    add("--images", type=int, default=1000, help="compress so many test images (default: 1000)")
    add("--particles", type=int, default=1, help="draws of z per image (default: 1)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs/compress"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    codec = Codec(train(args.epochs, args.seed), lanes=1, particles=args.particles)
    x = pv.data.load("digits", split="test", binarize="threshold")[: args.images]
    blob = codec.compress(x)
    (args.output / "digits.pvz").write_bytes(blob)
    codec.save(args.output / "digits.codec")
    assert torch.equal(codec.decompress(blob), x)  # without loss

    bits = np.packbits(x.numpy() > 0).tobytes()  # eight pixels to a byte
    sizes = {"xz": len(lzma.compress(bits, preset=9)), "gzip": len(gzip.compress(bits)), "VAE": len(blob)}
    for name, size in sizes.items():
        print(f"{name:5}{size:>8,} bytes{8 * size / x.numel():>8.4f} bits per pixel")
    print(f"\n{codec.rate(x)}")
    print(f"\nthe model takes {(args.output / 'digits.codec').stat().st_size:,} bytes more, once")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
