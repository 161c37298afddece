"""Text output: values with standard errors, aligned tables, progress bars."""

import html
import math
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

if TYPE_CHECKING:
    import pandas

__all__ = ["Estimate", "aligned", "data_frame", "html_table", "progress_bar"]


class Estimate(NamedTuple):
    """A value and its standard error; NaN where that is unknown.

    Example:
        >>> print(Estimate(-86.3512, 0.0241), Estimate(-86.3512, math.nan))
        -86.351 ± 0.024 -86.35
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        se = self.standard_error
        if math.isnan(se):  # of a single draw, say
            return f"{self.value:.2f}"
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


def html_table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Container[int] = (0,)
) -> str:
    r"""Return a table as HTML, which a notebook shows: text in the columns `left`, numbers in the others.

    Example:
        >>> html_table("a run", ["epoch", "ELBO"], [["9", "-99.5"]])
        '<table><caption style="text-align:left">a run</caption>...</table>'
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        styles = [
            "text-align:left" if column in left else "text-align:right; white-space:nowrap"
            for column in range(len(row))
        ]
        styled = zip(styles, row, strict=True)
        return "".join(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for style, cell in styled)

    lines = [cells("th", header), *(cells("td", row) for row in rows)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table><caption style="text-align:left">{html.escape(caption)}</caption>{body}</table>'


def data_frame(columns: Mapping[str, Any], index: str) -> "pandas.DataFrame":
    """Return columns of equal length as a data frame, one of them as its index."""
    import pandas  # noqa: PLC0415 (slow, and seldom wanted)

    return pandas.DataFrame(columns).set_index(index)


def progress_bar(total: float, *, shown: bool, unit: str, **options: Any) -> "tqdm[Any]":
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
