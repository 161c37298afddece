"""Compare ELBO estimators: bias, gradient noise, time and memory."""

from pyro_vae.comparison.experiment import compare_estimators
from pyro_vae.comparison.result import Comparison

__all__ = ["Comparison", "compare_estimators"]
