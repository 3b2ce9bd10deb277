"""Names, ownership, and what is left of saves that were killed at any moment."""

import json
import os

import pytest

from engine.checkpoint import folder as folders
from engine.checkpoint.folder import (
    Owner,
    acquire,
    check_owner,
    committed,
    find,
    owner_of,
    partial_path,
    publish,
    remove,
    step_of,
    step_path,
    sweep,
)
from engine.errors import CheckpointError


def make(folder, content="x"):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    return folder


def test_committed_are_newest_first_and_nothing_else_counts(tmp_path):
    for step in (5, 123456789, 20):
        make(step_path(tmp_path, step))
    for name in (".step-00000030.job-0.partial", "step-7", "step-0000004x", ".step-00000001.removed"):
        make(tmp_path / name)
    claim_file = tmp_path / "owner.json"
    claim_file.write_text("{}")
    assert [step_of(path) for path in committed(tmp_path)] == [123456789, 20, 5]
    assert committed(tmp_path / "absent") == []


def test_partial_names_hold_whatever_a_job_is_called(tmp_path):
    path = partial_path(tmp_path, 3, Owner("../a b/[7]", 2))
    assert path.parent == tmp_path
    assert path.name == ".step-00000003..._a_b__7_-2.partial"


def test_an_older_attempt_cannot_claim(tmp_path):
    acquire(tmp_path, Owner("job", 3))
    with pytest.raises(CheckpointError, match=r"belongs to job 'job' attempt 3, this is job 'job' attempt 2") as caught:
        acquire(tmp_path, Owner("job", 2))
    assert "goes on elsewhere" in caught.value.remedy
    assert owner_of(tmp_path) == Owner("job", 3)


def test_another_job_takes_over_and_the_first_loses_the_right(tmp_path):
    acquire(tmp_path, Owner("first", 9))
    acquire(tmp_path, Owner("second", 0))
    check_owner(tmp_path, Owner("second", 0))
    with pytest.raises(CheckpointError, match="belongs to job 'second' attempt 0"):
        check_owner(tmp_path, Owner("first", 9))


def test_without_a_readable_claim_nobody_may_commit_but_anybody_may_claim(tmp_path):
    (tmp_path / "owner.json").write_text("{torn")
    with pytest.raises(CheckpointError, match="belongs to nobody"):
        check_owner(tmp_path, Owner("job", 0))
    acquire(tmp_path, Owner("job", 0))
    check_owner(tmp_path, Owner("job", 0))


def test_publish_puts_in_place_and_replaces(tmp_path):
    target = step_path(tmp_path, 1)
    publish(make(tmp_path / ".step-00000001.a-0.partial", "old"), target)
    publish(make(tmp_path / ".step-00000001.a-1.partial", "new"), target)
    assert (target / "manifest.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_replacement_killed_between_its_two_moves_loses_nothing(tmp_path, monkeypatch):
    target = step_path(tmp_path, 1)
    make(target, "old")
    partial = make(tmp_path / ".step-00000001.a-1.partial", "new")
    real, moves = type(target).rename, []

    def rename(self, to):
        moves.append(to)
        if len(moves) == 2:
            raise KeyboardInterrupt  # as a kill would
        return real(self, to)

    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        publish(partial, target)
    monkeypatch.undo()
    assert committed(tmp_path) == []
    sweep(tmp_path)
    assert (target / "manifest.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_claim_clears_what_a_killed_start_left(tmp_path):
    make(tmp_path / ".step-00000002.job-0.partial")
    make(tmp_path / ".step-00000001.removed")
    make(tmp_path / ".step-00000003.replaced", "old")
    make(step_path(tmp_path, 3), "new")
    (tmp_path / "notes.txt").write_text("mine")
    acquire(tmp_path, Owner("job", 1))
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "owner.json", "step-00000003"]
    assert (step_path(tmp_path, 3) / "manifest.json").read_text() == "new"
    assert json.loads((tmp_path / "owner.json").read_text()) == {"job": "job", "attempt": 1}


def test_removal_is_never_seen_half_done(tmp_path, monkeypatch):
    path = make(step_path(tmp_path, 1))
    real = folders.shutil.rmtree

    def rmtree(doomed, ignore_errors=False):
        if not ignore_errors:
            assert committed(tmp_path) == [], "it has left the committed before its first file goes"
        real(doomed, ignore_errors=ignore_errors)

    monkeypatch.setattr(folders.shutil, "rmtree", rmtree)
    remove(path)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_is_a_checkpoint_error(tmp_path, monkeypatch):
    def refuse(self, to):
        raise PermissionError(13, "Permission denied")

    path = make(step_path(tmp_path, 1))
    monkeypatch.setattr(type(path), "rename", refuse)
    with pytest.raises(CheckpointError, match="cannot write"):
        remove(path)


def test_what_another_process_removed_is_gone_and_no_error(tmp_path):
    remove(step_path(tmp_path, 1))
    assert os.listdir(tmp_path) == []


def test_find_takes_a_run_its_folder_or_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    path = make(step_path(run / "checkpoints", 4))
    assert find(run) == find(run / "checkpoints") == find(path) == [path]
    with pytest.raises(CheckpointError, match="holds no checkpoint") as caught:
        find(tmp_path)
    assert "run folder" in caught.value.allowed
    assert caught.value.remedy
