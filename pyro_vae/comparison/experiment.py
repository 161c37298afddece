"""Compare ELBO estimators: bias, gradient variance and SNR, time and memory.

Notation: R repeats of one step on one batch of N examples, at fixed parameters.
"""

import contextlib
import copy
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_vae.comparison.gradient_noise import GradientMoments, ZeroMeanTest
from pyro_vae.comparison.reference_bounds import Target, target
from pyro_vae.comparison.result import PARAMETERS, Comparison, Measured, Reference, summarise
from pyro_vae.data.sources import arguments, num_rows
from pyro_vae.evaluation.importance_sampling import evaluate
from pyro_vae.inference.guide_check import check_mean_field
from pyro_vae.inference.guide_fit import run_fitting_pair
from pyro_vae.objectives.estimators import Estimator, family, label
from pyro_vae.objectives.kl_weighting import KLWeighted, inner_estimator
from pyro_vae.objectives.log_terms import terms
from pyro_vae.objectives.pair import Programs, as_tensors, split_pair
from pyro_vae.objectives.sites import (
    NotSeparableError,
    Program,
    run_pair,
    subsampling_factor,
)
from pyro_vae.utils.arrays import as_tensor
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.isolation import derived_seed, evaluation_mode, isolated_generators
from pyro_vae.utils.processes import Processes, join
from pyro_vae.utils.validation import NonFiniteError, require_count

__all__ = ["compare_estimators", "peak_memory"]

_NOISE, _REFERENCE = 40, 41  # keys of the random streams
_ROUNDS = 7  # timings per estimator


def compare_estimators(
    model: Any,
    guide: Any = None,
    data: Any = None,
    estimators: Sequence[ELBO] | Mapping[str, ELBO] | None = None,
    *,
    num_repeats: int = 100,
    reference: Tensor | None = None,
    num_reference_particles: int = 1000,
    seed: int = 0,
    max_plate_nesting: int = 1,
    progress: bool = True,
    group: Any = "auto",
) -> Comparison:
    r"""Compare estimators by repeated steps on one batch, at the same parameters.

    Measured for each estimator: its value with standard error, the bias of the value against log p(x) and
    against its own bound; the variance, signal-to-noise ratio and a bias test of its gradient, separately in
    model and guide parameters; time and memory of a step. `print` shows tables, and sentences on the
    differences that exceed their errors.

    The gradient is that of the mean bound over the batch. From R draws g,

    .. math:: \mathrm{variance} = E \|g - E g\|^2, \qquad \mathrm{SNR} = \|E g\| / \sqrt{E \|g - E g\|^2},

    for one coordinate the SNR of Rainforth et al. (2018). Averaging n steps multiplies SNR² by n. An
    *effective sample* is as many steps as bring it to 1, and takes the time of a step over SNR².

    An estimator's own bound and its gradient are estimated by their definition
    (`pyro_vae.comparison.reference_bounds.ReferenceEstimator`). With `KLWeighted` the gradient is that of the
    weighted bound, and the value that of the bound at β = 1.

    In repeat r all estimators start from the same random numbers. Those with the same number of particles
    share their draws, which reduces the noise of their differences. The pair runs in evaluation mode. Modes,
    parameters, gradients, torch's generators and Pyro's parameter store are restored.

    Where a latent site is shared by all examples, Pyro's estimators are compared by value, noise and cost
    alone: log p(x) of single examples does not exist, and the biases are NaN.

    Args:
        model: A Pyro model, followed by a guide; or a pair of the two, such as a `VAE`, in place of both. The
            parameters at the model's `param` sites count as model parameters, those of the guide as guide
            parameters; a shared parameter counts in both.
        guide: A Pyro guide of the same arguments.
        data: The batch, (N, *event_shape), in the support of the likelihood: a tensor, array, sparse matrix,
            data frame or `Images`; or a tuple or dict of several arguments.
        estimators: Estimators to compare; a mapping names them.
        num_repeats: R ≥ 10.
        reference: Exact log p(x) of each example, (N,). By default it is estimated by importance sampling,
            and every t includes its error.
        num_reference_particles: Draws per example of that estimate.
        seed: Non-negative integer from which every random number is derived.
        max_plate_nesting: Number of plate dimensions of the pair; see `terms`.
        progress: Show a progress bar, in a terminal or a notebook.
        group: The processes of `torch.distributed` that share the repeats, those of one target by one of
            them, as in `evaluate`; the first one takes the times. None for this process alone.

    Raises:
        TypeError: If the model or guide is not callable, an estimator is not a `pyro.infer.ELBO`, `data` is
            not a tensor, or a number is not an integer.
        ValueError: If `estimators` is empty, R is below 10, `reference` has the wrong shape or is not finite,
            an estimator is not valid for the pair, or the pair or the data are not valid (see `terms`).
        NonFiniteError: If a value or gradient is infinite or NaN; names the estimator.

    Source: T. Rainforth et al. (2018), Tighter variational bounds are not necessarily better,
    arXiv:1802.04537.

    Example:
        >>> from pyro_vae import STL, VAE, guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> found = compare_estimators(
        ...     vae.model, vae.guide, torch.randn(5, 6), [TraceMeanField_ELBO(), STL()], progress=False
        ... )
        >>> dict(found["snr"].sizes), found["snr"].attrs["units"]
        ({'estimator': 2, 'parameters': 2}, '1')
    """
    model, guide, data, estimators = _arguments(model, guide, data, estimators)
    require_count("num_repeats", num_repeats, minimum=10)
    require_count("num_reference_particles", num_reference_particles, minimum=2)
    tensors = [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor)]
    device, (args, kwargs) = tensors[0].device, arguments(data)
    candidates = [
        _Candidate(name, estimator, target(estimator, max_plate_nesting=max_plate_nesting))
        for name, estimator in _named(estimators).items()
    ]
    processes = join(group)
    processes.require_same(
        "settings of compare_estimators",
        {"estimators": [c.name for c in candidates], "num_repeats": num_repeats, "seed": seed},
    )
    with _isolated(model, guide, device, derived_seed(seed, _NOISE)) as restore:
        step = _Step(model, guide, data, max_plate_nesting=max_plate_nesting)
        restore(step.parameters)
        for candidate in candidates:
            inner = inner_estimator(candidate.estimator)
            if step.shared:
                candidate.target = None
                if isinstance(inner, Estimator):
                    raise NotSeparableError(
                        f"{candidate.name} needs terms of single examples: {step.shared.partition('. ')[0]}. "
                        "Compare Pyro's estimators alone, such as Trace_ELBO() and TraceMeanField_ELBO()"
                    )
            run_fitting_pair(model, guide, args, kwargs, inner)
            if isinstance(inner, TraceMeanField_ELBO):
                check_mean_field(model, guide, *args, **kwargs)
        options: dict[str, Any] = {"progress": progress and processes.is_first}
        known = _reference(
            step, reference, num_reference_particles, derived_seed(seed, _REFERENCE), group=group, **options
        )
        seeds = [derived_seed(seed, _NOISE, repeat) for repeat in range(num_repeats)]
        _repeat_all(step, candidates, seeds, processes, **options)

        def result() -> Comparison:
            seconds = _seconds(step, candidates)
            return summarise(
                [_measure(step, candidate, seconds[candidate.name]) for candidate in candidates],
                known,
                num_data=len(tensors[0]),
                num_repeats=num_repeats,
                seed=seed,
                dtype=str(step.dtype).removeprefix("torch."),
                device=str(device),
            )

        return processes.on_first(result)


@dataclass
class _Candidate:
    """An estimator under comparison, with its measurements so far."""

    name: str
    estimator: ELBO
    target: Target | None
    bound: list[float] = field(default_factory=list)
    reference_bound: list[float] = field(default_factory=list)
    moments: dict[str, GradientMoments] = field(default_factory=dict)
    reference_moments: dict[str, GradientMoments] = field(default_factory=dict)
    tests: dict[str, ZeroMeanTest] = field(default_factory=dict)

    def measured(self) -> dict[str, Any]:
        """Return what was measured, by field."""
        kept = ("name", "estimator", "target")
        return {name: value for name, value in vars(self).items() if name not in kept}


def _arguments(model: Any, *others: Any) -> tuple[Program, Program, Any, Any]:
    """Return model, guide, batch and estimators from those that were given; raise as `compare_estimators`."""
    call = "compare_estimators(pair, x, estimators) or compare_estimators(model, guide, x, estimators)"
    model, guide, rest = split_pair(call, model, *(value for value in others if value is not None))
    if len(rest) != 2:
        found = "no estimators" if len(rest) == 1 else f"{len(rest)} arguments"
        raise TypeError(
            f"expected a batch and a list of estimators, such as [Trace_ELBO(), pyro_vae.IWAE(5)], after the "
            f"pair; got {found}: call {call}"
        )
    data, estimators = tree_map(partial(_as_tensor, model), rest[0]), rest[1]
    is_batch = isinstance(data, Tensor | tuple | dict)
    if not is_batch or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(data)):
        raise TypeError(
            "data must be one batch, a tensor, array or data frame such as x[:128] or a tuple or dict of "
            f"them; got {type(data).__name__}"
        )
    return model, guide, data, estimators


def _repeat_all(
    step: "_Step", candidates: list[_Candidate], seeds: list[int], processes: Processes, *, progress: bool
) -> None:
    """Measure all candidates, those of one target in one of the processes."""

    def repeat_own() -> dict[str, dict[str, Any]]:
        own = _group_by_target(candidates)[processes.rank :: processes.size]
        total = len(seeds) * sum(map(len, own))
        with progress_bar(total, shown=progress, unit=" steps") as bar:
            for group in own:
                for seed in seeds:
                    _repeat(step, group, seed, len(seeds))
                    bar.update(len(group))
        return {candidate.name: candidate.measured() for group in own for candidate in group}

    of_all = {name: fields for part in processes.gather(repeat_own) for name, fields in part.items()}
    for candidate in candidates:
        vars(candidate).update(of_all[candidate.name])


def _as_tensor(model: Program, leaf: Any) -> Any:
    """Convert an array or data frame as `fit` does, which makes a `Pair` of any programs."""
    (leaf,), _ = as_tensors(model, (leaf,), {})
    return as_tensor(leaf, dtype=torch.get_default_dtype())


def _named(estimators: Sequence[ELBO] | Mapping[str, ELBO]) -> dict[str, ELBO]:
    """Return copies of the estimators, as use changes some, under unique names."""
    if not isinstance(estimators, Iterable) or isinstance(estimators, str):
        hint = f": write [{label(estimators)}]" if isinstance(estimators, ELBO) else ""
        raise TypeError(
            f"estimators must be a list of pyro.infer.ELBO, or a mapping; got {estimators!r}{hint}"
        )
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    else:
        named = {}
        for estimator in estimators:
            name = label(estimator) if isinstance(estimator, ELBO) else repr(estimator)
            same = sum(other == name or other.startswith(f"{name} #") for other in named)
            named[f"{name} #{same + 1}" if same else name] = estimator
    if not named:
        raise ValueError("estimators is empty: give at least one estimator")
    for name, estimator in named.items():
        if not isinstance(estimator, ELBO):
            kind = f"{estimator.__name__} itself: call it" if isinstance(estimator, type) else repr(estimator)
            raise TypeError(f"an estimator must be a pyro.infer.ELBO, such as Trace_ELBO(); got {kind}")
        if isinstance(estimator, KLWeighted):  # fixed at its present weight: each step advances a schedule
            named[name] = KLWeighted(
                copy.copy(estimator.estimator),
                estimator.beta,
                free_bits=estimator.free_bits,
                per=estimator.per,
            )
        else:
            named[name] = copy.copy(estimator)
    return named


class _Step:
    """One step of an estimator: value and gradient of the mean bound, without an update."""

    def __init__(self, model: Program, guide: Program, data: Any, *, max_plate_nesting: int):
        self.model, self.guide, self.data = model, guide, data
        self.args, self.kwargs = arguments(data)
        self.device = next(leaf.device for leaf in tree_leaves(data) if isinstance(leaf, Tensor))
        self.max_plate_nesting = max_plate_nesting
        guide_trace, model_trace = run_pair(model, guide, self.args, self.kwargs)
        self.shared = ""  # why there are no terms of single examples
        try:
            with torch.no_grad():
                first = terms(model, guide, *self.args, max_plate_nesting=max_plate_nesting, **self.kwargs)
        except NotSeparableError as error:
            self.shared, count = str(error), num_rows(data)
            scale: Any = subsampling_factor(model_trace, count)
            self.dtype = model_trace.log_prob_sum().dtype
        else:
            scale, count, self.dtype = first.scale, first.sites.num_data, first.log_weight.dtype
        weight = torch.as_tensor(scale, dtype=torch.float64).expand(count).cpu()
        self.total = float(weight.sum())  # loss / mean bound, up to sign
        self.weight = weight / weight.sum()
        self.parameters = list({**_parameters(model_trace), **_parameters(guide_trace)})
        places = {parameter: place for place, parameter in enumerate(self.parameters)}
        self.places = {
            name: [places[parameter] for parameter in _parameters(trace)]
            for name, trace in zip(PARAMETERS, (model_trace, guide_trace), strict=True)
        }

    def __call__(self, estimator: ELBO) -> tuple[float, dict[str, Tensor]]:
        """Estimate the bound and its gradient in model and guide parameters, each flattened."""
        loss, gradient = self.loss_and_gradient(estimator)
        flat = {
            name: torch.cat([gradient[place].flatten() for place in places]) / -self.total
            for name, places in self.places.items()
            if places
        }
        return -loss / self.total, flat

    def loss_and_gradient(self, estimator: ELBO) -> tuple[float, list[Tensor]]:
        """Return loss and gradient as `pyro_vae.SVI` computes them for training."""
        if hasattr(estimator, "differentiable_loss"):
            loss = estimator.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs)
            if not (self.parameters and loss.requires_grad):
                return float(loss.detach()), [torch.zeros_like(p) for p in self.parameters]
            gradient = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            return float(loss.detach()), list(gradient)
        for parameter in self.parameters:  # TraceGraph_ELBO, for example, only fills `grad`
            parameter.grad = None
        value = float(estimator.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs))
        return value, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]


def _parameters(trace: poutine.Trace) -> dict[Tensor, None]:
    """Return the unconstrained parameters at the param sites of a trace, in order, without duplicates."""
    sites = [site for site in trace.nodes.values() if site["type"] == "param"]
    return dict.fromkeys(site["value"].unconstrained() for site in sites)


def _group_by_target(candidates: list[_Candidate]) -> list[list[_Candidate]]:
    """Group the candidates that have the same reference estimators."""
    groups: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        key = repr(candidate.target and candidate.target.reference_estimators)
        groups.setdefault(key, []).append(candidate)
    return list(groups.values())


def _repeat(step: _Step, group: list[_Candidate], seed: int, num_repeats: int) -> None:
    """Run one step of each candidate of a group and of their reference estimators, from the same seed."""
    references = group[0].target.reference_estimators if group[0].target else {}
    expected: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, estimator in references.items():
        if name == "guide" and repr(estimator) == repr(references["model"]):
            expected[name] = expected["model"]
            continue
        torch.manual_seed(seed)
        expected[name] = step(estimator)
    for candidate in group:
        torch.manual_seed(seed)
        value, gradient = step(candidate.estimator)
        finite = all(bool(part.isfinite().all()) for part in gradient.values())
        if not (math.isfinite(value) and finite):
            what = "a gradient that is not finite" if math.isfinite(value) else f"the value {value}"
            raise NonFiniteError(
                f"{candidate.name} gave {what} at step {len(candidate.bound) + 1}; "
                "check the parameters and the data"
            )
        candidate.bound.append(value)
        if expected:
            candidate.reference_bound.append(expected["model"][0])
        for name, draw in gradient.items():
            candidate.moments.setdefault(name, GradientMoments()).add(draw)
            if expected:
                expected_draw = expected[name][1][name]
                candidate.reference_moments.setdefault(name, GradientMoments()).add(expected_draw)
                candidate.tests.setdefault(name, ZeroMeanTest(num_repeats)).add(draw - expected_draw)


def _seconds(step: _Step, candidates: list[_Candidate]) -> dict[str, float]:
    """Return the shortest of several wall-clock times of a step, which other processes disturb least."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(_ROUNDS):
        for candidate in candidates:
            started = time.perf_counter()
            step.loss_and_gradient(candidate.estimator)
            if step.device.type != "cpu":
                torch.accelerator.synchronize(step.device)
            seconds[candidate.name].append(time.perf_counter() - started)
    return {name: min(times) for name, times in seconds.items()}


def _measure(step: _Step, candidate: _Candidate, seconds: float) -> Measured:
    """Summarise the measurements of a candidate, and measure its memory."""
    rounding = (1e3 * torch.finfo(step.dtype).eps) ** 2
    return Measured(
        name=candidate.name,
        family=family(candidate.estimator),
        num_particles=candidate.estimator.num_particles,
        target=candidate.target,
        bound=candidate.bound,
        reference_bound=candidate.reference_bound,
        gradients={
            name: moments.summary(
                negligible=rounding * candidate.reference_moments.get(name, moments).mean_square
            )
            for name, moments in candidate.moments.items()
        },
        gradient_bias_t={name: test.t for name, test in candidate.tests.items()},
        seconds=seconds,
        peak_bytes=peak_memory(lambda: step.loss_and_gradient(candidate.estimator)),
    )


def _reference(
    step: _Step, exact: Tensor | None, num_particles: int, seed: int, *, progress: bool, group: Any
) -> Reference:
    """Return the mean log p(x) of the batch, exact or estimated by importance sampling."""
    if exact is not None:
        if exact.shape != step.weight.shape:
            raise ValueError(
                f"reference must hold log p(x) of each example, shape {tuple(step.weight.shape)}; "
                f"got {tuple(exact.shape)}"
            )
        if not exact.isfinite().all():
            raise ValueError(f"reference must be finite; {int((~exact.isfinite()).sum())} values are not")
        return Reference("log p(x), as given", float(step.weight @ exact.detach().cpu().double()), 0.0)
    if step.shared:
        return Reference(f"none, as {step.shared.partition(': ')[0]}", math.nan, 0.0)
    estimate = evaluate(
        Programs(step.model, step.guide),
        step.data,
        num_particles=num_particles,
        seed=seed,
        aggregate_size=0,
        max_plate_nesting=step.max_plate_nesting,
        progress=progress,
        group=group,
    )
    return Reference(
        f"log p(x), estimated by L_{num_particles} of the guide",
        float(step.weight @ estimate.per_datum.log_evidence),
        float((step.weight * estimate.per_datum.log_evidence_mc_se).square().sum().sqrt()),
        num_unreliable=int((estimate.pareto_k > 0.7).sum()),
    )


@contextlib.contextmanager
def _isolated(model: Program, guide: Program, device: torch.device, seed: int) -> Iterator[Any]:
    """Run in evaluation mode with a seed; restore modes, generators, gradients and Pyro's parameter store.

    Yields a function that takes further tensors whose gradients are to be restored.
    """
    owners = [getattr(program, "__self__", program) for program in (model, guide)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    gradients: dict[Tensor, Tensor | None] = {}

    def restore(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor not in gradients:
                gradients[tensor], tensor.grad = tensor.grad, None

    restore([parameter for module in modules for parameter in module.parameters()])
    store = pyro.get_param_store()
    with (
        isolated_generators(device, seed),
        store.scope(store.get_state()),
        torch.enable_grad(),
        evaluation_mode(model, guide),
    ):
        try:
            yield restore
        finally:
            for tensor, gradient in gradients.items():
                tensor.grad = gradient


def peak_memory(computation: Callable[[], Any]) -> int:
    """Run a computation and return the peak memory of its tensors, in bytes.

    Counts the storages that torch's operations allocate on any device, forward and backward, until they are
    freed. Excludes storages that existed before and the workspace of kernels. Unlike the memory of the
    process, the count depends on the computation alone.

    Example:
        >>> peak_memory(lambda: torch.ones(1000) + 1)  # two tensors of 4-byte numbers
        8000
    """
    with _Storages() as storages:
        computation()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Count the bytes of the storages that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the inputs of an operation, allocated before, and its outputs."""
        self._record((args, kwargs), new=False)
        result = function(*args, **(kwargs or {}))
        self._record(result, new=True)
        return result

    def _record(self, tree: Any, *, new: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes() if new else 0
                self.held += self.sizes[key]
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.held -= self.sizes.pop(key)
