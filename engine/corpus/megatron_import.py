"""Import of an indexed data set of Megatron's as token shards, without a copy.

The folder that is written holds an index and the offsets; the tokens of its shards are ranges of the `.bin`, which
stays at its location. So the set has the order, windows and hashes of any other. Invariant: the hashes are those of the
day of the import, and a `.bin` that changes later is refused like a damaged shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.data.shards.arrays import hash_file
from engine.data.shards.index import ArrayFile, Index, ShardEntry
from engine.data.shards.megatron import file_of, read_sequences, refuse_if, unreadable
from engine.data.shards.writer import (
    DEFAULT_SHARD_BYTES,
    cut_into_shards,
    finish_folder,
    start_folder,
    unwritable,
    write_offsets,
)
from engine.data.tokenizer.folder import TextTokenizer


def import_megatron(
    prefix: Path,
    tokenizer: TextTokenizer,
    output: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Index:
    """Write a folder of token shards that are ranges of `PREFIX.bin`, and return its index.

    Reads every token twice, to look at it and for the hashes, and tells `progress` the tokens of each shard. Raises
    `DataError`: a set that is damaged or was not made with this tokenizer, documents without an end-of-text, an output
    that cannot be written.
    """
    sequences = read_sequences(prefix)
    ends = np.concatenate([[0], np.cumsum(sequences.lengths, dtype=np.int64)])
    documents = np.unique(ends[sequences.documents])  # empty ones are none
    refuse_if(documents.size < 2, f"{prefix} holds no token", "at least one document", "name another set")
    # as many sequences as documents: none was split into sentences. Unique, since an empty sentence is none
    sentences = None if ends.size == sequences.documents.size else np.unique(ends)
    path = file_of(prefix, "bin")
    # larger than memory, perhaps: each shard's tokens are read when they are checked and hashed
    tokens = np.memmap(path, np.dtype(sequences.dtype).newbyteorder("<"), mode="r")
    start_folder(output)
    shards = []
    bounds = cut_into_shards(np.diff(documents), max(1, shard_bytes // tokens.itemsize))
    try:
        for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            inside = documents[first : last + 1]
            _check_tokens(path, tokens, inside, tokenizer)
            stretch = _stretch(path, sequences.dtype, int(inside[0]), int(inside[-1]))
            shards.append(ShardEntry(stretch, *_write_offsets(output, number, inside, sentences)))
            progress(stretch.length)
    except OSError as error:
        raise unwritable(output, error) from error
    # seen from the index, so that both folders may be moved together
    elsewhere = os.path.relpath(path.parent.resolve(), output.resolve())
    shape = (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash, tuple(shards), tokenizer.vocabulary)
    index = Index(*shape, tokens_folder=elsewhere)
    finish_folder(output, index)
    return index


def _check_tokens(path: Path, tokens: np.ndarray, documents: np.ndarray, tokenizer: TextTokenizer) -> None:
    inside = tokens[documents[0] : documents[-1]]
    low, high = int(inside.min()), int(inside.max())
    refuse_if(
        not 0 <= low <= high < tokenizer.vocab_size,
        f"{path} holds tokens {low} to {high}, tokenizer {tokenizer.folder} has {tokenizer.vocab_size}",
        "tokens of this tokenizer",
        "name the tokenizer that the set was made with",
    )
    last = tokens[documents[1:] - 1]
    refuse_if(
        bool(np.any(last != tokenizer.eos_id)),
        f"{int(np.count_nonzero(last != tokenizer.eos_id))} of {last.size} documents of a stretch of {path} do not end "
        f"with token {tokenizer.eos_id}, the end of a text",
        "documents that end with it",
        "name the tokenizer that the set was made with, or preprocess with --append-eod",
    )


def _stretch(path: Path, dtype: str, first: int, end: int) -> ArrayFile:
    """Return the entry of tokens [first, end) of a `.bin`, hashed. Raises `DataError` where it cannot be read."""
    item_bytes = np.dtype(dtype).itemsize
    offset, size = first * item_bytes, (end - first) * item_bytes
    try:
        digest = hash_file(path, offset, size)
    except OSError as error:
        raise unreadable(path, error) from error
    return ArrayFile(path.name, dtype, end - first, size, digest, offset=offset, is_stretch=True)


def _write_offsets(
    output: Path, number: int, documents: np.ndarray, sentences: np.ndarray | None
) -> tuple[ArrayFile, ArrayFile | None]:
    """Write the offsets of a shard's documents, and of the sentences in it. Raises `OSError`."""
    written = write_offsets(output, number, "documents", documents - documents[0], "none")
    if sentences is None:
        return written, None
    # both ends are documents' boundaries, and so are among the sentences
    low, high = np.searchsorted(sentences, (documents[0], documents[-1]))
    return written, write_offsets(output, number, "sentences", sentences[low : high + 1] - documents[0], "none")
