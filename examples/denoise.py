"""Restore digits whose bits were flipped, and compare with reconstructing them.

    uv run python examples/denoise.py

trains on the bundled digits, and writes runs/denoise/restored.png.
"""

from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae.applications.corruptions import BitFlip


def main() -> None:
    """Train, corrupt, restore, print and draw."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )
    pv.fit(vae, pv.data.load("digits"), binarize="threshold", epochs=20, seed=0)
    x = pv.data.load("digits", split="test", binarize="threshold")[:10]
    noise = BitFlip(0.1)
    y = noise(x).sample()
    clean = pv.applications.denoise(vae, y, corruption=noise, num_particles=400)
    for name, image in [("corrupted", y), ("reconstruct", vae.reconstruct(y)), ("denoise", clean.mean)]:
        print(f"{name:12} mean squared error {(image - x).square().mean():.4f}")
    folder = Path("runs/denoise")
    folder.mkdir(parents=True, exist_ok=True)
    axes = pv.plots.reconstructions(
        y,
        clean.mean.clamp(0, 1),
        title="Digits with one bit in ten flipped, and E[x|y]",
        names=("corrupted", "E[x|y]"),
    )
    pv.plots.save(axes, folder / "restored.png")
    print(f"figure in {folder / 'restored.png'}")


if __name__ == "__main__":
    main()
