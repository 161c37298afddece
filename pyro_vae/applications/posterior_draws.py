"""The posterior p(x, z|y) of clean data given observations y, by three methods.

- "importance": z_s ~ q(z|guess of x), weights ∝ p(y|z) p(z) / q(z), Pareto-smoothed; k̂ tells where it fails.
- "gibbs", pseudo-Gibbs: x ~ p(x|y, z) and z ~ q(z|x) in turn. Biased, as q(z|x) is not p(z|x).
- "metropolis", Metropolis within Gibbs: z' ~ q(z|x) is accepted with the probability that makes p(x, z|y) the
  stationary distribution; then z moves by a random walk that leaves p(z|y) invariant; then x ~ p(x|y, z).

Shapes: y (N, *event_shape), n of them processed at once; S particles; C chains; z (S, n, K) or (C, n, K).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.applications.conditioning import Conditional, condition
from pyro_vae.applications.corruptions import LinearMap
from pyro_vae.evaluation.importance_weights import pareto_smoothed
from pyro_vae.utils.elements import elementwise
from pyro_vae.utils.isolation import derived_seed, evaluating, seed_at, seed_generators
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE

__all__ = ["METHODS", "Observed", "Restored", "draw_posterior"]

METHODS = ("auto", "importance", "gibbs", "metropolis")
_VALUES = 3 * 2**20  # elements of x decoded at once
_CHAINS = 20
_ACCEPTED = 0.3  # share of accepted steps that the random walk aims at
_TOO_HEAVY = 0.7  # k̂ above which importance sampling is not trusted
_NAMES = {"metropolis": "Metropolis within Gibbs", "gibbs": "pseudo-Gibbs"}
_DRAWS = 22  # a stream of random numbers


@dataclass(frozen=True, eq=False, repr=False)
class Restored:
    """Posterior of clean data x given what was observed of them, for N examples.

    Attributes:
        mean: E[x|y], (N, *event_shape). Of binary data it is a probability. Where `impute` was given a data
            frame, mean and std are data frames.
        std: Standard deviation of x given y, (N, *event_shape); 0 where x was observed.
        draws: M draws of x from p(x|y), (M, N, *event_shape), equally weighted.
        effective_sample_size: (Σ w)² / Σ w² of importance sampling; of chains, estimated from the spread of
            their means, (N,).
        pareto_k: Shape k̂ of the importance weights' tail, (N,); NaN where importance sampling was not tried.
        from_chains: True where the result is that of chains, not of importance sampling, (N,).
    """

    mean: Tensor
    std: Tensor
    draws: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    from_chains: Tensor

    def quantile(self, q: float | Tensor) -> Tensor:
        """Return quantiles of the draws, (N, *event_shape), or (len(q), N, *event_shape) for several.

        Between the M draws they are interpolated; tails need many draws.
        """
        # torch's quantile is limited in size, so sorted draws are interpolated here
        ordered = self.draws.sort(0).values
        place = torch.as_tensor(q, dtype=torch.float64) * (len(ordered) - 1)
        if not ((place >= 0) & (place <= len(ordered) - 1)).all():
            raise ValueError(f"q must lie in [0, 1]; got {q}")
        low = place.floor().long().clamp(max=max(0, len(ordered) - 2))
        share = (place - low).to(ordered.dtype).reshape(place.shape + (1,) * (ordered.dim() - 1))
        high = (low + 1).clamp(max=len(ordered) - 1)
        return ordered[low] + share * (ordered[high] - ordered[low])  # exact where the two are equal

    def __repr__(self) -> str:
        return (
            f"Restored({len(self.mean):,} examples of {tuple(self.mean.shape[1:])}, {len(self.draws):,} "
            f"draws, {int(self.from_chains.sum()):,} from chains)"
        )


@dataclass(frozen=True, eq=False)
class Observed:
    """Observations of n examples under a VAE.

    Attributes:
        vae: The model.
        y: (n, *event_shape), 0 where missing.
        missing: True where nothing was observed, (n, *event_shape).
        corruption: p(y_d|x_d), or None where elements are observed as they are.
        event_shape: Shape of an example x, which y has too, but through a linear map.
    """

    vae: VAE
    y: Tensor
    missing: Tensor
    corruption: Any
    event_shape: torch.Size

    def __getitem__(self, rows: Any) -> "Observed":
        """Return the observations of some examples."""
        return dataclasses.replace(self, y=self.y[rows], missing=self.missing[rows])

    def given(self, z: Tensor) -> Conditional:
        """Return the elements of x given y and z (*, n, K)."""
        base = elementwise(self.vae.decode(z))
        return condition(base, self.y, self.missing, self.corruption, event_dim=len(self.event_shape))

    def log_joint(self, elements: Conditional, z: Tensor) -> Tensor:
        """Return log p(y, z), (*, n), from the elements at z."""
        by_element = elements.log_prob()
        log_likelihood = by_element.flatten(z.dim() - 1).sum(-1)
        return log_likelihood + self.vae.prior().log_prob(z)

    @property
    def guess(self) -> Tensor:
        """Rough estimate of x, 0 where missing, which the guide encodes first."""
        x = self.y if self.corruption is None else getattr(self.corruption, "guess", lambda y: y)(self.y)
        return x.reshape(-1, *self.event_shape) if self.is_mapped else torch.where(self.missing, 0.0, x)

    @property
    def is_mapped(self) -> bool:
        """Whether y is a linear map of x, and no observation of single elements."""
        return isinstance(self.corruption, LinearMap)

    @property
    def numbers_per_draw(self) -> int:
        """Numbers that are held for each example and draw of z."""
        size = self.event_shape.numel()
        return self.y.shape[1] * (self.y.shape[1] + 2 * size) if self.is_mapped else size

    def guide(self) -> Any:
        """Return q(z|guess)."""
        return self.vae.encode(self.guess, observed=None if self.is_mapped else ~self.missing)

    @property
    def blank(self) -> Tensor:
        """True for examples of which nothing was observed, (n,): their posterior is the prior."""
        return self.missing.flatten(1).all(1)

    def start(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw z (count, n, K) from q(z|guess), or from the prior for blank examples, and its log-density."""
        q, prior = self.guide(), self.vae.prior()
        z = q.sample((count,))
        log_q = q.log_prob(z)
        if self.blank.any():
            drawn = prior.sample((count, len(self.y)))
            z = torch.where(self.blank[:, None], drawn, z)
            log_q = torch.where(self.blank, prior.log_prob(drawn), log_q)
        return z, log_q


def draw_posterior(
    observed: Observed, *, method: str, num_particles: int, num_draws: int, seed: int
) -> Restored:
    """Draw x given y for all examples, a few at a time.

    Raises:
        ValueError: If the method is unknown, or a number is below 1.
        CorruptionError: If the corruption does not go with the likelihood.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    require_count("num_particles", num_particles)
    require_count("num_draws", num_draws)
    at_once = num_particles if method in ("auto", "importance") else min(num_particles, _CHAINS)
    size = max(1, _VALUES // (at_once * observed.numbers_per_draw))
    stream = derived_seed(seed, _DRAWS)
    device = observed.y.device
    parts = []
    with evaluating(observed.vae, device, seed):
        for number, rows in enumerate(torch.arange(len(observed.y)).split(size)):
            seed_generators(device, seed_at(stream, number))
            parts.append(_restore(observed[rows], method, num_particles, num_draws))
    names = [field.name for field in dataclasses.fields(Restored)]
    joined = {name: torch.cat([getattr(p, name) for p in parts], dim=int(name == "draws")) for name in names}
    return Restored(**joined)


def _restore(observed: Observed, method: str, num_particles: int, num_draws: int) -> Restored:
    if method in ("gibbs", "metropolis"):
        return _chains(observed, num_particles, num_draws, metropolis=method == "metropolis")
    found = _importance(observed, num_particles, num_draws)
    heavy = found.pareto_k > _TOO_HEAVY
    if method == "importance" or not heavy.any():
        return found
    rows = heavy.nonzero().flatten()
    chains = _chains(observed[rows], num_particles, num_draws, metropolis=True)
    for name in ("mean", "std", "effective_sample_size", "from_chains"):
        getattr(found, name)[rows] = getattr(chains, name)
    found.draws[:, rows] = chains.draws
    return found


def _importance(observed: Observed, num_particles: int, num_draws: int) -> Restored:
    """Weigh draws of z from the guide by p(y, z) / q(z)."""
    z, log_q = observed.start(num_particles)
    particles = max(1, _VALUES // (len(observed.y) * observed.numbers_per_draw))
    log_joint = torch.cat([observed.log_joint(observed.given(part), part) for part in z.split(particles)])
    smoothed, k = pareto_smoothed(log_joint - log_q)
    weight = smoothed.exp()
    moments = _Moments(observed)
    for part, share in zip(z.split(particles), weight.split(particles), strict=True):
        moments.add(observed.given(part), share.to(z))
    index = torch.multinomial(weight.T, num_draws, replacement=True).T.to(z.device)  # (M, n)
    chosen = z.gather(0, index[..., None].expand(*index.shape, z.shape[-1]))
    draws = torch.cat([observed.given(part).sample() for part in chosen.split(particles)])
    return moments.restored(
        draws,
        effective_sample_size=1 / weight.square().sum(0),
        pareto_k=k,
        from_chains=torch.zeros(len(observed.y), dtype=torch.bool),
    )


class _Moments:
    """Weighted mean and second moment of x given y, over draws of z."""

    def __init__(self, observed: Observed):
        self.observed = observed
        self.centre = observed.guess if observed.is_mapped else observed.y
        self.mean = torch.zeros_like(self.centre, dtype=torch.float64)
        self.spread = torch.zeros_like(self.mean)

    def add(self, elements: Conditional, weight: Tensor) -> None:
        """Add the elements at z, with a weight (S, n) each."""
        mean, variance = elements.moments()
        weight = weight.reshape(*weight.shape, *(1,) * (self.mean.dim() - 1)).double()
        # around the observation, so that nothing cancels where all means are equal to it
        offset = (mean - self.centre).double()
        self.mean += (weight * offset).sum(0)
        self.spread += (weight * (offset.square() + variance)).sum(0)

    def restored(self, draws: Tensor, **diagnostics: Tensor) -> Restored:
        """Return the result; what was observed comes back bit for bit."""
        observed = self.observed
        mean = (self.centre + self.mean).to(observed.y)
        std = (self.spread - self.mean.square()).clamp(min=0.0).sqrt().to(observed.y)
        if observed.corruption is None:
            mean = torch.where(observed.missing, mean, observed.y)
        return Restored(mean, std, draws, **diagnostics)


def _chains(observed: Observed, num_particles: int, num_draws: int, *, metropolis: bool) -> Restored:
    """Run C chains per example, of which num_particles states are kept after as many steps of warm-up."""
    count = min(num_particles, _CHAINS)
    kept = math.ceil(num_particles / count)
    chain = _Chain(observed, count)
    for _ in range(kept):
        chain.step(metropolis=metropolis, adapt=0.5)
    moments, log_joints, states = _Moments(observed), [], []
    for _ in range(kept):
        chain.step(metropolis=metropolis)
        moments.add(chain.elements, torch.full_like(chain.log_joint, 1 / (kept * count)))
        log_joints.append(chain.log_joint)
        states.append(chain.z)
    z = torch.cat(states)
    order = torch.linspace(0, len(z) - 1, num_draws).round().long()  # spread over all steps and chains
    particles = max(1, _VALUES // (len(observed.y) * observed.numbers_per_draw))
    draws = torch.cat([observed.given(part).sample() for part in z[order].split(particles)])
    return moments.restored(
        draws,
        effective_sample_size=_spread_of_chains(torch.stack(log_joints)),
        pareto_k=torch.full((len(observed.y),), math.nan, dtype=torch.float64),
        from_chains=torch.ones(len(observed.y), dtype=torch.bool),
    )


def _spread_of_chains(values: Tensor) -> Tensor:
    """Estimate the number of independent draws from values (T, C, n), by the spread of the chains' means."""
    T, C, _ = values.shape
    if T * C == 1:
        return torch.ones(values.shape[2], dtype=torch.float64)
    values = values.double().cpu()
    total = values.flatten(0, 1).var(0)
    between = values.mean(0).var(0) if C > 1 else total
    size = C * total / between.clamp(min=1e-300)
    return torch.where(total > 0, size.clamp(1, T * C), 1.0)


class _Chain:
    """C Markov chains per example on (x, z); `elements` is x given y at the present z."""

    def __init__(self, observed: Observed, count: int):
        self.observed = observed
        self.z, _ = observed.start(count)
        try:
            width = observed.guide().stddev
        except (AttributeError, NotImplementedError):
            width = torch.ones_like(self.z[0])
        self.width = torch.where(observed.blank[:, None], 1.0, width)
        self.log_step = torch.zeros(len(observed.y), dtype=self.z.dtype, device=self.z.device)
        self.moved_to(self.z)

    def moved_to(self, z: Tensor) -> None:
        """Set the state to z."""
        self.z, self.elements = z, self.observed.given(z)
        self.log_joint = self.observed.log_joint(self.elements, z)

    def step(self, *, metropolis: bool, adapt: float = 0.0) -> None:
        """Draw x given z, move z given x, then, if exact, move z given y alone.

        Args:
            metropolis: Accept and refuse, so that p(x, z|y) is stationary; else accept every z ~ q(z|x).
            adapt: Rate at which the random walk's step follows its acceptance, 0 after the warm-up.
        """
        self._move_given_x(self.elements.sample(), metropolis=metropolis)
        if metropolis:
            self._random_walk(adapt)

    def _move_given_x(self, x: Tensor, *, metropolis: bool) -> None:
        vae, shape = self.observed.vae, self.z.shape
        q = vae.encode(x.flatten(0, 1))
        proposed = q.sample().reshape(shape)
        proposed = torch.where(self.observed.blank[:, None], vae.prior().sample(shape[:-1]), proposed)
        if not metropolis:
            self.moved_to(proposed)
            return
        log_ratio = self._log_weight(q, x, proposed) - self._log_weight(q, x, self.z)
        accept = torch.rand_like(log_ratio).log() < torch.where(self.observed.blank, 0.0, log_ratio)
        self.moved_to(torch.where(accept[..., None], proposed, self.z))

    def _log_weight(self, q: Any, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z) − log q(z|x), (C, n)."""
        return self.observed.vae.log_joint(x, z) - q.log_prob(z.flatten(0, 1)).reshape(z.shape[:-1])

    def _random_walk(self, adapt: float) -> None:
        step = self.log_step.exp()[:, None] * self.width
        proposed = self.z + step * torch.randn_like(self.z)
        elements = self.observed.given(proposed)
        log_joint = self.observed.log_joint(elements, proposed)
        accept = torch.rand_like(log_joint).log() < log_joint - self.log_joint
        self.log_step += adapt * (accept.to(step).mean(0) - _ACCEPTED)
        self.moved_to(torch.where(accept[..., None], proposed, self.z))
