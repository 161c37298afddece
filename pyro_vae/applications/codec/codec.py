"""Lossless compression by a VAE at the rate of its ELBO, decoded to the same bits on every machine.

`Codec` turns a trained VAE into integers (`model`), or its outputs (`float64_model`), codes examples by bits
back (`bits_back`), and keeps them in files with check sums (`file`).
"""

import contextlib
import io
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_vae.applications.codec import bits_back
from pyro_vae.applications.codec.data import from_symbols, to_symbols
from pyro_vae.applications.codec.errors import (
    CodecError,
    CorruptFileError,
    MachineMismatchError,
    ModelMismatchError,
    UnsupportedModelError,
)
from pyro_vae.applications.codec.file import LARGEST_CHUNK, Chunk, FileReader, FileWriter, Header
from pyro_vae.applications.codec.float64_model import Float64Model
from pyro_vae.applications.codec.integer_probabilities import Lattice
from pyro_vae.applications.codec.lattice_model import LatticeModel
from pyro_vae.applications.codec.model import CodecModel
from pyro_vae.applications.codec.rate import Rate, rate_of
from pyro_vae.utils import serialization
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE, require_vae

__all__ = ["Codec", "CodecReader", "CodecWriter"]

_MODELS: dict[str, Any] = {"exact": CodecModel, "float64": Float64Model}
_ROWS_PER_LANE = 1024
_MOST_LANES = 16


class Codec:
    """Lossless compression of discrete data by a VAE.

    Examples cost −log p(x|z) − log p(z) + log q(z|x) each, on average the negative ELBO, by bits back with
    the VAE in exact integer arithmetic: a file decodes to the same data with any batch size, number of
    threads, processor and version of torch. Examples that cost more than their plain bits are stored as
    these.

    With precision "float64" the networks can be any, and the guide any that returns independent normals,
    such as `SemiAmortised`, which refines q(z|x) for each example. A file then belongs to the machine that
    wrote it: another processor, version of torch or setting of its libraries is refused. Networks are called
    for one example at a time, and each chunk is decoded once before it is written.

    Args:
        vae: A VAE with a Bernoulli, discretised logistic, beta-binomial, Poisson or negative binomial
            likelihood and a standard or learned normal prior; for precision "exact" with a `DiagonalNormal`
            guide, and multilayer perceptrons or convolutional networks.
        lattice_bits: Latent dimensions take 2^lattice_bits values; 7 to 9 are best.
        support: Their largest magnitude, in standard deviations of the prior.
        precision: "exact", for files that every machine reads; "float64", for any network.
        lanes: Number of stacks, which are coded side by side; by default one for each 1,024 rows of a chunk,
            at most 16. Each adds about 5 bits per latent dimension to a chunk.
        particles: S, the draws of z per example. With more than one, examples cost on average the
            importance-weighted bound, S times the network evaluations, and the first example of each lane
            about S times 5 bits per latent dimension.
        max_count: Largest count of a Poisson or negative binomial likelihood.

    Raises:
        UnsupportedModelError: If the VAE has other parts, or weights that are not finite or too large, or,
            for "float64", networks that give other numbers when they are called again.
        ImportError: If constriction is not installed: `pip install "pyro_vae[codec]"`.

    Source:
        J. Townsend, T. Bird, D. Barber (2019), Practical lossless compression with latent variables using
        bits back coding, arXiv:1901.04866.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(2, (3, 4), hidden_features=(8,)),
        ...     guide=pv.guides.DiagonalNormal((3, 4), 2, hidden_features=(8,)),
        ... )
        >>> codec = pv.applications.Codec(vae)
        >>> x = torch.randint(0, 2, (5, 3, 4)).float()
        >>> torch.equal(codec.decompress(codec.compress(x)), x)
        True
    """

    def __init__(
        self,
        vae: VAE,
        *,
        lattice_bits: int = 8,
        support: float = 6.0,
        precision: str = "exact",
        lanes: int | None = None,
        particles: int = 1,
        max_count: int = 255,
    ):
        require_vae("Codec (Codec.load reads a saved one)", vae)
        if precision not in _MODELS:
            raise ValueError(f"precision must be 'exact' or 'float64'; got {precision!r}")
        require_count("lattice_bits", lattice_bits, minimum=2)
        if lattice_bits > 14:
            raise ValueError(f"lattice_bits must be at most 14, and 7 to 9 are best; got {lattice_bits}")
        if not 1 <= support <= 64:
            raise ValueError(f"support must be from 1 to 64 standard deviations; got {support}")
        require_count("max_count", max_count)
        if max_count >= 2**16:
            raise ValueError(f"max_count must be below 65,536; got {max_count}")
        lattice = Lattice(lattice_bits, float(support))
        self._set(_MODELS[precision].from_vae(vae, lattice, max_count), vae, lanes, particles)

    def _set(self, model: LatticeModel, vae: VAE | None, lanes: int | None, particles: int) -> None:
        require_count("particles", particles)
        if particles > 4096:
            raise ValueError(f"particles must be at most 4,096; got {particles}")
        if lanes is not None:
            require_count("lanes", lanes)
        self.model, self.vae, self.lanes, self.particles = model, vae, lanes, particles

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What two codecs must share to read each other's files: digests of the model, and the particles.

        With precision "float64" also the machine, and a digest of outputs on it.
        """
        return {**self.model.digests, "particles": self.particles}

    def compress(self, x: Any) -> bytes:
        """Return a file of data (N, *event_shape), the same for the same data and settings.

        Args:
            x: A tensor, an array or `pyro_vae.data.Images`: floats in the likelihood's support, or integers
                (bits, counts, or grey levels 0 … 255).

        Raises:
            CodecError: If a value is outside the support, or not exactly a grey level k / 255.
        """
        file = io.BytesIO()
        with self.writer(file) as writer:
            for start in range(0, max(len(x), 1), writer.rows_per_chunk):
                writer.write(x[start : start + writer.rows_per_chunk])
        return file.getvalue()

    def decompress(self, blob: bytes) -> Tensor:
        """Return the data of a file, (N, *event_shape), in the type that was compressed.

        Raises:
            CodecError: If the file is damaged, truncated, of another model or of another kind.
        """
        return torch.cat(list(self.reader(io.BytesIO(blob))))

    def rate(self, x: Any, *, num_particles: int = 16, seed: int = 0) -> Rate:
        """Compress data, and return the rate and the negative ELBO of the same data, in bits per dimension.

        Args:
            x: As for `compress`.
            num_particles: Draws per example for the negative ELBO of the VAE in floating point.
            seed: Seed of these draws.
        """
        return rate_of(self, x, num_particles=num_particles, seed=seed)

    def writer(
        self,
        file: str | os.PathLike[str] | IO[bytes],
        *,
        rows_per_chunk: int | None = None,
        row_shape: tuple[int, ...] | None = None,
    ) -> "CodecWriter":
        """Return a writer of rows in any number of batches, in memory for one chunk.

        Args:
            file: A path, at which the file appears when the writer is closed; or a file open for writing.
            rows_per_chunk: Rows that are decoded together; by default 1,024 for each lane.
            row_shape: Shape of a row in the file, by default the model's event shape.
        """
        return CodecWriter(self, file, rows_per_chunk=rows_per_chunk, row_shape=row_shape)

    def reader(self, file: str | os.PathLike[str] | IO[bytes]) -> "CodecReader":
        """Return an iterator over the chunks of a file, tensors (rows, *row_shape), and context manager.

        Raises:
            CodecError: If the file is damaged, truncated, of another model or of another kind.
        """
        return CodecReader(self, file)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model in integers to a file, from which `load` makes a codec without the VAE.

        Raises:
            CodecError: If the precision is "float64".
        """
        if not isinstance(self.model, CodecModel):
            raise CodecError(
                'a model of precision "float64" is its VAE: keep that by vae.save(path), and read files by '
                'Codec(pv.VAE.load(path), precision="float64")'
            )
        content = {"model": self.model.to_plain(), "lanes": self.lanes, "particles": self.particles}
        serialization.write(path, "codec", content | {"digests": self.model.digests})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Codec":
        """Read a codec written by `save`, without executing code from the file.

        Raises:
            FileNotFoundError: If the file does not exist.
            CheckpointError: If the file is damaged or not a saved codec.
        """
        content = serialization.read(path, "codec")

        def restore() -> Codec:
            codec = cls.__new__(cls)
            model: LatticeModel = CodecModel.from_plain(content["model"])
            codec._set(model, None, content["lanes"], content["particles"])
            if model.digests != content["digests"]:
                raise ValueError("the model read differs from the model saved")
            return codec

        return serialization.fitting(path, restore)


class CodecWriter:
    """Writer of compressed rows; see `Codec.writer`.

    As a context manager it is closed at the end of the block. Nothing appears at a path if the block raises,
    or if the writer is not closed.
    """

    def __init__(
        self,
        codec: Codec,
        file: str | os.PathLike[str] | IO[bytes],
        *,
        rows_per_chunk: int | None,
        row_shape: tuple[int, ...] | None,
    ):
        self.codec = codec
        self.rows_per_chunk = rows_per_chunk or _ROWS_PER_LANE * (codec.lanes or _MOST_LANES)
        require_count("rows_per_chunk", self.rows_per_chunk)
        if rows_per_chunk is None:
            self.rows_per_chunk = min(self.rows_per_chunk, LARGEST_CHUNK)
        elif rows_per_chunk > LARGEST_CHUNK:
            raise ValueError(f"rows_per_chunk must be at most {LARGEST_CHUNK:,}; got {rows_per_chunk:,}")
        self.row_shape = tuple(codec.model.event_shape if row_shape is None else row_shape)
        if math.prod(self.row_shape) != codec.model.size:
            raise ValueError(
                f"row_shape {self.row_shape} must have {codec.model.size} elements, as the model's"
            )
        self.dtype: str | None = None
        self.encoded: list[bits_back.Encoded] = []
        self.keep_encoded = False
        self._pending: list[np.ndarray] = []
        self._open = contextlib.ExitStack()
        if isinstance(file, str | os.PathLike):
            file = self._open.enter_context(_replacing(Path(file)))
        self._file = file
        self._writer: FileWriter | None = None

    def write(self, x: Any) -> None:
        """Append data (N, *event_shape), of the same type in each call."""
        symbols, dtype = to_symbols(self.codec.model, x)
        if self.dtype not in (None, dtype):
            raise TypeError(f"the rows before are {self.dtype}, these are {dtype}: convert them to one type")
        if self._writer is None:
            self.dtype = dtype
            header = Header(self.row_shape, dtype, self.codec.fingerprint)
            self._writer = FileWriter(self._file, header)
        self._pending.append(symbols)
        while sum(map(len, self._pending)) >= self.rows_per_chunk:
            self._write_chunk()

    def _write_chunk(self) -> None:
        waiting = np.concatenate(self._pending)
        rows, self._pending = waiting[: self.rows_per_chunk], [waiting[self.rows_per_chunk :]]
        lanes = self.codec.lanes or min(_MOST_LANES, max(1, len(rows) // _ROWS_PER_LANE))
        encoded = bits_back.encode(
            self.codec.model, rows, lanes=min(lanes, len(rows)), particles=self.codec.particles
        )
        if not self.codec.model.is_exact:
            self._require_decodable(rows, encoded)
        if self.keep_encoded:
            self.encoded.append(encoded)
        cast(FileWriter, self._writer).write(
            Chunk(len(rows), encoded.lanes, encoded.raw, zlib.crc32(rows.tobytes()))
        )

    def _require_decodable(self, rows: np.ndarray, encoded: bits_back.Encoded) -> None:
        """Raise unless a chunk decodes to its rows, before it is written."""
        try:
            model, particles = self.codec.model, self.codec.particles
            back = bits_back.decode(model, len(rows), encoded.lanes, encoded.raw, particles=particles)
        except CorruptFileError:
            back = None
        if back is None or not np.array_equal(back, rows):
            raise UnsupportedModelError(
                "the networks of this VAE give other numbers when they are called again, and then nothing "
                "can be decoded: take out what changes from call to call"
            )

    def close(self) -> None:
        """Write what is left, and the index.

        Raises:
            CodecError: If no rows were written.
        """
        with self._open:
            if sum(map(len, self._pending)):
                self._write_chunk()
            if self._writer is None or not self._writer.has_chunks:
                raise CodecError("no rows were written: a file holds at least one")
            self._writer.close()

    def __enter__(self) -> "CodecWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._open.__exit__(kind, error, trace)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    with serialization.replacing(path) as partial, partial.open("wb") as file:
        yield file


class CodecReader:
    """Iterator over the chunks of a compressed file; see `Codec.reader`.

    Attributes:
        rows: Number of rows in the file.
        shape: Shape of a row.
        dtype: Name of the type of the data.
    """

    def __init__(self, codec: Codec, file: str | os.PathLike[str] | IO[bytes]):
        self.codec = codec
        self._open = contextlib.ExitStack()
        if isinstance(file, str | os.PathLike):
            file = self._open.enter_context(Path(file).open("rb"))  # noqa: SIM115
        try:
            self._reader = FileReader(file)
            header = self._reader.header
            _require_same_model(header.model, codec.fingerprint)
            if math.prod(header.shape) != codec.model.size:
                raise CorruptFileError(f"rows of shape {header.shape} are not of the model's size")
        except BaseException:
            self._open.close()
            raise
        self.rows, self.shape, self.dtype = self._reader.rows, header.shape, header.dtype
        self._next = 0

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self._reader.entries)

    def seek(self, chunk: int) -> None:
        """Continue with a chunk, by its number from 0; the number of chunks is the end."""
        if not 0 <= chunk <= self.chunks:
            raise ValueError(f"chunk must be from 0 to {self.chunks}; got {chunk}")
        self._next = chunk

    def __iter__(self) -> "CodecReader":
        return self

    def close(self) -> None:
        """Close the file, if it was given by its path; the last chunk does so, too."""
        self._open.close()

    def __enter__(self) -> "CodecReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Tensor:
        if self._next >= self.chunks:
            self.close()
            raise StopIteration
        number = self._next
        chunk = self._reader.chunk(number)
        try:
            symbols = bits_back.decode(
                self.codec.model, chunk.rows, chunk.lanes, chunk.raw, particles=self.codec.particles
            )
        except CorruptFileError as error:
            raise CorruptFileError(f"chunk {number}: {error}") from error
        if zlib.crc32(symbols.tobytes()) != chunk.check_sum:
            raise CorruptFileError(
                f"chunk {number}: the rows decoded have another check sum than those encoded"
            )
        self._next = number + 1
        return torch.from_numpy(from_symbols(self.codec.model, symbols, self.dtype, self.shape))


def _require_same_model(found: dict[str, Any], own: dict[str, Any]) -> None:
    if ("machine" in found) != ("machine" in own):
        precision = ["exact", "float64"]
        raise ModelMismatchError(
            f"the file was compressed with precision {precision['machine' in found]!r}, this codec has "
            f"{precision['machine' in own]!r}: take the precision of the file"
        )
    differ = [name for name in own if found[name] != own[name]]
    lines = [f"{name}: file {found[name]}, codec {own[name]}" for name in differ]
    if lines and set(differ) <= {"machine", "probe"}:
        raise MachineMismatchError(
            'the file was compressed with precision "float64" where networks may give other bits, or by '
            f"other code; these differ: {'; '.join(lines)}. Read it where it was written, or compress the "
            'data there with precision "exact", which every machine reads'
        )
    if lines:
        raise ModelMismatchError(
            "the file was compressed by another model or with other settings; these differ: "
            f"{'; '.join(lines)}. Use the codec that wrote it (Codec.save keeps one)"
        )
