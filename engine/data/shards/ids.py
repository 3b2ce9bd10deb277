"""Ids of documents as they lie beside a shard: UTF-8 text, a JSON string a line, in the order of the documents.

A string and not the bare text, since an id may hold an end of line. A document without an id of its own is called after
its shard and its number there (`SHARD_HASH:ROW`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np


def id_line(text: str) -> bytes:
    """Return the line of one id."""
    return json.dumps(text, ensure_ascii=False).encode() + b"\n"


def to_array(lines: Iterable[bytes]) -> np.ndarray:
    """Return the lines of a shard's ids as an array to be written, uint8."""
    return np.frombuffer(b"".join(lines), np.uint8)


def from_array(array: np.ndarray) -> list[str]:
    """Return the ids in an array. Raises `ValueError` where it is none of `to_array`."""
    found = json.loads(b"[" + b",".join(array.tobytes().splitlines()) + b"]")
    if not all(isinstance(item, str) for item in found):
        raise ValueError("an id is no text")
    return found


def default_id(shard: str, document: int) -> str:
    """Return the id of a document without one of its own, from its shard's content hash and its number in the shard."""
    return f"{shard}:{document}"
