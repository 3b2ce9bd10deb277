"""Loading into any layout: each rank reads just the byte ranges that its live shards need, with no gather.

Which file holds what follows from the manifest's placements; each file's own header has to agree before a byte of
it is used. Invariant: after a load each element of a shard is the one saved, or 0 where it is padding. Content
hashes are the business of `engine.checkpoint.verify`, once, before a checkpoint is chosen.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import manifest_json
from engine.checkpoint.container import ITEM_BYTES, Container, damaged
from engine.checkpoint.geometry import Box, dims, flat_index, flat_span, strides
from engine.checkpoint.manifest import WEIGHT, CheckpointState, Manifest, key_of, match, moment_state
from engine.checkpoint.storage import Location
from engine.checkpoint.writers import Need, Transfer, Writer, stored_numel, transfers
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel import collectives
from engine.parallel.agreement import on_all
from engine.parallel.groups import Groups
from engine.parallel.sharding import ParameterSpec, Shape
from engine.parallel.state import ParameterShard, Placement

log = logger(__name__)


def open_checkpoint(path: Location) -> Manifest:
    """Return the manifest of a checkpoint, checked against itself and the sizes of its files.

    Raises:
        CheckpointError: it is absent, damaged or claims what cannot be.
    """
    manifest = manifest_json.read(path)
    manifest_json.check_sizes(manifest, path)
    return manifest


def read_state(path: Location) -> CheckpointState:
    """Return the part of a checkpoint that is not tensors; raises as `open_checkpoint`."""
    return open_checkpoint(path).state


def load(
    path: Path,
    groups: Groups,
    shards: list[ParameterShard],
    placements: list[Placement],
    spread: bool = False,
    zero_moments: Collection[str] = (),
) -> Manifest:
    """Fill every rank's live shards from a checkpoint of any layout. Collective over `groups.world`.

    `placements` are those of this rank's stage; together they must name the very parameters of the checkpoint.
    `spread`: its files are spread over several such folders, and `path` has those that this rank needs.
    `zero_moments` are set to zero where the checkpoint has none of that name. Moments of the checkpoint that no shard
    carries are left out, and logged.

    Raises:
        CheckpointError: the same on every rank.
    """
    own = [(placement.spec, placement.moments) for placement in placements]
    # Only along the pipeline: ranks that differ in any other coordinate hold the same parameters.
    everywhere = [one for stage in collectives.gather_objects(own, groups.pipe) for one in stage]

    def fill() -> Manifest:
        manifest = manifest_json.read(path) if spread else open_checkpoint(path)
        match(manifest, [spec for spec, _ in everywhere])
        load_shards(path, manifest, shards, groups.coordinates.tensor_rank, groups.layout.tensor, zero_moments)
        return manifest

    manifest = on_all(fill, groups.world, CheckpointError)
    if groups.world.position == 0:
        _tell_moments(path, manifest, {moment for _, moments in everywhere for moment in moments})
    return manifest


def _tell_moments(path: Path, manifest: Manifest, asked: set[str]) -> None:
    """Log the moments that only the checkpoint or only this run has."""
    if left_out := sorted(set(manifest.moments) - asked):
        log.warning("%s holds moments that this run does not keep: %s; they are left out", path, ", ".join(left_out))
    if zero := sorted(asked - set(manifest.moments)):
        log.warning("%s holds no %s of the parameters: it begins at zero", path, ", ".join(zero))


def files_needed(
    manifest: Manifest,
    shards: list[ParameterShard],
    tensor_rank: int,
    tensor_size: int,
    zero_moments: Collection[str] = (),
) -> set[str]:
    """Return the names of the files that `load_shards` will read.

    Raises:
        CheckpointError: as `load_shards`, where a parameter or moment is not in the checkpoint.
    """
    names = set()
    for shard in shards:
        _check_shard(manifest, shard, zero_moments)
        saved = manifest.placements[shard.spec.name]
        need = Need(shard.spec, shard.start, shard.length, tensor_rank, tensor_size)
        copies = transfers(need, saved, manifest.data_size, manifest.layout.tensor)
        names |= {copy.writer.file_name for copy in copies}
    return names


def load_shards(
    path: Location,
    manifest: Manifest,
    shards: list[ParameterShard],
    tensor_rank: int = 0,
    tensor_size: int = 1,
    zero_moments: Collection[str] = (),
) -> int:
    """Fill live shards, with those moments that they carry; return how many bytes were read.

    Padded rows become 0, and so do `zero_moments` that the checkpoint does not hold. `tensor_rank` of `tensor_size`
    says whose local part the shards are ranges of.

    Raises:
        CheckpointError: a parameter or moment is not in the checkpoint or has another shape, or a file is damaged.
    """
    files = Files(path, manifest)
    # All are checked before the first is filled: a mismatch leaves the live state as it was.
    for shard in shards:
        _check_shard(manifest, shard, zero_moments)
    return sum(fill_shard(shard, files, tensor_rank, tensor_size) for shard in shards)


def read_weights(path: Location, moment: str | None = None) -> dict[str, torch.Tensor]:
    """Return all fp32 weights by logical name in their stored shapes (no padding), in this process's memory.

    With `moment` these are the values kept under that name (an average of the weights); parameters that were frozen
    have none and keep their weights.

    Raises:
        CheckpointError: as `open_checkpoint` and `load_shards`, or the checkpoint holds no such moment.
    """
    manifest = open_checkpoint(path)
    if moment is not None:
        check_moment(manifest, moment, path)
    files = Files(path, manifest)
    files.check_all()  # every element is backed by bytes on the disk before memory is taken
    found = {}
    for name, spec in manifest.specs.items():
        whole, numel = ParameterSpec(name, spec.stored_shape), stored_numel(spec)
        held = moment if moment in manifest.placements[name].moments else None
        moments = {} if held is None else {held: torch.empty(numel, dtype=torch.float32)}
        shard = ParameterShard(whole, 0, torch.empty(numel, dtype=torch.float32), moments)
        fill_shard(shard, files)
        found[name] = (shard.weight if held is None else shard.moments[held]).view(whole.shape)
    return found


def check_moment(manifest: Manifest, moment: str, path: Location) -> None:
    """Raise `CheckpointError` where a checkpoint holds no moment of that name."""
    if moment not in manifest.moments:
        raise CheckpointError(
            f"{path} holds no {moment} of the weights",
            f"a checkpoint that was saved in a run stage which keeps {moment}; here are {list(manifest.moments)}",
            "use another checkpoint, or the trained weights",
        )


class Files:
    """The files of one checkpoint, each opened when it is first needed and compared with the manifest."""

    def __init__(self, path: Location, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._open: dict[str, Container] = {}

    def values(self, state: str, name: str, writer: Writer, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return `count` elements (all by default) of what a writer stored of a parameter: flat fp32, mapped if local;
        element 0 is the beginning of the writer's stored range."""
        file = self.file(writer.file_name)
        self._check(file, state, name, writer)
        return file.values(key_of(state, name), first, count)

    def file(self, name: str) -> Container:
        """Return the file of that name; raises `CheckpointError` where it is absent or not of its recorded size."""
        if name not in self._open:
            manifest_json.check_size(self.manifest.files[name], self.path / name)
            self._open[name] = Container(self.path / name)
        return self._open[name]

    def release(self) -> None:
        """Unmap the files; they stay open, and are mapped again where they are touched next."""
        for file in self._open.values():
            file.release()

    def check_all(self) -> None:
        """Raise `CheckpointError` unless every file holds exactly the shards that the placements ask of it."""
        for file_name in self.manifest.files:
            self.check_file(file_name)

    def check_file(self, file_name: str) -> None:
        """Raise `CheckpointError` unless a file holds exactly the shards that the placements ask of it."""
        file, writer = self.file(file_name), Writer.parse(file_name)
        assert writer is not None, "a manifest that was read has no other names"
        names = [name for name in self.manifest.placements if self.manifest.range_of(name, writer)[1]]
        keys = {key_of(state, name) for name in names for state in self.manifest.states_of(name)}
        odd = sorted(keys ^ file.entries.keys())
        if odd:
            raise damaged(file.path, f"its shards are not those of the manifest: {odd[:4]}")
        for name in names:
            for state in self.manifest.states_of(name):
                self._check(file, state, name, writer)

    def _check(self, file: Container, state: str, name: str, writer: Writer) -> None:
        entry = file.entries.get(key_of(state, name))
        split = self.manifest.placements[name].spec.sharding.dim is not None
        # A parameter that is not split is stored by tensor rank 0, as the only part of one.
        owner = [writer.tensor_rank, self.manifest.layout.tensor] if split else [0, 1]
        wanted = [*self.manifest.range_of(name, writer), *owner]
        if entry is None or entry.coordinates() != wanted:
            found = entry.coordinates() if entry else "nothing"
            raise damaged(file.path, f"{key_of(state, name)} is {found}, the manifest asks for {wanted}")


def fill_shard(shard: ParameterShard, files: Files, tensor_rank: int = 0, tensor_size: int = 1) -> int:
    """Fill one shard and its moments, of a parameter that the files hold; return the bytes read. Raises as
    `load_shards`."""
    saved = files.manifest.placements[shard.spec.name]
    need = Need(shard.spec, shard.start, shard.length, tensor_rank, tensor_size)
    copies = list(transfers(need, saved, files.manifest.data_size, files.manifest.layout.tensor))
    found = sum(copy.source.numel for copy in copies)
    # Every real element has to come from some file: what no copy covers would keep its initial value in silence.
    if found != need.real_length:
        raise damaged(files.path, f"{shard.spec.name}: {found} of {need.real_length} elements are in no file")
    targets = {WEIGHT: shard.weight} | {moment_state(name): values for name, values in shard.moments.items()}
    held = set(files.manifest.states_of(shard.spec.name))
    source_shape = dims(saved.spec.local_shape(files.manifest.layout.tensor))
    target_shape = dims(shard.spec.local_shape(tensor_size))
    with torch.no_grad():
        for state, target in targets.items():
            if state not in held:
                target.zero_()
                continue
            # padding rows of the vocabulary, which no file holds
            target[need.real_length :].zero_()
            for copy in copies:
                source = _source(copy, files, state, saved, source_shape)
                # the only copy: from mapped pages of the file into the live shard, on whatever device
                _window(target, copy.target, target_shape, shard.start).copy_(source)
    return found * ITEM_BYTES * len(targets.keys() & held)


def _source(copy: Transfer, files: Files, state: str, saved: Placement, shape: Shape) -> torch.Tensor:
    start, _ = files.manifest.range_of(saved.spec.name, copy.writer)
    # Reads the span from the box's first to its last element, with the gaps between its rows.
    first, last = flat_span(copy.source, shape)
    values = files.values(state, saved.spec.name, copy.writer, first - start, last - first + 1)
    return _window(torch.from_numpy(values), copy.source, shape, first)


def _window(flat: torch.Tensor, box: Box, shape: Shape, start: int) -> torch.Tensor:
    """Return the box of a local part of `shape` as a view of `flat`, which holds its flat range from `start` on."""
    # as_strided counts from the beginning of the storage, and `flat` may be a view into a larger buffer.
    offset = flat.storage_offset() + flat_index(box.start, shape) - start
    return flat.as_strided(box.size, strides(shape), offset)


def _check_shard(manifest: Manifest, shard: ParameterShard, zero_moments: Collection[str]) -> None:
    """Raise `CheckpointError` where a checkpoint does not hold a shard's parameter or a moment that it needs."""
    match_one = manifest.specs.get(shard.spec.name)
    if match_one is None:
        raise CheckpointError(
            f"the checkpoint does not hold {shard.spec.name}",
            remedy="use the model configuration that the checkpoint was saved with",
        )
    if match_one.stored_shape != shard.spec.stored_shape:
        # the manifest's own specs with this one exchanged, so that `match` reports this shape alone
        match(manifest, [*(s for n, s in manifest.specs.items() if n != shard.spec.name), shard.spec])
    held = [moment for moment in manifest.moments if moment in manifest.placements[shard.spec.name].moments]
    # Without any moments in a checkpoint of moments it was frozen: those that a later run stage keeps begin at zero.
    was_frozen = bool(manifest.moments) and not held
    absent = [] if was_frozen else sorted(set(shard.moments) - set(held) - set(zero_moments))
    if absent:
        raise CheckpointError(
            f"{shard.spec.name}: the checkpoint holds no {', '.join(absent)}",
            f"moments among {held}",
            "load the weights alone, or use a checkpoint that was saved after the optimizer was made",
        )
