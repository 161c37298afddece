"""Stochastic variational inference: one step of gradient descent on the negative ELBO.

`SVI` has the interface of `pyro.infer.SVI`. It differs in that one torch optimiser holds all the
parameters, so that a learning-rate schedule, a global gradient norm and a checkpoint are plain
torch; and in that a loss that is not finite stops training before it reaches the parameters.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO

from pyro_vae.engine.replay import ENGINES, Replay
from pyro_vae.inference.guide_check import check_training
from pyro_vae.objectives.sites import require_programs
from pyro_vae.utils.validation import NonFiniteError

__all__ = ["SVI"]


class SVI:
    """Fit a guide to a model by stochastic gradients of an ELBO estimator.

    Each step minimises the loss of `estimator`, for Pyro's own the negative ELBO summed over the
    batch, in nats.

    Args:
        model: A Pyro model function; for a VAE, `vae.model`.
        guide: A Pyro guide function of the same arguments; for a VAE, `vae.guide`.
        optimizer: A torch optimiser that holds the parameters to train.
        loss: A `pyro.infer.ELBO`: `Trace_ELBO()`, `TraceMeanField_ELBO()` or one of this library's.
        clip_norm: Largest Euclidean norm of the gradient of all parameters together; longer
            gradients are scaled down to it.
        engine: How the steps are taken, to the same numbers: "eager", by Pyro each time; "traced", by a
            graph of tensor operations that the first step leaves behind; "compiled", by that graph made
            machine code, which takes some seconds; "auto", traced at first and compiled once that pays.

    Raises:
        TypeError: If the model or the guide cannot be called, the optimiser is not a torch one, or the
            loss no `pyro.infer.ELBO`.
        ValueError: If `clip_norm` is not positive, or the engine unknown.

    Attributes:
        steps: How many were taken.
        fastest_products: Which library multiplies which shapes, where that was measured: with the same, and
            the same `steps`, the steps of another process are the same to the bit.

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> svi = SVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), 1e-3), TraceMeanField_ELBO())
        >>> loss = svi.step(torch.zeros(5, 6))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        loss: ELBO,
        *,
        clip_norm: float | None = None,
        engine: str = "auto",
    ):
        require_programs("SVI(vae.model, vae.guide, optimizer, loss)", model, guide)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer, such as torch.optim.Adam(vae.parameters()); "
                f"got {type(optimizer).__name__}. Pyro's optimisers go with pyro.infer.SVI"
            )
        if not isinstance(loss, ELBO):
            got = loss.__name__ + " itself: call it" if isinstance(loss, type) else type(loss).__name__
            raise TypeError(f"loss must be a pyro.infer.ELBO, such as Trace_ELBO(); got {got}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive; got {clip_norm}")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
        self.model = model
        self.guide = guide
        self.optimizer = optimizer
        self.loss = loss
        self.clip_norm = clip_norm
        self.engine = engine
        self.steps = 0
        self.fastest_products: dict[str, str] = {}
        self._checked: tuple = ()
        self._replay: Replay | None = None
        self._replayed: tuple = ()

    def __getstate__(self) -> dict[str, Any]:
        """All but the graphs, which a copy records anew."""
        return {**vars(self), "_replay": None, "_replayed": (), "_checked": ()}

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step and return the loss, as the estimator defines it: Pyro's sum over the batch.

        Args and kwargs go to the model and the guide. The first step begins with `check`.

        Raises:
            NonFiniteError: If the loss is infinite or NaN, naming the site; the parameters are untouched.
        """
        if self._checked != (self.model, self.guide, self.loss):
            self.check(*args, **kwargs)
        if self.engine == "eager":
            loss = self._eager_step(*args, **kwargs)
        else:
            settings = (self.model, self.guide, self.loss, self.optimizer, self.clip_norm)
            if self._replay is None or self._replayed != (*settings, self.engine):
                self._replayed = (*settings, self.engine)
                self._replay = Replay(
                    *settings,
                    engine=self.engine,
                    eager_step=self._eager_step,
                    fastest=self.fastest_products,
                )
            loss = self._replay.step(self.steps, *args, **kwargs)
        self.steps += 1
        return loss

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before training, what would train wrongly or in part.

        Parameters, buffers and random numbers are left as they were. Args and kwargs go to the model and the
        guide; a small batch is enough. What has passed is not checked again.

        Raises:
            GuideError: If the guide does not fit the model; see `check_guide`.
            ValueError: If the estimator is not valid for the two, or the guide depends on a parameter, of
                Pyro's global store or of a module that nothing shows, which the optimiser does not hold.
        """
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        check_training(self.model, self.guide, self.loss, trained, *args, **kwargs)
        self._checked = (self.model, self.guide, self.loss)

    def _eager_step(self, *args: Any, **kwargs: Any) -> float:
        self.optimizer.zero_grad()
        loss = self._loss_and_gradients(*args, **kwargs)
        if self.clip_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss without taking a step. Like Pyro's, it draws from torch's global generator."""
        with torch.no_grad():
            return float(self.loss.loss(self.model, self.guide, *args, **kwargs))

    def _loss_and_gradients(self, *args: Any, **kwargs: Any) -> float:
        try:
            if hasattr(self.loss, "differentiable_loss"):
                loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
                value = float(loss.detach())
                if math.isfinite(value):
                    loss.backward()
            else:  # such as TraceGraph_ELBO
                value = float(self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs))
        except ValueError as error:  # what Pyro's validation raises, among others, for NaN parameters
            reason = _non_finite_site(self.model, self.guide, *args, **kwargs)
            if reason is None:
                raise
            raise NonFiniteError(f"the loss cannot be computed: {reason}") from error
        if not math.isfinite(value):
            reason = _non_finite_site(self.model, self.guide, *args, **kwargs)
            raise NonFiniteError(f"the loss is {value}: {reason or 'on another draw every site is finite'}")
        return value


def _non_finite_site(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> str | None:
    """Run the pair once more and describe the first thing in it that is not finite."""
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
                    if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                        index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                        found = tensor[tuple(index)].item()
                        return f"site {name!r} has {what.replace('_', ' ')} {found} at index {index}"
    return None
