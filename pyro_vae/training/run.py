"""State of a training run: optimiser, epoch statistics, validation, early stopping."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments, num_rows
from pyro_vae.data.streams import Stream
from pyro_vae.inference.guide_fit import require_fit, run_fitting_pair
from pyro_vae.inference.guide_report import GuideError
from pyro_vae.inference.svi import SVI
from pyro_vae.inference.trained_parameters import forgotten_by_model
from pyro_vae.objectives.kl_weighting import KLWeighted, inner_estimator
from pyro_vae.objectives.log_terms import Terms, terms
from pyro_vae.objectives.pair import OwnParameters
from pyro_vae.objectives.sites import (
    NotSeparableError,
    plate_nesting,
    run_pair,
    sample_sites,
    shared_latent,
    subsampling_factor,
)
from pyro_vae.training.history import Epoch, History
from pyro_vae.training.pace import Pace
from pyro_vae.training.settings import BATCH_SIZE, Settings
from pyro_vae.utils.isolation import derived_seed, evaluating, isolated, seed_at, seed_generators
from pyro_vae.utils.processes import checksum
from pyro_vae.utils.validation import NonFiniteError

__all__ = ["Run"]

logger = logging.getLogger("pyro_vae")

_NOISE, _EVALUATION = 20, 22  # streams of random numbers


class Run:
    """State of a training run, from its first step to its last."""

    def __init__(
        self,
        pair: OwnParameters,
        train: Batches | Stream,
        held_out: Batches | Stream | None,
        settings: Settings,
    ):
        parameters = [p for p in pair.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("no parameter of model and guide requires a gradient: there is nothing to train")
        self.pair, self.train, self.held_out, self.settings = pair, train, held_out, settings
        self.device = parameters[0].device
        self.optimizer = settings.optimizer(parameters)
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(f"optimizer must return a torch optimiser; got {type(self.optimizer).__name__}")
        self.schedule = settings.schedule(self.optimizer) if settings.schedule else None
        self.batch_size = settings.batch_size or train.usual_batch(BATCH_SIZE)
        # a batch of rows is divided; one of a stream is this process's alone
        self.divided_by = settings.shards if isinstance(train, Batches) else 1
        self._check_batch_size()
        lengths = train.lengths(self.batch_size)
        self.steps_per_epoch, self.epoch_size = len(lengths), sum(lengths)
        assert settings.estimator is not None
        estimator = settings.estimator
        if settings.kl_warmup:
            warmup_steps = settings.kl_warmup * self.steps_per_epoch
            estimator = KLWeighted(estimator, beta=lambda step: min(1.0, (step + 1) / warmup_steps))
        self.svi = SVI(
            pair.model,
            pair.guide,
            self.optimizer,
            estimator,
            clip_norm=settings.clip_norm,
            engine=settings.engine,
        )
        self.svi.processes = self.processes = settings.processes
        self.shards = self.processes.shares(settings.shards)
        self.scales: dict[int, float] = {}  # of the loss of a batch, by its length
        self._check_fit()
        self.separable = held_out is not None and self._has_terms()
        self.validation_size = 1024 if self.separable else self.batch_size
        self._check_held_out()
        self.history = History()
        self.done: list[tuple[int, float]] = []  # length and bound of each batch of the current epoch
        self.total, self.num_done = 0.0, 0  # of the bounds of their examples; these
        self.seconds, self.pace = 0.0, Pace()
        self.best_state: dict[str, Tensor] = {}
        self.interrupted = self.asked_to_save = False
        self.saved_at = time.monotonic()

    def _check_batch_size(self) -> None:
        if self.batch_size > len(self.train):
            logger.warning(
                "batch_size %d exceeds the %d examples: each step uses all of them",
                self.batch_size,
                len(self.train),
            )
        if self.batch_size < self.divided_by:
            raise ValueError(
                f"batch_size, {self.batch_size}, is that of all {self.divided_by} shards together: each "
                "needs at least one datum"
            )

    def _check_fit(self) -> None:
        """Check the pair on two examples, before an existing run in the folder is overwritten."""
        args, kwargs = arguments(self._example())
        self.pair.eval()
        with self._autocast():
            self.svi.check(*args, **kwargs)
            if not hasattr(self.pair, "check_data"):  # a VAE names all its modules
                self._warn_of_forgotten(args, kwargs)
            self._try_batches()
        estimator = inner_estimator(self.svi.loss)
        looks_for_plates = estimator.vectorize_particles or isinstance(estimator, TraceEnum_ELBO)
        if looks_for_plates and math.isinf(estimator.max_plate_nesting):
            # else found at the first step, by draws that a resumed run would make once more
            with evaluating(self.pair, self.device, 0):
                estimator._guess_max_plate_nesting(self.pair.model, self.pair.guide, args, kwargs)

    def _check_held_out(self) -> None:
        """Check the pair on the first batch that validates it; a VAE has checked them all."""
        if self.held_out is None or hasattr(self.pair, "check_data"):
            return
        args, kwargs = arguments(self.held_out.peek(self.validation_size))
        try:
            require_fit(self.pair.model, self.pair.guide, *args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the pair runs on the training data, but not on the validation data: {error}"
            ) from error

    def _warn_of_forgotten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tried = copy.copy(inner_estimator(self.svi.loss))  # some keep what they learn from the first pair
        with isolated(self.pair.model, self.pair.guide):
            fitting = run_fitting_pair(self.pair.model, self.pair.guide, args, kwargs, tried)
            forgotten = forgotten_by_model(fitting, [*self.pair.parameters(), *args, *kwargs.values()])
        if forgotten:
            logger.warning(forgotten)

    def _example(self) -> Any:
        """Return two examples, or all if a batch is all: a guide may have parameters for each."""
        return self.train.peek(self.batch_size if self.batch_size >= len(self.train) else 2)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a step; autocast keeps low-precision copies of parameters within it alone."""
        if self.settings.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _try_batches(self) -> None:
        """Run the pair as training will, on batches, or parts, of each length that the epochs have."""
        shards, factors = self.divided_by, dict[int, float]()
        wholes = set(self.train.lengths(min(self.batch_size, len(self.train))))
        for length in sorted(
            {(whole + extra) // shards for whole in wholes for extra in (0, shards - 1)} - {0}
        ):
            args, kwargs = arguments(self.train.peek(length))
            try:
                with isolated(self.pair.model, self.pair.guide), torch.no_grad():
                    self.pair.train()
                    guide_trace, model_trace = run_pair(self.pair.model, self.pair.guide, args, kwargs)
                if not any(site["is_observed"] for site in sample_sites(model_trace).values()):
                    raise ValueError(
                        "the model observes nothing, so that no data can be learnt from: pass obs="
                    )
                factors[length] = subsampling_factor(model_trace, length)
                self.nesting = max(1, plate_nesting(guide_trace, model_trace))
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                remedy = "choose another batch_size" + ", 2 or more for batch normalisation" * (length == 1)
                raise ValueError(
                    f"a batch of {length} of the {len(self.train)} examples cannot be trained on: {reason}: "
                    f"{remedy}"
                ) from error
        for whole in wholes:
            length = -(-whole // shards)
            self.scales[whole] = 1.0 if factors[length] == 1 else factors[length] * length / whole
        shared = shared_latent(model_trace)
        if shared and self.batch_size < len(self.train):
            logger.warning(
                "all data share the latent site %r, but each batch of %d counts its KL in full, as if there "
                "were no other data: its posterior will be too wide. Write the plate as "
                'pyro.plate("data", N, subsample_size=len(x)), N data in all, or train with batch_size=%d',
                shared,
                self.batch_size,
                len(self.train),
            )

    def _has_terms(self) -> bool:
        """Return whether the ELBO is a sum over examples that `terms` can separate."""
        args, kwargs = arguments(self._example())
        try:
            with isolated(self.pair.model, self.pair.guide), torch.no_grad():
                self._terms(args, kwargs)
        except NotSeparableError:
            return False
        return True

    def _beta(self) -> float:
        """Return the weight on the KL in the last step, or in the first if none was taken."""
        if not isinstance(self.svi.loss, KLWeighted):
            return 1.0
        self.svi.loss.steps = max(0, len(self.history) * self.steps_per_epoch + len(self.done) - 1)
        return float(self.svi.loss.beta)

    def steps(self, is_interrupted: Callable[[], int]) -> Iterator[int]:
        """Take the remaining steps of the current epoch, yielding the length of each batch.

        Stops early if interrupted here or, as all processes do after the same step, in another process.
        """
        epoch = len(self.history)
        self.pair.train()
        started = time.perf_counter() - self.seconds
        take_steps = self._whole_steps if self.settings.shards == 1 else self._steps_in_shards
        losses = take_steps(epoch, is_interrupted)
        while len(self.done) < self.steps_per_epoch and not self.interrupted:
            if isinstance(self.svi.loss, KLWeighted):
                self.svi.loss.steps = epoch * self.steps_per_epoch + len(self.done)
            try:
                length, loss = next(losses)
            except (GuideError, NonFiniteError) as error:
                where = f"epoch {epoch + 1}, step {len(self.done) + 1} of {self.steps_per_epoch}"
                if isinstance(error, GuideError):
                    raise GuideError(f"{where}: {str(error).partition(': ')[2]}") from error
                raise NonFiniteError(f"{where}: {error}. {self._last_good()}") from error
            bound = -loss / self._scale(length)
            self.done.append((length, bound / length))
            self.total += bound
            self.num_done += length
            self.seconds = time.perf_counter() - started
            yield length

    def _whole_steps(self, epoch: int, is_interrupted: Callable[[], int]) -> Iterator[tuple[int, float]]:
        """Take the remaining steps in this process alone, yielding length and loss of each batch."""
        noise = derived_seed(self.settings.seed, _NOISE, epoch)
        take_step = self.svi.step  # compares what the programs read, which callbacks may have changed
        # else reading a batch may run code of others
        is_in_memory = isinstance(self.train, Batches) and self.train.source.in_memory
        for batch in self.train.epoch(epoch, batch_size=self.batch_size, start=len(self.done)):
            seed_generators(self.device, seed_at(noise, len(self.done)))
            args, kwargs = arguments(batch)
            started = time.perf_counter()
            with self._autocast():
                loss = take_step(*args, **kwargs)
            if is_in_memory:
                take_step = self.svi.step_again
            self.pace.note(time.perf_counter() - started)
            self.interrupted, self.asked_to_save = bool(is_interrupted()), self._was_saved_long_ago()
            yield num_rows(batch), loss

    def _steps_in_shards(self, epoch: int, is_interrupted: Callable[[], int]) -> Iterator[tuple[int, float]]:
        """Take the remaining steps in shards, those of this process here."""
        noise = {shard: derived_seed(self.settings.seed, _NOISE, epoch, shard) for shard in self.shards}
        start = len(self.done)
        batches = self.train.epoch_in_shards(
            epoch,
            batch_size=self.batch_size,
            shards=self.shards,
            num_shards=self.settings.shards,
            start=start,
        )

        def parts(step: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
            for shard, part in next(batches):
                seed_generators(self.device, seed_at(noise[shard], step))
                yield arguments(part)

        for step in range(start, self.steps_per_epoch):
            with self._autocast():
                # asked for before the step, whose collective tells all processes
                wishes = {"stop": bool(is_interrupted()), "save": self._was_saved_long_ago()}
                loss = self.svi.step_in_parts(parts(step), **wishes)
            self.interrupted, self.asked_to_save = self.svi.stopped, self.svi.asked_to_save
            yield self.svi.num_rows, loss

    def is_due(self) -> bool:
        """Return whether the run is to be saved now, in the middle of an epoch."""
        every, done = self.settings.checkpoint_every, len(self.done)
        if every is None or done == self.steps_per_epoch or self.interrupted:
            return False
        return self.asked_to_save if isinstance(every, timedelta) else done % every == 0

    def _was_saved_long_ago(self) -> bool:
        """Return whether the time between checkpoints is over, by the clock of the first process."""
        every = self.settings.checkpoint_every
        if not (isinstance(every, timedelta) and self.processes.is_first):
            return False
        return time.monotonic() - self.saved_at >= every.total_seconds()

    def _scale(self, length: int) -> float:
        """Return the number of data that the loss of a batch speaks for, over its length."""
        if length not in self.scales:  # of a stream, whose batches may have any length
            known, scale = next(iter(self.scales.items()))
            return 1.0 if scale == 1 else scale * known / length
        return self.scales[length]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers, which are the same in all processes."""
        state = self.pair.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def mean_bound(self) -> float:
        """Return the mean bound of the epoch so far, in nats per datum; cheap enough for every step."""
        return self.total / self.num_done

    def bound(self) -> tuple[float, float]:
        """Return the mean bound of the epoch so far, and its standard error, in nats per datum."""
        lengths, bounds = torch.tensor(self.done, dtype=torch.float64).unbind(1)
        weights = lengths / lengths.sum()
        mean = (weights * bounds).sum()
        count = len(bounds)
        spread = ((weights * (bounds - mean)) ** 2).sum() * count / (count - 1) if count > 1 else math.nan
        return float(mean), math.sqrt(spread)

    def finish_epoch(self) -> None:
        """Evaluate, enter the epoch in the history, step the schedule."""
        self.require_finite_parameters()
        epoch = len(self.history) + 1
        if self.processes.size > 1:
            sums = {name: checksum([tensor]) for name, tensor in self.state_tensors().items()}
            self.processes.require_same(f"the parameters after epoch {epoch}, by their check sum", sums)
        train_bound, train_bound_se = self.bound()
        validation_elbo, validation_elbo_se = self._validation_elbo()
        entry = Epoch(
            epoch=epoch,
            train_bound=train_bound,
            train_bound_se=train_bound_se,
            validation_elbo=validation_elbo,
            validation_elbo_se=validation_elbo_se,
            beta=self._beta(),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=self.seconds,
        )
        self.history.append(entry)
        self.done, self.total, self.num_done, self.seconds = [], 0.0, 0, 0.0
        if isinstance(self.schedule, ReduceLROnPlateau):
            merit = self._merits()[-1]
            self.schedule.step(merit if self.schedule.mode == "max" else -merit)
        elif self.schedule is not None:
            self.schedule.step()
        if self.best_epoch() == len(self.history) - 1:
            self.best_state = copy.deepcopy(self.pair.state_dict())

    def _validation_elbo(self) -> tuple[float, float]:
        if self.held_out is None:
            return math.nan, math.nan
        noise = derived_seed(self.settings.seed, _EVALUATION)  # the same after every epoch: smoother curves
        with evaluating(self.pair, self.device, noise):
            elbos = self.processes.interleave(partial(self._validation_elbos, noise))
        elbo = torch.cat(elbos)
        if not elbo.isfinite().all():
            index = (~elbo.isfinite()).nonzero()[0]
            row = self.held_out.rows_of(index) if isinstance(self.held_out, Batches) else index
            raise NonFiniteError(
                f"the ELBO of the validation example in row {row.item()} of the data (counted from 0) is "
                f"{elbo[index].item()} after epoch {len(self.history) + 1}. {self._last_good()}"
            )
        several = self.separable and len(elbo) > 1  # else each has the mean of its batch
        se = float(elbo.std()) / math.sqrt(len(elbo)) if several else math.nan
        return float(elbo.mean()), se

    def _validation_elbos(self, noise: int) -> list[Tensor]:
        """Return the ELBO of each example of the batches that are this process's."""
        assert self.held_out is not None
        rank, size = self.processes.rank, self.processes.size
        elbos: list[Tensor] = []
        for batch in self.held_out.in_order(self.validation_size, first=rank, every=size):
            seed_generators(self.device, seed_at(noise, rank + size * len(elbos)))
            elbos.append(self._elbo(batch).double().cpu())
        return elbos

    def _elbo(self, batch: Any) -> Tensor:
        """Return the ELBO of each example of a batch, or the mean for each if there are no terms of each."""
        args, kwargs = arguments(batch)
        if self.separable:
            return self._terms(args, kwargs).elbo.mean(0)
        loss, length = self.svi.evaluate_loss(*args, **kwargs), num_rows(batch)
        with isolated(self.pair.model, self.pair.guide), torch.no_grad():
            _, model_trace = run_pair(self.pair.model, self.pair.guide, args, kwargs)
        return torch.full((length,), -loss / length / subsampling_factor(model_trace, length))

    def _terms(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Terms:
        return terms(self.pair.model, self.pair.guide, *args, max_plate_nesting=self.nesting, **kwargs)

    def _merits(self) -> list[float]:
        """Return the value to be maximised, of each epoch."""
        return self.history.column("train_bound" if self.held_out is None else "validation_elbo")

    def best_epoch(self) -> int:
        """Return the index of the epoch with the best value so far."""
        merits = self._merits()
        return merits.index(max(merits))

    def out_of_patience(self) -> bool:
        """Return whether the last `patience` epochs brought no improvement."""
        patience, epochs = self.settings.patience, len(self.history)
        return patience is not None and epochs > 0 and epochs - 1 - self.best_epoch() >= patience

    def data_seen(self) -> int:
        """Return the number of examples that the run has taken a step on, repeats counted."""
        return len(self.history) * self.epoch_size + self.num_done

    def require_finite_parameters(self) -> None:
        """Raise if a parameter is infinite or NaN."""
        for name, parameter in self.pair.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"parameter {name!r} is not finite after a step. {self._last_good()}")

    def _last_good(self) -> str:
        folder = self.settings.directory
        kept = f"The checkpoint {folder / 'last.pt'} is kept. " if folder else ""
        return kept + "If data and model are right there, try a smaller learning_rate, or clip_norm"

    def how_to_resume(self) -> str:
        """Return what an interrupted user can do."""
        folder = self.settings.directory
        if folder is None:
            return (
                f"training interrupted after {len(self.history)} epochs and {len(self.done)} steps: the "
                "model keeps the parameters of the last step; nothing was saved, since fit had no "
                "checkpoint_dir, from which resume=True would continue"
            )
        return f"training interrupted, and saved in {folder}: fit(..., resume=True) continues it"
