"""A trained VAE in a file of `VAE.save`, with the columns of its data and how they were taken."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_vae import likelihoods
from pyro_vae.utils import serialization
from pyro_vae.utils.frames import note_columns
from pyro_vae.utils.isolation import evaluating
from pyro_vae.vae import VAE, file_content, require_vae

__all__ = ["DataKind", "Model", "load_model", "save_model"]

_ENTRY = "data"  # of the file's content, which `VAE.load` leaves alone


@dataclass(frozen=True)
class DataKind:
    """How a VAE takes its data.

    Attributes:
        columns: Names of the columns of the table, or None.
        binarize: How grey levels become bits, or None.
        missing: "nan" if NaN is missing, or None.
    """

    columns: list[str] | None = None
    binarize: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Model:
    """A trained VAE of data of `event_shape`, and how it takes them."""

    path: Path
    vae: VAE
    event_shape: tuple[int, ...]
    kind: DataKind

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return next(self.vae.parameters()).dtype

    @property
    def is_binary(self) -> bool:
        """Whether x are bits."""
        return isinstance(self.vae.likelihood, likelihoods.Bernoulli)

    @property
    def counts(self) -> bool:
        """Whether x are counts."""
        return isinstance(self.vae.likelihood, likelihoods.Poisson | likelihoods.NegativeBinomial)


def save_model(path: Path, vae: VAE, kind: DataKind) -> None:
    """Write a file for `VAE.load` and `load_model`; an earlier one is replaced when it is complete."""
    note_columns(vae, kind.columns)
    serialization.write(path, "VAE", {**file_content(vae), _ENTRY: asdict(kind)})


def load_model(path: Path, device: str) -> Model:
    """Read a VAE of `save_model` or `VAE.save`.

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If it is damaged, or holds no VAE that can be rebuilt.
        TypeError: If it is a VAE of data with a context.
    """
    vae = VAE.load(path, device=device)
    require_vae("this command", vae)
    stored: dict[str, Any] = serialization.read(path, "VAE").get(_ENTRY) or {}
    kind = serialization.fitting(path, lambda: DataKind(**stored))
    with evaluating(vae, torch.device(device), 0):
        event_shape = tuple(vae.decode(vae.prior().sample((1,))).event_shape)
    return Model(Path(path), vae, event_shape, kind)
