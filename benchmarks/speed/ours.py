"""Peers of this library: `pv.SVI.step` and `pv.fit` with each engine."""

import math
import os
import sys

import numpy as np
import torch
from cases import LEARNING_RATE, Batches, Case, Skip, weights
from greenlet import greenlet
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference.svi import ENGINES

NAMES = tuple(f"pyro_vae.{what}, {engine}" for what in ("SVI", "fit") for engine in ENGINES)
SHAPE = (1, 28, 28)


class Ours:
    def __init__(self, case: Case):
        self.encoder, self.decoder = case.networks()
        inwards = nn.Sequential(nn.Flatten(), self.encoder) if case.hidden else self.encoder
        self.vae = pv.VAE(
            prior=pv.priors.StandardNormal(case.latent),
            likelihood=pv.likelihoods.Bernoulli(case.latent, SHAPE, network=self.decoder),
            guide=pv.guides.DiagonalNormal(SHAPE, case.latent, network=inwards),
        )
        self.estimator = TraceMeanField_ELBO() if case.particles == 1 else pv.IWAE(case.particles)

    def weights(self) -> list[np.ndarray]:
        return weights(self.encoder, self.decoder)


class ImageBatches(Batches):
    """Batches binarised by this library's `Images`."""

    def __init__(self, case: Case, pixels: np.ndarray):
        self.images = images(pixels)
        super().__init__(case, pixels)

    def make(self, index: Tensor) -> Tensor:
        return self.images.batch(index)


class Steps(Ours):
    def __init__(self, engine: str, case: Case, pixels: np.ndarray):
        super().__init__(case)
        optimizer = torch.optim.Adam(self.vae.parameters(), LEARNING_RATE)
        self.svi = pv.SVI(self.vae.model, self.vae.guide, optimizer, self.estimator, engine=engine)
        self.batches = ImageBatches(case, pixels)

    def run(self, steps: int, *, ready: bool) -> int:
        for x in self.batches.take(steps, ready=ready):
            self.svi.step(x)
        return steps


class Fit(Ours):
    """One call of `fit` that a callback suspends after each epoch until the next `run`."""

    def __init__(self, engine: str, case: Case, pixels: np.ndarray):
        super().__init__(case)
        self.epoch = case.epoch
        options = {"estimator": self.estimator, "batch_size": case.batch, "learning_rate": LEARNING_RATE}
        data = images(pixels[: case.batch * case.epoch])

        def fit() -> None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the progress bar keeps it)
            pv.fit(self.vae, data, epochs=10**6, engine=engine, callbacks=[self.halt], **options)

        self.fitting = greenlet(fit)

    def halt(self, *_: object) -> None:
        sys.stderr = sys.__stderr__
        self.fitting.parent.switch()

    def run(self, steps: int, *, ready: bool) -> int:
        if ready:
            raise Skip("fit makes its batches itself")
        epochs = math.ceil(steps / self.epoch)
        for _ in range(epochs):
            self.fitting.switch()
        return epochs * self.epoch


def images(pixels: np.ndarray) -> pv.data.Images:
    return pv.data.from_array(pixels).binarized("dynamic")


def make_peer(name: str, case: Case, pixels: np.ndarray) -> Steps | Fit:
    what, engine = name.removeprefix("pyro_vae.").split(", ")
    return {"SVI": Steps, "fit": Fit}[what](engine, case, pixels)
