"""Tables and sentences about estimators compared, from the dataset that a `Comparison` holds.

A t is a difference over its standard error.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pyro_vae.utils.display import Estimate, aligned

if TYPE_CHECKING:
    import xarray

__all__ = ["findings", "mean_and_error", "rounding_error", "tables"]

_LARGE = 4.0  # standard errors; with a hundred repeats, one t in some thousands is larger by chance
_ROUNDING = 16  # units in the last place by which the summed terms of a batch may be off

Array = npt.NDArray[np.float64]


def mean_and_error(draws: Array) -> tuple[Array, Array]:
    """Mean of independent draws over the last dimension, and its standard error."""
    return draws.mean(-1), draws.std(-1, ddof=1) / math.sqrt(draws.shape[-1])


def rounding_error(value: Array, dtype: str) -> Array:
    """How far a mean bound may be off because it was summed in a floating-point type, such as "float32"."""
    return _ROUNDING * torch.finfo(getattr(torch, dtype)).eps * np.abs(value)


class _Column(NamedTuple):
    """A column of a table: its heading, its cell for an estimator, and what the legend says of it."""

    heading: str
    cell: Callable[["xarray.Dataset"], str]
    meaning: str


_VALUES = [
    _Column(
        "bound",
        lambda row: str(row["target"].item()),
        "what the value estimates; L_S is the importance-weighted bound of S particles",
    ),
    _Column(
        "value",
        lambda row: _estimate(row, "value"),
        "mean of {repeats} estimates ± standard error over them, for this batch of {data}; nats per datum",
    ),
    _Column(
        "− reference",
        lambda row: _estimate(row, "bias"),
        "value less the reference above ± standard error, with the reference's and that of rounding",
    ),
    _Column("t", lambda row: _signed(row["bias_t"].item()), "− reference, over its standard error"),
    _Column(
        "t, own bound",
        lambda row: _signed(row["bound_bias_t"].item()),
        "value less a plain estimate of the same bound, over its standard error over {repeats} repeats",
    ),
    _Column(
        "ms/step",
        lambda row: _short(1e3 * row["time_per_step"].item()),
        "wall-clock time of one estimate and its gradient, the shortest of several",
    ),
    _Column(
        "MiB",
        lambda row: _short(row["peak_memory"].item() / 2**20),
        "most memory that the tensors of one step take at a time",
    ),
]
_GRADIENTS = [
    _Column(
        "of",
        lambda row: str(row["gradient_target"].item()),
        "bound per datum whose gradient g is followed, in the parameters of the model or the guide",
    ),
    _Column(
        "variance",
        lambda row: _short(row["gradient_variance"].item()),
        "E ‖g − E g‖², summed over the parameters, for the g of one step; from {repeats} repeats",
    ),
    _Column(
        "SNR",
        lambda row: _estimate(row, "snr"),
        "signal-to-noise ratio ‖E g‖ / √E ‖g − E g‖² of one step ± standard error",
    ),
    _Column(
        "t, bias",
        lambda row: _signed(row["gradient_bias_t"].item()),
        "g less a plain gradient, where half of {repeats} repeats differ most, over its error in the rest",
    ),
    _Column(
        "ms/effective sample",
        lambda row: _short(1e3 * row["time_per_effective_sample"].item()),
        "ms/step over SNR²: until the noise of an averaged g is no longer than its mean",
    ),
]


def tables(dataset: "xarray.Dataset") -> Iterator[str]:
    """Lines of the tables of values, and of the gradients in each kind of parameters; then what they mean."""
    attrs = dataset.attrs
    value, se = attrs["reference_value"], attrs["reference_se"]
    yield (
        f"{attrs['num_data']:,} data, {attrs['num_repeats']:,} repeats, seed {attrs['seed']}; "
        "values in nats per datum ± standard error"
    )
    yield f"reference: {attrs['reference']}, {Estimate(value, se) if se else f'{value:.6g}'}"
    yield ""
    yield from _table("estimator", _VALUES, dataset)
    columns = list(_VALUES)
    for kind in dataset["parameters"].values:
        part = dataset.sel(parameters=kind)
        if part["gradient_variance"].notnull().any():
            yield ""
            yield from _table(f"gradient, {kind}", _GRADIENTS, part)
            columns = [*_VALUES, *_GRADIENTS]
    yield ""
    width = max(len(column.heading) for column in columns)
    for column in columns:
        meaning = column.meaning.format(repeats=f"{attrs['num_repeats']:,}", data=f"{attrs['num_data']:,}")
        yield f"{column.heading:{width}}  {meaning}"
    yield f"A t between −{_LARGE:g} and {_LARGE:g} may be chance; so may what ≈ stands between, below."


def _table(title: str, columns: list[_Column], dataset: "xarray.Dataset") -> Iterator[str]:
    """Lines of a table with a row an estimator."""
    rows = [[name, *(column.cell(row) for column in columns)] for name, row in _rows(dataset)]
    return aligned([title, *(column.heading for column in columns)], rows, left=2)


def findings(dataset: "xarray.Dataset") -> list[str]:
    """Sentences that say which differences are large; see `Comparison.findings`."""
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
        else:
            level.append(name)
    for where, names in (("Below", below), ("Above", above), ("Not to be told from", level)):
        if names:
            yield f"{where} the reference: {', '.join(names)}."


def _against_own_bounds(dataset: "xarray.Dataset") -> Iterator[str]:
    wrong = [(name, row) for name, row in _rows(dataset) if abs(row["bound_bias_t"].item()) > _LARGE]
    for name, row in wrong:
        t = row["bound_bias_t"].item()
        yield f"WRONG: the value of {name} is not {row['target'].item()} (t = {t:+.1f})."
    if not wrong:
        yield "No value was found to differ from its own bound."


def _gradients_against_own_bounds(dataset: "xarray.Dataset") -> Iterator[str]:
    wrong = False
    for kind in dataset["parameters"].values:
        part = dataset.sel(parameters=kind)
        if part["gradient_variance"].isnull().all():
            yield f"The {kind} shows no parameters to Pyro: nothing was found out about gradients in them."
        for name, row in _rows(part):
            t = row["gradient_bias_t"].item()
            if abs(t) > _LARGE:
                wrong = True
                yield (
                    f"WRONG: the gradient of {name} in the {kind} parameters is not that of "
                    f"{row['gradient_target'].item()} (t = {t:+.1f})."
                )
    if not wrong:
        yield "No gradient was found to differ from its own bound's."


def _ranking(title: str, dataset: "xarray.Dataset", variable: str) -> str:
    """Order the estimators by a variable, with > where one falls below the first after the last >."""
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
    """Compare the values of two estimators repeat by repeat, as they start from the same random numbers."""
    one, other = pair["bound"].transpose("estimator", "repeat").values
    difference, se = mean_and_error(one - other)
    return float(difference / np.hypot(se, rounding_error(pair["value"].values[0], pair.attrs["dtype"])))


def _snr_t(pair: "xarray.Dataset") -> float:
    one, other = pair["snr"].values
    return float((one - other) / np.hypot(*pair["snr_se"].values))


def _rows(dataset: "xarray.Dataset") -> Iterator[tuple[str, "xarray.Dataset"]]:
    for row, name in enumerate(dataset["estimator"].values):
        yield str(name), dataset.isel(estimator=row)


def _estimate(row: "xarray.Dataset", name: str) -> str:
    value = row[name].item()
    return "-" if math.isnan(value) else str(Estimate(value, row[f"{name}_se"].item()))


def _signed(t: float) -> str:
    return "-" if math.isnan(t) else f"{t:+.1f}"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"
