"""A torch distributed checkpoint (DCP), written from a stream: files alone, in one process, over no communicator.

torch plans the files from tensors on the device "meta" and asks for each tensor when it writes it, so one parameter is
in memory at a time.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from engine.checkpoint.interchange.convert import Progress, no_progress
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.source_model import SourceWeights
from engine.checkpoint.manifest import WEIGHT, key_of, moment_state
from engine.errors import CheckpointError


def write_dcp(
    opened: SourceWeights,
    target: ModelMap,
    output: Path,
    with_moments: bool = False,
    progress: Progress = no_progress,
) -> int:
    """Write whole tensors under the names of `target`; return their number.

    `torch.distributed.checkpoint.load` reads them into any sharding, by the keys `model.<tensor>` and
    `optim.<moment>.<tensor>`.

    Raises:
        CheckpointError: the source is damaged, or the file system refuses.
    """
    planned: dict[str, tuple[str, str, str]] = {}
    for name, one in target.parameters.items():
        states = (WEIGHT, *(opened.moments_of(name) if with_moments else ()))
        for state in states:
            for tensor in one.tensors:
                planned[key_of(WEIGHT if state == WEIGHT else moment_state(state), tensor)] = (name, state, tensor)

    def read(key: str) -> torch.Tensor:
        name, state, tensor = planned[key]
        values = target.parameters[name].theirs(tensor, opened.read(name, state=state)).contiguous()
        progress(values.nbytes)
        return values

    empty = {}
    for key, (name, _, tensor) in planned.items():
        empty[key] = torch.empty(target.parameters[name].tensors[tensor], device="meta")
    try:
        # one process is meant, of which torch warns
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save(empty, storage_writer=FileSystemWriter(output), planner=_Planner(read), no_dist=True)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}", remedy="name another --output") from error
    return len(planned)


class _Planner(DefaultSavePlanner):
    """A planner that reads a tensor when it is written."""

    def __init__(self, read) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._read(index.fqn)
