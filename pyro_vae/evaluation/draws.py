"""Evaluation data: validated, binarised once, iterated with guide draws in memory-bounded chunks.

A *pair* is any object with a generative model and a guide. It runs inside `isolation.evaluating`: in
evaluation mode, without gradients and with a separate random stream, so that evaluation does not change
training. Notation: N examples, n of them in a chunk, S particles z_s ~ q(z|x) per example.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_vae.data.batches import Batches
from pyro_vae.data.images import Images
from pyro_vae.data.sources import arguments, num_rows, told_of_missing
from pyro_vae.engine.repeated import Repeated
from pyro_vae.inference.guide_check import require_fit
from pyro_vae.inference.observed_values import check_of
from pyro_vae.objectives.log_terms import PairSites, Terms, terms
from pyro_vae.objectives.pair import make_parameters, waits_to_run
from pyro_vae.objectives.sites import Site
from pyro_vae.utils.frames import columns_trained_on, require_columns
from pyro_vae.utils.isolation import derived_seed, seed_at, seed_generators
from pyro_vae.utils.processes import Processes
from pyro_vae.utils.validation import NonFiniteError

__all__ = [
    "Chunk",
    "Pair",
    "by_example",
    "chunk_lengths",
    "chunk_sizes",
    "chunks",
    "in_chunks",
    "prepare_data",
    "require_finite",
]

# Largest number of draws decoded at once, and of values in them: freed memory that the process keeps for
# reuse holds four such arrays.
_ROWS, _VALUES = 2**13, 3 * 2**20
_DRAWS = 50  # a stream of random numbers
_PARTICLES = 250  # per example at once, so that encoding an example is cheap compared with decoding its draws


class Pair(Protocol):
    """A generative model and a guide, such as a `VAE`: two Pyro functions of the same arguments."""

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """p(z) p(x|z), with x observed."""

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """q(z|x)."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Guide draws for n consecutive examples: log-densities (S, n), in nats.

    Attributes:
        first_index: Index of the first example.
        batch: The examples: x (n, *event_shape), or a tuple or dict of arguments.
        first_terms: Terms of the chunk's first run, of at most S particles, for closed forms and sites.
        log_likelihood: log p(x|z).
        log_prior: log p(z).
        log_guide: log q(z|x).
        draws: Latent values by site, (S, n, *others, *event) as in `by_example`; empty unless kept.
    """

    first_index: int
    batch: Any
    first_terms: Terms
    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    draws: dict[str, Tensor]

    @property
    def log_weight(self) -> Tensor:
        """Log importance weights log p(x, z) − log q(z|x), (S, n)."""
        return self.log_likelihood + self.log_prior - self.log_guide


def prepare_data(
    pair: Pair, data: Any, *, binarize: str | None, seed: int, missing: str | None = None
) -> Batches:
    """Validate data and parameters, and binarise the data once, so that every pass sees the same values.

    Args:
        pair: A model and a guide; batches go to the device of its parameters.
        data: (N, *event_shape).
        binarize: None, "dynamic" or "fixed" (the same here: one draw from `seed`), or "threshold".
        seed: Seed of the binarisation.
        missing: As in `fit`.

    Raises:
        TypeError: If the data are of a kind that `fit` does not take, or not floating-point.
        ValueError: If the data are empty, have the wrong shape, or lie outside the likelihood's support.
        NonFiniteError: If a parameter is infinite or NaN.
    """
    require_columns(columns_trained_on(pair), data)
    if isinstance(data, Images) and data.binarize == "dynamic" and binarize != "threshold":
        data, binarize = dataclasses.replace(data, binarize=None), binarize or "dynamic"
    parameters = dict(pair.named_parameters()) if isinstance(pair, nn.Module) else {}
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"parameter {name!r} is not finite: load an earlier checkpoint")
    device = next((parameter.device for parameter in parameters.values()), getattr(data, "device", "cpu"))
    binarize = "fixed" if binarize == "dynamic" else binarize
    dtype = next((parameter.dtype for parameter in parameters.values()), None)
    batches = Batches(
        data,
        binarize=binarize,
        seed=seed,
        device=device,
        dtype=dtype,
        missing_for=told_of_missing(missing, pair),
    )
    if waits_to_run(pair):
        make_parameters(pair, *arguments(batches.peek(len(batches))))  # all: they may be of each example
    batches.check(check_of(pair, batches))
    return batches


def chunk_sizes(batches: Batches, num_particles: int) -> tuple[int, int]:
    """Return the number of examples per chunk, and of their particles that are run at once.

    Both depend on the shape of the data and the number of particles alone.
    """
    rows = max(1, min(_ROWS, _VALUES // math.prod(batches.shape[1:])))
    particles = min(num_particles, _PARTICLES, rows)
    return max(1, rows // particles), particles


def chunk_lengths(total: int, size: int) -> list[int]:
    """Divide a total into chunks of length `size`; the last may be shorter.

    Example:
        >>> chunk_lengths(7, 3)
        [3, 3, 1]
    """
    return [min(size, total - start) for start in range(0, total, size)]


def in_chunks(
    batches: Batches, size: int, stream: int, *, processes: Processes | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield the examples, a batch of n, in order, `size` at a time, each with the index of its first.

    Of several processes, each has those chunks that `Processes.interleave` puts in order again.

    Every evaluation iterates its data here. Torch's generators are seeded for each chunk, so that its draws
    are a function of the seed, the stream and the number of the chunk, and of no earlier chunk.
    """
    seed = derived_seed(batches.seed, stream)
    first, every = (0, 1) if processes is None else (processes.rank, processes.size)
    for number, batch in zip(count(first, every), batches.in_order(size, first=first, every=every)):
        seed_generators(batches.device, seed_at(seed, number))
        yield number * size, batch


def chunks(
    pair: Pair,
    batches: Batches,
    num_particles: int,
    *,
    max_plate_nesting: int,
    keep_draws: bool = False,
    advance: Callable[[int], object] = lambda count: None,
    processes: Processes | None = None,
) -> Iterator[Chunk]:
    """Draw S particles per example from the guide and yield their terms, a few examples at a time.

    Args:
        pair: A model and a guide.
        batches: The N examples.
        num_particles: S.
        max_plate_nesting: See `terms`.
        keep_draws: Fill `Chunk.draws`.
        advance: Called with the number of draws made since the last call.
        processes: Those that share the chunks; see `in_chunks`.

    Raises:
        GuideError: If the guide does not fit the model on the first chunk.
        NonFiniteError: If an importance weight is infinite or NaN.
    """
    size, particles = chunk_sizes(batches, num_particles)
    runs = len(batches) // size * (num_particles // particles - 1)
    repeated = _Runs(pair, particles, runs, max_plate_nesting=max_plate_nesting)
    for first_index, batch in in_chunks(batches, size, _DRAWS, processes=processes):
        args, kwargs = arguments(batch)
        if first_index == 0:
            require_fit(pair.model, pair.guide, *args, **kwargs)
        log_terms: list[Tensor] = []
        draws: dict[str, list[Tensor]] = defaultdict(list)
        for num_draws in chunk_lengths(num_particles, particles):
            if log_terms and num_draws == particles and not keep_draws:
                log_terms.append(repeated(args, kwargs))
                advance(num_draws * num_rows(batch))
                continue
            t = terms(
                pair.model,
                pair.guide,
                *args,
                num_particles=num_draws,
                max_plate_nesting=max_plate_nesting,
                **kwargs,
            )
            if not log_terms:
                first_terms = t
            log_terms.append(_stacked(t))
            for name in t.sites.latent if keep_draws else ():
                draws[name].append(by_example(t.sites, t.sites.guide[name], t.sites.draws[name]))
            advance(num_draws * num_rows(batch))
        joined = {name: torch.cat(values) for name, values in draws.items()}
        log_likelihood, log_prior, log_guide = torch.cat(log_terms, dim=1)
        chunk = Chunk(first_index, batch, first_terms, log_likelihood, log_prior, log_guide, joined)
        require_finite(chunk.log_weight, first_index=first_index)
        yield chunk


def _stacked(t: Terms) -> Tensor:
    """Return log p(x|z), log p(z) and log q(z|x), (3, S, n)."""
    return torch.stack([t.log_likelihood, t.log_prior, t.log_guide])


class _Runs:
    """Further runs of a pair on draws of the same examples, by a compiled graph where that pays.

    Args:
        pair: The pair.
        particles: S, of each run.
        calls: Number of runs to expect.
        max_plate_nesting: See `terms`.
    """

    def __init__(self, pair: Pair, particles: int, calls: int, *, max_plate_nesting: int):
        self.pair, self.names = pair, list[str]()
        self.options = {"num_particles": particles, "max_plate_nesting": max_plate_nesting}
        self.repeated = Repeated(self._run, [pair.model, pair.guide], calls=calls)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self.names = list(kwargs)
        values = [*args, *kwargs.values()]
        if all(isinstance(value, Tensor) for value in values):
            return self.repeated(*values)
        return self._run(*values)

    def _run(self, *values: Any) -> Tensor:
        cut = len(values) - len(self.names)
        named = dict(zip(self.names, values[cut:], strict=True))
        return _stacked(terms(self.pair.model, self.pair.guide, *values[:cut], **self.options, **named))


def by_example(sites: PairSites, site: Site, values: Tensor) -> Tensor:
    """Move the data dimension of a site's values second: (*batch, *event) to (S, N, *others, *event).

    S and the other plates' dimensions *others have size 1 where the values do not depend on them.
    """
    return sites.in_full(values, site["fn"].event_dim).movedim(sites.data_axis, 1)


def require_finite(log_weight: Tensor, *, first_index: int) -> None:
    """Raise unless all log weights (S, n) are finite; `first_index` is the index of the first example."""
    wrong = (~log_weight.isfinite()).sum(0)
    if not wrong.any():
        return
    indices = wrong.nonzero().flatten().tolist()
    shown = ", ".join(str(first_index + index) for index in indices[:5]) + (", …" if len(indices) > 5 else "")
    raise NonFiniteError(
        f"log importance weights are infinite or NaN for {len(indices)} of the examples {first_index} to "
        f"{first_index + log_weight.shape[1] - 1}, counted from 0: index {shown}; example "
        f"{first_index + indices[0]} has {int(wrong[indices[0]])} such weights of {len(log_weight)}. Check "
        "the parameters and these examples"
    )
