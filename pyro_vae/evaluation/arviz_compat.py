"""Differences between ArviZ 0.x and 1.x, behind one interface.

ArviZ takes seconds to import, so it is imported at first use.
"""

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["MIN_DRAWS", "arviz_version", "forest", "inference_data", "pareto_smooth", "write_netcdf"]

MIN_DRAWS = 30  # the Pareto fit uses the largest fifth, and ArviZ 1.x requires six weights for it


def pareto_smooth(log_weight: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Smooth the largest importance weights and estimate the shape of their tail.

    Args:
        log_weight: Log importance weights, (N, S), S ≥ `MIN_DRAWS`. The largest fifth of an example's weights
            must not all be equal.

    Returns:
        The smoothed log weights, (N, S), whose weights sum to one per example, and the shape k̂ of the
        generalised Pareto distribution fitted to each tail, (N,): +∞ where too few weights are
        non-negligible for a fit.

    Source: A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024), Pareto smoothed importance sampling,
    arXiv:1507.02646.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if _is_generation_0():
            smoothed, k = _arviz().psislw(log_weight)
        else:  # takes log-likelihoods, whose inverses are the weights
            smoothed, k = importlib.import_module("arviz_stats.base").array_stats.psislw(-log_weight)
    return smoothed, np.where(np.isnan(k), np.inf, k)


def inference_data(groups: "Mapping[str, xarray.Dataset]", attrs: Mapping[str, Any]) -> Any:
    """Combine groups in an `arviz.InferenceData` (ArviZ 0.x) or an `xarray.DataTree` (1.x)."""
    if _is_generation_0():
        return _arviz().InferenceData(attrs=dict(attrs), **groups)
    tree = importlib.import_module("xarray").DataTree.from_dict(dict(groups))
    tree.attrs.update(attrs)
    return tree


def write_netcdf(data: Any, path: Path) -> None:
    """Write the result of `inference_data` to a compressed netCDF file."""
    if _is_generation_0():
        data.to_netcdf(str(path), engine="h5netcdf")
        return
    encoding = {
        group.path: {name: {"zlib": True} for name in group.data_vars}
        for group in data.subtree
        if group.data_vars
    }
    data.to_netcdf(path, engine="h5netcdf", encoding=encoding)


def forest(data: Any, variable: str, dimension: str) -> "Axes":
    """Draw a forest plot of a posterior variable: median and 94 % interval, a row per index of a dimension.

    Args:
        data: Result of `inference_data`, with a group "posterior".
        variable: A variable of this group with the dimensions chain, draw and `dimension`.
        dimension: Dimension of the rows.

    Returns:
        The Axes of a new figure that pyplot does not manage.
    """
    arviz = _arviz()
    size = (8.0, 1.2 + 0.3 * data["posterior"].sizes[dimension])
    if _is_generation_0():
        from matplotlib.figure import Figure  # noqa: PLC0415 (slow)

        axes = Figure(size, dpi=150, layout="constrained").add_subplot()
        labeller = arviz.labels.NoVarLabeller()
        options = {"combined": True, "hdi_prob": 0.94, "labeller": labeller, "textsize": 9, "ax": axes}
        return arviz.plot_forest(data, var_names=[variable], **options)[0]
    plots = arviz.plot_forest(
        data,
        var_names=[variable],
        combined=True,
        labels=[dimension],
        point_estimate="median",
        ci_kind="hdi",
        ci_probs=(0.5, 0.94),
        backend="matplotlib",
        figure_kwargs={"figsize": size, "dpi": 150, "layout": "constrained"},
    )
    importlib.import_module("matplotlib.pyplot").close(plots.viz["figure"].item())
    return plots.viz["plot"].sel(column="forest").item()


def _is_generation_0() -> bool:
    return arviz_version().startswith("0.")


def arviz_version() -> str:
    """Return the version of the installed ArviZ."""
    return _arviz().__version__


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # 0.23 announces 1.0 daily
        import arviz  # noqa: PLC0415 (slow)
    return arviz
