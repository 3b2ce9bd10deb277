"""Hostile checkpoints: whatever a manifest or a header claims, it is refused as a `CheckpointError`, or it is true.

Values of a real manifest are replaced at random, with its own hash made right again, so that only the checks of what
it claims stand in the way; and bytes of manifest and headers are changed at random. Memory is counted throughout.
"""

import copy
import json
import os
import random
import shutil
import struct

import pytest

from engine.checkpoint import manifest_json
from engine.checkpoint.load import Files, load_shards, open_checkpoint, read_weights
from engine.errors import CheckpointError
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state
from tests.memory import traced_peak

LARGEST_BYTES = 16 << 20
"""More than reading this manifest, its files and its weights takes by far, and less than any lie asks for."""
HOSTILE = (
    *(0, 1, -1, 2, 3, 1 << 31, 1 << 40, 1 << 62, 1 << 200, -(1 << 63), 0.5, 1e308, True, None),
    *("", "..", "../../etc/passwd", "/etc/passwd", "stage-00-data-0000-tensor-00.safetensors", "\x00", "F32", "é" * 50),
    *([], {}, [1 << 40], [[]], {"a": {}}, [1 << 33, 1 << 33], [0, 0], [-1, 6]),
    "stage-99-data-0000-tensor-00.safetensors",
)


@pytest.fixture
def saved(tmp_path):
    world = World(layout_of(2, 2, 2), 1, small_model())
    world.fill(random_state(world.specs, 0))
    return world.save(tmp_path, some_state())


def places(value, path=()):
    """Every place of a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def change(content, draw):
    """The manifest with something else in one to three places."""
    changed = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        found = [path for path in places(changed) if path and path[0] not in ("config", "sections", "versions")]
        *parents, last = draw.choice(found)
        owner = changed
        for key in parents:
            owner = owner[key]
        action = draw.random()
        if action < 0.7:
            owner[last] = copy.deepcopy(draw.choice(HOSTILE))
        elif action < 0.85:
            del owner[last]
        elif isinstance(owner, list):
            owner.append(copy.deepcopy(owner[last]))
        else:
            owner[str(draw.choice(HOSTILE))] = copy.deepcopy(owner[last])
    return changed


def write(folder, content):
    content = {name: value for name, value in content.items() if name != "xxh3"}
    content["xxh3"] = manifest_json.content_hash(content)
    (folder / manifest_json.FILE).write_text(json.dumps(content), encoding="utf-8")


def try_to_load(folder):
    """Whether all of it was believed; then every element came from the files."""
    try:
        manifest = open_checkpoint(folder)
        Files(folder, manifest).check_all()
        read_weights(folder)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("number", [120, pytest.param(1000, marks=pytest.mark.matrix)])
def test_no_claim_of_a_manifest_is_believed_unless_it_is_true(saved, number):
    draw, believed = random.Random(7), 0
    content = json.loads((saved / manifest_json.FILE).read_text())
    for _ in range(number):
        write(saved, change(content, draw))
        verdicts = []
        peak = traced_peak(lambda: verdicts.append(try_to_load(saved)), at_most=LARGEST_BYTES)  # noqa: B023
        assert peak < LARGEST_BYTES
        assert len(set(verdicts)) == 1
        believed += verdicts[0]
    assert 0 < believed < number // 2, "some changes say nothing of the tensors (a step, a hash of the configuration)"


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.matrix)])
def test_no_byte_of_a_manifest_or_a_header_can_do_more_than_be_refused(saved, tmp_path, number):
    draw = random.Random(8)
    names = [manifest_json.FILE, *(path.name for path in saved.glob("*.safetensors"))]
    for _ in range(number):
        folder = tmp_path / "copy"
        shutil.copytree(saved, folder)
        path = folder / draw.choice(names)
        raw = bytearray(path.read_bytes())
        header = len(raw) if path.name == manifest_json.FILE else 8 + struct.unpack("<Q", raw[:8])[0]
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(raw)
        try_to_load(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["manifest.json", "stage-00-data-0000-tensor-00.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_opened(saved, tmp_path, name, kind):
    path = saved / name
    elsewhere = path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: it is a link or no plain file"):
        read_weights(saved)


def test_a_manifest_of_unreasonable_size_is_not_read(saved):
    os.truncate(saved / manifest_json.FILE, manifest_json.MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than"):
        open_checkpoint(saved)


def test_names_cannot_leave_the_folder(saved):
    content = json.loads((saved / manifest_json.FILE).read_text())
    for name in ("../x.safetensors", "/etc/passwd", "a/b", "..", "stage-00-data-0000-tensor-00.safetensors/../x", ""):
        changed = copy.deepcopy(content)
        changed["files"][0][0] = name
        write(saved, changed)
        with pytest.raises(CheckpointError, match="is no file of this layout"):
            open_checkpoint(saved)


def test_loading_opens_no_pickle(saved, monkeypatch):
    import pickle

    import torch

    def refuse(*arguments, **options):
        raise AssertionError("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    world = World(layout_of(1, 1, 1), 3, small_model())
    load_shards(saved, open_checkpoint(saved), world.shards[0])
    world.check(random_state(world.specs, 0))
