"""Memory, and time to the first step, of data that do not fit in memory.

    uv run --with zarr benchmarks/memory.py --folder DIR

Writes a file of 4 GiB in each format to DIR, and passes it through `fit` with validation and checkpoints, and
through `evaluate`, each in a process of its own. "Own" memory is what the system cannot take back, above
that before the call; pages of a memory map are not in it. Then a source of 10⁸ rows that are computed when
they are asked for; and one that takes as long as a step, whose rows are read ahead.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import pyro_vae as pv
from pyro_vae.data.batches import Batches

D = 784
BATCH = 1024


class Computed:
    """Rows that are computed when they are asked for.

    Args:
        rows: N.
        width: Elements of a row.
        seconds: Time that a batch takes besides, as that of a slow disk.
    """

    def __init__(self, rows: int, width: int, seconds: float = 0.0):
        self.shape, self.dtype, self.seconds = (rows, width), np.dtype("float32"), seconds

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        time.sleep(self.seconds)
        rows = np.arange(self.shape[0])[index] if isinstance(index, slice) else np.asarray(index)
        return np.sin(rows[:, None] * np.arange(1, self.shape[1] + 1)).astype(np.float32)


class OwnMemory:
    """Peak of this process's own memory in a block, in GiB above that at its start."""

    def __enter__(self) -> "OwnMemory":
        self.start, self.peak, self.ended = own_memory(), 0.0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended:
            self.peak = max(self.peak, own_memory() - self.start)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.thread.join()


def own_memory() -> float:
    """Return the memory of this process that is not backed by files, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20


class TimedAdam(torch.optim.Adam):
    """Adam that notes when its first step was taken."""

    first: float | None = None

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        TimedAdam.first = TimedAdam.first or time.perf_counter()
        return result


def make_vae(width: int = D) -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(8),
        likelihood=pv.likelihoods.Normal(8, (width,), hidden_features=(64,)),
        guide=pv.guides.DiagonalNormal((width,), 8, hidden_features=(64,)),
    )


def write_memmap(path: Path, rows: int) -> None:
    fill(np.lib.format.open_memmap(path, "w+", np.float32, (rows, D)), rows)


def write_h5py(path: Path, rows: int) -> None:
    with h5py.File(path, "w") as file:
        fill(file.create_dataset("x", (rows, D), "f4", chunks=(256, D)), rows)


def write_zarr(path: Path, rows: int) -> None:
    import zarr  # noqa: PLC0415 (not a dependency)

    fill(zarr.create_array(store=str(path), shape=(rows, D), chunks=(256, D), dtype="f4"), rows)


def fill(array: Any, rows: int) -> None:
    generator = np.random.default_rng(0)
    for begin in range(0, rows, 8192):
        array[begin : begin + 8192] = generator.random((min(8192, rows - begin), D), np.float32)


def open_memmap(path: Path) -> Any:
    return np.load(path, mmap_mode="r")


def open_mapped_tensor(path: Path) -> Any:
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def open_h5py(path: Path) -> Any:
    return h5py.File(path)["x"]


def open_zarr(path: Path) -> Any:
    import zarr  # noqa: PLC0415 (not a dependency)

    return zarr.open_array(str(path), mode="r")


FORMATS: dict[str, tuple[Callable, Callable, str]] = {
    "memmap": (write_memmap, open_memmap, "x.npy"),
    "mapped tensor": (write_memmap, open_mapped_tensor, "x.npy"),
    "h5py": (write_h5py, open_h5py, "x.h5"),
    "zarr": (write_zarr, open_zarr, "x.zarr"),
}


def measure(name: str, path: Path, rows: int) -> None:
    """Print the row of a format."""
    x, vae = FORMATS[name][1](path), make_vae()
    options: dict[str, Any] = {"batch_size": BATCH, "engine": "eager", "progress": False}
    pv.fit(make_vae(), torch.rand(BATCH, D), epochs=1, **options)  # what is imported late
    with OwnMemory() as training, tempfile.TemporaryDirectory() as run:
        started = time.perf_counter()
        pv.fit(vae, x, epochs=1, validation=0.1, checkpoint_dir=run, optimizer=TimedAdam, **options)
        seconds = time.perf_counter() - started
    assert TimedAdam.first is not None
    with OwnMemory() as evaluation:
        pv.evaluate(vae, x, num_particles=1, progress=False)
    print(
        f"| {name} | {rows * D * 4 / 2**30:.1f} GiB | {TimedAdam.first - started:.2f} s | "
        f"{seconds:.0f} s | {training.peak:.2f} GiB | {evaluation.peak:.2f} GiB |"
    )


def measure_many_rows(rows: int = 10**8, width: int = 20) -> None:
    """Print the time to the first step of more rows than an order is stored for."""
    stopped: list[float] = []

    class Stop(TimedAdam):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            super().step(closure)
            stopped.append(time.perf_counter())
            raise KeyboardInterrupt

    pv.fit(make_vae(width), torch.rand(BATCH, width), epochs=1, batch_size=BATCH, progress=False)
    with OwnMemory() as training:
        started = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            pv.fit(
                make_vae(width),
                Computed(rows, width),
                epochs=1,
                batch_size=BATCH,
                validation=0.01,
                engine="eager",
                optimizer=Stop,
                progress=False,
            )
    print(f"{rows:,} rows: first step after {stopped[0] - started:.2f} s, own memory {training.peak:.2f} GiB")


def measure_read_ahead(steps: int = 300) -> None:
    """Print the time of a step whose data take as long as the step, against that of data in memory."""
    memory = Computed(BATCH * 20, D)[np.arange(BATCH * 20)]

    def seconds(data: Any, number: int) -> float:
        options: dict[str, Any] = {"batch_size": BATCH, "engine": "traced", "progress": False}
        times: list[float] = []
        callbacks = [lambda *_: times.append(time.perf_counter())]
        pv.fit(make_vae(), data, epochs=number, callbacks=callbacks, **options)
        return float(np.median(np.diff(times))) / 20

    class Slow:
        def __init__(self, wait: float):
            self.shape, self.dtype, self.wait = memory.shape, memory.dtype, wait

        def __len__(self) -> int:
            return len(memory)

        def __getitem__(self, index: Any) -> np.ndarray:
            time.sleep(self.wait)
            return memory[index]

    epochs = steps // 20
    alone = seconds(memory, epochs)
    started = time.perf_counter()
    for _ in Batches(Slow(0.0)).epoch(0, batch_size=BATCH):  # what the reading of a batch takes by itself
        pass
    read = (time.perf_counter() - started) / 20
    late = seconds(Slow(alone - read), epochs)
    again = seconds(memory, epochs)
    usual = (alone + again) / 2
    print(
        f"step of data in memory {1e3 * usual:.2f} ms; of data that take {1e3 * alone:.2f} ms to read "
        f"{1e3 * late:.2f} ms: ratio {late / usual:.2f}"
    )


def measure_evaluation(rows: int = 100_000) -> None:
    """Print evaluate's memory for a datum."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(5),
        likelihood=pv.likelihoods.Normal(5, (6,), hidden_features=(16,)),
        guide=pv.guides.DiagonalNormal((6,), 5, hidden_features=(16,)),
    )
    x = torch.randn(rows, 6)
    pv.evaluate(vae, x[:2000], num_particles=500, progress=False)
    with OwnMemory() as evaluation:
        pv.evaluate(vae, x, num_particles=500, progress=False)
    print(
        f"evaluate, {rows:,} data, 500 particles, 5 latents: own memory {evaluation.peak:.2f} GiB, "
        f"{evaluation.peak * 2**30 / rows:.0f} bytes a datum"
    )


def main() -> None:
    """Measure all, or one part in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written, and removed")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = round(options.gib * 2**30 / 4 / D)
    if options.part in FORMATS:
        measure(options.part, options.folder / FORMATS[options.part][2], rows)
        return
    if options.part:
        globals()[f"measure_{options.part}"]()
        return

    def run(part: str) -> None:
        command = [sys.executable, __file__, "--folder", options.folder, "--gib", options.gib, "--part", part]
        subprocess.run(list(map(str, command)), check=False)

    options.folder.mkdir(parents=True, exist_ok=True)
    print(
        "| data | size | to the first step | fit | own memory, fit | own memory, evaluate |\n"
        + "|---" * 6
        + "|"
    )
    for name in options.formats:
        write, _, file = FORMATS[name]
        path = options.folder / file
        if not path.exists():
            write(path, rows)
        sys.stdout.flush()
        run(name)
    for part in ("many_rows", "read_ahead", "evaluation"):
        run(part)
    for _, _, file in FORMATS.values():
        path = options.folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
