"""Train a model with two layers of latent variables and a bottom-up guide.

    uv run examples/two_stochastic_layers.py
    uv run examples/two_stochastic_layers.py --estimators IWAE --particles 50 --epochs 80 --dataset mnist

As in Burda, Grosse and Salakhutdinov, 2016, Importance weighted autoencoders, arXiv:1509.00519:

    model:  z2 ~ N(0, I₅₀) → z1 ~ N(f(z2), diag) in 100 dimensions → x ~ Bernoulli(g(z1))
    guide:  z1 ~ q(z1|x) → z2 ~ q(z2|z1)

Both are Pyro functions with two sites, methods of one module, which `fit` and `evaluate` take as a pair.
`TraceMeanField_ELBO` is not valid here: the guide draws z2 given z1, the model z1 given z2, so the KLs of the
two sites do not add up to the KL of the joint distributions. Pyro only warns; `check_guide` reports the
problem and valid estimators.

The figure is written to the folder --output.
"""

import argparse
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.networks import MLP, positive

LOWER, UPPER = 100, 50  # dimensions of z1 and z2

ESTIMATORS = {
    "Trace_ELBO": lambda S: Trace_ELBO(S, max_plate_nesting=1, vectorize_particles=True),
    "STL": pv.STL,
    "IWAE": pv.IWAE,
    "DReG": pv.DReG,
    "PIWAE": lambda S: pv.PIWAE(S, 2),
    "CIWAE": lambda S: pv.CIWAE(0.5, S),
    "Renyi": lambda S: pv.Renyi(0.5, S),
    "VIMCO": pv.VIMCO,  # for discrete sites; equal to IWAE if all sites are reparameterised
}


class NormalLayer(nn.Module):
    """Normal distribution with independent dimensions, given by a network with two hidden layers."""

    def __init__(self, in_features: int, out_features: int, units: int):
        super().__init__()
        self.network = MLP(in_features, 2 * out_features, hidden_features=(units, units), activation="tanh")

    def forward(self, inputs: Tensor) -> dist.Distribution:
        """Map (*, in_features) to a distribution of batch shape (*,)."""
        outputs = pv.networks.apply_batched(self.network, inputs, 1)
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


def train(pair: TwoLayers, data: pv.data.Images, estimator: ELBO, args: argparse.Namespace) -> float:
    """Train, with a learning rate that falls to a tenth; return the seconds."""
    started = time.perf_counter()
    pv.fit(
        pair,
        data,
        estimator=estimator,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters, args.lr, eps=1e-4),
        schedule=lambda optimizer: LinearLR(optimizer, 1.0, 0.1, total_iters=args.epochs),
    )
    return time.perf_counter() - started


def main() -> None:
    """Train with each estimator from the same initial parameters, evaluate, and draw samples."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    train_data = pv.data.load(args.dataset, split="train", binarize="dynamic", seed=args.seed)
    test = pv.data.load(args.dataset, split="test", binarize="fixed", seed=args.seed)[: args.test_size]
    mean = train_data[:].mean(0).clamp(0.001, 0.999)  # initial output: the mean image, as in the paper
    start = TwoLayers(tuple(test.shape[1:]), mean.logit()).state_dict()

    pair = TwoLayers(tuple(test.shape[1:]), mean.logit())
    print(pv.check_guide(pair, test[:5]))

    print(f"\nlog p(x) of {len(test)} test images with {args.draws} draws, after {args.epochs} epochs")
    print(f"{'estimator':22} {'ELBO':>17} {'log p(x) ≥':>17} {'seconds':>8}")
    for name in args.estimators:
        pair.load_state_dict(start)
        estimator = ESTIMATORS[name](args.particles)
        seconds = train(pair, train_data, estimator, args)
        report = pv.evaluate(
            pair, test, num_particles=args.draws, seed=args.seed, aggregate_size=0, progress=False
        )
        bounds = (
            f"{report.elbo:9.2f} ± {report.elbo_se:.2f}",
            f"{report.log_evidence:9.2f} ± {report.log_evidence_se:.2f}",
        )
        print(f"{name + f', {args.particles} particles':22} {bounds[0]:>17} {bounds[1]:>17} {seconds:8.1f}")
    print("nats per image ± one standard error over the images")

    args.output.mkdir(parents=True, exist_ok=True)
    figure = args.output / f"samples_{args.estimators[-1]}.png"
    plots.save(
        plots.image_grid(pair.sample(64), title=f"Samples after training with {args.estimators[-1]}"), figure
    )
    print(f"figure in {figure}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default="digits", help="as for pyro_vae.data.load (default: %(default)s)")
    add("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="default: all")
    add("--particles", type=int, default=5, help="particles per image (default: %(default)s)")
    add("--epochs", type=int, default=8, help="passes over the data (default: %(default)s)")
    add("--batch-size", type=int, default=100, help="images per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="initial learning rate, ends at 1/10 (default: %(default)s)")
    add("--test-size", type=int, default=200, help="images for evaluation (default: %(default)s)")
    add("--draws", type=int, default=200, help="draws per image for log p(x) (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs/two_stochastic_layers"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    for name in ("particles", "epochs", "batch_size", "test_size", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if "VIMCO" in args.estimators and args.particles == 1:
        parser.error("VIMCO needs --particles of at least 2")
    return args


if __name__ == "__main__":
    main()
