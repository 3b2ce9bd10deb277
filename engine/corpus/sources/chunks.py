"""Sources of text as raw documents in a fixed order, in chunks that workers parse.

Invariant: the order of documents is the order in which the sources are named, sorted by path inside a folder or
glob, then the order inside a file; where chunks are cut depends on the sources alone. `read_chunks` only cuts files
into bytes; `parse` (in a worker) decodes JSON and UTF-8, and knows file and line of each document for its errors. Kinds
of sources: JSON lines and text (plain or compressed), Parquet, and Hugging Face datasets, streamed; finding the files
is the business of `files`. `NAME=SOURCE` says to which domain a source belongs.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import xxhash

from engine.config.paths import expand
from engine.corpus.sources import parquet, text_files
from engine.corpus.sources.files import find_files, foreign_files, matches
from engine.corpus.sources.hub import HUB_PREFIX, local_files, read_columns
from engine.data.shards.document_weights import LARGEST_WEIGHT, LEAST_WEIGHT
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
    values: list[dict[str, Any]] = field(default_factory=list)
    """Values of each row of a table under the keys that are kept beside the text; empty for JSON, whose lines hold
    them, and where none are asked for."""


class TextDocument(NamedTuple):
    """One document of a chunk; `id` and `line` (its file and line, or row) are empty where no ids are asked for, and
    `weight` is 1 where no weights are."""

    text: str
    id: str = ""
    line: str = ""
    weight: float = 1.0


class Keys(NamedTuple):
    """Keys of what is kept of a document beside its text; None keeps none."""

    id: str | None = None
    weight: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The keys that are not None."""
        return tuple(key for key in self if key is not None)


NO_KEYS = Keys()


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


def read_chunks(shelf: list[Source], text_key: str, blank_line_ends: bool, keys: Keys = NO_KEYS) -> Iterator[TextChunk]:
    """Yield the documents of some sources of one kind in order, as chunks.

    `text_key` and `keys` name columns of a table; with `blank_line_ends` a text file holds many documents, each
    ended by an empty line. Raises `DataError`: unreadable, damaged compression, unknown dataset or column.
    """
    # a 32nd of the files, so that small corpora also make chunks for many workers
    limit = min(max(sum(source.num_bytes for source in shelf) // _CHUNKS_PER_FILE, _SMALLEST_CHUNK), LARGEST_CHUNK)
    items: list[tuple[str, int, bytes]] = []
    values: list[dict[str, Any]] = []
    size = read = 0
    for source in shelf:
        before = 0
        for (number, content, so_far), found in _rows(source, text_key, blank_line_ends, limit, keys.named):
            items.append((source.name, number, content))
            if keys.named and source.kind != "json":
                values.append(found)
            size += len(content)
            # `so_far` counts the bytes of this file, `read` those of the shelf since the last chunk
            read, before = read + so_far - before, so_far
            if size >= limit:
                yield TextChunk(source.kind, items, read, values)
                items, values, size, read = [], [], 0, 0
        # the rest of a file without further documents, such as blank lines at its end
        read += source.num_bytes - before
    yield TextChunk(shelf[-1].kind, items, read, values)


def _rows(
    source: Source, text_key: str, blank_line_ends: bool, limit: int, columns: tuple[str, ...]
) -> Iterator[tuple[text_files.RawDocument, dict[str, Any]]]:
    """Yield documents and, of a table, their values in some other columns."""
    if source.kind == "hub":
        rows = enumerate(read_columns(source.name, text_key, columns))
        return (((number, text.encode(), 0), found) for number, (text, found) in rows)
    if source.kind == "parquet":
        return parquet.rows(source.name, text_key, columns)
    if source.kind == "json":
        return zip(text_files.blocks(source.name, limit), itertools.repeat({}), strict=False)
    plain = text_files.paragraphs(source.name) if blank_line_ends else text_files.whole(source.name)
    return zip(plain, itertools.repeat({}), strict=False)


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
        for document in parse(chunk, text_key):
            yield document.text
            if left is not None and (left := left - len(document.text.encode())) <= 0:
                return


def parse(chunk: TextChunk, text_key: str, keys: Keys = NO_KEYS) -> list[TextDocument]:
    """Return a chunk's documents, with their ids and weights where `keys` name them.

    Raises `DataError` naming file and line: no JSON, no text, no UTF-8, no id, no weight.
    """
    if chunk.kind == "text":
        return [TextDocument(_decode(*item)) for item in chunk.items]
    if chunk.kind != "json":
        texts = [_decode_row(*item) for item in chunk.items]
        if not keys.named:
            return [TextDocument(text) for text in texts]
        lines = [f"row {number} of {source}" for source, number, _ in chunk.items]
        return [_document(*item, keys) for item in zip(texts, chunk.values, lines, strict=True)]
    return [
        _json_document(source, number, line, text_key, keys)
        for source, first, content in chunk.items
        for number, line in enumerate(content.split(b"\n"), first)
        if line.strip()
    ]


def _files(name: str, given: str) -> list[Source]:
    return [Source(str(path), kind, size) for path, kind, size in find_files(name, given)]


def _json_document(source: str, number: int, line: bytes, text_key: str, keys: Keys) -> TextDocument:
    where = f"{source}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(f"{where} is no JSON: {reason}", "one JSON object a line", "mend or remove the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_JSON_NAMES[type(row)]}", "one JSON object a line", "mend or remove the line")
    if text_key not in row:
        allowed = f"a key that is there: {', '.join(sorted(row))}" if row else "an object with a text"
        raise DataError(f"{where} has no key {text_key!r}", allowed, "name the key of the text with --text-key")
    if not isinstance(row[text_key], str):
        raise DataError(
            f"{where} has {_JSON_NAMES[type(row[text_key])]} under {text_key!r}",
            "a string",
            "name the key of the text with --text-key, or mend or remove the line",
        )
    text = _without_surrogates(where, row[text_key])
    return _document(text, row, where, keys)


def _document(text: str, row: dict[str, Any], where: str, keys: Keys) -> TextDocument:
    """Return a document with what is kept beside its text."""
    name = "" if keys.id is None else id_text(where, row.get(keys.id), keys.id)
    weight = 1.0 if keys.weight is None else weight_of(where, row.get(keys.weight), keys.weight)
    return TextDocument(text, name, "" if keys.id is None else where, weight)


def weight_of(where: str, value: Any, key: str) -> float:
    """Return the weight of a document. Raises `DataError` where it is missing, no number, or out of bounds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not LEAST_WEIGHT <= value <= LARGEST_WEIGHT:
        found = repr(value) if is_number else _JSON_NAMES.get(type(value), type(value).__name__)
        raise DataError(
            f"{where} has {'no weight' if value is None else found} under {key!r}",
            f"a number from {LEAST_WEIGHT} to {LARGEST_WEIGHT} for each document",
            "name the key of the weights with --weight-key, or mend the line",
        )
    return float(value)


def id_text(where: str, value: Any, key: str) -> str:
    """Return an id as text: a string as it is, a number and true or false as JSON writes them.

    Raises:
        DataError: there is none (or null, or an empty string), or it is no scalar.
    """
    if value is None or value == "":
        raise DataError(
            f"{where} has no id under {key!r}",
            "an id for each document",
            "name the key of the ids with --id-key, or mend the line, or leave --id-key out (ids are then "
            "SHARD_HASH:ROW)",
        )
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{where} has {_JSON_NAMES.get(type(value), type(value).__name__)} under {key!r}",
            "text or a number as the id of a document",
            "name the key of the ids with --id-key, or mend the line",
        )
    return _without_surrogates(where, value if isinstance(value, str) else json.dumps(value))


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
