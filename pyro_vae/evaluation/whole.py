"""The ELBO of a data set as a whole, for a pair whose terms cannot be separated by example."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine

from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments
from pyro_vae.evaluation.draws import Pair
from pyro_vae.inference.guide_check import require_fit
from pyro_vae.inference.svi import default_loss
from pyro_vae.objectives.log_terms import terms
from pyro_vae.objectives.sites import NotSeparableError, run_pair, subsampling_factor
from pyro_vae.utils.display import Estimate
from pyro_vae.utils.isolation import isolated

__all__ = ["WholeEvaluation", "evaluate_whole", "not_by_example"]


@dataclass(frozen=True)
class WholeEvaluation:
    """Result of `evaluate` where a latent variable is shared by all examples, or all are summed out.

    Attributes:
        elbo: ELBO of the data as a whole, over the number of examples, in nats.
        elbo_se: Its Monte Carlo error over the draws.
        reason: Why the evidence of single examples does not exist, or is not known.
        estimator: Name of the estimator.
        num_data: N.
        num_particles: S, runs of the pair.
        seed: Seed of the draws.
        log_evidence: None.
        pareto_k: None.
    """

    elbo: float
    elbo_se: float
    reason: str
    estimator: str
    num_data: int
    num_particles: int
    seed: int
    log_evidence: None = None
    pareto_k: None = None

    def __repr__(self) -> str:
        bound = Estimate(self.elbo, self.elbo_se)
        return (
            f"{self.num_data:,} data, S = {self.num_particles:,} particles, seed {self.seed}; nats per datum "
            f"± Monte Carlo error\nELBO of the whole{bound!s:>35}  by {self.estimator}\n"
            f"no log p(x) of single data: {self.reason}"
        )


def evaluate_whole(
    pair: Any,
    batches: Batches,
    reason: str,
    *,
    num_particles: int,
    seed: int,
    advance: Callable[[int], object],
) -> WholeEvaluation:
    """Average the default estimator of the ELBO over runs of the pair on all the data at once."""
    args, kwargs = arguments(batches.peek(len(batches)))
    estimator = default_loss(pair.model, pair.guide, *args, **kwargs)
    with poutine.block():
        _, model_trace = run_pair(pair.model, pair.guide, args, kwargs)
    scale = subsampling_factor(model_trace, len(batches))
    values = []
    for _ in range(num_particles):
        values.append(-float(estimator.loss(pair.model, pair.guide, *args, **kwargs)) / len(batches) / scale)
        advance(len(batches))
    elbos = torch.tensor(values, dtype=torch.float64)
    se = float(elbos.std()) / math.sqrt(len(elbos)) if len(elbos) > 1 else math.nan
    name = type(estimator).__name__
    return WholeEvaluation(float(elbos.mean()), se, reason, name, len(batches), num_particles, seed)


def not_by_example(pair: Pair, batches: Batches, max_plate_nesting: int) -> str | None:
    """Return why the terms of a pair cannot be separated by example, or None if they can.

    A pair that fails for two examples may be one of all data together, with parameters for each.
    """
    few = min(2, len(batches))
    for count in (few,) if batches.source.is_large else sorted({few, len(batches)}):
        args, kwargs = arguments(batches.peek(count))
        try:
            with isolated(pair.model, pair.guide), torch.no_grad():
                terms(pair.model, pair.guide, *args, max_plate_nesting=max_plate_nesting, **kwargs)
        except NotSeparableError as error:
            args, kwargs = arguments(batches.peek(len(batches)))  # as `evaluate_whole` runs it
            require_fit(pair.model, pair.guide, *args, **kwargs)
            return str(error)
        except Exception:
            continue  # said better by the checks that follow
        break
    return None
