"""Text output: values with their errors, aligned tables, progress bars."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

__all__ = ["Estimate", "aligned", "progress_bar"]


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


def progress_bar(total: float, *, shown: bool, unit: str, **options: Any) -> tqdm:
    """A progress bar of tqdm's, drawn if it is to be shown and standard error is a terminal or a notebook's.

    In a pipe or a file each step of a bar would be one more line.

    Args:
        total: Where the bar ends, in units.
        shown: Whether the bar is wanted.
        unit: What is counted, with a leading space.
        options: Further ones, of `tqdm`.

    Example:
        >>> with progress_bar(3, shown=False, unit=" steps") as bar:
        ...     _ = bar.update(2)
    """
    in_notebook = "ipykernel" in sys.modules  # whose streams are no terminals, with or without widgets
    hidden = not shown or (False if in_notebook else None)  # None: unless standard error is a terminal
    return tqdm(total=total, disable=hidden, unit=unit, **options)
