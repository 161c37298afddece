"""Hand-written VAE in PyTorch, with fused Adam: eager, and under `torch.compile`."""

from collections.abc import Callable

import numpy as np
import torch
from cases import LEARNING_RATE, Batches, Case, bound, weights
from torch import Tensor

NAMES = ("PyTorch by hand", "PyTorch by hand, torch.compile")


class Peer:
    def __init__(self, name: str, case: Case, pixels: np.ndarray):
        self.encoder, self.decoder = case.networks()
        self.batches = Batches(case, pixels)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE, fused=True)

        def loss(x: Tensor) -> Tensor:
            return -bound(case, self.encoder, self.decoder, x).sum()

        self.loss: Callable[[Tensor], Tensor] = loss
        if name.endswith("torch.compile"):
            self.loss = torch.compile(loss, fullgraph=True)

    def run(self, steps: int, *, ready: bool) -> int:
        for x in self.batches.take(steps, ready=ready):
            self.optimizer.zero_grad()
            self.loss(x).backward()
            self.optimizer.step()
        return steps

    def weights(self) -> list[np.ndarray]:
        return weights(self.encoder, self.decoder)


make_peer = Peer
