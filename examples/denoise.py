"""Restore digits whose bits were flipped, and compare with reconstructing them.

    uv run examples/denoise.py                  # half a minute on two idle cores
    uv run examples/denoise.py --epochs 100

Look at the errors, E[x|y] by `denoise` against decoding the code of y by `reconstruct`, and at restored.png.
"""

import argparse
import signal
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae.applications.corruptions import BitFlip


def main() -> None:
    """Train, corrupt, restore, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/denoise"), metavar="DIR")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )
    pv.fit(vae, pv.data.load("digits"), binarize="threshold", epochs=args.epochs, seed=args.seed)
    x = pv.data.load("digits", split="test", binarize="threshold")[:10]
    noise = BitFlip(0.1)
    y = noise(x).sample()
    clean = pv.applications.denoise(vae, y, corruption=noise, num_particles=400)
    for name, image in [("corrupted", y), ("reconstruct", vae.reconstruct(y)), ("denoise", clean.mean)]:
        print(f"{name:12} mean squared error {(image - x).square().mean():.4f}")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = torch.cat([x, y, clean.mean.clamp(0, 1)])
    axes = pv.plots.image_grid(rows, columns=10, title="Digits x; y, one bit in ten flipped; E[x|y]")
    pv.plots.save(axes, args.output / "restored.png")
    print(f"figure in {args.output / 'restored.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
