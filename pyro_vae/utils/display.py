"""Text output: values with standard errors, aligned tables, progress bars."""

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
        digits = 1 - math.floor(math.log10(se)) if 0 < se < math.inf else 2  # the error's first two
        digits = min(max(digits, 0), 6)
        return f"{self.value:.{digits}f} ± {se:.{digits}f}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> Iterator[str]:
    r"""Yield the lines of a table whose first `left` columns are aligned left, the others right.

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
    """Return a tqdm progress bar, drawn only in a terminal or a notebook: files would get a line per update.

    Args:
        total: Number of units at the end of the bar.
        shown: If False, nothing is drawn.
        unit: Name of the units, with a leading space.
        options: Further options of `tqdm`.

    Example:
        >>> with progress_bar(3, shown=False, unit=" steps") as bar:
        ...     _ = bar.update(2)
    """
    in_notebook = "ipykernel" in sys.modules  # its streams are not terminals
    hidden = not shown or (False if in_notebook else None)  # None: hidden unless standard error is a terminal
    return tqdm(total=total, disable=hidden, unit=unit, **options)
