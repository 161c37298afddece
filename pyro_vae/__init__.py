"""Variational autoencoders as probabilistic programs in Pyro.

A VAE is two Pyro functions, the generative model p(z) p(x|z) and the guide q(z|x):

    import pyro_vae as pv

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )
    history = pv.fit(vae, pv.data.load("mnist"), binarize="dynamic", epochs=10)
"""

import importlib
from typing import Any

from pyro_vae import closed_form, data, guides, likelihoods, networks, plots, priors
from pyro_vae.comparison import Comparison, compare_estimators
from pyro_vae.conditional import ConditionalVAE, SemiSupervisedVAE
from pyro_vae.evaluation import (
    Evaluation,
    annealed_importance_sampling,
    evaluate,
    save_netcdf,
    to_inference_data,
)
from pyro_vae.inference import SVI, GuideError, GuideReport, check_guide, check_mean_field
from pyro_vae.objectives import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, KLWeighted, Pair, Renyi, Terms, terms
from pyro_vae.training import Epoch, History, TensorBoard, fit
from pyro_vae.utils.serialization import CheckpointError, imported_on_demand
from pyro_vae.utils.validation import NonFiniteError
from pyro_vae.vae import VAE

__all__ = [
    "CIWAE",
    "IWAE",
    "PIWAE",
    "STL",
    "SVI",
    "VAE",
    "VIMCO",
    "CheckpointError",
    "Comparison",
    "ConditionalVAE",
    "DReG",
    "Epoch",
    "Evaluation",
    "GuideError",
    "GuideReport",
    "History",
    "KLWeighted",
    "NonFiniteError",
    "Pair",
    "Renyi",
    "SemiSupervisedVAE",
    "TensorBoard",
    "Terms",
    "annealed_importance_sampling",
    "applications",
    "check_guide",
    "check_mean_field",
    "closed_form",
    "compare_estimators",
    "data",
    "evaluate",
    "fit",
    "guides",
    "likelihoods",
    "networks",
    "plots",
    "priors",
    "save_netcdf",
    "terms",
    "to_inference_data",
]

imported_on_demand("pyro_vae.applications.linear_start", "pyro_vae.applications.units")


def __getattr__(name: str) -> Any:
    """Load `applications`, which has optional dependencies, at its first use."""
    if name == "applications":
        return importlib.import_module("pyro_vae.applications")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, so that tab completion omits imported submodules."""
    return __all__
