"""Saving: whole or not at all, the same error on every rank, earlier checkpoints untouched."""

import dataclasses
import errno
import os
import subprocess
import threading

import numpy as np
import pytest
import torch

from engine.checkpoint import container, saver, stores
from engine.checkpoint.folder import Owner, committed
from engine.checkpoint.load import load_shards, open_checkpoint
from engine.checkpoint.saver import Saver
from engine.checkpoint.staging import HostBuffer, stage_shards
from engine.checkpoint.verify import verify
from engine.checkpoint.writers import Writer
from engine.errors import CheckpointError
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard, Placement
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state


def saved_by_all(world, savers, ranks, step=1, job="job", attempt=0):
    """What `Saver.save` returned or raised on each rank."""

    def run(rank):
        settings = {p.spec.name: {"lr": 0.1, "stage": world.writers[rank].stage} for p in world.placements_of(rank)}
        state = dataclasses.replace(some_state(step), hyperparameters=settings)
        return savers[rank].save(world.shards[rank], world.placements_of(rank), state, job, attempt)

    return ranks.run(world.layout.world_size, run)


def filled(layout, zero_stage, seed=0):
    world = World(layout_of(*layout), zero_stage, small_model())
    world.fill(random_state(world.specs, seed))
    return world


@pytest.fixture
def world():
    return filled((2, 2, 2), 3)


@pytest.fixture
def savers(world, tmp_path):
    return [Saver(tmp_path, groups) for groups in world.groups]


@pytest.fixture
def ranks(monkeypatch):
    return ThreadedRanks(monkeypatch)


@pytest.mark.parametrize(("layout", "zero_stage"), [((1, 1, 1), 0), ((2, 2, 2), 3), ((2, 2, 1), 0), ((1, 3, 2), 1)])
def test_ranks_save_together_what_can_be_loaded(tmp_path, ranks, layout, zero_stage):
    world = filled(layout, zero_stage)
    savers = [Saver(tmp_path, groups) for groups in world.groups]
    results = saved_by_all(world, savers, ranks)
    assert set(results) == {tmp_path / "step-00000001"}
    assert verify(results[0]) == []
    manifest = open_checkpoint(results[0])
    settings = manifest.state.hyperparameters
    assert settings.keys() == {spec.name for spec in world.specs}
    assert settings["final_norm.weight"]["stage"] == layout[0] - 1
    assert sorted(os.listdir(tmp_path)) == ["owner.json", "step-00000001"]
    again = World(layout_of(1, 1, 1), 3, world.specs)
    load_shards(results[0], manifest, again.shards[0])
    again.check(random_state(world.specs, 0))


def test_only_ranks_with_something_to_store_write(tmp_path, ranks):
    world = filled((2, 2, 1), 0)
    saved_by_all(world, [Saver(tmp_path, groups) for groups in world.groups], ranks)
    assert sorted(path.name for path in (tmp_path / "step-00000001").iterdir()) == [
        "manifest.json",
        "stage-00-data-0000-tensor-00.safetensors",
        "stage-01-data-0000-tensor-00.safetensors",
    ]


def test_the_host_buffer_is_taken_once(tmp_path, ranks):
    world = filled((1, 1, 1), 3)
    savers = [Saver(tmp_path, world.groups[0])]
    saved_by_all(world, savers, ranks, step=1)
    first = savers[0]._buffer.reserve(0).untyped_storage().data_ptr()
    saved_by_all(world, savers, ranks, step=2)
    assert savers[0]._buffer.reserve(0).untyped_storage().data_ptr() == first


def test_training_may_go_on_once_staged(tmp_path):
    """The update waits for the copies, which run in another thread; then nothing of what was staged changes."""
    world = filled((1, 1, 1), 3)
    staged = stage_shards(world.shards[0], world.placements[0], Writer(0, 0, 0), 1, HostBuffer())
    copied = torch.cat([shard.weight for shard in sorted(world.shards[0], key=lambda shard: shard.spec.name)])
    threading.Timer(0.05, staged.wait).start()
    staged.hold_update()
    for shard in world.shards[0]:
        shard.weight.zero_()
    real = copied[copied != 0].numpy()  # padding is not staged
    assert np.array_equal(staged.data[: real.size], real)


class Failing:
    """Raises in place of a function on its n-th call, and lets the others through."""

    def __init__(self, real, error, call):
        self.real, self.error, self.countdown = real, error, call

    def __call__(self, *arguments, **options):
        self.countdown -= 1
        if self.countdown == 0:
            raise self.error
        return self.real(*arguments, **options)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "call", "error", "what"),
    [
        (container, "_write_all", 3, FULL, "no space left for"),
        (container.os, "fsync", 2, FULL, "no space left for"),
        (container.os, "fsync", 9, FULL, "no space left for"),  # the manifest's, after the eight files'
        (container, "_write_all", 5, OSError(errno.EIO, "Input/output error"), "cannot write"),
        (stores, "prepare", 1, RuntimeError("bug"), "RuntimeError: bug"),
        (saver, "stage_shards", 4, MemoryError(), "MemoryError"),
        (stores, "commit", 1, CheckpointError("refused", "this", "that"), "refused"),
        (stores, "publish", 1, OSError(errno.EIO, "Input/output error"), "OSError"),
    ],
)
def test_any_ranks_error_is_everybodys_and_leaves_no_trace(
    tmp_path, world, savers, ranks, monkeypatch, owner, name, call, error, what
):
    earlier = saved_by_all(world, savers, ranks, step=1)[0]
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(owner, name, Failing(getattr(owner, name), error, call))
    errors = saved_by_all(world, savers, ranks, step=2)
    monkeypatch.undo()
    assert {type(error) for error in errors} == {CheckpointError}
    assert len({str(error) for error in errors}) == 1
    assert what in str(errors[0])
    assert str(errors[0]).startswith("rank ")
    assert sorted(os.listdir(tmp_path)) == before
    assert verify(earlier) == []
    if error is FULL:
        assert "earlier checkpoints are whole" in errors[0].remedy
    ThreadedRanks(monkeypatch)
    assert set(saved_by_all(world, savers, ThreadedRanks(monkeypatch), step=2)) == {tmp_path / "step-00000002"}


def test_too_little_room_is_found_before_anything_is_written(tmp_path, world, savers, ranks, monkeypatch):
    class Room:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(stores.os, "statvfs", lambda path: Room)
    errors = saved_by_all(world, savers, ranks)
    assert len({str(error) for error in errors}) == 1
    assert "12288 are free" in str(errors[0])
    assert "lower checkpoint.keep_last" in errors[0].remedy
    assert committed(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` here, so no small tmpfs can be made")
    if mounted.returncode:
        pytest.skip(f"no small tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize("notice", ["before", "while writing"])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(small_disk, world, ranks, monkeypatch, notice):
    savers = [Saver(small_disk, groups) for groups in world.groups]
    earlier = saved_by_all(world, savers, ranks, step=1)[0]
    room = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 3 * 4096))
    if notice == "while writing":  # another user of the disk was faster

        class Room:
            f_bavail, f_frsize = 1 << 30, 4096

        monkeypatch.setattr(stores.os, "statvfs", lambda path: Room)
    errors = saved_by_all(world, savers, ranks, step=2)
    assert len({str(error) for error in errors}) == 1
    assert "no space left for" in str(errors[0])
    assert committed(small_disk) == [earlier]
    assert verify(earlier) == []
    assert not list(small_disk.glob(".step-*"))


def test_a_stale_attempt_cannot_commit(tmp_path, world, ranks):
    old = [Saver(tmp_path, groups) for groups in world.groups]
    new = [Saver(tmp_path, groups) for groups in world.groups]
    saved_by_all(world, old, ranks, step=1, attempt=0)
    ranks.run(8, lambda rank: new[rank].acquire("job", 1))
    errors = saved_by_all(world, old, ranks, step=2, attempt=0)
    assert len({str(error) for error in errors}) == 1
    assert "belongs to job 'job' attempt 1, this is job 'job' attempt 0" in str(errors[0])
    assert [path.name for path in committed(tmp_path)] == ["step-00000001"]
    saved_by_all(world, new, ranks, step=1, attempt=1)
    assert open_checkpoint(tmp_path / "step-00000001").attempt == 1
    stale = [Saver(tmp_path, groups) for groups in world.groups]
    assert all(isinstance(error, CheckpointError) for error in saved_by_all(world, stale, ranks, step=3, attempt=0))
    assert not list(tmp_path.glob(".step-*"))


def test_a_stale_attempt_that_is_already_writing_is_stopped_at_the_commit(tmp_path, world, savers, ranks, monkeypatch):
    real = stores.prepare

    def prepare_then_lose(partial, sizes):
        real(partial, sizes)
        (tmp_path / "owner.json").write_text('{"job": "job", "attempt": 5}')  # the other start claims now

    monkeypatch.setattr(stores, "prepare", prepare_then_lose)
    errors = saved_by_all(world, savers, ranks)
    assert len({str(error) for error in errors}) == 1
    assert "attempt 5" in str(errors[0])
    assert committed(tmp_path) == []


def test_the_same_step_again_replaces(tmp_path, world, savers, ranks):
    saved_by_all(world, savers, ranks)
    world.fill(random_state(world.specs, 1))
    path = saved_by_all(world, savers, ranks)[0]
    again = World(layout_of(1, 1, 1), 3, world.specs)
    load_shards(path, open_checkpoint(path), again.shards[0])
    again.check(random_state(world.specs, 1))


SPEC = ParameterSpec("p", (4,))
PLACE = Placement(SPEC, (0,), 0, 4)


@pytest.mark.parametrize(
    ("shards", "what"),
    [
        ([], r"p: Writer.* should hold \[0, 4\) and holds nothing"),
        ([ParameterShard(SPEC, 1, torch.zeros(3))], r"holds \[1, 4\)"),
        ([ParameterShard(SPEC, 0, torch.zeros(2))], r"holds \[0, 2\)"),
        ([ParameterShard(ParameterSpec("q", (4,)), 0, torch.zeros(4))], r"without a placement: \['q'\]"),
        ([ParameterShard(SPEC, 0, torch.zeros(4, dtype=torch.float64))], r"float64"),
        ([ParameterShard(SPEC, 0, torch.zeros(8)[::2])], r"a shard of shape"),
        (
            [ParameterShard(SPEC, 0, torch.zeros(4), {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(4)})],
            r"exp_avg\.p: a shard of shape \(3,\)",
        ),
    ],
)
def test_shards_that_do_not_fit_their_placement_are_refused(shards, what):
    with pytest.raises(CheckpointError, match=what):
        stage_shards(shards, [PLACE], Writer(0, 0, 0), 1, HostBuffer())


def test_shards_with_different_moments_are_refused():
    other = ParameterSpec("q", (4,))
    shards = [
        ParameterShard(SPEC, 0, torch.zeros(4), {"exp_avg": torch.zeros(4)}),
        ParameterShard(other, 0, torch.zeros(4)),
    ]
    with pytest.raises(CheckpointError, match=r"p carries the moments \['exp_avg'\], its placement says"):
        stage_shards(shards, [PLACE, Placement(other, (0,), 0, 4)], Writer(0, 0, 0), 1, HostBuffer())
    reports = [stores.Written(None, ("exp_avg",)), stores.Written(None, None), stores.Written(None, ())]
    with pytest.raises(CheckpointError, match="some ranks carry no moments, others"):
        stores.build_manifest(some_state(), layout_of(1, 3, 1), [], reports, Owner("j", 0))


def test_a_section_that_is_not_json_fails_the_save_everywhere(tmp_path, world, savers, ranks):
    def run(rank):
        state = dataclasses.replace(some_state(), sections={"rng": {"state": b"bytes"}})
        return savers[rank].save(world.shards[rank], world.placements_of(rank), state, "job", 0)

    errors = ranks.run(8, run)
    assert all("section rng.state: b'bytes' (bytes) cannot go into a checkpoint" in str(error) for error in errors)
    assert committed(tmp_path) == []
