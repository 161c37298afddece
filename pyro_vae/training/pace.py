"""Has training become slow? Threads wait many times as long for a core that another process holds."""

import logging
import statistics

import torch

__all__ = ["Pace"]

logger = logging.getLogger("pyro_vae")

_STEPS = 20  # of a window: its median disregards those that compile
_SLOWER, _LASTING = 5.0, 2.0  # times, seconds


class Pace:
    """Watch the time of steps; say once when it stays five times the shortest so far, for two seconds.

    Example:
        >>> pace = Pace()
        >>> for seconds in [0.01] * 40 + [0.1] * 20:
        ...     pace.note(seconds)
        >>> pace.is_told
        True
    """

    def __init__(self) -> None:
        self.window: list[float] = []
        self.shortest = float("inf")  # median of a window
        self.slow_for = 0.0
        self.is_told = False

    def note(self, seconds: float) -> None:
        """Note the time of one step."""
        if self.is_told:
            return
        self.window.append(seconds)
        if len(self.window) < _STEPS:
            return
        usual, lasted = statistics.median(self.window), sum(self.window)
        self.window.clear()
        self.shortest = min(self.shortest, usual)
        self.slow_for = self.slow_for + lasted if usual > _SLOWER * self.shortest else 0.0
        if self.slow_for >= _LASTING:
            self.is_told = True
            threads = torch.get_num_threads()
            remedy = "; torch.set_num_threads(1) may be faster" if threads > 1 else ""
            logger.warning(
                "a step takes %.2g s now, %.0f times as long as before: other processes seem to hold the "
                "cores that torch's threads (%d) wait for%s",
                usual,
                usual / self.shortest,
                threads,
                remedy,
            )
