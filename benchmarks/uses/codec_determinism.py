"""Compress and decompress the same digits under other settings of the machine; every file must be the same.

    uv run benchmarks/uses/codec_determinism.py
    uv run benchmarks/uses/codec_determinism.py --python FIRST SECOND   # by interpreters with other torches

Each row of the table is a process of its own, with a number of threads, vector instructions of torch, and a
setting of a library of matrix products or convolutions. It reads the file that this process wrote, and writes
the data again in batches of several sizes:

    exact     by precision "exact": the bytes must be the same in all rows
    float64   by precision "float64": the same, or a typed refusal where the machine is another kind
    float32   a digest of the VAE's own outputs, for comparison: where it differs, so would a float32 codec

It ends with status 1 if a file differs, or decodes to other data.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae.applications import Codec
from pyro_vae.applications.codec.errors import MachineMismatchError
from pyro_vae.utils.display import aligned

ROOT = Path(__file__).parents[2]
SHAPE, K, LANES, ROWS_PER_CHUNK = (1, 28, 28), 8, 4, 20
CAPABILITIES = ("default", "avx2", "avx512")  # of torch
LIBRARIES: dict[str, dict[str, str]] = {
    "as it is": {},
    "OpenBLAS for Prescott": {"OPENBLAS_CORETYPE": "Prescott"},
    "OpenBLAS for SkylakeX": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def main() -> None:
    """Write the files, read them in every process, print the table."""
    args = parse_arguments()
    if args.worker is not None:
        print(json.dumps(work(args.worker, args.batches)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = prepare(folder, args.images)
        cases = itertools.product(args.python or [sys.executable], CAPABILITIES, LIBRARIES, (1, 2))
        rows, failed = [], False
        for python, capability, library, threads in cases:
            settings = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
            found = run(python, folder, args.batches, settings | LIBRARIES[library])
            verdicts = [judge(found[name], expected[name]) for name in ("exact", "float64")]
            failed |= "OTHER" in "".join(verdicts) or verdicts[0] != "same"
            rows.append([found["torch"], capability, library, str(threads), *verdicts, found["float32"]])
            print(" ".join(rows[-1]), file=sys.stderr)
    print(
        *aligned(
            ["torch", "instructions", "library", "threads", "exact", "float64", "float32"], rows, left=3
        ),
        sep="\n",
    )
    sizes = ", ".join(map(str, args.batches))
    print(f"batches of {sizes}, of {args.images} images; the files were written by {expected['torch']}")
    sys.exit(int(failed))


def prepare(folder: Path, images: int) -> dict[str, Any]:
    """Train a VAE, write it with data and files to a folder; return digests of the files."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.LearnedNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, SHAPE, hidden_features=(100,), activation="gelu"),
        guide=pv.guides.DiagonalNormal(
            SHAPE, K, network=pv.networks.ConvEncoder(SHAPE, 2 * K, channels=(8, 16))
        ),
    )
    train = pv.data.load("digits", split="train", binarize="threshold")[:2000]
    pv.fit(vae, train, epochs=2, batch_size=100, seed=0, progress=False)
    vae.save(folder / "vae.pt")
    x = pv.data.load("digits", split="test", binarize="threshold")[:images]
    torch.save(x, folder / "x.pt")
    expected = {"torch": torch.__version__}
    for name in ("exact", "float64"):
        content = write(codec_of(vae, name), x, images)
        (folder / name).write_bytes(content)
        expected[name] = digest(content)
    return expected


def codec_of(vae: pv.VAE, precision: str) -> Codec:
    """Return the codec that all processes use."""
    return Codec(vae, precision=precision, lanes=LANES)


def write(codec: Codec, x: torch.Tensor, batch: int) -> bytes:
    """Return the file of x, handed over in batches."""
    file = io.BytesIO()
    with codec.writer(file, rows_per_chunk=ROWS_PER_CHUNK) as writer:
        for part in x.split(batch):
            writer.write(part)
    return file.getvalue()


def work(folder: Path, batches: list[int]) -> dict[str, Any]:
    """Read and write the files in this process; return digests, or how it was refused."""
    vae, x = pv.VAE.load(folder / "vae.pt"), torch.load(folder / "x.pt")
    z = torch.linspace(-3, 3, 64 * K).reshape(64, K)
    with torch.no_grad():
        outputs = vae.likelihood.outputs(z)[0]
        moments = vae.encode(x).base_dist.loc
    content = outputs.numpy().tobytes() + moments.numpy().tobytes()
    found: dict[str, Any] = {"torch": torch.__version__, "float32": digest(content)}
    for name in ("exact", "float64"):
        codec = codec_of(vae, name)
        try:
            same = torch.equal(codec.decompress((folder / name).read_bytes()), x)
        except MachineMismatchError:
            found[name] = "refused"
        else:
            files = {digest(write(codec, x, batch)) for batch in batches}
            found[name] = sorted(files) if same else ["other data"]
    return found


def judge(found: Any, expected: str) -> str:
    """Return whether all files are those expected, or what else happened."""
    return "same" if found == [expected] else "refused" if found == "refused" else "OTHER"


def run(python: str, folder: Path, batches: list[int], settings: dict[str, str]) -> dict[str, Any]:
    """Run this file as a worker."""
    command = [python, __file__, "--worker", str(folder), "--batches", *map(str, batches)]
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} with {settings} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def digest(content: bytes) -> str:
    """Return 12 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:12]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 7, 60])
    parser.add_argument("--python", nargs="+", help="interpreters of the processes (default: this one)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
