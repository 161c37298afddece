"""Classify digits given 100 labels and 3,900 images without: a VAE, and a semi-supervised one on top.

    uv run examples/semi_supervised.py                   # a minute on two idle cores
    uv run examples/semi_supervised.py --labels 500

First a VAE is trained on all images, without labels (M1); then a `SemiSupervisedVAE` on the means of its
latent vectors, with y = −1 where the label is missing (M2). Look at the error of M2 beside that of a network
of the same size trained on the labels alone, on the same features; and at samples.png, digits by class.
"""

import argparse
import signal
from pathlib import Path

import torch
from sklearn.neural_network import MLPClassifier

import pyro_vae as pv

SHAPE, CLASSES, K1, K2 = (1, 28, 28), 10, 20, 10  # of images; latent dimensions of M1 and M2


def make_m1() -> pv.VAE:
    """Return p(z) p(x|z) with q(z|x), for images."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(K1),
        likelihood=pv.likelihoods.Bernoulli(K1, SHAPE),
        guide=pv.guides.DiagonalNormal(SHAPE, K1),
    )


def make_m2() -> pv.SemiSupervisedVAE:
    """Return p(y) p(z) p(x|z, y) with q(y|x) q(z|x, y), for the means of q(z|x) of M1."""
    network = {"hidden_features": (200,), "context_dim": CLASSES}
    return pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(K2),
        likelihood=pv.likelihoods.Normal(K2, (K1,), variance="per_element", **network),
        guide=pv.guides.DiagonalNormal((K1,), K2, **network),
        classifier=pv.networks.MLP(K1, CLASSES, hidden_features=(200,)),
        num_classes=CLASSES,
    )


def main() -> None:
    """Train, classify and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--labels", type=int, default=100, help="equally many of each class (default: 100)")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the data, twice (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/semi_supervised"), metavar="DIR")
    args = parser.parse_args()
    fit = {"epochs": args.epochs, "batch_size": 100, "seed": args.seed}

    torch.manual_seed(args.seed)
    train, test = (pv.data.load("digits", split=split) for split in ("train", "test"))
    m1, m2 = make_m1(), make_m2()
    pv.fit(m1, train.binarized("dynamic"), **fit)
    with torch.no_grad():
        x, x_test = (m1.encode(images[:]).mean for images in (train, test))
    y, n = train.labels.clone(), args.labels
    y[n:] = -1  # missing
    pv.fit(m2, (x, y), **fit)
    alone = MLPClassifier((200,), solver="lbfgs", random_state=args.seed).fit(x[:n], y[:n])

    found = {"labels alone": torch.from_numpy(alone.predict(x_test))}
    found["semi-supervised"] = m2.predict_proba(x_test).argmax(-1)
    for name, classes in found.items():
        wrong = (classes != test.labels).double()
        print(f"{name:<16} error {wrong.mean():6.1%} ± {wrong.std() / len(wrong) ** 0.5:.1%}")
    args.output.mkdir(parents=True, exist_ok=True)
    classes = torch.arange(CLASSES).repeat_interleave(12)
    drawn = m1.decode(m2.sample(len(classes), y=classes)).mean.detach()
    axes = pv.plots.image_grid(drawn, columns=12, title="a class a row: drawn by M2, decoded by M1")
    pv.plots.save(axes, args.output / "samples.png")
    print(f"figure in {args.output / 'samples.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
