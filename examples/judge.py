"""Evaluate a trained variational autoencoder: held-out log-evidence, and diagnostics of its guide.

    uv run examples/mnist_svi.py                                # train a model
    uv run examples/judge.py runs/mnist_svi/vae.pt              # evaluate it
    uv run examples/judge.py a/vae.pt --against b/vae.pt        # evaluate and compare two models
    uv run examples/judge.py runs/mnist_svi/best.pt --particles 5000 --images 10000

The report (text and JSON), figures and posterior draws for ArviZ (netCDF) are written to the folder --output.

With the same --seed as mnist_svi.py and all test images, the ELBO equals the test ELBO of mnist_svi.py up to
Monte Carlo noise: mnist_svi.py uses one draw of z per image.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae import plots


def main() -> None:
    """Evaluate the model, compare it with another if requested, and write results and figures."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)  # fail before the evaluation if it cannot be created
    vae = pv.VAE.load(args.checkpoint, device=args.device)
    binarize = args.binarize
    if binarize is None and isinstance(vae.likelihood, pv.likelihoods.Bernoulli):
        binarize = "dynamic"  # drawn once from the seed, so that all results use the same images
    images = pv.data.load(args.dataset, split=args.split, root=args.data_root)
    if binarize not in (None, "none"):  # before the subset, to match mnist_svi.py
        images = images.binarized("fixed" if binarize == "dynamic" else binarize, seed=args.seed)
    total, images = len(images), images.subset(slice(args.images))
    print(
        f"{args.checkpoint} on {images.name}, the first {len(images):,} of {total:,}, "
        f"binarised: {images.binarize}"
    )

    started = time.perf_counter()
    report = pv.evaluate(vae, images, num_particles=args.particles, seed=args.seed)
    print(f"{report}\n{time.perf_counter() - started:.0f} s\n")
    (args.output / "report.txt").write_text(f"{report}\n")
    numbers = {"checkpoint": str(args.checkpoint), "data": images.name, **report.as_dict()}
    (args.output / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")

    if args.annealed:
        print_second_opinion(vae, images.subset(slice(args.annealed)), report, args)
    idata = pv.to_inference_data(
        vae, images.subset(slice(args.kept)), num_samples=args.samples, seed=args.seed
    )
    pv.save_netcdf(idata, args.output / "draws.nc")
    if args.against is not None:
        print_comparison(pv.VAE.load(args.against, device=args.device), images, report, idata, args)
    draw(vae, images, report, args.output)
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


def print_second_opinion(
    vae: pv.VAE, images: pv.data.Images, report: pv.Evaluation, args: argparse.Namespace
) -> None:
    """Estimate log p(x) of some images by annealed importance sampling, which does not use the guide."""
    annealed = pv.annealed_importance_sampling(
        vae, images, num_chains=args.chains, num_temperatures=args.temperatures, seed=args.seed
    )
    first = report.per_datum
    mean = first.log_evidence[: len(images)].mean()
    error = first.log_evidence_mc_se[: len(images)].square().sum().sqrt() / len(images)
    print(f"log p(x) of the first {len(images)} images, ± Monte Carlo error:")
    print(f"  importance-weighted, S = {args.particles:,}{mean:>12.2f} ± {error:.2f}")
    print(
        f"  annealed, {args.chains} chains of {args.temperatures:,}{annealed.log_evidence:>14.2f}"
        f" ± {annealed.log_evidence_mc_se:.2f}, moves accepted {annealed.acceptance.mean():.0%}"
    )
    combined = math.hypot(error, annealed.log_evidence_mc_se)
    difference = annealed.log_evidence - mean
    print(
        f"  difference {difference:.2f} ± {combined:.2f}; both underestimate log p(x) on average, more "
        "where their Monte Carlo error is large\n"
    )


def print_comparison(
    other: pv.VAE, images: pv.data.Images, report: pv.Evaluation, idata: object, args: argparse.Namespace
) -> None:
    """Compare two VAEs on the same images by log p(x), and on the images kept for ArviZ by `az.compare`."""
    import arviz as az  # noqa: PLC0415 (slow)

    rival = pv.evaluate(other, images, num_particles=args.particles, seed=args.seed)
    print(f"{args.against}\n{rival}\n")
    difference = report.per_datum.log_evidence - rival.per_datum.log_evidence
    error = difference.std() / math.sqrt(len(difference))
    print(f"log p(x) of {args.checkpoint} minus {args.against}, ± standard error over the images:")
    doubt = ", UNRELIABLE: see above" if max(report.unreliable, rival.unreliable) > 0.5 else ""
    print(f"  {difference.mean():.2f} ± {error:.2f} nats per image{doubt}")
    kept = images.subset(slice(args.kept))
    draws = pv.to_inference_data(other, kept, num_samples=args.samples, seed=args.seed)
    table = az.compare({str(args.checkpoint): idata, str(args.against): draws})
    print(f"ArviZ's comparison, summed over {len(kept)} images:\n{table.to_string()}\n")


@torch.no_grad()
def draw(vae: pv.VAE, images: pv.data.Images, report: pv.Evaluation, folder: Path) -> None:
    """Write the figures."""
    vae.eval()
    torch.manual_seed(0)  # the same figures in each run
    device = next(vae.parameters()).device
    shown = images[:10].to(device)
    some = images[:2000].to(device)
    figures = {
        "reconstructions": plots.reconstructions(shown, vae.reconstruct(shown).clamp(0, 1)),
        "samples": plots.image_grid(
            vae.sample(64, mean=True).clamp(0, 1), title="E[x|z] for z drawn from the prior"
        ),
        "convergence": convergence(report),
    }
    k = report.pareto_k[report.pareto_k.isfinite()]
    if len(k):
        figures["pareto_k"] = plots.pareto_k_histogram(k)
    if not report.kl_per_dimension.isnan().any():
        figures["kl_per_dimension"] = plots.kl_per_dimension(
            report.kl_per_dimension, report.kl_per_dimension_se
        )
        busiest = report.kl_per_dimension.argsort(descending=True)[:8].tolist()
        standard = isinstance(vae.prior, pv.priors.StandardNormal)  # its density is drawn as a curve
        figures["aggregate_posterior"] = plots.aggregate_posterior(
            vae.encode(some).sample(),
            dims=busiest,
            prior=None if standard else vae.prior().sample((len(some),)),
        )
    if report.per_datum.unit_mean.shape[1] > 1:
        figures["latent"] = plots.latent_scatter(
            report.per_datum.unit_mean,
            images.labels,
            title=f"Means of q(z|x) for {len(images):,} images",
        )
    for name, axes in figures.items():
        plots.save(axes, folder / f"{name}.png")


def convergence(report: pv.Evaluation) -> object:
    """Draw the importance-weighted bound against the number of particles, with the ELBO."""
    axes = Figure(figsize=(6.4, 4), dpi=150, layout="constrained").add_subplot()
    sizes, bounds = list(report.convergence), list(report.convergence.values())
    values, errors = zip(*bounds, strict=True)
    style = {"color": plots.PALETTE[0], "marker": "o", "markersize": 4, "capsize": 3}
    axes.errorbar(sizes, values, errors, label="bound $L_S$ ± Monte Carlo error", **style)
    axes.axhline(report.elbo, color="black", linestyle="--", linewidth=1, label="ELBO")
    axes.set(
        xscale="log",
        xlabel="particles S per image",
        ylabel="nats per image",
        title=f"Importance-weighted bound of {report.num_data:,} images",
    )
    axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1, edgecolor="none")
    return axes


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="file written by vae.save, or best.pt of a run")
    parser.add_argument("--against", type=Path, metavar="FILE", help="second model, to compare with")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="mnist", metavar="NAME", help="as in mnist_svi.py (default: %(default)s)")
    add("--split", choices=("train", "test"), default="test", help="(default: %(default)s)")
    add("--data-root", type=Path, metavar="DIR", help="folder with a local copy")
    add(
        "--binarize",
        choices=("dynamic", "fixed", "threshold", "none"),
        help="binarisation of grey levels; dynamic and fixed both draw once, from the seed "
        "(default: dynamic for a Bernoulli likelihood, none for others)",
    )
    add("--images", type=int, default=1000, metavar="N", help="use the first N images (default: %(default)s)")
    add = parser.add_argument_group("estimates").add_argument
    add("--particles", type=int, default=1000, metavar="S", help="draws per image (default: %(default)s)")
    add(
        "--annealed",
        type=int,
        default=10,
        metavar="N",
        help="images for annealed importance sampling, 0 to skip it (default: %(default)s)",
    )
    add("--chains", type=int, default=16, help="annealing chains per image (default: %(default)s)")
    add("--temperatures", type=int, default=300, help="temperatures per chain (default: %(default)s)")
    add("--kept", type=int, default=100, metavar="N", help="images exported to ArviZ (default: %(default)s)")
    add("--samples", type=int, default=200, help="draws per image for ArviZ (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/judge"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args()
    for name in ("images", "particles", "chains", "temperatures", "kept", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
