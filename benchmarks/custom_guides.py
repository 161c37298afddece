"""Write your own guide in three ways. All three approximate the posterior of one model of digits.

    uv run benchmarks/custom_guides.py

(a) A module from x to a distribution over z, which is all that a `VAE` requires.
(b) A plain Pyro guide: a function that draws the model's site "z" in the model's plate "data".
(c) A non-amortised guide, such as Pyro's autoguides: parameters for each example of a fixed set, no network.

`check_guide` reports for each guide, before training, whether it matches the model and which estimators are
valid. The model p(z) p(x|z) is fixed, so the gap log p(x) − ELBO measures the guide alone.
"""

import argparse
import itertools
from collections.abc import Iterable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from tqdm import trange

import pyro_vae as pv
from pyro_vae.evaluation.importance_weights import summarise_weights
from pyro_vae.networks import positive

EVENT, K = (1, 28, 28), 10


class HeavyTails(nn.Module):
    """(a) Module guide: q(z|x) is Student's t, with heavy tails."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.SiLU(), nn.Linear(400, 2 * K))

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (N,) and event shape (K,)."""
        loc, raw_scale = self.network(x).chunk(2, dim=-1)
        return dist.StudentT(8.0, loc, positive(raw_scale)).to_event(1)


encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.Tanh(), nn.Linear(400, 2 * K))


def pyro_guide(x: Tensor) -> None:
    """(b) Plain Pyro guide. `pyro.module` registers the parameters; the plate is the model's."""
    pyro.module("encoder", encoder)
    loc, raw_scale = encoder(x).chunk(2, dim=-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, positive(raw_scale)).to_event(1))


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
    return torch.cat([pv.terms(vae.model, vae.guide, x, num_particles=at_once).log_weight for _ in runs])


def main() -> None:
    """Train a model, then each guide for it; compare the guides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the data (default: %(default)s)")
    parser.add_argument(
        "--test-size", type=int, default=200, help="digits for evaluation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    if min(args.epochs, args.test_size) < 1:
        parser.error("--epochs and --test-size must be at least 1")

    torch.manual_seed(args.seed)
    train = pv.data.load("digits", split="train", binarize="fixed", seed=args.seed)[:]
    test = pv.data.load("digits", split="test", binarize="fixed", seed=args.seed)[: args.test_size]
    fit = {"epochs": args.epochs, "seed": args.seed}

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, EVENT),
        guide=pv.guides.DiagonalNormal(EVENT, K),
    )
    print("the model, with the library's diagonal normal guide")
    pv.fit(vae, train, **fit)
    vae.requires_grad_(False)  # p(z) p(x|z) is fixed from here on

    weights = {"DiagonalNormal": log_weights(vae, test)}

    print("\n(a) a module from x to a distribution over z")
    own_module = vae.with_guide(HeavyTails())
    print(pv.check_guide(own_module.model, own_module.guide, train[:8]))
    pv.fit(own_module, train, **fit)
    weights["(a) module"] = log_weights(own_module, test)

    print("\n(b) a plain Pyro guide function")
    own_function = vae.with_guide(pyro_guide)
    print(pv.check_guide(own_function.model, own_function.guide, train[:8]))
    shuffled = (
        train[torch.randperm(len(train))].split(128)
        for _ in trange(args.epochs, unit=" epochs", disable=None)
    )
    train_by_pyro(own_function, itertools.chain.from_iterable(shuffled), lr=1e-3)
    weights["(b) function"] = log_weights(own_function, test)

    print(f"\n(c) a non-amortised guide, for the {len(test)} test digits only")
    own_global = vae.with_guide(AutoNormal(vae.model, init_scale=0.3))  # one row per example of `test`
    print(pv.check_guide(own_global.model, own_global.guide, test))
    train_by_pyro(own_global, (test for _ in trange(600, unit=" steps", disable=None)), lr=0.02)
    weights["(c) AutoNormal"] = log_weights(own_global, test)
    pyro.clear_param_store()  # which holds the parameters of (b) and (c)

    # each estimate of log p(x) is a lower bound on average, tighter for a better guide: use the largest
    evidence = max((summarise_weights(w).log_mean for w in weights.values()), key=torch.mean)
    print(f"\n{'guide':16}{'ELBO':>18}{'log p(x) − ELBO':>18}{'k̂ > 0.7':>9}")
    for name, log_weight in weights.items():
        elbo = log_weight.double().mean(0)
        bad = (summarise_weights(log_weight).pareto_k > 0.7).double().mean()
        cells = (f"{v.mean():.2f} ± {v.std() / len(v) ** 0.5:.2f}" for v in (elbo, evidence - elbo))
        print(f"{name:16}" + "".join(f"{cell:>18}" for cell in cells) + f"{bad:9.0%}")
    print(
        f"means over {len(test)} test digits ± one standard error, in nats per image\nmean log p(x) = "
        f"{evidence.mean():.2f}, by {len(log_weight)} draws of the guide with the highest estimate\n"
        "(c) has no amortisation gap; its gap is the approximation gap of independent normals"
    )


if __name__ == "__main__":
    main()
