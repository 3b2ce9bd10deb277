"""A checkpoint of ours, written from a stream of parameters: one file per shard of about equal size.

The files are those of a pipeline with as many stages as there are shards, in one data and one tensor rank; parameters
keep their real specifications, so that any layout loads them as it loads a run's checkpoint. A file that is done is
noted with its hash; a conversion that was killed goes on behind the last such file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.container import Entry, FileRecord, write_stream
from engine.checkpoint.folder import Owner, acquire, partial_path
from engine.checkpoint.interchange.sinks.journal import JOURNAL, Journal
from engine.checkpoint.manifest import WEIGHT, CheckpointState, key_of, moment_state
from engine.checkpoint.stores import StageTable, Written, build_manifest, commit, prepare
from engine.checkpoint.writers import Writer, stored_numel
from engine.config.resolve import Layout
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import Placement

OWNER = Owner("convert", 0)
"""Owner in the commit of a converted checkpoint: there is no scheduler behind it."""
Values = Callable[[ParameterSpec, str], Iterable[torch.Tensor]]
"""Function from a parameter and a state of it (`manifest.WEIGHT`, or a moment's name) to its stored rows in order, in
blocks of fp32."""
Moments = Callable[[str], tuple[str, ...]]
"""Function from a parameter's name to its moments."""


def no_moments(name: str) -> tuple[str, ...]:
    """Return no moments: weights alone are written."""
    return ()


def write_checkpoint(
    folder: Path,
    state: CheckpointState,
    specs: Iterable[ParameterSpec],
    values: Values,
    shard_bytes: int,
    moments: Moments = no_moments,
    identity: str = "",
) -> Path:
    """Write a checkpoint into a folder `checkpoints/`; return its path.

    With an `identity`, a hash of what makes two conversions write the same files, one that was killed goes on.

    Raises:
        CheckpointError: the file system refuses or is full.
        PalimpsestError: what `values` raises.
    """
    shards = _shards(list(specs), shard_bytes, moments)
    partial = partial_path(folder, state.step, OWNER)
    kept = folder.with_name(f".{folder.name}.before")
    if partial.is_dir() and not kept.exists():
        partial.rename(kept)  # out of the way of what clears folders that are half done
    acquire(folder, OWNER)
    prepare(partial, [_num_bytes(shard, moments) for shard in shards])
    journal = Journal.taken_over(kept, partial, identity)
    # A file of frozen parameters alone says nothing of moments where others have some.
    nothing = None if any(_named(shard, moments) for shard in shards) else ()
    tables, reports = [], []
    for stage, shard in enumerate(shards):
        states = {spec.name: (WEIGHT, *map(moment_state, moments(spec.name))) for spec in shard}
        record = journal.done.get(Writer(stage, 0, 0).file_name)
        if record is None:
            record = _write(partial, Writer(stage, 0, 0), state.step, shard, states, values)
            journal.note(record)
        reports.append(Written(record, _named(shard, moments) or nothing))
        placements = [Placement(spec, (stage,), 0, spec.local_numel(1), moments(spec.name)) for spec in shard]
        tables.append(StageTable(placements, {}))
    (partial / JOURNAL).unlink(missing_ok=True)
    return commit(partial, build_manifest(state, Layout(len(shards), 1, 1, 1), tables, reports, OWNER))


def _write(
    partial: Path,
    writer: Writer,
    step: int,
    shard: list[ParameterSpec],
    states: dict[str, tuple[str, ...]],
    values: Values,
) -> FileRecord:
    """Write one file: its parameters in order, the states of each one after the other."""
    pairs = [(spec, state) for spec in shard for state in states[spec.name]]
    entries = [Entry(key_of(state, spec.name), 0, stored_numel(spec), 0, 1) for spec, state in pairs]
    contents = (_flat(values(spec, state.removeprefix("optim."))) for spec, state in pairs)
    return write_stream(partial / writer.file_name, entries, {**writer._asdict(), "step": step}, contents)


def _named(shard: list[ParameterSpec], moments: Moments) -> tuple[str, ...]:
    return tuple(dict.fromkeys(moment for spec in shard for moment in moments(spec.name)))


def _flat(blocks: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    return (block.float().contiguous().view(-1).numpy() for block in blocks)


def _num_bytes(shard: list[ParameterSpec], moments: Moments) -> int:
    return sum(4 * stored_numel(spec) * (1 + len(moments(spec.name))) for spec in shard)


def _shards(specs: list[ParameterSpec], shard_bytes: int, moments: Moments) -> list[list[ParameterSpec]]:
    """Return the parameters of each file: in the model's order, as many as fit."""
    shards: list[list[ParameterSpec]] = [[]]
    held = 0
    for spec in specs:
        size = _num_bytes([spec], moments)
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += size
    # entries of a file are in order of name, as a run writes them
    return [sorted(shard, key=lambda spec: spec.name) for shard in shards]
