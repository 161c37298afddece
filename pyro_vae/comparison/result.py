"""What is reported of estimators compared: a labelled dataset, tables, sentences, figures.

Notation: R repeats of a step on one batch; bounds are in nats per datum, higher is better; a t is a
difference over its standard error.
"""

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae.comparison.gradient_noise import GradientSummary
from pyro_vae.comparison.reference_bounds import Target
from pyro_vae.comparison.summary import findings, mean_and_error, rounding_error, tables
from pyro_vae.evaluation.arviz_compat import forest, inference_data
from pyro_vae.plots.charts import PALETTE
from pyro_vae.utils.serialization import replacing

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["PARAMETERS", "Comparison", "Measured", "Reference", "summarise"]

PARAMETERS = ("model", "guide")
_MARKERS = "osD^vP*X<"  # nine, and ten colours: ninety estimators are told apart
_NOTHING = GradientSummary(math.nan, math.nan, math.nan, math.nan)
_NATS = "nats per datum"
# name: (a number for each of, unit, meaning)
_VARIABLES = {
    "bound": ("repeat", _NATS, "estimate of the bound by one step"),
    "value": ("", _NATS, "mean of the estimates"),
    "value_se": ("", _NATS, "standard error of value over the repeats, for this batch"),
    "bias": ("", _NATS, "value less the reference"),
    "bias_se": ("", _NATS, "standard error of bias, of which the reference's and that of rounding are parts"),
    "bias_t": ("", "1", "bias over its standard error"),
    "bound_bias": ("", _NATS, "value less a plain estimate of the estimator's own bound"),
    "bound_bias_se": ("", _NATS, "standard error of bound_bias, repeat by repeat"),
    "bound_bias_t": ("", "1", "bound_bias over its standard error"),
    "gradient_variance": (
        "parameters",
        "(nats per datum / unit of parameter)^2",
        "E ‖g − E g‖² of the gradient g of the mean bound of the batch",
    ),
    "gradient_variance_se": (
        "parameters",
        "(nats per datum / unit of parameter)^2",
        "standard error of gradient_variance",
    ),
    "snr": (
        "parameters",
        "1",
        "signal-to-noise ratio ‖E g‖ / √E ‖g − E g‖², norms over the parameters (Rainforth et al. 2018)",
    ),
    "snr_se": ("parameters", "1", "standard error of snr, by the jackknife"),
    "gradient_bias_t": (
        "parameters",
        "1",
        "gradient less a plain one of its bound, along the direction of largest difference in half of the "
        "repeats, over its standard error in the other half",
    ),
    "time_per_step": (
        "",
        "s",
        "shortest wall-clock time of a value and gradient, of several, the estimators taking turns",
    ),
    "time_per_effective_sample": (
        "parameters",
        "s",
        "time_per_step / snr²: until the noise of an averaged gradient is no longer than its mean",
    ),
    "peak_memory": ("", "bytes", "peak of the tensor storage allocated by torch's operations in one step"),
}


@dataclass(frozen=True)
class Reference:
    """Mean log p(x) of the batch, exact or estimated.

    Args:
        name: What it is.
        value: In nats per datum.
        standard_error: 0 if exact.
        num_unreliable: Data for which the estimate cannot be trusted, as their Pareto k̂ is above 0.7.
    """

    name: str
    value: float
    standard_error: float
    num_unreliable: int = 0


@dataclass(frozen=True)
class Measured:
    """What has been measured of one estimator; see `comparison._measured`."""

    name: str
    family: str
    num_particles: int
    target: Target | None
    bound: list[float]
    plain_bound: list[float]
    gradients: dict[str, GradientSummary]
    gradient_bias_t: dict[str, float]
    seconds: float
    peak_bytes: int


def summarise(rows: Sequence[Measured], reference: Reference, *, dtype: str, **attrs: Any) -> "Comparison":
    """Put what was measured, with floating-point numbers of a `dtype`, into a labelled dataset."""
    import xarray  # noqa: PLC0415 (slow)

    columns = {**_values(rows, reference, dtype), **_gradients(rows)}
    return Comparison(
        xarray.Dataset(
            {
                name: (
                    ["estimator", dimension] if dimension else ["estimator"],
                    columns[name],
                    {"units": units, "long_name": meaning},
                )
                for name, (dimension, units, meaning) in _VARIABLES.items()
            },
            coords={
                name: (dims, values, {"long_name": meaning})
                for name, (dims, values, meaning) in _coordinates(rows).items()
            },
            attrs={
                "title": "Estimators side by side",
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
    )


def _values(rows: Sequence[Measured], reference: Reference, dtype: str) -> dict[str, np.ndarray]:
    """The values, and how far they are from the reference and from their own bounds."""
    bound = np.array([row.bound for row in rows])
    plain = np.array([row.plain_bound or [math.nan] * len(row.bound) for row in rows])
    value, value_se = mean_and_error(bound)
    bound_bias, bound_bias_se = mean_and_error(bound - plain)
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
    """Noise and bias of the gradients, and what they cost."""
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


def _coordinates(rows: Sequence[Measured]) -> dict[str, tuple[list[str], list, str]]:
    """What names the estimators, repeats and parameters, and what is known of each estimator beforehand."""
    targets = [row.target for row in rows]
    each = ["estimator"]
    return {
        "estimator": (each, [row.name for row in rows], "estimator"),
        "repeat": (["repeat"], list(range(len(rows[0].bound))), "number of the step"),
        "parameters": (["parameters"], list(PARAMETERS), "parameters shown to Pyro by"),
        "target": (each, [t.bound if t else "unknown" for t in targets], "bound that the value estimates"),
        "gradient_target": (
            ["estimator", "parameters"],
            [[t.gradients[kind] if t else "unknown" for kind in PARAMETERS] for t in targets],
            "bound whose gradient is followed",
        ),
        "is_lower_bound": (
            each,
            [int(t is not None and t.is_lower_bound) for t in targets],  # netCDF knows no truth values
            "whether the bound is known to be at most log p(x)",
        ),
        "family": (each, [row.family for row in rows], "estimator but for its number of particles"),
        "num_particles": (each, [row.num_particles for row in rows], "particles, in each group"),
    }


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Estimators side by side, from `compare_estimators`; shown as tables, and as what follows from them.

    `found["snr"]` gives a variable with its dimensions, units and meaning; `found.dataset` all of them, as
    `found.dataset.to_netcdf(path)` writes and `Comparison(xarray.load_dataset(path))` reads again.

    Args:
        dataset: Everything that was measured, by estimator, repeat, and model or guide parameters.
    """

    dataset: "xarray.Dataset"

    def __getitem__(self, name: str) -> "xarray.DataArray":
        """Give a variable of the dataset."""
        return self.dataset[name]

    def __repr__(self) -> str:
        return "\n".join([*tables(self.dataset), "", *self.findings()])

    def findings(self) -> list[str]:
        """Say which differences exceed four of their standard errors; smaller ones may be chance.

        In a ranking, "A ≈ B > C" says that B is not so far below A, and C is.
        """
        return findings(self.dataset)

    def columns(self) -> dict[str, list]:
        """Give each variable but "bound" as a column, as in "value", "snr_model" and "snr_guide"."""
        found: dict[str, list] = {"estimator": self.dataset["estimator"].values.tolist()}
        for name, variable in {**self.dataset.coords, **self.dataset.data_vars}.items():
            if variable.dims == ("estimator",) and name != "estimator":
                found[str(name)] = variable.values.tolist()
            elif variable.dims == ("estimator", "parameters"):
                for kind in PARAMETERS:
                    found[f"{name}_{kind}"] = variable.sel(parameters=kind).values.tolist()
        return found

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `columns` as a table, whole or not at all."""
        columns = self.columns()
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    # ArviZ and figures

    def to_inference_data(self, *, num_draws: int = 1000) -> Any:
        """Put the values in the form that ArviZ works on.

        Groups: observed_data, the "bound" of each step; and posterior, draws of each "value" by the Bayesian
        bootstrap: what the steps leave uncertain of the expected bound. The steps are weighed alike for all
        estimators, so that their differences are as sure as common random numbers make them.

        Args:
            num_draws: How many draws of the posterior.

        Returns:
            What the installed ArviZ works on: an `arviz.InferenceData` (0.x) or an `xarray.DataTree` (1.x).

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
        """Draw the gradient's signal-to-noise ratio against the number of particles, on logarithmic scales.

        Args:
            parameters: Whose gradient, the "model" or the "guide" parameters'.
            ax: Axes to draw in; by default those of a new figure.

        Raises:
            ValueError: If `parameters` is neither, or no SNR could be told from 0.
        """
        from matplotlib.figure import Figure  # noqa: PLC0415 (slow)
        from matplotlib.ticker import LogLocator, NullFormatter, NullLocator  # noqa: PLC0415 (slow)

        if parameters not in PARAMETERS:
            raise ValueError(f'parameters must be "model" or "guide"; got {parameters!r}')
        part = self.dataset.sel(parameters=parameters).dropna("estimator", subset=["snr"])
        part = part.sortby("num_particles")
        if not part.sizes["estimator"]:
            raise ValueError(f"no gradient in the {parameters} parameters was measured: nothing to draw")
        axes = ax or Figure(figsize=(8, 4.4), dpi=150, layout="constrained").add_subplot()
        families = dict.fromkeys(part["family"].values.tolist())
        for number, name in enumerate(families):
            line = part.isel(estimator=np.flatnonzero(part["family"].values == name))
            style = {
                "color": PALETTE[number % len(PALETTE)],
                "marker": _MARKERS[number % len(_MARKERS)],
                "linewidth": 1 + 2 * (len(families) - number) / len(families),  # some coincide
                "markersize": 4 + 5 * (len(families) - number) / len(families),
            }
            _draw_line(axes, line, label=name, **style)
        _draw_slopes(axes, part["num_particles"].values, part["snr"].values)
        axes.set(xscale="log", yscale="log", xlabel="particles S, in each group")
        axes.set_ylabel("signal-to-noise ratio ± SE")
        sizes = sorted(set(part["num_particles"].values.tolist()))
        axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        lost = " (arrows: not to be told from 0)" if (part["snr"] == 0).any() else ""
        axes.set_title(f"Gradient in the {parameters}'s parameters{lost}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(edgecolor="none", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return axes


def _draw_line(axes: "Axes", line: "xarray.Dataset", *, label: str, **style: Any) -> None:
    """Draw SNRs with their errors; those not to be told from 0 as an arrow down from their error."""
    snr, se, particles = (line[name].values for name in ("snr", "snr_se", "num_particles"))
    found = snr > 0
    below = np.minimum(se, 0.9 * snr)  # a logarithmic scale has no zero
    axes.errorbar(
        particles[found], snr[found], np.stack([below, se])[:, found], linestyle="-", label=label, **style
    )
    lost = ~found
    axes.errorbar(
        particles[lost], se[lost], 0.5 * se[lost], uplims=True, fmt="none", color=style["color"], capsize=3
    )


def _draw_slopes(axes: "Axes", particles: "np.ndarray", snr: "np.ndarray") -> None:
    """Draw how an SNR rises as √S and falls as 1/√S, through the middle of what was found."""
    ends = np.array([particles.min(), particles.max()], dtype=float)
    if ends[0] == ends[1] or not (snr > 0).any():
        return
    middle = np.exp(np.log(snr[snr > 0]).mean())
    for power, style, label in ((0.5, "--", "as √S"), (-0.5, ":", "as 1/√S")):
        axes.plot(
            ends, middle * (ends / np.sqrt(ends.prod())) ** power, style, color="grey", label=label, zorder=0
        )


def _array(values: Any, dims: tuple[str, ...]) -> "xarray.DataArray":
    import xarray  # noqa: PLC0415 (slow)

    return xarray.DataArray(values, dims=dims)
