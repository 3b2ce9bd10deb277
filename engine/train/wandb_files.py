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
from typing import BinaryIO

BLOCK_BYTES = 32768
HEADER_BYTES = 7
"""Bytes of the header of the file (":W&B", a magic number, a version), and of the header of each fragment."""
# CRC-32, length, kind: 4 + 2 + 1 bytes, little endian
_FRAGMENT = struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4
"""Kinds of fragments; those between have another number."""


def cut(folder: Path, run_id: str, first: int) -> int:
    """Cut a run's files before their first row of step `first` or a later one; return the last step that stays, or 0.

    The rows of a file ascend in step, so that few of its blocks are read, however long the run is.
    """
    last = 0
    # The folder of a start in the same second as another one ends in -1, -2, ...
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb")):
        for start, step in rows(path, _last_block_before(path, first)):
            if step >= first:
                # At the start of a record, never inside: wandb reads what is before it.
                os.truncate(path, start)
                break
            last = max(last, step)
    return last


def rows(path: Path, block: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (position in the file, step) of each row of the history that starts in `block` or behind it."""
    from wandb.proto import wandb_internal_pb2

    for start, content in _records(path, block):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(content)
        if record.HasField("history"):
            yield start, record.history.step.num


def _last_block_before(path: Path, first: int) -> int:
    """Return the last block from which on the next row is of a step below `first`; block 0 where there is none."""
    # Invariant: `low` is 0 or such a block, and from `high` on every row is of step `first` or later, or there is none.
    low, high = 0, -(-path.stat().st_size // BLOCK_BYTES)
    while high - low > 1:
        middle = (low + high) // 2
        row = next(rows(path, middle), None)
        if row is None or row[1] >= first:
            high = middle
        else:
            low = middle
    return low


def _records(path: Path, block: int) -> Iterator[tuple[int, bytes]]:
    """Yield (position, content) of each whole record that starts in `block` or behind it.

    A block begins with a fragment, which may be a later one of a record that started before.
    """
    start, content = -1, b""
    with path.open("rb") as file:
        for at, kind, part in _fragments(file, block):
            if kind in (FULL, FIRST):
                start, content = at, b""
            content += part
            # start < 0: the rest of a record that began in a block that is not read
            if kind in (FULL, LAST) and start >= 0:
                yield start, content


def _fragments(file: BinaryIO, block: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (position, kind, content) of each whole fragment from a block on."""
    file.seek(block * BLOCK_BYTES)
    while data := file.read(BLOCK_BYTES):
        # Only the file's first block begins with the file's header.
        at = 0 if block else HEADER_BYTES
        while at + HEADER_BYTES <= len(data):  # no fragment begins nearer to the end of a block
            _, length, kind = _FRAGMENT.unpack_from(data, at)
            end = at + HEADER_BYTES + length
            # Zeros behind the end (a file system may leave some), or a fragment cut off by a kill: the log ends here.
            if not kind or end > len(data):
                return
            yield block * BLOCK_BYTES + at, kind, data[at + HEADER_BYTES : end]
            at = end
        block += 1
