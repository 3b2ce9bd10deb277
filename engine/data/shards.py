"""Writes token shards: documents whole and in order, cut into shards of a given size, the index last.

Invariant: the bytes are a function of the documents' tokens and of `shard_bytes` alone. A folder without an
index is unfinished, and the next writer sweeps it. Verifying and reading are in `engine.data.dataset`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from engine.data.index import FILE, OFFSET_DTYPE, ArrayFile, Index, ShardEntry, sync_folder, token_dtype, write_index
from engine.data.vocabulary import Vocabulary
from engine.errors import DataError

DEFAULT_SHARD_BYTES = 64 << 20

_OURS = re.compile(r"shard-\d{6,}\.(tokens|documents|sentences)|index\.json(\.\d+)?")


class ShardWriter:
    """Writes documents into a folder; use as a context, whose clean end writes the index.

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
    ) -> None:
        self.folder, self._vocabulary = folder, vocabulary
        self._vocab_size, self._eos_id, self._tokenizer_hash = vocab_size, eos_id, tokenizer_hash
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._shard_tokens = max(1, shard_bytes // self._dtype.itemsize)
        self._shards: list[ShardEntry] = []
        self._pending: list[np.ndarray] = []
        self._pending_sentences: list[np.ndarray | None] = []
        self._pending_tokens = 0

    def __enter__(self) -> ShardWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self._finish()

    def add(self, tokens: np.ndarray, sentences: np.ndarray | None = None) -> None:
        """Appends one document's tokens, its end-of-text included. Raises `DataError` when the disk is full.

        `sentences` are the positions of their first tokens, rising from 0: given for every document or for none.
        """
        assert sentences is None or sentences[0] == 0
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size
        if self._pending and self._pending_tokens + tokens.size > self._shard_tokens:
            self._close_shard()
        self._pending.append(tokens.astype(self._dtype))
        self._pending_sentences.append(None if sentences is None else sentences + self._pending_tokens)
        self._pending_tokens += tokens.size

    @property
    def index(self) -> Index:
        """Index of the shards written so far; complete once the context has ended."""
        return Index(self._vocab_size, self._eos_id, self._tokenizer_hash, tuple(self._shards), self._vocabulary)

    def _finish(self) -> None:
        if self._pending:
            self._close_shard()
        try:
            sync_folder(self.folder)
            write_index(self.folder, self.index)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _close_shard(self) -> None:
        stem = f"shard-{len(self._shards):06d}"
        lengths = [document.size for document in self._pending]
        starts = [item for item in self._pending_sentences if item is not None]
        assert len(starts) in (0, len(lengths)), "sentences of some documents only"
        try:
            tokens = _write_array(self.folder / f"{stem}.tokens", np.concatenate(self._pending))
            documents = self._write_offsets(f"{stem}.documents", [np.array([0]), np.cumsum(lengths)])
            ends = [np.array([self._pending_tokens])]
            sentences = self._write_offsets(f"{stem}.sentences", starts + ends) if starts else None
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._shards.append(ShardEntry(tokens, documents, sentences))
        self._pending, self._pending_sentences, self._pending_tokens = [], [], 0

    def _write_offsets(self, name: str, parts: list[np.ndarray]) -> ArrayFile:
        return _write_array(self.folder / name, np.concatenate(parts).astype(np.dtype(OFFSET_DTYPE).newbyteorder("<")))


def sweep(folder: Path) -> None:
    """Removes an earlier index and its shards, the index first, and nothing else. Raises `OSError`."""
    (folder / FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def _write_array(path: Path, array: np.ndarray) -> ArrayFile:
    content = array.tobytes()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return ArrayFile(path.name, array.dtype.name, array.size, len(content), xxhash.xxh3_128_hexdigest(content))


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write token shards to {folder}: {error.strerror}",
        "a writable folder with room for two to four bytes per token",
        "make room or name another --output; the unfinished folder is swept by the next attempt",
    )
