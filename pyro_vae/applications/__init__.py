"""Use a trained VAE: compress data without loss.

This room imports any other, and no other imports it. `pyro_vae.applications` and its names are loaded at
their first use, so that `import pyro_vae` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.applications.codec import Codec
    from pyro_vae.applications.codec_errors import CodecError

__all__ = [
    "Codec",
    "CodecError",
]

_FILES = {
    "Codec": "codec",
    "CodecError": "codec_errors",
}


def __getattr__(name: str) -> Any:
    """Load the file of a public name at its first use."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
