r"""The file format of compressed data: header, chunks with check sums, index, end mark.

`docs/codec-format.md` describes each byte. Numbers are little-endian. Every length is compared with what is
left of the file before memory is taken for it.
"""

import io
import itertools
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from pyro_vae.applications.codec_errors import (
    CorruptFileError,
    NotACodecFileError,
    TruncatedFileError,
    UnsupportedVersionError,
)

__all__ = ["LARGEST_CHUNK", "MAGIC", "VERSION", "Chunk", "FileReader", "FileWriter"]

MAGIC = b"\x89PVZ\r\n\x1a\n"  # as PNG's: transfers that change line ends or drop the eighth bit show
VERSION = 1
LARGEST_CHUNK = 1 << 16  # rows
_START = struct.Struct("<8sBBH")  # magic, version, flags, length of the header
_CHUNK = struct.Struct(
    "<4sIIIIII"
)  # tag, number, rows, lanes, raw rows, length of the payload, check sum of rows
_LANE = struct.Struct("<II")  # words of the seed that were read, words stored
_INDEX = struct.Struct("<4sI")  # tag, chunks
_ENTRY = struct.Struct("<QI")  # offset, rows
_SUM = struct.Struct("<I")
_END = struct.Struct("<QI8s")  # offset of the index, check sum of it, mark
_END_MARK = b"\nPVZEND\n"


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

    def __init__(self, file: IO[bytes], header: dict[str, Any]):
        self._file = file
        self._entries: list[tuple[int, int]] = []
        content = json.dumps(header, separators=(",", ":")).encode()
        start = _START.pack(MAGIC, VERSION, 0, len(content)) + content
        self.size = 0
        self._write(start + _SUM.pack(zlib.crc32(start)))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self.size += len(content)

    @property
    def has_chunks(self) -> bool:
        """Whether a chunk was written."""
        return bool(self._entries)

    def write(self, chunk: Chunk) -> None:
        """Append a chunk."""
        payload = b"".join(
            [_LANE.pack(depth, len(words)) for depth, words in chunk.lanes]
            + [chunk.raw.astype("<u4").tobytes()]
            + [words.astype("<u4").tobytes() for _, words in chunk.lanes]
        )
        sizes = len(self._entries), chunk.rows, len(chunk.lanes), len(chunk.raw), len(payload)
        head = _CHUNK.pack(b"PVZC", *sizes, chunk.check_sum)
        self._entries.append((self.size, chunk.rows))
        self._write(head + _SUM.pack(zlib.crc32(head)) + payload + _SUM.pack(zlib.crc32(payload)))

    def close(self) -> None:
        """Append index and end mark; the file itself stays open."""
        offset = self.size
        index = _INDEX.pack(b"PVZI", len(self._entries)) + b"".join(_ENTRY.pack(*e) for e in self._entries)
        self._write(index + _SUM.pack(zlib.crc32(index)))
        place = struct.pack("<Q", offset)
        self._write(_END.pack(offset, zlib.crc32(place), _END_MARK))


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
        self._size = file.seek(0, io.SEEK_END)
        self.header, first = self._read_header()
        self._index_at, self.entries = self._read_index(first)

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return sum(rows for _, rows in self.entries)

    @property
    def size(self) -> int:
        """Number of bytes of the file."""
        return self._size

    def _read(self, offset: int, length: int, place: str) -> bytes:
        if offset + length > self._size:
            raise TruncatedFileError(
                f"{place} should take {length:,} bytes from byte {offset:,}, and the file has "
                f"{self._size:,}: copy it once more, or decode the chunks before with an earlier copy"
            )
        self._file.seek(offset)
        content = self._file.read(length)
        if len(content) != length:
            raise TruncatedFileError(f"{place}: the file ended while it was read")
        return content

    def _checked(self, offset: int, length: int, place: str) -> bytes:
        """Read bytes that are followed by their check sum."""
        content = self._read(offset, length + _SUM.size, place)
        if _SUM.unpack(content[length:])[0] != zlib.crc32(content[:length]):
            raise _corrupt(place, offset, "its check sum does not match")
        return content[:length]

    def _read_header(self) -> tuple[dict[str, Any], int]:
        if self._size == 0 or self._read(0, min(8, self._size), "the header") != MAGIC[: self._size]:
            raise NotACodecFileError(
                "the file does not begin with the magic bytes \\x89PVZ of compressed data"
            )
        _, version, flags, length = _START.unpack(self._read(0, _START.size, "the header"))
        if version != VERSION or flags:
            raise UnsupportedVersionError(
                f"the file has format version {version} with flags {flags}, this release reads version "
                f"{VERSION} with flags 0: use the release that wrote it (or the file is damaged)"
            )
        content = self._checked(0, _START.size + length, "the header")[_START.size :]
        try:
            header = json.loads(content)
        except ValueError as error:
            raise _corrupt("the header", 0, str(error)) from error
        if not isinstance(header, dict):
            raise _corrupt("the header", 0, "it is not a JSON object")
        return header, _START.size + length + _SUM.size

    def _read_index(self, first: int) -> tuple[int, list[tuple[int, int]]]:
        end = self._size - _END.size
        if end < first:
            raise TruncatedFileError(f"the file ends after {self._size:,} bytes, before its index")
        offset, check_sum, mark = _END.unpack(self._read(end, _END.size, "the end mark"))
        if mark != _END_MARK:
            raise TruncatedFileError(
                "the end mark is missing: the file was cut, or its writer did not finish"
            )
        length = end - offset - _SUM.size
        if check_sum != zlib.crc32(struct.pack("<Q", offset)) or offset < first or length < _INDEX.size:
            raise _corrupt("the end mark", end, "it points to no index")
        index = self._checked(offset, length, "the index")
        tag, count = _INDEX.unpack(index[: _INDEX.size])
        if tag != b"PVZI" or length != _INDEX.size + count * _ENTRY.size or count == 0:
            raise _corrupt("the index", offset, "it has another length than its number of chunks")
        entries = list(_ENTRY.iter_unpack(index[_INDEX.size :]))
        offsets = [place for place, _ in entries] + [offset]
        if offsets[0] != first or any(a >= b for a, b in itertools.pairwise(offsets)):
            raise _corrupt("the index", offset, "the chunks do not follow each other")
        return offset, entries

    def chunk(self, number: int) -> Chunk:
        """Read a chunk and verify its check sum."""
        offset, rows = self.entries[number]
        following = [place for place, _ in self.entries[number + 1 :]][:1] or [self._index_at]
        place = f"chunk {number}"
        head = _CHUNK.unpack(self._checked(offset, _CHUNK.size, place))
        tag, found, rows_here, num_lanes, num_raw, length, check_sum = head
        begin = offset + _CHUNK.size + _SUM.size
        if (tag, found, rows_here) != (b"PVZC", number, rows) or not 1 <= rows <= LARGEST_CHUNK:
            raise _corrupt(place, offset, "its number or its rows differ from the index")
        if begin + length + _SUM.size != following[0] or not 1 <= num_lanes <= rows or num_raw > rows:
            raise _corrupt(place, offset, "its lengths do not fit")
        payload = self._checked(begin, length, place)
        lanes_end, raw_end = num_lanes * _LANE.size, num_lanes * _LANE.size + 4 * num_raw
        lanes = list(_LANE.iter_unpack(payload[:lanes_end])) if lanes_end <= length else []
        if not lanes or raw_end + 4 * sum(words for _, words in lanes) != length:
            raise _corrupt(place, offset, "its lanes have other lengths than its payload")
        raw = np.frombuffer(payload, "<u4", num_raw, lanes_end)
        if num_raw and (raw[-1] >= rows or (np.diff(raw.astype(np.int64)) <= 0).any()):
            raise _corrupt(place, offset, "its list of raw rows is invalid")
        words = np.frombuffer(payload, "<u4", offset=raw_end).astype(np.uint32)
        ends = np.cumsum([size for _, size in lanes])
        parts = np.split(words, ends[:-1])
        return Chunk(rows, [(d, part) for (d, _), part in zip(lanes, parts, strict=True)], raw, check_sum)

    def chunks(self) -> Iterator[Chunk]:
        """Read all chunks in order."""
        return map(self.chunk, range(len(self.entries)))


def _corrupt(place: str, offset: int, reason: str) -> CorruptFileError:
    return CorruptFileError(f"{place}, at byte {offset:,}, is damaged: {reason}. Copy the file once more")
