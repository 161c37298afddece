"""Measure how far the guides of `examples/custom_guide.py` are from log p(x), for one model of digits.

    uv run benchmarks/custom_guides.py

The model p(z) p(x|z) is fixed, so the gap log p(x) − ELBO measures the guide alone. The function and the
autoguide are trained by Pyro alone: its SVI, optimiser and parameter store.
"""

import argparse
import itertools
import runpy
from collections.abc import Iterable
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from tqdm import trange

import pyro_vae as pv
from pyro_vae.evaluation.importance_weights import summarise_weights

EVENT, K = (1, 28, 28), 10
EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_guide.py"


def train_by_pyro(vae: pv.VAE, batches: Iterable[Tensor], *, lr: float) -> None:
    """Train with Pyro alone: its SVI, optimiser and parameter store."""
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for batch in batches:
        svi.step(batch)


@torch.no_grad()
def log_weights(vae: pv.VAE, x: Tensor, num_particles: int = 400) -> Tensor:
    """Return the log importance weights log p(x, z) − log q(z|x), shape (S, N)."""
    at_once = 20
    runs = trange(0, num_particles, at_once, desc="evaluating", unit=" runs", leave=False, disable=None)
    return torch.cat([pv.terms(vae, x, num_particles=at_once).log_weight for _ in runs])


def train(train_set: Tensor, test: Tensor, epochs: int, seed: int) -> dict[str, Tensor]:
    """Train a model, then each guide for it; return the log weights of each for the test digits."""
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, EVENT),
        guide=pv.guides.DiagonalNormal(EVENT, K),
    )
    pv.fit(vae, train_set, epochs=epochs, seed=seed)
    vae.requires_grad_(False)  # p(z) p(x|z) is fixed from here on
    module = vae.with_guide(example["HeavyTails"]())
    pv.fit(module, train_set, epochs=epochs, seed=seed)
    function = vae.with_guide(example["pyro_guide"])
    passes = trange(epochs, unit=" epochs", disable=None)
    shuffled = (train_set[torch.randperm(len(train_set))].split(128) for _ in passes)
    train_by_pyro(function, itertools.chain.from_iterable(shuffled), lr=1e-3)
    fixed = vae.with_guide(AutoNormal(vae.model, init_scale=0.3))  # parameters for each test digit
    train_by_pyro(fixed, (test for _ in trange(600, unit=" steps", disable=None)), lr=0.02)
    pairs = {"DiagonalNormal": vae, "(a) module": module, "(b) function": function, "(c) AutoNormal": fixed}
    weights = {name: log_weights(pair, test) for name, pair in pairs.items()}
    pyro.clear_param_store()  # which holds the parameters of (b) and (c)
    return weights


def main() -> None:
    """Train the guides and compare them."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--epochs", type=int, default=30, help="passes over the data (default: %(default)s)")
    add("--test-size", type=int, default=200, help="digits for evaluation (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    if min(args.epochs, args.test_size) < 1:
        parser.error("--epochs and --test-size must be at least 1")
    train_set, test = (
        pv.data.load("digits", split=split, binarize="fixed", seed=args.seed)[:]
        for split in ("train", "test")
    )
    weights = train(train_set, test[: args.test_size], args.epochs, args.seed)

    # each estimate of log p(x) is a lower bound on average, tighter for a better guide: use the largest
    evidence = max((summarise_weights(w).log_mean for w in weights.values()), key=torch.mean)
    print(f"\n{'guide':16}{'ELBO':>18}{'log p(x) − ELBO':>18}{'k̂ > 0.7':>9}")
    for name, log_weight in weights.items():
        elbo = log_weight.double().mean(0)
        bad = (summarise_weights(log_weight).pareto_k > 0.7).double().mean()
        cells = (f"{v.mean():.2f} ± {v.std() / len(v) ** 0.5:.2f}" for v in (elbo, evidence - elbo))
        print(f"{name:16}" + "".join(f"{cell:>18}" for cell in cells) + f"{bad:9.0%}")
    print(
        f"means over {len(evidence)} test digits ± one standard error, in nats per image\nmean log p(x) = "
        f"{evidence.mean():.2f}, by {len(log_weight)} draws of the guide with the highest estimate\n"
        "(c) has no amortisation gap; its gap is the approximation gap of independent normals"
    )


if __name__ == "__main__":
    main()
