"""Generations in the memory of nodes that are threads of one process: what they outlive, and what is refused."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from dataclasses import replace

import pytest

from engine.checkpoint.folder import Superseded, committed, step_of, step_path
from engine.checkpoint.load import load
from engine.checkpoint.node_memory import node_folder, node_store, passing
from engine.checkpoint.node_memory.node_store import NodeStore
from engine.checkpoint.node_memory.recall import Eligibility, Recall
from engine.checkpoint.saver import Saver
from engine.config.rank_environment import RankEnvironment
from engine.errors import CheckpointError, EnvironmentProblem
from engine.parallel.groups import Group
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state

LINE = Eligibility(frozenset({some_state().config_hash}), "job", 0, 0)


@pytest.fixture
def ranks(monkeypatch):
    return ThreadedRanks(monkeypatch)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    caplog.set_level(logging.INFO, logger="palimpsest")
    return caplog


def groups_of(lines, rank):
    """Groups without handles: threads need none."""
    groups = [tuple(sorted(line)) for line in lines]
    return [Group(line, line.index(rank)) if rank in line else None for line in groups]


class Job:
    """A world whose ranks keep generations; node numbers by rank in `on`."""

    def __init__(self, base, ranks, layout=(2, 2, 1), on=(0, 0, 1, 1), attempt=0, job="job", run="run"):
        self.world = World(layout_of(*layout), 3, small_model())
        self.ranks, self.attempt, self.job = ranks, attempt, job
        self.base, self.on, self.run_folder = base, on, base.parent / run
        self.size = self.world.layout.world_size
        self.savers = [Saver(self.run_folder / "checkpoints", groups) for groups in self.world.groups]
        self.stores = self.all(self._store)

    def _store(self, rank):
        environment = RankEnvironment(rank, self.size, node_rank=self.on[rank], job=self.job, attempt=self.attempt)
        store = NodeStore(self.base, self.run_folder, self.world.groups[rank], environment, groups_of)
        store.acquire()
        return store

    def all(self, function):
        """What every rank returns; raises where all raise the same."""
        results = self.ranks.run(self.size, function)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            assert len(errors) == self.size, results
            assert len({str(error) for error in errors}) == 1, "fail on all or on none, and in the same words"
            raise errors[0]
        return results

    def keep(self, step):
        self.world.fill(random_state(self.world.specs, step))

        def one(rank):
            shards, placements = self.world.shards[rank], self.world.placements_of(rank)
            saver = self.savers[rank]
            saver.begin(shards, placements, some_state(step), self.job, self.attempt, self.stores[rank])
            return saver.settle()

        return self.all(one)

    def folder(self, node):
        return node_folder.folder_of(self.base, self.run_folder, node)

    def steps(self, node):
        return [step_of(path) for path in committed(self.folder(node))]

    def recall(self, line=LINE):
        """The step that the run goes on from, loaded and checked; None without one."""

        def one(rank):
            shards, placements = self.world.shards[rank], self.world.placements_of(rank)
            found = Recall(self.stores[rank]).newest(line, shards)
            if found is not None:
                load(found, self.world.groups[rank], shards, placements, spread=True)
            return found

        found = self.all(one)
        if found[0] is None:
            assert set(found) == {None}
            return None
        (step,) = {step_of(path) for path in found}
        self.world.check(random_state(self.world.specs, step))
        return step


@pytest.fixture
def base(tmp_path):
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def test_each_node_holds_its_own_files_and_those_of_the_node_before(base, ranks):
    job = Job(base, ranks, on=(0, 1, 2, 2))
    job.keep(1)
    own = [{job.world.writers[rank].file_name for rank in node} for node in ((0,), (1,), (2, 3))]
    for node in range(3):
        path = step_path(job.folder(node), 1)
        assert {file.name for file in path.iterdir()} == own[node] | own[node - 1] | {"manifest.json"}


def test_one_generation_is_whole_everywhere_before_the_older_one_goes(base, ranks, monkeypatch):
    job = Job(base, ranks)
    seen, real = [], node_store.committed

    def look(folder):
        seen.append((job.steps(0), job.steps(1)))
        return real(folder)

    monkeypatch.setattr(node_store, "committed", look)
    for step in (1, 2, 3):
        job.keep(step)
    job.all(lambda rank: job.stores[rank]._dropping and job.stores[rank]._dropping.result())
    assert job.steps(0) == job.steps(1) == [3]
    for step, (first, second) in zip((1, 1, 2, 2, 3, 3), seen, strict=True):
        assert step in first, seen
        assert step in second, seen
        assert len(first) <= 2, "two generations at the most"
        assert len(second) <= 2


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 4, 1), (2, 1, 2)], ids=str)
def test_every_loss_of_nodes_into_the_same_or_another_layout(base, ranks, layout, said):
    """Four nodes of one rank: what is left recalls the generation unless two neighbours are gone."""
    Job(base, ranks, on=range(4)).keep(7)
    kept = base.parent / "kept"
    shutil.copytree(base, kept)
    for gone in itertools.product((False, True), repeat=4):
        shutil.rmtree(base)
        shutil.copytree(kept, base)
        job = Job(base, ranks, layout, on=range(4), attempt=1)
        for node in range(4):
            if gone[node]:
                shutil.rmtree(step_path(job.folder(node), 7))
        said.clear()
        side_by_side = any(gone[node] and gone[(node + 1) % 4] for node in range(4))
        assert job.recall() == (None if side_by_side else 7), gone
        assert ("are on no node" in said.text) == (side_by_side and not all(gone))


def test_fewer_and_uneven_nodes_go_on(base, ranks):
    Job(base, ranks, on=(0, 0, 1, 1)).keep(3)
    shutil.rmtree(Job(base, ranks, on=(0, 0, 1, 1), attempt=1).folder(1))
    assert Job(base, ranks, (1, 3, 1), on=(0, 0, 1), attempt=2).recall() == 3
    assert Job(base, ranks, (1, 1, 1), on=(0,), attempt=3).recall() == 3


def test_a_node_alone_outlives_its_processes(base, ranks, said):
    job = Job(base, ranks, on=(0, 0, 0, 0))
    job.keep(2)
    assert "outlive its processes, not the node" in said.text
    assert Job(base, ranks, on=(0, 0, 0, 0), attempt=1).recall() == 2


def harm(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_damage_is_mended_from_the_other_copy_and_without_one_passed_over(base, ranks, said):
    job = Job(base, ranks)
    job.keep(4)
    name = job.world.writers[1].file_name
    harm(step_path(job.folder(0), 4) / name)
    assert Job(base, ranks, attempt=1).recall() == 4
    assert f"node 0: step 4 in memory, {name}: bytes in" in said.text
    assert (step_path(job.folder(0), 4) / name).read_bytes() == (step_path(job.folder(1), 4) / name).read_bytes()
    for node in (0, 1):
        harm(step_path(job.folder(node), 4) / name)
    assert Job(base, ranks, attempt=2).recall() is None
    assert f"1 of its 4 files are on no node and unharmed: {name}" in said.text


def test_a_damaged_manifest_is_as_good_as_none(base, ranks, said):
    job = Job(base, ranks)
    job.keep(4)
    (step_path(job.folder(0), 4) / "manifest.json").write_text("{")
    assert Job(base, ranks, attempt=1).recall() == 4
    (step_path(job.folder(1), 4) / "manifest.json").write_text("{")
    (step_path(job.folder(0), 4) / "manifest.json").write_text("{")
    assert Job(base, ranks, attempt=2).recall() is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"meanings": frozenset({"another"})}, "and configuration another"),
        ({"job": "another"}, "job 'another'"),
        ({"least_attempt": 1}, "attempt 1 has saved to the disk since"),
    ],
)
def test_what_is_of_another_line_is_left_and_said(base, ranks, said, change, what):
    Job(base, ranks).keep(4)
    job = Job(base, ranks, attempt=1)
    assert job.recall(replace(LINE, **change)) is None
    assert what in said.text
    assert job.steps(0) == [4]


def test_what_the_disk_has_too_is_not_looked_at(base, ranks, said):
    Job(base, ranks).keep(4)
    job = Job(base, ranks, attempt=1)
    assert job.recall(replace(LINE, least_step=5)) is None
    assert "passed over" not in said.text
    assert job.recall(replace(LINE, least_step=4)) == 4


def test_an_older_attempt_cannot_overwrite(base, ranks):
    old = Job(base, ranks)
    old.keep(4)
    new = Job(base, ranks, attempt=1)
    with pytest.raises(Superseded, match="attempt 1"):
        old.keep(5)
    assert new.steps(0) == new.steps(1) == [4]
    with pytest.raises(Superseded, match="attempt 1"):
        Job(base, ranks, attempt=0)


def test_a_file_that_arrives_otherwise_than_it_was_sent_fails_everywhere_and_leaves_the_older(base, ranks, monkeypatch):
    job = Job(base, ranks)
    job.keep(4)
    real = passing.accept

    def accept(path, record):
        if record.name == job.world.writers[2].file_name:
            harm(path)
        real(path, record)

    monkeypatch.setattr(passing, "accept", accept)
    with pytest.raises(CheckpointError, match="came from another node with other bytes"):
        job.keep(5)
    monkeypatch.undo()
    assert job.steps(0) == job.steps(1) == [4]
    assert not list(base.glob("*/.step-*"))
    ThreadedRanks(monkeypatch)


def test_room_is_asked_for_at_the_start_and_for_each_generation(base, ranks, monkeypatch):
    job = Job(base, ranks)
    job.all(lambda rank: job.stores[rank].check_room(1000))
    with pytest.raises(EnvironmentProblem, match=r"and two generations of checkpoint.memory take [\d,]+ on this node"):
        job.all(lambda rank: job.stores[rank].check_room(1 << 60))
    monkeypatch.setattr(node_store, "free_bytes", lambda folder: 10)
    with pytest.raises(CheckpointError, match=r"a generation takes [\d,]+ bytes on this node, 10 are free"):
        job.keep(1)
    assert not list(base.glob("*/.step-*"))


def test_headers_are_never_longer_than_the_room_taken_for_them(base, ranks, monkeypatch):
    taken, real = {}, passing.start_receiving

    def start_receiving(path, num_bytes, group, position):
        taken[path.name] = (num_bytes, path.stat().st_size)
        return real(path, num_bytes, group, position)

    monkeypatch.setattr(passing, "start_receiving", start_receiving)
    Job(base, ranks).keep(1)
    assert len(taken) == 4
    for used, room in taken.values():
        assert used <= room


def test_memory_that_is_not_there_or_not_ones_own_is_refused(base, ranks):
    with pytest.raises(EnvironmentProblem, match="is no folder on this node"):
        Job(base / "absent", ranks)
    folder = node_folder.folder_of(base, base.parent / "run", 0)
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(EnvironmentProblem, match="this user alone"):
        Job(base, ranks)
    folder.rmdir()
    folder.symlink_to(base.parent)
    with pytest.raises(EnvironmentProblem, match="this user alone"):
        Job(base, ranks)


def test_folders_of_runs_that_are_gone_are_named_and_left(base, ranks, said):
    other = Job(base, ranks, job="other", run="other-run")
    other.keep(1)
    said.clear()
    mine = Job(base, ranks)
    assert "whose processes are gone" not in said.text, "the other one lives"
    for store in other.stores:
        if store._lock:
            store._lock.close()
    said.clear()
    mine = Job(base, ranks, attempt=1)
    assert f"{other.folder(0)} holds" in said.text
    assert "job other, whose processes are gone: remove it" in said.text
    assert mine.recall() is None
    assert other.steps(0) == [1]
    assert json.loads((mine.folder(1) / "run.json").read_text())["job"] == "job"


def test_at_the_end_the_memory_is_given_back(base, ranks):
    job = Job(base, ranks)
    job.keep(1)
    job.all(lambda rank: job.stores[rank].keep_only(None))
    assert job.steps(0) == job.steps(1) == []
    job.keep(2)
    job.all(lambda rank: job.stores[rank].end())
    assert os.listdir(base) == []
