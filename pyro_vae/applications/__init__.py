"""Use a trained VAE: anomalies, missing and noisy data, compression, features for other algorithms.

This room imports any other, and no other imports it. `pyro_vae.applications`, its names and its files are
loaded at their first use, since some need an extra, and `import pyro_vae` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.applications import corruptions
    from pyro_vae.applications.anomaly import AnomalyDetector
    from pyro_vae.applications.codec import Codec, CodecError
    from pyro_vae.applications.denoising import denoise
    from pyro_vae.applications.exporting import export, export_weights
    from pyro_vae.applications.imputation import Pooled, impute, pool
    from pyro_vae.applications.mixed_tables import table_vae
    from pyro_vae.applications.posterior_draws import Restored
    from pyro_vae.applications.scores import anomaly_scores
    from pyro_vae.applications.typicality import BatchTypicality, batch_typicality

__all__ = [
    "AnomalyDetector",
    "BatchTypicality",
    "Codec",
    "CodecError",
    "Pooled",
    "Restored",
    "anomaly_scores",
    "batch_typicality",
    "corruptions",
    "denoise",
    "export",
    "export_weights",
    "impute",
    "pool",
    "table_vae",
]

_FILES = {
    "AnomalyDetector": "anomaly",
    "BatchTypicality": "typicality",
    "Codec": "codec",
    "CodecError": "codec",
    "Pooled": "imputation",
    "Restored": "posterior_draws",
    "anomaly_scores": "scores",
    "batch_typicality": "typicality",
    "corruptions": "corruptions",
    "denoise": "denoising",
    "export": "exporting",
    "export_weights": "exporting",
    "impute": "imputation",
    "pool": "imputation",
    "sklearn": "sklearn",
    "table_vae": "mixed_tables",
}


def __getattr__(name: str) -> Any:
    """Load the file of a public name, or a file of this room, at its first use."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = importlib.import_module(f"{__name__}.{_FILES[name]}")
    return file if name == _FILES[name] else getattr(file, name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
