"""A torch distributed checkpoint (DCP), written from a stream: files alone, in one process, over no communicator.

torch plans the files from tensors on the device "meta" and asks for each tensor when it writes it. Its writer keeps all
tensors of a file until the file is closed (for the format safetensors, which is not written here), so each one's memory
is given back once the next one is asked for: one parameter is in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from engine.checkpoint.interchange.sinks.outgoing import Outgoing, own_memory
from engine.checkpoint.manifest import WEIGHT, key_of, moment_state
from engine.errors import CheckpointError


def write_dcp(outgoing: Outgoing, output: Path) -> int:
    """Write whole tensors; return their number.

    `torch.distributed.checkpoint.load` reads them into any sharding, by the keys `model.<tensor>` and
    `optim.<moment>.<tensor>`.

    Raises:
        CheckpointError: the source is damaged, or the file system refuses.
    """
    opened, parameters = outgoing.opened, outgoing.target.parameters
    planned: dict[str, tuple[str, str, str]] = {}
    for name, one in parameters.items():
        for state in (WEIGHT, *(opened.moments_of(name) if outgoing.with_moments else ())):
            for tensor in one.tensors:
                planned[key_of(WEIGHT if state == WEIGHT else moment_state(state), tensor)] = (name, state, tensor)

    def read(key: str) -> torch.Tensor:
        name, state, tensor = planned[key]
        values = own_memory(parameters[name].theirs(tensor, opened.read(name, state=state)))
        outgoing.progress(values.nbytes)
        return values

    empty = {}
    for key, (name, _, tensor) in planned.items():
        empty[key] = torch.empty(parameters[name].tensors[tensor], device="meta")
    try:
        # one process is meant, of which torch warns
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save(empty, storage_writer=FileSystemWriter(output), planner=_Planner(read), no_dist=True)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}", remedy="name another --output") from error
    return len(planned)


class _Planner(DefaultSavePlanner):
    """A planner that reads a tensor when it is written, and frees the one before."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._read = read
        self._written: torch.Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        if self._written is not None:
            # The writer still refers to it, and has written it: it asks for tensors one after the other.
            self._written.untyped_storage().resize_(0)
            self._written = None
        self._written = self._read(index.fqn)
        return self._written
