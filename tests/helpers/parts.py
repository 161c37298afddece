"""Every guide and prior of the package, by name, for the property tests.

A new class needs one line here.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_vae import guides, priors

EVENT, K, N, S = (2, 4), 2, 3, 5  # shape of an example, latent dimensions, examples, particles

Make = Callable[..., nn.Module]

SMALL = {"hidden_features": (7,)}
FLOW = {"num_transforms": 2, "flow_features": (6,)}
GUIDES: dict[str, Make] = {
    "DiagonalNormal": lambda event=EVENT, K=K: guides.DiagonalNormal(event, K, **SMALL),
    "FullCovarianceNormal": lambda event=EVENT, K=K: guides.FullCovarianceNormal(event, K, **SMALL),
    "LowRankNormal": lambda event=EVENT, K=K: guides.LowRankNormal(event, K, rank=1, **SMALL),
    "Mixture": lambda event=EVENT, K=K: guides.Mixture(event, K, num_components=3, **SMALL),
    "Flow, iaf": lambda event=EVENT, K=K: guides.Flow(event, K, flow="iaf", num_context=4, **FLOW, **SMALL),
    "Flow, maf": lambda event=EVENT, K=K: guides.Flow(event, K, flow="maf", num_context=4, **FLOW, **SMALL),
    "Flow, nsf": lambda event=EVENT, K=K: guides.Flow(event, K, flow="nsf", num_context=4, **FLOW, **SMALL),
}
PRIORS: dict[str, Make] = {
    "StandardNormal": lambda K=K: priors.StandardNormal(K),
    "LearnedNormal": lambda K=K: priors.LearnedNormal(K),
    "Mixture": lambda K=K: priors.Mixture(K, num_components=3),
    "VampPrior": lambda K=K: priors.VampPrior(guides.DiagonalNormal(EVENT, K, **SMALL), num_components=4),
    "VampPrior of a mixture": lambda K=K: priors.VampPrior(
        guides.Mixture(EVENT, K, num_components=3, **SMALL), num_components=4
    ),
    "VampPrior of a flow": lambda K=K: priors.VampPrior(
        guides.Flow(EVENT, K, num_context=4, **FLOW, **SMALL), num_components=4
    ),
    "Flow, maf": lambda K=K: priors.Flow(K, flow="maf", **FLOW),
    "Flow, iaf": lambda K=K: priors.Flow(K, flow="iaf", **FLOW),
    "Flow, nsf": lambda K=K: priors.Flow(K, flow="nsf", **FLOW),
}


def plane(points: int = 301, reach: float = 9.0) -> tuple[Tensor, float]:
    """Grid points (points², 2) and the area each stands for: the trapezoidal rule, exact for smooth decay."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2
