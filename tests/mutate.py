"""Mutation test: change one operator of a file at a time, and list the changes that the tests do not notice.

    uv run --with cosmic-ray tests/mutate.py \\
        pyro_vae/objectives/estimators.py --tests tests/objectives/test_estimators.py

The changes are made in a copy of the working tree: a random sample of those of all modules given, without
annotations and the text of messages. The tests run once to learn which of them execute which line, and how
long they take; then a change meets the tests that execute its statement, the fastest first. Each run is a
fork of one process that has imported torch and Pyro. A change that survives shows a missing test, or code
that is equivalent: read it.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import itertools
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parent.parent
IMPORTED = ["arviz", "hypothesis", "pyro", "scipy.stats", "torch", "torchvision"]
OPTIONS = ["-q", "-n0", "--dist=no", "-pno:cacheprovider", "-Wignore::pytest.PytestAssertRewriteWarning"]
BITWISE = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}  # in place of arithmetic, a TypeError
ALIKE = {"Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq"}  # the same for small integers and short strings
TEXT = {"fstring", "fstring_expr", "annassign", "tfpdef"}  # formatted text and annotations


class Change(NamedTuple):
    """The operator that cosmic-ray applies to a place in a module."""

    module: str
    operator: str
    occurrence: int
    line: int


def changes(module: str) -> Iterator[Change]:
    """Yield the changes of a module."""
    nodes = list(ast_nodes(get_ast((ROOT / module).read_text())))
    for name in sorted(operator_names()):
        kind, _, swap = name.partition("Operator_")
        old, _, new = swap.partition("_")
        if swap in ALIKE or ("Binary" in kind and (old in BITWISE) != (new in BITWISE)):
            continue
        if get_operator(name).arguments():
            continue
        places = [(node, at) for node in nodes for at in get_operator(name)().mutation_positions(node)]
        for occurrence, (node, ((line, _), _)) in enumerate(places):
            if is_code(node):
                yield Change(module, name, occurrence, line)


def changed(change: Change) -> str:
    """Return the code of a module after a change, "" if it is not Python, as without a bare `*`."""
    code = mutate_code((ROOT / change.module).read_text(), get_operator(change.operator)(), change.occurrence)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "is" with a literal
        try:
            compile(code, change.module, "exec")
        except (SyntaxError, SyntaxWarning):
            return ""
    return code


def is_code(node: Any) -> bool:
    """Return whether a node of the syntax tree is no mark in a signature, annotation or formatted text."""
    if node.parent.type == "parameters":
        return False
    while node.parent is not None:
        parent = node.parent
        if parent.type in TEXT or (parent.type == "funcdef" and node is parent.annotation):
            return False
        node = parent
    return True


def in_fork(run: Callable[[], Any]) -> Any:
    """Return what `run` returns in a fork of this process, or why it does not, a string."""
    with tempfile.TemporaryFile() as result:
        child = os.fork()
        if not child:
            try:
                os.setsid()
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
                result.write(pickle.dumps(run()))
            except BaseException:
                result.write(pickle.dumps(traceback.format_exc()))
            finally:  # not back to the caller
                result.flush()
                os._exit(0)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what its tests started
        result.seek(0)
        content = result.read()
    return pickle.loads(content) if content else "died, or took too long"


class Plugin:
    """Choose and sort the tests that pytest runs, measure them, and keep the name of one that failed."""

    def __init__(self, chosen: dict[str, float] | None = None):
        self.chosen = chosen
        self.seconds: Counter = Counter()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.chosen is not None:
            items[:] = [item for item in items if item.nodeid in self.chosen]
            items.sort(key=lambda item: self.chosen[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.chosen:
            signal.alarm(20 + math.ceil(10 * self.chosen[nodeid]))  # ends the process

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def run(self, *arguments: str) -> None:
        """Run tests."""
        code = pytest.main([*OPTIONS, *arguments], plugins=[self])
        if code and not self.failed:
            self.failed.append(f"exit code {code}")


Lines = dict[str, dict[int, set[str]]]  # of a module: "test|phase" that executes a line, "" for an import


def measure(modules: list[str], tests: list[str]) -> tuple[Lines, Counter, list[str]]:
    """Run the tests; return those that execute each line, the seconds of each, and those that failed."""
    plugin = Plugin()
    Path("coverage.ini").write_text("[run]\ninclude = " + ",".join(modules))
    plugin.run("--cov", "--cov-config=coverage.ini", "--cov-context=test", "--cov-report=", *tests)
    data = coverage.CoverageData()
    data.read()
    lines: Lines = {}
    for module in modules:
        contexts = data.contexts_by_lineno(str(Path(module).resolve()))
        lines[module] = {line: set(names) for line, names in contexts.items()}
    return lines, plugin.seconds, plugin.failed


def statement(source: str, line: int) -> tuple[int, int, int]:
    """Return the first line of the innermost statement, the last line before its body, and its last line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
            last = node.end_lineno or first
            head = max(first, node.body[0].lineno - 1) if hasattr(node, "body") else last
            found.append((first, head, last))
    return min((s for s in found if s[0] <= line <= s[2]), key=lambda s: s[2] - s[0])


def tests_of(change: Change, source: str, lines: Lines, seconds: Counter) -> dict[str, float]:
    """Return the tests that execute the statement of a change, and those that share a fixture that does."""

    def executing(first: int, last: int) -> set[str]:
        return {name for line in range(first, last + 1) for name in lines[change.module].get(line, ())}

    first, head, last = statement(source, change.line)
    found = executing(first, head)
    if "" in found:  # a signature, a class or a constant
        found |= executing(first, last)
        found = found if found != {""} else executing(1, source.count("\n"))
    names = {name.rpartition("|")[0] for name in found}
    files = {name.partition("::")[0] for name in found if name.endswith("|setup")}
    return {
        name: duration
        for name, duration in seconds.items()
        if name in names or name.partition("::")[0] in files
    }


def noticed_by(change: Change, code: str, chosen: dict[str, float]) -> str:
    """Make a change, run the tests, and return the first that failed, "" if none did."""
    path = Path(change.module)
    original = path.read_text()

    def run() -> str:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        plugin = Plugin(chosen)
        plugin.run("-x", *sorted({name.partition("::")[0] for name in chosen}))
        return "".join(plugin.failed[:1])

    try:
        path.write_text(code)
        return in_fork(run)
    finally:
        path.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="+", help="the files to change")
    parser.add_argument("--tests", nargs="+", required=True, help="the tests that should notice")
    parser.add_argument("--sample", type=int, default=20, help="number of changes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    possible = [change for module in options.modules for change in changes(module)]
    random.Random(options.seed).shuffle(possible)
    compiled = ((change, code) for change in possible if (code := changed(change)))
    chosen = list(itertools.islice(compiled, options.sample))  # in random order: a run may be cut short
    for name in IMPORTED:
        importlib.import_module(name)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        os.chdir(folder)
        sys.path.insert(0, folder)  # before the installed package
        os.environ["PYTHONPATH"] = folder
        measured = in_fork(lambda: measure(options.modules, options.tests))
        if isinstance(measured, str):
            raise SystemExit(measured)
        lines, seconds, failed = measured
        for name in failed:  # some count the objects that are alive, and coverage makes objects
            print("left out, for it fails without a change:", name, flush=True)
            seconds.pop(name, None)
        if not seconds:
            raise SystemExit("no test passes")
        print(f"{len(seconds)} tests take {sum(seconds.values()):.0f} s")
        sampled: Counter = Counter()
        survived: Counter = Counter()
        for change, code in chosen:
            source = Path(change.module).read_text()
            tests = tests_of(change, source, lines, seconds)
            start = time.monotonic()
            noticed = noticed_by(change, code, tests) if tests else ""
            print(f"{time.monotonic() - start:.1f} s", *change, noticed or "SURVIVED", flush=True)
            sampled[change.module] += 1
            if not noticed:
                survived[change.module] += 1
                print(
                    *difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=2), sep="\n"
                )
    for module in sorted(sampled):
        print(f"{survived[module]} of {sampled[module]} changes of {module} survived")
    print(f"{survived.total()} of {sampled.total()} survived; about {len(possible)} are possible")


if __name__ == "__main__":
    main()
