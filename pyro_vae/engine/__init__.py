"""A training step as a recorded or compiled graph of tensor operations; knows no VAE."""

from pyro_vae.engine.replay import ENGINES, Replay

__all__ = ["ENGINES", "Replay"]
