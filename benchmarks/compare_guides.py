"""Compare guides for one decoder against the exact evidence, and split each gap into its two parts.

    uv run benchmarks/compare_guides.py

A VAE with two latent dimensions is trained on digits. Each guide is then trained for its fixed p(z) p(x|z).
In two dimensions log p(x) is computed by quadrature, so the gap of each ELBO is known. As in Cremer, Li and
Duvenaud, 2018, Inference suboptimality in variational autoencoders, arXiv:1801.03558, the gap has two parts.
With q* the best member of the guide's family for one example,

    log p(x) − ELBO[q]  =  (log p(x) − ELBO[q*])  +  (ELBO[q*] − ELBO[q])
          gap           =      approximation       +     amortisation

q* is estimated by `SemiAmortised`: many ascent steps on the ELBO of each example, from the network's output.
In a local maximum the approximation part is overestimated; a few images with a bimodal posterior are enough
to change the mean visibly. The figures and the table are written to the folder --output.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.evaluation.importance_weights import summarise_weights

EVENT, K = (1, 28, 28), 2
REACH, POINTS = 5.0, 501  # grid over the latent plane: [-5, 5]², spacing 1/50

GUIDES = {
    "diagonal": lambda: pv.guides.DiagonalNormal(EVENT, K),
    "full covariance": lambda: pv.guides.FullCovarianceNormal(EVENT, K),
    "mixture of 4": lambda: pv.guides.Mixture(EVENT, K, num_components=4),
    "affine flow": lambda: pv.guides.Flow(EVENT, K, flow="iaf"),
    "spline flow": lambda: pv.guides.Flow(EVENT, K, flow="nsf", num_transforms=2),
}


def train_model(x: Tensor, args: argparse.Namespace) -> pv.VAE:
    """Train a VAE with two latent dimensions, of which only p(z) p(x|z) is used later."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, EVENT, hidden_features=(200, 200), activation="tanh"),
        guide=GUIDES["full covariance"](),
    )
    pv.fit(vae, x, epochs=args.model_epochs, seed=args.seed)
    return vae.requires_grad_(False)


def train_guide(vae: pv.VAE, name: str, x: Tensor, args: argparse.Namespace) -> tuple[pv.VAE, float]:
    """Train a guide for the fixed p(z) p(x|z); return the VAE with this guide, and the training seconds."""
    torch.manual_seed(args.seed)
    candidate = vae.with_guide(GUIDES[name]())
    started = time.perf_counter()
    pv.fit(
        candidate,
        x,
        estimator=Trace_ELBO(4, max_plate_nesting=1, vectorize_particles=True),
        epochs=args.epochs,
        seed=args.seed,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs),
    )
    return candidate, time.perf_counter() - started


@torch.no_grad()
def exact_posterior(vae: pv.VAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return grid points (points², 2), log p(x, z) there (points², N), and log p(x) (N,) by quadrature."""
    axis = torch.linspace(-REACH, REACH, POINTS)
    grid = torch.cartesian_prod(axis, axis)
    prior = vae.prior().log_prob(grid).unsqueeze(1)
    log_joint = torch.cat([_log_likelihood(vae, z, x) for z in grid.split(20_000)]).add(prior).double()
    area = float(axis[1] - axis[0]) ** 2
    return grid, log_joint, log_joint.logsumexp(0) + torch.tensor(area).log()


def _log_likelihood(vae: pv.VAE, z: Tensor, x: Tensor) -> Tensor:
    """Return log p(x|z) for each z and x, (len(z), N), by one matrix product: it is linear in binary x."""
    logits = vae.decode(z).base_dist.logits.flatten(1)
    return logits @ x.flatten(1).T - softplus(logits).sum(1, keepdim=True)


@torch.no_grad()
def log_weights(vae: pv.VAE, x: Tensor, draws: int, at_once: int = 50) -> Tensor:
    """Return log importance weights log p(x, z) − log q(z|x), (draws, N); their mean estimates the ELBO."""
    q = vae.encode(x)

    def run() -> Tensor:
        z = q.rsample((at_once,))
        return vae.log_joint(x, z) - q.log_prob(z)

    return torch.cat([run() for _ in range(draws // at_once)]).double()


def refined(vae: pv.VAE, args: argparse.Namespace) -> pv.VAE:
    """Return the VAE with q* in place of q: q refined for each example by a fixed number of steps."""
    steps = {"num_steps": args.refine_steps, "step_size": 0.1, "num_particles": 16}
    return vae.with_guide(pv.guides.SemiAmortised(vae.posterior, end_to_end=False, **steps))


def split_gap(weights: Tensor, best_weights: Tensor, evidence: Tensor) -> dict[str, Tensor]:
    """Return ELBO, gap, the parts of the gap, and Pareto k̂ of each example."""
    elbo, best = weights.mean(0), best_weights.mean(0)
    return {
        "elbo": elbo,
        "gap": evidence - elbo,
        "approximation": evidence - best,
        "amortisation": best - elbo,
        "pareto_k": summarise_weights(weights).pareto_k,
    }


def report(splits: dict[str, dict[str, Tensor]], costs: dict[str, tuple[int, float]]) -> list[dict[str, Any]]:
    """Print the table, and return its rows."""
    table = []
    parts = ("elbo", "gap", "approximation", "amortisation")
    print(f"{'guide':16}" + "".join(f"{part:>18}" for part in parts) + "  k̂ > 0.7  parameters  seconds")
    for name, split in splits.items():
        row: dict[str, Any] = {"guide": name}
        cells = ""
        for part in parts:
            mean, se = split[part].mean().item(), (split[part].std() / len(split[part]) ** 0.5).item()
            row |= {part: mean, f"{part}_se": se}
            cells += f"{mean:>10.3f} ± {se:.3f}"
        unreliable = (split["pareto_k"] > 0.7).double().mean().item()
        parameters, seconds = costs[name]
        row |= {"share_k_above_07": unreliable, "parameters": parameters, "seconds": seconds}
        print(f"{name:16}{cells}{unreliable:>9.0%}{parameters:>12,}{seconds:>9.1f}")
        table.append(row)
    print("nats per image ± one standard error over the images")
    return table


def draw_gaps(table: list[dict[str, Any]], k: dict[str, Tensor]) -> Figure:
    """Draw the two parts of each gap, and the distribution of k̂ over the examples."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    start = [0.0] * len(table)
    for part, colour in (("approximation", plots.PALETTE[0]), ("amortisation", plots.PALETTE[5])):
        width, error = ([row[name] for row in table] for name in (part, f"{part}_se"))
        left.barh([row["guide"] for row in table], width, left=start, xerr=error, color=colour, label=part)
        start = width
    left.invert_yaxis()
    left.margins(x=0.3)  # room for the legend
    left.set(
        xlabel="log p(x) − ELBO (nats per image, ± one standard error)",
        title="Gap of each guide, in two parts",
    )
    left.legend(loc="lower right")
    for colour, (name, values) in zip(plots.PALETTE, k.items(), strict=False):
        ordered = values.sort().values
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        right.step(ordered, share, where="post", color=colour, label=name)
    right.axvline(0.7, color="black", linestyle="--", linewidth=1)
    right.set(
        xlabel="Pareto k̂ of the importance weights (above 0.7: unreliable)",
        ylabel="share of the images",
        title="How well each guide covers the posterior",
    )
    right.legend(loc="upper left")
    return figure


@torch.no_grad()
def draw_posteriors(
    pairs: dict[str, tuple[pv.VAE, pv.VAE]], x: Tensor, grid: Tensor, log_posterior: Tensor
) -> Figure:
    """Draw q(z|x) and the refined q* for each image and guide, over the exact posterior in grey."""
    figure = Figure(figsize=(2 * (len(pairs) + 1), 2 * len(x) + 0.4), layout="constrained")
    axes = figure.subplots(len(x), len(pairs) + 1, squeeze=False)
    exact = log_posterior.exp()
    drawn = {
        name: [vae.encode(x).log_prob(grid.unsqueeze(1)).exp() for vae in pair]
        for name, pair in pairs.items()
    }
    plane = {"extent": (-REACH, REACH, -REACH, REACH), "origin": "lower"}
    for row, image in enumerate(x):
        axes[row, 0].imshow(image[0], cmap="gray_r")
        axes[row, 0].axis("off")
        shown = [exact[:, row], *(density[:, row] for pair in drawn.values() for density in pair)]
        seen = torch.stack([density > density.max() / 100 for density in shown]).any(0)
        low, high = grid[seen].amin(0), grid[seen].amax(0)
        centre, half = (low + high) / 2, 0.55 * float((high - low).max())
        for ax, (name, pair) in zip(axes[row, 1:], drawn.items(), strict=True):
            ax.imshow(exact[:, row].view(POINTS, POINTS).T, cmap="Greys", **plane)
            for density, colour in zip(pair, plots.PALETTE, strict=False):
                levels = [float(density[:, row].max()) * height for height in (0.135, 0.607)]  # 2σ, 1σ
                ax.contour(
                    density[:, row].view(POINTS, POINTS).T, levels, colors=colour, linewidths=1, **plane
                )
            ax.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
            ax.locator_params(nbins=3)
            ax.tick_params(labelsize=7)
            if ax is axes[row, 1]:
                ax.set(xlabel="z[0]", ylabel="z[1]")
            else:  # all axes of a row have the same limits
                ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(name, fontsize=10)
    figure.suptitle(
        "Exact posterior (grey), guide q(z|x) (blue) and best member of its family q* (red), at 1σ and 2σ",
        fontsize=10,
    )
    return figure


def main() -> None:
    """Train the model and the guides; write the table and figures."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    train = pv.data.load("digits", split="train", binarize="fixed", seed=args.seed)[:]
    test = pv.data.load("digits", split="test", binarize="fixed", seed=args.seed)[: args.test_size]
    vae = train_model(train, args)
    grid, log_joint, evidence = exact_posterior(vae, test)
    print(f"log p(x) of {len(test)} test digits, by quadrature: mean {evidence.mean():.2f} nats")

    pairs, splits, costs = {}, {}, {}
    for name in tqdm(GUIDES, unit=" guides", disable=None):
        guided, seconds = train_guide(vae, name, train, args)
        pairs[name] = guided, refined(guided, args)
        splits[name] = split_gap(*(log_weights(pair, test, args.draws) for pair in pairs[name]), evidence)
        costs[name] = sum(p.numel() for p in guided.posterior.parameters()), seconds
    table = report(splits, costs)

    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "guides.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    draw_gaps(table, {name: split["pareto_k"] for name, split in splits.items()}).savefig(
        args.output / "gaps.png", dpi=150
    )
    # images whose posterior differs most from a normal with independent dimensions
    hardest = splits["diagonal"]["approximation"].argsort(descending=True)[: args.shown]
    draw_posteriors(pairs, test[hardest], grid, (log_joint - evidence)[:, hardest]).savefig(
        args.output / "posteriors.png", dpi=150
    )
    print(f"in {args.output}: gaps.png, guides.csv, posteriors.png")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-epochs", type=int, default=30, help="epochs to train p(z) p(x|z) (default: %(default)s)")
    add("--epochs", type=int, default=15, help="epochs to train each guide (default: %(default)s)")
    add("--refine-steps", type=int, default=200, help="ascent steps for q* (default: %(default)s)")
    add("--test-size", type=int, default=100, help="digits for evaluation (default: %(default)s)")
    add("--draws", type=int, default=1000, help="draws of z per digit (default: %(default)s)")
    add("--shown", type=int, default=5, help="digits whose posteriors are drawn (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs/compare_guides"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    for name in ("model_epochs", "epochs", "refine_steps", "test_size", "shown"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.draws < 50:
        parser.error("--draws must be at least 50")
    return args


if __name__ == "__main__":
    main()
