"""Distributions of single elements, from inside those of whole examples."""

from typing import Any

from torch.distributions import Independent

__all__ = ["elementwise"]


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
