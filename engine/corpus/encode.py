"""Encoding of a chunk of raw documents as token ids and facts about the documents: a function of the chunk alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from engine.corpus.encoded_chunks import Documents, EncodedChunk, save
from engine.corpus.minhash import band_keys
from engine.corpus.sentences import sentence_starts, sentences_in_tokens
from engine.corpus.sources.chunks import NO_KEYS, Keys, TextChunk, parse
from engine.corpus.spread import ChunkKey, stored_order
from engine.data.shards.ids import id_line
from engine.data.shards.index import token_dtype
from engine.data.shards.writer import unwritable
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer

_CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class EncodeOptions:
    """Options that decide how documents become tokens."""

    text_key: str
    validation_fraction: float
    sentences: str | None = None
    """Language whose rules find the sentences; None finds none."""
    similarity: float | None = None
    """Similarity of near duplicates; None looks for none."""
    keys: Keys = NO_KEYS
    """Keys of what is kept beside the text."""


@dataclass(frozen=True)
class Task:
    """One chunk to encode, and the file to put it into."""

    chunk: TextChunk
    tokenizer: Path
    tokenizer_hash: str
    options: EncodeOptions
    path: Path
    key: ChunkKey
    file_number: int
    """Number of the chunk among all, which its result carries, since results come in no order."""


@dataclass(frozen=True)
class Encoded:
    """Facts about an encoded chunk that is on disk now."""

    file_number: int
    documents: Documents
    bands: np.ndarray
    read_bytes: int


def encode_to_file(task: Task) -> Encoded:
    """Encode a chunk and save it. Raises `DataError`: from the sources, or no room."""
    part = encode(task.chunk, _tokenizer(task.tokenizer, task.tokenizer_hash), task.options)
    try:
        save(task.path, part, stored_order(task.key, part.documents.is_validation))
    except OSError as error:
        raise unwritable(task.path.parent, error) from error
    return Encoded(task.file_number, part.documents, part.bands, task.chunk.read_bytes)


def encode(chunk: TextChunk, tokenizer: TextTokenizer, options: EncodeOptions) -> EncodedChunk:
    """Encode one chunk; documents without a token are left out and counted. Raises `DataError`."""
    parsed = parse(chunk, options.text_key, options.keys)
    texts = [document.text for document in parsed]
    found, sentences_of, unspelt = _tokens(texts, tokenizer, options.sentences)
    is_kept = np.array([item.size > 0 for item in found], bool)
    kept = [item for item in zip(texts, found, sentences_of, strict=True) if item[1].size]
    with_tokens = [document for document, item in zip(parsed, found, strict=True) if item.size]
    named = with_tokens if options.keys.id is not None else []
    names = tuple(id_line(document.id) for document in named)
    weighed = with_tokens if options.keys.weight is not None else []
    contents = [text.encode() for text, _, _ in kept]
    # xxHash's canonical digests are big-endian on every machine
    digests, name_digests = (b"".join(map(xxhash.xxh3_128_digest, items)) for items in (contents, names))
    ids = [ids for _, ids, _ in kept]
    sentences = [starts for _, _, starts in kept if starts is not None]
    documents = Documents(
        # and the end of text
        lengths=np.array([item.size + 1 for item in ids], np.int64),
        hashes=np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2),
        is_validation=np.array(
            [belongs_to_validation(content, options.validation_fraction) for content in contents], bool
        ),
        text_bytes=np.array([len(content) for content in contents], np.int64),
        unknown=np.array([_unknown(item, tokenizer.unknown_id) for item in ids], np.int64),
        sentences=np.array([item.size for item in sentences] if sentences else [0] * len(ids), np.int64),
        unspelt=unspelt[is_kept],
        id_bytes=np.array([len(name) for name in names] if names else [0] * len(ids), np.int64),
        id_hashes=np.frombuffer(name_digests, ">u8").astype(np.uint64).reshape(-1, 2),
        weights=np.array([document.weight for document in weighed], np.float64),
        empty=np.array(len(texts) - len(kept)),
        empty_unspelt=unspelt[~is_kept].sum(),
    )
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    end = np.array([tokenizer.eos_id], dtype)
    # `end[:0]` gives the type where no document is left; an end of text stands behind each document
    tokens = np.concatenate([end[:0], *(piece for item in ids for piece in (item.astype(dtype), end))])
    starts = np.concatenate([np.empty(0, np.int64), *sentences])
    bands = np.empty((len(ids), 0), np.uint64) if options.similarity is None else band_keys(ids, options.similarity)
    return EncodedChunk(documents, bands, tokens, starts, names, tuple(document.line for document in named))


def belongs_to_validation(text: bytes, fraction: float) -> bool:
    """Return True if a document belongs to the validation side: a function of its text, so duplicates stay together."""
    # the hash of a text is uniform over [0, 2^64)
    return xxhash.xxh3_64_intdigest(text) < int(fraction * 2**64)


def _tokens(
    texts: list[str], tokenizer: TextTokenizer, language: str | None
) -> tuple[list[np.ndarray], list[np.ndarray | None], np.ndarray]:
    """Return the ids of each text, the first tokens of its sentences where a language is named, and the bytes of each
    text (n,) that no token spells."""
    ids: list[np.ndarray] = []
    sentences: list[np.ndarray | None] = []
    unspelt = [np.empty(0, np.int64)]
    for some in _batches(texts):
        if language is None:
            ids += tokenizer.encode(some)
            sentences += [None] * len(some)
        else:
            for text, (tokens, starts) in zip(some, tokenizer.encode_with_starts(some), strict=True):
                ids.append(tokens)
                sentences.append(sentences_in_tokens(sentence_starts(text, language), starts))
        unspelt.append(tokenizer.unspelt_bytes(some, ids[len(ids) - len(some) :]))
    return ids, sentences, np.concatenate(unspelt)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in order, some at once: the tokenizer's own results take some 200 bytes per token."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


def _unknown(ids: np.ndarray, unknown_id: int | None) -> int:
    return 0 if unknown_id is None else int(np.count_nonzero(ids == unknown_id))


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, tokenizer_hash: str) -> TextTokenizer:
    """Return the tokenizer, loaded once per process; the hash tells a later one in the same folder from it."""
    loaded = load_tokenizer(folder)
    assert loaded.hash == tokenizer_hash, "the tokenizer changed while it was used"
    return loaded
