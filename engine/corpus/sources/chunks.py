"""Sources of text as raw documents in a fixed order, in chunks that workers parse.

Invariant: the order of documents is the order in which the sources are named, sorted by path inside a folder or
glob, then the order inside a file; where chunks are cut depends on the sources alone. `read_chunks` only cuts files
into bytes; `parse` (in a worker) decodes JSON and UTF-8, and knows file and line of each document for its errors. Kinds
of sources: JSON lines and text (plain or compressed), Parquet, and Hugging Face datasets, streamed; finding the files
is the business of `files`. `NAME=SOURCE` says to which domain a source belongs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import xxhash

from engine.config.paths import expand
from engine.corpus.sources import parquet, text_files
from engine.corpus.sources.files import find_files, foreign_files, matches
from engine.corpus.sources.hub import HUB_PREFIX, local_files, read_column
from engine.data.visible import visible
from engine.errors import ConfigError, DataError

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
_SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 20, 32 << 20
"""Bytes of text in a chunk, which a worker holds whole; a longer document is a chunk of its own."""
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
class TextChunk:
    """Some documents of sources of one kind as they lie there.

    Items are (source, line number from 1 or row, bytes): of JSON many whole lines, otherwise one document.
    """

    kind: str
    items: list[tuple[str, int, bytes]]
    read_bytes: int
    """Bytes of the files, as they lie there, that were read for it."""


def find_sources(names: Iterable[str]) -> list[Source]:
    """Return the files and datasets that names, folders and globs stand for, in order, each once per domain.

    Raises:
        ConfigError: an empty name; some names have a domain and others not.
        DataError: a name that stands for nothing, or a file that cannot be read as text.
    """
    found: dict[tuple[str, str], Source] = {}
    for given in names:
        domain, name = split_domain(given)
        if not name.strip():
            raise ConfigError("a source is empty", "a file, a folder, a glob, or hf:NAME_OR_FOLDER", "name one")
        for source in [Source(name, "hub", 0)] if name.startswith(HUB_PREFIX) else _files(name, given):
            found.setdefault((domain, source.name), replace(source, domain=domain))
    if len({bool(domain) for domain, _ in found}) > 1:
        raise ConfigError(
            "some sources have a domain and others not", "NAME=SOURCE for all or for none", "name the others, too"
        )
    return list(found.values())


def told_foreign(names: Iterable[str]) -> str | None:
    """Return a line about the files in folders that are no sources, since their names tell no kind of text; None where
    there is none."""
    found = [path for given in names for path in foreign_files(split_domain(given)[1])]
    if not found:
        return None
    first = ", ".join(visible(str(path)) for path in found[:3]) + (f" and {len(found) - 3:,} more" * (len(found) > 3))
    return (
        f"not read: {len(found):,} file{'s' * (len(found) > 1)} in folders, whose names end in no suffix of text "
        f"({first}); a file that is named itself, or by a glob, is read"
    )


def split_domain(given: str) -> tuple[str, str]:
    """Return (domain, source) of `NAME=SOURCE`; the domain is empty if none is named, or if such a file exists.

    A leading `~` of the source is the home folder.
    """
    found, whole = _DOMAIN.fullmatch(given), expand(given)
    return ("", whole) if found is None or matches(whole) else (found[1], expand(found[2]))


def shelves(sources: list[Source]) -> list[list[Source]]:
    """Return the sources in order, small ones of one kind and domain grouped, so that they share chunks."""
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
            # a hub dataset has no known size: a full shelf, to which nothing is added
            size = source.num_bytes if source.num_bytes else _SHELF_BYTES
    return found


def content_hash(source: Source) -> str:
    """Return the XXH3-128 in hex of a file as stored, or of a local dataset's files; of its name alone on the hub.

    Raises `DataError`.
    """
    if source.kind != "hub":
        return text_files.file_hash(source.name)
    paths = local_files(source.name)
    for path in paths:
        text_files.refuse_cut_off(str(path))
    hashes = [text_files.file_hash(str(path)) for path in paths]
    return xxhash.xxh3_128_hexdigest(" ".join([*hashes, source.name]).encode())


def named_hash(source: Source) -> tuple[str, str]:
    """Return (name, `content_hash`) of a source, for results that come in no order. Raises `DataError`."""
    return source.name, content_hash(source)


def read_chunks(shelf: list[Source], text_key: str, blank_line_ends: bool) -> Iterator[TextChunk]:
    """Yield the documents of some sources of one kind in order, as chunks.

    `text_key` names the column of a dataset; with `blank_line_ends` a text file holds many documents, each ended by an
    empty line. Raises `DataError`: unreadable, damaged compression, unknown dataset or column.
    """
    # a 32nd of the files, so that small corpora also make chunks for many workers
    limit = min(max(sum(source.num_bytes for source in shelf) // _CHUNKS_PER_FILE, _SMALLEST_CHUNK), LARGEST_CHUNK)
    items: list[tuple[str, int, bytes]] = []
    size = read = 0
    for source in shelf:
        before = 0
        for number, content, so_far in _rows(source, text_key, blank_line_ends, limit):
            items.append((source.name, number, content))
            size += len(content)
            # `so_far` counts the bytes of this file, `read` those of the shelf since the last chunk
            read, before = read + so_far - before, so_far
            if size >= limit:
                yield TextChunk(source.kind, items, read)
                items, size, read = [], 0, 0
        # the rest of a file without further documents, such as blank lines at its end
        read += source.num_bytes - before
    yield TextChunk(shelf[-1].kind, items, read)


def _rows(source: Source, text_key: str, blank_line_ends: bool, limit: int) -> Iterator[text_files.RawDocument]:
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
    """Yield the texts of all documents that names stand for, in order.

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


def parse(chunk: TextChunk, text_key: str) -> list[str]:
    """Return the texts of a chunk's documents. Raises `DataError` naming file and line: no JSON, no text, no UTF-8."""
    if chunk.kind == "text":
        return [_decode(*item) for item in chunk.items]
    if chunk.kind != "json":
        return [_decode_row(*item) for item in chunk.items]
    return [
        _json_text(source, number, line, text_key)
        for source, first, content in chunk.items
        for number, line in enumerate(content.split(b"\n"), first)
        if line.strip()
    ]


def _files(name: str, given: str) -> list[Source]:
    return [Source(str(path), kind, size) for path, kind, size in find_files(name, given)]


def _json_text(source: str, number: int, line: bytes, text_key: str) -> str:
    where = f"{source}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(f"{where} is no JSON: {reason}", "one JSON object a line", "mend or remove the line") from error
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
    """Return the text, if UTF-8 can hold it: JSON may escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a surrogate pair: {error}", "Unicode text", "mend the line") from error
    return text


def _decode(source: str, number: int, content: bytes) -> str:
    try:
        # a byte order mark is one at the beginning of a file only
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + content[: error.start].count(b"\n")
        raise DataError(
            f"{source}:{line} is no UTF-8: {error.reason} (byte {content[error.start]:#04x})",
            "UTF-8 text",
            "convert the file, for example with iconv",
        ) from error


def _decode_row(source: str, number: int, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"row {number} of {source} is no UTF-8: {error.reason} (byte {content[error.start]:#04x})",
            "UTF-8 text",
            "mend or remove the row",
        ) from error
