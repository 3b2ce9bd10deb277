"""Checkpoints made of whole weights from elsewhere, in one process that holds all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from engine.checkpoint.folder import Owner, acquire, partial_path
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.mismatch import check_tensors
from engine.checkpoint.staging import HostBuffer, stage_shards
from engine.checkpoint.stores import StageTable, build_manifest, commit, prepare, write_staged
from engine.checkpoint.writers import Writer
from engine.config.resolve import Layout
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard, Placement


def write_checkpoint(
    folder: Path, state: CheckpointState, specs: Iterable[ParameterSpec], weights: Mapping[str, torch.Tensor]
) -> Path:
    """Write a checkpoint of weights alone into a folder `checkpoints/`; return its path.

    Raises:
        CheckpointError: the weights are not those of `specs`; every name and shape that differs is told.
    """
    known = list(specs)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_tensors(found, {spec.name: spec.stored_shape for spec in known}, "the source")
    shards, placements = [], []
    for spec in known:
        whole = ParameterSpec(spec.name, spec.stored_shape)
        shards.append(ParameterShard(whole, 0, weights[spec.name].detach().float().contiguous().view(-1)))
        # one stage, and one data rank whose range is all of it: the layout of a single process
        placements.append(Placement(whole, (0,), 0, math.prod(whole.shape)))
    # `commit` asks for an owner; there is no scheduler here.
    owner = Owner("convert", 0)
    acquire(folder, owner)
    staged = stage_shards(shards, placements, Writer(0, 0, 0), 1, HostBuffer())
    partial = partial_path(folder, state.step, owner)
    prepare(partial, [staged.num_bytes])
    written = write_staged(staged, partial, state.step)
    table = StageTable(placements, {})
    return commit(partial, build_manifest(state, Layout(1, 1, 1, 1), [table], [written], owner))
