"""Write q(z|x) in three ways: a module, a Pyro function, and an autoguide without a network.

    uv run examples/custom_guide.py                  # half a minute on two idle cores
    uv run examples/custom_guide.py --epochs 30      # closer to what each guide can do

Look at the last column: p(z) p(x|z) is the same in each row, so what a guide gains on the library's, in the
ELBO of the same digits, it gains by being closer to the posterior. `benchmarks/custom_guides.py` measures
how far each is from log p(x).
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import positive

SHAPE, K = (1, 28, 28), 10


class HeavyTails(nn.Module):
    """(a) A module from x to a distribution over z, here Student's t: all that a `VAE` requires."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.SiLU(), nn.Linear(400, 2 * K))

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (N,) and event shape (K,)."""
        loc, raw_scale = self.network(x).chunk(2, dim=-1)
        return dist.StudentT(8.0, loc, positive(raw_scale)).to_event(1)


encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.Tanh(), nn.Linear(400, 2 * K))


def pyro_guide(x: Tensor) -> None:
    """(b) A Pyro function: `pyro.module` registers the parameters, plate and site are the model's."""
    pyro.module("encoder", encoder)
    loc, raw_scale = encoder(x).chunk(2, dim=-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, positive(raw_scale)).to_event(1))


@torch.no_grad()
def sampled_elbo(pair: pv.VAE, x: Tensor) -> Tensor:
    """Return the ELBO of each example, (N,), from 200 draws of the guide."""
    draws = [pv.terms(pair.model, pair.guide, x, num_particles=20).log_weight for _ in range(10)]
    return torch.cat(draws).mean(0)


def main() -> None:
    """Train the model, then each guide for it; print what each reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train = pv.data.load("digits", binarize="fixed")[:]
    test = pv.data.load("digits", split="test", binarize="fixed")[:100]

    likelihood, guide = pv.likelihoods.Bernoulli(K, SHAPE), pv.guides.DiagonalNormal(SHAPE, K)
    vae = pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=likelihood, guide=guide)
    pv.fit(vae, train, epochs=args.epochs, seed=args.seed)
    vae.requires_grad_(False)  # p(z) p(x|z) is fixed from here on
    pairs = {"the library's": vae}
    for name, guide in {"(a) module": HeavyTails(), "(b) function": pyro_guide}.items():
        pairs[name] = vae.with_guide(guide)
        print(f"{name}: {pv.check_guide(pairs[name], train[:8])}\n")  # which estimators are valid for it?
        pv.fit(pairs[name], train, epochs=args.epochs, seed=args.seed)
    # (c) parameters for each of the test digits, so each step takes all of them
    pairs["(c) AutoNormal"] = vae.with_guide(AutoNormal(vae.model, init_scale=0.3))
    steps = {"epochs": 20 * args.epochs, "batch_size": len(test), "learning_rate": 0.02}
    pv.fit(pairs["(c) AutoNormal"], test, seed=args.seed, **steps)

    elbo = {name: sampled_elbo(pair, test) for name, pair in pairs.items()}
    print(f"{'guide':16}{'ELBO, nats per digit':>22}{'gained':>16}")
    for name, values in elbo.items():
        columns = [(v.mean(), v.std() / len(v) ** 0.5) for v in (values, values - elbo["the library's"])]
        shown = [f"{value:.2f} ± {error:.2f}" for value, error in columns]
        print(f"{name:16}{shown[0]:>22}{shown[1]:>16}")


if __name__ == "__main__":
    main()
