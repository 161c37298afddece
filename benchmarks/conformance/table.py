"""Pyro's programs under `pyro.infer.SVI` and `pyro_vae.SVI`: accepted or refused, the same losses or not.

Programs are float64, but for the examples that run as scripts. There Pyro adds up the terms of a loss as
Python's numbers, this library in float32, so that the last digit may differ.

uv run benchmarks/conformance/table.py
uv run benchmarks/conformance/table.py --pyro PATH   # also the examples of a clone of Pyro's repository
"""

import argparse
import importlib.util
import json
import logging
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyro
import torch

import pyro_vae as pv
from pyro_vae.utils.display import aligned

HERE = Path(__file__).parent
ENGINES = ("eager", "traced")
COLUMNS = ["program", "eager", "Δ", "traced", "Δ", "what ran"]

# of those that Pyro's own tests run, the ones that load nothing over the network and take steps by SVI
EXAMPLES = [
    *(f"capture_recapture/cjs.py --num-steps=4 -m {number}" for number in range(1, 6)),
    *(f"contrib/autoname/{name}.py --num-epochs=4" for name in ("mixture", "scoping_mixture", "tree_data")),
    "contrib/cevae/synthetic.py --num-epochs=1",
    "eight_schools/svi.py --num-epochs=4",
    "lda.py --num-steps=4 --num-words=100 --num-docs=100 --num-words-per-doc=8",
    "minipyro.py --backend=pyro --num-steps=4",
    "scanvi/scanvi.py --num-epochs 1 --dataset mock",
    "toy_mixture_model_discrete_enumeration.py --num-steps=4",
]


class Run(NamedTuple):
    """Losses of some steps, each a tuple, or why there are none; what took the steps."""

    losses: list[tuple[float, ...]]
    error: str = ""
    ran: str = ""


def pairs() -> dict[str, tuple[Callable, Callable]]:
    """Pairs of the tests, then those of `tutorials`: makers of the pair and of its loss."""
    folder = HERE.parent.parent / "tests" / "inference"
    found = dict(module(folder / "test_upstream_pairs.py").PAIRS)
    found.update(module(HERE / "tutorials.py").TUTORIALS)
    return found


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def parameters_of(model: Callable, guide: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> list:
    """Run a pair once, which creates its parameters, and return them."""
    with pyro.poutine.trace(param_only=True) as tracer:
        try:
            drawn = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
            pyro.poutine.replay(model, trace=drawn)(*args, **kwargs)
        except AssertionError:  # on the shapes of enumeration
            pass
    leaves = [site["value"].unconstrained() for site in tracer.trace.nodes.values()]
    return list({id(leaf): leaf for leaf in leaves}.values())  # some have two names


class Reasons(logging.Handler):
    """Keep why steps were eager, as the library logs it, in place of printing it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        logger = logging.getLogger("pyro_vae")
        logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage().rpartition("without a graph: ")[2])


def what_ran(svi: Any, reasons: Reasons) -> str:
    replay = svi._replay
    if replay and not replay.disabled:
        by_graph = sum(recording.steps for recording in replay.recordings.values())
        return f"graph, {replay.num_recordings} recorded, {by_graph} of {svi.steps} steps"
    return ": ".join(["eager steps", *reasons.heard[-1:]])


def run_pair(make: Callable, make_loss: Callable, engine: str, num_steps: int = 8) -> Run:
    """Take steps of a pair by Pyro's SVI, "upstream", or by ours with an engine, from the same seed."""
    reasons = Reasons()
    pyro.clear_param_store()
    torch.manual_seed(0)
    try:
        model, guide, data = make()
        calls = data if isinstance(data, list) else [(data, {})]
        parameters = [leaf for args, kwargs in calls for leaf in parameters_of(model, guide, args, kwargs)]
        parameters = list({id(leaf): leaf for leaf in parameters}.values())
        parameters = parameters or [torch.nn.Parameter(torch.zeros(()))]
        loss = make_loss()
        if engine == "upstream":
            svi: Any = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        else:
            svi = pv.SVI(model, guide, torch.optim.Adam(parameters, 0.01), loss, engine=engine)
        torch.manual_seed(1)
        steps = [calls[number % len(calls)] for number in range(num_steps)]
        losses = [as_tuple(svi.step(*args, **kwargs)) for args, kwargs in steps]
    except Exception as error:
        return Run([], f"{type(error).__name__}: {error}")
    return Run(losses, ran="" if engine == "upstream" else what_ran(svi, reasons))


def run_example(path: Path, arguments: list[str], engine: str) -> Run:
    """Run an example in a process of its own, where `SVI` is replaced by one that keeps the losses."""
    command = [sys.executable, str(HERE / "run_example.py"), engine, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return Run([], (done.stderr.strip().splitlines() or ["no output"])[-1])
    found = json.loads(lines[-1])
    return Run([tuple(each) for each in found["losses"]], found["error"], found["ran"])


def as_tuple(loss: Any) -> tuple[float, ...]:
    return tuple(map(float, loss)) if isinstance(loss, tuple) else (float(loss),)


def difference(found: Run, expected: Run) -> str:
    """Largest relative difference of two runs' losses."""
    if len(found.losses) != len(expected.losses):
        return f"{len(found.losses)} of {len(expected.losses)} steps"
    pairs = [
        pair
        for both in zip(found.losses, expected.losses, strict=True)
        for pair in zip(*both, strict=True)
        if pair[0] != pair[1] and not all(map(math.isnan, pair))
    ]
    return f"{max((abs(a - b) / max(abs(b), 1e-300) for a, b in pairs), default=0.0):.1g}"


def row(name: str, runs: dict[str, Run]) -> list[str]:
    upstream = runs["upstream"]
    if upstream.error:
        return [name, f"upstream fails: {upstream.error[:60]}", "", "", "", ""]
    cells = [name]
    for engine in ENGINES:
        found = runs[engine]
        verdict = f"refused: {found.error.splitlines()[0][:60]}" if found.error else "accepted"
        cells += [verdict, "" if found.error else difference(found, upstream)]
    return [*cells, runs["traced"].ran]


def rows(clone: Path | None, wanted: str = "") -> Iterator[list[str]]:
    torch.set_default_dtype(torch.float64)
    found = pairs() | (module(HERE / "examples.py").examples(clone.resolve()) if clone else {})
    for name, (make, make_loss) in found.items():
        if wanted in name:
            yield row(name, {engine: run_pair(make, make_loss, engine) for engine in ("upstream", *ENGINES)})
    for line in EXAMPLES if clone else ():
        if wanted not in line:
            continue
        script, *arguments = line.split()
        path = clone.resolve() / "examples" / script
        if not path.exists():
            yield [line, "no such file", "", "", "", ""]
            continue
        yield row(line, {engine: run_example(path, arguments, engine) for engine in ("upstream", *ENGINES)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pyro", type=Path, help="a clone of Pyro's repository")
    parser.add_argument("--only", default="", metavar="TEXT", help="programs whose name contains it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = list(rows(arguments.pyro, arguments.only))
    print("\n".join(aligned(COLUMNS, found, left=len(COLUMNS))))
    accepted = sum(each[1] == each[3] == "accepted" for each in found)
    print(f"{accepted} of {len(found)} accepted; Δ is the largest relative difference from Pyro's losses")


if __name__ == "__main__":
    main()
