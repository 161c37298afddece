"""Progress bars where somebody watches: in a terminal or a notebook, and not in a pipe or a file."""

import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


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
