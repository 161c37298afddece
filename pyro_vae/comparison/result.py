"""Result of a comparison of estimators: a labelled dataset with tables, findings and figures.

Bounds are in nats per datum, higher is better.
"""

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae import plots
from pyro_vae.comparison.gradient_noise import GradientSummary
from pyro_vae.comparison.reference_bounds import Target
from pyro_vae.comparison.summary import (
    VARIABLES,
    findings,
    html,
    mean_and_error,
    recommendation,
    rounding_error,
    tables,
)
from pyro_vae.evaluation.arviz_compat import forest, inference_data
from pyro_vae.utils.display import data_frame
from pyro_vae.utils.serialization import replacing

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.axes import Axes

__all__ = ["PARAMETERS", "Comparison", "Measured", "Reference", "summarise"]

PARAMETERS = ("model", "guide")
_NOTHING = GradientSummary(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Reference:
    """Mean log p(x) of the batch, exact or estimated.

    Args:
        name: Description, for the tables.
        value: Nats per datum.
        standard_error: Standard error of `value`; 0 if exact.
        num_unreliable: Number of examples with Pareto k̂ above 0.7, whose estimate is unreliable.
    """

    name: str
    value: float
    standard_error: float
    num_unreliable: int = 0


@dataclass(frozen=True)
class Measured:
    """Measurements of one estimator: estimates of the bound, noise and bias of the gradient, time, memory."""

    name: str
    family: str
    num_particles: int
    target: Target | None
    bound: list[float]
    reference_bound: list[float]
    gradients: dict[str, GradientSummary]
    gradient_bias_t: dict[str, float]
    seconds: float
    peak_bytes: int


def summarise(rows: Sequence[Measured], reference: Reference, *, dtype: str, **attrs: Any) -> "Comparison":
    """Combine the measurements of all estimators, taken in a `dtype`, in a labelled dataset."""
    import xarray  # noqa: PLC0415 (slow)

    values = {**_coordinates(rows), **_values(rows, reference, dtype), **_gradients(rows)}
    units = {variable.name: {"units": variable.unit} if variable.unit else {} for variable in VARIABLES}
    dataset = xarray.Dataset(
        {
            variable.name: (
                variable.dims,
                values[variable.name],
                {**units[variable.name], "long_name": variable.meaning},
            )
            for variable in VARIABLES
        },
        attrs={
            "title": "Comparison of ELBO estimators",
            "reference": reference.name,
            "reference_value": reference.value,
            "reference_se": reference.standard_error,
            "reference_unreliable": reference.num_unreliable,
            "dtype": dtype,
            "num_threads": torch.get_num_threads(),
            "torch_version": str(torch.__version__),
            **attrs,
        },
    )
    return Comparison(dataset.set_coords([variable.name for variable in VARIABLES if not variable.unit]))


def _values(rows: Sequence[Measured], reference: Reference, dtype: str) -> dict[str, np.ndarray]:
    """Return the mean bounds and their differences from the reference and from their own bounds."""
    bound = np.array([row.bound for row in rows])
    own = np.array([row.reference_bound or [math.nan] * len(row.bound) for row in rows])
    value, value_se = mean_and_error(bound)
    bound_bias, bound_bias_se = mean_and_error(bound - own)
    rounding = rounding_error(value, dtype)
    bias = value - reference.value
    bias_se = np.sqrt(value_se**2 + reference.standard_error**2 + rounding**2)
    bound_bias_se = np.hypot(bound_bias_se, rounding)
    return {
        "bound": bound,
        "value": value,
        "value_se": value_se,
        "bias": bias,
        "bias_se": bias_se,
        "bias_t": bias / bias_se,
        "bound_bias": bound_bias,
        "bound_bias_se": bound_bias_se,
        "bound_bias_t": bound_bias / bound_bias_se,
    }


def _gradients(rows: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Return noise and bias of the gradients, time and memory."""
    found = [[row.gradients.get(kind, _NOTHING) for kind in PARAMETERS] for row in rows]
    snr = np.array([[part.snr for part in parts] for parts in found])
    seconds = np.array([row.seconds for row in rows])
    with np.errstate(divide="ignore"):
        time_per_effective_sample = seconds[:, np.newaxis] / snr**2
    return {
        "gradient_variance": np.array([[part.variance for part in parts] for parts in found]),
        "gradient_variance_se": np.array([[part.variance_se for part in parts] for parts in found]),
        "snr": snr,
        "snr_se": np.array([[part.snr_se for part in parts] for parts in found]),
        "gradient_bias_t": np.array(
            [[row.gradient_bias_t.get(kind, math.nan) for kind in PARAMETERS] for row in rows]
        ),
        "time_per_step": seconds,
        "time_per_effective_sample": time_per_effective_sample,
        "peak_memory": np.array([row.peak_bytes for row in rows]),
    }


def _coordinates(rows: Sequence[Measured]) -> dict[str, list[Any]]:
    """Return the labels of estimators, repeats and parameters, and the properties of each estimator."""
    targets = [row.target for row in rows]
    return {
        "estimator": [row.name for row in rows],
        "repeat": list(range(len(rows[0].bound))),
        "parameters": list(PARAMETERS),
        "target": [t.bound if t else "unknown" for t in targets],
        "gradient_target": [[t.gradients[kind] if t else "unknown" for kind in PARAMETERS] for t in targets],
        "is_lower_bound": [int(t is not None and t.is_lower_bound) for t in targets],  # netCDF lacks booleans
        "family": [row.family for row in rows],
        "num_particles": [row.num_particles for row in rows],
    }


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Result of `compare_estimators`; printing it shows tables and findings.

    `found["snr"]` is a variable with dimensions, units and meaning. `found.dataset.to_netcdf(path)` writes
    all variables, and `Comparison(xarray.load_dataset(path))` reads them.

    Args:
        dataset: All measurements, by estimator, repeat, and model or guide parameters.
    """

    dataset: "xarray.Dataset"

    def __getitem__(self, name: str) -> "xarray.DataArray":
        """Return a variable of the dataset."""
        return self.dataset[name]

    def __repr__(self) -> str:
        return "\n".join([recommendation(self.dataset), "", *tables(self.dataset), "", *self.findings()])

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return html(self.dataset)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return `columns` as a data frame, a row for each estimator."""
        return data_frame(self.columns(), "estimator")

    def findings(self) -> list[str]:
        """Return sentences on the differences above four standard errors; smaller ones may be chance.

        In a ranking "A ≈ B > C", C is more than four standard errors below A, and B is not.
        """
        return findings(self.dataset)

    def columns(self) -> dict[str, list[Any]]:
        """Return each variable except "bound" as a column, such as "value", "snr_model" and "snr_guide"."""
        found: dict[str, list[Any]] = {"estimator": self.dataset["estimator"].values.tolist()}
        for name, variable in {**self.dataset.coords, **self.dataset.data_vars}.items():
            if variable.dims == ("estimator",) and name != "estimator":
                found[str(name)] = variable.values.tolist()
            elif variable.dims == ("estimator", "parameters"):
                for kind in PARAMETERS:
                    found[f"{name}_{kind}"] = variable.sel(parameters=kind).values.tolist()
        return found

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `columns` as a CSV table, atomically."""
        columns = self.columns()
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    # ArviZ and figures

    def to_inference_data(self, *, num_draws: int = 1000) -> Any:
        """Return the values as draws for ArviZ.

        The group observed_data holds the "bound" of each step. The group posterior holds draws of each
        "value" by the Bayesian bootstrap: the uncertainty of the expected bound given the steps. All
        estimators share the weights of the steps, which keeps the precision of common random numbers.

        Args:
            num_draws: Number of posterior draws.

        Returns:
            An `arviz.InferenceData` with ArviZ 0.x, an `xarray.DataTree` with ArviZ 1.x.

        Source: D. B. Rubin (1981), The Bayesian bootstrap, Annals of Statistics 9(1).
        """
        generator = np.random.default_rng(self.dataset.attrs["seed"])
        weight = generator.dirichlet(np.ones(self.dataset.sizes["repeat"]), size=(1, num_draws))
        bound = self.dataset["bound"].reset_coords(drop=True)
        draws = bound.dot(_array(weight, ("chain", "draw", "repeat"))).transpose("chain", "draw", ...)
        draws = draws.assign_coords(chain=[0], draw=np.arange(num_draws))
        draws.attrs = dict(self.dataset["value"].attrs)
        attrs = dict(self.dataset.attrs)
        return inference_data(
            {"posterior": draws.to_dataset(name="value"), "observed_data": bound.to_dataset()}, attrs
        )

    def plot_forest(self) -> "Axes":
        """Draw the values with their 94 % intervals, by ArviZ, and the reference."""
        axes = forest(self.to_inference_data(), "value", "estimator")
        attrs = self.dataset.attrs
        axes.axvline(attrs["reference_value"], color="black", linestyle="--", linewidth=1, zorder=0)
        axes.axvspan(
            attrs["reference_value"] - attrs["reference_se"],
            attrs["reference_value"] + attrs["reference_se"],
            color="black",
            alpha=0.15,
            linewidth=0,
        )
        doubt = ", likely too low" if attrs["reference_unreliable"] else ""
        axes.set_xlabel(f"mean bound, nats per datum; dashed: {attrs['reference']}{doubt}")
        axes.set_title(f"Mean of {attrs['num_repeats']} steps, 94 % intervals")
        return axes

    def plot_snr(self, parameters: str = "guide", *, ax: "Axes | None" = None) -> "Axes":
        """Draw the signal-to-noise ratio of the gradient against the number of particles, on log scales.

        Args:
            parameters: Parameters of the gradient, "model" or "guide".
            ax: Axes to draw in; by default those of a new figure.

        Raises:
            ValueError: If `parameters` is neither, or no SNR was measured.
        """
        if parameters not in PARAMETERS:
            raise ValueError(f'parameters must be "model" or "guide"; got {parameters!r}')
        part = self.dataset.sel(parameters=parameters)
        particles, snr, snr_se = (part[name].values for name in ("num_particles", "snr", "snr_se"))
        return plots.snr(particles, snr, snr_se, part["family"].values.tolist(), parameters=parameters, ax=ax)


def _array(values: Any, dims: tuple[str, ...]) -> "xarray.DataArray":
    import xarray  # noqa: PLC0415 (slow)

    return xarray.DataArray(values, dims=dims)
