"""Evaluate a trained model: held-out log-likelihood, guide diagnostics, latent dimensions."""

from pyro_vae.evaluation.annealed_importance import annealed_importance_sampling
from pyro_vae.evaluation.arviz_export import save_netcdf, to_inference_data
from pyro_vae.evaluation.importance_sampling import evaluate
from pyro_vae.evaluation.result import Evaluation

__all__ = ["Evaluation", "annealed_importance_sampling", "evaluate", "save_netcdf", "to_inference_data"]
