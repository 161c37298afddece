"""Measure how the time and memory of training grow with batch size, latent dimensions, particles and data.

    uv run benchmarks/speed/growth.py

writes a table, all timings and a log-log figure to benchmarks/results. One size of 784-400-50 at batch 128 is
varied at a time; sizes and engines are timed in turn. Times are those of a `pv.SVI` step on a prepared batch;
for the data size, of the second epoch of `pv.fit`. Memory is the peak of an eager step's tensors.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from machine import describe, head
from matplotlib.ticker import LogLocator
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.comparison.experiment import peak_memory
from pyro_vae.inference.svi import ENGINES

RESULTS = Path(__file__).parent.parent / "results"
PIXELS = 784
SIZES = {
    "batch": (4, 16, 64, 256, 1024),
    "latent": (2, 8, 32, 128, 512),
    "particles": (1, 4, 16, 64),
    "data": (500, 2000, 8000, 32000),
}
BASE = {"batch": 128, "latent": 50, "particles": 1}
LABELS = {
    "batch": "batch size",
    "latent": "latent dimensions",
    "particles": "particles (IWAE, batch 20)",
    "data": "pictures in the data (an epoch of fit)",
}


def make_vae(latent: int, shape: tuple[int, ...]) -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(latent),
        likelihood=pv.likelihoods.Bernoulli(latent, shape),
        guide=pv.guides.DiagonalNormal(shape, latent),
    )


def make_svi(engine: str, *, batch: int, latent: int, particles: int) -> tuple[pv.SVI, torch.Tensor]:
    vae = make_vae(latent, (PIXELS,))
    estimator = TraceMeanField_ELBO() if particles == 1 else pv.IWAE(particles)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    x = torch.bernoulli(torch.full((batch, PIXELS), 0.2))
    return pv.SVI(vae.model, vae.guide, optimizer, estimator, engine=engine), x


def steps(engine: str, **sizes: int) -> Callable[[float], float]:
    """Return a function that takes steps for the given seconds and returns the seconds per step."""
    svi, x = make_svi(engine, **sizes)
    for _ in range(17):  # steps 1, 2, 4, 8, 16 are compared with eager ones, a one-time cost
        svi.step(x)

    def block(seconds: float) -> float:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or count < 3:
            svi.step(x)
            count += 1
        return (time.perf_counter() - started) / count

    return block


def epochs(engine: str, data: int) -> Callable[[float], float]:
    """Return a function that times the second epoch of `fit`, since the first records or compiles."""
    pixels = torch.randint(0, 256, (data, 1, 28, 28), dtype=torch.uint8)
    images = pv.data.from_array(pixels).binarized("dynamic")

    def block(seconds: float) -> float:
        ends: list[float] = []
        vae = make_vae(BASE["latent"], (1, 28, 28))
        pv.fit(
            vae, images, epochs=2, batch_size=BASE["batch"], engine=engine, progress=False,
            callbacks=[lambda *_: ends.append(time.perf_counter())],
        )  # fmt: skip
        return ends[1] - ends[0]

    return block


def measure(engines: list[str], rounds: int, seconds: float) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Return the seconds in each round, by varied size, engine and size."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for varied, sizes in SIZES.items():
        blocks = {(engine, size): make_block(varied, engine, size) for engine in engines for size in sizes}
        order = list(blocks)
        found[varied] = {engine: {size: [] for size in sizes} for engine in engines}
        for _ in range(rounds):
            random.shuffle(order)
            for engine, size in order:
                found[varied][engine][size].append(blocks[engine, size](seconds))
        print(f"{varied}: done", flush=True)
    return found


def make_block(varied: str, engine: str, size: int) -> Callable[[float], float]:
    return epochs(engine, size) if varied == "data" else steps(engine, **sizes_with(varied, size))


def sizes_with(varied: str, size: int) -> dict[str, int]:
    base = BASE | ({"batch": 20} if varied == "particles" else {})
    return base | {varied: size}


def memory() -> dict[str, dict[int, int]]:
    """Return the peak bytes, by varied size and size."""
    found: dict[str, dict[int, int]] = {}
    for varied in ("batch", "latent", "particles"):
        found[varied] = {}
        for size in SIZES[varied]:
            svi, x = make_svi("eager", **sizes_with(varied, size))
            svi.step(x)  # creates the optimiser's state
            found[varied][size] = peak_memory(partial(svi.step, x))
    return found


def slope(times: dict[int, list[float]]) -> float:
    """Return the slope of log(median time) over log(size) between the two largest sizes."""
    (n, a), (m, b) = ((size, statistics.median(times[size])) for size in sorted(times)[-2:])
    return math.log(b / a) / math.log(m / n)


def markdown(results: dict) -> str:
    lines = [
        f"# Growth of the cost\n\n{head(results)}\n\nMilliseconds, medians of {results['rounds']} rounds;",
        "the exponent is that between the two largest sizes. MB: peak of an eager step's tensors.",
        "So few steps are too few for auto to compile: it interprets, as traced does.",
    ]
    for varied, engines in results["seconds"].items():
        sizes = SIZES[varied]
        lines += ["", f"## {LABELS[varied]}", "", f"| | {' | '.join(map(str, sizes))} | exponent |"]
        lines.append("|---|" + "---:|" * (len(sizes) + 1))
        for engine, times in engines.items():
            cells = [f"{1000 * statistics.median(times[size]):,.2f}" for size in sizes]
            lines.append(f"| {engine} | {' | '.join(cells)} | {slope(times):.2f} |")
        if varied in results["bytes"]:
            cells = [f"{results['bytes'][varied][size] / 1e6:,.1f}" for size in sizes]
            lines.append(f"| MB | {' | '.join(cells)} | |")
    return "\n".join(lines) + "\n"


def figure(results: dict) -> plt.Figure:
    fig, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, (varied, engines) in zip(axes.flat, results["seconds"].items(), strict=True):
        for (engine, times), marker in zip(engines.items(), itertools.cycle("os^D")):
            milliseconds = [1000 * statistics.median(times[size]) for size in SIZES[varied]]
            axis.loglog(SIZES[varied], milliseconds, marker=marker, label=engine)
        axis.axis(axis.axis())  # fixes the limits before the next line is drawn
        smallest, largest = SIZES[varied][0], SIZES[varied][-1]
        axis.loglog(
            [smallest, largest], [milliseconds[-1] * smallest / largest, milliseconds[-1]],
            color="grey", linestyle=":", label="proportional",
        )  # fmt: skip
        axis.set_xticks(SIZES[varied], [f"{size:,}" for size in SIZES[varied]])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xlabel(LABELS[varied])
        axis.set_ylabel("ms an epoch" if varied == "data" else "ms a step")
    axes.flat[0].legend(frameon=False)
    fig.suptitle("A VAE 784-400-50 at batch 128, one size varied: lower is faster")
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a block")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of growth.md, .json and .png")
    options = parser.parse_args()
    random.seed(0)
    results = describe() | {
        "rounds": options.rounds,
        "seconds": measure(options.engines, options.rounds, options.seconds),
        "bytes": memory(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "growth.json").write_text(json.dumps(results, indent=1))
    (options.output / "growth.md").write_text(markdown(results))
    figure(results).savefig(options.output / "growth.png", dpi=120)
    print(markdown(results))


if __name__ == "__main__":
    main()
