"""The checkpoint of a training run: written after each epoch and when interrupted, resumed to the bit."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pyro_vae.objectives.estimators import label
from pyro_vae.objectives.pair import OwnParameters
from pyro_vae.training.history import Epoch
from pyro_vae.training.run import Run
from pyro_vae.utils import serialization
from pyro_vae.utils.serialization import spec, to_plain

__all__ = ["Checkpoint"]


class Checkpoint:
    """The files of a run in its folder, if it has one: "last.pt" to resume from, and "best.pt", a VAE.

    Args:
        run: The run, before its first step.
    """

    def __init__(self, run: Run):
        self.run, self.folder = run, run.settings.directory
        if self.folder is not None:
            self.settings = _describe(run)

    def begin(self, *, resume: bool) -> None:
        """Continue the run in the folder, or start one there, so that a bad folder raises at once.

        An existing checkpoint is overwritten only when this run first saves.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {self.folder} for checkpoints: {error}") from error
        path = self.folder / "last.pt"
        if not path.exists():
            self.save()
        elif resume:
            content = serialization.read(path, "run", device="cpu")
            settings = serialization.fitting(path, lambda: content["settings"])
            differing = list(_differences(settings, self.settings))
            if differing:
                raise serialization.CheckpointError(
                    f"{path} is of a run with other settings: {'; '.join(differing)}. "
                    "Resume with the same, or train in another folder"
                )
            serialization.fitting(path, lambda: self._restore(content))

    def save(self) -> None:
        """Write both files."""
        if self.folder is None:
            return
        run = self.run
        run.require_finite_parameters()
        best = self.folder / "best.pt"
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
        }
        serialization.write(self.folder / "last.pt", "run", content)

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
        run.seconds = content["seconds"]
        # what decides how the steps are taken, on which the last bits depend
        run.svi.steps = len(run.history) * run.steps_per_epoch + len(run.done)
        run.svi.fastest_products.update(content["products"])


def _describe(run: Run) -> dict[str, Any]:
    """Return what two runs must have in common for one to continue the other."""
    settings, schedule = run.settings, run.schedule
    return {
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
