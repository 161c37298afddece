"""Take an optimiser's step without its Python overhead.

`torch.optim.Adam` spends as long in Python as on the parameters of a small network. Here its fused kernel is
called on lists of tensors that are built once. The optimiser keeps the state, so that its `state_dict` works.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pyro_vae.engine.adam_kernel import AdamKernel
from pyro_vae.utils.validation import flag_non_finite

__all__ = ["OptimizerStep"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class OptimizerStep:
    """Update an optimiser's parameters for given gradients, as its `step()` would.

    Learning rates and other options are read from the optimiser at each call, so that schedules work. Adam
    and AdamW use their fused kernel, which can skip the update by a flag on the device, without a
    synchronisation; or an `AdamKernel` where `is_compiled` is set. Other optimisers take their own step.

    Args:
        optimizer: A torch optimiser.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> step = OptimizerStep(torch.optim.Adam([weight], 0.1))
        >>> step([torch.tensor([1.0, -2.0, 3.0])], skip=torch.tensor(0.0))
        tensor(0.)
        >>> weight.detach()
        tensor([-0.1000,  0.1000, -0.1000])
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.kernels: list[_FusedAdam] = []
        self.has_gradient: list[bool] = []  # for each parameter, when the kernels were built
        self.is_compiled = False  # set beside a compiled graph

    def __call__(self, gradients: Sequence[Tensor | None], *, skip: Tensor, again: bool = False) -> Tensor:
        """Take a step, given one gradient or None per parameter.

        Args:
            gradients: One per parameter.
            skip: 1.0 if the step is not to be taken, else 0.0, float32 ().
            again: Whether nothing but steps has run since the last one, so that the optimiser is the same.

        Returns:
            1.0 if the step was not taken, since `skip` is 1.0 or a gradient is not finite; else 0.0.
        """
        optimizer = self.optimizer
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.grad = gradient  # as after an eager step
        if not again:
            self._choose_kernels([gradient is not None for gradient in gradients])
        if self.kernels:
            optimizer._opt_called = True  # type: ignore[attr-defined] # else schedulers warn of a missing step
        # one, which tells whether all gradients are finite
        if self.is_compiled and len(self.kernels) == 1 and self.kernels[0].compiled is not None:
            return skip if skip else skip + (not self.kernels[0].compiled_step(gradients))
        skip = flag_non_finite(gradients, skip)
        for kernel in self.kernels:
            kernel(gradients, skip)
        if not (self.kernels or skip):
            optimizer.step()
        return skip

    def _choose_kernels(self, has_gradient: list[bool]) -> None:
        """Keep the kernels if they are those of the optimiser as it is; else build them, or have none."""
        hooked = self._is_hooked()
        changed = has_gradient != self.has_gradient or not all(kernel.is_current() for kernel in self.kernels)
        if hooked or changed:
            self.kernels = []
        if not self.kernels and not hooked:
            self.kernels, self.has_gradient = self._build_kernels(has_gradient), has_gradient

    def zero_grad(self) -> None:
        """Remove all gradients, as an eager step does first; the new ones reuse their memory."""
        optimizer = self.optimizer
        if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
            optimizer.zero_grad()
        for parameter in self.parameters():
            parameter.grad = None

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all groups in order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _is_hooked(self) -> bool:
        """Return True if hooks, or a replacement of its `step`, need the optimiser's own step."""
        hooks = (
            self.optimizer._optimizer_step_pre_hooks
            or self.optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        step = vars(self.optimizer).get("step")
        if hasattr(step, "_wrapped_by_lr_sched"):  # a scheduler's, around the class's or a user's own
            step = getattr(step, "__wrapped__", step)
            return bool(hooks) or getattr(step, "__wrapped__", step) is not _inner(type(self.optimizer).step)
        return bool(hooks) or step is not None

    def _build_kernels(self, has_gradient: Sequence[bool]) -> "list[_FusedAdam]":
        """Return a kernel for each group, device and dtype; none if only the optimiser can take the step."""
        optimizer = self.optimizer
        if type(optimizer) not in (Adam, AdamW):
            return []
        index = 0
        members: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for number, group in enumerate(optimizer.param_groups):
            trained = [p for p in group["params"] if optimizer.state.get(p)]
            if _needs_own_step(group, [optimizer.state[p] for p in trained]):
                return []
            for parameter in group["params"]:
                if has_gradient[index]:
                    if not optimizer.state.get(parameter) or parameter.is_complex():
                        return []  # the optimiser creates the state at its own first step
                    key = (number, parameter.device, parameter.dtype)
                    members.setdefault(key, []).append((index, parameter))
                index += 1
        kernels = [_FusedAdam(optimizer, number, chosen) for (number, *_), chosen in members.items()]
        return kernels if all(kernel.fits() for kernel in kernels) else []


def _needs_own_step(group: dict[str, Any], states: Sequence[dict[str, Any]]) -> bool:
    """Return True if the kernel lacks an option of the group, or states lack what an option needs."""
    return (
        group["differentiable"]
        or any(isinstance(option, Tensor) for option in (group["lr"], *group["betas"]))
        or (group["amsgrad"] and not all("max_exp_avg_sq" in state for state in states))
    )


def _inner(step: Any) -> Any:
    """Return a function without the wrappers of torch's profiler and schedulers."""
    return getattr(step, "__wrapped__", step)


class _FusedAdam:
    """Adam's fused kernel for the parameters of one group with the same device and dtype."""

    def __init__(self, optimizer: Optimizer, number: int, members: list[tuple[int, Tensor]]):
        self.optimizer, self.number = optimizer, number
        self.group: dict[str, Any] = optimizer.param_groups[number]
        self.indices = [index for index, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.states = [optimizer.state[parameter] for parameter in self.parameters]
        steps = torch.stack([state["step"].detach() for state in self.states])
        self.step = steps.to(self.parameters[0].device, torch.float32)
        self.steps = list(self.step.unbind())  # views, so that one addition counts the step for all
        for state, step in zip(self.states, self.steps, strict=True):
            state["step"] = step
        self.lists = [[state[name] for state in self.states if name in state] for name in _MOMENTS]

    @cached_property
    def compiled(self) -> AdamKernel | None:
        """The compiled kernel, if it has the options of the group and supports the tensors."""
        *moments, largest = self.lists
        tensors = [*self.parameters, *moments[0], *moments[1]]
        if self.group["maximize"] or largest or not AdamKernel.supports(tensors):
            return None
        return AdamKernel(self.parameters, moments, self.step) if AdamKernel.is_available() else None

    def fits(self) -> bool:
        """Return whether the kernel suits the options and the parameters, whose data may be replaced."""
        shapes = [parameter.shape for parameter in self.parameters]
        is_compiled = vars(self).get("compiled") is not None
        if is_compiled and (self.group["maximize"] or not AdamKernel.supports(self.parameters)):
            return False
        return all([moment.shape for moment in moments] == shapes for moments in self.lists if moments)

    def is_current(self) -> bool:
        """Return True if the optimiser still holds the same group, parameters and state tensors."""
        groups = self.optimizer.param_groups
        if self.number >= len(groups) or groups[self.number] is not self.group:
            return False
        if not self.fits() or _needs_own_step(self.group, self.states):
            return False
        parameters = [parameter for group in groups for parameter in group["params"]]
        if self.indices[-1] >= len(parameters):
            return False
        if not all(map(operator.is_, map(parameters.__getitem__, self.indices), self.parameters)):
            return False
        held = map(self.optimizer.state.get, self.parameters)
        if not all(map(operator.is_, held, self.states)):
            return False
        names = ("step", *_MOMENTS)
        return all(
            all(map(operator.is_, [state.get(name) for state in self.states if name in state], tensors))
            for name, tensors in zip(names, (self.steps, *self.lists), strict=True)
        )

    def compiled_step(self, gradients: Sequence[Tensor | None]) -> bool:
        """Take a step; return False if a gradient is not finite, and none is taken."""
        assert self.compiled is not None
        given = [gradient for index in self.indices if (gradient := gradients[index]) is not None]
        is_taken = self.compiled(given, self.group)
        increment_version(self.parameters)  # so that a graph of a user's that holds them raises an error
        return is_taken

    def __call__(self, gradients: Sequence[Tensor | None], skip: Tensor) -> None:
        group = self.group
        self.step += 1 - skip
        decoupled = group["decoupled_weight_decay"]
        kernel: Callable[..., None] = torch._fused_adamw_ if decoupled else torch._fused_adam_
        kernel(
            self.parameters,
            [gradients[index] for index in self.indices],
            *self.lists,
            self.steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            found_inf=skip,
        )
        increment_version(self.parameters)
