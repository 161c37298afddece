"""Classify digits given 100 labels and 3,900 images without: a VAE, and a semi-supervised one on top.

    uv run examples/semi_supervised.py                   # about a minute on two idle cores
    uv run examples/semi_supervised.py --labels 500

First a VAE is trained on all images, without labels (M1); then a `SemiSupervisedVAE` on the means of its
latent vectors, with y = −1 where the label is missing (M2). Look at the error of M2 beside that of the same
classifier trained on the labels alone, on the same features; and at samples.png, digits by class.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import pyro_vae as pv

SHAPE, CLASSES = (1, 28, 28), 10


def train_features(images: pv.data.Images, latent_dim: int, epochs: int) -> pv.VAE:
    """Return a VAE of the images alone."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(latent_dim),
        likelihood=pv.likelihoods.Bernoulli(latent_dim, SHAPE),
        guide=pv.guides.DiagonalNormal(SHAPE, latent_dim),
    )
    pv.fit(vae, images, epochs=epochs, batch_size=100)
    return vae


def make(size: int, latent_dim: int) -> pv.SemiSupervisedVAE:
    """Return p(y) p(z) p(x|z, y) with q(y|x) q(z|x, y), for features x of some size."""
    network = {"hidden_features": (200,), "context_dim": CLASSES}
    return pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(latent_dim),
        likelihood=pv.likelihoods.Normal(latent_dim, (size,), variance="per_element", **network),
        guide=pv.guides.DiagonalNormal((size,), latent_dim, **network),
        classifier=pv.networks.MLP(size, CLASSES, hidden_features=(200,)),
        num_classes=CLASSES,
    )


def train_on_labels(x: Tensor, y: Tensor) -> nn.Module:
    """Return the same classifier, trained on the labelled examples alone."""
    network = pv.networks.MLP(x.shape[1], CLASSES, hidden_features=(200,))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network


def main() -> None:
    """Train, classify and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--labels", type=int, default=100, help="so many, equally many a class")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--epochs-features", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent-dim", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/semi_supervised"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = (pv.data.load("digits", split=split) for split in ("train", "test"))
    vae = train_features(train.binarized("dynamic"), options.latent_dim, options.epochs_features)
    with torch.no_grad():
        x, x_test = (vae.encode(images[:]).mean for images in (train, test))
    y = train.labels.clone()
    y[options.labels :] = -1  # missing

    m2 = make(options.latent_dim, latent_dim=10)
    pv.fit(m2, (x, y), epochs=options.epochs, batch_size=100)
    alone = train_on_labels(x[: options.labels], y[: options.labels])
    with torch.no_grad():
        for name, scores in {
            "labels alone": alone(x_test),
            "semi-supervised": m2.predict_proba(x_test),
        }.items():
            wrong = (scores.argmax(-1) != test.labels).double()
            print(f"{name:<16} error {wrong.mean():6.1%} ± {wrong.std() / len(wrong) ** 0.5:.1%}")

    options.output.mkdir(parents=True, exist_ok=True)
    classes = torch.arange(CLASSES).repeat_interleave(12)
    drawn = vae.decode(m2.sample(len(classes), y=classes)).mean.detach()
    axes = pv.plots.image_grid(drawn, columns=12, title="a class a row: drawn by M2, decoded by M1")
    pv.plots.save(axes, options.output / "samples.png")
    print(f"figure in {options.output / 'samples.png'}")


if __name__ == "__main__":
    main()
