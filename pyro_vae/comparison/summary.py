"""Variables of a comparison of estimators, and its tables and findings as text.

`VARIABLES` describes each variable once, for the dataset of a `Comparison` and for the printed tables.
A t is a difference over its standard error.
"""

import functools
import math
from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pyro_vae.utils.display import Estimate, aligned, html_table

if TYPE_CHECKING:
    import xarray

__all__ = [
    "VARIABLES",
    "Variable",
    "findings",
    "html",
    "mean_and_error",
    "recommendation",
    "rounding_error",
    "tables",
]

_LARGE = 4.0  # standard errors; with a hundred repeats, one t in some thousands is larger by chance
_ROUNDING = 16  # units in the last place, the largest error expected from summing the terms of a batch

Array = npt.NDArray[np.float64]


def mean_and_error(draws: Array) -> tuple[Array, Array]:
    """Return the mean of independent draws over the last dimension, and its standard error."""
    return draws.mean(-1), draws.std(-1, ddof=1) / math.sqrt(draws.shape[-1])


def rounding_error(value: Array, dtype: str) -> Array:
    """Bound the rounding error of a mean bound that was summed in a `dtype` such as "float32"."""
    return _ROUNDING * torch.finfo(getattr(torch, dtype)).eps * np.abs(value)


def _text(row: "xarray.Dataset", name: str) -> str:
    return str(row[name].item())


def _estimate(row: "xarray.Dataset", name: str) -> str:
    value = row[name].item()
    return "-" if math.isnan(value) else str(Estimate(value, row[f"{name}_se"].item()))


def _t(row: "xarray.Dataset", name: str) -> str:
    t = row[name].item()
    return "-" if math.isnan(t) else f"{t:+.1f}"


def _number(row: "xarray.Dataset", name: str, *, scale: float = 1.0) -> str:
    value = scale * row[name].item()
    return f"{value:.3g}" if math.isfinite(value) else "-"


class Variable(NamedTuple):
    """Description of a variable of the dataset; with a heading, it is also a column of the tables.

    Args:
        name: Name in the dataset.
        dims: Dimensions.
        unit: Unit of measurement; empty for a coordinate.
        meaning: The attribute `long_name`, and the entry of the legend.
        heading: Heading of the column.
        cell: Returns the text of the column for an estimator, from its part of the dataset and the name.
    """

    name: str
    dims: tuple[str, ...]
    unit: str
    meaning: str
    heading: str = ""
    cell: Callable[["xarray.Dataset", str], str] = _text


_EACH, _STEPS, _KINDS = ("estimator",), ("estimator", "repeat"), ("estimator", "parameters")
_NATS, _SQUARED = "nats per datum", "(nats per datum / unit of parameter)^2"
_ms = functools.partial(_number, scale=1e3)
_mib = functools.partial(_number, scale=2**-20)

VARIABLES = [
    Variable("estimator", _EACH, "", "estimator"),
    Variable("repeat", ("repeat",), "", "number of the step"),
    Variable("parameters", ("parameters",), "", "parameters shown to Pyro by"),
    Variable("target", _EACH, "", "bound that the value estimates; L_S is IWAE's with S particles", "bound"),
    Variable("gradient_target", _KINDS, "", "bound per datum whose gradient g is estimated", "of"),
    Variable("is_lower_bound", _EACH, "", "whether the bound is known to be at most log p(x)"),
    Variable("family", _EACH, "", "estimator without its number of particles"),
    Variable("num_particles", _EACH, "", "particles in each group"),
    Variable("bound", _STEPS, _NATS, "estimate of the bound by one step"),
    Variable("value", _EACH, _NATS, "mean of the estimates", "value", _estimate),
    Variable("value_se", _EACH, _NATS, "standard error over the repeats, for this batch"),
    Variable("bias", _EACH, _NATS, "value − reference", "− reference", _estimate),
    Variable("bias_se", _EACH, _NATS, "standard error, including those of the reference and of rounding"),
    Variable("bias_t", _EACH, "1", "(value − reference) / standard error", "t", _t),
    Variable("bound_bias", _EACH, _NATS, "value − estimate of the same bound by its definition"),
    Variable("bound_bias_se", _EACH, _NATS, "standard error over the repeats, including that of rounding"),
    Variable(
        "bound_bias_t", _EACH, "1", "(value − bound by definition) / standard error", "t, own bound", _t
    ),
    Variable(
        "gradient_variance", _KINDS, _SQUARED, "E ‖g − E g‖² of one step's gradient g", "variance", _number
    ),
    Variable("gradient_variance_se", _KINDS, _SQUARED, "standard error, by the jackknife"),
    Variable(
        "snr", _KINDS, "1", "signal-to-noise ratio ‖E g‖ / √E ‖g − E g‖² of the gradient g", "SNR", _estimate
    ),
    Variable("snr_se", _KINDS, "1", "standard error, by the jackknife"),
    Variable(
        "gradient_bias_t",
        _KINDS,
        "1",
        "(g − gradient by definition) / standard error in half of the repeats, along the mean of the other",
        "t, bias",
        _t,
    ),
    Variable(
        "time_per_step", _EACH, "s", "shortest wall-clock time of an estimate and gradient", "ms/step", _ms
    ),
    Variable(
        "time_per_effective_sample",
        _KINDS,
        "s",
        "time per step / SNR²: until the noise of an averaged g is as large as its mean",
        "ms/effective sample",
        _ms,
    ),
    Variable("peak_memory", _EACH, "bytes", "peak memory of the tensors allocated in one step", "MiB", _mib),
]


def tables(dataset: "xarray.Dataset") -> Iterator[str]:
    """Yield the lines of the tables of values and of gradients in each kind of parameters, and the legend."""
    attrs = dataset.attrs
    value, se = attrs["reference_value"], attrs["reference_se"]
    yield (
        f"{attrs['num_data']:,} data, {attrs['num_repeats']:,} repeats, seed {attrs['seed']}; "
        "values in nats per datum ± standard error"
    )
    shown = "" if math.isnan(value) else f", {Estimate(value, se) if se else f'{value:.6g}'}"
    yield f"reference: {attrs['reference']}{shown}"
    columns: list[Variable] = []
    for title, variables, part in _parts(dataset):
        yield ""
        yield from aligned(*_cells(title, variables, part), left=2)
        columns += [variable for variable in variables if variable not in columns]
    yield ""
    width = max(len(column.heading) for column in columns)
    meaning_of = {variable.name: variable.meaning for variable in VARIABLES}
    for column in columns:
        error = f" ± {meaning_of[f'{column.name}_se']}" if column.cell is _estimate else ""
        yield f"{column.heading:{width}}  {column.meaning}{error}"
    yield f"A t between −{_LARGE:g} and {_LARGE:g} may be chance, and so may a difference marked ≈ below."


def html(dataset: "xarray.Dataset") -> str:
    """Return recommendation, tables and findings as HTML."""
    found = [escape(recommendation(dataset))]
    found += [
        html_table("", *_cells(title, columns, part), left=(0, 1)) for title, columns, part in _parts(dataset)
    ]
    return "<br>".join([*found, *map(escape, findings(dataset))])


def _parts(dataset: "xarray.Dataset") -> Iterator[tuple[str, list[Variable], "xarray.Dataset"]]:
    """Yield title, columns and content of the tables: values, then gradients where they were measured."""
    values = [variable for variable in VARIABLES if variable.heading and variable.dims == _EACH]
    gradients = [variable for variable in VARIABLES if variable.heading and variable.dims == _KINDS]
    yield "estimator", values, dataset
    for kind in dataset["parameters"].values:
        part = dataset.sel(parameters=kind)
        if part["gradient_variance"].notnull().any():
            yield f"gradient, {kind}", gradients, part


def _cells(
    title: str, columns: list[Variable], dataset: "xarray.Dataset"
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table with one row per estimator."""
    rows = [[name, *(column.cell(row, column.name) for column in columns)] for name, row in _rows(dataset)]
    return [title, *(column.heading for column in columns)], rows


def recommendation(dataset: "xarray.Dataset") -> str:
    """Return in one sentence which estimator to use: the one whose gradient is sharp in the least time.

    That is the smallest time until the noise of an averaged gradient, of the guide's parameters if it was
    measured, is as large as its mean. Those within four standard errors of it are named as equals.
    Estimators that were found to be wrong are left out.
    """
    kind = next((k for k in ("guide", "model") if dataset["snr"].sel(parameters=k).notnull().any()), None)
    if kind is None:
        return "Which to use: no gradient was measured, so that nothing tells."
    part = dataset.sel(parameters=kind)
    times = {
        name: (row["time_per_effective_sample"].item(), 2 * row["snr_se"].item() / row["snr"].item())
        for name, row in _rows(part)
        if not _is_wrong(row) and math.isfinite(row["time_per_effective_sample"].item())
    }
    if not times:
        return "Which to use: no gradient stands out of its noise, or all were found to be wrong."
    best, *others = sorted(times, key=lambda name: times[name][0])
    sentence = f"Which to use: {best}, whose {kind} gradient is as large as its noise in the least time, "
    sentence += f"{1e3 * times[best][0]:.2g} ms"
    equals = [
        name
        for name in others
        if math.log(times[name][0] / times[best][0]) < _LARGE * math.hypot(times[name][1], times[best][1])
    ]
    if equals:
        sentence += f" (no worse for all that was measured: {', '.join(equals)})"
    slower = [name for name in others if name not in equals]
    if slower:
        sentence += f"; next {slower[0]}, {1e3 * times[slower[0]][0]:.2g} ms"
    bounds = {name: row["value"].item() for name, row in _rows(dataset) if name in times}
    tightest = max(bounds, key=lambda name: bounds[name])
    if bounds[tightest] > bounds[best] and tightest not in equals:
        sentence += f". The tightest bound is that of {tightest}"
    return sentence + "."


def _is_wrong(row: "xarray.Dataset") -> bool:
    """Return whether a value or gradient was found to differ from its bound's."""
    exceeds = row["bias_t"].item() > _LARGE and row["is_lower_bound"].item()
    return exceeds or abs(row["bound_bias_t"].item()) > _LARGE or abs(row["gradient_bias_t"].item()) > _LARGE


def findings(dataset: "xarray.Dataset") -> list[str]:
    """Return sentences about the differences above four standard errors; see `Comparison.findings`."""
    kinds = dataset["parameters"].values.tolist()
    return [
        *_against_the_reference(dataset),
        *_against_own_bounds(dataset),
        *_gradients_against_own_bounds(dataset),
        _ranking("Values", dataset, "value"),
        *(_ranking(f"SNR, {kind} parameters", dataset.sel(parameters=kind), "snr") for kind in kinds),
    ]


def _against_the_reference(dataset: "xarray.Dataset") -> Iterator[str]:
    attrs = dataset.attrs
    if attrs["reference_unreliable"]:
        yield (
            f"The reference is likely too low: Pareto k > 0.7 for {attrs['reference_unreliable']} of "
            f"{attrs['num_data']} data."
        )
    doubt = ", or the reference is too low" if attrs["reference_se"] else ""
    below: list[str] = []
    above: list[str] = []
    level: list[str] = []
    for name, row in _rows(dataset):
        bias, t = row["bias"].item(), row["bias_t"].item()
        if t > _LARGE and row["is_lower_bound"].item():
            yield f"WRONG: {name} exceeds log p(x), which its bound cannot{doubt} (t = {t:+.1f})."
        if abs(t) > _LARGE:
            (below if t < 0 else above).append(f"{name} by {abs(bias):.3g}")
        elif not math.isnan(t):
            level.append(name)
    for where, names in (("Below", below), ("Above", above), ("Not distinguishable from", level)):
        if names:
            yield f"{where} the reference: {', '.join(names)}."


def _against_own_bounds(dataset: "xarray.Dataset") -> Iterator[str]:
    wrong = [(name, row) for name, row in _rows(dataset) if abs(row["bound_bias_t"].item()) > _LARGE]
    for name, row in wrong:
        t = row["bound_bias_t"].item()
        yield f"WRONG: the value of {name} is not {row['target'].item()} (t = {t:+.1f})."
    if not wrong and dataset["bound_bias_t"].notnull().any():
        yield "No value was found to differ from its own bound."


def _gradients_against_own_bounds(dataset: "xarray.Dataset") -> Iterator[str]:
    wrong = False
    for kind in dataset["parameters"].values:
        part = dataset.sel(parameters=kind)
        if part["gradient_variance"].isnull().all():
            yield f"The {kind} shows no parameters to Pyro: its gradients were not measured."
        for name, row in _rows(part):
            t = row["gradient_bias_t"].item()
            if abs(t) > _LARGE:
                wrong = True
                yield (
                    f"WRONG: the gradient of {name} in the {kind} parameters is not that of "
                    f"{row['gradient_target'].item()} (t = {t:+.1f})."
                )
    if not wrong and dataset["gradient_bias_t"].notnull().any():
        yield "No gradient was found to differ from its own bound's."


def _ranking(title: str, dataset: "xarray.Dataset", variable: str) -> str:
    """Rank the estimators by a variable, with > before one that is significantly below the last leader."""
    values = dataset[variable].values
    names = dataset["estimator"].values
    order = [row for row in np.argsort(-values, kind="stable") if not np.isnan(values[row])]
    if not order:
        return f"{title}: none."
    first, words = order[0], str(names[order[0]])
    for row in order[1:]:
        pair = dataset.isel(estimator=[first, row])
        differs = (_value_t if variable == "value" else _snr_t)(pair) > _LARGE
        words += f" {'>' if differs else '≈'} {names[row]}"
        first = row if differs else first
    return f"{title}: {words}."


def _value_t(pair: "xarray.Dataset") -> float:
    """Return the t of two values, paired by repeat: both estimators start from the same random numbers."""
    one, other = pair["bound"].transpose("estimator", "repeat").values
    difference, se = mean_and_error(one - other)
    return float(difference / np.hypot(se, rounding_error(pair["value"].values[0], pair.attrs["dtype"])))


def _snr_t(pair: "xarray.Dataset") -> float:
    one, other = pair["snr"].values
    return float((one - other) / np.hypot(*pair["snr_se"].values))


def _rows(dataset: "xarray.Dataset") -> Iterator[tuple[str, "xarray.Dataset"]]:
    for row, name in enumerate(dataset["estimator"].values):
        yield str(name), dataset.isel(estimator=row)
