"""From any layout into any layout, bit for bit; what does not fit is named."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint.fingerprint import combine, fingerprint_of_checkpoint, partial_sum
from engine.checkpoint.load import Files, load, load_shards, open_checkpoint, read_state, read_weights
from engine.checkpoint.manifest import match
from engine.errors import CheckpointError
from engine.parallel.groups import Groups
from engine.parallel.sharding import ROW, VOCABULARY, ParameterSpec
from engine.parallel.state import ParameterShard
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import (
    World,
    fake_groups,
    layout_of,
    muon,
    random_state,
    small_model,
    some_state,
)
from tests.memory import traced_peak

LAYOUTS = [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 3, 1), (1, 3, 2), (2, 2, 2)]
CASES = list(itertools.product(LAYOUTS, (0, 1, 3)))
PAIRS = [(CASES[i], CASES[(i * 7 + 5) % len(CASES)]) for i in range(len(CASES))]


def fingerprint_of(world):
    tensor = world.layout.tensor
    ranks = zip(world.writers, world.shards, strict=True)
    return combine([partial_sum(shards, world.placements[w.stage], w, tensor) for w, shards in ranks])


def load_world(path, world):
    manifest = open_checkpoint(path)
    ranks = zip(world.writers, world.shards, strict=True)
    return [load_shards(path, manifest, shards, w.tensor_rank, world.layout.tensor) for w, shards in ranks]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_any_layout_loads_what_any_other_saved(tmp_path, before, after):
    specs = small_model()
    whole = random_state(specs, seed=3)
    old, new = (World(layout_of(*layout), zero_stage, specs) for layout, zero_stage in (before, after))
    old.fill(whole)
    path = old.save(tmp_path, some_state())
    num_bytes = load_world(path, new)
    new.check(whole)
    assert fingerprint_of(new) == fingerprint_of(old) == fingerprint_of_checkpoint(path, open_checkpoint(path))
    # Each rank reads what its own shards need and no more.
    real = [sum(_real(shard, w, new) for shard in shards) for w, shards in zip(new.writers, new.shards, strict=True)]
    assert num_bytes == [12 * count for count in real]


def _real(shard, writer, world):
    need = world.placements[writer.stage]
    assert any(placement.spec == shard.spec for placement in need)
    padded = np.zeros(shard.spec.shape, dtype=bool)
    padded[: shard.spec.stored_shape[0]] = True
    local = shard.spec.part(torch.from_numpy(padded), writer.tensor_rank, world.layout.tensor).reshape(-1)
    return int(local[shard.start : shard.start + shard.length].sum())


def test_random_sharded_layouts_round_trip(tmp_path):
    random = np.random.default_rng(17)
    for number in range(6):
        num_layers = int(random.integers(1, 4))
        specs = small_model(num_layers, padded_rows=int(random.choice([16, 32])), real_rows=int(random.integers(1, 17)))
        whole = random_state(specs, seed=number)
        path, seen = None, set()
        for _ in range(3):
            pipe, data, tensor = (
                int(random.integers(1, num_layers + 1)),
                int(random.integers(1, 8)),
                int(random.choice([1, 2])),
            )
            world = World(layout_of(pipe, data, tensor), int(random.choice([0, 1, 3])), specs)
            if path is None:
                world.fill(whole)
            else:
                load_world(path, world)
            world.check(whole)
            path = world.save(tmp_path, some_state())
            seen.add(fingerprint_of(world))
        assert len(seen) == 1


def test_another_padding_of_the_vocabulary_loads(tmp_path):
    old = World(layout_of(1, 2, 2), 3, small_model(padded_rows=16))
    whole = random_state(old.specs, 1)
    old.fill(whole)
    new = World(layout_of(1, 3, 4), 3, [ParameterSpec("embed_tokens.weight", (32, 6), VOCABULARY, 13)])
    load_world(old.save(tmp_path, some_state()), new)
    new.check(whole)


def test_whole_weights_and_the_rest_of_the_state(tmp_path):
    world = World(layout_of(2, 2, 2), 1, small_model())
    whole = random_state(world.specs, 2)
    world.fill(whole)
    path = world.save(tmp_path, some_state(step=9))
    weights = read_weights(path)
    assert weights.keys() == {spec.name for spec in world.specs}
    for name, weight in weights.items():
        assert np.array_equal(weight.numpy(), whole[f"model.{name}"])
    state = read_state(path)
    assert (state.step, state.tokens) == (9, 5760)
    assert state.sections == some_state().sections


def test_a_state_without_moments_is_saved_and_asks_for_none(tmp_path):
    world = World(layout_of(1, 2, 1), 3, small_model())
    whole = random_state(world.specs, 2)
    world.fill(whole)
    world.shards = [[dataclasses.replace(shard, moments={}) for shard in shards] for shards in world.shards]
    path = world.save(tmp_path, some_state())
    again = World(layout_of(1, 1, 1), 3, world.specs)
    with pytest.raises(CheckpointError, match=r"holds no exp_avg, exp_avg_sq") as caught:
        load_world(path, again)
    assert caught.value.remedy
    again.shards = [[dataclasses.replace(shard, moments={}) for shard in again.shards[0]]]
    load_world(path, again)
    again.check(whole)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_each_parameter_has_the_moments_of_its_optimizer_in_any_layout(tmp_path, zero_stage):
    world = muon(World(layout_of(2, 2, 2), zero_stage, small_model()))
    whole = random_state(world.specs, 4)
    for spec in world.specs:
        whole[f"optim.momentum_buffer.{spec.name}"] = whole[f"optim.exp_avg.{spec.name}"]
    world.fill(whole)
    path = world.save(tmp_path, some_state())
    manifest = open_checkpoint(path)
    assert manifest.moments == ("exp_avg", "exp_avg_sq", "momentum_buffer")
    found = {placement.moments for placement in manifest.placements.values()}
    assert found == {("momentum_buffer",), ("exp_avg", "exp_avg_sq")}
    again = muon(World(layout_of(1, 3, 1), 2, world.specs))
    load_world(path, again)
    again.check(whole)
    own = [partial_sum(p, world.placements[w.stage], w, 2) for p, w in zip(world.shards, world.writers, strict=True)]
    assert fingerprint_of_checkpoint(path, manifest) == combine(own)
    with pytest.raises(CheckpointError, match="holds no exp_avg, exp_avg_sq") as caught:
        load_world(path, World(layout_of(1, 1, 1), 0, world.specs))
    assert caught.value.allowed == "moments among ['momentum_buffer']"


@pytest.fixture
def saved(tmp_path):
    world = World(layout_of(1, 2, 1), 3, small_model())
    world.fill(random_state(world.specs, 0))
    return world.save(tmp_path, some_state())


def test_an_unknown_parameter_is_named(saved):
    shard = ParameterShard(ParameterSpec("strange.weight", (2,)), 0, torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"does not hold strange\.weight"):
        load_shards(saved, open_checkpoint(saved), [shard])


def test_another_shape_is_named_with_both(saved):
    shard = ParameterShard(ParameterSpec("final_norm.weight", (4,)), 0, torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"final_norm\.weight: \(6,\) in the checkpoint, \(4,\) in the model"):
        load_shards(saved, open_checkpoint(saved), [shard])


def test_a_whole_model_that_differs_is_reported_at_once(saved):
    specs = [spec for spec in small_model() if spec.name != "final_norm.weight"]
    specs[1] = ParameterSpec("embed_positions.weight", (8, 6))
    with pytest.raises(CheckpointError) as caught:
        match(open_checkpoint(saved), [*specs, ParameterSpec("extra.weight", (1,))])
    for what in ("final_norm.weight: not in the model", "extra.weight: not in the checkpoint", "(7, 6)", "(8, 6)"):
        assert what in caught.value.wrong
    assert caught.value.remedy


def test_a_file_that_is_another_ranks_is_refused(saved):
    first, second = sorted(saved.glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="the manifest"):
        read_weights(saved)


def test_a_file_with_foreign_shards_is_refused(tmp_path):
    paths = []
    for seed, specs in enumerate((small_model(), [ParameterSpec("final_norm.weight", (6,))])):
        world = World(layout_of(1, 1, 1), 3, specs)
        world.fill(random_state(specs, seed))
        paths.append(world.save(tmp_path / str(seed), some_state()))
    name = "stage-00-data-0000-tensor-00.safetensors"
    manifest = open_checkpoint(paths[0])
    record = dataclasses.replace(manifest.files[name], num_bytes=(paths[1] / name).stat().st_size)
    (paths[0] / name).write_bytes((paths[1] / name).read_bytes())
    lying = dataclasses.replace(manifest, files={name: record})
    with pytest.raises(CheckpointError, match="its shards are not those of the manifest"):
        Files(paths[0], lying).check_all()
    with pytest.raises(CheckpointError, match="nothing, the manifest asks for"):
        load_shards(paths[0], lying, [ParameterShard(small_model()[0], 0, torch.zeros(96))])


def test_load_on_all_ranks_agrees_on_an_error(saved, monkeypatch):
    world = World(layout_of(2, 1, 2), 3, small_model())
    whole = random_state(world.specs, 0)
    ranks = ThreadedRanks(monkeypatch)

    def run(rank):
        groups: Groups = fake_groups(world.layout, rank)
        return load(saved, groups, world.shards[rank], world.placements_of(rank))

    assert {manifest.state.step for manifest in ranks.run(4, run)} == {1}
    world.check(whole)
    next(saved.glob("*tensor-00*")).unlink()
    errors = ranks.run(4, run)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith("rank 0: ")


def test_a_stage_that_lacks_a_parameter_is_found_on_every_rank(saved, monkeypatch):
    world = World(layout_of(2, 1, 1), 3, small_model())

    def run(rank):
        placements = [p for p in world.placements_of(rank) if p.spec.name != "final_norm.weight"]
        return load(saved, fake_groups(world.layout, rank), world.shards[rank], placements)

    for error in ThreadedRanks(monkeypatch).run(2, run):
        assert "final_norm.weight: not in the model" in str(error)


class Allocations(TorchDispatchMode):
    """Counts the bytes of every new storage that an operation of torch makes."""

    def __init__(self):
        super().__init__()
        self.num_bytes, self._known = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in seen:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return made


@pytest.mark.parametrize(("before", "after"), [(((1, 4, 1), 1), ((1, 1, 2), 3)), (((2, 1, 2), 3), ((1, 3, 1), 1))])
def test_loading_takes_less_memory_than_the_largest_parameter(tmp_path, before, after):
    """Beside the shard, which is there already; numpy and bytes are counted by tracemalloc, torch by its operations."""
    specs = [
        ParameterSpec("embed_tokens.weight", (512, 512), VOCABULARY, 512),
        *(ParameterSpec(f"layers.{n}.attention.out_proj.weight", (256, 512), ROW) for n in range(4)),
        ParameterSpec("final_norm.weight", (512,)),
    ]
    whole = random_state(specs, seed=3)
    old, new = (World(layout_of(*layout), zero_stage, specs) for layout, zero_stage in (before, after))
    old.fill(whole)
    path = old.save(tmp_path, some_state())
    manifest = open_checkpoint(path)
    with Allocations() as allocated:
        torch.zeros(3).as_strided((1,), (1,), 1).copy_(torch.ones(1))  # what torch imports for it is no load's memory
    assert allocated.num_bytes == 16
    for writer, shards in zip(new.writers, new.shards, strict=True):
        with Allocations() as allocated:
            load_shards(path, manifest, shards, writer.tensor_rank, new.layout.tensor)
        load = partial(load_shards, path, manifest, shards, writer.tensor_rank, new.layout.tensor)
        assert traced_peak(load) + allocated.num_bytes < 512 * 512 * 4
    new.check(whole)
