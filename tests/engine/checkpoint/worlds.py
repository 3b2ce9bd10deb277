"""A small model's state on the ranks of any layout, cut by an index array and not by the code under test.

`World` plays all ranks in one process: shards and placements per rank under a ZeRO stage, filled from whole
tensors. `parts` cuts a local part by slicing and concatenating an array of flat indices: the independent witness.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.folder import Owner, acquire, partial_path
from engine.checkpoint.geometry import Box
from engine.checkpoint.manifest import CheckpointState, key_of, moment_state
from engine.checkpoint.staging import HostBuffer, stage_shards
from engine.checkpoint.stores import StageTable, build_manifest, commit, prepare, write_staged
from engine.checkpoint.writers import Writer
from engine.config.resolve import Layout
from engine.parallel.axes import Grid
from engine.parallel.groups import Group, Groups
from engine.parallel.sharding import REPLICATED, ROW, VOCABULARY, ParameterSpec, Sharding, column
from engine.parallel.state import MOMENTS, MOMENTUM, ParameterShard, Placement

Whole = dict[str, np.ndarray]
"""Key of a state's parameter -> fp32 array of the stored shape."""


def small_model(num_layers: int = 2, padded_rows: int = 16, real_rows: int = 13) -> list[ParameterSpec]:
    """Every kind of parameter: padded vocabulary, replicated, fused column with bias, row; odd sizes where allowed."""
    width, head, ffn = 6, 2, 4
    specs = [
        ParameterSpec("embed_tokens.weight", (padded_rows, width), VOCABULARY, real_rows),
        ParameterSpec("embed_positions.weight", (7, width)),
    ]
    for layer in range(num_layers):
        prefix = f"layers.{layer}"
        fused = column(4 * head, 2 * head, 2 * head)
        specs += [
            ParameterSpec(f"{prefix}.attention_norm.weight", (width,)),
            ParameterSpec(f"{prefix}.attention.qkv_proj.weight", (8 * head, width), fused),
            ParameterSpec(f"{prefix}.attention.qkv_proj.bias", (8 * head,), fused),
            ParameterSpec(f"{prefix}.attention.out_proj.weight", (width, 4 * head), ROW),
            ParameterSpec(f"{prefix}.ffn.gate_up_proj.weight", (2 * ffn, width), column(ffn, ffn)),
            ParameterSpec(f"{prefix}.ffn.down_proj.bias", (width,)),
        ]
    return [*specs, ParameterSpec("final_norm.weight", (width,))]


def stages_of(name: str, num_stages: int, num_layers: int) -> tuple[int, ...]:
    """Pipeline stages that hold a parameter; the embedding is tied to the last one."""
    if name.startswith("embed_tokens"):
        return (0, num_stages - 1) if num_stages > 1 else (0,)
    if name.startswith("embed_positions"):
        return (0,)
    if name.startswith("layers."):
        return (int(name.split(".")[1]) * num_stages // num_layers,)
    return (num_stages - 1,)


def parts(spec: ParameterSpec, tensor_size: int) -> list[np.ndarray]:
    """For each tensor rank its local part as an array of flat indices into the (padded) whole."""
    index = np.arange(math.prod(spec.shape)).reshape(spec.shape)
    dim = spec.sharding.dim
    if dim is None:
        return [index] * tensor_size
    cuts = np.cumsum(spec.blocks())[:-1]
    blocks = [np.split(block, tensor_size, axis=dim) for block in np.split(index, cuts, axis=dim)]
    return [np.concatenate([block[rank] for block in blocks], axis=dim) for rank in range(tensor_size)]


def random_state(specs: list[ParameterSpec], seed: int, moments: tuple[str, ...] = MOMENTS) -> Whole:
    """Random weights and moments, of the stored shapes."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0xC4EC]))
    states = ["model", *map(moment_state, moments)]
    return {
        key_of(state, spec.name): generator.standard_normal(spec.stored_shape, dtype=np.float32)
        for state in states
        for spec in specs
    }


@dataclass
class World:
    """All ranks of one layout under one ZeRO stage."""

    layout: Layout
    zero_stage: int
    specs: list[ParameterSpec]
    moments: tuple[str, ...] = MOMENTS

    def __post_init__(self) -> None:
        self.grid = Grid(self.layout)
        self.groups = [fake_groups(self.layout, rank) for rank in range(self.layout.world_size)]
        self.writers = [Writer.of(groups) for groups in self.groups]
        num_layers = len({spec.name.split(".")[1] for spec in self.specs if spec.name.startswith("layers.")})
        self.stages = {spec.name: stages_of(spec.name, self.layout.pipe, num_layers) for spec in self.specs}
        self.placements = [self._placements(stage) for stage in range(self.layout.pipe)]
        self.shards = [self._shards(writer) for writer in self.writers]

    def placements_of(self, global_rank: int) -> list[Placement]:
        return self.placements[self.writers[global_rank].stage]

    def _placements(self, stage: int) -> list[Placement]:
        """As the ZeRO stages lay parameters out; under ZeRO-1 and 2 one flat buffer per stage, the tied one apart."""
        data, tensor = self.layout.data, self.layout.tensor
        held = [spec for spec in self.specs if stage in self.stages[spec.name]]
        tied = [spec for spec in held if len(self.stages[spec.name]) > 1]
        groups = [tied, [spec for spec in held if spec not in tied]]
        placements = []
        for group in groups:
            total, offset = sum(spec.local_numel(tensor) for spec in group), 0
            shared = -(-total // (2 * data)) * 2  # padded, as DeepSpeed does for alignment
            for spec in group:
                local = spec.local_numel(tensor)
                where = {0: (0, local), 3: (0, -(-local // data))}.get(self.zero_stage, (offset, shared))
                placements.append(Placement(spec, self.stages[spec.name], *where, self.moments))
                offset += local
        return placements

    def _shards(self, writer: Writer) -> list[ParameterShard]:
        shards = []
        for placement in self.placements[writer.stage]:
            local = placement.spec.local_numel(self.layout.tensor)
            low = 0 if self.zero_stage == 0 else writer.data_rank * placement.partition - placement.offset
            start, stop = max(low, 0), min(low + placement.partition, local)
            if start < stop:
                flat = torch.full((1 + len(self.moments), stop - start), torch.nan)
                shards.append(
                    ParameterShard(placement.spec, start, flat[0], dict(zip(self.moments, flat[1:], strict=True)))
                )
        return shards

    def fill(self, whole: Whole) -> None:
        """Gives every shard its elements of the whole tensors; padding gets 0."""
        for writer, shards in zip(self.writers, self.shards, strict=True):
            for shard in shards:
                for state, target in views(shard).items():
                    target.copy_(torch.from_numpy(self._expected(shard, state, writer, whole)))

    def check(self, whole: Whole) -> None:
        """Asserts that every shard holds, bit for bit, its elements of the whole tensors, and 0 in its padding."""
        for writer, shards in zip(self.writers, self.shards, strict=True):
            for shard in shards:
                for state, target in views(shard).items():
                    expected = self._expected(shard, state, writer, whole)
                    assert np.array_equal(target.numpy().view(np.uint32), expected.view(np.uint32)), (
                        f"{key_of(state, shard.spec.name)} of {writer} under {self}"
                    )

    def _expected(self, shard: ParameterShard, state: str, writer: Writer, whole: Whole) -> np.ndarray:
        spec = shard.spec
        padded = np.zeros(spec.shape, dtype=np.float32)
        padded[: spec.stored_shape[0]] = whole[key_of(state, spec.name)]
        local = parts(spec, self.layout.tensor)[writer.tensor_rank].ravel()
        return padded.ravel()[local[shard.start : shard.start + shard.length]]

    def save(self, folder: Path, state: CheckpointState, owner: Owner = Owner("job", 0)) -> Path:  # noqa: B008
        """The steps of `Saver.save` for every rank in turn."""
        acquire(folder, owner)
        tensor = self.layout.tensor
        staged = [
            stage_shards(shards, self.placements[writer.stage], writer, tensor, HostBuffer())
            for writer, shards in zip(self.writers, self.shards, strict=True)
        ]
        partial = partial_path(folder, state.step, owner)
        prepare(partial, [each.num_bytes for each in staged])
        reports = [write_staged(each, partial, state.step) for each in staged]
        settings = [{p.spec.name: {"lr": 0.1} for p in placements} for placements in self.placements]
        tables = [StageTable(p, s) for p, s in zip(self.placements, settings, strict=True)]
        return commit(partial, build_manifest(state, self.layout, tables, reports, owner))


def views(shard: ParameterShard) -> dict[str, torch.Tensor]:
    """A shard's live views by state."""
    return {"model": shard.weight} | {moment_state(name): values for name, values in shard.moments.items()}


def fake_groups(layout: Layout, global_rank: int) -> Groups:
    """The groups of one rank, without handles: what they say is true, collectives over them have to be replaced."""
    grid = Grid(layout)

    def mine(*axes) -> Group:
        ranks = next(ranks for ranks in grid.groups(*axes) if global_rank in ranks)
        return Group(tuple(ranks), ranks.index(global_rank))

    return Groups(
        layout=layout,
        grid=grid,
        global_rank=global_rank,
        coordinates=grid.coordinates(global_rank),
        world=mine("pipe", "data", "sequence", "tensor"),
        zero=mine("data", "sequence"),
        near=None,
        sequence=mine("sequence"),
        tensor=mine("tensor"),
        pipe=mine("pipe"),
        pipe_backward=mine("pipe"),
        wrap=mine("pipe"),
        wrap_backward=mine("pipe"),
        model=mine("pipe", "tensor"),
        ties={},
    )


def some_state(step: int = 1) -> CheckpointState:
    """A state with something in every field."""
    return CheckpointState(
        step=step,
        tokens=step * 640,
        zero_stage=3,
        config_hash="0123456789abcdef",
        config={"seed": 7, "model": {"num_layers": 2}},
        sections={"loader": {"window": 3, "slot": 17}, "schedule": {"factor": 0.1 + 0.2}},
    )


def layout_of(pipe: int, data: int, tensor: int) -> Layout:
    return Layout(pipe=pipe, data=data, sequence=1, tensor=tensor)


def elements(array: np.ndarray, box: Box) -> np.ndarray:
    """Return the elements that lie in a box."""
    return array[tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))]


def random_spec(random: np.random.Generator, tensor_size: int) -> ParameterSpec:
    """Draw a parameter of any sharding, in sizes that `tensor_size` divides."""
    kind = random.integers(5)
    width = int(random.integers(1, 6)) * tensor_size
    blocks = [int(random.integers(1, 4)) * tensor_size for _ in range(int(random.integers(1, 4)))]
    match kind:
        case 0:
            return ParameterSpec("p", (sum(blocks), width), column(*blocks))
        case 1:
            return ParameterSpec("p", (int(random.integers(1, 6)), width), ROW)
        case 2:
            rows = int(random.integers(1, 5)) * tensor_size
            return ParameterSpec("p", (rows, 3), VOCABULARY, int(random.integers(1, rows + 1)))
        case 3:
            shape = (int(random.integers(1, 4)), sum(blocks), 2)
            return ParameterSpec("p", shape, Sharding("column", 1, tuple(blocks)))
    return ParameterSpec("p", (int(random.integers(1, 6)), width), REPLICATED)


def muon(world: World) -> World:
    """Give split matrices a momentum in place of Adam's moments; return the world."""

    def is_matrix(spec):
        return len(spec.shape) == 2 and spec.sharding.role in ("column", "row")

    def with_momentum(shard):
        return dataclasses.replace(shard, moments={"momentum_buffer": shard.moments["exp_avg"]})

    world.shards = [[with_momentum(p) if is_matrix(p.spec) else p for p in shards] for shards in world.shards]
    world.placements = [
        [dataclasses.replace(p, moments=MOMENTUM) if is_matrix(p.spec) else p for p in placements]
        for placements in world.placements
    ]
    return world
