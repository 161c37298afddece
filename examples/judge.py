"""Evaluate a trained VAE: held-out log p(x), whether its guide can be trusted, which dimensions it uses.

    uv run examples/mnist_svi.py                                # train a model
    uv run examples/judge.py runs/mnist_svi/vae.pt              # evaluate it, in less than a minute
    uv run examples/judge.py runs/mnist_svi/best.pt --particles 5000 --images 10000 --annealed 100

Look at log p(x) and at the line on k̂: above 0.7, which is usual for a diagonal guide, log p(x) is too low.
Annealed importance sampling does without the guide; it is too low on average too, so the higher of the two is
closer. Files are written beside the checkpoint. `pyro-vae evaluate` prints the report for other data.
"""

import argparse
import json
import sys
from pathlib import Path

from mnist_svi import load_data

import pyro_vae as pv


def main() -> None:
    """Evaluate the model; write the report, figures, and draws of the posterior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="vae.pt or best.pt of a run, or a file written by vae.save")
    add("--dataset", help="of a model without metrics.json beside it, which says what it was trained on")
    add("--data-root", type=Path, metavar="DIR", help="folder with a local copy in torchvision's layout")
    add("--images", type=int, default=1000, help="use the first so many test images (default: 1000)")
    add("--particles", type=int, default=1000, help="draws of z per image (default: 1000)")
    add("--annealed", type=int, default=10, help="images for annealed importance sampling (default: 10)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--output", type=Path, metavar="DIR", help="(default: judge_NAME beside the checkpoint NAME.pt)")
    args = parser.parse_args()
    vae = pv.VAE.load(args.checkpoint, device=args.device)
    images, seed = images_of_run(args)
    folder = args.output or args.checkpoint.with_name(f"judge_{args.checkpoint.stem}")
    folder.mkdir(parents=True, exist_ok=True)  # fail before the evaluation if it cannot be created
    if isinstance(vae.likelihood, pv.likelihoods.Bernoulli):
        images = images.binarized("fixed", seed=seed)
    images = images.subset(slice(args.images))
    report = pv.evaluate(vae, images, num_particles=args.particles, seed=seed)
    print(f"{args.checkpoint} on {images.name}, {len(images):,} images\n{report}")
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if n := args.annealed:
        few, guided = images.subset(slice(n)), report.per_datum.log_evidence[:n].mean()
        other = pv.annealed_importance_sampling(vae, few, num_temperatures=300, seed=seed)
        annealed = f"{other.log_evidence:.2f} ± {other.log_evidence_mc_se:.2f} annealed"
        print(f"log p(x) of the first {len(few)} images: {guided:.2f} by the guide's draws, {annealed}")
    pv.save_netcdf(pv.to_inference_data(vae, images.subset(slice(100)), seed=seed), folder / "draws.nc")
    k = report.pareto_k
    if k.isfinite().any():  # not of a few particles
        pv.plots.save(pv.plots.pareto_k_histogram(k[k.isfinite()]), folder / "pareto_k.png")
    if not report.kl_per_dimension.isnan().any():  # not of a flow, which has no KL for each dimension
        pv.plots.save(report.plot(), folder / "kl_per_dimension.png")
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def images_of_run(args: argparse.Namespace) -> tuple[pv.data.Images, int]:
    """Return the test images of the run that wrote the checkpoint, and the seed of their bits."""
    file = args.checkpoint.with_name("metrics.json")
    run = json.loads(file.read_text()) if file.exists() else {}
    used = run.get("settings", {}) | {name: value for name, value in vars(args).items() if value is not None}
    if "dataset" not in used:
        raise ValueError(f"there is no {file}, which would say what was trained on: give --dataset")
    _, images = load_data(used["dataset"], used.get("data_root"))
    expected = run.get("data", "MNIST test" if used["dataset"] == "mnist" else images.name)
    if images.name != expected:  # without MNIST, load takes some of its training images
        what = f"expected the test images {expected!r}, found {images.name!r}"
        raise ValueError(f"{what}: give --data-root with MNIST/raw, or --dataset digits if trained on them")
    return images, used.get("seed", 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
