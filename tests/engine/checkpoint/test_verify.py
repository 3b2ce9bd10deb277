"""Damage of every kind is found and named, and the walk back finds the newest checkpoint that is whole."""

import logging
import shutil
import struct

import pytest

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import committed
from engine.checkpoint.load import Files
from engine.checkpoint.verify import is_whole, verify, verify_files
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import World, fake_groups, layout_of, random_state, small_model, some_state

ALONE = fake_groups(layout_of(1, 1, 1), 0)
FILE = "stage-01-data-0001-tensor-00.safetensors"


@pytest.fixture
def checkpoints(tmp_path):
    """Four checkpoints, newest first."""
    world = World(layout_of(2, 2, 1), 3, small_model())
    paths = []
    for step in (10, 20, 30, 40):
        world.fill(random_state(world.specs, step))
        paths.insert(0, world.save(tmp_path, some_state(step)))
    return paths


def newest_verified(folder, groups):
    """The walk back of a restart."""
    return next((path for path in committed(folder) if is_whole(path, groups)), None)


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x04
    path.write_bytes(raw)


def first_data_byte(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a missing manifest": (lambda c: (c / manifest_json.FILE).unlink(), manifest_json.FILE, "there is none"),
    "a manifest cut short": (lambda c: cut_half(c / manifest_json.FILE), manifest_json.FILE, "not JSON"),
    "a flipped byte of the manifest": (
        lambda c: flip_number(c / manifest_json.FILE),
        manifest_json.FILE,
        "its own hash",
    ),
    "a missing file": (lambda c: (c / FILE).unlink(), FILE, "cannot be read"),
    "a file cut short": (lambda c: cut(c / FILE), FILE, "the manifest says"),
    "an empty file": (lambda c: (c / FILE).write_bytes(b""), FILE, "0 bytes, the manifest says"),
    "a flipped first byte": (lambda c: flip(c / FILE, 0), FILE, "header"),
    "a flipped byte of data": (lambda c: flip(c / FILE, first_data_byte(c / FILE)), FILE, "in model."),
    "a flipped last byte": (lambda c: flip(c / FILE, -1), FILE, "in optim.exp_avg_sq."),
}


def cut_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_number(path):
    path.write_text(path.read_text().replace('"tokens": 25600', '"tokens": 25601'))


def test_a_file_that_goes_while_its_damage_is_looked_for_is_told(checkpoints, monkeypatch):
    """As where another process prunes meanwhile."""
    path, check_file = checkpoints[0] / FILE, Files.check_file
    flip(path, -1)

    def check_and_lose(files, name):
        check_file(files, name)
        if name == FILE:
            path.unlink()

    monkeypatch.setattr(Files, "check_file", check_and_lose)
    [found] = verify(checkpoints[0])
    assert found.file == FILE
    assert "cannot be read (No such file or directory)" in found.what


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over(checkpoints, damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    harm, file, what = DAMAGES[damage]
    newest, older, *_ = checkpoints
    assert verify(newest) == []
    assert newest_verified(newest.parent, ALONE) == newest
    harm(newest)
    (found,) = verify(newest)
    assert found.file == file
    assert what in found.what
    assert str(newest.parent) not in str(found), "the file is named without its whole path"
    with caplog.at_level(logging.WARNING, logger="palimpsest"):
        assert newest_verified(newest.parent, ALONE) == older
    assert f"{newest.name} is damaged and passed over: {file}: " in caplog.text


def test_every_byte_of_a_file_counts(checkpoints):
    path = checkpoints[0] / FILE
    manifest = manifest_json.read(checkpoints[0])
    for at in range(0, path.stat().st_size, 61):
        flip(path, at)
        assert [damage.file for damage in verify_files(checkpoints[0], manifest, [FILE])] == [FILE]
        flip(path, at)
    assert verify(checkpoints[0]) == []


def test_a_byte_of_padding_in_a_header_is_found_by_the_hash_of_the_file(checkpoints):
    path = checkpoints[0] / FILE
    raw = bytearray(path.read_bytes())
    space = raw.rfind(b" ", 8, first_data_byte(path))
    assert space > 0, "this header ends on a multiple of 8: change the model a little"
    raw[space] = ord("\n")  # nothing that JSON would see
    path.write_bytes(raw)
    (found,) = verify(checkpoints[0])
    assert "in its header" in found.what


def test_all_damaged_files_are_named(checkpoints):
    for path in checkpoints[0].glob("*.safetensors"):
        cut(path)
    assert len(verify(checkpoints[0])) == 4


def test_the_walk_goes_back_as_far_as_it_must_and_ends_in_none(checkpoints):
    folder = checkpoints[0].parent
    for path, expected in zip(checkpoints, [*checkpoints[1:], None], strict=True):
        flip(path / FILE, -1)
        assert newest_verified(folder, ALONE) == expected
    assert newest_verified(folder / "absent", ALONE) is None


def test_ranks_share_the_reading_and_agree(checkpoints, monkeypatch):
    folder, layout = checkpoints[0].parent, layout_of(1, 3, 1)
    ranks = ThreadedRanks(monkeypatch)
    assert set(ranks.run(3, lambda rank: newest_verified(folder, fake_groups(layout, rank)))) == {checkpoints[0]}
    flip(checkpoints[0] / FILE, -1)
    assert set(ranks.run(3, lambda rank: newest_verified(folder, fake_groups(layout, rank)))) == {checkpoints[1]}


def test_a_torn_save_is_no_checkpoint(checkpoints):
    newest = checkpoints[0]
    shutil.copytree(newest, newest.parent / ".step-00000050.job-0.partial")
    assert newest_verified(newest.parent, ALONE) == newest


def test_a_watcher_sees_every_file(checkpoints):
    seen = []

    def watch(names):
        for name in names:
            seen.append(name)
            yield name

    verify(checkpoints[0], watch)
    assert sorted(seen) == sorted(path.name for path in checkpoints[0].glob("*.safetensors"))
