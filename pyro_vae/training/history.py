"""History of a training run, epoch by epoch."""

import csv
import dataclasses
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro_vae import plots
from pyro_vae.utils.display import Estimate, aligned, data_frame, html_table
from pyro_vae.utils.serialization import replacing

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Epoch", "History"]

_SHOWN = 10  # rows of the table, at most


@dataclass(frozen=True)
class Epoch:
    """Values of one epoch, in nats per datum at weight β = 1, with standard errors.

    Attributes:
        epoch: Number of the epoch, from 1.
        train_bound: Mean over the epoch of the estimator's bound (the ELBO, for estimators of an ELBO),
            while the parameters were moving.
        train_bound_se: Its standard error, from the spread between batches.
        validation_elbo: Mean ELBO of the validation data after the epoch; NaN without such data.
        validation_elbo_se: Its standard error, from the spread between examples.
        beta: Weight on the KL in the last step of the epoch.
        learning_rate: Learning rate in the epoch.
        seconds: Wall-clock time of the epoch's steps.
    """

    epoch: int
    train_bound: float
    train_bound_se: float
    validation_elbo: float
    validation_elbo_se: float
    beta: float
    learning_rate: float
    seconds: float


class History(list[Epoch]):
    """Epochs of a run, in order; shown as a table of the first, the last, and some between.

    Example:
        >>> history = History([Epoch(1, -120.5, 0.4, -110.2, 0.3, 1.0, 1e-3, 2.5)])
        >>> history.column("validation_elbo")
        [-110.2]
        >>> history
        1 epoch; bounds at β = 1, in nats per datum ± standard error
        epoch     train bound  validation ELBO  β  learning rate  seconds
            1  -120.50 ± 0.40   -110.20 ± 0.30  1          0.001      2.5
    """

    def __repr__(self) -> str:
        caption, header, rows = _table(self)
        return "\n".join([caption, *aligned(header, rows)])

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return html_table(*_table(self))

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return `columns` as a data frame, a row for each epoch."""
        return data_frame(self.columns(), "epoch")

    def plot(self, **options: Any) -> "Axes":
        """Draw the bounds by `plots.training_curves`, which takes the options."""
        return plots.training_curves(self.columns(), **options)

    def column(self, name: str) -> list[float]:
        """Return one field of every epoch, such as "validation_elbo"."""
        return [getattr(epoch, name) for epoch in self]

    def columns(self) -> dict[str, list[float]]:
        """Return all fields, each as a column, as `plots.training_curves` takes them."""
        return {field.name: self.column(field.name) for field in dataclasses.fields(Epoch)}

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a table with a header and one row per epoch."""
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns())
            writer.writerows(dataclasses.astuple(epoch) for epoch in self)


def _table(history: History) -> tuple[str, list[str], list[tuple[str, ...]]]:
    """Return caption, header and rows: all epochs if they are few, else some at about equal distances."""
    count = len(history)
    shown = min(count, _SHOWN)
    some = f", {shown} of them shown" if shown < count else ""
    epochs = "1 epoch" if count == 1 else f"{count:,} epochs"
    caption = f"{epochs}{some}; bounds at β = 1, in nats per datum ± standard error"
    rows = [history[round(place * (count - 1) / max(shown - 1, 1))] for place in range(shown)]
    columns = {
        "epoch": [f"{each.epoch:,}" for each in rows],
        "train bound": [_estimate(each.train_bound, each.train_bound_se) for each in rows],
        "validation ELBO": [_estimate(each.validation_elbo, each.validation_elbo_se) for each in rows],
        "β": [f"{each.beta:.3g}" for each in rows],
        "learning rate": [f"{each.learning_rate:.3g}" for each in rows],
        "seconds": [f"{each.seconds:.1f}" for each in rows],
    }
    return caption, list(columns), list(zip(*columns.values(), strict=True))


def _estimate(value: float, standard_error: float) -> str:
    return "-" if math.isnan(value) else str(Estimate(value, standard_error))
