"""Bounds on the evidence and their gradient estimators, for any Pyro model and guide."""

from pyro_vae.objectives.estimators import CIWAE, IWAE, PIWAE, STL, VIMCO, DReG, Renyi
from pyro_vae.objectives.kl_weighting import Estimator, KLWeighted
from pyro_vae.objectives.log_terms import Terms, terms
from pyro_vae.objectives.sites import check_mean_field

__all__ = [
    "CIWAE",
    "IWAE",
    "PIWAE",
    "STL",
    "VIMCO",
    "DReG",
    "Estimator",
    "KLWeighted",
    "Renyi",
    "Terms",
    "check_mean_field",
    "terms",
]
