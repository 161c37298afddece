"""A training run: what changes as it goes on, and what its checkpoint holds."""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.data.batches import Batches
from pyro_vae.inference.svi import SVI
from pyro_vae.objectives.kl_weighting import KLWeighted, inner_estimator
from pyro_vae.objectives.log_terms import terms
from pyro_vae.training.history import Epoch, History
from pyro_vae.utils import serialization
from pyro_vae.utils.isolation import derived_seed, evaluating
from pyro_vae.utils.serialization import spec
from pyro_vae.utils.validation import NonFiniteError
from pyro_vae.vae import VAE

__all__ = ["Run"]

logger = logging.getLogger("pyro_vae")

_EVALUATION = 22  # a stream of random numbers


class Run:
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
        engine: str,
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
        schedule_state = self.schedule.state_dict() if self.schedule else {}
        self.settings = {
            "model": spec(vae),
            "estimator": _label(estimator),
            "optimizer": [type(self.optimizer).__name__, *map(_plain_fields, self.optimizer.param_groups)],
            "schedule": [type(self.schedule).__name__, _plain_fields(schedule_state)],
            "batch_size": batch_size,
            "seed": seed,
            "clip_norm": clip_norm,
            "kl_warmup": kl_warmup,
            "engine": engine,
        }
        if directory is not None:  # a check sum costs a pass over the data
            self.settings["data"] = train.describe()
            self.settings["validation"] = held_out.describe() if held_out else None
        if kl_warmup:
            warmup_steps = kl_warmup * self.steps_per_epoch
            estimator = KLWeighted(estimator, beta=lambda step: min(1.0, (step + 1) / warmup_steps))
        self.svi = SVI(vae.model, vae.guide, self.optimizer, estimator, clip_norm=clip_norm, engine=engine)
        self._check_fit()
        self.history = History()
        self.done: list[tuple[int, float]] = []  # length and bound of each batch of the epoch under way
        self.total = 0.0  # of the bounds of the data in them
        self.seconds = 0.0
        self.best_state: dict[str, Tensor] = {}

    def _check_fit(self) -> None:
        """Check the pair on two data, before an earlier run in the folder gives way to this one."""
        state = self.train.bits.get_state()
        x = next(self.train.in_order(min(2, len(self.train))))
        self.train.bits.set_state(state)
        self.vae.eval()
        self.svi.check(x)
        estimator = inner_estimator(self.svi.loss)
        looks_for_plates = estimator.vectorize_particles or isinstance(estimator, TraceEnum_ELBO)
        if looks_for_plates and math.isinf(estimator.max_plate_nesting):
            # else found at the first step, by draws that a resumed run would make once more
            with evaluating(self.vae, self.device, 0):
                estimator._guess_max_plate_nesting(self.vae.model, self.vae.guide, (x,), {})

    def _beta(self) -> float:
        """Weight on the KL in the last step taken, or the first to come."""
        if not isinstance(self.svi.loss, KLWeighted):
            return 1.0
        self.svi.loss.steps = max(0, len(self.history) * self.steps_per_epoch + len(self.done) - 1)
        return float(self.svi.loss.beta)

    def steps(self) -> Iterator[int]:
        """Take the remaining steps of the epoch under way, yielding the length of each batch."""
        epoch = len(self.history)
        self.vae.train()
        started = time.perf_counter() - self.seconds
        for batch in self.train.epoch(epoch, batch_size=self.batch_size, start=len(self.done)):
            if isinstance(self.svi.loss, KLWeighted):
                self.svi.loss.steps = epoch * self.steps_per_epoch + len(self.done)
            try:
                loss = self.svi.step(batch)
            except NonFiniteError as error:
                where = f"epoch {epoch + 1}, step {len(self.done) + 1} of {self.steps_per_epoch}"
                raise NonFiniteError(f"{where}: {error}. {self._last_good()}") from error
            self.done.append((len(batch), -loss / len(batch)))
            self.total -= loss
            self.seconds = time.perf_counter() - started
            yield len(batch)

    def mean_bound(self) -> float:
        """Mean bound of the epoch's data so far, in nats per datum; cheap enough for every step."""
        full = (len(self.done) - 1) * self.batch_size  # only the last batch may be smaller
        return self.total / (full + self.done[-1][0])

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
        self._require_finite_parameters()
        train_bound, train_bound_se = self.bound()
        validation_elbo, validation_elbo_se = self._validation_elbo()
        epoch = Epoch(
            epoch=len(self.history) + 1,
            train_bound=train_bound,
            train_bound_se=train_bound_se,
            validation_elbo=validation_elbo,
            validation_elbo_se=validation_elbo_se,
            beta=self._beta(),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=self.seconds,
        )
        self.history.append(epoch)
        self.done, self.total, self.seconds = [], 0.0, 0.0
        if isinstance(self.schedule, ReduceLROnPlateau):
            merit = self._merits()[-1]
            self.schedule.step(merit if self.schedule.mode == "max" else -merit)
        elif self.schedule is not None:
            self.schedule.step()
        if self._best() == len(self.history) - 1:
            self.best_state = copy.deepcopy(self.vae.state_dict())

    def _validation_elbo(self) -> tuple[float, float]:
        if self.held_out is None:
            return math.nan, math.nan
        seed = derived_seed(self.seed, _EVALUATION)  # the same noise after every epoch: smoother curves
        self.held_out.bits.manual_seed(seed)
        with evaluating(self.vae, self.device, seed):
            batches = self.held_out.in_order(1024)
            elbo = torch.cat(
                [terms(self.vae.model, self.vae.guide, x).elbo.mean(0).double() for x in batches]
            )
        if not elbo.isfinite().all():
            index = int((~elbo.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"the ELBO of validation datum {index} is {elbo[index]} after epoch {len(self.history) + 1}. "
                f"{self._last_good()}"
            )
        se = float(elbo.std()) / math.sqrt(len(elbo)) if len(elbo) > 1 else math.nan
        return float(elbo.mean()), se

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

    def _require_finite_parameters(self) -> None:
        for name, parameter in self.vae.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"parameter {name!r} is not finite after a step. {self._last_good()}")

    def save(self) -> None:
        """Write the checkpoints, if a folder was asked for."""
        if self.directory is None:
            return
        self._require_finite_parameters()
        best = self.directory / "best.pt"
        if self.history and not self.done and self._best() == len(self.history) - 1:
            self.vae.save(best)
        elif not self.history:
            best.unlink(missing_ok=True)  # of an earlier run
        noise = [torch.get_rng_state()]
        if self.device.type == "cuda":
            noise.append(torch.cuda.get_rng_state(self.device))
        content = {
            "settings": self.settings,
            "model": self.vae.state_dict(),
            "best": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "products": self.svi.fastest_products,
            "noise": noise,
            "bits": self.train.bits.get_state(),
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "done": self.done,
            "seconds": self.seconds,
        }
        serialization.write(self.directory / "last.pt", "run", content)

    def begin(self, *, resume: bool) -> None:
        """Continue the run in the folder, or begin one there, so that a bad folder is known at once."""
        if self.directory is None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {self.directory} for checkpoints: {error}") from error
        path = self.directory / "last.pt"
        if not path.exists():
            self.save()
        if not resume or not path.exists():
            return  # an earlier run gives way to this one's first checkpoint, not to its first mistake
        content = serialization.read(path, "run", device="cpu")
        differing = list(_differences(content["settings"], self.settings))
        if differing:
            raise serialization.CheckpointError(
                f"{path} is of a run with other settings: {'; '.join(differing)}. "
                "Resume with the same, or train in another folder"
            )
        serialization.fitting(path, lambda: self._restore(content))

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
        self.total = sum(length * bound for length, bound in self.done)
        self.seconds = content["seconds"]
        # what decides how the steps are taken, of which the last bits depend
        self.svi.steps = len(self.history) * self.steps_per_epoch + len(self.done)
        self.svi.fastest_products.update(content["products"])

    def _last_good(self) -> str:
        kept = f"The checkpoint {self.directory / 'last.pt'} is kept. " if self.directory else ""
        return kept + "Try a smaller learning_rate, or clip_norm"

    def how_to_resume(self) -> str:
        """Tell what an interrupted user can do."""
        if self.directory is None:
            return "training interrupted; without checkpoint_dir nothing was saved"
        return f"training interrupted, and saved in {self.directory}: fit(..., resume=True) continues it"


def _label(estimator: ELBO) -> str:
    """Name an estimator by what the user chose: Pyro's have no repr of their own."""
    if type(estimator).__repr__ is not object.__repr__:
        return repr(estimator)
    vectorized = ", vectorize_particles=True" if estimator.vectorize_particles else ""
    return f"{type(estimator).__name__}({estimator.num_particles}{vectorized})"


def _plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Keep the numbers, words and lists of numbers: what tells two settings apart, and a file can hold."""
    numbers = {name: _number(value) for name, value in fields.items()}
    return {
        name: value for name, value in numbers.items() if isinstance(value, bool | int | float | str | list)
    }


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = [_number(item) for item in value]
        return items if all(isinstance(item, int | float) for item in items) else None
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Tell where two nests of plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{name}[{index}]")
    elif old != new:
        yield f"{name} was {old}, is {new}"
