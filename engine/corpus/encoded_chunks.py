"""A chunk of a corpus as token ids in a file of its own, which a preparation finds again after a kill.

A part file is the XXH3-128 of the rest, one record per document, an npz of the facts about the documents, and the
byte at which that npz begins. Records lie in the order in which shards take them (`engine.corpus.spread`), so that a
shard reads one range of each part; each begins with a hash of its own, because a range cannot be checked by the
hash of the whole. Everything that is known of documents is in the order of the source, documents without a token left
out.

Invariant: a part file is moved into place whole; one that does not verify counts as not there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from engine.atomic import replacing
from engine.errors import DataError

_DIGEST_BYTES = 16
_RECORD_DIGEST_BYTES = 8
_SENTENCE_DTYPE = np.dtype("<u4")
_OFFSET_BYTES = 8
_LARGEST_GAP_BYTES = 1 << 16
"""Records that lie nearer to each other than this are read in one go."""


@dataclass(frozen=True)
class Documents:
    """Facts about n documents, without their tokens."""

    lengths: np.ndarray
    """(n,) int64 tokens, ends of text included."""
    hashes: np.ndarray
    """(n, 2) uint64: XXH3-128 of the text."""
    is_validation: np.ndarray
    """(n,) bool"""
    text_bytes: np.ndarray
    """(n,) int64"""
    unknown: np.ndarray
    """(n,) int64 unknown tokens."""
    unspelt: np.ndarray
    """(n,) int64 bytes of the text that no token spells."""
    sentences: np.ndarray
    """(n,) int64; 0 where none were asked for."""
    id_bytes: np.ndarray
    """(n,) int64 bytes of the ids as shards hold them; 0 where none were asked for."""
    id_hashes: np.ndarray
    """(n, 2) uint64: XXH3-128 of the ids; (0, 2) where none were asked for."""
    empty: np.ndarray
    """() int64 documents without a token."""
    empty_unspelt: np.ndarray
    """() int64 bytes in these that no token spells."""
    weights: np.ndarray = field(default_factory=lambda: np.empty(0))
    """(n,) float64: weights in a reservoir; (0,) where none were asked for."""


@dataclass(frozen=True)
class EncodedChunk:
    """The documents with their tokens, in the order of the source."""

    documents: Documents
    bands: np.ndarray
    """(n, bands) uint64 keys of near duplicates, or (n, 0) where none are looked for."""
    tokens: np.ndarray
    """Tokens of all documents, in the type in which they are written."""
    sentence_starts: np.ndarray
    """int64 first tokens of all sentences within their documents."""
    ids: tuple[bytes, ...] = ()
    """Ids of the documents as shards hold them; none where none were asked for."""
    lines: tuple[str, ...] = ()
    """File and line of each document, for messages about ids; none where none were asked for."""


@dataclass(frozen=True)
class Records:
    """Some documents in a part file, in the order of their bytes."""

    path: Path
    begins: np.ndarray
    """(n,) int64 bytes at which their records begin."""
    lengths: np.ndarray
    """(n,) int64 tokens."""
    sentences: np.ndarray
    """(n,) int64"""
    id_bytes: np.ndarray
    """(n,) int64"""


class Record(NamedTuple):
    """One document: its tokens, the first tokens of its sentences, and its id as shards hold it (empty: none)."""

    tokens: np.ndarray
    sentences: np.ndarray
    id: bytes


def save(path: Path, part: EncodedChunk, order: np.ndarray) -> None:
    """Put the encoded chunk in place, its records in the given order (n,) of documents. Raises `OSError`."""
    arrays = {item.name: getattr(part.documents, item.name) for item in fields(Documents)}
    known = io.BytesIO()
    lines = np.frombuffer(json.dumps(part.lines).encode(), np.uint8)
    np.savez(known, bands=part.bands, lines=lines, **arrays)
    content = io.BytesIO()
    content.write(bytes(_DIGEST_BYTES))
    _write_records(content, part, order)
    offset = content.tell()
    content.write(known.getbuffer())
    content.write(offset.to_bytes(_OFFSET_BYTES, "little"))
    view = content.getbuffer()
    # last, into the room that was left for it at the front
    view[:_DIGEST_BYTES] = xxhash.xxh3_128_digest(view[_DIGEST_BYTES:])
    with replacing(path) as file:
        file.write(view)


def lines_of(path: Path) -> list[str]:
    """Return file and line of each document of a part file that was loaded before."""
    content = path.read_bytes()
    offset = int.from_bytes(content[-_OFFSET_BYTES:], "little")
    with np.load(io.BytesIO(content[offset:-_OFFSET_BYTES])) as arrays:
        return json.loads(arrays["lines"].tobytes())


def load(path: Path) -> tuple[Documents, np.ndarray] | None:
    """Return everything but the tokens: the documents, and their keys of near duplicates.

    None where the file is not there, does not verify, or was written by a version that counted less.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = memoryview(content)[_DIGEST_BYTES:]
    if len(body) < _OFFSET_BYTES or xxhash.xxh3_128_digest(body) != content[:_DIGEST_BYTES]:
        return None
    offset = int.from_bytes(content[-_OFFSET_BYTES:], "little")
    with np.load(io.BytesIO(content[offset:-_OFFSET_BYTES])) as arrays:
        # a part of an earlier version is made again, as if it were not there
        if not {item.name for item in fields(Documents)} <= set(arrays.files):
            return None
        return Documents(**{item.name: arrays[item.name] for item in fields(Documents)}), arrays["bands"]


def record_begins(documents: Documents, order: np.ndarray, item_bytes: int) -> np.ndarray:
    """Return the byte at which each document's record begins, (n,) int64, for records in that order."""
    # sizes (10, 20) stored in order (1, 0): document 1 begins at the digest's end, 16, document 0 at 16 + 20 = 36
    sizes = _record_bytes(documents.lengths, documents.sentences, documents.id_bytes, item_bytes)[order]
    begins = np.empty(sizes.size, np.int64)
    begins[order] = _DIGEST_BYTES + np.cumsum(sizes) - sizes
    return begins


def read(records: Records, dtype: np.dtype) -> Iterator[Record]:
    """Yield the documents. Raises `DataError`: damaged or gone."""
    sizes = _record_bytes(records.lengths, records.sentences, records.id_bytes, dtype.itemsize)
    ends = records.begins + sizes
    # records [first, last) of one read: a new one begins where the gap before a record is large
    stretches = np.flatnonzero(np.append(True, records.begins[1:] - ends[:-1] > _LARGEST_GAP_BYTES))
    try:
        with records.path.open("rb") as file:
            for first, last in zip(stretches, np.append(stretches[1:], sizes.size), strict=True):
                start = int(records.begins[first])
                file.seek(start)
                content = file.read(int(ends[last - 1]) - start)
                yield from _parse(records, content, start, int(first), int(last), dtype)
    except OSError as error:
        raise _damaged(records.path) from error


def joined(parts: list[Documents]) -> Documents:
    """Return all documents of one or more parts, in order."""
    arrays = {item.name: [getattr(part, item.name) for part in parts] for item in fields(Documents)}
    totals = {name: np.sum(arrays.pop(name)) for name in ("empty", "empty_unspelt")}
    return Documents(**{name: np.concatenate(items) for name, items in arrays.items()}, **totals)


def _record_bytes(lengths: np.ndarray, sentences: np.ndarray, id_bytes: np.ndarray, item_bytes: int) -> np.ndarray:
    return _RECORD_DIGEST_BYTES + lengths * item_bytes + sentences * _SENTENCE_DTYPE.itemsize + id_bytes


def _write_records(content: io.BytesIO, part: EncodedChunk, order: np.ndarray) -> None:
    tokens = memoryview(part.tokens.tobytes())
    starts = memoryview(part.sentence_starts.astype(_SENTENCE_DTYPE).tobytes())
    token_ends = np.cumsum(part.documents.lengths) * part.tokens.itemsize
    start_ends = np.cumsum(part.documents.sentences) * _SENTENCE_DTYPE.itemsize
    token_bounds, start_bounds = [0, *token_ends.tolist()], [0, *start_ends.tolist()]
    for number in order.tolist():
        body = tokens[token_bounds[number] : token_bounds[number + 1]]
        behind = starts[start_bounds[number] : start_bounds[number + 1]]
        name = memoryview(part.ids[number] if part.ids else b"")
        content.write(_record_digest(body, behind, name))
        content.write(body)
        content.write(behind)
        content.write(name)


def _record_digest(tokens: memoryview, starts: memoryview, name: memoryview) -> bytes:
    # one digest of all three, without joining them first
    seed = xxhash.xxh3_64_intdigest(name) if len(name) else 0
    seed = xxhash.xxh3_64_intdigest(starts, seed=seed) if len(starts) else seed
    return xxhash.xxh3_64_digest(tokens, seed=seed)


def _parse(records: Records, content: bytes, start: int, first: int, last: int, dtype: np.dtype) -> Iterator[Record]:
    """Yield the documents [first, last), from content that begins at byte `start` of the file."""
    view = memoryview(content)
    columns = (records.begins - start, records.lengths, records.sentences, records.id_bytes)
    for begin, length, sentences, id_bytes in zip(*(array[first:last].tolist() for array in columns), strict=True):
        at = begin + _RECORD_DIGEST_BYTES
        middle = at + length * dtype.itemsize
        behind = middle + sentences * _SENTENCE_DTYPE.itemsize
        tokens, starts, name = view[at:middle], view[middle:behind], view[behind : behind + id_bytes]
        # a file that was cut off gives short slices, no error
        if len(tokens) != middle - at or _record_digest(tokens, starts, name) != view[begin:at]:
            raise _damaged(records.path)
        yield Record(np.frombuffer(tokens, dtype), np.frombuffer(starts, _SENTENCE_DTYPE), bytes(name))


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged or gone", "the file as it was written", "run the same command again")
