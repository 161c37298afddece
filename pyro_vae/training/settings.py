"""Settings of a training run, checked, with their defaults."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, ReweightedWakeSleep, TraceTailAdaptive_ELBO
from pyro.optim import PyroOptim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.utils import serialization
from pyro_vae.utils.processes import Processes
from pyro_vae.utils.validation import require_count, require_number

__all__ = ["BATCH_SIZE", "PRECISIONS", "Settings", "make_settings", "require_callbacks"]

PRECISIONS = ("float32", "bf16")

BATCH_SIZE = 128  # by default


@dataclass(frozen=True)
class Settings:
    """Settings of a run; see `fit`."""

    estimator: ELBO | None  # None for `default_loss`
    optimizer: Callable[[list[torch.nn.Parameter]], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None
    batch_size: int | None
    seed: int
    clip_norm: float | None
    kl_warmup: float
    engine: str
    precision: str
    patience: int | None
    directory: Path | None
    checkpoint_every: int | timedelta | None
    shards: int = 1
    processes: Processes = field(default_factory=lambda: Processes(None))


def make_settings(
    *,
    estimator: ELBO | None,
    epochs: int,
    batch_size: int | None,
    learning_rate: float,
    optimizer: Callable[[list[torch.nn.Parameter]], Optimizer] | None,
    kl_warmup: float,
    patience: int | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    checkpoint_every: int | timedelta | None,
    resume: bool,
    shards: int | None,
    processes: Processes,
    **others: Any,
) -> Settings:
    """Check the arguments of `fit`, and fill in defaults."""
    counts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "patience": patience,
        "shards": shards,
    }
    for name, count in counts.items():
        if count is not None:
            require_count(name, count)
    if not isinstance(estimator, ELBO | None):
        got = f"the class {estimator.__name__} itself" if isinstance(estimator, type) else repr(estimator)
        raise TypeError(
            f"estimator must be a pyro.infer.ELBO, such as TraceEnum_ELBO() or pyro_vae.IWAE(5); got {got}"
        )
    if isinstance(estimator, ReweightedWakeSleep | TraceTailAdaptive_ELBO):
        raise ValueError(
            f"{type(estimator).__name__} gives no bound per datum, which fit would report and validate by: "
            "use pyro_vae.SVI, which takes its steps"
        )
    if others["precision"] not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {others['precision']!r}")
    for name, number in {"learning_rate": learning_rate, "kl_warmup": kl_warmup}.items():
        require_number(name, number)
    if not 0 <= kl_warmup < math.inf:
        raise ValueError(f"kl_warmup must be a number of epochs, at least 0; got {kl_warmup}")
    _require_functions(optimizer, others["schedule"])
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs checkpoint_dir, the folder of the run to continue")
    _require_interval(checkpoint_every, checkpoint_dir)
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    names = ("seed", "clip_norm", "precision")
    numbers = {**counts, "checkpoint_every": checkpoint_every, "kl_warmup": kl_warmup}
    numbers |= {name: others[name] for name in names}
    flags = {"resume": resume, "with checkpoint_dir": directory is not None}
    processes.require_same("settings", numbers | flags)
    if shards is None and resume:
        shards = processes.on_first(partial(_saved_shards, directory))
    return Settings(
        estimator=estimator,
        optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, learning_rate)),
        batch_size=batch_size,
        kl_warmup=kl_warmup,
        patience=patience,
        directory=directory,
        checkpoint_every=checkpoint_every,
        shards=shards or processes.size,
        processes=processes,
        **others,
    )


def _require_interval(every: Any, folder: Any) -> None:
    """Raise unless checkpoints are a number of steps, or a time, apart, and have a folder."""
    if isinstance(every, timedelta):
        if every <= timedelta(0):
            raise ValueError(f"checkpoint_every must be a positive time; got {every!r}")
    elif every is not None:
        if isinstance(every, bool) or not isinstance(every, Integral):
            raise TypeError(
                "checkpoint_every must be a number of steps, as in 1000, or a time, as in "
                f"datetime.timedelta(minutes=10); got {every!r}"
            )
        require_count("checkpoint_every", every)
    if every is not None and folder is None:
        raise ValueError("checkpoint_every needs checkpoint_dir, the folder that the run is saved in")


def _require_functions(optimizer: Any, schedule: Any) -> None:
    """Raise unless optimiser and schedule are made by functions, which a resumed run calls again."""
    if isinstance(optimizer, PyroOptim):
        raise TypeError(
            f"optimizer must make a torch optimiser; got {optimizer!r}, one of Pyro's, which go with "
            "pyro.infer.SVI: pass optimizer=torch.optim.Adam, or leave it out and pass learning_rate"
        )
    for name, value, kind, example in (
        ("optimizer", optimizer, Optimizer, "lambda parameters: torch.optim.AdamW(parameters, 1e-3)"),
        ("schedule", schedule, LRScheduler, "lambda optimizer: StepLR(optimizer, 10)"),
    ):
        if value is not None and (isinstance(value, kind) or not callable(value)):
            got = f"the object {type(value).__name__}" if isinstance(value, kind) else repr(value)
            raise TypeError(f"{name} must be a function that makes it, such as {example}; got {got}")


def require_callbacks(callbacks: Any) -> None:
    """Raise unless callbacks are a sequence of functions."""
    if callable(callbacks) or not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a list of functions, as in callbacks=[f]; got {callbacks!r}")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"a callback must be a function of the pair and the epoch; got {callback!r}")


def _saved_shards(folder: Path | None) -> int | None:
    """Return the number of shards of the run in a folder; None if there is no run, or none that is whole."""
    with contextlib.suppress(OSError, LookupError, serialization.CheckpointError):
        if folder is not None:
            return serialization.read(folder / "last.pt", "run", device="cpu")["settings"].get("shards", 1)
    return None
