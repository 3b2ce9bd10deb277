"""Files passed from one node's memory to another's, between two ranks, straight from page to page.

Both sides map their file, so that no buffer is taken beside it. Room is taken before anything is sent: a page that
a full memory cannot give would end the process, and no error could be told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.container import FileRecord, disk_errors, file_digest
from engine.errors import CheckpointError
from engine.parallel import collectives
from engine.parallel.collectives import Work
from engine.parallel.groups import Group

CHUNK_BYTES = 64 << 20
"""Bytes sent as one message."""


def take_room(path: Path, num_bytes: int) -> None:
    """Make a file with all its pages allocated. Raises `CheckpointError` where memory has not that many."""
    with disk_errors(path), path.open("wb") as file:
        # Without it a full tmpfs shows as SIGBUS at the first touch of a page. fallocate refuses 0 bytes.
        os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))


def start_sending(path: Path, group: Group, position: int) -> list[Work]:
    """Start to send a file to the rank at `position`; it may be renamed meanwhile, but not written to."""
    mapped = np.memmap(path, dtype=np.uint8, mode="c")  # a tensor wants memory that could be written to
    return [collectives.send(chunk, group, position) for chunk in _chunks(torch.from_numpy(mapped))]


def start_receiving(path: Path, num_bytes: int, group: Group, position: int) -> list[Work]:
    """Start to fill a file that `take_room` has made, cut to `num_bytes`, with what the rank at `position` sends."""
    with disk_errors(path):
        # Room may have been taken for the longest possible header.
        os.truncate(path, num_bytes)
        mapped = np.memmap(path, dtype=np.uint8, mode="r+")
    return [collectives.start_receiving(chunk, group, position) for chunk in _chunks(torch.from_numpy(mapped))]


def accept(path: Path, record: FileRecord) -> None:
    """Rename a received file to its final name, if its bytes are those that were sent.

    Raises:
        CheckpointError: it is another one.
    """
    with disk_errors(path):
        found = file_digest(path)
        if found != record.xxh3:
            raise CheckpointError(
                f"{record.name} came from another node with other bytes (xxh3 {found}, sent as {record.xxh3})",
                "what was sent",
                "look at the network and the memory of both nodes",
            )
        path.replace(path.with_name(record.name))


def _chunks(values: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(values.split(CHUNK_BYTES))
