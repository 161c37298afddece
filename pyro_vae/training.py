"""Training a VAE: epochs, progress, schedules, early stopping, checkpoints, and resuming to the bit.

Reported values are in nats per datum, higher is better; only the loss inside is minimised.
"""

import contextlib
import copy
import dataclasses
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from pyro_vae import checkpoints
from pyro_vae.batches import Batches
from pyro_vae.data import Images
from pyro_vae.estimators import KLWeighted, terms
from pyro_vae.history import Epoch, History
from pyro_vae.randomness import derived_seed, isolated_generators
from pyro_vae.svi import SVI, NonFiniteError
from pyro_vae.vae import VAE

__all__ = ["Callback", "TensorBoard", "fit"]

logger = logging.getLogger(__name__)

_NOISE, _EVALUATION = 20, 21  # streams of random numbers


class Callback(Protocol):
    """Called by `fit` after each epoch; returning True ends the training."""

    def __call__(self, vae: VAE, epoch: Epoch) -> bool | None:
        """Look at the model and at what is reported of the epoch."""


class TensorBoard:
    """A callback that logs what is reported of each epoch for TensorBoard.

    Args:
        log_dir: The folder that `tensorboard --logdir` reads.

    Raises:
        ImportError: If the package tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str]):
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (slow, and seldom wanted)

        self.writer = SummaryWriter(str(log_dir))

    def __call__(self, vae: VAE, epoch: Epoch) -> None:
        """Log one epoch."""
        for name, value in dataclasses.asdict(epoch).items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, epoch.epoch)
        self.writer.flush()


def fit(
    vae: VAE,
    data: Tensor | Images,
    *,
    estimator: ELBO | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    learning_rate: float = 1e-3,
    optimizer: Callable[[list[torch.nn.Parameter]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    validation: float | Tensor | Images | None = None,
    binarize: str | None = None,
    kl_warmup: float = 0,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> History:
    """Train a VAE by stochastic variational inference.

    Maximises the mean over the data of the estimator's bound, for the default the ELBO with its KL
    in closed form, by minibatches in a fresh random order each epoch. The order of the data, the
    noise of training, and evaluation draw from separate streams derived from `seed`; the global
    generators are left as they were.

    With `checkpoint_dir` the run is saved there after every epoch, and when it is interrupted:
    "last.pt" to resume from, and "best.pt", the VAE of the best epoch so far, for `VAE.load`. A run
    that was killed at any moment and is resumed ends with the same parameters, to the bit, as one
    that never was.

    Args:
        vae: The model and guide to train, in place.
        data: Training data (N, *event_shape) in the support of the likelihood.
        estimator: A `pyro.infer.ELBO`; default `TraceMeanField_ELBO()`.
        epochs: Passes over the data, those before a resume included.
        batch_size: Data a step; the last batch may be smaller. More than N means N, with a warning.
        seed: Non-negative integer from which every random number of the run is derived.
        learning_rate: Of the default optimiser, Adam.
        optimizer: Makes another optimiser from the parameters, as in
            `lambda parameters: torch.optim.AdamW(parameters, 1e-3)`.
        schedule: Makes a learning-rate schedule from the optimiser; stepped after each epoch.
        clip_norm: Largest norm of the whole gradient of the batch's summed loss.
        validation: Held-out data, or the fraction of `data` to hold out.
        binarize: "dynamic" (fresh Bernoulli draws at each pass), "fixed" (one draw) or "threshold"
            (at ½), for grey levels under a Bernoulli likelihood.
        kl_warmup: Epochs over which the weight on the KL rises linearly from 0 to 1. What is
            reported stays the value at weight 1.
        patience: Stop when this many epochs in a row brought no better value (validation ELBO, or
            training bound without validation data), and return to the parameters of the best one.
        callbacks: Called after each epoch; see `Callback`.
        progress: Show a progress bar.
        checkpoint_dir: Folder for checkpoints, made if need be. An earlier run there is replaced.
        resume: Continue the run in `checkpoint_dir`; begin one where there is none yet.

    Returns:
        The history, one `Epoch` each.

    Raises:
        TypeError: If the data are no floating-point tensor or `Images`.
        ValueError: If an argument is out of range, or the data are empty, have another shape than
            the likelihood, or lie outside its support.
        NonFiniteError: If the loss or a parameter stops being finite; names the epoch, the step and
            the site. The last checkpoint is kept.
        CheckpointError: If the run to resume is damaged, or was made with other settings or data.
        KeyboardInterrupt: On Ctrl-C, after the step in progress was finished and saved.

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
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1; got {epochs} and {batch_size}")
    if kl_warmup < 0 or (patience is not None and patience < 1):
        raise ValueError(f"kl_warmup must be ≥ 0 and patience ≥ 1; got {kl_warmup} and {patience}")
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs checkpoint_dir, the folder of the run to continue")
    run = _Run(
        vae,
        *_prepare(vae, data, validation, binarize, seed),
        estimator=estimator or TraceMeanField_ELBO(),
        optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, learning_rate)),
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
        clip_norm=clip_norm,
        kl_warmup=kl_warmup,
        directory=None if checkpoint_dir is None else Path(checkpoint_dir),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolated_generators(run.device, derived_seed(seed, _NOISE)))
        run.begin(resume=resume)
        interrupted = stack.enter_context(_deferred_interrupt())
        bar = stack.enter_context(
            tqdm(total=epochs * len(run.train), initial=run.data_seen(), disable=not progress, unit=" data")
        )
        bar.unit_scale = True
        while len(run.history) < epochs and not run.out_of_patience(patience):
            bar.set_description(f"epoch {len(run.history) + 1}/{epochs}")
            for batch_length in run.steps():
                bar.set_postfix_str(f"{run.bound()[0]:.2f} nats", refresh=False)
                bar.update(batch_length)
                if interrupted():
                    run.save()
                    raise KeyboardInterrupt(run.how_to_resume())
            run.finish_epoch()
            run.save()
            stop = [callback(vae, run.history[-1]) for callback in callbacks]  # each is called
            if any(stop):
                break
    if patience is not None:
        vae.load_state_dict(run.best_state)
    return run.history


def _prepare(
    vae: VAE,
    data: Tensor | Images,
    validation: float | Tensor | Images | None,
    binarize: str | None,
    seed: int,
) -> tuple[Batches, Batches | None]:
    """Check the data and split off, or take, the validation data."""
    device = next(vae.parameters()).device
    train = Batches(data, binarize=binarize, seed=seed, device=device)
    held_out = None
    if isinstance(validation, float):
        train, held_out = train.split(validation)
    elif validation is not None:
        held_out = Batches(validation, binarize=binarize, seed=seed + 1, device=device)
    for batches in filter(None, (train, held_out)):
        batches.check(vae.check_data)
    return train, held_out


class _Run:
    """A training run: what changes as it goes on, and what its checkpoint holds."""

    def __init__(
        self,
        vae: VAE,
        train: Batches,
        held_out: Batches | None,
        *,
        estimator: ELBO,
        optimizer: Callable[[list[torch.nn.Parameter]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None,
        batch_size: int,
        seed: int,
        clip_norm: float | None,
        kl_warmup: float,
        directory: Path | None,
    ):
        parameters = [p for p in vae.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("no parameter of the VAE requires a gradient: there is nothing to train")
        self.vae, self.train, self.held_out = vae, train, held_out
        self.device = parameters[0].device
        self.optimizer = optimizer(parameters)
        self.schedule = schedule(self.optimizer) if schedule else None
        self.batch_size, self.seed, self.directory = batch_size, seed, directory
        if batch_size > len(train):
            logger.warning(
                "batch_size %d is more than the %d data: each step takes them all", batch_size, len(train)
            )
        self.steps_per_epoch = math.ceil(len(train) / batch_size)
        estimator_label = _label(estimator)
        if kl_warmup:
            warmup_steps = kl_warmup * self.steps_per_epoch
            estimator = KLWeighted(estimator, beta=lambda step: min(1.0, (step + 1) / warmup_steps))
        self.svi = SVI(vae.model, vae.guide, self.optimizer, estimator, clip_norm=clip_norm)
        self.history = History()
        self.done: list[tuple[int, float]] = []  # length and bound of each batch of the epoch under way
        self.seconds = 0.0
        self.beta = 1.0
        self.best_state: dict[str, Tensor] = {}
        self.settings = {
            "estimator": estimator_label,
            "optimizer": type(self.optimizer).__name__,
            "schedule": type(self.schedule).__name__,
            "batch_size": batch_size,
            "seed": seed,
            "clip_norm": clip_norm,
            "kl_warmup": kl_warmup,
        }
        if directory is not None:  # a check sum costs a pass over the data
            self.settings["data"] = train.describe()
            self.settings["validation"] = held_out.describe() if held_out else None

    def steps(self) -> Iterator[int]:
        """Take the remaining steps of the epoch under way, yielding the length of each batch."""
        epoch = len(self.history)
        self.vae.train()
        started = time.perf_counter() - self.seconds
        for batch in self.train.epoch(epoch, batch_size=self.batch_size, start=len(self.done)):
            if isinstance(self.svi.loss, KLWeighted):
                self.svi.loss.steps = epoch * self.steps_per_epoch + len(self.done)
                self.beta = self.svi.loss.beta
            try:
                loss = self.svi.step(batch)
            except NonFiniteError as error:
                where = f"epoch {epoch + 1}, step {len(self.done) + 1} of {self.steps_per_epoch}"
                raise NonFiniteError(f"{where}: {error}. {self._last_good()}") from error
            self.done.append((len(batch), -loss / len(batch)))
            self.seconds = time.perf_counter() - started
            yield len(batch)

    def bound(self) -> tuple[float, float]:
        """Mean bound of the epoch's batches so far, and its standard error, in nats per datum."""
        lengths, bounds = torch.tensor(self.done, dtype=torch.float64).unbind(1)
        weights = lengths / lengths.sum()
        mean = (weights * bounds).sum()
        count = len(bounds)
        spread = ((weights * (bounds - mean)) ** 2).sum() * count / (count - 1) if count > 1 else math.nan
        return float(mean), math.sqrt(spread)

    def finish_epoch(self) -> None:
        """Evaluate, enter the epoch in the history, step the schedule."""
        train_bound, train_bound_se = self.bound()
        validation_elbo, validation_elbo_se = self._validation_elbo()
        epoch = Epoch(
            epoch=len(self.history) + 1,
            train_bound=train_bound,
            train_bound_se=train_bound_se,
            validation_elbo=validation_elbo,
            validation_elbo_se=validation_elbo_se,
            beta=self.beta,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=self.seconds,
        )
        self.history.append(epoch)
        self.done, self.seconds = [], 0.0
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(-self._merits()[-1])
        elif self.schedule is not None:
            self.schedule.step()
        if self._best() == len(self.history) - 1:
            self.best_state = copy.deepcopy(self.vae.state_dict())

    @torch.no_grad()
    def _validation_elbo(self) -> tuple[float, float]:
        if self.held_out is None:
            return math.nan, math.nan
        self.vae.eval()
        seed = derived_seed(self.seed, _EVALUATION)  # the same noise after every epoch: smoother curves
        self.held_out.bits.manual_seed(seed)
        with isolated_generators(self.device, seed):
            batches = self.held_out.in_order(1024)
            elbo = torch.cat(
                [terms(self.vae.model, self.vae.guide, x).elbo.mean(0).double() for x in batches]
            )
        return float(elbo.mean()), float(elbo.std() / math.sqrt(len(elbo)))

    def _merits(self) -> list[float]:
        """What is to be maximised, for each epoch."""
        return self.history.column("train_bound" if self.held_out is None else "validation_elbo")

    def _best(self) -> int:
        merits = self._merits()
        return merits.index(max(merits))

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs brought no improvement."""
        return (
            patience is not None and bool(self.history) and len(self.history) - 1 - self._best() >= patience
        )

    def data_seen(self) -> int:
        """How many data the run has taken a step on, repeats counted."""
        return len(self.history) * len(self.train) + sum(length for length, _ in self.done)

    def save(self) -> None:
        """Write the checkpoints, if a folder was asked for."""
        if self.directory is None:
            return
        for name, parameter in self.vae.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"parameter {name!r} is not finite after a step. {self._last_good()}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {self.directory} for checkpoints: {error}") from error
        if self.history and not self.done and self._best() == len(self.history) - 1:
            self.vae.save(self.directory / "best.pt")
        noise = [torch.get_rng_state()]
        if self.device.type == "cuda":
            noise.append(torch.cuda.get_rng_state(self.device))
        content = {
            "settings": self.settings,
            "model": self.vae.state_dict(),
            "best": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "noise": noise,
            "bits": self.train.bits.get_state(),
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "done": self.done,
            "seconds": self.seconds,
        }
        checkpoints.write(self.directory / "last.pt", "run", content)

    def begin(self, *, resume: bool) -> None:
        """Continue the run in the folder, or begin one there, so that a bad folder is known at once."""
        if self.directory is None:
            return
        path = self.directory / "last.pt"
        if not (resume and path.exists()):
            self.save()
            (self.directory / "best.pt").unlink(missing_ok=True)
            return
        content = checkpoints.read(path, "run", device="cpu")
        differing = [
            f"{name} was {content['settings'].get(name)}, is {value}"
            for name, value in self.settings.items()
            if content["settings"].get(name) != value
        ]
        if differing:
            raise checkpoints.CheckpointError(
                f"{path} is of a run with other settings: {'; '.join(differing)}. "
                "Resume with the same, or train in another folder"
            )
        checkpoints.fitting(path, lambda: self._restore(content))

    def _restore(self, content: dict[str, Any]) -> None:
        self.vae.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(content["schedule"])
        torch.set_rng_state(content["noise"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(content["noise"][1], self.device)
        self.train.bits.set_state(content["bits"])
        self.history.extend(Epoch(**row) for row in content["history"])
        self.best_state = content["best"]
        self.done = [tuple(batch) for batch in content["done"]]
        self.seconds = content["seconds"]

    def _last_good(self) -> str:
        kept = f"The checkpoint {self.directory / 'last.pt'} is kept. " if self.directory else ""
        return kept + "Try a smaller learning_rate, or clip_norm"

    def how_to_resume(self) -> str:
        """Tell what an interrupted user can do."""
        if self.directory is None:
            return "training interrupted; without checkpoint_dir nothing was saved"
        return f"training interrupted, and saved in {self.directory}: fit(..., resume=True) continues it"


def _label(estimator: ELBO) -> str:
    """Name an estimator by its class and settings: Pyro's have no repr of their own."""
    if type(estimator).__repr__ is not object.__repr__:
        return repr(estimator)
    settings = {k: v for k, v in vars(estimator).items() if isinstance(v, bool | int | float | str)}
    return f"{type(estimator).__name__}({', '.join(f'{k}={v}' for k, v in sorted(settings.items()))})"


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C set a flag, so that a step is never cut in two; the second one interrupts."""
    pressed: list[int] = []

    def note(signal_number: int, frame: Any) -> None:
        if pressed:
            signal.default_int_handler(signal_number, frame)
        pressed.append(signal_number)

    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
