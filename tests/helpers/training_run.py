"""One small run of `fit`, and a function for processes that tests kill."""

from multiprocessing.synchronize import Event
from pathlib import Path

import torch

import pyro_vae as pv


def make_vae() -> pv.VAE:
    """A VAE with dropout and batch normalisation, so that noise and statistics are part of the state."""
    torch.manual_seed(5)
    encoder = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(30, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(8, 6),
    )
    return pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Bernoulli(3, (1, 6, 5), hidden_features=(7,)),
        guide=pv.guides.DiagonalNormal((1, 6, 5), 3, network=encoder),
    )


def normal_vae() -> pv.VAE:
    """A small VAE of data (N, 4)."""
    torch.manual_seed(1)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (4,), hidden_features=(6,)),
        guide=pv.guides.DiagonalNormal((4,), 2, hidden_features=(5,)),
    )


def make_data() -> torch.Tensor:
    """Grey levels (103, 1, 6, 5), in two kinds of images; the last batch of an epoch is a smaller one."""
    generator = torch.Generator().manual_seed(9)
    levels = torch.tensor([[0.1, 0.9], [0.9, 0.1]])[torch.randint(2, (103,), generator=generator)]
    noise = 0.2 * torch.rand(103, 1, 6, 5, generator=generator) - 0.1
    return levels.repeat_interleave(15, 1).reshape(103, 1, 6, 5) + noise


def train(vae: pv.VAE, folder: Path | None, *, epochs: int = 12, **options) -> pv.History:
    """Fit with everything that has state: a schedule, KL warm-up, dynamic binarisation, patience.

    The last epoch is the best, so that what is compared at the end depends on all of them.
    """
    defaults = {
        "batch_size": 16,
        "seed": 3,
        "learning_rate": 0.01,
        "validation": 0.2,
        "binarize": "dynamic",
        "kl_warmup": 2.5,
        "patience": 50,
        "clip_norm": 10.0,
        "schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7),
        "progress": False,
    }
    return pv.fit(vae, make_data(), epochs=epochs, checkpoint_dir=folder, **(defaults | options))


def run_and_save(folder: Path, ready: Event) -> None:
    """Begin or resume a run, from when an event is set, and save the model at its end."""
    torch.set_num_threads(1)
    vae = make_vae()
    torch.optim.Adam(vae.parameters())  # imports, for seconds in which a kill would show nothing
    ready.set()
    train(vae, folder, resume=True)
    vae.save(folder / "final.pt")
