"""Train a VAE: epochs, validation, schedules, early stopping, checkpoints."""

from pyro_vae.training.callbacks import Callback, TensorBoard
from pyro_vae.training.fitting import fit
from pyro_vae.training.history import Epoch, History

__all__ = ["Callback", "Epoch", "History", "TensorBoard", "fit"]
