"""Writes token shards: documents whole and in order, cut into shards of a given size, the index last.

Invariant: the bytes are a function of the documents' tokens, of `shard_bytes` and of the compression alone. A folder
without an index is unfinished, and the next writer sweeps it. Verifying and reading are in `dataset`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import xxhash
import zstandard

from engine.atomic import sync_folder
from engine.data.shards.index import (
    COMPRESSION,
    FILE,
    OFFSET_DTYPE,
    ArrayFile,
    Compressed,
    Index,
    ShardEntry,
    Synthetic,
    require_column_name,
    token_dtype,
    write_index,
)
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError

Compression = Literal["none", "zstd"]

DEFAULT_SHARD_BYTES = 64 << 20
ZSTD_LEVEL = 3  # zstd's own default
SUFFIXES: dict[Compression, str] = {"none": "", "zstd": ".zst"}

_OURS = re.compile(r"shard-\d{6,}\.(tokens|documents|sentences|ids|column-[a-z0-9_]+)(\.zst)?|index\.json(\.\d+)?")


class ShardWriter:
    """Writer of documents into a folder; use as a context, whose clean end writes the index.

    A shard ends before the document that would make it longer than `shard_bytes`; a longer document has a shard
    of its own, so no document is ever cut. An earlier index is removed at the start: until the end, the folder
    counts as unfinished.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_id: int,
        tokenizer_hash: str,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        vocabulary: Vocabulary | None = None,
        compression: Compression = "none",
        synthetic: Synthetic | None = None,
    ) -> None:
        self.folder, self._vocabulary, self._synthetic = folder, vocabulary, synthetic
        self._compression: Compression = compression
        self._vocab_size, self._eos_id, self._tokenizer_hash = vocab_size, eos_id, tokenizer_hash
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._shard_tokens = tokens_per_shard(shard_bytes, vocab_size)
        self._shards: list[ShardEntry] = []
        self._pending: list[np.ndarray] = []
        self._pending_sentences: list[np.ndarray | None] = []
        self._pending_columns: list[Mapping[str, float | np.ndarray]] = []
        self._pending_tokens = 0

    def __enter__(self) -> ShardWriter:
        start_folder(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            if self._pending:
                self._close_shard()
            finish_folder(self.folder, self.index)

    def add(
        self,
        tokens: np.ndarray,
        sentences: np.ndarray | None = None,
        columns: Mapping[str, float | np.ndarray] = {},
    ) -> None:
        """Append one document's tokens, its end-of-text included. Raises `DataError` when the disk is full.

        `sentences` are the positions of their first tokens, rising from 0: given for every document or for none.
        `columns` are the document's numbers by the name of their column, the same names for every document: int for
        whole numbers, float for others, or an array with one for each token.
        """
        assert sentences is None or sentences[0] == 0
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size
        if self._pending and self._pending_tokens + tokens.size > self._shard_tokens:
            self._close_shard()
        # narrow at once: a pending document takes two or four bytes per token, not eight
        self._pending.append(tokens.astype(self._dtype))
        self._pending_sentences.append(None if sentences is None else sentences + self._pending_tokens)
        self._pending_columns.append(columns)
        self._pending_tokens += tokens.size

    @property
    def index(self) -> Index:
        """Index of the shards written so far; complete once the context has ended."""
        shape = (self._vocab_size, self._eos_id, self._tokenizer_hash, tuple(self._shards), self._vocabulary)
        return Index(*shape, synthetic=self._synthetic)

    def _close_shard(self) -> None:
        lengths = np.array([document.size for document in self._pending])
        starts = [item for item in self._pending_sentences if item is not None]
        assert len(starts) in (0, lengths.size), "sentences of some documents only"
        sentences = np.concatenate(starts) if starts else None
        tokens = np.concatenate(self._pending)
        columns = {
            # numbers of documents become one-element arrays, so that both kinds are joined end to end
            name: np.concatenate([np.atleast_1d(document[name]) for document in self._pending_columns])
            for name in self._pending_columns[0]
        }
        entry = write_shard(
            self.folder, len(self._shards), tokens, lengths, sentences, self._compression, columns=columns
        )
        self._shards.append(entry)
        self._pending, self._pending_sentences, self._pending_columns = [], [], []
        self._pending_tokens = 0


def tokens_per_shard(shard_bytes: int, vocab_size: int) -> int:
    """Return the most tokens of a shard that holds more than one document."""
    return max(1, shard_bytes // np.dtype(token_dtype(vocab_size)).itemsize)


def cut_into_shards(lengths: np.ndarray, shard_tokens: int) -> np.ndarray:
    """Return the first document of each shard, then the number of documents, (shards + 1,) int64.

    `lengths` (documents,) are in tokens. A shard takes documents while they fit, and at least one.
    """
    # lengths (3, 4, 5) with room for 8: ends (3, 7, 12), bounds [0, 2, 3]: shards of 7 and 5 tokens
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < lengths.size:
        start = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        following = int(np.searchsorted(ends, start + shard_tokens, side="right"))
        bounds.append(max(following, bounds[-1] + 1))
    return np.array(bounds, np.int64)


def write_shard(
    folder: Path,
    number: int,
    tokens: np.ndarray,
    lengths: np.ndarray,
    sentences: np.ndarray | None,
    compression: Compression,
    ids: np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] = {},
) -> ShardEntry:
    """Write the arrays of one shard: `tokens` in their final dtype, the `lengths` of its documents, the first tokens of
    all its sentences, `ids` as `engine.data.shards.ids` has them, and `columns` of numbers (documents,) or (tokens,) of
    any integer or floating dtype. Raises `DataError` when they cannot be written.
    """
    try:
        return ShardEntry(
            write_array(folder, f"shard-{number:06d}.tokens", tokens, compression),
            write_offsets(folder, number, "documents", np.concatenate([[0], np.cumsum(lengths)]), compression),
            None
            if sentences is None
            else write_offsets(folder, number, "sentences", np.append(sentences, tokens.size), compression),
            None if ids is None else write_array(folder, f"shard-{number:06d}.ids", ids, compression),
            tuple((name, _write_column(folder, number, name, values, compression)) for name, values in columns.items()),
        )
    except OSError as error:
        raise unwritable(folder, error) from error


def _write_column(folder: Path, number: int, name: str, values: np.ndarray, compression: Compression) -> ArrayFile:
    require_column_name(name)
    dtype = "int64" if np.issubdtype(values.dtype, np.integer) else "float64"
    array = values.astype(np.dtype(dtype).newbyteorder("<"))
    return write_array(folder, f"shard-{number:06d}.column-{name}", array, compression)


def write_offsets(folder: Path, number: int, kind: str, offsets: np.ndarray, compression: Compression) -> ArrayFile:
    """Write offsets of a shard, the last one being its number of tokens. Raises `OSError`."""
    array = offsets.astype(np.dtype(OFFSET_DTYPE).newbyteorder("<"))
    return write_array(folder, f"shard-{number:06d}.{kind}", array, compression)


def write_array(folder: Path, name: str, array: np.ndarray, compression: Compression) -> ArrayFile:
    """Write a little-endian array, on disk when this returns. Raises `OSError`."""
    content = plain = array.tobytes()
    packed = None
    if compression == COMPRESSION:
        content = zstandard.ZstdCompressor(ZSTD_LEVEL).compress(plain)
        # two hashes: that of the file verifies a download, that of the array what was unpacked from it
        packed = Compressed(COMPRESSION, len(content), xxhash.xxh3_128_hexdigest(content))
    path = folder / f"{name}{SUFFIXES[compression]}"
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        # before the index names it: after a power failure an index must not name files that are empty
        os.fsync(file.fileno())
    return ArrayFile(path.name, array.dtype.name, array.size, len(plain), xxhash.xxh3_128_hexdigest(plain), packed)


def start_folder(folder: Path) -> None:
    """Make a folder for shards; removes an earlier index and its shards. Raises `DataError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    except OSError as error:
        raise unwritable(folder, error) from error


def finish_folder(folder: Path, index: Index) -> None:
    """Write the index of shards that lie there, which makes the folder complete. Raises `DataError`."""
    try:
        sync_folder(folder)
        write_index(folder, index)
    except OSError as error:
        raise unwritable(folder, error) from error


def sweep(folder: Path) -> None:
    """Remove an earlier index and its shards, the index first, and nothing else. Raises `OSError`."""
    (folder / FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write token shards to {folder}: {error.strerror}",
        "a writable folder with room for two to four bytes per token",
        "make room, or choose another folder; the same command goes on where this one stopped",
    )
