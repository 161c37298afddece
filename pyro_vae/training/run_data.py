"""Training and validation data of a run, checked."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments, told_of_missing
from pyro_vae.data.streams import Stream, has_length, is_divided, is_stream
from pyro_vae.inference.observed_values import check_of
from pyro_vae.objectives.pair import OwnParameters
from pyro_vae.training.settings import Settings
from pyro_vae.utils.validation import require_count

__all__ = ["prepare_data", "require_alike"]


def prepare_data(
    pair: OwnParameters,
    data: Any,
    validation: Any,
    settings: Settings,
    *,
    steps_per_epoch: int | None,
    binarize: str | None,
    missing: str | None,
) -> tuple[Batches | Stream, Batches | Stream | None]:
    """Return training and validation data, checked; see `fit`."""
    options = {"binarize": binarize, "missing": missing}
    if is_stream(data):
        return _prepare_stream(pair, data, steps_per_epoch, validation, settings, **options)
    if steps_per_epoch is None:
        return _prepare(pair, data, validation, seed=settings.seed, **options)
    if callable(data) and not hasattr(data, "__len__"):
        name = getattr(data, "__name__", type(data).__name__)
        raise TypeError(f"data is the function {name}: pass what it returns, {name}()")
    raise ValueError(
        "steps_per_epoch is for an iterable of batches; data that are taken by position have passes: "
        "leave it out, and choose epochs"
    )


def _prepare(
    pair: OwnParameters,
    data: Any,
    validation: Any,
    *,
    binarize: str | None,
    seed: int,
    missing: str | None,
) -> tuple[Batches, Batches | None]:
    """Check the data and split off, or take, the validation data."""
    options = {"binarize": binarize} | _conversions(pair, missing)
    train = Batches(data, seed=seed, **options)
    held_out = None
    if isinstance(validation, Real):
        if validation != 0:
            train, held_out = train.split(float(validation))
    elif validation is not None:
        held_out = Batches(validation, seed=seed + 1, **options)
    _check(pair, train, held_out)
    arrange = getattr(pair, "arrange", None)
    return train if arrange is None else arrange(train), held_out


def _prepare_stream(
    pair: OwnParameters,
    data: Any,
    steps_per_epoch: int | None,
    validation: Any,
    settings: Settings,
    *,
    binarize: str | None,
    missing: str | None,
) -> tuple[Stream, Batches | Stream | None]:
    """Check an iterable of batches, and take the validation data."""
    given = {"batch_size": settings.batch_size, "binarize": binarize}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} goes with data that are taken by position; an iterable makes its batches"
            )
    if isinstance(validation, Real) and validation != 0:
        raise ValueError("an iterable has no part to hold out: pass validation data of their own")
    if steps_per_epoch is not None:
        require_count("steps_per_epoch", steps_per_epoch)
    if is_stream(validation) and not has_length(validation):
        raise ValueError("validation data must have a length, as a tensor or a DataLoader of rows has")
    if settings.processes.size > 1 and is_divided(validation):
        raise ValueError(
            "each process takes its share of the validation batches, so that a DistributedSampler would "
            "leave data out: give the validation DataLoader none"
        )
    if hasattr(pair, "arrange"):
        raise TypeError(f"a {type(pair).__name__} arranges its batches: pass data that are taken by position")
    options: dict[str, Any] = _conversions(pair, missing)
    train = Stream(data, steps_per_epoch, seed=settings.seed, processes=settings.processes, **options)
    held_out: Batches | Stream | None = None
    if is_stream(validation):
        held_out = Stream(validation, None, seed=settings.seed + 1, **options)
    elif validation is not None and not isinstance(validation, Real):
        held_out = Batches(validation, seed=settings.seed + 1, **options)
    settings.processes.gather(lambda: _check(pair, train, held_out))
    return train, held_out


def _conversions(pair: OwnParameters, missing: str | None) -> dict[str, Any]:
    """Return what batches are converted to."""
    parameter = next(pair.parameters(), torch.empty(0))
    told = told_of_missing(missing, pair)
    return {"device": parameter.device, "dtype": parameter.dtype, "missing_for": told}


def _check(pair: OwnParameters, train: Batches | Stream, held_out: Batches | Stream | None) -> None:
    check, any_observed = check_of(pair, train), set()

    def check_and_note(batch: Any) -> None:
        check(batch)
        observed = arguments(batch)[1].get("observed")
        any_observed.add(not isinstance(observed, Tensor) or bool(observed.any()))

    train.check(check_and_note)
    if isinstance(train, Batches) and train.unchecked is None and any_observed == {False}:
        raise ValueError("every value of the data is missing (NaN): there is nothing to learn from")
    if held_out is not None:
        try:
            held_out.check(check_of(pair, held_out))
        except (TypeError, ValueError) as error:
            raise type(error)(f"the validation data: {error}") from error


def require_alike(settings: Settings, train: Batches | Stream, held_out: Batches | Stream | None) -> None:
    """Raise if a batch cannot be divided, or the processes have other data."""
    processes = settings.processes
    if settings.shards < processes.size:
        raise ValueError(
            f"shards, {settings.shards}, must be at least the number of processes, {processes.size}, or some "
            "would have nothing to do; begin the run with as many as it may have later, as in shards=8"
        )
    if settings.shards == 1:
        return
    if train.balance is not None:
        raise ValueError(
            "batches with a share of labelled examples are not cut in shards: use one process, group=None"
        )
    if processes.size > 1:
        described = [batches.describe() for batches in (train, held_out) if batches is not None]
        processes.require_same("the data", described)
