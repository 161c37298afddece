"""Draw digits by class, and classify them by the same model: a conditional VAE, p(z) p(x|z, y).

    uv run examples/conditional_vae.py                   # about a minute on two idle cores
    uv run examples/conditional_vae.py --epochs 300

The classes of the bundled digits are the context. Look at log p(x|y) for the true class and for a wrong one,
at the error rate of the classifier p(y|x) ∝ p(x|y), and at samples.png, a row for each class.
"""

import argparse
import signal
from pathlib import Path

import torch

import pyro_vae as pv

SHAPE, CLASSES = (1, 28, 28), 10


def load(split: str, binarize: str) -> tuple[pv.data.Images, torch.Tensor]:
    """Return digits and their classes: the two arguments of the model and the guide."""
    images = pv.data.load("digits", split=split, binarize=binarize)
    return images, images.labels


def make(latent_dim: int, width: int) -> pv.ConditionalVAE:
    """Return p(z) p(x|z, y) with q(z|x, y)."""
    network = {"hidden_features": (width,), "context_dim": CLASSES}
    return pv.ConditionalVAE(
        prior=pv.priors.StandardNormal(latent_dim),
        likelihood=pv.likelihoods.Bernoulli(latent_dim, SHAPE, **network),
        guide=pv.guides.DiagonalNormal(SHAPE, latent_dim, **network),
    )


def main() -> None:
    """Train, evaluate, classify and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--test-size", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/conditional_vae"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    cvae = make(options.latent_dim, options.width)
    pv.fit(cvae, load("train", "dynamic"), epochs=options.epochs, batch_size=100, seed=options.seed)

    images, labels = load("test", "fixed")
    x, y = images[: options.test_size], labels[: options.test_size]
    report = pv.evaluate(cvae, (x, y), num_particles=200, aggregate_size=0)
    wrong = pv.evaluate(cvae, (x, (y + 1) % CLASSES), num_particles=200, aggregate_size=0)
    errors = (cvae.class_probabilities(x, CLASSES).argmax(-1) != y).double()
    print(f"log p(x|y), true class:   {report.mean('log_evidence')} nats per image")
    print(f"log p(x|y), wrong class:  {wrong.mean('log_evidence')}")
    print(f"error of p(y|x) ∝ p(x|y): {errors.mean():.1%} ± {errors.std() / len(errors) ** 0.5:.1%}")

    options.output.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(CLASSES).repeat_interleave(12)
    images = cvae.sample(len(labels), y=labels, mean=True)
    axes = pv.plots.image_grid(images, columns=12, title="E[x|z, y]: a class a row, z from the prior")
    pv.plots.save(axes, options.output / "samples.png")
    print(f"figure in {options.output / 'samples.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
