"""Run the shortest script of each of ten tasks: its lines, its seconds of one core, a line that it prints.

    uv run benchmarks/uses/tasks.py
    uv run benchmarks/uses/tasks.py --only table --only counts

Each script runs in a folder with the data that its user would have, in processes of one thread. Seconds are
those of the processor, starting Python and torch included. The last may allocate less than its data take.
"""

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

import pyro_vae as pv
from pyro_vae.utils.display import aligned

GIB = 2**30


class Task(NamedTuple):
    """A script for a shell, or for Python if it imports something, and what to show of its output."""

    script: str
    shown: str
    memory: int = 0  # bytes that a process may allocate; 0 for any number
    interrupt: str = ""  # press Ctrl-C when this file is there


TASKS = {
    "photographs": Task("pyro-vae train photos --size 32 --epochs 30 --out vae.pt", r"^ *30 +-.*"),
    "table": Task("pyro-vae train train.csv --out vae.pt", r"^ *\d+ +-.*(?=\nwrote)"),
    "counts": Task("pyro-vae train counts.npy --out vae.pt", r"^likelihood.*(?= \()"),
    "pipeline": Task(
        """
from sklearn.datasets import load_wine
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from pyro_vae.applications.sklearn import VAETransformer
pipe = make_pipeline(VAETransformer(n_components=2, random_state=0), KNeighborsClassifier())
print("accuracy", cross_val_score(pipe, *load_wine(return_X_y=True)).mean().round(3))
""",
        r"accuracy.*",
    ),
    "anomalies": Task(
        """
pyro-vae train train.csv --out vae.pt
pyro-vae anomalies today.csv found.csv --model vae.pt --reference normal.csv
""",
        r"\d+ of 50 rows.*",
    ),
    "gaps": Task(
        """
pyro-vae train holes.csv --missing nan --out vae.pt
pyro-vae impute holes.csv filled.csv --model vae.pt
""",
        r"\d+ values filled.*",
    ),
    "compression": Task(
        """
pyro-vae train bits.npy --out vae.pt
pyro-vae compress new.npy new.pvz --model vae.pt
""",
        r"^new.pvz.*",
    ),
    "labels": Task(
        """
import torch, pyro_vae as pv
torch.manual_seed(0)
x = pv.data.load("digits", binarize="dynamic")
cvae = pv.ConditionalVAE(
    prior=pv.priors.StandardNormal(10),
    likelihood=pv.likelihoods.Bernoulli(10, (1, 28, 28), context_dim=10),
    guide=pv.guides.DiagonalNormal((1, 28, 28), 10, context_dim=10),
)
history = pv.fit(cvae, (x, x.labels), epochs=30)
threes = cvae.sample(16, y=torch.full((16,), 3), mean=True)
test = pv.data.load("digits", split="test", binarize="fixed")
right = cvae.class_probabilities(test[:], 10).argmax(-1) == test.labels
print(f"p(y|x) is right for {right.double().mean():.1%} of the test digits")
""",
        r"p\(y.*",
    ),
    "stop": Task(
        """
pyro-vae train digits --epochs 40 --out vae.pt --checkpoint-dir run
pyro-vae train digits --epochs 40 --out vae.pt --checkpoint-dir run --resume
""",
        r"interrupted; the run is saved.*",
        interrupt="run/last.pt",
    ),
    "memory": Task(
        """
import numpy as np, pyro_vae as pv
x = np.load("large.npy", mmap_mode="r")
vae = pv.VAE(
    prior=pv.priors.StandardNormal(5),
    likelihood=pv.likelihoods.Normal(5, x.shape[1:], variance="shared", hidden_features=(50,)),
    guide=pv.guides.DiagonalNormal(x.shape[1:], 5, hidden_features=(50,)),
)
print(pv.fit(vae, x, epochs=1, batch_size=1024))
""",
        r"^ +1 .*",
        memory=GIB,
    ),
}


def write_tables() -> None:
    """Write the tables of docs/command-line.md, and counts."""
    random = np.random.default_rng(0)
    size, age = random.normal(size=(2, 600))
    columns = {
        "height": 1.7 + 0.1 * size + 0.01 * random.normal(size=600),
        "mass": 70 + 12 * size + 3 * size**2 + 4 * age + 2 * random.normal(size=600),
        "pulse": 65 - 5 * age + 3 * random.normal(size=600),
        "year": np.round(1980 + 10 * age),
    }
    x = np.stack(list(columns.values()), 1)
    today = x[550:].copy()
    today[3, 1] = 140
    holes = np.where(random.random((600, 4)) < 0.1, np.nan, x)
    for name, rows in {"train": x[:400], "normal": x[400:550], "today": today, "holes": holes}.items():
        header = ",".join(columns)
        np.savetxt(f"{name}.csv", rows, delimiter=",", header=header, comments="", fmt="%.8g")
    np.save(
        "counts.npy",
        random.poisson(np.exp(0.5 * random.normal(size=(1000, 2)) @ random.normal(size=(2, 12)))),
    )


def write_images() -> None:
    """Write 400 parts of scikit-learn's two photographs, and digits in black and white."""
    random = np.random.default_rng(0)
    Path("photos").mkdir()
    for number, photograph in enumerate(load_sample_images().images):
        for part in range(200):
            top, left = (random.integers(0, length - 96) for length in photograph.shape[:2])
            image = Image.fromarray(photograph[top : top + 96, left : left + 96])
            image.save(Path("photos", f"{number}-{part}.jpg"))
    for name, split in {"bits": "train", "new": "test"}.items():
        bits = pv.data.load("digits", split=split, binarize="threshold")[:]
        np.save(f"{name}.npy", bits.numpy().astype(np.uint8))


def write_large() -> None:
    """Write 1.5 GiB of numbers, (513,600, 784), that depend on three others."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(3, 784))
    rows = np.lib.format.open_memmap("large.npy", mode="w+", dtype=np.float32, shape=(513_600, 784))
    for part in np.split(rows, 100):
        part[:] = random.normal(size=(len(part), 3)) @ weights + random.normal(size=part.shape)


def run(task: Task) -> tuple[int, float, str]:
    """Run a script; return its lines, the seconds of the processor, and the line to show."""
    script = task.script.strip()
    Path("script.py").write_text(script)
    body = "python script.py" if script.startswith(("import", "from")) else script
    limit = f"ulimit -d {task.memory // 1024}" if task.memory else ""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        ["sh", "-c", f"trap : INT\n{limit}\n{body}"],  # Ctrl-C ends a command, not the script
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that Ctrl-C reaches the script alone
    )
    while task.interrupt and process.poll() is None and not Path(task.interrupt).exists():
        time.sleep(0.1)
    if task.interrupt:
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(task.shown, output, re.MULTILINE)
    if process.returncode or found is None:
        raise RuntimeError(f"exit status {process.returncode}:\n{output}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return len(script.splitlines()), seconds, " ".join(found[0].split())


def main() -> None:
    """Write the data, run the scripts, print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", action="append", choices=TASKS, help="a task; may be repeated")
    args = parser.parse_args()
    names = args.only or list(TASKS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_tables()
        write_images()
        if "memory" in names:
            write_large()
        for name in names:
            lines, seconds, shown = run(TASKS[name])
            rows.append([name, str(lines), f"{seconds:.0f}", shown])
            print(*rows[-1], sep="  ", flush=True)
        os.chdir("/")
    print("", *aligned(["task", "lines", "seconds", "prints"], rows, left=1), sep="\n")


if __name__ == "__main__":
    main()
