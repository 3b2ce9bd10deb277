"""Text in its many places -> raw documents in a fixed order, in chunks that workers parse.

Invariant: the order of documents is the order in which the sources are named, sorted by path inside a folder or
glob, then the order inside a file; where chunks are cut depends on the sources alone. `read_chunks` only cuts files
into bytes; `parse` (in a worker) decodes JSON and UTF-8, and knows file and line of each document for its errors. What
is found: JSON lines and text (plain, gzip, zstd), Parquet, and Hugging Face datasets, streamed. `NAME=SOURCE` says to
which domain a source belongs.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from engine.data.preparation import parquet, text_files
from engine.data.preparation.hub import HUB_PREFIX, local_files, read_column
from engine.errors import ConfigError, DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
"""What a folder is searched for beside JSON lines; a file that is named itself may be called anything."""
PARQUET_SUFFIXES = (".parquet", ".pq")
COMPRESSED_SUFFIXES = (".gz", ".zst")

_DOMAIN = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)
_JSON_NAMES = {
    list: "an array",
    dict: "an object",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1 << 20, 64 << 20
_CHUNKS_PER_FILE = 32
_SHELF_BYTES = 4 << 20


@dataclass(frozen=True)
class Source:
    """One file or one hub dataset."""

    name: str
    kind: str
    """`json`, `text`, `parquet` or `hub`."""
    num_bytes: int
    """Size of the file as it lies there (compressed); 0 for a hub dataset."""
    domain: str = ""
    """Name of the mixture's part that it belongs to; empty where parts have no names."""


@dataclass(frozen=True)
class Chunk:
    """Some documents of sources of one kind as they lie there.

    Items are (source, line number from 1 or row, bytes): of JSON many whole lines, otherwise one document.
    """

    kind: str
    items: list[tuple[str, int, bytes]]
    read_bytes: int
    """What was read for it, in bytes of the files as they lie there."""


def find_sources(names: Iterable[str]) -> list[Source]:
    """The files and datasets that names, folders and globs stand for, in order, each once per domain.

    Raises:
        ConfigError: some names have a domain and others not.
        DataError: a name that stands for nothing.
    """
    found: dict[tuple[str, str], Source] = {}
    for given in names:
        domain, name = split_domain(given)
        for source in [Source(name, "hub", 0)] if name.startswith(HUB_PREFIX) else _files(name):
            found.setdefault((domain, source.name), replace(source, domain=domain))
    if len({bool(domain) for domain, _ in found}) > 1:
        raise ConfigError(
            "some sources have a domain and others not", "NAME=SOURCE for all or for none", "name the others, too"
        )
    return list(found.values())


def split_domain(given: str) -> tuple[str, str]:
    """(domain, source) of `NAME=SOURCE`; the domain is empty where none is named, or where such a path exists."""
    found = _DOMAIN.fullmatch(given)
    return ("", given) if found is None or Path(given).exists() else (found[1], found[2])


def shelves(sources: list[Source]) -> list[list[Source]]:
    """The sources in order, small ones of one kind and domain together, so that they make no chunk each."""
    found: list[list[Source]] = []
    size = 0
    for source in sources:
        size += source.num_bytes
        last = found[-1][-1] if found else None
        alike = last is not None and (last.kind, last.domain) == (source.kind, source.domain) and source.num_bytes > 0
        if alike and size <= _SHELF_BYTES:
            found[-1].append(source)
        else:
            found.append([source])
            size = source.num_bytes if source.num_bytes else _SHELF_BYTES
    return found


def content_hash(source: Source) -> str:
    """XXH3-128 in hex of a file as it lies there, or of a local dataset's files; of the name alone for one on the hub.

    Raises `DataError`.
    """
    if source.kind != "hub":
        return text_files.file_hash(source.name)
    hashes = [text_files.file_hash(str(path)) for path in local_files(source.name)]
    return xxhash.xxh3_128_hexdigest(" ".join([*hashes, source.name]).encode())


def named_hash(source: Source) -> tuple[str, str]:
    """(name, `content_hash`) of a source, for results that come in no order. Raises `DataError`."""
    return source.name, content_hash(source)


def read_chunks(shelf: list[Source], text_key: str, blank_line_ends: bool) -> Iterator[Chunk]:
    """The documents of some sources of one kind in order.

    `text_key` names the column of a dataset; with `blank_line_ends` a text file holds many documents, each ended by an
    empty line. Raises `DataError`: unreadable, damaged compression, unknown dataset or column.
    """
    limit = min(max(sum(source.num_bytes for source in shelf) // _CHUNKS_PER_FILE, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    items: list[tuple[str, int, bytes]] = []
    size = read = 0
    for source in shelf:
        before = 0
        for number, content, so_far in _rows(source, text_key, blank_line_ends, limit):
            items.append((source.name, number, content))
            size += len(content)
            read, before = read + so_far - before, so_far
            if size >= limit:
                yield Chunk(source.kind, items, read)
                items, size, read = [], 0, 0
        read += source.num_bytes - before
    yield Chunk(shelf[-1].kind, items, read)


def _rows(source: Source, text_key: str, blank_line_ends: bool, limit: int) -> Iterator[text_files.Piece]:
    if source.kind == "hub":
        return ((number, text.encode(), 0) for number, text in enumerate(read_column(source.name, text_key)))
    if source.kind == "parquet":
        return parquet.rows(source.name, text_key)
    if source.kind == "json":
        return text_files.blocks(source.name, limit)
    return text_files.paragraphs(source.name) if blank_line_ends else text_files.whole(source.name)


def read_texts(
    names: Iterable[str], text_key: str, blank_line_ends: bool, max_bytes: int | None = None
) -> Iterator[str]:
    """The texts of all documents that names stand for, in order.

    With `max_bytes` (of UTF-8) the first texts of each source, as many as its share of the files' bytes allows: so
    every source is heard. Raises `DataError` as `find_sources`, `read_chunks` and `parse` do.
    """
    found = shelves(find_sources(names))
    sizes = [sum(source.num_bytes for source in shelf) or 1 for shelf in found]
    for shelf, size in zip(found, sizes, strict=True):
        limit = None if max_bytes is None else -(-max_bytes * size // sum(sizes))
        yield from _first_texts(shelf, text_key, blank_line_ends, limit)


def _first_texts(shelf: list[Source], text_key: str, blank_line_ends: bool, limit: int | None) -> Iterator[str]:
    left = limit
    for chunk in read_chunks(shelf, text_key, blank_line_ends):
        for text in parse(chunk, text_key):
            yield text
            if left is not None and (left := left - len(text.encode())) <= 0:
                return


def parse(chunk: Chunk, text_key: str) -> list[str]:
    """The texts of a chunk's documents. Raises `DataError` naming file and line: no JSON, no text, no UTF-8."""
    if chunk.kind != "json":
        return [_decode(*item) for item in chunk.items]
    return [
        _json_text(source, number, line, text_key)
        for source, first, content in chunk.items
        for number, line in enumerate(content.split(b"\n"), first)
        if line.strip()
    ]


def _files(name: str) -> list[Source]:
    path = Path(name)
    if path.is_dir():
        paths = sorted(found for found in path.rglob("*") if _is_wanted(found.relative_to(path), found))
        if not paths:
            raise DataError(
                f"folder {name} holds no text",
                f"files ending in {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)}, "
                f"also with {' or '.join(COMPRESSED_SUFFIXES)}, or in {' or '.join(PARQUET_SUFFIXES)}",
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
    wanted = _plain_suffix(path) in JSON_SUFFIXES + TEXT_SUFFIXES or _kind(path) == "parquet"
    return not hidden and wanted and path.is_file()


def _kind(path: Path) -> str:
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return "parquet"
    return "json" if _plain_suffix(path) in JSON_SUFFIXES else "text"


def _plain_suffix(path: Path) -> str:
    """The suffix below a compression's."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _json_text(source: str, number: int, line: bytes, text_key: str) -> str:
    where = f"{source}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}", "one JSON object a line", "mend or remove the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_JSON_NAMES[type(row)]}", "one JSON object a line", "mend or remove the line")
    if text_key not in row:
        keys = f"a key that is there: {', '.join(sorted(row))}" if row else "an object with a text"
        raise DataError(f"{where} has no key {text_key!r}", keys, "name the key of the text with --text-key")
    if not isinstance(row[text_key], str):
        raise DataError(
            f"{where} has {_JSON_NAMES[type(row[text_key])]} under {text_key!r}",
            "a string",
            "name the key of the text with --text-key, or mend or remove the line",
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
