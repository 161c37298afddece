"""Pyro: `pyro.infer.SVI` with `pyro.optim.Adam`, as in its tutorials."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
from cases import LEARNING_RATE, Batches, Case, Skip, weights
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

ELBOS = {
    "Pyro SVI, Trace_ELBO": Trace_ELBO,
    "Pyro SVI, TraceMeanField_ELBO": TraceMeanField_ELBO,
    "Pyro SVI, JitTrace_ELBO": JitTrace_ELBO,
    "Pyro SVI, JitTraceMeanField_ELBO": JitTraceMeanField_ELBO,
    "Pyro SVI, RenyiELBO(alpha=0)": RenyiELBO,
}
NAMES = tuple(ELBOS)


class VAE(nn.Module):
    def __init__(self, name: str, case: Case):
        super().__init__()
        self.name = name  # the only key of a VAE in Pyro's global parameter store
        self.latent = case.latent
        self.event_dim = len(case.event_shape)
        self.encoder, self.decoder = case.networks()

    def model(self, x: Tensor) -> None:
        pyro.module(f"decoder of {self.name}", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            logits = self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(self.event_dim), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(f"encoder of {self.name}", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, F.softplus(raw) + 1e-6).to_event(1))


class Peer:
    def __init__(self, name: str, case: Case, pixels: np.ndarray):
        if (case.particles > 1) != (ELBOS[name] is RenyiELBO):
            raise Skip("Pyro has the IWAE bound as RenyiELBO(alpha=0) alone, and that without a Jit class")
        options = {"ignore_jit_warnings": True} if "Jit" in name else {}
        if case.particles > 1:
            options = {"alpha": 0, "num_particles": case.particles, "vectorize_particles": True}
        self.vae = VAE(f"{name}, {case.name}", case)
        self.batches = Batches(case, pixels)
        adam = pyro.optim.Adam({"lr": LEARNING_RATE})
        self.svi = SVI(self.vae.model, self.vae.guide, adam, ELBOS[name](**options))

    def run(self, steps: int, *, ready: bool) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
            for x in self.batches.take(steps, ready=ready):
                self.svi.step(x)
        return steps

    def weights(self) -> list[np.ndarray]:
        return weights(self.vae.encoder, self.vae.decoder)


make_peer = Peer
