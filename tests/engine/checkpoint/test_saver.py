"""Saving beside the training: what was staged is what is written, errors reach every rank, one copy in memory."""

import errno
import os
import shutil
import threading

import numpy as np
import pytest

from engine.checkpoint import container, saver
from engine.checkpoint.folder import Owner, Superseded, acquire, committed
from engine.checkpoint.load import load_shards, open_checkpoint
from engine.checkpoint.saver import Saver
from engine.checkpoint.staging import HostBuffer, stage_shards
from engine.checkpoint.stores import write_staged
from engine.checkpoint.verify import verify
from engine.checkpoint.writers import Writer
from engine.errors import CheckpointError
from engine.parallel import collectives
from engine.parallel.sharding import ParameterSpec
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state
from tests.memory import traced_peak

PATIENCE_SECONDS = 30.0


@pytest.fixture
def world():
    world = World(layout_of(2, 2, 1), 3, small_model())
    world.fill(random_state(world.specs, 1))
    return world


@pytest.fixture
def savers(world, tmp_path):
    return [Saver(tmp_path, groups) for groups in world.groups]


@pytest.fixture
def gate(monkeypatch):
    """Keeps every write waiting until it is opened."""
    opened, real = threading.Event(), container._write_all

    def write(*arguments):
        assert opened.wait(PATIENCE_SECONDS)
        real(*arguments)

    monkeypatch.setattr(container, "_write_all", write)
    yield opened
    opened.set()


@pytest.fixture
def ranks(monkeypatch):
    return ThreadedRanks(monkeypatch)


def begin(world, savers, ranks, step=1):
    def run(rank):
        savers[rank].begin(world.shards[rank], world.placements_of(rank), some_state(step), "job", 0)

    return ranks.run(world.layout.world_size, run)


def steps(world, savers, ranks, until_ended=True):
    """What the training loop does after a step, on every rank: sum the signals, act on them, until the save has ended
    (or once); the last answer of each rank."""

    def run(rank):
        while True:
            told = collectives.gather_objects(savers[rank].save_flags(), world.groups[rank].world)
            path = savers[rank].advance(sum(done for done, _ in told), sum(failed for _, failed in told))
            if savers[rank].in_flight is None or not until_ended:
                return path

    return ranks.run(world.layout.world_size, run)


def test_training_goes_on_while_it_is_written_and_the_commit_follows(tmp_path, world, savers, ranks, gate):
    assert begin(world, savers, ranks) == [None] * 4
    assert steps(world, savers, ranks, until_ended=False) == [None] * 4
    assert committed(tmp_path) == []
    assert {each.in_flight for each in savers} == {1}
    assert ranks.run(4, lambda rank: savers[rank].hold_update()) == [None] * 4
    world.fill(random_state(world.specs, 2))  # the next update
    gate.set()
    assert set(steps(world, savers, ranks)) == {tmp_path / "step-00000001"}
    assert {each.in_flight for each in savers} == {None}
    again = World(layout_of(1, 1, 1), 3, world.specs)
    load_shards(tmp_path / "step-00000001", open_checkpoint(tmp_path / "step-00000001"), again.shards[0])
    again.check(random_state(world.specs, 1))
    assert sorted(os.listdir(tmp_path)) == ["owner.json", "step-00000001"]


def test_without_a_save_in_flight_there_is_nothing_to_do(world, savers, ranks):
    assert {each.save_flags() for each in savers} == {(0.0, 0.0)}
    assert steps(world, savers, ranks, until_ended=False) == [None] * 4
    assert ranks.run(4, lambda rank: savers[rank].settle()) == [None] * 4
    savers[0].abandon()
    savers[0].hold_update()


def test_the_end_of_a_run_waits_for_write_and_commit(tmp_path, world, savers, ranks, gate):
    begin(world, savers, ranks)
    threading.Timer(0.05, gate.set).start()
    assert ranks.run(4, lambda rank: savers[rank].settle()) == [tmp_path / "step-00000001"] * 4
    assert verify(tmp_path / "step-00000001") == []


class OneRankFails:
    """Fails the second data rank's file of the first stage; what the others write is held up until the end."""

    def __init__(self, monkeypatch, error):
        self.error, self.real = error, container.write
        self.failed = threading.Event()
        monkeypatch.setattr(container, "write", self.write)

    def write(self, path, header, data, check_cancelled=lambda: None):
        if path.name.startswith("stage-00-data-0001"):
            self.failed.set()
            raise self.error
        assert self.failed.wait(PATIENCE_SECONDS)
        while True:  # a disk so slow that only being called off ends it
            check_cancelled()


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("no space left for X", remedy="free some space"),
        OSError(errno.EACCES, "Permission denied"),
        MemoryError(),
        RuntimeError("a bug"),
    ],
)
def test_a_failed_write_is_every_ranks_error_at_the_next_step(tmp_path, world, savers, ranks, monkeypatch, error):
    first = ranks.run(4, lambda rank: savers[rank].acquire("job", 0))
    assert first == [None] * 4
    with monkeypatch.context() as patched:
        OneRankFails(patched, error)
        begin(world, savers, ranks, step=2)
        errors = steps(world, savers, ranks)
    assert {type(found) for found in errors} == {CheckpointError}
    assert len({str(found) for found in errors}) == 1
    assert str(errors[0]).startswith("rank 1: ")
    assert str(error) in str(errors[0])
    assert sorted(os.listdir(tmp_path)) == ["owner.json"]
    begin(world, savers, ranks, step=3)  # the run may go on
    assert set(steps(world, savers, ranks)) == {tmp_path / "step-00000003"}


def test_the_wait_at_the_end_hears_of_a_failure_too(tmp_path, world, savers, ranks, monkeypatch):
    ranks.run(4, lambda rank: savers[rank].acquire("job", 0))
    monkeypatch.setattr(container.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    assert begin(world, savers, ranks) == [None] * 4
    errors = ranks.run(4, lambda rank: savers[rank].settle())
    assert {str(found) for found in errors} == {str(errors[0])}
    assert "cannot write" in str(errors[0])
    assert committed(tmp_path) == []


@pytest.mark.parametrize("vanished", ["the partial folder", "all checkpoints"])
def test_a_folder_that_vanishes_while_it_is_written(tmp_path, world, ranks, gate, vanished):
    folder = tmp_path / "checkpoints"
    savers = [Saver(folder, groups) for groups in world.groups]
    begin(world, savers, ranks)
    (partial,) = folder.glob(".step-*")
    doomed = folder if vanished == "all checkpoints" else partial
    while doomed.exists():  # a writer may still be opening its file there
        shutil.rmtree(doomed, ignore_errors=True)
    gate.set()
    errors = steps(world, savers, ranks)
    assert {type(found) for found in errors} == {CheckpointError}
    assert len({str(found) for found in errors}) == 1


def test_another_start_of_the_run_is_told_apart_from_a_disk_that_fails(tmp_path, world, savers, ranks, gate):
    begin(world, savers, ranks)
    (tmp_path / "owner.json").write_text('{"job": "job", "attempt": 1}')
    gate.set()
    assert {type(found) for found in steps(world, savers, ranks)} == {Superseded}
    assert not list(tmp_path.glob("*step-*"))


def test_a_rank_whose_files_a_newer_start_has_swept_away_says_that_it_was_superseded(
    tmp_path, world, savers, ranks, gate
):
    begin(world, savers, ranks)
    (partial,) = tmp_path.glob(".step-*")
    acquire(tmp_path, Owner("job", 1))  # sweeps
    assert not partial.exists()
    gate.set()
    errors = steps(world, savers, ranks)
    assert {type(found) for found in errors} == {Superseded}
    assert "job 'job' attempt 1" in str(errors[0])
    assert "mend the file system" not in str(errors[0])


def test_what_is_read_back_otherwise_is_not_committed(tmp_path, world, savers, ranks, monkeypatch):
    monkeypatch.setattr(container, "file_digest", lambda path: "0" * 16)
    begin(world, savers, ranks)
    assert "it reads otherwise than it was written" in str(steps(world, savers, ranks)[0])
    assert committed(tmp_path) == []


def test_what_follows_a_commit_runs_once_and_cannot_undo_it(tmp_path, world, ranks):
    called = []

    def after(path):
        called.append(path)
        raise OSError("cannot remove an older one")

    savers = [Saver(tmp_path, groups, after) for groups in world.groups]
    begin(world, savers, ranks)
    assert set(steps(world, savers, ranks)) == {tmp_path / "step-00000001"}
    assert called == [tmp_path / "step-00000001"]


def test_a_rank_that_ends_in_an_error_gives_its_write_up(tmp_path, world, savers, ranks, gate):
    begin(world, savers, ranks)
    threading.Timer(0.05, gate.set).start()
    for each in savers:
        each.abandon()
    assert committed(tmp_path) == []
    begin(world, savers, ranks)
    assert set(steps(world, savers, ranks)) == {tmp_path / "step-00000001"}


def test_memory_is_one_copy_taken_before_the_first_save(tmp_path):
    """The host buffer is one copy; beside it, writing takes a few chunks (counted by tracemalloc: bytes, numpy)."""
    specs = [ParameterSpec(f"layers.{n}.weight", (1024, 1024)) for n in range(4)]
    world = World(layout_of(1, 1, 1), 3, specs)
    world.fill(random_state(specs, 1))
    shard_bytes = 3 * 4 * 4 * 1024 * 1024
    buffer = HostBuffer()
    saver.reserve_for(world.shards[0], world.placements[0], Writer(0, 0, 0), 1, buffer)
    taken = buffer.reserve(0).untyped_storage()
    assert taken.nbytes() == shard_bytes
    saves = []

    def save():
        saves.append(stage_shards(world.shards[0], world.placements[0], Writer(0, 0, 0), 1, buffer))
        folder = tmp_path / str(len(saves))
        folder.mkdir()
        write_staged(saves[-1], folder, 1)

    assert traced_peak(save) < 0.5 * shard_bytes
    assert buffer.reserve(0).untyped_storage().data_ptr() == taken.data_ptr()
    for staged in saves:
        assert np.shares_memory(staged.data, buffer.reserve(shard_bytes // 4).numpy())
