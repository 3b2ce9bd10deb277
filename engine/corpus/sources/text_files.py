"""Files of text, plain or compressed, as lines, paragraphs or one whole: bytes, and the bytes of the file read so far.

Compression is told by the name (`SUFFIXES`). Invariant: a file that is cut off or damaged is an error that names
it, never a shorter text. Decoding is the business of `engine.corpus.sources.chunks`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash
import zstandard

from engine.data.shards.open_shards import too_many_files
from engine.errors import DataError

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of compressed files that are read."""

_BLOCK_BYTES = 1 << 20
_LARGEST_WINDOW_BYTES = 1 << 31
"""Longest window of zstd; `zstd --long=31` writes it. The library's own limit is 128 MiB."""

RawDocument = tuple[int, bytes, int]
"""Number of the first line (from 1), content, and bytes of the file (as it lies there) that were read so far."""


def file_hash(name: str) -> str:
    """Return the XXH3-128 of a file as it is stored, in hex. Raises `DataError`."""
    digest = xxhash.xxh3_128()
    with _opened(name) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def head(name: str, num_bytes: int) -> bytes:
    """Return the first bytes of the decompressed text. Raises `DataError`."""
    with _opened(name) as file:
        return _decompressed(name, file).read(num_bytes)


def refuse_cut_off(name: str) -> None:
    """Raise `DataError` for a zstd file that is cut off or damaged: readers of other libraries see a shorter text."""
    if _suffix(name) == ".zst":
        with _opened(name) as file:
            text = _decompressed(name, file)
            while text.read(_BLOCK_BYTES):
                pass


def lines(name: str) -> Iterator[RawDocument]:
    """Yield each line of the decompressed text, its end included. Raises `DataError`."""
    with _opened(name) as file:
        for number, line in enumerate(_decompressed(name, file), start=1):
            # `file` is the compressed one: its position is the progress, in bytes as they are stored
            yield number, line, file.tell()


def blocks(name: str, num_bytes: int) -> Iterator[RawDocument]:
    """Yield the decompressed text in blocks of at least `num_bytes`, each ending with a line. Raises `DataError`."""
    number = 1
    with _opened(name) as file:
        text = _decompressed(name, file)
        while block := text.read(num_bytes):
            # up to the end of the line that the block's end has cut
            block += text.readline()
            yield number, block, file.tell()
            number += block.count(b"\n")


def whole(name: str) -> Iterator[RawDocument]:
    """Yield the whole decompressed text once. Raises `DataError`."""
    with _opened(name) as file:
        yield 1, _decompressed(name, file).read(), file.tell()


def paragraphs(name: str) -> Iterator[RawDocument]:
    """Yield the runs of lines that are not empty, the empty ones between them dropped. Raises `DataError`."""
    held: list[bytes] = []
    first, read = 1, 0
    for number, line, read in lines(name):
        if line.strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield first, b"".join(held).rstrip(b"\r\n"), read
            held = []
    if held:
        yield first, b"".join(held).rstrip(b"\r\n"), read


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """Yield the file as it is stored; an error of reading becomes a `DataError` that names it."""
    try:
        with Path(name).open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(
            f"{name} is damaged: {error}", "a whole compressed file", "fetch or compress it again"
        ) from error
    except OSError as error:
        if problem := too_many_files(error):
            raise problem from error
        if error.errno is None and _suffix(name) == ".bz2":  # how bz2 tells damage
            raise DataError(
                f"{name} is damaged: {error}", "a whole compressed file", "fetch or compress it again"
            ) from error
        reason = error.strerror or error
        raise DataError(f"{name} cannot be read: {reason}", "a readable file", "check it and its rights") from error


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _decompressed(name: str, file: IO[bytes]) -> io.BufferedIOBase | IO[bytes]:
    suffix = _suffix(name)
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".bz2":
        return bz2.BZ2File(file)
    if suffix == ".xz":
        return lzma.LZMAFile(file)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(file), _BLOCK_BYTES)
    return file


class _ZstdFrames(io.RawIOBase):
    """All frames of a file; a last frame that is cut off is an error (zstandard's own reader just ends there)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        self._frame = None
        self._left = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            block = self._left or self._file.read(1 << 17)
            if not block:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            self._frame = (
                self._frame or zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES).decompressobj()
            )
            self._ready = memoryview(self._frame.decompress(block))
            # bytes after the end of a frame begin the next one: files may hold several, as `cat a.zst b.zst` writes
            # them
            self._left = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
