"""One step of SVI on a batch that comes in parts, in this process and in others.

Each part has its own run of the pair, as a graph or eagerly. Their gradients are summed, over the parts and
over the processes, then clipped; all processes then make the same update.
"""

import gc
import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.infer import Trace_MMD
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from pyro_vae.data.sources import num_rows
from pyro_vae.engine.optimizer_step import OptimizerStep
from pyro_vae.engine.products import ANY_SHAPE, usually_fastest
from pyro_vae.inference.gradient_sum import GradientSum
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.sites import NotSeparableError, run_pair, subsamples
from pyro_vae.utils.isolation import isolated
from pyro_vae.utils.processes import Processes
from pyro_vae.utils.validation import NonFiniteError, flag_non_finite

__all__ = ["BatchParts", "require_divisible"]


class BatchParts:
    """Take the steps of an `SVI` in parts.

    Args:
        svi: A `pyro_vae.SVI`, whose parameters get the values that they have in the first process.
        processes: Those that take each step together.

    Raises:
        ValueError: If the loss of a batch is not that of its parts together.
    """

    def __init__(self, svi: Any, processes: Processes):
        require_divisible(svi.model, svi.guide, svi.loss)
        self.svi = svi
        self.parameters: list[Tensor] = svi.parameters()
        _require_unwrapped(self.parameters)
        self.update = OptimizerStep(svi.optimizer)
        self.sum = GradientSum(processes, self.parameters)
        self.is_scaled: dict[tuple[Any, ...], bool] = {}
        processes.broadcast(self.parameters)
        if ANY_SHAPE not in svi.fastest_products:  # a clock would choose differently in each process
            svi.fastest_products[ANY_SHAPE] = processes.on_first(usually_fastest)

    def hold(self, parameters: list[Tensor]) -> bool:
        """Return whether these are the parameters that the steps are for."""
        return list(map(id, parameters)) == list(map(id, self.parameters))

    def step(
        self, parts: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], *, stop: bool, save: bool
    ) -> float:
        """Take a step; see `SVI.step_in_parts`."""
        svi, number, counted = self.svi, self.svi.steps, getattr(self.svi.loss, "steps", None)
        self.sum.clear()
        self._remove_gradients()
        self.sum.stop, self.sum.save = stop, save
        error = None
        try:
            for args, kwargs in parts:
                self._add(args, kwargs)
                self._count(number, counted)
        except Exception as raised:
            error = raised
            self._count(number, counted)
        loss, gradients = self.sum.reduce(error)
        if self.sum.rows == 0:
            raise ValueError("no process has data for this step: their streams have ended")
        self._require_finite(loss, gradients)
        if svi.clip_norm is not None:
            self.sum.clip(gradients, svi.clip_norm)
        self.update(gradients, skip=torch.zeros((), dtype=torch.float32, device=self.sum.flat.device))
        self._count(number + 1, None if counted is None else counted + 1)
        return loss

    def _remove_gradients(self) -> None:
        """Remove gradients, of which those of the last step are views of the sums."""
        for parameter in self.parameters:
            parameter.grad = None

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        svi = self.svi
        owner = getattr(svi.model, "__self__", None)
        weights_by_share = getattr(owner, "weights_by_share", None)
        if weights_by_share is not None and weights_by_share(*args, **kwargs):
            raise ValueError(
                f"a {type(owner).__name__} weights labelled examples by their share of a batch, which is "
                "divided between processes, or in shards: train in one process, with group=None"
            )
        loss = svi.take_step(self._eager, args, kwargs, update=self._note)
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise ValueError(f"{type(svi.loss).__name__} has no loss that is a sum over parts of a batch")
        rows, scaled = num_rows(kwargs or args), self._speaks_for_all(args, kwargs)
        self.sum.add_loss(loss, rows=rows, scaled=scaled)

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.svi.eager_gradients(*args, **kwargs)
        self.sum.add_gradients([parameter.grad for parameter in self.parameters])
        return loss

    def _note(self, gradients: list[Tensor | None], *, skip: Tensor) -> Tensor:
        """Note the gradients of a part, in place of an `OptimizerStep`."""
        self.sum.add_gradients(gradients)
        return flag_non_finite(gradients, skip)

    def _count(self, steps: int, counted: int | None) -> None:
        """Count one step for all parts."""
        self.svi.steps = steps
        if counted is not None:
            self.svi.loss.steps = counted

    def _speaks_for_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a loss is scaled to all data, by plates that subsample."""
        key = tuple(leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if key not in self.is_scaled:
            hook = register_module_forward_pre_hook(lambda module, _: _require_by_example("", module))
            try:
                with isolated(self.svi.model, self.svi.guide), torch.no_grad():
                    traces = run_pair(self.svi.model, self.svi.guide, args, kwargs)
            finally:
                hook.remove()
            try:
                self.is_scaled[key] = subsamples(*traces, num_rows(kwargs or args))
            except NotSeparableError as error:
                raise ValueError(
                    f"this pair cannot be trained on parts of a batch, whose losses are added: {error}"
                ) from error
        return self.is_scaled[key]

    def _require_finite(self, loss: float, gradients: list[Tensor | None]) -> None:
        flag = torch.zeros((), device=self.sum.flat.device)
        if not math.isfinite(loss) or flag_non_finite(gradients, flag):
            raise NonFiniteError(
                f"the loss of the whole batch is {loss:.6g}, and its gradient is not finite, though that of "
                "each part is: the sum is too large for its floating-point type"
            )


def require_divisible(model: Any, guide: Any, loss: Any) -> None:
    """Raise if what a step computes depends on the batch as a whole, and not on each of its data alone.

    Raises:
        ValueError: Names the part and what goes in its place.
    """
    if isinstance(loss, KLWeighted) and loss.free_bits:
        raise ValueError(
            "free bits hold on average over a batch, so that a batch cannot be divided between processes, or "
            "in shards: train in one process, with group=None"
        )
    if isinstance(loss, Trace_MMD):
        raise ValueError(
            "Trace_MMD compares the draws of a batch as a whole, which is divided between processes, or in "
            "shards: train in one process, with group=None"
        )
    owners = [getattr(program, "__self__", program) for program in (model, guide)]
    for owner in owners:
        for name, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
            _require_by_example(name, module)


def _require_by_example(name: str, module: nn.Module) -> None:
    """Raise if what a module computes for an example depends on others."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        which = f"the module {name!r}, a" if name else "a"
        raise ValueError(
            f"{which} {type(module).__name__}, depends on the batch as a whole, which is divided between "
            "processes, or in shards: use nn.LayerNorm or nn.GroupNorm, or train in one process, with "
            "group=None"
        )


_WRAPPED = (
    "a parameter belongs to a DistributedDataParallel, which would train every process alone here: it "
    "reduces gradients in hooks of a forward pass that Pyro never calls. Use the module inside it, .module; "
    "gradients are summed without it"
)


def _require_unwrapped(parameters: Iterable[Tensor]) -> None:
    """Raise if a parameter belongs to a module that is wrapped elsewhere."""
    own = {id(parameter) for parameter in parameters}
    kinds: list[type] = [DistributedDataParallel]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for held in gc.get_referrers(*kinds):  # their instances are among them
        if type(held) in kinds and own & {id(p) for p in held.parameters()}:
            raise ValueError(_WRAPPED)
