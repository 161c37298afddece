# /// script
# requires-python = ">=3.11"
# dependencies = ["greenlet>=3", "mlxtend>=0.23", "pyro_vae"]
#
# [tool.uv.sources]
# pyro_vae = { path = "../..", editable = true }
# ///
"""Measure what each remedy gives: a compiled step of `fit` without it, over one with all of them.

    uv run benchmarks/speed/remedies.py [--rounds 5]

Each measurement is a process of its own, in turn: how memory happens to lie differs between processes by up
to a fifth of a step. The table shows medians over the rounds, and of ratios within a round.
"""

import argparse
import statistics
import subprocess
import sys
import time

from cases import CASES, Case
from machine import describe, head
from ours import Fit, make_peer

import pyro_vae as pv
from pyro_vae.engine import product_kernel, replay
from pyro_vae.engine.adam_kernel import AdamKernel

REMEDIES = {
    "all": "",
    "Adam's kernel": "Adam by torch, gradients checked before it",
    "repeated steps": "what programs read compared at each step",
    "the product kernel": "matrix products by MKL, large ones by oneDNN",
    "the product kernel and oneDNN": "all matrix products by MKL",
}


def leave_out(remedy: str) -> None:
    """Replace a remedy by what it replaced."""
    if remedy == "Adam's kernel":
        AdamKernel.is_available = staticmethod(lambda: False)
    elif remedy == "repeated steps":
        pv.SVI.step_again = pv.SVI.step
    elif remedy.startswith("the product kernel"):
        product_kernel.is_available = lambda: False
    if remedy.endswith("oneDNN"):
        replay.choose_matmul_libraries = lambda module, fastest: module


def measure(case: Case, epochs: int) -> float:
    """Return the median time of a step over short epochs of `fit`, in µs."""
    pixels = pv.data.load("digits").pixels.flatten(1).repeat(12, 1).numpy()
    fit = make_peer("pyro_vae.fit, compiled", case, pixels)
    assert isinstance(fit, Fit)
    fit.run(2 * case.epoch, ready=False)
    microseconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        steps = fit.run(1, ready=False)
        microseconds.append(1e6 * (time.perf_counter() - started) / steps)
    return statistics.median(microseconds)


def compare(case: Case, rounds: int) -> None:
    """Print the rows of a case."""
    found: dict[str, list[float]] = {remedy: [] for remedy in REMEDIES}
    for _ in range(rounds):
        for remedy, times in found.items():
            command = [sys.executable, __file__, "--one", case.name, remedy]
            times.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for remedy, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, found["all"], strict=True))
        what = f"without {remedy}: {REMEDIES[remedy]}" if REMEDIES[remedy] else remedy
        print(f"| {case.name} | {what} | {statistics.median(times):,.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "REMEDY"), help="print one measurement")
    options = parser.parse_args()
    if options.one:
        name, remedy = options.one
        leave_out(remedy)
        print(measure(next(case for case in CASES if case.name == name), epochs=15))
        return
    print(f"{head(describe())}\n\n| case | step of fit | µs | over all |\n|---|---|---:|---:|")
    for case in CASES:
        if case.hidden:
            compare(case, options.rounds)


if __name__ == "__main__":
    main()
