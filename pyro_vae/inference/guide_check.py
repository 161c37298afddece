"""Check before training that a guide fits a model, and which estimators are valid for the pair."""

import copy
from collections.abc import Iterable
from typing import Any

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.inference.guide_fit import require_fit, run_fitting_pair
from pyro_vae.inference.guide_report import DistributionReport, GuideError, GuideReport, SiteReport
from pyro_vae.inference.observed_values import require_observable
from pyro_vae.inference.trained_parameters import (
    leaves,
    untrained_parameters,
    untrained_problem,
    without_gradient,
)
from pyro_vae.inference.valid_estimators import (
    check_mean_field,
    every_estimator,
    failure_reason,
    invalid_reason,
)
from pyro_vae.objectives.calls import as_arguments
from pyro_vae.objectives.estimators import label
from pyro_vae.objectives.guide_problems import parameters
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.pair import as_tensors, split_pair
from pyro_vae.objectives.sites import Program
from pyro_vae.utils.isolation import isolated

__all__ = [
    "DistributionReport",
    "GuideError",
    "GuideReport",
    "SiteReport",
    "check_guide",
    "check_mean_field",
    "check_training",
    "require_fit",
    "untrained_parameters",
]


def check_guide(model: Any, *data: Any, max_plate_nesting: int = 1, **kwargs: Any) -> GuideReport:
    """Check a model and a guide on some data, and which estimators are valid for them.

    As in an estimator, the guide runs first, then the model at its draws. A guide fits if it draws the latent
    sites of the model, each in the same plates and with the same event shape as in the model, from a
    distribution with valid parameters whose draws lie in the model's support. Subsampled plates must draw the
    same data in both, which Pyro ensures for plates of the same name. An estimator that is wrong for plates
    of different names is reported as not valid.

    The check has no side effects: it restores random generators, Pyro's parameter store, and parameters,
    gradients, buffers and attributes of modules.

    Args:
        model: A Pyro model, followed by a guide; or a pair of the two, such as a `VAE`.
        *data: The guide, if a model came first; then the arguments of both, or a tuple or dict of them, as
            in `fit`. A small batch is enough. The programs of a `VAE` or a `Pair` take arrays, sparse
            matrices, data frames and `Images`, too.
        max_plate_nesting: Number of batch dimensions of the pair's own plates, 1 for a data plate alone.
        **kwargs: Keyword arguments of both.

    Returns:
        The report, which can be printed.

    Raises:
        TypeError: If the model or the guide is not callable.
        GuideError: If the guide does not fit. The message names each wrong site, what was expected, what was
            found and how to fix it.

    Example:
        >>> import torch
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.Flow((6,), 2),
        ... )
        >>> report = check_guide(vae.model, vae.guide, torch.zeros(5, 6))
        >>> report.sites[0].reparameterised, report.sites[0].analytic_kl
        (True, False)
        >>> report.estimators["DReG"] is None
        True
    """
    model, guide, data = split_pair("check_guide(pair, x) or check_guide(model, guide, x)", model, *data)
    data, kwargs = as_tensors(model, *as_arguments(model, data, kwargs))
    require_observable(model, data, kwargs)
    with isolated(model, guide):
        pair = run_fitting_pair(model, guide, data, kwargs)
        registered = parameters(pair.guide_trace, pair.model_trace)
        loss = Trace_ELBO().differentiable_loss(model, guide, *data, **kwargs)
        return GuideReport(
            pair.reports,
            estimators={
                type(estimator).__name__: failure_reason(estimator, pair)
                for estimator in every_estimator(max_plate_nesting)
            },
            without_gradient=without_gradient(loss, registered),
            unregistered=tuple(tuple(leaf.shape) for leaf in leaves(loss) if leaf not in registered),
        )


def check_training(
    model: Program, guide: Program, estimator: ELBO, trained: Iterable[Tensor], *data: Any, **kwargs: Any
) -> None:
    """Raise if an estimator is not valid for a pair, or a part of the guide would not be trained.

    The pair runs as the estimator will run it, with its particles and its enumeration. The check has no side
    effects, as in `check_guide`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        estimator: A `pyro.infer.ELBO`.
        trained: The parameters of the optimiser.
        *data: Arguments of both.
        **kwargs: Keyword arguments of both.

    Raises:
        GuideError: If the guide does not fit the model; see `check_guide`.
        ValueError: If the estimator is not valid for the pair, or the guide depends on a parameter outside
            the optimiser.
    """
    tried = [copy.copy(estimator)]  # copies: some estimators keep what they learn from the first pair
    if isinstance(estimator, KLWeighted):
        tried[0].estimator = copy.copy(estimator.estimator)
        tried.insert(0, tried[0].estimator)
    with isolated(model, guide):
        pair = run_fitting_pair(model, guide, data, kwargs, tried[0])
        untrained = untrained_problem(pair, [*trained, *data])
        if untrained:
            raise ValueError(untrained)
        for each in tried:
            reason = invalid_reason(each, pair)
            if reason:
                raise ValueError(f"{label(each)} is not valid for this model and guide: {reason}")
