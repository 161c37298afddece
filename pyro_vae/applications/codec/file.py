r"""The file format of compressed data: header, chunks with check sums, index, end mark.

`docs/codec-format.md` describes each byte. Numbers are little-endian. Every length is compared with what is
left of the file before memory is taken for it.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from pyro_vae.applications.codec.errors import (
    CorruptFileError,
    NotACodecFileError,
    TruncatedFileError,
    UnsupportedVersionError,
)

__all__ = ["DTYPES", "LARGEST_CHUNK", "MAGIC", "VERSION", "Chunk", "FileReader", "FileWriter", "Header"]

MAGIC = b"\x89PVZ\r\n\x1a\n"  # as PNG's: transfers that change line ends or drop the eighth bit show
VERSION = 2  # 1 did not stir the bits that z is drawn from
LARGEST_CHUNK = 1 << 16  # rows
DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64")
_DIGESTS = ("structure", "weights", "settings")
_START = struct.Struct("<8sBBH")  # magic, version, flags, length of the header
_HEADER = struct.Struct("<BBH6s6s6s")  # type, dimensions, particles, digests; then a u32 for each dimension
_PROBE = struct.Struct("<6sH")  # in float64: digest of outputs, length of the machine's description
_OF_A_MACHINE = 1  # the flag of files in float64
_CHUNK = struct.Struct("<2sHII")  # tag, lanes, raw rows, check sum of the symbols
_LANE = struct.Struct("<II")  # words of the seed that were read, words stored
_ENTRY = struct.Struct("<QI")  # bytes and rows of a chunk
_END = struct.Struct("<II4s")  # chunks, check sum of the index, mark
_SUM = struct.Struct("<I")
_MARK = b"PVZ\n"


@dataclass(frozen=True)
class Header:
    """What a file says of its rows.

    Args:
        shape: Shape of a row.
        dtype: Name of the type of the data.
        model: Digests of the model, 12 hexadecimal digits each, and the number of particles. In float64 also
            the machine and a digest of outputs on it.
    """

    shape: tuple[int, ...]
    dtype: str
    model: dict[str, Any]

    def pack(self) -> bytes:
        """Return the bytes of the header."""
        digests = [bytes.fromhex(self.model[name]) for name in _DIGESTS]
        fixed = DTYPES.index(self.dtype), len(self.shape), self.model["particles"], *digests
        content = _HEADER.pack(*fixed) + struct.pack(f"<{len(self.shape)}I", *self.shape)
        if not self.flags:
            return content
        machine = self.model["machine"].encode()
        return content + _PROBE.pack(bytes.fromhex(self.model["probe"]), len(machine)) + machine

    @property
    def flags(self) -> int:
        """The flags of the file."""
        return _OF_A_MACHINE if "machine" in self.model else 0

    @classmethod
    def unpack(cls, content: bytes, flags: int) -> "Header":
        """Return the header of bytes; raise ValueError if they are none."""
        if len(content) < _HEADER.size:
            raise ValueError("it is too short")
        dtype, dimensions, particles, *digests = _HEADER.unpack(content[: _HEADER.size])
        end = _HEADER.size + 4 * dimensions
        if dtype >= len(DTYPES) or (len(content) < end if flags else len(content) != end):
            raise ValueError("its type or its number of dimensions is unknown")
        shape = struct.unpack(f"<{dimensions}I", content[_HEADER.size : end])
        model = {name: digest.hex() for name, digest in zip(_DIGESTS, digests, strict=True)}
        return cls(shape, DTYPES[dtype], model | {"particles": particles} | _machine_of(content[end:], flags))


def _machine_of(content: bytes, flags: int) -> dict[str, str]:
    if not flags:
        return {}
    if len(content) < _PROBE.size:
        raise ValueError("it ends before the machine")
    probe, length = _PROBE.unpack(content[: _PROBE.size])
    text = content[_PROBE.size :]
    if len(text) != length:
        raise ValueError("the description of the machine has another length")
    return {"machine": text.decode(), "probe": probe.hex()}


@dataclass(frozen=True)
class Chunk:
    """Rows that can be decoded alone.

    Args:
        rows: Number of rows.
        lanes: For each lane, how many words of its seed were read, and its words.
        raw: Positions of the rows stored without the model, increasing.
        check_sum: CRC-32 of the symbols of the rows.
    """

    rows: int
    lanes: list[tuple[int, np.ndarray]]
    raw: np.ndarray
    check_sum: int


class FileWriter:
    """Write a header, chunks in order, and at last the index."""

    def __init__(self, file: IO[bytes], header: Header):
        self._file = file
        self._entries: list[tuple[int, int]] = []
        content = header.pack()
        self._write(_START.pack(MAGIC, VERSION, header.flags, len(content)) + content)

    def _write(self, content: bytes) -> int:
        """Write bytes and their check sum; return how many bytes that were."""
        self._file.write(content + _SUM.pack(zlib.crc32(content)))
        return len(content) + _SUM.size

    @property
    def has_chunks(self) -> bool:
        """Whether a chunk was written."""
        return bool(self._entries)

    def write(self, chunk: Chunk) -> None:
        """Append a chunk."""
        content = b"".join(
            [_CHUNK.pack(b"CH", len(chunk.lanes), len(chunk.raw), chunk.check_sum)]
            + [_LANE.pack(depth, len(words)) for depth, words in chunk.lanes]
            + [chunk.raw.astype("<u4").tobytes()]
            + [words.astype("<u4").tobytes() for _, words in chunk.lanes]
        )
        self._entries.append((self._write(content), chunk.rows))

    def close(self) -> None:
        """Append index and end mark; the file itself stays open."""
        index = b"".join(_ENTRY.pack(*entry) for entry in self._entries)
        counted = index + struct.pack("<I", len(self._entries))
        self._file.write(index + _END.pack(len(self._entries), zlib.crc32(counted), _MARK))


class FileReader:
    """Read header and index of a seekable file, and its chunks in any order.

    Raises:
        NotACodecFileError: If the file begins otherwise.
        UnsupportedVersionError: If it is of another version.
        TruncatedFileError: If its end is missing.
        CorruptFileError: If a check sum or a length is wrong.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        self.header, first = self._read_header()
        self.entries = self._read_index(first)
        self._offsets = [first, *(first + np.cumsum([length for length, _ in self.entries])).tolist()]

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return sum(rows for _, rows in self.entries)

    def _read(self, offset: int, length: int, place: str) -> bytes:
        if not 0 <= offset <= offset + length <= self.size:
            raise TruncatedFileError(
                f"{place} should take {length:,} bytes from byte {offset:,}, and the file has "
                f"{self.size:,}: copy it once more"
            )
        self._file.seek(offset)
        content = self._file.read(length)
        if len(content) != length:
            raise TruncatedFileError(f"{place}: the file ended while it was read")
        return content

    def _checked(self, offset: int, length: int, place: str) -> bytes:
        """Read bytes that end with their check sum; return those before it."""
        content = self._read(offset, length, place)
        if length < _SUM.size or _SUM.unpack(content[-_SUM.size :])[0] != zlib.crc32(content[: -_SUM.size]):
            raise _corrupt(place, offset, "its check sum does not match")
        return content[: -_SUM.size]

    def _read_header(self) -> tuple[Header, int]:
        if self.size == 0 or self._read(0, min(8, self.size), "the header") != MAGIC[: self.size]:
            raise NotACodecFileError(
                "the file does not begin with the magic bytes \\x89PVZ of compressed data"
            )
        _, version, flags, length = _START.unpack(self._read(0, _START.size, "the header"))
        if version != VERSION or flags > _OF_A_MACHINE:
            raise UnsupportedVersionError(
                f"the file has format version {version} with flags {flags}, this release reads version "
                f"{VERSION} with flags 0 and 1: use the release that wrote it (or the file is damaged)"
            )
        size = _START.size + length + _SUM.size
        content = self._checked(0, size, "the header")[_START.size :]
        try:
            return Header.unpack(content, flags), size
        except ValueError as error:
            raise _corrupt("the header", 0, str(error)) from error

    def _read_index(self, first: int) -> list[tuple[int, int]]:
        end = self.size - _END.size
        if end < first:
            raise TruncatedFileError(f"the file ends after {self.size:,} bytes, before its index")
        count, check_sum, mark = _END.unpack(self._read(end, _END.size, "the end mark"))
        if mark != _MARK:
            raise TruncatedFileError("the end mark is missing: the file was cut, or its writer failed")
        begin = end - count * _ENTRY.size
        if begin < first:
            raise _corrupt("the end mark", end, f"it announces {count:,} chunks, more than the file can hold")
        index = self._read(begin, count * _ENTRY.size, "the index")
        if check_sum != zlib.crc32(index + struct.pack("<I", count)):
            raise _corrupt("the index", begin, "its check sum does not match")
        entries = list(_ENTRY.iter_unpack(index))
        if count == 0 or first + sum(length for length, _ in entries) != begin:
            raise _corrupt("the index", begin, "the lengths of the chunks do not add up to the file's")
        if any(not 1 <= rows <= LARGEST_CHUNK for _, rows in entries):
            raise _corrupt("the index", begin, f"a chunk holds from 1 to {LARGEST_CHUNK:,} rows")
        return entries

    def chunk(self, number: int) -> Chunk:
        """Read a chunk and verify its check sum."""
        (length, rows), offset, place = self.entries[number], self._offsets[number], f"chunk {number}"
        content = self._checked(offset, length, place)
        if len(content) < _CHUNK.size:
            raise _corrupt(place, offset, "it is too short")
        tag, num_lanes, num_raw, check_sum = _CHUNK.unpack(content[: _CHUNK.size])
        lanes_end = _CHUNK.size + num_lanes * _LANE.size
        raw_end = lanes_end + 4 * num_raw
        if tag != b"CH" or not 1 <= num_lanes <= rows or num_raw > rows or raw_end > len(content):
            raise _corrupt(place, offset, "its numbers of lanes and raw rows do not fit")
        lanes = list(_LANE.iter_unpack(content[_CHUNK.size : lanes_end]))
        if raw_end + 4 * sum(words for _, words in lanes) != len(content):
            raise _corrupt(place, offset, "its lanes have another length than the chunk")
        raw = np.frombuffer(content, "<u4", num_raw, lanes_end)
        if num_raw and (raw[-1] >= rows or (np.diff(raw.astype(np.int64)) <= 0).any()):
            raise _corrupt(place, offset, "its list of raw rows is invalid")
        words = np.frombuffer(content, "<u4", offset=raw_end).astype(np.uint32)
        parts = np.split(words, np.cumsum([size for _, size in lanes])[:-1])
        return Chunk(rows, [(d, part) for (d, _), part in zip(lanes, parts, strict=True)], raw, check_sum)

    def chunks(self) -> Iterator[Chunk]:
        """Read all chunks in order."""
        return map(self.chunk, range(len(self.entries)))


def _corrupt(place: str, offset: int, reason: str) -> CorruptFileError:
    return CorruptFileError(f"{place}, at byte {offset:,}, is damaged: {reason}. Copy the file once more")
