"""What a trained VAE is for: each file is one use, and is loaded when it is first asked for."""

import importlib
from types import ModuleType
from typing import Any

__all__ = ["sklearn"]


def __getattr__(name: str) -> Any:
    """Load a file of this room, some of which need an extra."""
    if name in __all__:
        module: ModuleType = importlib.import_module(f"{__name__}.{name}")
        return module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
