"""VAEs as scikit-learn estimators: features, densities, outliers, missing values and classes of tables.

Needs scikit-learn, the extra `pyro_vae[sklearn]`. Densities are in nats per row, in the units of X. Errors
are scikit-learn's own kinds: `NotFittedError`, and ValueError or TypeError for parameters and data.
"""

from pyro_vae.applications.sklearn.classifier import VAEClassifier
from pyro_vae.applications.sklearn.density import log_evidence
from pyro_vae.applications.sklearn.imputer import VAEImputer
from pyro_vae.applications.sklearn.outliers import VAEOutlierDetector
from pyro_vae.applications.sklearn.transformer import VAETransformer

__all__ = ["VAEClassifier", "VAEImputer", "VAEOutlierDetector", "VAETransformer", "log_evidence"]
