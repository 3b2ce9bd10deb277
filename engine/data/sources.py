"""Text in its many places -> raw documents in a fixed order, in chunks that workers parse.

Invariant: the order of documents is the order in which the sources are named, sorted by path inside a folder or
glob, then the order inside a file. `read_chunks` only cuts files into documents' bytes; `parse` (in a worker)
decodes JSON and UTF-8, and knows file and line of each document for its errors. What is found: JSON lines and text
(plain, gzip, zstd), and Hugging Face datasets, streamed.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from engine.data import text_files
from engine.data.hub import HUB_PREFIX, read_column
from engine.errors import DataError

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
    return (
        xxhash.xxh3_128_hexdigest(source.name.encode()) if source.kind == "hub" else text_files.file_hash(source.name)
    )


def read_chunks(source: Source, text_key: str, blank_line_ends: bool) -> Iterator[Chunk]:
    """The documents of a source in order.

    `text_key` names the column of a hub dataset; with `blank_line_ends` a text file holds many documents, each
    ended by an empty line. Raises `DataError`: unreadable, damaged compression, unknown dataset or column.
    """
    if source.kind == "hub":
        rows = ((number, text.encode(), 0) for number, text in enumerate(read_column(source.name, text_key)))
    elif source.kind == "json":
        rows = ((number, line, read) for number, line, read in text_files.lines(source.name) if line.strip())
    else:
        rows = text_files.paragraphs(source.name) if blank_line_ends else text_files.whole(source.name)
    yield from _gather(source, rows)


def read_texts(names: list[str], text_key: str, blank_line_ends: bool, max_bytes: int | None = None) -> Iterator[str]:
    """The texts of all documents that names stand for, in order; with `max_bytes` the first so many (of UTF-8).

    Raises `DataError` as `find_sources`, `read_chunks` and `parse` do.
    """
    left = max_bytes
    for source in find_sources(names):
        for chunk in read_chunks(source, text_key, blank_line_ends):
            for text in parse(chunk, text_key):
                yield text
                if left is not None and (left := left - len(text.encode())) <= 0:
                    return


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
                f"files ending in {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)}, "
                f"also with {' or '.join(COMPRESSED_SUFFIXES)}",
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
            f"{where} has {type(row[text_key]).__name__} under {text_key!r}",
            "text",
            "name the key of the text with --text-key",
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
