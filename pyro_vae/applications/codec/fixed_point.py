"""Elementary functions in integer arithmetic, which give the same bits on every machine.

Numbers are int64 arrays in units of 2⁻³⁰. Results are accurate to about 10⁻⁸; a codec needs them to be
reproducible, which no library's floating-point `exp` promises.
"""

from functools import cache

import numpy as np

__all__ = [
    "ONE",
    "Integers",
    "exp_negative",
    "interpolate",
    "log",
    "log_by_table",
    "logistic_cdf_table",
    "normal_cdf_table",
    "sigmoid",
    "softplus",
]

Integers = np.ndarray

ONE = 1 << 30
_LOG_2 = 744261118  # log 2 in units of 2⁻³⁰, rounded
_STEPS = 1024  # entries of a table of a distribution function per unit


def exp_negative(t: Integers) -> Integers:
    """Return e^(−t) for t ≥ 0.

    With t = n log 2 + r, it is the Taylor series of e^(−r), 0 ≤ r < log 2, shifted by n bits.

    Example:
        >>> exp_negative(np.array([0, ONE])) / ONE
        array([1.        , 0.36787944])
    """
    halvings, rest = np.divmod(t, _LOG_2)
    result = np.full_like(t, ONE)
    for order in range(12, 0, -1):
        result = ONE - (rest * result >> 30) // order
    return result >> np.minimum(halvings, 62)


def log(value: Integers) -> Integers:
    """Return the natural logarithm of numbers above 0 and below 2²², which are 2⁵² units.

    With value = m 2ⁿ and 1 ≤ m < 2, log m = 2 artanh((m − 1)/(m + 1)), a series in powers of at most 1/3.

    Example:
        >>> log(np.array([ONE, 2 * ONE, ONE // 2])) / ONE
        array([ 0.        ,  0.69314718, -0.69314718])
    """
    exponent = np.frexp(value.astype(np.float64))[1].astype(np.int64) - 31  # exact below 2⁵³
    mantissa = np.where(exponent >= 0, value >> np.maximum(exponent, 0), value << np.maximum(-exponent, 0))
    ratio = (mantissa - ONE << 30) // (mantissa + ONE)
    square = ratio * ratio >> 30
    series = np.zeros_like(ratio)
    for order in range(19, 0, -2):
        series = ONE // order + (series * square >> 30)
    return exponent * _LOG_2 + 2 * (ratio * series >> 30)


def log_by_table(value: Integers) -> Integers:
    """Return the natural logarithm as `log` does, from a table, in a third of the time.

    Both stay: files that were written by one are not read by the other.

    Example:
        >>> log_by_table(np.array([ONE, 2 * ONE, ONE // 2])) / ONE
        array([ 0.        ,  0.69314718, -0.69314718])
    """
    logs, inverses = _log_table()
    bits = np.frexp(value.astype(np.float64))[1].astype(np.int64)  # exact below 2⁵³
    mantissa = value << (53 - bits) >> 22
    index = (mantissa >> 20) - 1024
    x = (mantissa & (1 << 20) - 1) * inverses[index] >> 30  # below 2⁻¹⁰
    square = x * x >> 30
    return (bits - 31) * _LOG_2 + logs[index] + x - (square >> 1) + (square * x >> 30) // 3


@cache
def _log_table() -> tuple[Integers, Integers]:
    """Return log m and 1/m of m = 1, 1 + 1/1024, … below 2."""
    index = np.arange(1024, 2048, dtype=np.int64)
    return _frozen(log(index << 20)), _frozen((1 << 40) // index)


def sigmoid(t: Integers) -> Integers:
    """Return 1/(1 + e^(−t)).

    Example:
        >>> sigmoid(np.array([0, -2 * ONE])) / ONE
        array([0.5       , 0.11920292])
    """
    small = exp_negative(np.abs(t))
    return (np.where(t >= 0, ONE, small) << 30) // (ONE + small)


def softplus(t: Integers) -> Integers:
    """Return log(1 + e^t).

    Example:
        >>> softplus(np.array([0, -2 * ONE])) / ONE
        array([0.69314718, 0.12692801])
    """
    return np.maximum(t, 0) + log(ONE + exp_negative(np.abs(t)))


@cache
def normal_cdf_table() -> Integers:
    """Return Φ(t) at t = −8, −8 + 1/1024, …, 8: Simpson's rule, normalised to 0 and 1 at the ends.

    Example:
        >>> table = normal_cdf_table()
        >>> [round(float(value), 6) for value in table[[8 * 1024, 9 * 1024]] / ONE]  # Φ(0), Φ(1)
        [0.5, 0.841345]
    """
    half_steps = np.arange(-8 * 2 * _STEPS, 8 * 2 * _STEPS + 1, dtype=np.int64)
    density = exp_negative(half_steps * half_steps << 7)  # t²/2 with t = half_steps 2⁻¹¹
    pieces = density[:-2:2] + 4 * density[1:-1:2] + density[2::2]
    total = np.concatenate([[0], np.cumsum(pieces)])
    return _frozen((total << 16) // (total[-1] >> 14))


@cache
def logistic_cdf_table() -> Integers:
    """Return σ(t) at t = −18, −18 + 1/1024, …, 18, with 0 and 1 at the ends.

    Example:
        >>> float(logistic_cdf_table()[18 * 1024] / ONE)
        0.5
    """
    table = sigmoid(np.arange(-18 * _STEPS, 18 * _STEPS + 1, dtype=np.int64) << 20)
    table[0], table[-1] = 0, ONE
    return _frozen(table)


def interpolate(table: Integers, t: Integers) -> Integers:
    """Interpolate a table of a distribution function at t, in units of 2⁻²⁰; monotone in t.

    Example:
        >>> int(interpolate(normal_cdf_table(), np.array(-100 << 20)))
        0
    """
    limit = (len(table) // 2) << 10
    position = np.clip(t, -limit, limit - 1) + limit
    index, fraction = position >> 10, position & 1023
    lower = table[index]
    return lower + ((table[index + 1] - lower) * fraction >> 10)


def _frozen(table: Integers) -> Integers:
    table.setflags(write=False)
    return table
