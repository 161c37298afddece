"""Train a model with two layers of latent variables and a bottom-up guide, by the ELBO and by IWAE.

    uv run examples/two_stochastic_layers.py                  # half a minute on two idle cores
    uv run examples/two_stochastic_layers.py --particles 50 --epochs 80 --dataset mnist

As in Burda, Grosse and Salakhutdinov, 2016, Importance weighted autoencoders, arXiv:1509.00519:

    model:  z2 ~ N(0, I₅₀) → z1 ~ N(f(z2), diag) in 100 dimensions → x ~ Bernoulli(g(z1))
    guide:  z1 ~ q(z1|x) → z2 ~ q(z2|z1)

Look at the report on the guide: `TraceMeanField_ELBO` is not valid here, as the guide draws z2 given z1 and
the model z1 given z2, so that the KLs of the sites do not add up. Then compare the two rows.
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import MLP, apply_batched, positive

LOWER, UPPER = 100, 50  # dimensions of z1 and z2


class NormalLayer(nn.Module):
    """Normal distribution with independent dimensions, given by a network with two hidden layers."""

    def __init__(self, in_features: int, out_features: int, units: int):
        super().__init__()
        self.network = MLP(in_features, 2 * out_features, hidden_features=(units, units), activation="tanh")

    def forward(self, inputs: Tensor) -> dist.Distribution:
        """Map (*, in_features) to a distribution of batch shape (*,)."""
        outputs = apply_batched(self.network, inputs, 1)
        loc, raw_scale = outputs.chunk(2, dim=-1)
        return dist.Normal(loc, positive(raw_scale)).to_event(1)


class TwoLayers(nn.Module):
    """Pyro model and guide with two latent layers, and their networks."""

    def __init__(self, event_shape: tuple[int, ...], output_bias: Tensor):
        super().__init__()
        size = output_bias.numel()
        self.prior_of_z1 = NormalLayer(UPPER, LOWER, 100)
        self.likelihood = pv.likelihoods.Bernoulli(
            LOWER, event_shape, hidden_features=(200, 200), activation="tanh"
        )
        self.likelihood.network[-1].bias.data = output_bias.flatten().clone()
        self.guide_of_z1 = NormalLayer(size, LOWER, 200)
        self.guide_of_z2 = NormalLayer(LOWER, UPPER, 100)

    def model(self, x: Tensor) -> None:
        """Draw from p(z2) p(z1|z2) p(x|z1), top down, with x observed."""
        pyro.module("two_layers", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(UPPER), 1.0).to_event(1))
            z1 = pyro.sample("z1", self.prior_of_z1(z2))
            pyro.sample("x", self.likelihood(z1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw from q(z1|x) q(z2|z1), bottom up."""
        pyro.module("two_layers", self)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.guide_of_z1(x.flatten(1)))
            pyro.sample("z2", self.guide_of_z2(z1))

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Return images E[x|z1] for z2 ~ p(z2), z1 ~ p(z1|z2)."""
        z1 = self.prior_of_z1(torch.randn(num_samples, UPPER)).sample()
        return self.likelihood(z1).mean


def main() -> None:
    """Train with both estimators from the same initial parameters, evaluate, and draw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", help="as for pyro_vae.data.load (default: digits)")
    add("--particles", type=int, default=5, help="particles per image (default: 5)")
    add("--epochs", type=int, default=8, help="passes over the data (default: 8)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs/two_stochastic_layers"), metavar="DIR")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train = pv.data.load(args.dataset, split="train", binarize="dynamic", seed=args.seed)
    test = pv.data.load(args.dataset, split="test", binarize="fixed", seed=args.seed)[:200]
    mean = train[:].mean(0).clamp(0.001, 0.999)  # initial output: the mean image, as in the paper
    pair = TwoLayers(tuple(test.shape[1:]), mean.logit())
    start = {name: value.clone() for name, value in pair.state_dict().items()}
    print(pv.check_guide(pair, test[:5]))

    S = args.particles
    elbo = Trace_ELBO(S, max_plate_nesting=1, vectorize_particles=True)
    print(f"\n{'trained with':14}{'ELBO':>18}{'log p(x) ≥':>18}   nats per image, 200 draws per image")
    for name, estimator in {"ELBO": elbo, f"IWAE({S})": pv.IWAE(S)}.items():
        pair.load_state_dict(start)
        pv.fit(pair, train, estimator=estimator, epochs=args.epochs, batch_size=100, seed=args.seed)
        report = pv.evaluate(pair, test, num_particles=200, seed=args.seed, aggregate_size=0)
        print(f"{name:14}{report.mean('elbo')!s:>18}{report.mean('log_evidence')!s:>18}")

    args.output.mkdir(parents=True, exist_ok=True)
    axes = pv.plots.image_grid(pair.sample(64), title=f"Samples after training with IWAE({S})")
    pv.plots.save(axes, args.output / "samples.png")
    print(f"figure in {args.output / 'samples.png'}")


if __name__ == "__main__":
    main()
