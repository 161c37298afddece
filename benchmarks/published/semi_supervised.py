"""Classify MNIST given 100 labels, by M2 and by M1+M2, and compare with the published error rates.

    uv run benchmarks/published/semi_supervised.py --data-root DIR
    uv run benchmarks/published/semi_supervised.py --data-root DIR --models m1+m2 --draws 1

For each draw of the labels (10 of each class, from 50,000 training images) it trains

    m2       `SemiSupervisedVAE` on binarised images
    m1+m2    a `VAE` on the images, without labels, then `SemiSupervisedVAE` on its latent means
    network  the same classifier on the labelled images alone

and prints the errors on the 10,000 test images. Results are written to the folder --results as JSON.

Published (Kingma, Rezende, Mohamed, Welling 2014, arXiv:1406.5298, table 1): M2 11.97 ± 1.71 %, M1+M2
3.33 ± 0.14 %, a network on the labels alone 25.81 %.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

IMAGE, CLASSES, LATENT, TRAIN = (1, 28, 28), 10, 50, 50_000
OPTIONS = {"hidden_features": (500,), "activation": "softplus"}
PUBLISHED = {"network": "25.81", "m2": "11.97 ± 1.71", "m1+m2": "3.33 ± 0.14"}  # 100 labels
HERE = Path(__file__).parent


class Test(NamedTuple):
    """Grey levels, or features, and classes of the test set."""

    x: Tensor
    labels: Tensor


def draw_labels(classes: Tensor, count: int, seed: int) -> Tensor:
    """Keep `count` labels, equally many of each class; −1 for the others."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.full_like(classes, -1)
    for label in range(CLASSES):
        rows = (classes == label).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: count // CLASSES]]
        kept[chosen] = label
    return kept


def m2(
    shape: tuple[int, ...], likelihood: Callable[..., nn.Module], latent_dim: int, weight: float
) -> pv.SemiSupervisedVAE:
    """Return M2 for data of one shape; `weight` is that of the classification."""
    size = torch.Size(shape).numel()
    return pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(latent_dim),
        likelihood=likelihood(latent_dim, shape, context_dim=CLASSES, **OPTIONS),
        guide=pv.guides.DiagonalNormal(shape, latent_dim, context_dim=CLASSES, **OPTIONS),
        classifier=pv.networks.MLP(size, CLASSES, **OPTIONS),
        num_classes=CLASSES,
        classification_weight=weight,
    )


def train_m2(x: pv.data.Images | Tensor, labels: Tensor, test: Test, epochs: int, seed: int) -> float:
    """Train M2 on binarised images, or on features, and return its error on the test set."""
    torch.manual_seed(seed)
    if isinstance(x, Tensor):
        vae = m2((LATENT,), partial(pv.likelihoods.Normal, variance=0.2), latent_dim=10, weight=1.0)
    else:
        vae = m2(IMAGE, pv.likelihoods.Bernoulli, latent_dim=LATENT, weight=0.1)

    def report(vae: pv.SemiSupervisedVAE, epoch: pv.Epoch) -> None:
        if epoch.epoch % 5 == 0:
            wrong = error(vae.predict_proba, test)
            print(f"  epoch {epoch.epoch}: bound {epoch.train_bound:.2f}, error {wrong:.2%}", flush=True)

    rate = 2e-3 if isinstance(x, Tensor) else 1e-3
    options = {"schedule": falling(epochs), "callbacks": [report], "progress": False}
    pv.fit(vae, (x, labels), epochs=epochs, batch_size=200, seed=seed, learning_rate=rate, **options)
    return error(vae.predict_proba, test)


def falling(epochs: int) -> Callable[[torch.optim.Optimizer], CosineAnnealingLR]:
    """Return a schedule that lets the learning rate fall to a hundredth of it."""
    return lambda optimizer: CosineAnnealingLR(optimizer, epochs, optimizer.param_groups[0]["lr"] / 100)


def train_m1(images: pv.data.Images, epochs: int) -> pv.VAE:
    """Train a VAE without labels."""
    torch.manual_seed(0)
    network = {"hidden_features": (600, 600), "activation": "softplus"}
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(LATENT, IMAGE, **network),
        guide=pv.guides.DiagonalNormal(IMAGE, LATENT, **network),
    )

    def report(vae: pv.VAE, epoch: pv.Epoch) -> None:
        if epoch.epoch % 10 == 0:
            print(f"  M1, epoch {epoch.epoch}: bound {epoch.train_bound:.2f}", flush=True)

    options = {"schedule": falling(epochs), "callbacks": [report], "progress": False}
    pv.fit(vae, images, epochs=epochs, batch_size=100, **options)
    return vae.eval()


@torch.no_grad()
def features(vae: pv.VAE, x: Tensor) -> Tensor:
    """Return E[z|x]."""
    return torch.cat([vae.encode(part).mean for part in x.split(1000)])


def train_network(x: Tensor, labels: Tensor, test: Test, seed: int) -> float:
    """Train the classifier on the labelled images alone, binarised at each step, and return its error."""
    torch.manual_seed(seed)
    network = pv.networks.MLP(x[0].numel(), CLASSES, **OPTIONS)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(torch.bernoulli(x)), labels).backward()
        optimizer.step()
    return error(network, test)


@torch.no_grad()
def error(classifier: Callable[[Tensor], Tensor], test: Test) -> float:
    """Return the share of wrong classes."""
    return float((classifier(test.x).argmax(-1) != test.labels).double().mean())


def main() -> None:
    """Train all, print and write the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of the labels")
    parser.add_argument("--epochs", type=int, default=50, help="of M2 on images")
    parser.add_argument("--epochs-m1", type=int, default=120)
    parser.add_argument("--m1", type=Path, help="file that M1 is read from, or else saved to")
    parser.add_argument("--epochs-features", type=int, default=60, help="of M2 on the features of M1")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()

    images = pv.data.load("mnist", split="train", root=options.data_root)
    images, classes = images.subset(slice(TRAIN)), images.labels[:TRAIN]
    held_out = pv.data.load("mnist", split="test", root=options.data_root)
    test = Test(held_out[:], held_out.labels)
    binary = images.binarized("dynamic")
    m1 = None
    if "m1+m2" in options.models:
        saved = options.m1 is not None and options.m1.exists()
        m1 = pv.VAE.load(options.m1).eval() if saved else train_m1(binary, options.epochs_m1)
        if options.m1 is not None and not saved:
            m1.save(options.m1)

    options.results.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        errors, started = [], time.perf_counter()
        for draw in options.draws:
            labels = draw_labels(classes, options.labels, draw)
            if model == "network":
                given = labels >= 0
                errors.append(train_network(images[given], labels[given], test, draw))
            elif model == "m2":
                errors.append(train_m2(binary, labels, test, options.epochs, draw))
            else:
                assert m1 is not None
                of_test = Test(features(m1, test.x), test.labels)
                epochs = options.epochs_features
                errors.append(train_m2(features(m1, images[:]), labels, of_test, epochs, draw))
            print(f"{model}, draw {draw}: error {errors[-1]:.2%}", flush=True)
        result = {
            "model": model,
            "labels": options.labels,
            "draws": options.draws,
            "errors": errors,
            "published": PUBLISHED[model],
            "epochs": [options.epochs, options.epochs_m1, options.epochs_features],
            "minutes": (time.perf_counter() - started) / 60,
            "processor": platform.processor(),
        }
        name = f"semi_supervised-{model.replace('+', '-')}-{options.labels}.json"
        (options.results / name).write_text(json.dumps(result, indent=1) + "\n")
        mean = sum(errors) / len(errors)
        print(f"{model}: mean error {mean:.2%} of {len(errors)} draws, published {PUBLISHED[model]} %")


if __name__ == "__main__":
    main()
