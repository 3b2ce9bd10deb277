"""A chunk of a corpus as token ids in a file of its own: what a preparation has finished, and finds again after a kill.

Invariant: a part file begins with the XXH3-128 of the rest, and is moved into place whole; one that does not verify
counts as not there. Arrays are of documents in order, those without a token left out.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import xxhash

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Documents:
    """What is known of n documents without their tokens."""

    lengths: np.ndarray
    """(n,) int64 tokens, ends of text included."""
    hashes: np.ndarray
    """(n, 2) uint64: XXH3-128 of the text."""
    held_out: np.ndarray
    """(n,) bool"""
    text_bytes: np.ndarray
    """(n,) int64"""
    unknown: np.ndarray
    """(n,) int64 unknown tokens."""
    sentences: np.ndarray
    """(n,) int64; 0 where none were asked for."""
    signatures: np.ndarray
    """(n, permutations) uint32, or (n, 0) where none were asked for."""
    empty: np.ndarray
    """() int64 documents without a token."""


@dataclass(frozen=True)
class Part:
    """The documents with their tokens."""

    documents: Documents
    tokens: np.ndarray
    """Of all documents, in the type in which they are written."""
    sentence_starts: np.ndarray
    """int64 first tokens of all sentences within their documents."""


def save(path: Path, part: Part) -> None:
    """Puts the part in place. Raises `OSError`."""
    arrays = {field.name: getattr(part.documents, field.name) for field in fields(Documents)}
    content = io.BytesIO()
    np.savez(content, tokens=part.tokens, sentence_starts=part.sentence_starts, **arrays)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(xxhash.xxh3_128_digest(content.getbuffer()))
            file.write(content.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Part | None:
    """The part, verified; None where it is not there or is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = memoryview(content)[_DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(body) != content[:_DIGEST_BYTES]:
        return None
    with np.load(io.BytesIO(body)) as arrays:
        documents = Documents(**{field.name: arrays[field.name] for field in fields(Documents)})
        return Part(documents, arrays["tokens"], arrays["sentence_starts"])


def joined(parts: list[Documents]) -> Documents:
    """All documents of some parts, in order; one part or more."""
    arrays = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Documents)}
    empty = np.sum(arrays.pop("empty"))
    return Documents(**{name: np.concatenate(items) for name, items in arrays.items()}, empty=empty)
