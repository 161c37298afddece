"""What this library needs of ArviZ, whose generations 0.x and 1.x name it differently.

ArviZ takes seconds to import, so it is imported where it is first used.
"""

import importlib
import warnings
from types import ModuleType

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_DRAWS", "pareto_smooth"]

MIN_DRAWS = 21  # of which a fifth make the tail that a Pareto distribution is fitted to: 5 is the fewest


def pareto_smooth(log_weight: npt.NDArray[np.float64]) -> tuple[npt.NDArray, npt.NDArray]:
    """Smooth the largest importance weights by ArviZ, and say how heavy their tail is.

    Args:
        log_weight: Logarithms of S importance weights of N data, (N, S), S ≥ `MIN_DRAWS`.

    Returns:
        The smoothed log weights, (N, S), normalised so that the weights of a datum add up to one; and the
        shape k̂ of the generalised Pareto distribution fitted to each tail, (N,), +∞ where so few weights
        are not negligible that none can be fitted.

    Source: A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024), Pareto smoothed importance sampling,
    arXiv:1507.02646.
    """
    arviz = _arviz()
    if hasattr(arviz, "psislw"):
        return arviz.psislw(log_weight)
    array_stats = importlib.import_module("arviz_stats.base").array_stats
    return array_stats.psislw(-log_weight)  # 1.x takes log-likelihoods, and weighs by their inverses


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # 0.23 announces 1.0 once a day
        import arviz  # noqa: PLC0415 (slow)
    return arviz
