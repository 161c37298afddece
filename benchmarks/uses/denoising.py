"""Remove normal noise of σ = 0.3 from grey digits: `denoise`, `reconstruct`, PCA and the noise itself.

    uv run benchmarks/uses/denoising.py

Trains a VAE with a discretised-logistic likelihood on the bundled digits, which takes most of the time, and
prints the peak signal-to-noise ratio in dB, 10 log₁₀(1 / mean squared error) over all pixels of the images,
and the mean of its differences from `denoise` per image ± standard error. Noise is not clipped; PCA
reconstructs noisy images in 40 dimensions of clean ones.
"""

import argparse
import time

import torch
from sklearn.decomposition import PCA
from torch import Tensor

import pyro_vae as pv
from pyro_vae.applications.corruptions import Normal
from pyro_vae.utils.display import aligned

SHAPE = (1, 28, 28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--particles", type=int, default=200)
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--method", default="importance")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    started = time.perf_counter()
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(options.latent_dim),
        likelihood=pv.likelihoods.DiscretizedLogistic(options.latent_dim, SHAPE),
        guide=pv.guides.DiagonalNormal(SHAPE, options.latent_dim),
    )
    train = pv.data.load("digits", split="train")
    pv.fit(vae, train, epochs=options.epochs, batch_size=100, seed=0, validation=0.1, patience=10)
    trained = time.perf_counter()
    x = pv.data.load("digits", split="test")[: options.images]
    y = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    pca = PCA(40).fit(train[:].flatten(1).numpy())
    by_pca = torch.from_numpy(pca.inverse_transform(pca.transform(y.flatten(1).numpy()))).reshape(x.shape)
    restored = pv.applications.denoise(
        vae,
        y,
        corruption=Normal(0.3),
        method=options.method,
        num_particles=options.particles,
        num_draws=1,
    )
    found = {
        "noisy": y,
        "PCA-40": by_pca.float(),
        "reconstruct": vae.reconstruct(y),
        "denoise": restored.mean,
    }
    best = psnr(restored.mean, x)
    rows = []
    for name, image in found.items():
        gain = best - psnr(image, x)
        whole = 10 * torch.log10(1 / (image - x).square().mean())
        rows.append([name, f"{whole:.2f}", f"{gain.mean():.2f} ± {gain.std() / len(x) ** 0.5:.2f}"])
    print("\n".join(aligned(["image", "PSNR, dB", "denoise − it, dB"], rows)))
    print(f"{restored}; trained {trained - started:.0f} s, restored {time.perf_counter() - trained:.0f} s")


def psnr(image: Tensor, x: Tensor) -> Tensor:
    """Return the ratio of each image, (N,), in dB."""
    return 10 * torch.log10(1 / (image - x).square().flatten(1).mean(1))


if __name__ == "__main__":
    main()
