"""Distributions of single elements, from inside those of whole examples."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

__all__ = ["check_observed", "elementwise", "observe_elements"]

_FILLERS = (0.0, 1.0, 0.5)  # one of them lies in any common support


def elementwise(distribution: Any) -> Any:
    """Return the distribution of each element, p(x_d|z), of batch shape (*batch, *event_shape).

    Its log-density by element, summed over the event, is that of p(x|z): what missing elements and
    explanations by element need.

    Raises:
        ValueError: If the elements of an event are not independent, as in a multivariate normal.

    Example:
        >>> import torch
        >>> p = Independent(torch.distributions.Normal(torch.zeros(5, 2, 3), 1.0), 2)
        >>> p.batch_shape, elementwise(p).batch_shape
        (torch.Size([5]), torch.Size([5, 2, 3]))
    """
    inner = distribution
    while isinstance(inner, Independent):
        inner = inner.base_dist
    if len(inner.event_shape) > 0:
        raise ValueError(
            f"expected independent elements, Π_d p(x_d|z), as in every likelihood of pyro_vae; got "
            f"{type(inner).__name__} of event shape {tuple(inner.event_shape)}: use a likelihood that ends "
            "in .to_event(...)"
        )
    return inner


def check_observed(x: Tensor, observed: Tensor) -> None:
    """Raise TypeError for a mask that is not boolean, ValueError for one of another shape than x."""
    if observed.dtype != torch.bool:
        raise TypeError(f"observed must be boolean; got {observed.dtype}: use observed.bool()")
    if observed.shape != x.shape:
        raise ValueError(f"observed must have the shape of x, {tuple(x.shape)}; got {tuple(observed.shape)}")


def observe_elements(distribution: Any, x: Tensor, observed: Tensor) -> tuple[Any, Tensor]:
    r"""Return p(x|z) of the observed elements alone, and x with values in the support where it is missing.

    .. math:: \log p(x_{obs}|z) = \sum_{d\ \text{observed}} \log p(x_d|z)

    Args:
        distribution: p(x|z), with independent elements.
        x: (N, *event_shape), any number where missing.
        observed: bool, (N, *event_shape).

    Raises:
        TypeError: If `observed` is not boolean.
        ValueError: If it has another shape than x, or the elements are not independent.
    """
    check_observed(x, observed)
    single = elementwise(distribution)
    filler = next((value for value in _FILLERS if single.support.check(x.new_tensor(value)).all()), 0.0)
    masked = single.mask(observed).to_event(len(distribution.event_shape))
    return masked, torch.where(observed, x, filler)
