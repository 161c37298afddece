"""Bits back: code examples at the rate of the negative ELBO, on stacks that also supply the draws of z.

To encode x: pop z by q(z|x), push x by p(x|z), push z by p(z). The stack grows by
−log p(x|z) − log p(z) + log q(z|x), on average the negative ELBO. To decode, in mirror order: pop z, pop x,
push z.

A pop reads mostly the bits of the last push, those of z of the example before. Were z_k drawn from them as
they are, a q(z_k|x) a little wider than p(z_k) would carry z_k away, example by example, to where no image
is. So the top of the stack is stirred before each draw, by XOR with public random bits: then it is a draw.

With S particles, z_1 … z_S are popped, and one of them by the weights w_s = p(x, z_s)/q(z_s|x); the others
are pushed back. The stack grows by −log (1/S) Σ_s w_s, on average the importance-weighted bound.

Examples are dealt to several stacks (lanes), so that a network call computes one example of each.

Source: Townsend, Bird and Barber, 2019, Practical lossless compression with latent variables using bits back
coding, arXiv:1901.04866; Ruan et al., 2021, Improving lossless compression rates via Monte Carlo bits-back
coding, arXiv:2102.11086.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pyro_vae.applications.codec.coder import SeedExhaustedError, Stack
from pyro_vae.applications.codec.errors import CorruptFileError
from pyro_vae.applications.codec.fixed_point import ONE, Integers, exp_negative
from pyro_vae.applications.codec.integer_probabilities import (
    TOTAL,
    counts_at,
    excess_of_weights,
    log_of_counts,
)
from pyro_vae.applications.codec.lattice_model import LatticeModel, symbol_type

__all__ = ["Encoded", "decode", "encode"]

_POSITION_BITS = 32  # of a raw row in a file


@dataclass(frozen=True)
class Encoded:
    """Examples on stacks.

    Args:
        lanes: For each lane, how many words of its seed were read, and the words above the others.
        raw: Positions of the examples that were stored without the model.
        bits: Bits by which each example made its stack grow, float64 (N,).
        latents: Lattice positions of the z by which each was coded, (N, K); 0 for raw ones.
    """

    lanes: list[tuple[int, np.ndarray]]
    raw: np.ndarray
    bits: np.ndarray
    latents: np.ndarray


def encode(model: LatticeModel, symbols: np.ndarray, *, lanes: int, particles: int) -> Encoded:
    """Push examples, as symbols (N, D), on stacks; deterministic."""
    depth = 4 * (particles * model.latent_dim + 4)
    while True:
        try:
            return _Run(model, particles).encode(symbols, [Stack(lane, depth) for lane in range(lanes)])
        except SeedExhaustedError:
            depth *= 2


def decode(
    model: LatticeModel, rows: int, lanes: list[tuple[int, np.ndarray]], raw: np.ndarray, *, particles: int
) -> np.ndarray:
    """Pop examples, as symbols (rows, D), from the stacks that `encode` made.

    Raises:
        CorruptFileError: If the stacks do not hold the examples, or something else is left on them.
    """
    longest = (particles * model.latent_dim + 4) * (rows // len(lanes) + 2)
    if any(depth > 8 * longest for depth, _ in lanes):
        raise CorruptFileError("a lane claims to have read more of its seed than its examples can")
    stacks = [Stack.restored(lane, depth, words) for lane, (depth, words) in enumerate(lanes)]
    parts = list(_Run(model, particles).decode(rows, stacks, set(raw.tolist())))
    if not all(stack.is_seed() for stack in stacks):
        raise CorruptFileError("the bits left at the end are not the seed of the coder")
    return np.concatenate(parts[::-1])


class _Run:
    """The steps of encoding and decoding; each is the mirror of the other."""

    def __init__(self, model: LatticeModel, particles: int):
        self.model = model
        self.particles = particles
        self.choice = _equal(particles)
        self.raw_table = np.broadcast_to(_equal(model.tables.levels), (model.size, model.tables.levels))
        self.raw_bits = -_bits(log_of_counts(counts_at(self.raw_table[:1], np.zeros(1, np.int64))))[0]
        self.raw_bits *= model.size
        if model.tables.levels == 2:
            self.raw_table = np.full(model.size, TOTAL // 2)

    def encode(self, symbols: np.ndarray, stacks: list[Stack]) -> Encoded:
        """Push the examples, one of each lane in a step."""
        raw: list[int] = []
        bits = np.zeros(len(symbols))
        latents = np.zeros((len(symbols), self.model.latent_dim), np.int32)
        for start in range(0, len(symbols), len(stacks)):
            rows = symbols[start : start + len(stacks)]
            posterior = self.model.posterior_tables(rows)
            lanes = enumerate(zip(stacks, posterior, strict=False), start)
            z = np.stack([self._draw(row, stack, q) for row, (stack, q) in lanes])
            tables = self._likelihoods(z)
            log_weights = self._log_weights(rows, z, posterior, tables)
            for i, (row, stack) in enumerate(zip(rows, stacks, strict=False)):
                cost = -_bits(_log_mean_exp(log_weights[i]))
                if cost > self.raw_bits + _POSITION_BITS:
                    self._undraw(start + i, stack, posterior[i], z[i])
                    stack.push(row, self.raw_table)
                    raw.append(start + i)
                    bits[start + i] = self.raw_bits
                    continue
                chosen = self._choose(stack, log_weights[i])
                self._undraw(start + i, stack, posterior[i], z[i], besides=chosen)
                stack.push(row, tables[i, chosen])
                stack.push(z[i, chosen], self.model.prior_tables)
                self._push_choice(stack, chosen, self.choice)
                bits[start + i], latents[start + i] = cost, z[i, chosen]
        return Encoded([stack.stored() for stack in stacks], np.array(raw, np.uint32), bits, latents)

    def decode(self, rows: int, stacks: list[Stack], raw: set[int]) -> Iterator[np.ndarray]:
        """Pop the examples, from the last to the first; yield those of one step, (lanes, D)."""
        lanes, K, S = len(stacks), self.model.latent_dim, self.particles
        for start in range((rows - 1) // lanes * lanes, -1, -lanes):
            count = min(lanes, rows - start)
            modelled = [i for i in range(count) if start + i not in raw]
            z = np.zeros((count, S, K), np.int32)
            chosen = np.zeros(count, np.int64)
            for i in modelled:
                chosen[i] = self._pop_choice(stacks[i], self.choice)
                z[i, chosen[i]] = stacks[i].pop(self.model.prior_tables)
            tables = self.model.likelihood_tables(z[np.arange(count), chosen])
            symbols = np.zeros((count, self.model.size), symbol_type(self.model.tables.levels))
            for i in range(count):
                symbols[i] = stacks[i].pop(tables[i] if i in modelled else self.raw_table)
            self._return_bits(stacks, symbols, z, chosen, {i: start + i for i in modelled})
            yield symbols

    def _return_bits(
        self,
        stacks: list[Stack],
        symbols: np.ndarray,
        z: np.ndarray,
        chosen: np.ndarray,
        modelled: dict[int, int],
    ) -> None:
        """Push the draws of z back, after x is known; `modelled` are the rows, by stack."""
        posterior = self.model.posterior_tables(symbols)
        for i, row in modelled.items():
            self._draw(row, stacks[i], posterior[i], z[i], besides=chosen[i])
        if self.particles > 1 and modelled:
            log_weights = self._log_weights(symbols, z, posterior, self._likelihoods(z))
            for i in modelled:
                self._push_choice(stacks[i], chosen[i], _choice_table(log_weights[i]))
        for i, row in modelled.items():
            self._undraw(row, stacks[i], posterior[i], z[i])

    def _draw(
        self, row: int, stack: Stack, q: Integers, z: np.ndarray | None = None, *, besides: int | None = None
    ) -> np.ndarray:
        """Pop lattice positions (S, K) of a row by q, except of one particle, which z holds."""
        if z is None:
            stack.require((self.particles + 1) * self.model.latent_dim + 1)
            z = np.zeros((self.particles, self.model.latent_dim), np.int32)
        for s in range(self.particles):
            if s != besides:
                stack.stir(row * self.particles + s, self._bits_of_z)
                z[s] = stack.pop(q)
        return z

    def _undraw(
        self, row: int, stack: Stack, q: Integers, z: np.ndarray, *, besides: int | None = None
    ) -> None:
        """Push lattice positions (S, K) of a row by q, except of one particle; the mirror of `_draw`."""
        for s in reversed(range(self.particles)):
            if s != besides:
                stack.push(z[s], q)
                stack.stir(row * self.particles + s, self._bits_of_z)

    @property
    def _bits_of_z(self) -> int:
        """Number of bits that a draw of z reads at most, but for rare values."""
        return self.model.latent_dim * self.model.lattice.bits

    def _likelihoods(self, z: np.ndarray) -> Integers:
        """Return tables of p(x|z), (N, S, D, ...), for z (N, S, K)."""
        tables = self.model.likelihood_tables(z.reshape(-1, z.shape[-1]))
        return tables.reshape(*z.shape[:2], *tables.shape[1:])

    def _log_weights(
        self, symbols: np.ndarray, z: np.ndarray, posterior: Integers, tables: Integers
    ) -> Integers:
        """Return log p(x|z) + log p(z) − log q(z|x), (N, S), in units of 2⁻³⁰ nats."""
        count, S = z.shape[:2]
        log_q = log_of_counts(
            counts_at(np.broadcast_to(posterior[:, None], (count, S, *self._prior)), z)
        ).sum(-1)
        log_prior = log_of_counts(
            counts_at(np.broadcast_to(self.model.prior_tables, (count, S, *self._prior)), z)
        )
        flat = tables.reshape(count * S, *tables.shape[2:])
        log_x = self.model.tables.log_probability(flat, np.repeat(symbols, S, 0)).reshape(count, S)
        return log_x + log_prior.sum(-1) - log_q

    @property
    def _prior(self) -> tuple[int, ...]:
        return self.model.prior_tables.shape

    def _choose(self, stack: Stack, log_weights: Integers) -> int:
        return 0 if self.particles == 1 else self._pop_choice(stack, _choice_table(log_weights))

    def _pop_choice(self, stack: Stack, table: Integers) -> int:
        return 0 if self.particles == 1 else int(stack.pop(table)[0])

    def _push_choice(self, stack: Stack, chosen: int, table: Integers) -> None:
        if self.particles > 1:
            stack.push(np.array([chosen]), table)


def _choice_table(log_weights: Integers) -> Integers:
    """Return excess counts (1, S) in proportion to e^(log weight)."""
    return excess_of_weights(exp_negative(log_weights.max() - log_weights))[None]


def _equal(levels: int) -> Integers:
    """Return excess counts (1, levels) that are equal up to the remainder."""
    return excess_of_weights(np.full((1, levels), ONE))


def _bits(nats: Integers | float) -> np.ndarray:
    return np.asarray(nats) / (ONE * np.log(2))


def _log_mean_exp(log_weights: Integers) -> float:
    """Return log (1/S) Σ e^(log weight), in the same units; only reported and compared, never coded with."""
    largest = log_weights.max()
    return float(largest + ONE * np.log(np.exp((log_weights - largest) / ONE).mean()))
