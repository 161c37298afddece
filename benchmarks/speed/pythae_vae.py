"""VAE and IWAE of pythae, with its trainer's steps but without its DataLoader, which is slower."""

import numpy as np
import torch
from cases import LEARNING_RATE, PIXELS, Batches, Case, weights
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NAMES = ("pythae",)


class Encoder(BaseEncoder):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> ModelOutput:
        loc, raw = self.network(x).chunk(2, dim=-1)
        return ModelOutput(embedding=loc, log_covariance=2 * (F.softplus(raw) + 1e-6).log())


class Decoder(BaseDecoder):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.network(z).sigmoid())


class Peer:
    def __init__(self, name: str, case: Case, pixels: np.ndarray):
        self.encoder, self.decoder = case.networks()
        self.batches = Batches(case, pixels)
        options = {"input_dim": (PIXELS,), "latent_dim": case.latent, "reconstruction_loss": "bce"}
        parts = Encoder(self.encoder), Decoder(self.decoder)
        if case.particles == 1:
            self.vae = VAE(VAEConfig(**options), *parts)
        else:
            self.vae = IWAE(IWAEConfig(**options, number_samples=case.particles), *parts)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), LEARNING_RATE)

    def run(self, steps: int, *, ready: bool) -> int:
        for x in self.batches.take(steps, ready=ready):
            self.optimizer.zero_grad()
            self.vae({"data": x}).loss.backward()
            self.optimizer.step()
        return steps

    def weights(self) -> list[np.ndarray]:
        return weights(self.encoder, self.decoder)


make_peer = Peer
