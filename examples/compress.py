"""Compress images by a VAE without loss, beside gzip, bz2, xz, PNG and WebP.

    uv run examples/compress.py                                # train on 4,000 digits, compress 1,000
    uv run examples/compress.py --model runs/compress/vae.pt   # with a trained model

A table of bits per pixel is printed. The model, the compressed file and a figure of the bits that each image
takes are written to the folder --output. The model is not part of the rate: its size is printed apart.
"""

import argparse
import bz2
import gzip
import io
import lzma
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.applications.codec.bits_back import encode
from pyro_vae.applications.codec.data import to_symbols
from pyro_vae.utils.display import aligned


def main() -> None:
    """Train or load a model, compress the test images, print the table, draw the figure."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    vae = train(args) if args.model is None else pv.VAE.load(args.model)
    vae.save(args.output / "vae.pt")
    x = pv.data.load("digits", split="test", binarize="threshold")[: args.images]
    codec = pv.applications.Codec(vae, lanes=1, particles=args.particles)
    blob = codec.compress(x)
    (args.output / "digits.pvz").write_bytes(blob)
    codec.save(args.output / "digits.codec")
    assert torch.equal(codec.decompress(blob), x)

    sizes = other_sizes(x) | {f"VAE, draws of z: {args.particles}": len(blob)}
    entries = sorted(sizes.items(), key=by_size)
    rows = [[name, f"{size:,}", f"{8 * size / x.numel():.4f}"] for name, size in entries]
    print(*aligned(["", "bytes", "bits per pixel"], rows, left=1), sep="\n")
    print(f"\n{codec.rate(x)}")
    print(f"\nthe model takes {(args.output / 'digits.codec').stat().st_size:,} bytes more, once")
    plots.save(draw(codec, x), args.output / "bits.png")
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


def by_size(entry: tuple[str, int]) -> int:
    """Return the size of an entry, to sort by."""
    return entry[1]


def train(args: argparse.Namespace) -> pv.VAE:
    """Train a VAE on the training digits, in black and white."""
    torch.manual_seed(args.seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(40),
        likelihood=pv.likelihoods.Bernoulli(40, (1, 28, 28), hidden_features=(200,)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 40, hidden_features=(200,)),
    )
    images = pv.data.load("digits", binarize="threshold")
    pv.fit(vae, images, epochs=args.epochs, batch_size=100, seed=args.seed)
    return vae


def other_sizes(x: torch.Tensor) -> dict[str, int]:
    """Return the bytes of the images, eight pixels to a byte or one, under general compressors."""
    pixels = (x.numpy() > 0).astype(np.uint8)
    contents = {"bits": np.packbits(pixels).tobytes(), "bytes": pixels.tobytes()}
    methods = {
        "gzip -9": lambda content: gzip.compress(content, 9),
        "bz2 -9": lambda content: bz2.compress(content, 9),
        "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
    }
    sizes = {
        f"{name} of {kind}": len(method(content))
        for name, method in methods.items()
        for kind, content in contents.items()
    }
    columns, (height, width) = 40, x.shape[-2:]  # in a grid, which these formats like better than a column
    tiles = np.zeros((-(-len(x) // columns) * columns, height, width), np.uint8)
    tiles[: len(x)] = pixels.reshape(-1, height, width)
    sheet = tiles.reshape(-1, columns, height, width).swapaxes(1, 2).reshape(-1, columns * width)
    image = Image.fromarray(255 * sheet)
    formats = {
        "PNG, one sheet": ("png", image.convert("1"), {"optimize": True}),
        "WebP, one sheet": ("webp", image.convert("RGB"), {"lossless": True, "method": 6, "quality": 100}),
        "CCITT G4, one sheet": ("tiff", image.convert("1"), {"compression": "group4"}),
    }
    for name, (kind, picture, options) in formats.items():
        file = io.BytesIO()
        try:
            picture.save(file, kind, **options)
        except (KeyError, OSError, ValueError):  # some builds lack formats
            continue
        sizes[name] = len(file.getvalue())
    return sizes


def draw(codec: pv.applications.Codec, x: torch.Tensor) -> Figure:
    """Draw a histogram of the bits per image, with the cheapest and the dearest images."""
    symbols, _ = to_symbols(codec.model, x)
    bits = encode(codec.model, symbols, lanes=1, particles=codec.particles).bits
    order = np.argsort(bits)
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    grid = figure.add_gridspec(3, 10, height_ratios=(3, 1, 1))
    axes = figure.add_subplot(grid[0, :])
    axes.hist(bits, bins=50, color=plots.PALETTE[0])
    axes.axvline(bits.mean(), color="black", linestyle="--", label=f"mean {bits.mean():.0f} bits")
    axes.set(xlabel="bits per image", ylabel="images", title=f"Bits that {len(x):,} images take")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    for row, chosen in enumerate((order[:10], order[-10:]), 1):
        for column, index in enumerate(chosen):
            cell = figure.add_subplot(grid[row, column])
            cell.imshow(x[index, 0], cmap="gray_r", vmin=0, vmax=1)
            cell.set_title(f"{bits[index]:.0f}", fontsize=8)
            cell.set_axis_off()
    return figure


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FILE", help="VAE of black and white digits in place of a new one")
    add("--epochs", type=int, default=100, help="passes over the training images (default: %(default)s)")
    add("--particles", type=int, default=1, metavar="S", help="draws of z per image (default: %(default)s)")
    add("--images", type=int, default=1000, metavar="N", help="compress the first N (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/compress"), metavar="DIR", help="(default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
