"""The commands of `pyro-vae`: thin over the public functions, with data by path."""

from pyro_vae.applications.commands.parser import build_parser

__all__ = ["build_parser"]
