"""One step of stochastic variational inference, and the checks before the first."""

from pyro_vae.inference.guide_check import check_guide
from pyro_vae.inference.guide_report import GuideError, GuideReport
from pyro_vae.inference.svi import SVI

__all__ = ["SVI", "GuideError", "GuideReport", "check_guide"]
