"""A stack of bits: constriction's ANS coder with integer probabilities, and a seed of public random words.

`pop` reads a symbol from the top of the stack, with probability count / 2²⁴ if the bits are uniform, and
`push` is its inverse. The seed below the first symbol is a fixed public stream, so that its unread part is
not stored.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from pyro_vae.applications.codec.errors import CodecError, CorruptFileError
from pyro_vae.applications.codec.fixed_point import Integers
from pyro_vae.applications.codec.integer_probabilities import TOTAL

__all__ = ["SeedExhaustedError", "Stack"]

_SPARE = 4  # words of the seed beneath those that were read; the coder itself holds two


class SeedExhaustedError(CodecError):
    """A stack whose seed is too short for the next symbols."""


class Stack:
    """A stack of symbols above a seed.

    Args:
        lane: Number of the stream of random words.
        depth: Number of words of the seed.

    Example:
        >>> stack = Stack(lane=0, depth=10)
        >>> zero_counts = np.array([1 << 23, 3 << 22, 100])  # p(0) = 1/2, 3/4, 6e-6
        >>> stack.push(np.array([0, 1, 1]), zero_counts)
        >>> stack.pop(zero_counts)
        array([0, 1, 1], dtype=int32)
        >>> stack.is_seed()
        True
    """

    def __init__(self, lane: int, depth: int):
        self._lane = lane
        self._initial = _initial_words(lane, depth)
        self._coder = _constriction().stack.AnsCoder(self._initial)

    @classmethod
    def restored(cls, lane: int, depth: int, words: np.ndarray) -> "Stack":
        """Return the stack that `stored` described."""
        stack = cls(lane, depth + _SPARE)
        with _ordinary_errors():
            stack._coder = _constriction().stack.AnsCoder(np.concatenate([stack._initial[:_SPARE], words]))
        return stack

    def stored(self) -> tuple[int, np.ndarray]:
        """Return the number of words of the seed that were read, and the words above the others."""
        words, initial = self._coder.get_compressed(), self._initial
        length = min(len(words), len(initial) - 1)
        differ = np.flatnonzero(words[:length] != initial[:length])
        same = int(differ[0]) if len(differ) else length
        return len(initial) - 1 - same, words[same:]

    def is_seed(self) -> bool:
        """Return whether the stack holds its seed alone, as after everything was popped."""
        return np.array_equal(self._coder.get_compressed(), self._initial)

    def require(self, symbols: int) -> None:
        """Raise `SeedExhaustedError` if the stack might be too low to pop this number of symbols."""
        if self._coder.num_words() < symbols + _SPARE:  # each takes less than a word
            raise SeedExhaustedError("the seed is too short")

    def pop(self, tables: Integers) -> np.ndarray:
        """Pop symbols (D,), by counts of 0 (D,) or by excess counts (D, L)."""
        self._require_words()
        with _ordinary_errors():
            return self._coder.decode(*_model(tables))

    def _require_words(self) -> None:
        if self._coder.num_words() <= 2:
            raise CorruptFileError("more symbols are asked for than were stored: the file is damaged")

    def push(self, symbols: np.ndarray, tables: Integers) -> None:
        """Push symbols (D,), by counts of 0 (D,) or by excess counts (D, L)."""
        with _ordinary_errors():
            self._coder.encode_reverse(np.ascontiguousarray(symbols, dtype=np.int32), *_model(tables))

    def stir(self, number: int, bits: int) -> None:
        """XOR the top bits, rounded up to 16, with public random ones of this number; its own inverse."""
        self._require_words()
        count = -(-bits // 16)
        stream = hashlib.shake_256(b"pyro_vae codec, draw %d" % number).digest(2 * count)
        model = _constriction().model.Uniform(1 << 16)
        with _ordinary_errors():
            top = self._coder.decode(model, count) ^ np.frombuffer(stream, "<u2").astype(np.int32)
            self._coder.encode_reverse(top, model)


def _model(tables: Integers) -> tuple[Any, np.ndarray]:
    """Return a family of models and parameters for which it has exactly the given counts.

    constriction takes probabilities. It gives each of L symbols one count, and the other 2²⁴ − L in
    proportion, rounded down after each sum. So excess counts are divided by 1, exactly, and for two symbols
    the parameter lies in the middle of those that give the same count. `_require_known_answer` checks both.
    """
    model = _constriction().model
    if tables.ndim == 1:
        return model.Bernoulli(perfect=False), 1 - (tables - 0.5) / (TOTAL - 2)
    return model.Categorical(perfect=False), tables.astype(np.float64)


def _initial_words(lane: int, depth: int) -> np.ndarray:
    """Return the seed, the first words of a stream on top, and a word that keeps its zeros."""
    stream = hashlib.shake_256(b"pyro_vae codec, lane %d" % lane).digest(4 * depth)
    return np.append(np.frombuffer(stream, "<u4")[::-1], 1).astype(np.uint32)


@contextmanager
def _ordinary_errors() -> Iterator[None]:
    """Turn a panic of the coder, which `except Exception` does not catch, into a `CodecError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException" and not isinstance(error, KeyError | ValueError):
            raise
        raise CorruptFileError(
            f"the entropy coder refuses its input ({error}): the file is damaged"
        ) from error


@cache
def _constriction() -> Any:
    try:
        import constriction  # noqa: PLC0415 (an optional library)
    except ImportError as error:
        raise ImportError(
            'lossless compression needs the entropy coder constriction: pip install "pyro_vae[codec]"'
        ) from error
    _require_known_answer(constriction.stream)
    return constriction.stream


def _require_known_answer(stream: Any) -> None:
    """Raise unless the coder gives the counts asked for, to the last one, and codes as it did."""
    model, coder = stream.model, stream.stack.AnsCoder
    counts = np.array([1, 6, TOTAL - 1010, 1001, 2])
    family, excess = model.Categorical(perfect=False), counts[None] - 1.0
    cases = [(family, excess, bound, k + 1) for k, bound in enumerate(counts.cumsum()[:-1])]
    cases += [
        (model.Bernoulli(perfect=False), 1 - (np.array([c]) - 0.5) / (TOTAL - 2), c, 1)
        for c in (1, 77, 10_000_019, TOTAL - 1)
    ]
    for family, parameters, bound, symbol in cases:  # the quantiles bound − 1 and bound are of two symbols
        found = [coder(np.array([q, 5], np.uint32)).decode(family, parameters)[0] for q in (bound - 1, bound)]
        bits = coder(np.array([bound, 5], np.uint32)).decode(model.Uniform(1 << 16), 1)[0]
        if found != [symbol - 1, symbol] or bits != bound >> 8:
            raise CodecError(
                "this version of constriction rounds probabilities in another way than 0.4 and 0.5, with "
                'which files are written: pip install "constriction>=0.4,<0.6"'
            )
