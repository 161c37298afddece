"""Likelihood regret: the nats that refining q(z|x) for one example gains over the guide.

Notation: n examples, S particles, λ (n, P) the outputs of the guide's network.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.applications.shared_noise import shared_noise
from pyro_vae.applications.statistics import prepare
from pyro_vae.evaluation.draws import chunk_sizes, in_chunks
from pyro_vae.guides import Guide
from pyro_vae.utils.isolation import evaluating, seed_generators
from pyro_vae.vae import VAE

__all__ = ["likelihood_regret"]


def likelihood_regret(
    vae: VAE, data: Any, *, num_particles: int, seed: int, num_steps: int = 100, step_size: float = 0.02
) -> Tensor:
    r"""Compute max_λ ELBO(x; λ) − ELBO(x; λ(x)) ≥ 0 per example, (N,), in nats, by Adam steps on λ.

    q(z|x; λ) is refined alone; the published method refits the whole encoder for each example. Both ELBOs are
    estimated with the same base noise, so that the difference has little of it.

    Args:
        vae: A VAE whose guide is a `Guide` of normal q(z|x).
        data: (N, *event_shape).
        num_particles: S, draws that estimate each ELBO; a tenth of them estimate each gradient.
        seed: Seed of the base noise, the same for every example.
        num_steps: Number of Adam steps.
        step_size: Size of the first step; the last has a hundredth of it.

    Raises:
        TypeError: If the guide is not a `Guide`, or its q(z|x) is not normal.

    Source: Z. Xiao, Q. Yan, Y. Amit (2020), Likelihood regret, arXiv:2003.02977.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> parts = {"prior": priors.StandardNormal(2), "likelihood": likelihoods.Normal(2, (6,))}
        >>> vae = VAE(**parts, guide=guides.DiagonalNormal((6,), 2))
        >>> regret = likelihood_regret(vae, torch.randn(5, 6), num_particles=50, seed=0, num_steps=20)
        >>> bool((regret > 0).all())
        True
    """
    batches = prepare(vae, data, seed=seed)
    guide = vae.posterior
    if not isinstance(guide, Guide):
        raise TypeError(
            f"likelihood regret refines a guide of pyro_vae.guides with normal q(z|x); got "
            f'{type(guide).__name__}: choose another score, such as "statistics"'
        )
    size, _ = chunk_sizes(batches, num_particles)
    refined = _Refinement(vae, guide, num_particles, seed)
    with evaluating(vae, batches.device, seed), torch.enable_grad():
        chunks = in_chunks(batches, size, 0)
        return torch.cat([refined.gain(x, num_steps, step_size) for _, x in chunks])


@dataclass(frozen=True)
class _Refinement:
    vae: VAE
    guide: Guide
    num_particles: int
    seed: int

    def gain(self, x: Tensor, num_steps: int, step_size: float) -> Tensor:
        """Return the nats that `num_steps` Adam steps on λ gain, (n,), float64 on the CPU."""
        with torch.no_grad():
            start = torch.cat(self.guide.outputs(x), dim=-1)
        values = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=step_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.99 * step / num_steps)
        few = max(1, self.num_particles // 10)
        for step in range(num_steps):
            loss = -self.elbo(x, values, few, self.seed + 1 + step).sum()
            (values.grad,) = torch.autograd.grad(loss, values)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            before, after = (self.elbo(x, v, self.num_particles, self.seed) for v in (start, values))
        return (after - before).clamp(min=0).double().cpu()

    def elbo(self, x: Tensor, values: Tensor, num_particles: int, seed: int) -> Tensor:
        """Estimate ELBO(x; λ), (n,), from the noise of a seed, the same for every example."""
        q = self.guide.distribution(*values.split(self.guide.output_sizes, dim=-1))
        seed_generators(x.device, seed)
        z = shared_noise(q, num_particles)
        if z is None:
            raise TypeError(
                f"likelihood regret needs a normal q(z|x); got {type(q).__name__}: choose another score, "
                'such as "statistics"'
            )
        return (self.vae.log_joint(x, z) - q.log_prob(z)).mean(0)
