"""How far steps of several processes, on a part of each batch, end from those of one process on the whole.

    uv run torchrun --nproc-per-node 2 benchmarks/process_agreement.py

784-400-50, batches of 64, 12 steps, the same noise for each datum. A number is the distance of the parameters
to those of the whole batch, over the distance that these have moved, of the process that is furthest off.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.utils.processes import Processes, checksum

SHAPE, LATENT_DIM, BATCH, STEPS = (784,), 50, 64, 12
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float | None]] = {
    "Adam": (partial(torch.optim.Adam, lr=1e-3), None),
    "Adam, clip 300": (partial(torch.optim.Adam, lr=1e-3), 300.0),
    "SGD": (partial(torch.optim.SGD, lr=1e-5), None),
    "SGD, clip 300": (partial(torch.optim.SGD, lr=1e-5), 300.0),
}


class GivenNoise(dist.Normal):
    """A normal whose draws are made of given standard noise."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GivenNoise":
        return self

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.noise


class Pair(nn.Module):
    """A VAE that takes its noise as an argument; its forward pass is the ELBO, as DDP needs."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.vae = pv.VAE(
            prior=pv.priors.StandardNormal(LATENT_DIM),
            likelihood=pv.likelihoods.Bernoulli(LATENT_DIM, SHAPE, hidden_features=(400,)),
            guide=pv.guides.DiagonalNormal(SHAPE, LATENT_DIM, hidden_features=(400,)),
        ).to(dtype)

    def model(self, x: Tensor, noise: Tensor) -> None:
        self.vae.model(x)

    def guide(self, x: Tensor, noise: Tensor) -> None:
        pyro.module("posterior", self.vae.posterior)
        with pyro.plate("data", len(x)):
            q = self.vae.posterior(x).base_dist
            pyro.sample("z", GivenNoise(q.loc, q.scale, noise).to_event(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return TraceMeanField_ELBO().differentiable_loss(self.model, self.guide, x, noise)


def steps_of_svi(optimizer: str, dtype: torch.dtype, part: slice, group: Any, engine: str) -> Tensor:
    """Return the parameters after steps of `pyro_vae.SVI`."""
    pair, (make, clip_norm) = Pair(dtype), OPTIMIZERS[optimizer]
    options: dict[str, Any] = {"clip_norm": clip_norm, "engine": engine, "group": group}
    svi = pv.SVI(pair.model, pair.guide, make(pair.parameters()), TraceMeanField_ELBO(), **options)
    for x, noise in batches(dtype):
        svi.step(x[part], noise[part])
    return parameters(pair)


def steps_of_ddp(optimizer: str, dtype: torch.dtype, part: slice) -> Tensor:
    """Return the parameters after steps of DDP around the ELBO."""
    pair, (make, clip_norm) = Pair(dtype), OPTIMIZERS[optimizer]
    elbo, update = nn.parallel.DistributedDataParallel(pair), make(pair.parameters())
    for x, noise in batches(dtype):
        update.zero_grad()
        elbo(x[part], noise[part]).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(pair.parameters(), clip_norm)
        update.step()
    return parameters(pair)


def parameters(pair: Pair) -> Tensor:
    """Return a copy of all parameters as one vector."""
    return nn.utils.parameters_to_vector(pair.parameters()).detach().clone()


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return the same data and noise in every process."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            (torch.rand(BATCH, *SHAPE, generator=generator) < 0.3).to(dtype),
            torch.randn(BATCH, LATENT_DIM, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(STEPS)
    ]


def cell(processes: Processes, found: Tensor, expected: Tensor, before: Tensor) -> str:
    """Return how far the parameters are off, and whether processes differ."""
    off = processes.gather(lambda: float((found - expected).norm() / (expected - before).norm()))
    sums = processes.gather(lambda: checksum([found]))
    return f"{max(off):.0e}" + ", not the same in all" * (len(set(sums)) > 1)


def main() -> None:
    """Print a row for each way, a column for each optimiser."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group()
    group = torch.distributed.group.WORLD
    processes = Processes(group)
    share = processes.shares(BATCH)
    part, single = slice(share.start, share.stop), torch.float32
    ways: dict[tuple[str, torch.dtype], Callable[[str], Tensor]] = {
        ("each alone", single): partial(steps_of_svi, dtype=single, part=part, group=None, engine="eager"),
        ("DDP around the ELBO", single): partial(steps_of_ddp, dtype=single, part=part),
    }
    for engine, dtype in itertools.product(("eager", "traced", "compiled"), (single, torch.float64)):
        options: dict[str, Any] = {"dtype": dtype, "part": part, "group": group, "engine": engine}
        ways[f"`SVI`, {engine}", dtype] = partial(steps_of_svi, **options)
    if processes.is_first:
        print(f"| {processes.size} processes | | {' | '.join(OPTIMIZERS)} |\n" + "|---" * 6 + "|")
    for (way, dtype), run in ways.items():
        whole: dict[str, Any] = {"dtype": dtype, "part": slice(None), "group": None, "engine": "eager"}
        before = parameters(Pair(dtype))
        cells = [cell(processes, run(name), steps_of_svi(name, **whole), before) for name in OPTIMIZERS]
        if processes.is_first:
            print(f"| {way} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
