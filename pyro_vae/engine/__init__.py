"""Run a training step as a recorded or compiled graph of tensor operations, independent of VAEs."""

from pyro_vae.engine.replay import ENGINES, Replay

__all__ = ["ENGINES", "Replay"]
