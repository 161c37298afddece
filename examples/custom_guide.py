"""Write q(z|x) in three ways: a module, a Pyro function, and an autoguide without a network.

    uv run examples/custom_guide.py                  # half a minute on two idle cores
    uv run examples/custom_guide.py --epochs 30      # closer to what each guide can do

Look at the last column: p(z) p(x|z) is the same in each row, so what a guide gains on the library's, in the
ELBO of the same digits, brings it closer to log p(x). `benchmarks/custom_guides.py` measures what remains.
"""

import argparse
import signal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import MLP, positive

SHAPE, K = (1, 28, 28), 10


class HeavyTails(nn.Module):
    """(a) A module from x to a distribution over z, here Student's t: all that a `VAE` requires."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(784, 2 * K)

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x), of batch shape (N,) and event shape (K,)."""
        loc, raw_scale = self.network(x).chunk(2, dim=-1)
        return dist.StudentT(8.0, loc, positive(raw_scale)).to_event(1)


encoder = MLP(784, 2 * K, activation="tanh")


def pyro_guide(x: Tensor) -> None:
    """(b) A Pyro function: `pyro.module` registers the parameters, plate and site are the model's."""
    loc, raw_scale = pyro.module("encoder", encoder)(x).chunk(2, dim=-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, positive(raw_scale)).to_event(1))


def main() -> None:
    """Train the model, then each guide for it; print what each reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train = pv.data.load("digits", binarize="fixed")
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
    pairs["(c) AutoNormal"] = fixed = vae.with_guide(AutoNormal(vae.model, init_scale=0.3))
    pv.fit(fixed, test, epochs=20 * args.epochs, batch_size=len(test), learning_rate=0.02, seed=args.seed)

    elbos = [pv.terms(pair, test, num_particles=200).log_weight.detach().mean(0) for pair in pairs.values()]
    print(f"{'nats per digit':16}{'ELBO':>8}{'gained':>8}")
    for name, elbo in zip(pairs, elbos, strict=True):
        gained = elbo - elbos[0]
        print(f"{name:16}{elbo.mean():8.2f}{gained.mean():8.2f} ± {gained.std() / len(gained) ** 0.5:.2f}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved
    main()
