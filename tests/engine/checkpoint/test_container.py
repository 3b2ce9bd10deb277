"""The file of one writer: readable by the safetensors library alone, and refused where anything does not hold."""

import errno
import json
import struct

import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from engine.checkpoint import container
from engine.checkpoint.container import Container, Entry, file_digest
from engine.errors import CheckpointError

ENTRIES = [Entry("model.a", 5, 3, 1, 2), Entry("model.b", 0, 4, 0, 1), Entry("optim.exp_avg.a", 5, 3, 1, 2)]
DATA = np.arange(10, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    where = tmp_path / "stage-00-data-0000-tensor-01.safetensors"
    container.write(where, container.header_bytes(ENTRIES, DATA, {"stage": 0}), DATA)
    return where


def rewrite(path, change):
    """Changes the header of a file and puts it back in front of the data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_the_safetensors_library_reads_it(path):
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == {entry.key for entry in ENTRIES}
        assert file.get_tensor("model.b").tolist() == [3, 4, 5, 6]
        shards = json.loads(file.metadata()["shards"])
        assert shards["optim.exp_avg.a"][:4] == [5, 3, 1, 2]
        assert shards["optim.exp_avg.a"][4] == xxhash.xxh3_64_hexdigest(DATA[7:].tobytes())
        assert json.loads(file.metadata()["about"]) == {"stage": 0}


def test_it_is_read_back_as_written(path):
    file = Container(path)
    assert list(file.entries.values()) == ENTRIES
    assert file.values("model.b").tolist() == [3, 4, 5, 6]
    assert file.values("model.a").ctypes.data % 4 == 0
    assert file.damaged_entries() == []


def test_the_record_is_of_the_bytes_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "CHUNK_BYTES", 7)
    where = tmp_path / "file"
    record = container.write(where, container.header_bytes(ENTRIES, DATA, {}), DATA)
    raw = where.read_bytes()
    assert (record.num_bytes, record.xxh3) == (len(raw), xxhash.xxh3_64_hexdigest(raw))
    assert file_digest(where) == record.xxh3


def test_a_flipped_byte_is_traced_to_its_shard(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x10
    path.write_bytes(raw)
    assert Container(path).damaged_entries() == ["optim.exp_avg.a"]


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_file_cut_short_is_refused(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"tensor-01\.safetensors: .*(bytes|header)"):
        Container(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["model.b"].update(data_offsets=[12, 10**15]),
        lambda header: header["model.b"].update(data_offsets=[-8, 8]),
        lambda header: header["model.b"].update(shape=[5]),
        lambda header: header["model.b"].update(dtype="F64"),
        lambda header: header.pop("model.b"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].update(shards="[]"),
        lambda header: header["__metadata__"].update(format="other"),
        lambda header: header.update({"model.b": 7}),
    ],
)
def test_a_header_that_does_not_hold_is_refused(path, change):
    rewrite(path, change)
    with pytest.raises(CheckpointError, match="its header is not that of a file of shards") as caught:
        Container(path)
    assert "palimpsest checkpoint verify" in caught.value.remedy


def test_a_header_that_is_no_json_object_is_refused(path):
    for text, what in ((b"{nonsense", "is not JSON"), (b"[]", "is not a JSON object"), (b"[" * 5000, "is not JSON")):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(CheckpointError, match=what):
            Container(path)


def test_an_announced_header_longer_than_the_file_takes_no_memory(path):
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="a header of 1152921504606846976 bytes in a file of 10"):
        Container(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent: cannot be read"):
        Container(tmp_path / "absent")


@pytest.mark.parametrize(
    ("number", "what"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "cannot write")]
)
def test_a_refusing_disk_is_one_clear_error(tmp_path, monkeypatch, number, what):
    def refuse(handle):
        raise OSError(number, "refused")

    monkeypatch.setattr(container.os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=what) as caught:
        container.write(tmp_path / "file", container.header_bytes(ENTRIES, DATA, {}), DATA)
    assert caught.value.remedy


def test_an_unbuffered_write_that_takes_a_part_goes_on():
    taken = bytearray()

    def write(chunk):
        taken.extend(chunk[:3])
        return min(3, len(chunk))

    container._write_all(write, memoryview(b"0123456789"))
    assert taken == b"0123456789"
