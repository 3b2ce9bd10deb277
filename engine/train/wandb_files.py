"""wandb's offline files over restarts: each step once, although a run that is taken up again repeats some.

Every start writes a file of its own, `wandb/offline-run-TIME-ID/run-ID.wandb`, a log of records in LevelDB's format
(blocks of 32 KiB; a record is one or more fragments of checksum, length, kind and content), which `wandb sync` reads as
one run. A log that ends early is what a killed process leaves, and wandb reads it, too: so what lies beyond the
step that a run resumes at is cut off.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 32768
HEADER_BYTES = 7
"""Of the file, and of each fragment."""
_FRAGMENT = struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4
"""Kinds of fragments; those between have another number."""


def cut(folder: Path, run_id: str, resumed_at: int) -> set[int]:
    """Cuts a run's files before their first row beyond the step `resumed_at`; the steps of the rows that stay."""
    kept: set[int] = set()
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        for start, step in rows(path):
            if step > resumed_at:
                os.truncate(path, start)
                break
            kept.add(step)
    return kept


def rows(path: Path) -> Iterator[tuple[int, int]]:
    """(position in the file, step) of each row of the history."""
    from wandb.proto import wandb_internal_pb2

    for start, content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(content)
        if record.HasField("history"):
            yield start, record.history.step.num


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(position, content) of each whole record."""
    at, start, content = HEADER_BYTES, 0, b""
    while at + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER_BYTES:
            at += left  # no fragment begins so near the end of a block
            continue
        _, length, kind = _FRAGMENT.unpack_from(data, at)
        end = at + HEADER_BYTES + length
        if not kind or end > len(data):
            return
        if kind in (FULL, FIRST):
            start, content = at, b""
        content += data[at + HEADER_BYTES : end]
        at = end
        if kind in (FULL, LAST):
            yield start, content
