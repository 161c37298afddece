"""A deep Markov model of sequences of unequal length, trained by `fit`: digits drawn from top to bottom.

    uv run examples/sequences.py
    uv run examples/sequences.py --epochs 200

A digit is a sequence of strips of two rows of pixels, up to the last that has ink. The model is

    z_t ~ N(f(z_{t−1})),  x_t ~ Bernoulli(g(z_t)),  t = 1 … length

and the guide draws z_t given z_{t−1} and a recurrent network's summary of x_t … x_length. Look
at log p(x) on the test set, and at continued.png: digits continued from their upper half.
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import MLP, apply_batched, positive

STEPS, PIXELS = 14, 56


def load(split: str) -> dict[str, Tensor]:
    """Return strips x (N, T, pixels), and mask (N, T), True up to the last strip with ink."""
    x = pv.data.load("digits", split=split, binarize="threshold")[:].reshape(-1, STEPS, PIXELS)
    ink = (x > 0).any(-1)
    return {"x": x, "mask": ink.flip(1).cummax(1).values.flip(1)}


class DeepMarkovModel(nn.Module):
    """Model p(z_t|z_{t−1}) p(x_t|z_t) and guide q(z_t|z_{t−1}, x_t … x_T), for sequences with a mask."""

    def __init__(self, latent_dim: int, width: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.transition = MLP(latent_dim, 2 * latent_dim, hidden_features=(width,), activation="tanh")
        self.emission = MLP(latent_dim, PIXELS, hidden_features=(width,))
        self.reader = nn.GRU(PIXELS, width, batch_first=True)
        self.combine = MLP(latent_dim + width, 2 * latent_dim, hidden_features=(width,), activation="tanh")

    def p_z(self, before: Tensor) -> dist.Distribution:
        """Return p(z_t|z_{t−1})."""
        shift, raw_scale = apply_batched(self.transition, before, 1).chunk(2, -1)
        return dist.Normal(before + shift, positive(raw_scale)).to_event(1)

    def p_x(self, z: Tensor) -> dist.Distribution:
        """Return p(x_t|z_t)."""
        return dist.Bernoulli(logits=apply_batched(self.emission, z, 1)).to_event(1)

    def model(self, x: Tensor, mask: Tensor) -> None:
        """Draw z_1, x_1, z_2, ... in turn; what lies beyond the end of a sequence is masked."""
        z = x.new_zeros(len(x), self.latent_dim)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", self.p_z(z))
                    pyro.sample(f"x_{t}", self.p_x(z), obs=x[:, t])

    def guide(self, x: Tensor, mask: Tensor) -> None:
        """Draw z_1, z_2, ... in turn, given the rest of the sequence."""
        summary = self.read_backwards(x, mask)
        z = x.new_zeros(len(x), self.latent_dim)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                rest = summary[:, t].expand(*z.shape[:-1], -1)  # z may have a dimension of particles
                both = torch.cat([z, rest], -1)
                loc, raw_scale = apply_batched(self.combine, both, 1).chunk(2, -1)
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, positive(raw_scale)).to_event(1))

    def read_backwards(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return a summary of x_t … x_length for each t, (N, T, width)."""
        place = mask.sum(1, keepdim=True) - 1 - torch.arange(x.shape[1], device=x.device)
        backwards = place % x.shape[1]  # the last strip first; what lies beyond the end comes last
        reversed_x = x.gather(1, backwards[..., None].expand_as(x))
        states, _ = self.reader(reversed_x)
        return states.gather(1, backwards[..., None].expand_as(states))

    @torch.no_grad()
    def complete(self, x: Tensor, seen: int) -> Tensor:
        """Return x with the strips after the first `seen` drawn by the model, as probabilities."""
        mask = torch.arange(x.shape[1]).expand(x.shape[:2]) < seen
        drawn = poutine.trace(self.guide).get_trace(x * mask[..., None], mask)
        z = drawn.nodes[f"z_{seen - 1}"]["value"]
        strips = list(x[:, :seen].unbind(1))
        for _ in range(x.shape[1] - seen):
            z = self.p_z(z).sample()
            strips.append(self.p_x(z).mean)
        return torch.stack(strips, 1)


def main() -> None:
    """Train, evaluate and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--test-size", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/sequences"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    dmm = DeepMarkovModel(options.latent_dim, options.width)
    train, test = load("train"), load("test")
    settings = {"batch_size": 100, "learning_rate": 3e-3, "clip_norm": 1000, "seed": options.seed}
    pv.fit(dmm, train, epochs=options.epochs, **settings)

    part = {name: values[: options.test_size] for name, values in test.items()}
    report = pv.evaluate(dmm, part, num_particles=200, aggregate_size=0)
    strips = part["mask"].sum(1)
    print(f"lengths: {int(strips.min())} to {int(strips.max())} strips of {PIXELS} pixels")
    print(f"ELBO:    {report.mean('elbo')} nats per digit")
    print(f"log p(x) {report.mean('log_evidence')}")

    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    x = test["x"][:10]
    rows = [x, *(dmm.complete(x, seen=STEPS // 2) for _ in range(5))]
    images = torch.stack(rows, 1).reshape(-1, 1, 28, 28)
    axes = pv.plots.image_grid(images, columns=6, title="a digit, and five ways to go on from its upper half")
    pv.plots.save(axes, options.output / "continued.png")
    print(f"figure in {options.output / 'continued.png'}")


if __name__ == "__main__":
    main()
