"""Train a model of a published table on MNIST, and compare its log p(x) with the published value.

    uv run benchmarks/published/mnist.py --list
    uv run benchmarks/published/mnist.py --row iwae-5 --epochs 40 --data-root DIR
    uv run benchmarks/published/mnist.py --row iwae-50 --device cuda      # at the published length
    uv run benchmarks/published/mnist.py --row iwae-5 --epochs 40 --resume

Each run trains one row. Checkpoints are written to the folder --runs, a JSON file with the results and the
table of all such files to the folder --results. --resume continues an interrupted run.

Burda's schedule has eight learning rates, 1e-3 · 10^(-i/7) for 3^i epochs each, 3,280 in total. With fewer
epochs all eight are used for equally many epochs each.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import MLP, apply_batched, positive

IMAGE = (1, 28, 28)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Training settings that a paper used for all its rows."""

    source: str
    epochs: int
    batch_size: int
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    stages: int = 1  # number of learning rates; each is 10^(-1/7) times the previous one
    kl_warmup: int = 0
    patience: int | None = None


BURDA = Recipe(
    "Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519, table 1",
    epochs=3280,
    batch_size=20,
    optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, eps=1e-4),
    stages=8,
)
GATED = Recipe(
    "Tomczak, Welling 2018, arXiv:1705.07120, and repetitions of it with IWAE",
    epochs=2000,
    batch_size=100,
    optimizer=lambda parameters: torch.optim.Adam(parameters, 5e-4),
    kl_warmup=100,
    patience=50,
)


@dataclass(frozen=True)
class Row:
    """Row of a published table: model, objective, and the published −log p(x) in nats."""

    published: float
    recipe: Recipe
    model: str
    objective: str
    k: int = 1
    binarize: str = "dynamic"

    def estimator(self) -> ELBO:
        """Return the bound to maximise, with k draws per image."""
        if self.objective == "IWAE":
            return pv.IWAE(self.k)
        # analytic KL; sampled for two layers, where no closed form is known
        kind = Trace_ELBO if self.model == "two layers" else TraceMeanField_ELBO
        return kind(self.k, max_plate_nesting=1, vectorize_particles=self.k > 1)


ROWS = {
    "vae-1": Row(86.76, BURDA, "one layer", "VAE", 1),
    "vae-5": Row(86.47, BURDA, "one layer", "VAE", 5),
    "vae-50": Row(86.35, BURDA, "one layer", "VAE", 50),
    "iwae-5": Row(85.54, BURDA, "one layer", "IWAE", 5),
    "iwae-50": Row(84.78, BURDA, "one layer", "IWAE", 50),
    "2-vae-1": Row(85.33, BURDA, "two layers", "VAE", 1),
    "2-vae-5": Row(85.01, BURDA, "two layers", "VAE", 5),
    "2-vae-50": Row(84.78, BURDA, "two layers", "VAE", 50),
    "2-iwae-5": Row(83.89, BURDA, "two layers", "IWAE", 5),
    "2-iwae-50": Row(82.90, BURDA, "two layers", "IWAE", 50),
    "gated-vae-1": Row(84.45, GATED, "gated", "VAE", 1),
    "gated-iwae-5": Row(83.37, GATED, "gated", "IWAE", 5),
    "gated-iwae-50": Row(82.88, GATED, "gated", "IWAE", 50),
    "gated-vamp": Row(82.29, GATED, "gated, VampPrior", "VAE", 1),
    "static-gated-vamp": Row(85.57, GATED, "gated, VampPrior", "VAE", 1, binarize="static"),
}


class NormalLayer(nn.Module):
    """Normal distribution over (*, out) given (*, in), by a network with two hidden layers."""

    def __init__(self, in_features: int, out_features: int, units: int):
        super().__init__()
        self.network = MLP(in_features, 2 * out_features, hidden_features=(units, units), activation="tanh")

    def forward(self, inputs: Tensor) -> dist.Distribution:
        loc, raw_scale = apply_batched(self.network, inputs, 1).chunk(2, dim=-1)
        return dist.Normal(loc, positive(raw_scale)).to_event(1)


class Chain(dist.TorchDistribution):
    """Joint distribution p(a) p(b|a) of the vector (a, b), or of (b, a) if `reverse`."""

    arg_constraints: ClassVar[dict] = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, first: dist.Distribution, then: NormalLayer, size: int, *, reverse: bool = False):
        self.first, self.then, self.size, self.reverse = first, then, size, reverse
        super().__init__(first.batch_shape, (size,), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Chain":
        return Chain(self.first.expand(batch_shape), self.then, self.size, reverse=self.reverse)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        a = self.first.rsample(sample_shape)
        b = self.then(a).rsample()
        return torch.cat([b, a] if self.reverse else [a, b], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        sizes = self.first.event_shape[0], self.size - self.first.event_shape[0]
        b, a = value.split(sizes[::-1], dim=-1) if self.reverse else value.split(sizes, dim=-1)[::-1]
        return self.first.log_prob(a) + self.then(a).log_prob(b)


class TwoLayerPrior(nn.Module):
    """Prior p(z2) p(z1|z2) over (z1, z2), with 100 and 50 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.lower = pv.priors.StandardNormal(50), NormalLayer(50, 100, 100)

    def forward(self) -> dist.Distribution:
        return Chain(self.top(), self.lower, 150, reverse=True)


class TwoLayerGuide(nn.Module):
    """Guide q(z1|x) q(z2|z1) over (z1, z2)."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.top = NormalLayer(784, 100, 200), NormalLayer(100, 50, 100)

    def forward(self, x: Tensor) -> dist.Distribution:
        return Chain(self.lower(x.flatten(-3)), self.top, 150)


class LowerLayer(nn.Module):
    """Network of p(x|z1), applied to (z1, z2)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(100, 784, hidden_features=(200, 200), activation="tanh")

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z[..., :100])


class Gated(nn.Module):
    """Gated linear layer: a linear layer times the sigmoid of another."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.value, self.gate = nn.Linear(in_features, out_features), nn.Linear(in_features, out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value(inputs) * torch.sigmoid(self.gate(inputs))


def gated_network(in_features: int, out_features: int) -> nn.Module:
    layers = Gated(in_features, 300), Gated(300, 300), nn.Linear(300, out_features)
    return nn.Sequential(nn.Flatten(), *layers)


def build(row: Row, mean: Tensor) -> pv.VAE:
    """Return the model and guide with Glorot initialisation; the initial output is the mean image."""
    Bernoulli, Normal = pv.likelihoods.Bernoulli, pv.guides.DiagonalNormal
    prior: nn.Module
    guide: nn.Module
    if row.model == "one layer":
        options = {"hidden_features": (200, 200), "activation": "tanh"}
        prior, likelihood, guide = (
            pv.priors.StandardNormal(50), Bernoulli(50, IMAGE, **options), Normal(IMAGE, 50, **options)
        )  # fmt: skip
        output = likelihood.network[-1]
    elif row.model == "two layers":
        decoder = LowerLayer()
        prior, likelihood, guide = TwoLayerPrior(), Bernoulli(150, IMAGE, network=decoder), TwoLayerGuide()
        output = decoder.network[-1]
    else:
        likelihood = Bernoulli(40, IMAGE, network=gated_network(40, 784))
        guide = Normal(IMAGE, 40, network=gated_network(784, 80))
        vamp = row.model == "gated, VampPrior"
        prior = pv.priors.VampPrior(guide, num_components=500) if vamp else pv.priors.StandardNormal(40)
        output = likelihood.network[-1]
    vae = pv.VAE(prior=prior, likelihood=likelihood, guide=guide)
    for module in vae.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        output.bias.copy_(mean.clamp(0.001, 0.999).logit().flatten())
    return vae


def load(row: Row, split: str, root: Path | None) -> pv.data.Images:
    """Load MNIST, binarised dynamically, or the fixed binarisation of Larochelle and Murray ("static")."""
    if row.binarize == "dynamic":
        return pv.data.load("mnist", split=split, root=root, binarize="dynamic")
    (path,) = Path(root or ".").rglob("binarized_mnist*.npz")  # bits packed along the pixels
    bits = torch.from_numpy(np.unpackbits(np.load(path)[split], axis=1)).view(-1, *IMAGE)
    return pv.data.Images(255 * bits, name=f"binarised MNIST, {split}", binarize="fixed")


def schedule(recipe: Recipe, epochs: int) -> Callable[[torch.optim.Optimizer], object]:
    """Return a schedule with Burda's stages of 3^i epochs, or equal stages if `epochs` is smaller."""
    ends = [
        (3 ** (i + 1) - 1) // 2 if epochs >= recipe.epochs else epochs * (i + 1) / recipe.stages
        for i in range(recipe.stages)
    ]
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 10 ** (-sum(epoch >= end for end in ends[:-1]) / 7)
    )


def main() -> None:
    args = parse_arguments()
    if args.list:
        for name, row in ROWS.items():
            kind = f"{row.model}, {row.objective}, k = {row.k}"
            print(f"{name:18} {row.published:6.2f}  {kind:32} {row.recipe.source}")
        return
    if args.row is None:
        write_table(args.results)
        return
    row = ROWS[args.row]
    epochs = args.epochs or row.recipe.epochs
    train = load(row, "train", args.data_root)
    test = load(row, "test", args.data_root).subset(slice(args.test_size))
    torch.manual_seed(args.seed)
    vae = build(row, train.mean()).to(args.device)
    history = pv.fit(
        vae,
        train,
        estimator=row.estimator(),
        epochs=epochs,
        batch_size=row.recipe.batch_size,
        seed=args.seed,
        optimizer=row.recipe.optimizer,
        schedule=schedule(row.recipe, epochs),
        kl_warmup=row.recipe.kl_warmup,
        patience=row.recipe.patience,
        validation=1 / 6 if row.recipe.patience else None,
        engine=args.engine,
        checkpoint_dir=args.runs / f"{args.row}-{epochs}-seed{args.seed}",
        resume=args.resume,
        callbacks=[lambda _, epoch: print(json.dumps(vars(epoch)), flush=True)],
        progress=args.progress,
    )
    started = time.perf_counter()
    report = pv.evaluate(
        vae, test, num_particles=args.particles, seed=args.seed, aggregate_size=0, progress=args.progress
    )
    result = {
        "row": args.row,
        "published": row.published,
        "negative_log_evidence": -report.log_evidence,
        "standard_error": report.log_evidence_se,
        "monte_carlo_error": report.log_evidence_mc_se,
        "negative_elbo": -report.elbo,
        "particles": args.particles,
        "test_images": len(test),
        "epochs": len(history),
        "published_epochs": row.recipe.epochs,
        "steps": len(history) * -(-len(train) // row.recipe.batch_size),
        "seed": args.seed,
        "training_seconds": sum(history.column("seconds")),
        "evaluation_seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "processors": os.cpu_count(),
        "architecture": platform.machine(),
        "engine": args.engine,
        "versions": {name: metadata.version(name) for name in ("pyro_vae", "torch", "pyro-ppl")},
    }
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"{args.row}-{epochs}-seed{args.seed}"
    torch.save(report.per_datum.log_evidence, args.runs / name / "log_evidence.pt")
    (args.results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    compare(args.results, args.runs)
    write_table(args.results)


def compare(results: Path, runs: Path) -> None:
    """Add to each result its difference to the one-layer VAE of as many epochs, paired by image."""
    for path in results.glob("*.json"):
        result = json.loads(path.read_text())
        other = runs / f"vae-1-{result['epochs']}-seed{result['seed']}" / "log_evidence.pt"
        own = runs / path.stem / "log_evidence.pt"
        if own != other and own.exists() and other.exists():
            gain, base = torch.load(own), torch.load(other)
            if len(gain) != len(base):  # different test images
                continue
            gain = gain - base
            result["below_vae"] = [gain.mean().item(), gain.std().item() / len(gain) ** 0.5]
            path.write_text(json.dumps(result, indent=2) + "\n")


def write_table(folder: Path) -> None:
    """Write and print a table of all results in a folder with the published values."""
    lines = [
        "| row | published, epochs | obtained, epochs | ± | below vae-1 of as many epochs | images, S | seed "
        "| training, evaluation, min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        r = json.loads(path.read_text())
        below = "{:.2f} ± {:.2f}".format(*r["below_vae"]) if "below_vae" in r else ""
        lines.append(
            f"| {r['row']} | {r['published']:.2f}, {r['published_epochs']:,} "
            f"| **{r['negative_log_evidence']:.2f}**, {r['epochs']:,} | {r['standard_error']:.2f} | {below} "
            f"| {r['test_images']:,}, {r['particles']:,} | {r['seed']} "
            f"| {r['training_seconds'] / 60:.0f}, {r['evaluation_seconds'] / 60:.0f} |"
        )
    table = "\n".join(lines)
    (folder / "table.md").write_text(table + "\n")
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--row", choices=ROWS, metavar="NAME", help="of --list; without it, the table is made anew")
    add("--list", action="store_true", help="show the rows")
    add("--epochs", type=int, help="passes over the data (default: as published)")
    add("--seed", type=int, default=0)
    add("--particles", type=int, default=5000, help="S of the estimate of log p(x) (default: %(default)s)")
    add("--test-size", type=int, default=10_000, help="test images, the first (default: %(default)s)")
    add("--data-root", type=Path, help="folder of a local copy, as torchvision lays it out")
    add("--device", default="cpu")
    add("--engine", choices=("auto", "eager", "traced", "compiled"), default="auto")
    add("--runs", type=Path, default=Path("runs/published"), help="checkpoints (default: %(default)s)")
    add("--results", type=Path, default=HERE / "results", help="numbers (default: %(default)s)")
    add("--resume", action="store_true", help="go on with a run that was stopped")
    add("--progress", action="store_true", help="show progress bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
