"""A checkpoint of ours as torch's distributed checkpoint (DCP): files alone, in one process, over no communicator.

The whole state is in this process's memory at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from engine.checkpoint.compare import Opened
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError


def write_dcp(path: Location, output: Path) -> int:
    """Write a checkpoint as torch's distributed checkpoint, with the same names and whole tensors; return their number.

    `torch.distributed.checkpoint.load` reads it into any sharding: `{"model.<parameter>": tensor, ...}`.

    Raises:
        CheckpointError: the checkpoint is damaged, or the file system refuses.
    """
    opened, state = Opened(path), {}
    for name in opened.manifest.specs:
        state |= opened.read(name)
    try:
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as is meant: one process
        state_dict_saver.save(state, storage_writer=FileSystemWriter(output), no_dist=True)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}", remedy="name another --output") from error
    return len(state)
