"""The optimiser's update of the parameters, at the cost of its arithmetic.

`torch.optim.Adam` spends as long in Python as on the parameters of a small network. Here its fused kernel is
called on lists that were gathered once. The state stays the optimiser's, so that its `state_dict` is as ever.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["Update"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Update:
    """Moves an optimiser's parameters along given gradients, as its `step()` would.

    Learning rates and other options are read from the optimiser at each call, so that schedules work. Adam
    and AdamW go through their fused kernel, which leaves the parameters alone where the device says so,
    without waiting for it. Other optimisers take their own step.

    Args:
        optimizer: A torch optimiser.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> update = Update(torch.optim.Adam([weight], 0.1))
        >>> update([torch.tensor([1.0, -2.0, 3.0])], skip=torch.tensor(0.0))
        >>> weight.detach()
        tensor([-0.1000,  0.1000, -0.1000])
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.kernels: list[_FusedAdam] = []
        self.moved: list[bool] = []  # which parameters the kernels move

    def __call__(self, gradients: Sequence[Tensor | None], *, skip: Tensor) -> None:
        """Take a step along the gradients of the parameters in order; none if `skip`, (), is not 0.0."""
        optimizer = self.optimizer
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient  # as an eager step leaves it
        moved = [gradient is not None for gradient in gradients]
        watched = self._is_watched()
        if watched or moved != self.moved or not all(kernel.is_current() for kernel in self.kernels):
            self.kernels = []
        if not self.kernels and not watched:
            self.kernels, self.moved = self._gather(moved), moved
        for kernel in self.kernels:
            kernel(gradients, skip)
        if self.kernels:
            optimizer._opt_called = True  # type: ignore[attr-defined] # else schedules warn of a missing step
        elif not skip:
            optimizer.step()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _is_watched(self) -> bool:
        """Whether somebody waits for the optimiser's own step: by a hook, or by one in its place."""
        hooks = (
            self.optimizer._optimizer_step_pre_hooks
            or self.optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        step = vars(self.optimizer).get("step")
        return bool(hooks) or (step is not None and not hasattr(step, "_wrapped_by_lr_sched"))

    def _gather(self, moved: Sequence[bool]) -> "list[_FusedAdam]":
        """Make a kernel for each group, device and dtype; none if the optimiser has to take the step."""
        optimizer = self.optimizer
        if type(optimizer) not in (Adam, AdamW):
            return []
        index = 0
        members: dict[tuple, list[tuple[int, Tensor]]] = {}
        for number, group in enumerate(optimizer.param_groups):
            if group["differentiable"] or any(isinstance(o, Tensor) for o in (group["lr"], *group["betas"])):
                return []
            for parameter in group["params"]:
                if moved[index]:
                    if not optimizer.state.get(parameter) or parameter.is_complex():
                        return []  # the optimiser's own first step makes the state
                    key = (number, parameter.device, parameter.dtype)
                    members.setdefault(key, []).append((index, parameter))
                index += 1
        return [_FusedAdam(optimizer, number, chosen) for (number, *_), chosen in members.items()]


class _FusedAdam:
    """The fused kernel of Adam, for those parameters of a group that share a device and a dtype."""

    def __init__(self, optimizer: Optimizer, number: int, members: list[tuple[int, Tensor]]):
        self.optimizer, self.number = optimizer, number
        self.group: dict[str, Any] = optimizer.param_groups[number]
        self.indices = [index for index, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.states = [optimizer.state[parameter] for parameter in self.parameters]
        steps = torch.stack([state["step"].detach() for state in self.states])
        self.step = steps.to(self.parameters[0].device, torch.float32)
        self.steps = list(self.step.unbind())  # views, so that one operation counts the step for all
        for state, step in zip(self.states, self.steps, strict=True):
            state["step"] = step
        self.lists = [[state[name] for state in self.states if name in state] for name in _MOMENTS]

    def is_current(self) -> bool:
        """Whether the optimiser still holds what was gathered, which a user or another kernel may replace."""
        groups = self.optimizer.param_groups
        if self.number >= len(groups) or groups[self.number] is not self.group:
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
