"""Stochastic variational inference: one step of gradient descent on the negative ELBO.

`SVI` has the interface of `pyro.infer.SVI`, with three differences. One torch optimiser holds all parameters,
so that learning-rate schedules, a global gradient norm and checkpoints are plain torch. A loss or gradient
that is not finite raises an error before it changes the parameters. A parameter that the loss of a step does
not depend on stays where it is, as its gradient is None; Pyro's optimisers, given a gradient of 0, move it
by momentum, so that training on batches with and without labels in turn differs a little.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from pyro_vae.engine.recorder import global_generators
from pyro_vae.engine.replay import ENGINES, Replay
from pyro_vae.inference.batch_parts import BatchParts
from pyro_vae.inference.guide_check import check_mean_field, check_training, untrained_parameters
from pyro_vae.inference.guide_fit import require_fit, sums_out
from pyro_vae.inference.non_finite import is_finite, non_finite_gradient, non_finite_site
from pyro_vae.inference.observed_values import require_observable
from pyro_vae.inference.pyro_arguments import FunctionLoss, as_estimator, explain_pyro_keywords
from pyro_vae.inference.same_sites import naming_step, with_same_sites
from pyro_vae.objectives.calls import explaining_calls, require_arguments
from pyro_vae.objectives.pair import as_tensors, split_pair, stored_parameters
from pyro_vae.objectives.sites import Program, latent_sites, plate_nesting, run_pair, sample_sites
from pyro_vae.utils.isolation import isolated, without_autocast
from pyro_vae.utils.processes import join
from pyro_vae.utils.validation import NonFiniteError, flag_non_finite, require_number

__all__ = ["SVI", "default_loss"]


def default_loss(model: Program, guide: Program, *args: Any, **kwargs: Any) -> ELBO:
    """Return the ELBO estimator that suits a pair: the one with the least noise that is valid for it.

    `TraceEnum_ELBO` if a latent site is marked to be enumerated, as by `infer={"enumerate": "parallel"}` in
    the guide, or in the model alone; else `TraceMeanField_ELBO`, with KLs
    in closed form, if it is right for the pair (`check_mean_field`); else `Trace_ELBO`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        *args: Arguments of both; a small batch is enough.
        **kwargs: Keyword arguments of both.
    """
    with isolated(model, guide), torch.no_grad():
        guide_trace, model_trace = run_pair(model, guide, args, kwargs)
        guide_sites = sample_sites(guide_trace)
        latent = {**latent_sites(sample_sites(model_trace)), **guide_sites}
        if any(site["infer"].get("enumerate") for site in latent.values()):
            return TraceEnum_ELBO(max_plate_nesting=plate_nesting(guide_trace, model_trace))
        try:
            check_mean_field(model, guide, *args, **kwargs)
        except ValueError:
            return Trace_ELBO()
    return TraceMeanField_ELBO()


logger = logging.getLogger("pyro_vae")


class SVI:
    """Fit a guide to a model by stochastic gradients of an ELBO estimator.

    Each step minimises the loss of the estimator; for Pyro's estimators, the negative ELBO summed over the
    batch, in nats.

    Args:
        model: A Pyro model, followed by a guide; or a pair of the two, such as a `VAE`, in place of both.
        guide: A Pyro guide of the same arguments.
        optimizer: A torch optimiser of the parameters to train.
        loss: A `pyro.infer.ELBO`: `Trace_ELBO()`, `TraceMeanField_ELBO()`, `TraceEnum_ELBO()` or one of this
            library's; by default the one of Pyro's that suits the pair, see `default_loss`. Or a function
            `loss(model, guide, *args, **kwargs)` that returns a differentiable tensor; the pair is then
            checked for parameters that the optimiser does not hold, and for nothing else.
        clip_norm: Maximum Euclidean norm of the gradient of all parameters; larger gradients are rescaled.
        engine: How to run a step; all engines give the same numbers. "eager" runs Pyro at every step,
            "traced" the graph of tensor operations recorded at the first step, "compiled" that graph compiled
            to machine code, which takes some seconds. "auto" is traced, and compiled once that saves time.
            A model that changes Python values as it runs, such as a counter, or that reads what cannot be
            compared at each step, such as a clock, a file or a data frame, takes eager steps; a warning says
            so once.
        group: A group of processes of `torch.distributed`, each of which takes its steps on a part of the
            batch: the gradient is that of the sum of their losses, before it is clipped; or of their mean
            where the plates of the pair subsample, so that each loss speaks for all data. Parameters start
            with the values of the first process. All must call `step` equally often. Seed each otherwise.

    Raises:
        TypeError: If the model or the guide is not callable, the optimiser is not a torch optimiser, or the
            loss is neither a `pyro.infer.ELBO` nor a function.
        ValueError: If `clip_norm` is not positive, or the engine is unknown; with a group, if the pair
            depends on all data of a batch together, or is wrapped in DistributedDataParallel.

    Attributes:
        steps: Number of steps taken.
        fastest_products: The fastest library for matrix products, by shape, where it was measured; one for
            all shapes where processes, or parts of a batch, share the steps. Steps in another process are
            bitwise equal given the same `fastest_products` and `steps`.

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_vae import VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> svi = SVI(vae, torch.optim.Adam(vae.parameters(), 1e-3), TraceMeanField_ELBO())
        >>> loss = svi.step(torch.zeros(5, 6))
    """

    @explain_pyro_keywords
    def __init__(
        self,
        model: Any,
        guide: Any = None,
        optimizer: Any = None,
        loss: Any = None,
        *,
        clip_norm: float | None = None,
        engine: str = "auto",
        group: Any = None,
    ):
        given = [value for value in (guide, optimizer, loss) if value is not None]
        call = "SVI(pair, optimizer, loss) or SVI(model, guide, optimizer, loss)"
        model, guide, rest = split_pair(call, model, *given)
        optimizer, loss = [*rest, None, None][:2]
        if isinstance(loss, torch.optim.Optimizer) and isinstance(optimizer, ELBO):
            raise TypeError(f"optimizer and loss are exchanged: call {call}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer, such as torch.optim.Adam(vae.parameters()); "
                f"got {type(optimizer).__name__}. Pyro's optimisers go with pyro.infer.SVI. "
                "A Pair of functions has parameters after pair.make_parameters(x)"
            )
        if clip_norm is not None:
            require_number("clip_norm", clip_norm)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive; got {clip_norm}")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
        self.model = model
        self.guide = guide
        self.optimizer = optimizer
        self.loss: Any = None if loss is None else as_estimator(loss)
        self.clip_norm = clip_norm
        self.engine = engine
        self.steps = 0
        self.fastest_products: dict[str, str] = {}
        self._checked: tuple[Any, ...] = ()
        self._met_late: set[str] = set()  # names in Pyro's store
        self._is_told = False  # that its steps move nothing
        self._replay: Replay | None = None
        self._replayed: tuple[Any, ...] = ()
        self._followed: tuple[Any, ...] = ()  # a pair, and that pair as it runs in a step
        self.processes = join(group)
        self._parts: BatchParts | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Omit the graphs: a copy records its own."""
        graphs = {"_replay": None, "_replayed": (), "_followed": (), "_parts": None}
        return {**vars(self), **graphs, "_checked": ()}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one gradient step and return the loss as defined by the estimator.

        Arguments are those of the model and the guide. The programs of a `VAE` or a `Pair` get tensors, which
        arrays, sparse matrices, data frames and `Images` become as in `fit`; others get what is given, as in
        Pyro. The first step calls `check`. If the loss depends on no parameter that requires a gradient,
        nothing moves, and a warning is logged.

        Returns:
            A number; a tuple of numbers from an estimator of several, such as Pyro's ReweightedWakeSleep;
            infinity from TraceTailAdaptive_ELBO, which has a gradient only.

        Raises:
            NonFiniteError: If the loss or a gradient is infinite or NaN; names parameter, site and datum
                where these can be found. Parameters and the optimiser's state are unchanged, gradients None.
            GuideError: If guide and model draw other sites with this batch than with the first, and not the
                same; names the step and the site.
            ValueError: If the programs enter a parameter in Pyro's store that the optimiser does not hold.
        """
        for value in (*args, *kwargs.values()):
            if not isinstance(value, Tensor):
                args, kwargs = as_tensors(self.model, args, kwargs)
                break
        if self.processes.size > 1:
            return self.step_in_parts([(args, kwargs)])
        return self.take_step(self._eager_step, args, kwargs)

    def step_again(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step as `step` does, where nothing but steps has run since the last one.

        So nothing that the programs read can have changed but arguments and parameters, and the engine does
        not look for it, which takes as long as a small matrix product. Raises and returns as `step`.
        """
        settings = (self.model, self.guide, self.loss, self.optimizer, self.clip_norm, self.engine, False)
        is_same = self._replayed == settings and self.processes.size == 1
        if self._replay is None or not (is_same and self._replay.can_repeat(args, kwargs)):
            return self.step(*args, **kwargs)
        loss = self._replay.step_again(self.steps, *args, **kwargs)
        self.steps += 1
        return loss

    def step_in_parts(
        self,
        parts: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
        *,
        stop: bool = False,
        save: bool = False,
    ) -> float:
        """Take one step on a batch that comes in parts, here and in other processes; return its loss.

        Args:
            parts: Arguments of the pair for each part: as many as there are, none if this process has none.
            stop: Ask all processes to stop after the step, see `stopped`.
            save: Ask all processes to save after the step, see `asked_to_save`.

        Raises:
            Exception: As `step`; a process in which nothing was raised raises what tells of another's error.
        """
        if self._parts is None or not self._parts.hold(self.parameters()):
            self._parts = BatchParts(self, self.processes)
        return self._parts.step(parts, stop=stop, save=save)

    @property
    def stopped(self) -> bool:
        """Whether a process asked for it in the last of `step_in_parts`."""
        return self._parts is not None and self._parts.sum.stop

    @property
    def asked_to_save(self) -> bool:
        """Whether a process asked for it in the last of `step_in_parts`."""
        return self._parts is not None and self._parts.sum.save

    @property
    def num_rows(self) -> int:
        """Number of data in the last of `step_in_parts`, those of all processes together."""
        return 0 if self._parts is None else self._parts.sum.rows

    def take_step(
        self, eager_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
    ) -> Any:
        """Take a step by the engine; `options` are those of `Replay`."""
        is_first = self.loss is None or self._checked != (self.model, self.guide, self.loss)
        if is_first:
            self.check(*args, **kwargs)
        num_stored = len(self._stored())
        # the first step with a function is its check, since nothing else tells which parameters it uses
        checks_function = is_first and isinstance(self.loss, FunctionLoss)
        if self.engine == "eager" or checks_function or isinstance(self.loss, TraceTailAdaptive_ELBO):
            loss = eager_step(*args, **kwargs)
        else:
            clip_norm = None if options else self.clip_norm
            settings = (self.model, self.guide, self.loss, self.optimizer, clip_norm)
            replayed = (*settings, self.engine, bool(options))
            if self._replay is None or self._replayed != replayed:
                self._replayed = replayed
                usual: dict[str, Any] = {"fastest": self.fastest_products, "watched": self._programs}
                self._replay = Replay(
                    *settings, engine=self.engine, eager_step=eager_step, **(usual | options)
                )
            step = partial(self._replay.step, self.steps) if not self._met_late else eager_step
            try:
                loss = step(*args, **kwargs)
            except RuntimeError:  # a class out of range fails in the graph
                require_observable(self.model, args, kwargs)
                raise
        self._require_trained(num_stored)
        self._checked = (self.model, self.guide, self.loss)
        self.steps += 1
        return loss

    def _require_trained(self, num_stored: int) -> None:
        """Raise if programs have entered parameters in a store that the optimiser does not hold."""
        stored = self._stored()
        if len(stored) > num_stored:
            self._met_late.update(list(stored)[num_stored:])
        if self._met_late:  # again at each step, until the optimiser holds them
            late = {name: stored[name] for name in self._met_late if name in stored}
            problem = untrained_parameters(self.parameters(), late)
            if problem:
                raise ValueError(problem)
            self._met_late.clear()

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Check, without side effects, that the guide fits, and that the estimator and the optimiser suit it.

        Arguments are as for `step`; a small batch is enough. `step` does not repeat a
        check that has passed. A loss that is a function may run the pair in its own way: it is not checked
        before its first step.

        Raises:
            GuideError: If the guide does not fit the model; see `check_guide`.
            ValueError: If the estimator is not valid for the pair, or the guide depends on a parameter, of
                Pyro's global store or without a Pyro statement, that the optimiser does not hold.
        """
        args, kwargs = as_tensors(self.model, args, kwargs)
        require_arguments(self.model, args, kwargs)
        if not isinstance(self.loss, FunctionLoss):
            require_observable(self.model, args, kwargs)
        if self.loss is None:
            try:
                self.loss = default_loss(self.model, self.guide, *args, **kwargs)
            except Exception:
                require_fit(self.model, self.guide, *args, **kwargs)  # explains it, if the guide does not fit
                raise
        if not isinstance(self.loss, FunctionLoss):
            check_training(self.model, self.guide, self.loss, self.parameters(), *args, **kwargs)
            self._checked = (self.model, self.guide, self.loss)

    def _eager_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.eager_gradients(*args, **kwargs)
        if self.clip_norm is not None:
            clip_grad_norm_(self.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss

    def eager_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and its gradient, which the parameters hold after it; raises as `step`."""
        states = [generator.get_state() for generator in global_generators()]
        num_stored = len(self._stored())
        counted = getattr(self.loss, "steps", None)
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()  # of casts of the parameters before the last step
        try:
            with naming_step(self.steps + 1), explaining_calls(self.model, self.guide, args, kwargs):
                loss = self._loss_and_gradients(states, *args, **kwargs)
            self._require_trained(num_stored)
            parameters = self.parameters()
            if flag_non_finite((p.grad for p in parameters), torch.zeros(())):
                self._require_finite_gradients(loss, states, *args, **kwargs)
        except Exception:
            self.optimizer.zero_grad()
            if counted is not None:  # a step that is not taken does not count in a schedule
                self.loss.steps = counted
            raise
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, as `step` does, without taking a step, using torch's global generator."""
        args, kwargs = as_tensors(self.model, args, kwargs)
        if self.loss is None:
            self.check(*args, **kwargs)
        with torch.no_grad(), explaining_calls(self.model, self.guide, args, kwargs), naming_step():
            return _numbers(self.loss.loss(*self._programs(), *args, **kwargs))

    def _loss_and_gradients(self, states: Sequence[Tensor], /, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss and its gradient; `states` are those of the generators, to repeat a failure."""
        try:
            value = self._backward(states, *args, **kwargs)
        except ValueError as error:  # Pyro's validation raises it for NaN parameters, for instance
            require_observable(self.model, args, kwargs)
            reason = self._repeat(states, non_finite_site, self.model, self.guide, *args, **kwargs)
            if reason is None:
                raise
            raise NonFiniteError(f"the loss cannot be computed: {reason}") from error
        if not (_is_finite(value) or self._has_no_value(value)):
            reason = self._repeat(states, non_finite_site, self.model, self.guide, *args, **kwargs)
            raise NonFiniteError(f"the loss is {value}: {reason or 'each site is finite by itself'}")
        self._warn_if_nothing_moves()
        return value

    def _has_no_value(self, value: Any) -> bool:
        """Return True for the infinity that an estimator of a gradient alone gives for its loss."""
        return isinstance(self.loss, TraceTailAdaptive_ELBO) and value == math.inf

    def _backward(self, states: Sequence[Tensor], /, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.loss, "differentiable_loss"):  # TraceGraph_ELBO, for instance
            return _numbers(self.loss.loss_and_grads(*self._programs(), *args, **kwargs))
        loss = self._differentiable_loss(states, *args, **kwargs)
        value = _numbers(loss)
        finite = _is_finite(value) or self._has_no_value(value)
        if finite and isinstance(loss, Tensor) and loss.requires_grad:
            with without_autocast():  # the products of the pass have the precision of those forward
                loss.backward()
        return value

    def _differentiable_loss(self, states: Sequence[Tensor], /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.loss, FunctionLoss):
            try:
                return self.loss.differentiable_loss(*self._programs(), *args, **kwargs)
            except ValueError as error:
                if not (isinstance(self.loss, TraceEnum_ELBO) and "cannot be differentiated" in str(error)):
                    raise
            for generator, state in zip(global_generators(), states, strict=False):
                generator.set_state(state)
            return self.loss.loss_and_grads(*self._programs(), *args, **kwargs)
        with poutine.trace(param_only=True) as tracer:
            loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
        # those that pyro.param creates; a module's may be left untrained on purpose
        created = [
            name
            for name, site in tracer.trace.nodes.items()
            if site["type"] == "param" and not isinstance(site["value"].unconstrained(), nn.Parameter)
        ]
        self._met_late.update(name for name in created if name in self._stored())
        return loss

    def _programs(self) -> tuple[Program, Program]:
        """Return the pair as it runs in a step; functions and sleep phases have runs of their own."""
        if isinstance(self.loss, FunctionLoss | ReweightedWakeSleep):
            return self.model, self.guide
        pair = (self.model, self.guide, self.loss)
        if not self._followed or self._followed[0] != pair:  # kept, as Pyro's Jit classes compile by identity
            self._followed = (pair, with_same_sites(self.model, self.guide, sums_out=sums_out(self.loss)))
        return self._followed[1]

    def _warn_if_nothing_moves(self) -> None:
        if not self._is_told and all(parameter.grad is None for parameter in self.parameters()):
            self._is_told = True
            logger.warning(
                "a step of SVI moves nothing: the loss depends on no parameter of the optimiser that "
                "requires a gradient"
            )

    def _require_finite_gradients(
        self, loss: Any, states: Sequence[Tensor], /, *args: Any, **kwargs: Any
    ) -> None:
        parameters = self.parameters()
        if all(is_finite(parameter.grad) for parameter in parameters):
            return
        self.optimizer.zero_grad()
        backward = partial(self._backward, states, *args, **kwargs)
        reason = self._repeat(states, non_finite_gradient, self.model, self.guide, parameters, backward)
        reason = reason or "a gradient is not finite, but all are when the step is repeated"
        shown = f"{loss:.6g}" if isinstance(loss, float) else loss
        raise NonFiniteError(f"the loss is {shown}, but {reason}")

    def _repeat(
        self, states: Sequence[Tensor], diagnose: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Diagnose a failed step with its random numbers, without side effects on modules or generators."""
        may_fail = suppress(Exception) if isinstance(self.loss, FunctionLoss) else nullcontext()
        with isolated(self.model, self.guide), may_fail:  # a function may give the pair other arguments
            for generator, state in zip(global_generators(), states, strict=False):
                generator.set_state(state)
            return diagnose(*args, **kwargs)

    def _stored(self) -> dict[str, Tensor]:
        return stored_parameters(self.model, self.guide)

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the optimiser, in order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def _numbers(loss: Any) -> Any:
    """Return a loss as a float, or a tuple of losses as a tuple of floats."""
    if isinstance(loss, tuple):
        return tuple(float(each) for each in loss)
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _is_finite(value: Any) -> bool:
    return all(math.isfinite(each) for each in (value if isinstance(value, tuple) else (value,)))
