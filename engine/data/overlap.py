"""Held-out documents that stand in training data, too: found by hashes of their tokens, whatever the shards."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

from engine.data.shards.dataset import Shard, TokenDataset

_MULTIPLIERS = tuple(np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def shared_documents(validation: TokenDataset, training: Iterable[TokenDataset]) -> int:
    """Return the number of different documents of a held-out set whose tokens are those of a training document.

    Reads every document once. Raises `DataError` where a shard is damaged.
    """
    wanted: dict[int, set[bytes]] = {}
    for number in range(validation.num_shards):
        shard = validation.shard(number)
        for document, key in enumerate(_keys(shard).tolist()):
            wanted.setdefault(key, set()).add(_digest(shard, document))
    keys = np.array(sorted(wanted), np.uint64)
    found: set[bytes] = set()
    for dataset in training:
        for number in range(dataset.num_shards):
            shard = dataset.shard(number)
            # The cheap key leaves few documents that have to be hashed whole.
            for document in np.flatnonzero(np.isin(own := _keys(shard), keys)).tolist():
                digest = _digest(shard, document)
                if digest in wanted[int(own[document])]:
                    found.add(digest)
    return len(found)


def _keys(shard: Shard) -> np.ndarray:
    """Return a number per document, (documents,) uint64, equal for equal documents: of its length and three tokens."""
    starts, ends = shard.documents[:-1], shard.documents[1:]
    lengths = (ends - starts).astype(np.uint64)
    keys = lengths.copy()
    if not len(shard.tokens):
        return keys
    last = len(shard.tokens) - 1
    # An empty document's places may lie behind the end: it is of no interest, but must not raise.
    places = (starts, starts + (ends - starts) // 2, ends - 2)
    for multiplier, place in zip(_MULTIPLIERS, places, strict=True):
        # The place before the last token, which is the end of text, but never before the document's first one.
        token = shard.tokens[np.clip(np.maximum(place, starts), 0, last)].astype(np.uint64)
        keys = (keys ^ token) * multiplier  # modulo 2^64
    return keys


def _digest(shard: Shard, document: int) -> bytes:
    start, end = shard.documents[document : document + 2].tolist()
    # In one type, since a set of a larger vocabulary stores its tokens in four bytes.
    return xxhash.xxh3_128_digest(shard.tokens[start:end].astype("<u4").tobytes())
