"""The manifest as JSON: comes back as it was, does not grow with ranks, and no lie of it is believed."""

import dataclasses
import json
import pickle

import pytest

from engine.checkpoint import manifest_json
from engine.checkpoint.container import FileRecord
from engine.checkpoint.folder import Owner
from engine.checkpoint.load import open_checkpoint, read_weights
from engine.checkpoint.manifest import Manifest, join_placements
from engine.checkpoint.stores import StageTable, build_manifest
from engine.checkpoint.writers import Writer
from engine.errors import CheckpointError
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state


def make(folder, layout=(2, 2, 2), zero_stage=3):
    world = World(layout_of(*layout), zero_stage, small_model())
    world.fill(random_state(world.specs, 0))
    return world.save(folder, some_state())


@pytest.fixture
def saved(tmp_path):
    return make(tmp_path)


def tamper(path, change):
    """Changes a manifest and gives it a valid hash again: a liar, not an accident."""
    where = path / manifest_json.FILE
    content = json.loads(where.read_text())
    del content["xxh3"]
    change(content)
    content["xxh3"] = manifest_json.content_hash(content)
    where.write_text(json.dumps(content))


def test_it_comes_back_as_it_was(saved):
    manifest = manifest_json.read(saved)
    world = World(layout_of(2, 2, 2), 3, small_model())
    assert manifest.placements == join_placements(world.placements)
    assert manifest.layout == world.layout
    state = dataclasses.replace(some_state(), hyperparameters={spec.name: {"lr": 0.1} for spec in world.specs})
    assert manifest.state == state
    assert manifest.moments == ("exp_avg", "exp_avg_sq")
    assert (manifest.job, manifest.attempt) == ("job", 0)
    assert manifest_json.render(manifest) == (saved / manifest_json.FILE).read_text()


def test_the_hash_is_of_the_canonical_json(saved):
    content = json.loads((saved / manifest_json.FILE).read_text())
    claimed = content.pop("xxh3")
    assert claimed == manifest_json.content_hash(dict(reversed(content.items())))


def of_world(data):
    world = World(layout_of(1, data, 1), 3, small_model())
    files = {
        w.file_name: FileRecord(w.file_name, 10**12, "f" * 16) for w in map(Writer, [0] * data, range(data), [0] * data)
    }
    manifest = build_manifest(some_state(), world.layout, [StageTable(world.placements[0], {})], [], Owner("j", 0))
    return dataclasses.replace(manifest, files=files)


def test_only_the_list_of_files_grows_with_ranks():
    small, large = (manifest_json.render(of_world(data)) for data in (2, 256))
    few, many = json.loads(small), json.loads(large)
    assert few["parameters"].keys() == many["parameters"].keys()
    assert len(json.dumps(many["parameters"])) <= len(json.dumps(few["parameters"]))
    assert len(large) - len(small) <= 254 * 150, "one line of at most 150 bytes per writer"


def test_every_flipped_bit_pattern_of_the_manifest_is_noticed(saved):
    where = saved / manifest_json.FILE
    raw = where.read_bytes()
    content = json.loads(raw)
    for at in range(0, len(raw), 41):
        flipped = bytearray(raw)
        flipped[at] ^= 0x01
        where.write_bytes(flipped)
        try:
            same = json.loads(flipped) == content
        except ValueError:
            same = False
        if not same:
            with pytest.raises(CheckpointError):
                manifest_json.read(saved)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "there is none: the save was not finished"),
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it is no palimpsest-checkpoint manifest"),
        ('{"format": "other"}', "it is no palimpsest-checkpoint manifest"),
        ('{"format": "palimpsest-checkpoint", "version": 2, "x": NaN}', "its own hash"),
    ],
)
def test_what_is_no_manifest_is_refused(saved, text, what):
    where = saved / manifest_json.FILE
    where.unlink()
    if text is not None:
        where.write_text(text)
    with pytest.raises(CheckpointError, match=what):
        manifest_json.read(saved)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(1, "go on with the palimpsest that saved it, or start afresh"), (3, "update palimpsest")],
)
def test_another_version_says_what_to_do(saved, version, remedy):
    tamper(saved, lambda content: content.update(version=version))
    with pytest.raises(CheckpointError, match=f"it is of version {version} of the checkpoint format") as caught:
        manifest_json.read(saved)
    assert (caught.value.allowed, caught.value.remedy) == ("version 2", remedy)
    again = pickle.loads(pickle.dumps(caught.value))  # as it travels between ranks
    assert (str(again), again.remedy) == (str(caught.value), remedy)


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


EMBED = ("parameters", "embed_tokens.weight")
QKV = ("parameters", "layers.0.attention.qkv_proj.weight")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (put("files", 0, 0, "../../etc/passwd"), "is no file of this layout"),
        (put("files", 0, 0, "stage-09-data-0000-tensor-00.safetensors"), "is no file of this layout"),
        (put("files", 0, 1, -1), "-1"),
        (lambda c: c["files"].append(c["files"][0]), "a file is listed twice"),
        (lambda c: c["files"].pop(), "differ|more writers"),
        (put(*EMBED, "shape", [10**12, 6]), "padded_rows"),
        (put("parameters", "final_norm.weight", "shape", [10**12]), "partition"),
        (put("parameters", "final_norm.weight", "shape", [-6]), "shape"),
        (put("parameters", "final_norm.weight", "shape", [True]), "shape"),
        (put("parameters", "final_norm.weight", "dtype", "F16"), "dtype"),
        (put("parameters", "final_norm.weight", "role", "odd"), "role"),
        (put("parameters", "final_norm.weight", "partition", 0), "partition"),
        (put("parameters", "final_norm.weight", "partition", 1), "partition"),
        (put("parameters", "final_norm.weight", "offset", -3), "offset"),
        (put("parameters", "final_norm.weight", "stages", []), "stages"),
        (put("parameters", "final_norm.weight", "stages", [7]), "stages"),
        (put(*QKV, "dim", 2), "dim 2 of 2"),
        (put(*QKV, "blocks", [8, 4]), "blocks"),
        (put(*QKV, "blocks", [7, 5, 4]), "2 ranks"),
        (put(*EMBED, "dim", 1), "padded rows"),
        (put("topology", "data", 10**12), "ranks"),
        (put("topology", "tensor", 0), "tensor"),
        (put("moments", ["exp_avg", "exp_avg"]), "moment"),
        (put("moments", [f"moment_{number}" for number in range(30)]), "parameters of"),
        (put("step", "1"), "step"),
        (lambda c: c.pop("sections"), "sections"),
        (put("parameters", []), "parameters: "),
        (put("config", "text"), "config"),
    ],
)
def test_a_manifest_that_lies_is_refused_before_memory_is_taken(saved, change, what):
    tamper(saved, change)
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(saved)


def test_huge_parameters_in_huge_claimed_files_are_refused_by_the_real_sizes(saved):
    def lie(content):
        parameter = content["parameters"]["embed_positions.weight"]
        parameter.update(shape=[10**9, 10**3], partition=10**12)
        for line in content["files"]:
            line[1] = 10**15

    tamper(saved, lie)
    with pytest.raises(CheckpointError, match="the manifest says 1000000000000000"):
        read_weights(saved)


def test_a_partition_of_crumbs_costs_no_time(saved):
    def lie(content):
        content["topology"]["data"] = 10**6
        content["parameters"]["embed_positions.weight"].update(shape=[10**6], partition=1)
        for line in content["files"]:
            line[1] = 10**15

    tamper(saved, lie)
    with pytest.raises(CheckpointError, match="more writers than there are files"):
        open_checkpoint(saved)


@pytest.mark.parametrize("value", [{1: 2}, {"a": float("nan")}, {"a": [object()]}, {"a": {"b": b"bytes"}}])
def test_a_section_that_is_not_json_is_named(saved, value):
    manifest = manifest_json.read(saved)
    state = dataclasses.replace(manifest.state, sections={"loader": value})
    with pytest.raises(CheckpointError, match=r"section loader.*cannot go into a checkpoint") as caught:
        manifest_json.render(dataclasses.replace(manifest, state=state))
    assert caught.value.allowed.startswith("JSON")


def test_unusual_text_and_tuples_survive(saved):
    manifest: Manifest = manifest_json.read(saved)
    sections = {"a": {"text": 'é "quoted" \\ \n \ud800', "tuple": (1, 2.5e-300)}}
    state = dataclasses.replace(manifest.state, sections=sections)
    (saved / manifest_json.FILE).unlink()
    manifest_json.write(dataclasses.replace(manifest, state=state), saved)
    assert manifest_json.read(saved).state.sections == {"a": {**sections["a"], "tuple": [1, 2.5e-300]}}
