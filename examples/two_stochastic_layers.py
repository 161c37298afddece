"""Several latent variables: two layers, with a guide that draws them bottom up, by the ELBO and by IWAE.

    uv run examples/two_stochastic_layers.py                  # half a minute on two idle cores
    uv run examples/two_stochastic_layers.py --particles 50 --epochs 80 --dataset mnist

As in Burda, Grosse and Salakhutdinov, 2016, Importance weighted autoencoders, arXiv:1509.00519:

    model:  z2 ~ N(0, I₅₀) → z1 ~ N(f(z2), diag) in 100 dimensions → x ~ Bernoulli(g(z1))
    guide:  z1 ~ q(z1|x) → z2 ~ q(z2|z1)

Look at the report on the guide: `TraceMeanField_ELBO` is not valid here, as the guide draws z2 given z1 and
the model z1 given z2. Then compare the rows: IWAE is 3 nats behind after 8 epochs, and 1 after 40.
"""

import argparse
import copy
import signal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

LOWER, UPPER = 100, 50  # dimensions of z1 and z2


class TwoLayers(nn.Module):
    """Pyro model and guide with two latent layers, and their networks."""

    def __init__(self, event_shape: tuple[int, ...]):
        super().__init__()
        wide, narrow = ({"hidden_features": (n, n), "activation": "tanh"} for n in (200, 100))
        self.prior = pv.guides.DiagonalNormal((UPPER,), LOWER, **narrow)  # p(z1|z2)
        self.likelihood = pv.likelihoods.Bernoulli(LOWER, event_shape, **wide)  # p(x|z1)
        self.lower = pv.guides.DiagonalNormal(event_shape, LOWER, **wide)  # q(z1|x)
        self.upper = pv.guides.DiagonalNormal((LOWER,), UPPER, **narrow)  # q(z2|z1)

    def model(self, x: Tensor) -> None:
        """Draw from p(z2) p(z1|z2) p(x|z1), top down, with x observed."""
        pyro.module("two_layers", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(UPPER), 1.0).to_event(1))
            z1 = pyro.sample("z1", self.prior(z2))
            pyro.sample("x", self.likelihood(z1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw from q(z1|x) q(z2|z1), bottom up."""
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.lower(x))
            pyro.sample("z2", self.upper(z1))


def main() -> None:
    """Train with both estimators from the same initial parameters, and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for pyro_vae.data.load (default: digits)")
    parser.add_argument("--particles", type=int, default=5, help="particles per image (default: 5)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the data (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train = pv.data.load(args.dataset, split="train", binarize="dynamic", seed=args.seed)
    test = pv.data.load(args.dataset, split="test", binarize="fixed", seed=args.seed)[:200]
    start, S = TwoLayers(tuple(test.shape[1:])), args.particles
    start.likelihood.network[-1].bias.data = train.mean().clamp(0.001, 0.999).logit().flatten()  # the paper's
    print(pv.check_guide(start, test[:5]))
    print(f"\n{'trained with':14}{'ELBO':>18}{'log p(x) ≥':>18}   nats per image, 200 draws per image")
    elbo = pyro.infer.Trace_ELBO(S, max_plate_nesting=1, vectorize_particles=True)
    for name, estimator in {"ELBO": elbo, f"IWAE({S})": pv.IWAE(S)}.items():
        pair = copy.deepcopy(start)
        pv.fit(pair, train, estimator=estimator, epochs=args.epochs, batch_size=100, seed=args.seed)
        report = pv.evaluate(pair, test, num_particles=200, seed=args.seed, aggregate_size=0)
        print(f"{name:14}{report.mean('elbo')!s:>18}{report.mean('log_evidence')!s:>18}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved
    main()
