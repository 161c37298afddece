"""`pyro-vae compress`, `decompress` and `list`: arrays compressed without loss."""

import argparse
import math
from pathlib import Path

import numpy as np

from pyro_vae.applications.codec import Codec
from pyro_vae.applications.codec.data import row_size
from pyro_vae.applications.codec.file import FileReader
from pyro_vae.applications.commands.data import open_arrays
from pyro_vae.applications.commands.tables import require_writable
from pyro_vae.utils import serialization
from pyro_vae.utils.display import aligned, progress_bar
from pyro_vae.vae import VAE

__all__ = ["compress", "decompress", "list_files"]

_ROWS = 1024


def compress(args: argparse.Namespace) -> None:
    """Compress an array, and print the table of `list_files`.

    Raises:
        ValueError: If the array is of another shape, or a value cannot be coded exactly.
    """
    codec = _codec(args)
    array = _array(args.input)
    require_writable(args.output, ())
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
    array = open_arrays(path)
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{path} holds the arrays {', '.join(array.files)}: save one of them to a file, by "
            "np.save(path, array)"
        )
    return array


def decompress(args: argparse.Namespace) -> None:
    """Restore the array of a compressed file, the same to the last bit, in shape and type too.

    Raises:
        CodecError: If the file is damaged, or of another model.
    """
    require_writable(args.output, ())
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


def list_files(args: argparse.Namespace) -> None:
    """Print rows, bits, ratio, fingerprint and check of compressed files.

    Raises:
        CodecError: At the first damaged file.
    """
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
    settings = {"lattice_bits": args.lattice_bits, "particles": args.particles, "precision": args.precision}
    return Codec(VAE.load(args.model), **settings)
