"""Normalising flows, by zuko: z = f⁻¹(u) of noise u ~ N(0, I), with a density by change of variables.

log p(z) = log N(f(z); 0, I) + log |det ∂f/∂z|.

Of an autoregressive f one direction takes one pass of its network and the other a pass for each
dimension. "maf" and "nsf" score a given z in one pass and draw in K; "iaf" draws, and scores what it
has just drawn, in one pass, and scores any other z in K.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.utils.validation import require_count, require_shape

__all__ = ["FLOWS", "FlowDistribution", "build_flow"]

FLOWS = ("maf", "iaf", "nsf")


def build_flow(
    flow: str, features: int, context: int = 0, *, num_transforms: int, hidden_features: Sequence[int]
) -> nn.Module:
    """Build a zuko flow: a module from context (*, context), or nothing, to a zuko distribution.

    Args:
        flow: "maf", masked autoregressive with affine maps; "iaf", its inverse; "nsf", neural spline, with
            rational-quadratic maps of [-5, 5] onto itself.
        features: K, the dimension of z.
        context: Size of the context, 0 for none.
        num_transforms: How many transforms in a row; each takes the dimensions in the reverse order.
        hidden_features: Widths of the hidden layers of each transform's network.

    Raises:
        TypeError: If `num_transforms` is no integer, or `hidden_features` no tuple of integers.
        ValueError: If the flow is unknown, or a number is below 1.

    Source: Papamakarios, Pavlakou and Murray, 2017, Masked autoregressive flow for density estimation,
    arXiv:1705.07057; Kingma et al., 2016, Improved variational inference with inverse autoregressive flow,
    arXiv:1606.04934; Durkan et al., 2019, Neural spline flows, arXiv:1906.04032.

    Example:
        >>> flow = build_flow("maf", 3, num_transforms=2, hidden_features=(8,))
        >>> flow().sample((5,)).shape
        torch.Size([5, 3])
    """
    if flow not in FLOWS:
        raise ValueError(f"flow must be one of {', '.join(FLOWS)}; got {flow!r}")
    require_count("num_transforms", num_transforms)
    widths = require_shape("flow_features", hidden_features)  # as guides and priors name them
    zuko = _import_zuko()
    family = zuko.flows.NSF if flow == "nsf" else zuko.flows.MAF
    built = family(features, context, transforms=num_transforms, hidden_features=widths)
    return zuko.flows.Flow(built.transform.inv, built.base) if flow == "iaf" else built


class FlowDistribution(TorchDistribution):
    """A zuko flow as a Pyro distribution, shifted and scaled: z = loc + scale · f⁻¹(u), reparameterised.

    Pyro scores a draw just after it was made, where inverting the flow would take K passes; so the
    density of the last draw is remembered.

    Args:
        flow: What a zuko flow returns, of batch shape (*,) and event shape (K,).
        loc: (*, K), or what broadcasts to it, such as a number.
        scale: Positive, of shapes as `loc`.

    Example:
        >>> flow = build_flow("iaf", 3, num_transforms=2, hidden_features=(8,))
        >>> q = FlowDistribution(flow())
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        flow: Any,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        *,
        validate_args: bool | None = None,
    ):
        self.flow = flow
        self.loc, self.scale = loc, scale
        self._draw: tuple[Tensor | None, Tensor | None] = (None, None)
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        """Return the same distribution with its batch shape expanded: independent draws for each entry."""
        flow = self.flow.expand(torch.Size(batch_shape))
        new = FlowDistribution(flow, self.loc, self.scale, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw z, of shape (*sample_shape, *batch_shape, K), differentiable in all parameters."""
        bent, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        z = self.loc + self.scale * bent
        self._draw = z, log_prob - self._log_stretch(bent)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at z (*, K)."""
        if self._validate_args:
            self._validate_sample(value)
        draw, log_prob = self._draw
        # a density computed under no_grad has lost its gradient, and may be wanted with one
        if value is draw and log_prob is not None and (log_prob.requires_grad or not torch.is_grad_enabled()):
            return log_prob
        bent = (value - self.loc) / self.scale
        return self.flow.log_prob(bent) - self._log_stretch(bent)

    def _log_stretch(self, bent: Tensor) -> Tensor:
        """Log determinant of the scaling: a sum over all K dimensions, of a scale that they share too."""
        scale = torch.as_tensor(self.scale, dtype=bent.dtype, device=bent.device)
        return scale.expand_as(bent).log().sum(-1)


def _import_zuko() -> ModuleType:
    """Import zuko, late because slow, and undo what it does to everyone's distributions: no validation."""
    validate_args = Distribution._validate_args
    import zuko  # noqa: PLC0415

    Distribution.set_default_validate_args(validate_args)
    return zuko
