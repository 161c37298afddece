"""Commands: `python -m pyro_vae compress | decompress | list`.

    python -m pyro_vae compress digits.npy digits.pvz --model vae.pt
    python -m pyro_vae decompress digits.pvz digits.npy --model vae.pt
    python -m pyro_vae list digits.pvz

A model is a file of `VAE.save`, or of `Codec.save`. Data are an array of NumPy, (N, *event_shape) or of as
many elements; the array that comes back is the same to the last bit, in shape and type too.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from pyro_vae import applications
from pyro_vae.applications.codec import Codec
from pyro_vae.applications.codec.data import row_size
from pyro_vae.applications.codec.file import FileReader
from pyro_vae.utils import serialization
from pyro_vae.utils.display import aligned, progress_bar
from pyro_vae.vae import VAE

__all__ = ["main"]

_ROWS = 1024


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status, 0 or, after a message, 1.

    Args:
        arguments: The command line, without the name of the program; by default that of the process.

    Example:
        >>> main(["list"])
        Traceback (most recent call last):
            ...
        SystemExit: 2
    """
    args = _parser().parse_args(arguments)
    try:
        args.command(args)
    except (applications.CodecError, serialization.CheckpointError, OSError, TypeError, ValueError) as error:
        print(f"pyro_vae: {error}", file=sys.stderr)
        return 1
    return 0


def _compress(args: argparse.Namespace) -> None:
    codec = _codec(args)
    array = _array(args.input)
    _require_folder(args.output)
    shape = codec.model.event_shape
    if array.ndim == 0 or math.prod(array.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"{args.input} has shape {array.shape}; the model takes (N, {', '.join(map(str, shape))})"
        )
    with (
        codec.writer(args.output, row_shape=array.shape[1:]) as writer,
        progress_bar(len(array), shown=not args.quiet, unit=" rows") as bar,
    ):
        for start in range(0, len(array), _ROWS):
            rows = np.asarray(array[start : start + _ROWS])
            writer.write(rows.reshape(len(rows), *shape))
            bar.update(len(rows))
    _print_table([args.output])


def _array(path: Path) -> np.ndarray:
    """Return the array of a .npy file, mapped into memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, ValueError) as error:
        reason = str(error) or "it is empty"
        raise ValueError(f"{path} is not a .npy file of numbers: {reason}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{path} holds the arrays {', '.join(array.files)}: save one of them to a file, by "
            "np.save(path, array)"
        )
    return array


def _require_folder(path: Path) -> None:
    """Raise if the folder of a file to be written does not exist."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first")


def _decompress(args: argparse.Namespace) -> None:
    _require_folder(args.output)
    with (
        _codec(args).reader(args.input) as reader,
        serialization.replacing(args.output) as partial,
        progress_bar(reader.rows, shown=not args.quiet, unit=" rows") as bar,
    ):
        out = np.lib.format.open_memmap(
            partial, mode="w+", dtype=reader.dtype, shape=(reader.rows, *reader.shape)
        )
        start = 0
        for rows in reader:
            out[start : start + len(rows)] = rows.numpy()
            start += len(rows)
            bar.update(len(rows))
        out.flush()


def _list(args: argparse.Namespace) -> None:
    _print_table(args.files)


def _print_table(files: list[Path]) -> None:
    """Print rows, bits, ratio, fingerprint and check of compressed files; raise at the first damaged one."""
    table = []
    for path in files:
        with path.open("rb") as file:
            reader = FileReader(file)
            raw = sum(len(chunk.raw) for chunk in reader.chunks())  # verifies each chunk's check sum
        shape, weights = reader.header.shape, reader.header.model["weights"]
        plain = reader.rows * row_size(reader.header.dtype, shape)
        bits = 8 * reader.size / (reader.rows * math.prod(shape))
        counts = (f"{n:,}" for n in (reader.rows, len(reader.entries), raw, reader.size))
        table.append([str(path), *counts, f"{bits:.4f}", f"{plain / reader.size:.1f}", weights, "CRC-32 ok"])
    header = ["file", "rows", "chunks", "raw", "bytes", "bits/dim", "ratio", "weights", "check"]
    print(*aligned(header, table, left=1), sep="\n")


def _codec(args: argparse.Namespace) -> Codec:
    """Return the codec of a file of `Codec.save` or `VAE.save`."""
    try:
        return Codec.load(args.model)
    except serialization.CheckpointError as error:
        if "'pyro_vae VAE'" not in str(error):
            raise
    return Codec(VAE.load(args.model), lattice_bits=args.lattice_bits, particles=args.particles)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyro_vae",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, help_text in (
        ("compress", _compress, "compress an array by a model"),
        ("decompress", _decompress, "restore the array of a compressed file"),
    ):
        sub = commands.add_parser(name, help=help_text, allow_abbrev=False)
        sub.add_argument("input", type=Path)
        sub.add_argument("output", type=Path, help="replaced when the command has succeeded")
        sub.add_argument("--model", type=Path, required=True, help="file of VAE.save or Codec.save")
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        settings = sub.add_argument_group("of a VAE, the same for compress and decompress")
        settings.add_argument("--lattice-bits", type=int, default=8, help="(default: %(default)s)")
        settings.add_argument("--particles", type=int, default=1, help="(default: %(default)s)")
        sub.set_defaults(command=command)
    sub = commands.add_parser("list", help="rows, bits and check of compressed files", allow_abbrev=False)
    sub.add_argument("files", type=Path, nargs="+")
    sub.set_defaults(command=_list)
    return parser


if __name__ == "__main__":
    sys.exit(main())
