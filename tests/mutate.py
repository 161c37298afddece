"""Mutation test: change one operator of a file at a time, and list the changes that its tests do not notice.

    uv run --with cosmic-ray tests/mutate.py \\
        pyro_vae/objectives/estimators.py tests/objectives/test_estimators.py

The changes are made in a copy of the working tree, a random sample of them. A change that survives shows a
missing test, or code that is equivalent: read it.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -n0 -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def cosmic_ray(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "cosmic_ray.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}  # before the installed package
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cosmic-ray {arguments[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def keep_a_sample(session: Path, size: int, seed: int) -> int:
    """Delete all but a random sample of the planned changes; return how many there were."""
    with sqlite3.connect(session) as database:
        jobs = [row[0] for row in database.execute("select job_id from work_items order by job_id")]
        places = database.execute(
            "select job_id from mutation_specs order by module_path, operator_name, occurrence, operator_args"
        )
        ordered = [row[0] for row in places]  # job ids are random
        kept = set(random.Random(seed).sample(ordered, min(size, len(ordered))))
        for job in jobs:
            if job not in kept:
                database.execute("delete from mutation_specs where job_id = ?", (job,))
                database.execute("delete from work_items where job_id = ?", (job,))
    return len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("module", help="the file to change")
    parser.add_argument("tests", nargs="+", help="the tests that should notice")
    parser.add_argument("--sample", type=int, default=20, help="number of changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the tests of a change")
    options = parser.parse_args()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in listed.stdout.splitlines():
            if (ROOT / path).is_file():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, folder / path)
        (folder / "mutate.toml").write_text(
            CONFIG.format(
                module=options.module,
                tests=" ".join(options.tests),
                timeout=options.timeout,
                python=sys.executable,
            )
        )
        cosmic_ray(folder, "baseline", "mutate.toml")
        cosmic_ray(folder, "init", "mutate.toml", "session.sqlite")
        total = keep_a_sample(folder / "session.sqlite", options.sample, options.seed)
        cosmic_ray(folder, "exec", "mutate.toml", "session.sqlite")
        lines = cosmic_ray(folder, "dump", "session.sqlite").splitlines()
    results = [json.loads(line)[1] for line in lines]
    survived = [result for result in results if result["test_outcome"] == "survived"]
    for result in survived:
        print(result["diff"])
    print(f"{len(survived)} of {len(results)} changes survived, out of {total} possible ones")


if __name__ == "__main__":
    main()
