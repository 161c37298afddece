"""Format the results of `peers.py` as a page: medians over the rounds of times, and of ratios within a round.

uv run benchmarks/speed/table.py benchmarks/results/peers.json
"""

import json
import statistics
import sys
from pathlib import Path

from machine import head

WHOLE, READY = "whole step", "ready batches"
BY_HAND, PYRO, LOOP = "PyTorch by hand", "Pyro SVI, TraceMeanField_ELBO", "NumPyro, jitted loop"
OURS, FIT, FLOOR = "pyro_vae.SVI", "pyro_vae.fit", "floor"
COMPILED, COMPILED_FIT = "pyro_vae.SVI, compiled", "pyro_vae.fit, compiled"
BATCH_256, BATCH_20 = "784-400-50, batch 256", "784-200-200-50, batch 20"

CONVOLUTIONAL, PARTICLES = "convolutional, batch 128", "IWAE, 50 particles, batch 20"

# (case, what is timed, slower, faster, minimal ratio of their times on an Intel and on another processor); a
# prefix shared by several peers stands for the fastest of them
TARGETS = (
    (BATCH_256, WHOLE, PYRO, OURS, 2.1, 1.85),
    (BATCH_20, WHOLE, PYRO, OURS, 5.0, 4.5),
    (BATCH_256, WHOLE, BY_HAND, OURS, 1.3, 1.35),
    (BATCH_20, WHOLE, BY_HAND, OURS, 1.9, 1.7),
    (BATCH_256, WHOLE, LOOP, OURS, 1.15, 1.0),
    (BATCH_20, WHOLE, LOOP, OURS, 1.2, 1.0),
    (BATCH_256, WHOLE, LOOP, FIT, 1.15, 1.0),
    (BATCH_20, WHOLE, LOOP, FIT, 1.2, 1.0),
    (BATCH_256, READY, FLOOR, OURS, 1 / 1.4, 1 / 1.4),
    (BATCH_20, READY, FLOOR, OURS, 1 / 2, 1 / 2),
    (CONVOLUTIONAL, WHOLE, BY_HAND, OURS, 1.5, 1.5),
    (PARTICLES, WHOLE, LOOP, OURS, 1.1, 1.1),
    (BATCH_256, WHOLE, COMPILED, COMPILED_FIT, 1 / 1.03, 1 / 1.03),
    (BATCH_20, WHOLE, COMPILED, COMPILED_FIT, 1 / 1.03, 1 / 1.03),
)
NOTES = """\
Every peer trains the same networks from the same weights, in float32, by Adam with learning rate 1e-3.

- Whole step: take a shuffled batch out of 60,000 pictures held as bytes, binarise it afresh, and move the
  parameters along the gradient of the loss. PyTorch's peers binarise by `torch.bernoulli`, as one does by
  hand; NumPyro by `jax.random.bernoulli`; ours by `Images`. pythae goes without its DataLoader. `fit` is
  timed by short epochs, with its progress bar.
- Ready batches: the step alone, on batches made before.
- Floor: the step's matrix products alone.
- × ours: over the time of our fastest engine's step; median of the ratios within a round, and in [ ] the
  middle half of the rounds.
- Bound: of 1,000 pictures binarised at ½, after so many steps, in nats; all are judged by the same code.
  ⚠ marks what lies more than five standard deviations from the mean of runs by hand with other draws."""


def markdown(results: dict) -> str:
    """Return the page."""
    cases = results["cases"]
    parts = [_head(results), NOTES, *(_case(name, case) for name, case in cases.items()), _targets(results)]
    return "\n\n".join(parts) + "\n"


def _head(results: dict) -> str:
    sleepers = max(results["CPU use of sleeping workers"].values())
    return (
        f"# A step of the same VAE in every library\n\n{head(results)}\n{results['rounds']} rounds of blocks "
        f"of {results['seconds a block']} s; sleeping processes used at most {sleepers:.2%} of a core."
    )


def _case(name: str, case: dict) -> str:
    steps = case["steps"]
    lines = [
        f"## {name}\n",
        f"| | whole step, µs | pictures/s | × ours | ready batches, µs | × ours | bound after {steps} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in dict.fromkeys([*case[WHOLE], *case[READY]]):
        whole, ready = case[WHOLE].get(peer), case[READY].get(peer)
        cells = [
            peer,
            f"{statistics.median(whole):,.0f}" if whole else "",
            f"{1e6 * case['batch'] / statistics.median(whole):,.0f}" if whole else "",
            _ratio_text(case[WHOLE], peer, OURS),
            f"{statistics.median(ready):,.0f}" if ready else "",
            _ratio_text(case[READY], peer, OURS),
            _bound(case, peer),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons: dict[str, list[str]] = {}
    for peer, reason in case["absent"].items():
        reasons.setdefault(reason, []).append(peer)
    absent = [f"- {'; '.join(peers)}: {reason}." for reason, peers in reasons.items()]
    return "\n".join([*lines, "", "Not in the table:", "", *absent] if absent else lines)


def _bound(case: dict, peer: str) -> str:
    bound = case["bounds"].get(peer)
    if bound is None:
        return ""
    noise = case["bounds by hand"]
    if len(noise) < 2:
        return f"{bound:.2f}"
    outside = abs(bound - statistics.mean(noise)) > 5 * statistics.stdev(noise)
    return f"{bound:.2f}" + (" ⚠" if outside else "")


def fastest(times: dict[str, list[float]], name: str) -> str | None:
    """Return the fastest of the peers whose names start with `name`."""
    found = [peer for peer in times if peer == name or (name in (OURS, FIT, FLOOR) and peer.startswith(name))]
    return min(found, key=lambda peer: statistics.median(times[peer]), default=None)


def ratios(times: dict[str, list[float]], slower: str, faster: str) -> list[float]:
    """Return the ratio of times in each round; empty if one of the two was not timed."""
    a, b = fastest(times, slower), fastest(times, faster)
    return [] if a is None or b is None else [x / y for x, y in zip(times[a], times[b], strict=True)]


def _ratio_text(times: dict[str, list[float]], slower: str, faster: str) -> str:
    found = ratios(times, slower, faster)
    if not found:
        return ""
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else 3 * found
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _targets(results: dict) -> str:
    lines = [
        "## Targets\n",
        "| case | | time of | over that of | at least | measured | |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for case, column, slower, faster, on_intel, elsewhere in TARGETS:
        factor = on_intel if "Intel" in results["processor"] else elsewhere
        times = results["cases"].get(case, {}).get(column, {})
        found = ratios(times, slower, faster)
        if found:
            names = f"{fastest(times, slower)} | {fastest(times, faster)}"
            verdict = "reached" if statistics.median(found) >= factor else "**missed**"
            text = _ratio_text(times, slower, faster)
            lines.append(f"| {case} | {column} | {names} | {factor:.2f} | {text} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
