"""Measure start-up: import time, time of the first steps with each engine, and memory.

    uv run benchmarks/speed/startup.py

writes a table and all timings to benchmarks/results. Each measurement runs in a new process, in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import describe, head

from pyro_vae.inference.svi import ENGINES

RESULTS = Path(__file__).parent.parent / "results"
IMPORTS = ("torch", "pyro", "pyro_vae")
TARGET = 1.15  # import time of pyro_vae over that of pyro
IMPORT = """
import time
started = time.perf_counter()
import {name}
print(time.perf_counter() - started)
"""
STEPS = """
import resource, time
started = time.perf_counter()
import torch, pyro_vae as pv
from pyro.infer import TraceMeanField_ELBO
imported = time.perf_counter()
vae = pv.VAE(
    prior=pv.priors.StandardNormal(50),
    likelihood=pv.likelihoods.Bernoulli(50, (784,)),
    guide=pv.guides.DiagonalNormal((784,), 50),
)
optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
svi = pv.SVI(vae.model, vae.guide, optimizer, TraceMeanField_ELBO(), engine={name!r})
x = torch.bernoulli(torch.full((256, 784), 0.2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ready = time.perf_counter()
svi.step(x)
first = time.perf_counter()
svi.step(x)
second = time.perf_counter()
for _ in range(20):
    svi.step(x)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(imported - started, first - ready, second - first, before / 1024, (after - before) / 1024)
"""
COLUMNS = ("import, s", "first step, s", "second step, s", "memory before, MiB", "peak above it, MiB")


def fresh_process(code: str) -> list[float]:
    """Run code in a new process; return the numbers that it prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(number) for number in run.stdout.split()]


def measure(rounds: int) -> dict:
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    engines: dict[str, list[list[float]]] = {name: [] for name in ENGINES}
    fresh_process(STEPS.format(name="eager"))  # fills the file cache for all measurements
    for _ in range(rounds):
        for name in IMPORTS:
            imports[name] += fresh_process(IMPORT.format(name=name))
        for name in ENGINES:
            engines[name].append(fresh_process(STEPS.format(name=name)))
    return {"imports": imports, "engines": engines}


def markdown(results: dict) -> str:
    imports = results["imports"]
    ratio = statistics.median(a / b for a, b in zip(imports["pyro_vae"], imports["pyro"], strict=True))
    verdict = "reached" if ratio <= TARGET else "**missed**"
    lines = [
        f"# Start-up\n\n{head(results)}\nMedians of {results['rounds']} rounds, a fresh process each.",
        *["", "| import | s |", "|---|---:|"],
        *[f"| {name} | {statistics.median(times):.2f} |" for name, times in imports.items()],
        f"\n`import pyro_vae` over `import pyro`: {ratio:.3f}; at most {TARGET}: {verdict}.\n",
        "784-400-50 at batch 256, 22 steps:\n",
        f"| engine | {' | '.join(COLUMNS)} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for engine, rows in results["engines"].items():
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        cells = [f"{value:.0f}" if value > 100 else f"{value:.3f}" for value in medians]
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of startup.md and startup.json")
    options = parser.parse_args()
    results = describe() | {"rounds": options.rounds} | measure(options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "startup.json").write_text(json.dumps(results, indent=1))
    (options.output / "startup.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
