"""Sequences of unequal length: a deep Markov model of digits that are drawn from top to bottom.

    uv run examples/sequences.py
    uv run examples/sequences.py --epochs 200

A digit is strips of two rows of pixels, up to the last with ink; the rest is masked. The guide reads from the
end up to x_t, then draws z_t. Look at log p(x) and samples.png.
"""

import argparse
import signal
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

import pyro_vae as pv

STEPS, PIXELS, K, UNITS = 14, 56, 16, 128


class DeepMarkovModel(nn.Module):
    """Model and guide of strips x (N, T, pixels), of which the first length (N,) belong to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        hidden = {"hidden_features": (UNITS,), "activation": "tanh"}
        self.transition = pv.guides.DiagonalNormal((K,), K, **hidden)  # p(z_t|z_{t−1})
        self.emission = pv.likelihoods.Bernoulli(K, (PIXELS,), **hidden)  # p(x_t|z_t)
        self.reader = nn.GRUCell(PIXELS, UNITS)
        self.posterior = pv.guides.DiagonalNormal((K,), K, context_dim=UNITS, **hidden)  # q(z_t|z_{t−1}, x)

    def model(self, x: Tensor, length: Tensor) -> None:
        """Draw z_0, x_0, z_1, x_1 ... in turn."""
        z = x.new_zeros(len(x), K)
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                with pyro.poutine.mask(mask=t < length):
                    z = pyro.sample(f"z_{t}", self.transition(z))
                    pyro.sample(f"x_{t}", self.emission(z), obs=x[:, t])

    def guide(self, x: Tensor, length: Tensor) -> None:
        """Read each sequence from its end to its start, then draw z_0, z_1 ... in turn."""
        z, read = x.new_zeros(len(x), K), [x.new_zeros(len(x), UNITS)]
        for t in reversed(range(x.shape[1])):
            read.append(self.reader(x[:, t], read[-1]) * (t < length)[:, None])  # 0 until the end is reached
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                with pyro.poutine.mask(mask=t < length):
                    z = pyro.sample(f"z_{t}", self.posterior(z, read.pop()))


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return strips, and the length of each sequence."""
    x = pv.data.load("digits", split=split, binarize="threshold")[:].view(-1, STEPS, PIXELS)
    return x, (x.amax(2) * torch.arange(1, STEPS + 1)).amax(1)  # up to the last strip with ink


def main() -> None:
    """Train, evaluate and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/sequences"), metavar="DIR")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    dmm, (x, length) = DeepMarkovModel(), load("test")
    pv.fit(dmm, load("train"), epochs=args.epochs, learning_rate=3e-3, seed=args.seed)
    print("log p(x)", pv.evaluate(dmm, (x, length), num_particles=50, aggregate_size=0).mean("log_evidence"))
    free = pyro.poutine.trace(pyro.poutine.uncondition(dmm.model)).get_trace(x, length).nodes
    images = torch.stack([free[f"x_{t}"]["value"] * (t < length)[:, None] for t in range(STEPS)], 1)
    pv.plots.save(pv.plots.image_grid(images[:64].view(-1, 1, 28, 28)), args.output / "samples.png")
    print(f"figure in {args.output / 'samples.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
