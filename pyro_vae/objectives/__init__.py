"""Bounds on the evidence and their gradient estimators, for any Pyro model and guide."""

from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Estimator, Renyi
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.log_terms import Terms, terms
from pyro_vae.objectives.pair import Pair

__all__ = [
    "CIWAE",
    "IWAE",
    "PIWAE",
    "STL",
    "VIMCO",
    "DReG",
    "Estimator",
    "KLWeighted",
    "Pair",
    "Renyi",
    "Terms",
    "terms",
]
