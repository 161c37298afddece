"""What is called after each epoch."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pyro_vae.training.history import Epoch
from pyro_vae.training.run import Run
from pyro_vae.utils.isolation import derived_seed, isolated_generators
from pyro_vae.utils.processes import alone

__all__ = ["Callback", "TensorBoard", "call_all"]

_CALLBACKS = 21  # a stream of random numbers


class Callback(Protocol):
    """Called by `fit` after each epoch; returning True ends the training."""

    def __call__(self, vae: Any, epoch: Epoch) -> bool | None:
        """Look at the model and at the values of the epoch."""


class TensorBoard:
    """Callback that logs the fields of each `Epoch` for TensorBoard.

    Args:
        log_dir: The folder that `tensorboard --logdir` reads.

    Raises:
        ImportError: If the package tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str]):
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (slow, and seldom wanted)

        self.writer = SummaryWriter(str(log_dir))

    def __call__(self, vae: Any, epoch: Epoch) -> None:
        """Log one epoch."""
        for name, value in dataclasses.asdict(epoch).items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, epoch.epoch)
        self.writer.flush()


def call_all(callbacks: Sequence[Callable[[Epoch], bool | None]], run: Run) -> bool:
    """Call each in evaluation mode with its own random numbers; return whether one wants to stop.

    Only the first process calls them. What they change reaches the others.
    """
    parameters = list(run.pair.parameters())

    def call() -> tuple[bool, list[dict[str, Any]], list[bool]] | None:
        if not callbacks:
            return None
        noise = derived_seed(run.settings.seed, _CALLBACKS, len(run.history))
        with alone(), isolated_generators(run.device, noise):
            wishes = [callback(run.history[-1]) for callback in callbacks]
        groups = run.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return any(wishes), options, [parameter.requires_grad for parameter in parameters]

    run.pair.eval()
    called = run.processes.on_first(call)
    if called is None:
        return False
    stop, options, trained = called
    run.processes.broadcast(run.state_tensors().values())
    for group, values in zip(run.optimizer.param_groups, options, strict=True):
        group.update(values)
    for parameter, requires_grad in zip(parameters, trained, strict=True):
        parameter.requires_grad_(requires_grad)
    return stop
