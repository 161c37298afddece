"""What a step costs in two processes: alone, with this library's collective, and with DDP around the ELBO.

    uv run torchrun --nproc-per-node 2 benchmarks/speed/processes.py

The three take steps in turn. It also times the collective of a step by itself, and what one must cost at
least: one copy of all gradients into a buffer, and one all-reduce of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference.gradient_sum import GradientSum
from pyro_vae.utils.processes import Processes

SHAPE = (784,)


class ELBO(nn.Module):
    """The ELBO as a forward pass, which DDP needs."""

    def __init__(self, vae: pv.VAE):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        return TraceMeanField_ELBO().differentiable_loss(self.vae.model, self.vae.guide, x)


def make_vae(width: int) -> pv.VAE:
    """A perceptron VAE of 784 inputs."""
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(50),
        likelihood=pv.likelihoods.Bernoulli(50, SHAPE, hidden_features=(width,)),
        guide=pv.guides.DiagonalNormal(SHAPE, 50, hidden_features=(width,)),
    )


def main() -> None:
    """Time the steps in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="of each process")
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--engine", default="traced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group()
    x = (torch.rand(options.batch_size, *SHAPE) < 0.3).float()

    def by_svi(group: dist.ProcessGroup | None) -> Callable[[], object]:
        vae = make_vae(options.width)
        svi = pv.SVI(vae, torch.optim.Adam(vae.parameters()), engine=options.engine, group=group)
        return lambda: svi.step(x)

    def by_ddp() -> Callable[[], object]:
        elbo = nn.parallel.DistributedDataParallel(ELBO(make_vae(options.width)))
        optimizer = torch.optim.Adam(elbo.parameters())

        def step() -> None:
            optimizer.zero_grad()
            elbo(x).backward()
            optimizer.step()

        return step

    parameters = list(make_vae(options.width).parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
    views = flat.split([parameter.numel() for parameter in parameters])

    def least() -> None:
        torch._foreach_copy_(list(views), [parameter.detach().flatten() for parameter in parameters])
        dist.all_reduce(flat)

    of_all = GradientSum(Processes(dist.group.WORLD), parameters)
    gradients = [torch.randn_like(parameter) for parameter in parameters]

    def collective() -> None:
        of_all.clear()
        of_all.add_gradients(gradients)
        of_all.add_loss(1.0, rows=options.batch_size, scaled=False)
        of_all.reduce(None)

    ways = {
        "alone": by_svi(None),
        "summed": by_svi(dist.group.WORLD),
        "DDP around the ELBO, eager": by_ddp(),
        "the collective of a step": collective,
        "one copy and one all-reduce": least,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.steps + 10):
        for name, step in ways.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            if number >= 10:  # after recording or compiling
                seconds[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} processes of one thread, batch {options.batch_size} each, "
            f"{len(flat):,} parameters, {options.engine}; median milliseconds"
        )
        for name, column in seconds.items():
            print(f"{name:28} {1e3 * statistics.median(column):7.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
