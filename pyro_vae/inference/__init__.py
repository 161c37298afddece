"""Steps of stochastic variational inference, and checks of a model-guide pair before the first step."""

from pyro_vae.inference.guide_check import GuideError, GuideReport, check_guide, check_mean_field
from pyro_vae.inference.svi import SVI

__all__ = ["SVI", "GuideError", "GuideReport", "check_guide", "check_mean_field"]
