"""Evaluate a trained VAE: held-out log p(x), whether its guide can be trusted, which dimensions it uses.

    uv run examples/mnist_svi.py                                # train a model
    uv run examples/judge.py runs/mnist_svi/vae.pt              # evaluate it, in less than a minute
    uv run examples/judge.py runs/mnist_svi/best.pt --particles 5000 --images 10000 --annealed 100

Look at log p(x) and at the line on k̂: above 0.7, which is usual for a diagonal guide, log p(x) is too low.
Annealed importance sampling, which does without the guide, is a second opinion. Report, figures and draws for
ArviZ are written to the folder --output. `pyro-vae evaluate` prints the report for other data.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pyro_vae as pv


def main() -> None:
    """Evaluate the model; write the report, figures, and draws of the posterior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="file written by vae.save, or best.pt of a run")
    add("--dataset", default="mnist", help="as in mnist_svi.py")
    add("--data-root", type=Path, metavar="DIR", help="folder with a local copy in torchvision's layout")
    add("--images", type=int, default=1000, help="use the first so many test images (default: 1000)")
    add("--particles", type=int, default=1000, help="draws of z per image (default: 1000)")
    add("--annealed", type=int, default=10, help="images for annealed importance sampling (default: 10)")
    add("--seed", type=int, default=0, help="as in mnist_svi.py, for the same bits (default: 0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--output", type=Path, default=Path("runs/judge"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)  # fail before the evaluation if it cannot be created
    vae = pv.VAE.load(args.checkpoint, device=args.device)
    images = pv.data.load(args.dataset, split="test", root=args.data_root)
    if isinstance(vae.likelihood, pv.likelihoods.Bernoulli):
        images = images.binarized("fixed", seed=args.seed)
    images = images.subset(slice(args.images))
    report = pv.evaluate(vae, images, num_particles=args.particles, seed=args.seed)
    print(f"{args.checkpoint} on {images.name}, {len(images):,} images\n{report}")
    (args.output / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if args.annealed:
        print_second_opinion(vae, images.subset(slice(args.annealed)), report, args.seed)
    pv.save_netcdf(
        pv.to_inference_data(vae, images.subset(slice(100)), seed=args.seed), args.output / "draws.nc"
    )

    figures, k, means = {}, report.pareto_k, report.per_datum.unit_mean
    if k.isfinite().any():  # not of a few particles
        figures["pareto_k"] = pv.plots.pareto_k_histogram(k[k.isfinite()])
    if not report.kl_per_dimension.isnan().any():  # not of a flow, which has no KL for each dimension
        figures["kl_per_dimension"] = report.plot()
    if means.shape[1] > 1:
        title = f"Posterior means of {len(images):,} images"
        figures["latent"] = pv.plots.latent_scatter(means, images.labels, title=title)
    for name, axes in figures.items():
        pv.plots.save(axes, args.output / f"{name}.png")
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


def print_second_opinion(vae: pv.VAE, images: pv.data.Images, report: pv.Evaluation, seed: int) -> None:
    """Estimate log p(x) of some images by annealed importance sampling, beside the estimate by the guide."""
    annealed = pv.annealed_importance_sampling(vae, images, num_chains=16, num_temperatures=300, seed=seed)
    first = report.per_datum
    mean = first.log_evidence[: len(images)].mean()
    error = first.log_evidence_mc_se[: len(images)].square().sum().sqrt() / len(images)
    difference = annealed.log_evidence - mean
    print(f"log p(x) of the first {len(images)} images, ± Monte Carlo error; both are too low on average:")
    print(f"  by the guide's draws  {mean:9.2f} ± {error:.2f}")
    print(f"  annealed              {annealed.log_evidence:9.2f} ± {annealed.log_evidence_mc_se:.2f}")
    print(f"  difference            {difference:9.2f} ± {math.hypot(error, annealed.log_evidence_mc_se):.2f}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
