"""Lossless compression by bits back, to files that are the same on every machine; needs constriction."""

from pyro_vae.applications.codec.codec import Codec
from pyro_vae.applications.codec.errors import CodecError

__all__ = ["Codec", "CodecError"]
