"""The checkpoint of a training run: written after each epoch and when interrupted, resumed to the bit."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from pyro_vae.objectives.estimators import label
from pyro_vae.objectives.pair import OwnParameters
from pyro_vae.training.history import Epoch
from pyro_vae.training.run import Run
from pyro_vae.utils import serialization
from pyro_vae.utils.serialization import spec, to_plain

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Checkpoint"]

logger = logging.getLogger("pyro_vae")


class Checkpoint:
    """The files of a run in its folder, if it has one: "last.pt" to resume from, and "best.pt", a VAE.

    Args:
        run: The run, before its first step.
    """

    def __init__(self, run: Run):
        self.run, self.folder = run, run.settings.directory
        if self.folder is not None:
            self.settings = _describe(run)

    @contextlib.contextmanager
    def begun(self, *, resume: bool) -> Iterator[Self]:
        """Continue the run in the folder, or start one there, so that a bad folder raises at once.

        An existing checkpoint is overwritten only when this run first saves. The folder is this run's alone
        in the block.
        """
        if self.folder is None:
            yield self
            return
        with contextlib.ExitStack() as stack:
            begin = partial(self._begin, self.folder, stack, self._streams(), resume=resume)
            content = self.run.processes.on_first(begin)
            if content is not None:
                serialization.fitting(self.folder / "last.pt", lambda: self._restore(content))
            yield self

    def _streams(self) -> list[Any]:
        """Return where the data of each process stand, by rank."""
        return self.run.processes.gather(self.run.train.state_dict)

    def _begin(
        self, folder: Path, stack: contextlib.ExitStack, streams: list[Any], *, resume: bool
    ) -> dict[str, Any] | None:
        """Return what is to be restored, if there is anything; else start a run."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {folder} for checkpoints: {error}") from error
        stack.enter_context(_locked(folder))
        path = folder / "last.pt"
        if resume and not path.exists():
            logger.warning("there is no run in %s to resume: one starts there from the beginning", folder)
        elif path.exists() and not resume:
            logger.warning("the run in %s is replaced by a new one; resume=True would go on with it", folder)
        if not path.exists():
            self._save(folder, streams)
        elif resume:
            content = serialization.read(path, "run", device="cpu")
            settings = serialization.fitting(path, lambda: {"shards": 1, **content["settings"]})
            differing = list(_differences(settings, self.settings))
            if differing:
                raise serialization.CheckpointError(
                    f"{path} is of a run with other settings: {'; '.join(differing)}. "
                    "Resume with the same, or train in another folder"
                )
            return content
        return None

    def save(self) -> None:
        """Write both files, by the first of several processes."""
        if self.folder is not None:
            self.run.processes.on_first(partial(self._save, self.folder, self._streams()))
            self.run.saved_at = time.monotonic()

    def _save(self, folder: Path, streams: list[Any]) -> None:
        run = self.run
        run.require_finite_parameters()
        best = folder / "best.pt"
        if run.history and not run.done and run.best_epoch() == len(run.history) - 1:
            run.pair.save(best)
        elif not run.history:
            best.unlink(missing_ok=True)  # of an earlier run
        content = {
            "settings": self.settings,
            "model": run.pair.state_dict(),
            "best": run.best_state,
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict() if run.schedule else None,
            "products": run.svi.fastest_products,
            "history": [dataclasses.asdict(epoch) for epoch in run.history],
            "done": run.done,
            "seconds": run.seconds,
            "streams": streams,
        }
        serialization.write(folder / "last.pt", "run", content)

    def _restore(self, content: dict[str, Any]) -> None:
        run = self.run
        run.pair.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        if run.schedule is not None:
            run.schedule.load_state_dict(content["schedule"])
        run.history.extend(Epoch(**row) for row in content["history"])
        run.best_state = content["best"]
        run.done = [tuple(batch) for batch in content["done"]]
        run.total = sum(length * bound for length, bound in run.done)
        run.num_done = sum(length for length, _ in run.done)
        run.seconds = content["seconds"]
        run.train.load_state_dict(dict(enumerate(content.get("streams", []))).get(run.processes.rank))
        # what decides how the steps are taken, on which the last bits depend
        run.svi.steps = len(run.history) * run.steps_per_epoch + len(run.done)
        run.svi.fastest_products.update(content["products"])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder in a block, where the system has locks; a kill ends the lock."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise serialization.CheckpointError(
                f"another run is writing to {folder}: wait for it, or choose another checkpoint_dir; "
                "processes that each work for themselves need one each"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _describe(run: Run) -> dict[str, Any]:
    """Return what two runs must have in common for one to continue the other."""
    settings, schedule = run.settings, run.schedule
    return {
        "shards": settings.shards,
        "model": spec(run.pair) or _shapes(run.pair),
        "estimator": label(settings.estimator),
        "optimizer": [type(run.optimizer).__name__, *map(_plain_fields, run.optimizer.param_groups)],
        "schedule": [type(schedule).__name__, _plain_fields(schedule.state_dict() if schedule else {})],
        "batch_size": run.batch_size,
        "seed": settings.seed,
        "clip_norm": settings.clip_norm,
        "kl_warmup": settings.kl_warmup,
        "engine": settings.engine,
        "precision": settings.precision,
        "data": run.train.describe(),
        "validation": run.held_out.describe() if run.held_out else None,
    }


def _shapes(pair: OwnParameters) -> dict[str, Any]:
    """Describe a model and guide that no description can rebuild by their parameters."""
    shapes = {name: list(parameter.shape) for name, parameter in pair.named_parameters()}
    return {"shapes": shapes, "constraints": {n: str(c) for n, c in pair.stored.constraints.items()}}


def _plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Keep the fields that tell two settings apart and that a file can hold."""
    kept = {}
    for name, value in fields.items():
        with contextlib.suppress(TypeError):
            if name != "params":
                kept[name] = to_plain(value, _number_of_tensor, name)
    return kept


def _number_of_tensor(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else NotImplemented


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Describe where two nests of plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{name}[{index}]")
    elif old != new:
        yield f"{name} was {old}, is {new}"
