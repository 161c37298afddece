"""Numbers with their errors, and tables of them, as text."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Estimate", "aligned"]


class Estimate(NamedTuple):
    """A value and its standard error.

    Example:
        >>> print(Estimate(-86.3512, 0.0241))
        -86.351 ± 0.024
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        se = self.standard_error
        digits = 1 - math.floor(math.log10(se)) if 0 < se < math.inf else 2  # two of the error's
        digits = min(max(digits, 0), 6)
        return f"{self.value:.{digits}f} ± {se:.{digits}f}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> Iterator[str]:
    r"""Lines of a table: its first `left` columns flush left, the others flush right.

    Example:
        >>> print(*aligned(["epoch", "ELBO"], [["9", "-99.5"], ["10", "-98"]]), sep="\n")
        epoch   ELBO
            9  -99.5
           10    -98
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
