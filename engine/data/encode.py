"""Chunks of raw documents -> token ids, in one process or many, in the order of the chunks.

Invariant: what comes out does not depend on the number of workers. Only a few chunks per worker are under way at
once, so memory does not grow with the corpus.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from engine.data.sentences import sentence_starts, sentences_in_tokens
from engine.data.sources import Chunk, parse
from engine.data.tokenizer import TextTokenizer, load_tokenizer
from engine.errors import EnvironmentProblem

_CHUNKS_PER_WORKER = 3


@dataclass(frozen=True)
class Encoded:
    """Documents of a chunk that have tokens: ids with the end-of-text, held out or not, bytes of their text."""

    ids: list[np.ndarray]
    sentences: list[np.ndarray | None]
    """First tokens of each document's sentences, where they were asked for."""
    held_out: list[bool]
    text_bytes: list[int]
    empty_documents: int
    source: str
    read_bytes: int


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens."""

    text_key: str
    validation_fraction: float
    sentences: str | None = None
    """Language whose rules find the sentences; None finds none."""


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: TextTokenizer, options: EncodeOptions, workers: int
) -> Iterator[Encoded]:
    """The chunks encoded, in their order.

    Raises:
        DataError: from the sources, or a document that is not what it should be.
        EnvironmentProblem: a worker process died.
    """
    if workers == 1:
        yield from (encode(chunk, tokenizer, options) for chunk in chunks)
        return
    # spawned, not forked: the tokenizer's own threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk, tokenizer.folder, options))
            if len(waiting) >= _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a worker process died while tokenising, perhaps for lack of memory",
            remedy="start again with fewer --workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode(chunk: Chunk, tokenizer: TextTokenizer, options: EncodeOptions) -> Encoded:
    """One chunk encoded in this process. Raises `DataError`."""
    texts = parse(chunk, options.text_key)
    kept = [item for item in zip(texts, *_tokens(texts, tokenizer, options.sentences), strict=True) if item[1].size]
    contents = [text.encode() for text, _, _ in kept]
    return Encoded(
        ids=[np.append(ids, tokenizer.eos_id) for _, ids, _ in kept],
        sentences=[sentences for _, _, sentences in kept],
        held_out=[is_held_out(content, options.validation_fraction) for content in contents],
        text_bytes=[len(content) for content in contents],
        empty_documents=len(texts) - len(kept),
        source=chunk.source,
        read_bytes=chunk.read_bytes,
    )


def _tokens(
    texts: list[str], tokenizer: TextTokenizer, language: str | None
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Ids of each text, and the first tokens of its sentences where a language is named."""
    if language is None:
        return tokenizer.encode(texts), [None] * len(texts)
    encoded = tokenizer.encode_with_starts(texts)
    sentences: list[np.ndarray | None] = [
        sentences_in_tokens(sentence_starts(text, language), starts)
        for text, (_, starts) in zip(texts, encoded, strict=True)
    ]
    return [ids for ids, _ in encoded], sentences


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: a function of its text, so duplicates stay together."""
    return xxhash.xxh3_64_intdigest(text) < int(fraction * 2**64)


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker: the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers


def _encode_in_worker(chunk: Chunk, folder: Path, options: EncodeOptions) -> Encoded:
    return encode(chunk, _tokenizer_of_worker(folder), options)


@lru_cache(maxsize=1)
def _tokenizer_of_worker(folder: Path) -> TextTokenizer:
    """A worker lives for one corpus, so it loads its tokenizer once."""
    return load_tokenizer(folder)
