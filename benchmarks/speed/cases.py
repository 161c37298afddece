"""Common setup of all peers: networks, sizes, data, and the bound by which all are evaluated."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

LEARNING_RATE = 1e-3
PIXELS = 784


class Skip(Exception):  # noqa: N818 (not an error)
    """A peer does not support a measurement; the message gives the reason."""


@dataclass(frozen=True)
class Case:
    """VAE of 28 × 28 binary images, and its batch size.

    The encoder returns location and raw scale of a diagonal normal, scale = softplus(raw) + 1e-6; the decoder
    returns logits. Without hidden widths both are convolutional. The loss is the negative ELBO with one
    particle, the negative IWAE bound with more.
    """

    name: str
    batch: int
    hidden: tuple[int, ...] = ()
    activation: type[nn.Module] = nn.ReLU
    latent: int = 50
    particles: int = 1

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (PIXELS,) if self.hidden else (1, 28, 28)

    @property
    def epoch(self) -> int:
        """Steps of a short epoch, for peers that cannot run single steps."""
        return max(40, 5000 // (self.batch * self.particles))

    def networks(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Return encoder and decoder, with the same initial weights at each call."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            if not self.hidden:
                return _convolutional(self.latent)
            widths = (PIXELS, *self.hidden, 2 * self.latent), (self.latent, *self.hidden[::-1], PIXELS)
            encoder, decoder = (_perceptron(w, self.activation) for w in widths)
            return encoder, decoder


CASES = (
    Case("784-400-50, batch 256", batch=256, hidden=(400,)),
    Case("784-200-200-50, batch 20", batch=20, hidden=(200, 200), activation=nn.Tanh),
    Case("convolutional, batch 128", batch=128),
    Case("IWAE, 50 particles, batch 20", batch=20, hidden=(200, 200), activation=nn.Tanh, particles=50),
)


def _perceptron(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def _convolutional(latent: int) -> tuple[nn.Sequential, nn.Sequential]:
    halve, double = ({"kernel_size": 4, "stride": 2, "padding": 1} for _ in range(2))
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, **halve), nn.ReLU(), nn.Conv2d(32, 64, **halve), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 2 * latent)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7))),
        *(nn.ConvTranspose2d(64, 32, **double), nn.ReLU(), nn.ConvTranspose2d(32, 1, **double)),
    )
    return encoder, decoder


class Order:
    """Row numbers in random order, re-shuffled each epoch."""

    def __init__(self, rows: int, batch: int):
        self.rows, self.batch = rows, batch
        self.order, self.taken = torch.randperm(rows), 0

    def several(self, steps: int) -> tuple[Tensor, int, int]:
        """Return the order of this epoch, the number of the first batch to take and that after the last."""
        if self.taken == self.rows // self.batch:
            self.order, self.taken = torch.randperm(self.rows), 0
        begin, self.taken = self.taken, min(self.taken + steps, self.rows // self.batch)
        return self.order, begin, self.taken

    def next(self) -> Tensor:
        """Return the rows of one batch."""
        order, begin, end = self.several(1)
        return order[begin * self.batch : end * self.batch]


class Batches:
    """Batches in plain PyTorch: shuffled, gathered as bytes, binarised by `torch.bernoulli`.

    With `ready`, batches prepared in advance, so that the step alone is timed.
    """

    def __init__(self, case: Case, pixels: np.ndarray):
        self.pixels = torch.from_numpy(pixels).reshape(-1, *case.event_shape)
        self.order = Order(len(pixels), case.batch)
        self.made = [self.make(self.order.next()) for _ in range(16)]

    def make(self, index: Tensor) -> Tensor:
        return torch.bernoulli(self.pixels.index_select(0, index).float().div_(255))

    def take(self, steps: int, *, ready: bool) -> Iterator[Tensor]:
        for number in range(steps):
            yield self.made[number % 16] if ready else self.make(self.order.next())


def bound(case: Case, encoder: nn.Module, decoder: nn.Module, x: Tensor) -> Tensor:
    """Return the ELBO of each example with an analytic KL, or the IWAE bound if particles > 1, shape (N,)."""
    loc, raw = encoder(x).chunk(2, dim=-1)
    scale = F.softplus(raw) + 1e-6
    if case.particles == 1:
        z = loc + scale * torch.randn_like(loc)
        kl = (0.5 * (scale**2 + loc**2 - 1) - scale.log()).sum(-1)
        return log_likelihood(decoder(z), x) - kl
    noise = torch.randn(case.particles, *loc.shape)
    z = loc + scale * noise
    logits = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    log_weights = log_likelihood(logits, x.expand_as(logits))
    log_weights = log_weights + (scale.log() + 0.5 * (noise**2 - z**2)).sum(-1)
    return log_weights.logsumexp(0) - math.log(case.particles)


def log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """Return the Bernoulli log-likelihood, summed over the pixels."""
    terms = -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return terms.flatten(-1 if x.dim() < 4 else -3).sum(-1)


def judge(case: Case, weights: list[np.ndarray], pixels: np.ndarray) -> float:
    """Return the bound at a peer's weights on the first 1,000 rows, binarised at ½, in nats per image."""
    encoder, decoder = case.networks()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(1)
        for parameter, weight in zip([*encoder.parameters(), *decoder.parameters()], weights, strict=True):
            parameter.copy_(torch.from_numpy(np.array(weight)))
        x = (torch.from_numpy(pixels[:1000]) >= 128).float().reshape(-1, *case.event_shape)
        return float(torch.cat([bound(case, encoder, decoder, part) for part in x.split(100)]).mean())


def weights(encoder: nn.Module, decoder: nn.Module) -> list[np.ndarray]:
    """Return the parameters of the encoder, then of the decoder, in torch's order."""
    return [p.detach().numpy().copy() for p in (*encoder.parameters(), *decoder.parameters())]
