"""Run the peers of one library in a separate process, which waits on its pipe while others are timed."""

import importlib
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from cases import Skip

LIBRARIES = ("pyro_svi", "pytorch", "pythae_vae", "numpyro_svi", "ours", "floor")


class Absent(Exception):  # noqa: N818
    """A peer does not support a measurement, or failed; the message says which."""


class Worker:
    """Proxy that calls methods of `Desk` in another process."""

    def __init__(self, library: str, pixels: np.ndarray):
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, library, pixels), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, method: str, *arguments: Any) -> Any:
        try:
            self.pipe.send((method, arguments))
            done, result = self.pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            raise Absent("its process ended") from error
        if not done:
            raise Absent(result)
        return result

    def close(self) -> None:
        self.pipe.close()
        self.process.join(timeout=10)
        self.process.kill()


class Desk:
    """Requests that a worker process serves."""

    def __init__(self, library: str, pixels: np.ndarray):
        self.module = importlib.import_module(library)
        self.pixels = pixels
        self.peers: dict[str, Any] = {}
        self.idle_cpu = self.idle_wall = 0.0

    def names(self) -> tuple[str, ...]:
        return self.module.NAMES

    def build(self, name: str, case: Any) -> None:
        """Build a peer for a case, in place of an earlier peer of the same name."""
        self.peers[name] = self.module.make_peer(name, case, self.pixels)

    def drop(self) -> None:
        self.peers.clear()

    def run(self, name: str, steps: int, ready: bool) -> tuple[int, float]:
        """Take at least `steps` steps; return their number and the seconds."""
        started = time.perf_counter()
        steps = self.peers[name].run(steps, ready=ready)
        return steps, time.perf_counter() - started

    def weights(self, name: str) -> list[np.ndarray] | None:
        return self.peers[name].weights()

    def idle(self) -> tuple[float, float]:
        """Return CPU seconds spent while waiting, which disturb other processes, and seconds waited."""
        return self.idle_cpu, self.idle_wall

    def waited(self, cpu: float, wall: float) -> None:
        self.idle_cpu += cpu
        self.idle_wall += wall


def _serve(pipe: Connection, library: str, pixels: np.ndarray) -> None:
    desk: Desk | None = None
    while True:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        if desk is not None:
            desk.waited(time.process_time() - cpu, time.perf_counter() - wall)
        try:
            desk = desk or Desk(library, pixels)
            pipe.send((True, getattr(desk, method)(*arguments)))
        except Skip as reason:
            pipe.send((False, str(reason)))
        except Exception as error:  # reported to the other process
            traceback.print_exc()
            pipe.send((False, f"failed: {type(error).__name__}: {error}".splitlines()[0]))
