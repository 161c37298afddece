"""What is reported of a training run, epoch by epoch."""

import csv
import dataclasses
import os
from dataclasses import dataclass

from pyro_vae.files import replacing

__all__ = ["Epoch", "History"]


@dataclass(frozen=True)
class Epoch:
    """What is reported of one epoch; values in nats per datum at weight β = 1, with standard errors.

    Attributes:
        epoch: Number of the epoch, from 1.
        train_bound: Mean over the epoch's data of the estimator's bound (the ELBO, for the
            estimators of an ELBO), while the parameters were moving.
        train_bound_se: Its standard error, from the spread between the batches.
        validation_elbo: Mean ELBO of the validation data after the epoch; NaN without such data.
        validation_elbo_se: Its standard error, from the spread between the data.
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
    """The epochs of a run, in order.

    Example:
        >>> history = History([Epoch(1, -120.5, 0.4, -110.2, 0.3, 1.0, 1e-3, 2.5)])
        >>> history.column("validation_elbo")
        [-110.2]
    """

    def column(self, name: str) -> list[float]:
        """Return one field of every epoch, such as "validation_elbo"."""
        return [getattr(epoch, name) for epoch in self]

    def columns(self) -> dict[str, list[float]]:
        """Return all fields, each as a column, as `plots.training_curves` takes them."""
        return {field.name: self.column(field.name) for field in dataclasses.fields(Epoch)}

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a table with a header and one row an epoch."""
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns())
            writer.writerows(dataclasses.astuple(epoch) for epoch in self)
