"""Byte streams that are checked to their last byte before anyone trusts what they held.

The common readers of ``.nii.gz`` stop as soon as they have the voxels they want, so a flipped byte is
decompressed into wrong voxels and the CRC32 at the end of the file is never looked at. Here the whole
stream is read: every gzip member, its CRC32 and its length (RFC 1952, section 2.3).
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from lungkit.errors import DataError

_CODEC: Any = zlib
with contextlib.suppress(ImportError):  # about twice as fast as zlib, same results
    from isal import isal_zlib

    _CODEC = isal_zlib

_CODEC_ERRORS: tuple[type[Exception], ...] = (zlib.error, _CODEC.error)
_INPUT_BYTES = 1 << 14  # what follows a member is copied with each: small, or many members take for ever
_LONGEST_TEXT = 1 << 16  # of a name or comment in a gzip header
_OUTPUT_BYTES = 1 << 20
# Deflate cannot expand further (258 bytes for 2 bits, RFC 1951): a header that asks for more is lying.
_MAX_DEFLATE_RATIO = 1032


class VerifiedStream(Protocol):
    """What a reader needs: fill a buffer exactly, then let :meth:`finish` vouch for the whole file."""

    capacity: int

    def readinto(self, view: memoryview) -> int:
        """Fill ``view``; fewer bytes than its length come back only at the end of the stream."""

    def finish(self) -> None:
        """Raise DataError unless the stream ends here and everything in it was intact."""

    def __enter__(self) -> VerifiedStream: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_verified(path: Path) -> VerifiedStream:
    """Open ``path`` (plain, or gzip where its name ends with ``.gz``) for verified reading.

    Raises:
        DataError: the file is absent, unreadable, empty, or not what its name says.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would let us wait for ever
            raise DataError(f"{path}: not a regular file; name a .nii or .nii.gz file")
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
        start = file.read(2)
        file.seek(0)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a readable file") from error
    is_gzip = start == b"\x1f\x8b"
    problem = None
    if size == 0:
        problem = "the file is empty (0 bytes); copy or download it again"
    elif path.name.lower().endswith(".gz") and not is_gzip:
        problem = (
            f"named .gz but starts with bytes {start.hex()}, not the gzip mark 1f8b; rename or rewrite it"
        )
    elif is_gzip and not path.name.lower().endswith(".gz"):
        problem = "holds gzip data but its name does not end with .gz; rename it"
    if problem is not None:
        file.close()
        raise DataError(f"{path}: {problem}")
    return _GzipStream(path, file, size) if is_gzip else _PlainStream(path, file, size)


class _PlainStream:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self.capacity = size

    def __enter__(self) -> _PlainStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def readinto(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            count = self._file.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                break
            filled += count
        return filled

    def finish(self) -> None:
        extra = self.capacity - self._file.tell()
        if extra:
            raise DataError(
                f"{self._path}: {extra} bytes follow the voxels that the header describes; "
                "the header is wrong or the file was overwritten in part: write it again"
            )


class _GzipStream:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._pending = b""
        self._inflate: Any = None
        self._crc = 0
        self._length = 0
        self._members = 0
        self._ended = False
        self.capacity = size * _MAX_DEFLATE_RATIO

    def __enter__(self) -> _GzipStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def readinto(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            block = self._produce(min(len(view) - filled, _OUTPUT_BYTES))
            if not block:
                break
            view[filled : filled + len(block)] = block
            filled += len(block)
        return filled

    def finish(self) -> None:
        if self._produce(1):
            raise DataError(
                f"{self._path}: more data follows the voxels that the header describes; "
                "the header is wrong or the file was written in part: write it again"
            )

    def _produce(self, limit: int) -> bytes:
        """Next 1 to ``limit`` decompressed bytes; none at the verified end of the last member."""
        while not self._ended:
            inflate = self._inflate or self._start_member()
            if inflate is None:
                break
            source = inflate.unconsumed_tail or self._take_pending()
            try:
                block = inflate.decompress(source, limit)
            except _CODEC_ERRORS as error:
                raise self._damaged(f"the compressed data are invalid ({error})") from error
            self._crc = _CODEC.crc32(block, self._crc)
            self._length += len(block)
            if inflate.eof:
                self._pending = inflate.unused_data
                self._inflate = None
                self._check_trailer()
            elif not block and not source:
                raise self._damaged("the file ends inside the compressed data")
            if block:
                return block
        return b""

    def _take_pending(self) -> bytes:
        source = self._pending or self._file.read(_INPUT_BYTES)
        self._pending = b""
        return source

    def _take(self, count: int, what: str) -> bytes:
        while len(self._pending) < count:
            more = self._file.read(_INPUT_BYTES)
            if not more:
                raise self._damaged(f"the file ends inside {what}")
            self._pending += more
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    def _take_text(self) -> bytes:
        """Text of a gzip header, with the zero byte that ends it."""
        while b"\0" not in self._pending:
            if len(self._pending) > _LONGEST_TEXT:
                raise self._damaged(f"a name or comment of more than {_LONGEST_TEXT} bytes in a gzip header")
            more = self._file.read(_INPUT_BYTES)
            if not more:
                raise self._damaged("the file ends inside a gzip header")
            self._pending += more
        return self._take(self._pending.index(b"\0") + 1, "a gzip header")

    def _start_member(self) -> Any:
        """Parse the header of the next member; None at the end of the file, where zero padding is allowed."""
        if not self._pending:
            self._pending = self._file.read(_INPUT_BYTES)
        if self._members and not self._pending.startswith(b"\x1f"):
            self._check_padding()
            self._ended = True
            return None
        header = self._take(10, "a gzip header")
        magic, method, flags = struct.unpack("<HBB", header[:4])
        if magic != 0x8B1F or method != 8 or flags & 0xE0:
            raise self._damaged(f"a gzip header is invalid ({header[:4].hex()})")
        if flags & 4:  # FEXTRA
            length = self._take(2, "a gzip header")
            header += length + self._take(struct.unpack("<H", length)[0], "a gzip header")
        for flag in (8, 16):  # FNAME, FCOMMENT
            if flags & flag:
                header += self._take_text()
        if flags & 2:  # FHCRC
            (stored,) = struct.unpack("<H", self._take(2, "a gzip header"))
            if stored != zlib.crc32(header) & 0xFFFF:
                raise self._damaged("the checksum of a gzip header does not match")
        self._crc = self._length = 0
        self._members += 1
        self._inflate = _CODEC.decompressobj(-zlib.MAX_WBITS)
        return self._inflate

    def _check_trailer(self) -> None:
        crc, length = struct.unpack("<II", self._take(8, "the gzip checksum"))
        if crc != self._crc:
            raise self._damaged(f"CRC32 is {self._crc:08x}, the file says {crc:08x}")
        if length != self._length & 0xFFFFFFFF:
            raise self._damaged(f"{self._length} bytes decompressed, the file says {length} (modulo 2^32)")

    def _check_padding(self) -> None:
        while self._pending:
            if self._pending.strip(b"\0"):
                raise self._damaged("something that is not gzip data follows the compressed data")
            self._pending = self._file.read(_INPUT_BYTES)

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._path}: damaged gzip file: {what}; copy or download it again")
