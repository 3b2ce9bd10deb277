"""Files beside the checkpoints: verified with those that name them, and removed when none does any more."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.checkpoint.container import file_digest
from engine.checkpoint.folder import committed, step_of
from engine.checkpoint.named_files import FOLDER, named_by
from engine.checkpoint.retention import Retention, prune
from engine.checkpoint.verify import is_whole, verify
from engine.errors import CheckpointError
from tests.engine.checkpoint.worlds import World, fake_groups, layout_of, random_state, small_model, some_state

ALONE = fake_groups(layout_of(1, 1, 1), 0)


def put(folder: Path, name: str) -> list:
    path = folder / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"content of {name}")
    return [name, path.stat().st_size, file_digest(path)]


@pytest.fixture
def folder(tmp_path):
    """Checkpoints 1 to 4, which name a base file and one more delta each, the last one a base alone."""
    world, named = World(layout_of(1, 1, 1), 1, small_model()), []
    for step in range(1, 5):
        named = [put(tmp_path, f"base-{step}")] if step in (1, 4) else [*named, put(tmp_path, f"delta-{step}")]
        world.fill(random_state(world.specs, step))
        world.save(
            tmp_path, replace(some_state(step), sections={"reservoir": {"files": named}, "progress": {"step": 1}})
        )
    return tmp_path


def names(folder):
    return sorted(path.name for path in (folder / FOLDER).iterdir())


def grow_old(folder):
    """Give each file the time of the step that wrote it."""
    for path in (folder / FOLDER).iterdir():
        step = int(path.name[-1])
        os.utime(path, (step, step))


def test_a_file_goes_with_the_last_checkpoint_that_names_it(folder):
    grow_old(folder)
    newest = committed(folder)[0]
    assert [step_of(path) for path in prune(folder, Retention(2), newest)] == [1, 2]
    assert names(folder) == ["base-1", "base-4", "delta-2", "delta-3"]
    prune(folder, Retention(1), newest)
    assert names(folder) == ["base-4"]


def test_a_file_that_is_younger_than_those_of_the_newest_checkpoint_stays(folder):
    put(folder, "delta-5")  # of a save in flight
    put(folder, "given-up-0")
    grow_old(folder)
    prune(folder, Retention(1), committed(folder)[0])
    assert names(folder) == ["base-4", "delta-5"]


def test_nothing_is_removed_where_a_manifest_cannot_be_read(folder):
    grow_old(folder)
    (committed(folder)[1] / "manifest.json").write_text("{")
    prune(folder, Retention(2), committed(folder)[0])
    assert names(folder) == ["base-1", "base-4", "delta-2", "delta-3"]


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "not those that were written"),
    ],
)
def test_verifying_a_checkpoint_verifies_the_files_that_it_names(folder, damage, wrong):
    newest_first = committed(folder)
    assert not any(map(verify, newest_first))
    damage(folder / FOLDER / "delta-2")
    found = {step_of(path): verify(path) for path in newest_first}
    assert [step for step, damages in sorted(found.items()) if damages] == [2, 3]
    assert str(found[3][0]).startswith(f"{FOLDER}/delta-2: ")
    assert wrong in str(found[3][0])
    assert [is_whole(path, ALONE) for path in newest_first] == [True, False, False, True]


@pytest.mark.parametrize("files", [[["../other", 1, "0"]], [["name"]], 3])
def test_a_section_that_names_no_files_is_refused(files):
    with pytest.raises(CheckpointError, match="section reservoir of the checkpoint names no files"):
        named_by({"reservoir": {"files": files}})
