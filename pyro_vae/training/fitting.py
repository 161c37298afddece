"""Train a VAE: epochs, progress, schedules, early stopping, checkpoints, and resuming to the bit.

Reported values are in nats per datum, higher is better; only the loss inside is minimised.
"""

import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments
from pyro_vae.data.streams import Stream
from pyro_vae.inference.guide_check import require_fit
from pyro_vae.inference.svi import default_loss
from pyro_vae.objectives.pair import OwnParameters, Pair, as_programs, make_parameters
from pyro_vae.training.callbacks import Callback, call_all
from pyro_vae.training.checkpoint import Checkpoint
from pyro_vae.training.history import Epoch, History
from pyro_vae.training.run import Run
from pyro_vae.training.run_data import prepare_data, require_alike
from pyro_vae.training.settings import BATCH_SIZE, Settings, make_settings, require_callbacks
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.frames import column_names, remember_columns, require_columns
from pyro_vae.utils.isolation import evaluation_mode, isolated_generators
from pyro_vae.utils.processes import join
from pyro_vae.utils.signals import deferred_signals
from pyro_vae.vae import VAE

__all__ = ["fit"]

logger = logging.getLogger("pyro_vae")


def fit(
    vae: Any,
    data: Any,
    *,
    estimator: ELBO | None = None,
    epochs: int = 10,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    learning_rate: float = 1e-3,
    optimizer: Callable[[list[torch.nn.Parameter]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    validation: Any = None,
    binarize: str | None = None,
    missing: str | None = None,
    kl_warmup: float = 0,
    engine: str = "auto",
    precision: str = "float32",
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | timedelta | None = None,
    resume: bool = False,
    group: Any = "auto",
    shards: int | None = None,
) -> History:
    """Train a VAE, or any Pyro model and guide, by stochastic variational inference.

    Maximises the mean over the data of the estimator's bound, for the default the ELBO with its KL in closed
    form where there is one, by minibatches in a new random order each epoch. The order of the data,
    binarisation, the noise of a step, and evaluation are functions of `seed` and of the number of epoch and
    step; the global generators are restored.

    With `checkpoint_dir` the run is saved there after every epoch, and when it is interrupted:
    "last.pt" to resume from, and "best.pt", the VAE of the best epoch so far, for `VAE.load`. A run
    that was killed at any moment and is resumed ends with the same parameters, to the bit, as one
    that never was.

    Args:
        vae: The model and guide to train, in place: a `VAE`, a `Pair`, any module with Pyro functions `model`
            and `guide`, or a tuple (model, guide). What the two name by `pyro.param` and `pyro.module` is
            owned by a `Pair`; one that is made here may hold no `pyro.param`, which would be lost.
        data: Training data (N, *event_shape) in the support of the likelihood: a tensor, `Images`, or
            whatever has a shape and returns rows by position (NumPy, memory maps, h5py, zarr, sparse
            matrices, data frames of numbers, map-style torch data sets). Only the rows of a batch are read
            and copied, except of data frames and by `binarize="fixed"`. After a data frame, others that the
            pair is given must have its columns, in its order. A tuple or dict of these for programs of
            several arguments, which are called as f(*batch) or f(**batch); None for an argument that is not
            there. Or an iterable of batches, such as a torch DataLoader or a stream without length, of
            tensors, arrays or data frames.
        estimator: A `pyro.infer.ELBO`; by default `TraceMeanField_ELBO()` where it is valid for the pair,
            `TraceEnum_ELBO()` where a site is marked to be enumerated, else `Trace_ELBO()`.
        epochs: Passes over the data, those before a resume included.
        batch_size: Data a step; the last batch may be smaller. By default 128, or N where there are fewer.
            More than N means N, with a warning. None for an iterable, which makes its own.
        steps_per_epoch: Batches of an epoch, for an iterable; by default its length. The next epoch goes on
            where the last one ended. Such a run resumes where it was if the iterable has `state_dict` and
            `load_state_dict`; else it begins again from the start of the data, which a warning says.
        seed: Non-negative integer from which every random number of the run is derived.
        learning_rate: Of the default optimiser, Adam.
        optimizer: Makes another optimiser from the parameters, as in
            `lambda parameters: torch.optim.AdamW(parameters, 1e-3)`.
        schedule: Makes a learning-rate schedule from the optimiser; stepped after each epoch. A
            `ReduceLROnPlateau` sees the negative of what `patience` watches, or itself with mode="max".
        clip_norm: Largest norm of the whole gradient of the batch's summed loss.
        validation: Held-out data, or the fraction of `data` to hold out; 0 or None for neither.
        binarize: "dynamic" (fresh Bernoulli draws at each pass), "fixed" (one draw) or "threshold"
            (at ½), for grey levels under a Bernoulli likelihood.
        missing: "nan" if NaN in x, the first of several arguments, means missing: the bound is that of the
            observed values alone. The model and the guide are then called with `observed`, see `VAE.model`,
            and with 0 for NaN, which reaches no network; a guide with `mask_input` sees where.
        kl_warmup: Epochs over which the weight on the KL rises linearly from 0 to 1. What is
            reported stays the value at weight 1.
        engine: How the steps are taken: "auto", "eager", "traced" or "compiled"; see `SVI`. All take the same
            steps up to rounding.
        precision: "float32" for that of the parameters, or "bf16": networks compute the steps in bfloat16, by
            `torch.autocast`, densities and divergences in float32. Evaluation is in float32.
        patience: Stop when this many epochs in a row brought no better value (validation ELBO, or
            training bound without validation data), and return to the parameters of the best epoch.
        callbacks: Called after each epoch, in evaluation mode; see `Callback`. What they draw does not
            disturb the training.
        progress: Show a progress bar, in a terminal or a notebook.
        checkpoint_dir: Folder for checkpoints, made if need be. An earlier run there, finished or not, is
            replaced, which a warning says, unless it is resumed.
        checkpoint_every: Save the run also within epochs, where they are long: after every so many steps, or
            by a `datetime.timedelta`, after the step in which so much time has passed.
        resume: Continue the run in `checkpoint_dir`; begin one where there is none yet, which a warning says,
            since the name of the folder may be wrong. The folder serves one run at a time.
        group: The processes of `torch.distributed` that train together: "auto" for all that torchrun has
            started, None for this one alone. Each takes a part of every batch, and the gradients are summed,
            so that `batch_size` is of all together and the steps are those of one process. All call `fit`
            with the same data and settings; the first process writes, prints and runs the callbacks.
        shards: Parts in which each batch is cut, with random numbers of their own; by default the number of
            processes at the start of the run. Runs of the same number of shards agree up to the order of
            sums, on any number of processes, also when resumed.

    Returns:
        The history, one `Epoch` each.

    Raises:
        TypeError: If `vae` has no model and guide, the data are of another kind or not floating-point, or the
            estimator is not an ELBO.
        ValueError: If an argument is out of range; if the data are empty, have another shape than the
            likelihood, or lie outside its support; if the guide does not fit the model (a `GuideError`,
            see `check_guide`), or the estimator is not valid for the two.
        NonFiniteError: If the loss or a parameter stops being finite; names the epoch, the step and
            the site. The last checkpoint is kept.
        CheckpointError: If the run to resume is damaged, or was made with other settings or data.
        KeyboardInterrupt: On Ctrl-C, after the step in progress was finished and saved.
        SystemExit: On SIGTERM, by which clusters end a process, likewise, if there is a `checkpoint_dir`.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> history = fit(vae, torch.randn(50, 6), epochs=3, batch_size=20, progress=False)
        >>> len(history)
        3
    """
    pair = _own_pair(vae)
    settings = make_settings(
        estimator=estimator,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=clip_norm,
        kl_warmup=kl_warmup,
        engine=engine,
        precision=precision,
        patience=patience,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        shards=shards,
        processes=join(group),
    )
    require_callbacks(callbacks)
    require_columns(column_names(data), validation)
    train, held_out = prepare_data(
        pair, data, validation, settings, steps_per_epoch=steps_per_epoch, binarize=binarize, missing=missing
    )
    if patience is not None and held_out is None:
        logger.warning(
            "patience without validation data watches the bound on the training data, which mostly goes on "
            "rising: pass validation=0.1, or data of their own"
        )
    if isinstance(vae, nn.Module):
        remember_columns(vae, data)
    with _surroundings(pair, train.device, seed), settings.processes.logging_once():
        settings.processes.gather(lambda: _make_parameters(pair, vae, train, batch_size))
        with evaluation_mode(pair):  # also of the modules that have just been met
            require_alike(settings, train, held_out)
            run = _begin(pair, train, held_out, settings)
            with Checkpoint(run).begun(resume=resume) as checkpoint:
                settings.processes.broadcast(run.state_tensors().values())
                _train(run, checkpoint, epochs, [partial(call, vae) for call in callbacks], progress=progress)
        if patience is not None:
            pair.load_state_dict(run.best_state)
    return run.history


def _own_pair(pair: Any) -> OwnParameters:
    """Return what `fit` was given, as a pair that owns its parameters."""
    if isinstance(pair, OwnParameters):
        return pair
    programs = as_programs("fit(pair, data)", pair)
    return Pair(programs.model, programs.guide)


def _begin(
    pair: OwnParameters, train: Batches | Stream, held_out: Batches | Stream | None, settings: Settings
) -> Run:
    """Return a run with the default estimator filled in; what one process raises, all raise."""
    runs: list[Run] = []

    def begin() -> None:
        estimator = settings.estimator
        if estimator is None:
            given = settings.batch_size or BATCH_SIZE
            args, kwargs = arguments(train.peek(len(train) if given >= len(train) else 2))
            try:
                estimator = default_loss(pair.model, pair.guide, *args, **kwargs)
            except Exception:
                require_fit(pair.model, pair.guide, *args, **kwargs)  # explains it, if the guide does not fit
                raise
        runs.append(Run(pair, train, held_out, dataclasses.replace(settings, estimator=estimator)))

    settings.processes.gather(begin)
    return runs[0]


def _make_parameters(
    pair: OwnParameters, given: Any, train: Batches | Stream, batch_size: int | None
) -> None:
    """Make the parameters that appear at the first run, before the optimiser is made of them."""
    if isinstance(pair, VAE) and not pair.names_parameters:
        return
    args, kwargs = arguments(train.peek(batch_size or BATCH_SIZE))
    try:
        make_parameters(pair, args, kwargs)
    except Exception:
        require_fit(pair.model, pair.guide, *args, **kwargs)  # explains it, if the guide does not fit
        raise
    lost = list(pair.stored._parameters)
    if pair is not given and lost:
        raise ValueError(
            f"the programs make parameters of their own, {', '.join(map(repr, lost))}, which would be lost "
            "after fit: keep them in a pair, as in pair = pyro_vae.Pair(model, guide); fit(pair, ...)"
        )


@contextlib.contextmanager
def _surroundings(pair: OwnParameters, device: torch.device, seed: int) -> Iterator[None]:
    """Train with random numbers of the run's own; restore modes, generators and Pyro's store after it."""
    with (
        evaluation_mode(pair),
        # in the one store of the process a PyroModule would share its parameters with others of their names
        pyro.get_param_store().scope(),
        torch.inference_mode(False),
        torch.enable_grad(),
        isolated_generators(device, seed),
    ):
        yield


def _train(
    run: Run,
    checkpoint: Checkpoint,
    epochs: int,
    callbacks: Sequence[Callable[[Epoch], bool | None]],
    *,
    progress: bool,
) -> None:
    """Take the epochs that remain, and save after each."""
    with (
        deferred_signals(may_save=checkpoint.folder is not None) as interrupted,
        progress_bar(
            epochs * run.epoch_size,
            initial=run.data_seen(),
            shown=progress and run.processes.is_first,
            unit=" data",
        ) as bar,
    ):
        bar.unit_scale = True
        stop = False
        while len(run.history) < epochs and not run.out_of_patience() and not stop:
            bar.set_description(f"epoch {len(run.history) + 1}/{epochs}")
            for batch_length in run.steps(interrupted):
                bar.set_postfix_str(f"{run.mean_bound():.2f} nats", refresh=False)
                bar.update(batch_length)
                if run.is_due():
                    checkpoint.save()
            if not run.interrupted:
                run.finish_epoch()
                stop = call_all(callbacks, run)
            checkpoint.save()  # after the callbacks, which may have changed the learning rate, say
            signals = run.processes.gather(interrupted)
            if signal.SIGTERM in signals:
                raise SystemExit(128 + signal.SIGTERM)
            if any(signals):
                raise KeyboardInterrupt(run.how_to_resume())
