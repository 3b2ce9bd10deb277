"""Text in its many places -> raw documents in a fixed order, in chunks that workers parse.

Invariant: the order of documents is the order in which the sources are named, sorted by path inside a folder or
glob, then the order inside a file. This side only finds, opens and cuts files into lines; `parse` (in a worker)
decodes JSON and UTF-8, and knows file and line of each document for its errors. What is found: JSON lines and text
(plain, gzip, zstd), and Hugging Face datasets, streamed.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import xxhash

from engine.errors import ConfigError, DataError

HUB_PREFIX = "hf:"
"""A source `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]` is read through Hugging Face datasets; the split is `train` by default."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
"""What a folder is searched for beside JSON lines; a file that is named itself may be called anything."""
COMPRESSED_SUFFIXES = (".gz", ".zst")

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file or one hub dataset."""

    name: str
    kind: str
    """`json`, `text` or `hub`."""
    num_bytes: int
    """Size of the file as it lies there (compressed); 0 for a hub dataset."""


@dataclass(frozen=True)
class Chunk:
    """Some documents of one source as they lie there: (line number from 1, or row; bytes)."""

    source: str
    kind: str
    items: list[tuple[int, bytes]]
    read_bytes: int
    """How far the source has been read, in bytes of the file as it lies there."""


def find_sources(names: list[str]) -> list[Source]:
    """The files and datasets that names, folders and globs stand for, in order, each once.

    Raises:
        DataError: a name that stands for nothing.
    """
    found: dict[str, Source] = {}
    for name in names:
        for source in [Source(name, "hub", 0)] if name.startswith(HUB_PREFIX) else _files(name):
            found.setdefault(source.name, source)
    return list(found.values())


def content_hash(source: Source) -> str:
    """XXH3-128 of a file as it lies there, in hex; of the name alone for a hub dataset. Raises `DataError`."""
    digest = xxhash.xxh3_128()
    if source.kind == "hub":
        digest.update(source.name.encode())
        return digest.hexdigest()
    with _problems(source.name) as open_file, open_file() as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_chunks(source: Source, text_key: str, blank_line_ends: bool) -> Iterator[Chunk]:
    """The documents of a source in order.

    `text_key` names the column of a hub dataset; with `blank_line_ends` a text file holds many documents, each
    ended by an empty line. Raises `DataError`: unreadable, damaged compression, unknown dataset or column.
    """
    if source.kind == "hub":
        from engine.data.hub import read_column

        rows = ((number, text.encode(), 0) for number, text in enumerate(read_column(source.name, text_key)))
    elif source.kind == "json":
        rows = ((number, line, read) for number, line, read in _lines(source.name) if line.strip())
    else:
        rows = _paragraphs(source.name) if blank_line_ends else _whole(source.name)
    yield from _gather(source, rows)


def parse(chunk: Chunk, text_key: str) -> list[str]:
    """The texts of a chunk's documents. Raises `DataError` naming file and line: no JSON, no text, no UTF-8."""
    if chunk.kind == "json":
        return [_json_text(chunk.source, number, line, text_key) for number, line in chunk.items]
    return [_decode(chunk.source, number, content) for number, content in chunk.items]


def _files(name: str) -> list[Source]:
    path = Path(name)
    if path.is_dir():
        paths = sorted(found for found in path.rglob("*") if _is_wanted(found.relative_to(path), found))
        if not paths:
            raise DataError(
                f"folder {name} holds no text",
                f"files ending in {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)}, also with {' or '.join(COMPRESSED_SUFFIXES)}",
                "name the files or a glob, or hf:FOLDER for a Hugging Face dataset",
            )
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(Path(found) for found in glob.glob(name, recursive=True) if Path(found).is_file())
        if not paths:
            raise DataError(
                f"there is no source {name}", "a file, a folder, a glob, or hf:NAME_OR_FOLDER", "check the path"
            )
    return [Source(str(found), _kind(found), found.stat().st_size) for found in paths]


def _is_wanted(inside: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in inside.parts)
    return not hidden and _plain_suffix(path) in JSON_SUFFIXES + TEXT_SUFFIXES and path.is_file()


def _kind(path: Path) -> str:
    return "json" if _plain_suffix(path) in JSON_SUFFIXES else "text"


def _plain_suffix(path: Path) -> str:
    """The suffix below a compression's."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class _problems:
    """Opens a file, and turns what can go wrong while it is open into `DataError`s that name it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> Callable[[], IO[bytes]]:
        return lambda: Path(self._name).open("rb")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import zstandard

        damaged = (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError)
        if isinstance(error, damaged):
            raise DataError(
                f"{self._name} is damaged: {error}", "a whole compressed file", "fetch or compress it again"
            ) from error
        if isinstance(error, OSError):
            raise DataError(
                f"{self._name} cannot be read: {error.strerror or error}", "a readable file", "check it and its rights"
            ) from error


def _decompressed(name: str, file: IO[bytes]) -> IO[bytes]:
    if name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.lower().endswith(".zst"):
        return io.BufferedReader(_zstd(file))
    return file


def _zstd(file: IO[bytes]):
    """A reader over all frames of a zstd file, which raises `EOFError` where the last frame is cut off."""
    import zstandard

    return _WholeFrames(zstandard.ZstdDecompressor(), file)


class _WholeFrames(io.RawIOBase):
    """zstandard's own stream reader takes a cut-off frame for the end of the text; this one does not."""

    def __init__(self, decompressor, file: IO[bytes]) -> None:
        self._decompressor, self._file = decompressor, file
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
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._left = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _lines(name: str) -> Iterator[tuple[int, bytes, int]]:
    with _problems(name) as open_file, open_file() as file:
        for number, line in enumerate(_decompressed(name, file), start=1):
            yield number, line, file.tell()


def _whole(name: str) -> Iterator[tuple[int, bytes, int]]:
    with _problems(name) as open_file, open_file() as file:
        yield 1, _decompressed(name, file).read(), file.tell()


def _paragraphs(name: str) -> Iterator[tuple[int, bytes, int]]:
    lines: list[bytes] = []
    first, read = 1, 0
    for number, line, read in _lines(name):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, b"".join(lines).rstrip(b"\r\n"), read
            lines = []
    if lines:
        yield first, b"".join(lines).rstrip(b"\r\n"), read


def _gather(source: Source, rows: Iterator[tuple[int, bytes, int]]) -> Iterator[Chunk]:
    items: list[tuple[int, bytes]] = []
    size = read = 0
    for number, content, read in rows:
        items.append((number, content))
        size += len(content)
        if size >= _CHUNK_BYTES:
            yield Chunk(source.name, source.kind, items, read)
            items, size = [], 0
    yield Chunk(source.name, source.kind, items, max(read, source.num_bytes))


def _json_text(source: str, number: int, line: bytes, text_key: str) -> str:
    where = f"{source}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}", "one JSON object a line", "mend or remove the line") from error
    if not isinstance(row, dict) or text_key not in row:
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else f"a {type(row).__name__}, not an object"
        raise DataError(f"{where} has no key {text_key!r}", keys, "name the key of the text with --text-key")
    if not isinstance(row[text_key], str):
        raise DataError(
            f"{where} has {type(row[text_key]).__name__} under {text_key!r}", "text", "name the key of the text with --text-key"
        )
    return _without_surrogates(where, row[text_key])


def _without_surrogates(where: str, text: str) -> str:
    """The text, if it can be written: JSON may escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a surrogate pair: {error}", "Unicode text", "mend the line") from error
    return text


def _decode(source: str, number: int, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + content[: error.start].count(b"\n")
        raise DataError(
            f"{source}:{line} is no UTF-8: {error.reason} (byte {content[error.start]:#04x})",
            "UTF-8 text",
            "convert the file, for example with iconv",
        ) from error


def split_hub_name(name: str) -> tuple[str, str | None, str]:
    """(name or folder, config or None, split) of a source `hf:...`. Raises `ConfigError` where no name is left."""
    rest, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    path, _, config = rest.partition(":")
    if not path:
        raise ConfigError(f"source {name!r} names no dataset", "hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]")
    return path, config or None, split or "train"
