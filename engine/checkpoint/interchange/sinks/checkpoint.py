"""A checkpoint of ours, weights alone, written from a stream of parameters: one file per shard of about equal size.

The files are those of a pipeline with as many stages as there are shards, in one data and one tensor rank; parameters
keep their real specifications, so that any layout loads them as it loads a run's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.container import Entry, write_stream
from engine.checkpoint.folder import Owner, acquire, partial_path
from engine.checkpoint.manifest import WEIGHT, CheckpointState, key_of
from engine.checkpoint.stores import StageTable, Written, build_manifest, commit, prepare
from engine.checkpoint.writers import Writer, stored_numel
from engine.config.resolve import Layout
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import Placement

OWNER = Owner("convert", 0)
"""Owner in the commit of a converted checkpoint: there is no scheduler behind it."""
Values = Callable[[ParameterSpec], Iterable[torch.Tensor]]
"""Function from a parameter to its stored rows in order, in blocks of fp32."""


def write_checkpoint(
    folder: Path, state: CheckpointState, specs: Iterable[ParameterSpec], values: Values, shard_bytes: int
) -> Path:
    """Write a checkpoint of weights alone into a folder `checkpoints/`; return its path.

    Raises:
        CheckpointError: the file system refuses or is full.
        PalimpsestError: what `values` raises.
    """
    shards = _shards(list(specs), shard_bytes)
    acquire(folder, OWNER)
    partial = partial_path(folder, state.step, OWNER)
    prepare(partial, [4 * sum(map(stored_numel, shard)) for shard in shards])
    tables, reports = [], []
    for stage, shard in enumerate(shards):
        writer = Writer(stage, 0, 0)
        entries = [Entry(key_of(WEIGHT, spec.name), 0, stored_numel(spec), 0, 1) for spec in shard]
        about = {**writer._asdict(), "step": state.step}
        record = write_stream(partial / writer.file_name, entries, about, (_flat(values(spec)) for spec in shard))
        reports.append(Written(record, ()))
        placements = [Placement(spec, (stage,), 0, spec.local_numel(1), ()) for spec in shard]
        tables.append(StageTable(placements, {}))
    return commit(partial, build_manifest(state, Layout(len(shards), 1, 1, 1), tables, reports, OWNER))


def _flat(blocks: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    return (block.float().contiguous().view(-1).numpy() for block in blocks)


def _shards(specs: list[ParameterSpec], shard_bytes: int) -> list[list[ParameterSpec]]:
    """Return the parameters of each file: in the model's order, as many as fit."""
    shards: list[list[ParameterSpec]] = [[]]
    held = 0
    for spec in specs:
        size = 4 * stored_numel(spec)
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += size
    # entries of a file are in order of name, as a run writes them
    return [sorted(shard, key=lambda spec: spec.name) for shard in shards]
