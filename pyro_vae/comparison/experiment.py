"""Estimators of the ELBO and its kin, side by side: what they estimate, how well, and at what cost.

Notation: R repeats of one step on one batch of N data, the parameters unchanged.
"""

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vae.comparison.gradient_noise import GradientMoments, ZeroMeanTest
from pyro_vae.comparison.peak_memory import peak_memory
from pyro_vae.comparison.reference_bounds import Target, target
from pyro_vae.comparison.result import PARAMETERS, Comparison, Measured, Reference, summarise
from pyro_vae.evaluation.importance_sampling import evaluate
from pyro_vae.inference.guide_check import check_mean_field
from pyro_vae.objectives.estimators import family, label
from pyro_vae.objectives.kl_weighting import KLWeighted
from pyro_vae.objectives.log_terms import terms
from pyro_vae.objectives.sites import Program, require_programs
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.isolation import derived_seed, evaluation_mode, isolated_generators
from pyro_vae.utils.validation import NonFiniteError, require_count

__all__ = ["compare_estimators"]

_NOISE, _REFERENCE = 40, 41  # streams of random numbers
_ROUNDS = 7  # of timing


def compare_estimators(
    model: Program,
    guide: Program,
    data: Tensor,
    estimators: Sequence[ELBO] | Mapping[str, ELBO],
    *,
    num_repeats: int = 100,
    reference: Tensor | None = None,
    num_reference_particles: int = 1000,
    seed: int = 0,
    max_plate_nesting: int = 1,
    progress: bool = True,
) -> Comparison:
    r"""Compare estimators by repeated steps on one batch, at the same parameters.

    For each: the value, its standard error, and its bias against log p(x); its bias against the bound that it
    is to estimate; of its gradient, in the model's and the guide's parameters apart, the variance, the
    signal-to-noise ratio and a test for bias; the time and memory of a step. `print` shows the tables, and
    says in words which differences exceed their errors.

    The gradient is that of the mean bound over the data. Of R draws g of it,

    .. math:: \mathrm{variance} = E \|g - E g\|^2, \qquad \mathrm{SNR} = \|E g\| / \sqrt{E \|g - E g\|^2},

    for one coordinate the SNR of Rainforth et al. (2018). Averaging n steps multiplies SNR² by n; an
    *effective sample* is what brings it to 1, so its time is that of a step over SNR².

    An estimator's value and gradient are held against its own bound's, which follow from the definition of
    the bound alone, through no shortcut (`targets.Plain`). With `KLWeighted` the gradient is that of the
    weighted bound, and the value that of the bound at β = 1.

    In repeat r all estimators start from the same random numbers: those with as many particles share their
    draws, so that differences between them show beside less noise. The pair runs in evaluation mode. Its
    mode, its parameters and their gradients, torch's generators and Pyro's parameter store are left as they
    were.

    Args:
        model: A Pyro model of one batch; for a VAE, `vae.model`. Parameters count as the model's or the
            guide's as the two show them to Pyro; one that both show counts in both.
        guide: A Pyro guide of the same argument; for a VAE, `vae.guide`.
        data: The batch, (N, *event_shape), in the support of the likelihood.
        estimators: What to compare; in a mapping by names of your own.
        num_repeats: R ≥ 10.
        reference: Exact log p(x) of each datum, (N,). By default it is estimated by importance sampling,
            and its error is part of every t.
        num_reference_particles: Draws for each datum of that estimate.
        seed: Non-negative integer from which every random number is derived.
        max_plate_nesting: Dimensions that the pair's own plates take; see `terms`.
        progress: Show a progress bar, in a terminal or a notebook.

    Raises:
        TypeError: If the model or the guide cannot be called, the estimators are not all a
            `pyro.infer.ELBO`, the data no tensor, or a number no integer.
        ValueError: If there is no estimator, R is below 10, the reference has another shape or is not
            finite, the pair or the data are unfit (see `terms`), or an estimator is wrong for the pair.
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
    require_programs("compare_estimators(vae.model, vae.guide, x, estimators)", model, guide)
    require_count("num_repeats", num_repeats, minimum=10)
    require_count("num_reference_particles", num_reference_particles, minimum=2)
    if not isinstance(data, Tensor):
        raise TypeError(f"data must be a tensor, one batch such as x[:128]; got {type(data).__name__}")
    candidates = [
        _Candidate(name, estimator, target(estimator, max_plate_nesting=max_plate_nesting))
        for name, estimator in _named(estimators).items()
    ]
    with _undisturbed(model, guide, data.device, derived_seed(seed, _NOISE)) as restore:
        step = _Step(model, guide, data, max_plate_nesting=max_plate_nesting)
        restore(step.parameters)
        for candidate in candidates:
            if isinstance(_innermost(candidate.estimator), TraceMeanField_ELBO):
                check_mean_field(model, guide, data)
        known = _reference(step, reference, num_reference_particles, derived_seed(seed, _REFERENCE), progress)
        with progress_bar(num_repeats * len(candidates), shown=progress, unit=" steps") as bar:
            for group in _by_target(candidates):
                for repeat in range(num_repeats):
                    _repeat(step, group, derived_seed(seed, _NOISE, repeat), num_repeats)
                    bar.update(len(group))
        seconds = _seconds(step, candidates)
        return summarise(
            [_measured(step, candidate, seconds[candidate.name]) for candidate in candidates],
            known,
            num_data=len(data),
            num_repeats=num_repeats,
            seed=seed,
            dtype=str(step.dtype).removeprefix("torch."),
            device=str(data.device),
        )


@dataclass
class _Candidate:
    """An estimator under comparison, and what has been gathered of it."""

    name: str
    estimator: ELBO
    target: Target | None
    bound: list[float] = field(default_factory=list)
    plain_bound: list[float] = field(default_factory=list)
    moments: dict[str, GradientMoments] = field(default_factory=dict)
    plain_moments: dict[str, GradientMoments] = field(default_factory=dict)
    tests: dict[str, ZeroMeanTest] = field(default_factory=dict)


def _named(estimators: Sequence[ELBO] | Mapping[str, ELBO]) -> dict[str, ELBO]:
    """Give each estimator a name of its own; as copies, for some change as they are used."""
    if not isinstance(estimators, Iterable) or isinstance(estimators, str):
        raise TypeError(f"estimators must be a list of pyro.infer.ELBO, or a mapping; got {estimators!r}")
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    else:
        named = {}
        for estimator in estimators:
            name = label(estimator) if isinstance(estimator, ELBO) else repr(estimator)
            alike = sum(other == name or other.startswith(f"{name} #") for other in named)
            named[f"{name} #{alike + 1}" if alike else name] = estimator
    if not named:
        raise ValueError("there is no estimator to compare: give at least one")
    for name, estimator in named.items():
        if not isinstance(estimator, ELBO):
            kind = f"{estimator.__name__} itself: call it" if isinstance(estimator, type) else repr(estimator)
            raise TypeError(f"an estimator must be a pyro.infer.ELBO, such as Trace_ELBO(); got {kind}")
        if isinstance(estimator, KLWeighted):  # of the present step, for its schedule would go on
            named[name] = KLWeighted(
                copy.copy(estimator.estimator),
                estimator.beta,
                free_bits=estimator.free_bits,
                per=estimator.per,
            )
        else:
            named[name] = copy.copy(estimator)
    return named


def _innermost(estimator: ELBO) -> ELBO:
    return estimator.estimator if isinstance(estimator, KLWeighted) else estimator


class _Step:
    """One evaluation of an estimator: its value and gradient per datum."""

    def __init__(self, model: Program, guide: Program, data: Tensor, *, max_plate_nesting: int):
        self.model, self.guide, self.data = model, guide, data
        self.max_plate_nesting = max_plate_nesting
        with torch.no_grad():
            first = terms(model, guide, data, max_plate_nesting=max_plate_nesting)
        self.dtype = first.log_weight.dtype
        num_data = first.sites.num_data
        weight = torch.as_tensor(first.scale, dtype=torch.float64).expand(num_data).cpu()
        self.total = float(weight.sum())  # what a loss is the mean bound times
        self.weight = weight / weight.sum()
        guide_trace = poutine.trace(guide).get_trace(data)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(data)
        self.parameters = list({**_parameters(model_trace), **_parameters(guide_trace)})
        places = {parameter: place for place, parameter in enumerate(self.parameters)}
        self.places = {
            name: [places[parameter] for parameter in _parameters(trace)]
            for name, trace in zip(PARAMETERS, (model_trace, guide_trace), strict=True)
        }

    def __call__(self, estimator: ELBO) -> tuple[float, dict[str, Tensor]]:
        """Estimate the bound, and its gradient in the parameters of each kind, flattened."""
        loss, gradient = self.loss_and_gradient(estimator)
        flat = {
            name: torch.cat([gradient[place].flatten() for place in places]) / -self.total
            for name, places in self.places.items()
            if places
        }
        return -loss / self.total, flat

    def loss_and_gradient(self, estimator: ELBO) -> tuple[float, list[Tensor]]:
        """Take what training takes of an estimator, in the way of `pyro_vae.SVI`."""
        if hasattr(estimator, "differentiable_loss"):
            loss = estimator.differentiable_loss(self.model, self.guide, self.data)
            if not (self.parameters and loss.requires_grad):
                return float(loss.detach()), [torch.zeros_like(p) for p in self.parameters]
            gradient = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            return float(loss.detach()), list(gradient)
        for parameter in self.parameters:  # such as TraceGraph_ELBO
            parameter.grad = None
        value = float(estimator.loss_and_grads(self.model, self.guide, self.data))
        return value, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]


def _parameters(trace: poutine.Trace) -> dict[Tensor, None]:
    """The parameters that a trace shows, in order, unconstrained, each once."""
    sites = [site for site in trace.nodes.values() if site["type"] == "param"]
    return dict.fromkeys(site["value"].unconstrained() for site in sites)


def _by_target(candidates: list[_Candidate]) -> list[list[_Candidate]]:
    """Put together the candidates that are judged by the same plain estimators."""
    groups: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        key = repr(candidate.target and candidate.target.plain)
        groups.setdefault(key, []).append(candidate)
    return list(groups.values())


def _repeat(step: _Step, group: list[_Candidate], seed: int, num_repeats: int) -> None:
    """Let each of a group take one step from the same random numbers, and the plain estimators with them."""
    bound = group[0].target
    plain: dict[str, tuple[float, dict[str, Tensor]]] = {}
    if bound is not None:
        for name, estimator in bound.plain.items():
            if name == "guide" and repr(estimator) == repr(bound.plain["model"]):
                plain[name] = plain["model"]
                continue
            torch.manual_seed(seed)
            plain[name] = step(estimator)
    for candidate in group:
        torch.manual_seed(seed)
        value, gradient = step(candidate.estimator)
        finite = all(bool(part.isfinite().all()) for part in gradient.values())
        if not (math.isfinite(value) and finite):
            what = "a gradient" if math.isfinite(value) else f"the value {value}"
            raise NonFiniteError(
                f"{candidate.name} gave {what} that is not finite on its step {len(candidate.bound) + 1}; "
                "check the parameters and the data"
            )
        candidate.bound.append(value)
        if plain:
            candidate.plain_bound.append(plain["model"][0])
        for name, draw in gradient.items():
            candidate.moments.setdefault(name, GradientMoments()).add(draw)
            if plain:
                candidate.plain_moments.setdefault(name, GradientMoments()).add(plain[name][1][name])
                test = candidate.tests.setdefault(name, ZeroMeanTest(num_repeats))
                test.add(draw - plain[name][1][name])


def _seconds(step: _Step, candidates: list[_Candidate]) -> dict[str, float]:
    """Shortest wall-clock time of a step, of several: what other processes add to it is left out."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(_ROUNDS):
        for candidate in candidates:
            started = time.perf_counter()
            step.loss_and_gradient(candidate.estimator)
            if step.data.device.type != "cpu":
                torch.accelerator.synchronize(step.data.device)
            seconds[candidate.name].append(time.perf_counter() - started)
    return {name: min(times) for name, times in seconds.items()}


def _measured(step: _Step, candidate: _Candidate, seconds: float) -> Measured:
    """Sum up a candidate."""
    rounding = (1e3 * torch.finfo(step.dtype).eps) ** 2
    return Measured(
        name=candidate.name,
        family=family(candidate.estimator),
        num_particles=candidate.estimator.num_particles,
        target=candidate.target,
        bound=candidate.bound,
        plain_bound=candidate.plain_bound,
        gradients={
            name: moments.summary(
                negligible=rounding * candidate.plain_moments.get(name, moments).mean_square
            )
            for name, moments in candidate.moments.items()
        },
        gradient_bias_t={name: test.t for name, test in candidate.tests.items()},
        seconds=seconds,
        peak_bytes=peak_memory(lambda: step.loss_and_gradient(candidate.estimator)),
    )


def _reference(step: _Step, exact: Tensor | None, num_particles: int, seed: int, progress: bool) -> Reference:
    """The exact log p(x), averaged over the batch, or an estimate of it."""
    if exact is not None:
        if exact.shape != step.weight.shape:
            raise ValueError(
                f"reference must hold log p(x) of each datum, shape {tuple(step.weight.shape)}; "
                f"got {tuple(exact.shape)}"
            )
        if not exact.isfinite().all():
            raise ValueError(f"reference must be finite; {int((~exact.isfinite()).sum())} of it are not")
        return Reference("log p(x), as given", float(step.weight @ exact.detach().cpu().double()), 0.0)
    judged = evaluate(
        SimpleNamespace(model=step.model, guide=step.guide),
        step.data,
        num_particles=num_particles,
        seed=seed,
        aggregate_size=0,
        max_plate_nesting=step.max_plate_nesting,
        progress=progress,
    )
    return Reference(
        f"log p(x), estimated by L_{num_particles} of the guide",
        float(step.weight @ judged.per_datum.log_evidence),
        float((step.weight * judged.per_datum.log_evidence_mc_se).square().sum().sqrt()),
        num_unreliable=int((judged.pareto_k > 0.7).sum()),
    )


@contextlib.contextmanager
def _undisturbed(model: Program, guide: Program, device: torch.device, seed: int) -> Iterator[Any]:
    """Run in evaluation mode with random numbers of its own; restore modes, gradients and Pyro's store.

    Yields a function that takes more tensors whose gradients are to be restored.
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
