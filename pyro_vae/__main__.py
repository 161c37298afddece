"""Command line: `pyro-vae train | evaluate | embed | anomalies | impute | compress | decompress | list`.

    pyro-vae train measurements.csv --out vae.pt
    python -m pyro_vae embed measurements.csv codes.csv --model vae.pt

`pyro_vae.applications.commands` holds the commands.
"""

import sys
import warnings
from typing import Any

from pyro_vae.applications.commands import build_parser

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0; after a message 1; 130 if it was interrupted.

    Args:
        arguments: The command line, without the name of the program; by default that of the process.

    Raises:
        SystemExit: Of status 2, after a message, for wrong usage.

    Example:
        >>> main(["list"])
        Traceback (most recent call last):
            ...
        SystemExit: 2
    """
    args = build_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.command(args)
    except KeyboardInterrupt as interrupt:
        _say("interrupted" + _how_to_go_on(args, interrupt))
        return 130
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        _say(" ".join(str(error).split()) or type(error).__name__)
        return 1
    return 0


def _say(message: str) -> None:
    print(f"pyro-vae: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, *place: Any, **details: Any) -> None:
    """Print a warning in a line, without the place in the code."""
    _say(" ".join(f"warning: {message}".split()))


def _how_to_go_on(args: Any, interrupt: KeyboardInterrupt) -> str:
    directory = getattr(args, "checkpoint_dir", None)
    if directory is None or not str(interrupt):  # `fit` says so once it has saved; before, there is nothing
        return ""
    return f"; the run is saved in {directory}: --resume continues it"


if __name__ == "__main__":
    sys.exit(main())
