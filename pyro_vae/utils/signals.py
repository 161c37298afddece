"""Ctrl-C and SIGTERM, held back until the step in progress was finished."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["deferred_signals"]


@contextlib.contextmanager
def deferred_signals(*, may_save: bool) -> Iterator[Callable[[], int]]:
    """Let the first Ctrl-C be noted, so that a step is never cut in two; the second one interrupts.

    So is SIGTERM, by which clusters end a process, if there is a folder to save the run in. Yields a function
    that returns the signal that was noted, or 0.
    """
    noted: list[int] = []

    def note(signal_number: int, frame: Any) -> None:
        if noted and signal_number == signal.SIGINT:
            signal.default_int_handler(signal_number, frame)
        noted.append(signal_number)

    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if may_save:
        usual[signal.SIGTERM] = signal.SIG_DFL
    in_main_thread = threading.current_thread() is threading.main_thread()  # only that one receives signals
    ours = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    if not in_main_thread:
        ours = {}
    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
