"""Find where a loss, or its gradient, becomes infinite or NaN: parameter, site and datum."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["is_finite", "non_finite_gradient", "non_finite_site"]


def non_finite_site(
    model: Callable[..., Any], guide: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> str | None:
    """Run the pair and return a message for its first parameter or site that is not finite, or None."""
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        for trace in (guide_trace, model_trace):
            trace.compute_log_prob()
            for name, site in trace.nodes.items():
                if site["type"] == "param" and not torch.isfinite(site["value"]).all():
                    return f"parameter {name!r} is not finite: try a smaller learning rate or clip_norm"
                if site["type"] != "sample":
                    continue
                for what in ("value", "log_prob"):
                    tensor = site[what]
                    if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                        index = _first_non_finite(tensor)
                        found = tensor[index].item()
                        return f"site {name!r} has {what.replace('_', ' ')} {found} at index {list(index)}"
    return None


def non_finite_gradient(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    parameters: Sequence[Tensor],
    backward: Callable[[], Any],
) -> str | None:
    """Run a backward pass and return a message for the first gradient that is not finite, or None.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        parameters: The parameters to train.
        backward: Runs the pair, and accumulates the gradient of its loss in the parameters.
    """
    names: dict[int, str] = {}
    for program in (model, guide):
        owner = getattr(program, "__self__", program)
        if isinstance(owner, nn.Module):
            names.update({id(parameter): name for name, parameter in owner.named_parameters()})
    with _GradientSites(names) as sites:
        backward()
    wrong = [number for number, parameter in enumerate(parameters) if not is_finite(parameter.grad)]
    if not wrong:
        return None
    shape = tuple(parameters[wrong[0]].shape)
    name = names.get(id(parameters[wrong[0]]))
    label = f"number {wrong[0]} of the optimiser, of shape {shape}" if name is None else repr(name)
    others = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"the gradient of parameter {label}{others} is not finite: " + (
        sites.found
        or "those of all sites are, so look for an operation on the parameter, such as sqrt or norm at 0, "
        "whose derivative is not"
    )


class _GradientSites(Messenger):
    """Describe the first site that a backward pass meets whose gradient is not finite; collect names.

    A backward pass begins at the loss, so that the first gradient that is not finite is the cause of others.
    """

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names
        self.handles: list[Any] = []
        self.found: str | None = None

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        self.names.setdefault(id(leaf), msg["name"])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        tensors = {id(tensor): (name, tensor) for name, tensor in _parameters_of(msg["fn"])}
        tensors.setdefault(id(msg["value"]), ("its draw", msg["value"]))
        site = dict(msg, cond_indep_stack=tuple(msg["cond_indep_stack"]))
        for name, tensor in tensors.values():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self.handles.append(tensor.register_hook(partial(self._look, site, name, tensor.detach())))

    def _look(self, site: dict[str, Any], name: str, tensor: Tensor, gradient: Tensor) -> None:
        if self.found is not None or is_finite(gradient):
            return
        index = _first_non_finite(gradient)
        batch_dim = len(site["fn"].batch_shape)
        plates = [
            f"index {index[batch_dim + frame.dim]} of plate {frame.name!r}"
            for frame in site["cond_indep_stack"]
            if frame.vectorized and batch_dim + frame.dim < len(index)
        ]
        place = ", ".join([f"site {site['name']!r}", *plates])
        self.found = (
            f"at {place}, the gradient with respect to {name}, {tensor[index].item():.6g} at {list(index)}, "
            f"is {gradient[index].item()}. {_remedy(site)}"
        )


def _remedy(site: dict[str, Any]) -> str:
    value = site["value"]
    if site["is_observed"] and not is_finite(value):
        return (
            "An observed value is not finite; a mask does not stop its gradient: "
            "fill it, for example by torch.nan_to_num, and mask it"
        )
    return "Keep that number off the edge of its range, for example by adding 1e-6, or leave the datum out"


def _parameters_of(distribution: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the parameters of a distribution, also of those inside it."""
    for name, value in list(vars(distribution).items()):
        if isinstance(value, Distribution):
            yield from _parameters_of(value, prefix)
        elif isinstance(value, Tensor):
            yield f"{name.lstrip('_')} of {type(distribution).__name__}", value


def is_finite(tensor: Tensor | None) -> bool:
    """Return True if all elements of a tensor, dense or sparse, are finite, or there is none."""
    if tensor is None:
        return True
    return bool(torch.isfinite(tensor._values() if tensor.is_sparse else tensor).all())


def _first_non_finite(tensor: Tensor) -> tuple[int, ...]:
    return tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
