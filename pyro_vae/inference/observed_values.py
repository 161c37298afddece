"""Check data against the supports of the sites at which a pair observes them, before the first step."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro import poutine, validation_enabled
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments, check_arguments
from pyro_vae.data.streams import Stream
from pyro_vae.objectives.guide_problems import validated_support
from pyro_vae.objectives.sites import Program, outer_family, sample_sites
from pyro_vae.utils.isolation import isolated
from pyro_vae.utils.validation import (
    WHERE_MISSING,
    NonFiniteError,
    elementwise_support,
    outside_support,
    same_support,
)

__all__ = ["ObservedValues", "check_of", "require_observable"]


class ObservedValues:
    """The supports of arguments that the model of a pair observes as they are.

    What is observed after a change, masked, without validation, or under a support that depends on draws is
    left to the step.

    Args:
        model: A Pyro model.
        batch: A few examples: positional and named arguments of the model.
    """

    def __init__(self, model: Program, batch: tuple[tuple[Any, ...], dict[str, Any]]):
        args, kwargs = batch
        found, again = (_supports(model, args, kwargs, seed=seed) for seed in range(2))
        self.takes_observed = "observed" in inspect.signature(model).parameters
        self.supports = {
            name: entry
            for name, entry in found.items()
            if name in again and same_support(entry[-1], again[name][-1])
        }

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError for the first value of these arguments outside the support of its site.

        It is a NonFiniteError if some are infinite or NaN.
        """
        leaves = _leaves(args, kwargs)
        for name, (site, family, support) in self.supports.items():
            message = outside_support(name, leaves[name], f"{family} at the site {site!r}", support)
            if message:
                finite = torch.isfinite(leaves[name]).all()
                if self.takes_observed and leaves[name].isnan().any():
                    message += f"; {WHERE_MISSING}"
                raise ValueError(message) if finite else NonFiniteError(message)


def require_observable(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a model observes an argument outside the support of its site."""
    ObservedValues(model, (args, kwargs)).check(args, kwargs)


def check_of(pair: Any, batches: Batches | Stream) -> Callable[[Any], None]:
    """Return the check of a batch: the pair's own, or of finite values in the supports of observed sites."""
    if hasattr(pair, "check_data"):
        return cast(Callable[[Any], None], pair.check_data)
    check_arguments(batches.peek(2))
    values = ObservedValues(pair.model, arguments(batches.peek(2)))

    def check(batch: Any) -> None:
        check_arguments(batch)
        values.check(*arguments(batch))

    return check


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among arguments by names as in messages: x[0], x['y'], or x for the only one."""
    named = [
        (keystr(path), leaf)
        for part in (args, kwargs)
        for path, leaf in tree_flatten_with_path(part)[0]
        if isinstance(leaf, Tensor)
    ]
    return {"x" if len(args) == 1 and not kwargs else f"x{path}": leaf for path, leaf in named}


def _supports(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, seed: int
) -> dict[str, tuple[str, str, Any]]:
    """Return site, family and support of each argument that a run of the model observes as it is."""
    tracer = poutine.trace()
    try:
        is_on = is_validation_enabled()
        with isolated(model, model), validation_enabled(is_on), torch.no_grad(), tracer:
            torch.manual_seed(seed)
            model(*args, **kwargs)
    except Exception:  # checks of the pair explain it, and a prior that has no draws is right
        return {}
    found = {}
    for name, leaf in _leaves(args, kwargs).items():
        for site_name, site in sample_sites(tracer.trace).items():
            value = site["value"]
            is_leaf = (
                isinstance(value, Tensor)
                and value.data_ptr() == leaf.data_ptr()
                and value.shape == leaf.shape
            )
            support = validated_support(site) if is_leaf and site["is_observed"] else None
            if support is not None and _is_of_all(support):
                found[name] = (site_name, outer_family(site), support)
    return found


def _is_of_all(support: Any) -> bool:
    """Return whether a support has no bound for each example."""
    bounds = vars(elementwise_support(support)).values()
    return all(bound.numel() == 1 for bound in bounds if isinstance(bound, Tensor))
