"""Compress MNIST without loss: rates beside general compressors and image formats, speed, memory.

    uv run --with zstandard benchmarks/uses/compression.py --data-root DIR --part rates
    uv run --with zstandard benchmarks/uses/compression.py --data-root DIR --part grey
    uv run benchmarks/uses/compression.py --data-root DIR --part speed memory

rates    digits in black and white (threshold 0.5): bits per pixel of the test images in one file, of a VAE
         with one draw of z, with several, and with q(z|x) refined for each image (`SemiAmortised`, in
         float64, on the first --refined images, and the plain codec on these)
grey     grey levels, by a discretised logistic and by a beta-binomial
speed    images per second, each way, by number of lanes, on one thread
memory   peak memory of a process that writes, and of one that reads, 10,000 and 100,000 images (Linux)

The model is not in the rates; its bytes are printed. Without --data-root, MNIST is downloaded.
"""

import argparse
import bz2
import gzip
import io
import itertools
import lzma
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.applications import Codec
from pyro_vae.utils.display import aligned

SHAPE, K, HIDDEN = (1, 28, 28), 40, (200,)
COLUMNS = 40  # of images on the sheet that image formats are given
ROWS_PER_CHUNK = 4096


def main() -> None:
    """Train, and print the tables that were asked for."""
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.worker:
        work(*args.worker)
        return
    parts = {"rates": rates, "grey": grey, "speed": speed, "memory": memory}
    binary = train(args, "Bernoulli") if set(args.part) - {"grey"} else None
    for name in args.part:
        parts[name](args, binary)


def images(args: argparse.Namespace, split: str, *, grey: bool) -> pv.data.Images:
    """Return MNIST."""
    return pv.data.load("mnist", root=args.data_root, split=split, binarize=None if grey else "threshold")


class Counts(nn.Module):
    """A network of x/255 for grey levels x = 0 … 255."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.network(x / 255)

    def folded(self) -> nn.Module:
        """Return the network with the division in its first weights, which has an exact form."""
        first = next(part for part in self.network.modules() if isinstance(part, nn.Linear))
        with torch.no_grad():
            first.weight.div_(255)
        return self.network


def train(args: argparse.Namespace, family: str) -> pv.VAE:
    """Train a VAE 784-200-40, with early stopping."""
    torch.manual_seed(0)
    started = time.perf_counter()
    network = pv.networks.MLP(784, 2 * K, hidden_features=HIDDEN)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=getattr(pv.likelihoods, family)(K, SHAPE, hidden_features=HIDDEN),
        guide=pv.guides.DiagonalNormal(
            SHAPE, K, network=Counts(network) if family == "BetaBinomial" else network
        ),
    )
    data = images(args, "train", grey=family != "Bernoulli")
    if family == "BetaBinomial":
        data = (data[:] * 255).round()
    pv.fit(vae, data, epochs=args.epochs, batch_size=200, seed=0, progress=False)
    if family == "BetaBinomial":
        vae = vae.with_guide(pv.guides.DiagonalNormal(SHAPE, K, network=vae.posterior.network.folded()))
    print(f"{family}: {args.epochs} epochs in {time.perf_counter() - started:.0f} s")
    return vae


def rates(args: argparse.Namespace, vae: pv.VAE) -> None:
    """Print the bits per pixel of black and white images."""
    x = images(args, "test", grey=False)[: args.images]
    sizes = dict(general(x.byte().numpy(), "bytes")) | dict(
        general(np.packbits(x.byte().numpy()), "bits, 8 to a byte")
    )
    sizes |= dict(pictures(255 * x.byte().numpy(), "1"))
    found = [[name, len(x), 8 * size / x.numel()] for name, size in sizes.items()]
    few = x[: args.refined]
    refined = vae.with_guide(
        pv.guides.SemiAmortised(vae.posterior, num_steps=20, step_size=0.1, num_particles=8)
    )
    codecs = {
        "VAE": (Codec(vae, lanes=1), x),
        f"VAE, {args.particles} draws of z": (Codec(vae, lanes=1, particles=args.particles), x),
        "VAE, on as many as the next": (Codec(vae, lanes=1), few),
        "VAE, q(z|x) refined, float64": (Codec(refined, lanes=1, precision="float64"), few),
    }
    print(table(found + [each for name, (codec, data) in codecs.items() for each in own(name, codec, data)]))
    print_model(Codec(vae))


def grey(args: argparse.Namespace, _: pv.VAE | None) -> None:
    """Print the bits per pixel of grey levels."""
    levels = (images(args, "test", grey=True)[: args.images] * 255).round().byte()
    sizes = dict(general(levels.numpy(), "bytes")) | dict(pictures(levels.numpy(), "L"))
    found = [[name, len(levels), 8 * size / levels.numel()] for name, size in sizes.items()]
    for family in ("DiscretizedLogistic", "BetaBinomial"):
        codec = Codec(train(args, family), lanes=1)
        data = levels / torch.tensor(255.0) if family == "DiscretizedLogistic" else levels.float()
        found += own(f"VAE, {family}", codec, data)
    print(table(found))


def own(name: str, codec: Codec, x: Tensor) -> Iterator[list]:
    """Yield the rate of the file of a codec, which must decode, and that of its examples alone."""
    blob, times = both_ways(codec, x)
    print(f"{name}: {len(x) / times[0]:,.0f} images/s to compress, {len(x) / times[1]:,.0f} to decompress")
    yield [name, len(x), 8 * len(blob) / x.numel()]
    found = codec.rate(x, num_particles=1)
    yield [f"   net; −ELBO {found.minus_elbo}", len(x), found.net.value]


def both_ways(codec: Codec, x: Tensor) -> tuple[bytes, tuple[float, float]]:
    """Return the file of x, and the seconds to write it and to read it; raise if it is not x that is read."""
    started = time.perf_counter()
    blob = codec.compress(x)
    middle = time.perf_counter()
    assert torch.equal(codec.decompress(blob), x)
    return blob, (middle - started, time.perf_counter() - middle)


def table(rows: list[list]) -> str:
    """Return rows of name, images and bits per pixel, as text."""
    shown = [[name, f"{count:,}", f"{value:.4f}"] for name, count, value in rows]
    return "\n".join(aligned(["", "images", "bits per pixel"], shown, left=1))


def print_model(codec: Codec) -> None:
    """Print the bytes of a codec's model."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "codec"
        codec.save(path)
        print(f"the model takes {path.stat().st_size:,} bytes, once")


def general(content: np.ndarray, kind: str) -> Iterator[tuple[str, int]]:
    """Yield the bytes of the images under general compressors."""
    methods: dict[str, Callable[[bytes], bytes]] = {
        "gzip -9": lambda data: gzip.compress(data, 9),
        "bz2 -9": lambda data: bz2.compress(data, 9),
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    try:
        import zstandard  # noqa: PLC0415 (not of the package's environment)
    except ImportError:
        print("no zstandard: uv run --with zstandard")
    else:
        methods["zstd -22"] = zstandard.ZstdCompressor(level=22).compress
    for name, method in methods.items():
        yield f"{name} of {kind}", len(method(content.tobytes()))


def pictures(pixels: np.ndarray, mode: str) -> Iterator[tuple[str, int]]:
    """Yield the bytes of the images on one sheet, and each in a file of its own, in image formats."""
    height, width = pixels.shape[-2:]
    tiles = np.zeros((-(-len(pixels) // COLUMNS) * COLUMNS, height, width), np.uint8)
    tiles[: len(pixels)] = pixels.reshape(-1, height, width)
    sheet = tiles.reshape(-1, COLUMNS, height, width).swapaxes(1, 2).reshape(-1, COLUMNS * width)
    formats = {
        "PNG": ("png", mode, {"optimize": True}),
        "WebP lossless": ("webp", "RGB", {"lossless": True, "method": 6, "quality": 100}),
    }
    for name, (kind, own_mode, options) in formats.items():
        for what, each in (("one sheet", [sheet]), ("each", tiles[: len(pixels)])):
            size = 0
            for part in each:
                file = io.BytesIO()
                Image.fromarray(part).convert(own_mode).save(file, kind, **options)
                size += len(file.getvalue())
            yield f"{name}, {what}", size


def speed(args: argparse.Namespace, vae: pv.VAE) -> None:
    """Print images per second."""
    x = images(args, "test", grey=False)[: args.images]
    rows = []
    for lanes in (1, 4, 16):
        codec = Codec(vae, lanes=lanes)
        codec.decompress(codec.compress(x[:64]))
        blob, times = both_ways(codec, x)
        rate = 8 * len(blob) / x.numel()
        rows.append([str(lanes), *(f"{len(x) / each:,.0f}" for each in times), f"{rate:.4f}"])
    header = ["lanes", "images/s, compress", "images/s, decompress", "bits per pixel"]
    print("\n".join(aligned(header, rows, left=1)))


def memory(args: argparse.Namespace, vae: pv.VAE) -> None:
    """Print the peak memory of processes that write and read files of two lengths."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Codec(vae, lanes=16).save(folder / "codec")
        np.save(folder / "x.npy", images(args, "test", grey=False)[:1000].numpy())
        for count, job in itertools.product((10_000, 100_000), ("write", "read")):
            command = [sys.executable, __file__, "--worker", job, name, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            before, peak, seconds = map(float, done.stdout.split()[-3:])
            rows.append([job, f"{count:,}", f"{before:.0f}", f"{peak:.0f}", f"{count / seconds:,.0f}"])
    header = ["", "images", "MiB before", "MiB at most", "images/s"]
    print("\n".join(aligned(header, rows, left=1)))


def work(job: str, folder: str, count: str) -> None:
    """Write or read a file, in batches; print memory before and at most, and the time."""
    x = torch.from_numpy(np.load(Path(folder) / "x.npy"))
    codec = Codec.load(Path(folder) / "codec")
    codec.decompress(codec.compress(x[:16]))
    before, started = peak_memory(), time.perf_counter()
    path = Path(folder) / f"{count}.pvz"
    if job == "write":
        with codec.writer(path, rows_per_chunk=ROWS_PER_CHUNK) as writer:
            for _ in range(int(count) // len(x)):
                writer.write(x)
    else:
        assert sum(len(rows) for rows in codec.reader(path)) == int(count)
    print(before, peak_memory(), time.perf_counter() - started)


def peak_memory() -> float:
    """Return the peak memory of this process in MiB; `resource` would start from that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--part", nargs="+", choices=["rates", "grey", "speed", "memory"], default=["rates"])
    add("--data-root", default=None)
    add("--epochs", type=int, default=20)
    add("--images", type=int, default=10_000, help="of the test set (default: %(default)s)")
    add("--refined", type=int, default=500, help="images that are coded with a refined q(z|x)")
    add("--particles", type=int, default=10)
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
