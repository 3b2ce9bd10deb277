"""Files are those of `huggingface_hub`, byte for byte, and are read back by name and rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from engine.checkpoint.interchange.sinks.safetensors_shards import JOURNAL, SafetensorsSink, plan_shards
from engine.checkpoint.interchange.sources import SafetensorsFolder
from engine.errors import ConfigError

TENSORS = {
    "b.weight": torch.randn(9, 4),
    "ä.weight": torch.randn(3, 5).bfloat16(),
    "large": torch.randn(100, 7),
    "a.weight": torch.randn(9, 4).half(),
    "c.bias": torch.randn(11),
    "z.last": torch.randn(30, 2),
}


def write(folder: Path, shard_bytes: int, names=None, identity: str = "same") -> SafetensorsSink:
    planned = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    folder.mkdir(exist_ok=True)
    sink = SafetensorsSink(folder, plan_shards(planned, shard_bytes), identity)
    for name in TENSORS if names is None else names:
        if sink.lacks(name):
            sink.write(name, TENSORS[name])
    return sink


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 200, 150, 1])
def test_files_are_those_of_the_library(tmp_path, shard_bytes):
    write(tmp_path / "ours", shard_bytes).close()
    (tmp_path / "theirs").mkdir()
    named = {"filename_pattern": "model{suffix}.safetensors", "metadata": {"format": "pt"}}
    save_torch_state_dict(TENSORS, tmp_path / "theirs", max_shard_size=shard_bytes, **named)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_any_rows_and_columns_come_back(tmp_path, shard_bytes):
    write(tmp_path, shard_bytes).close()
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert folder.dtype(name) == tensor.dtype
        assert torch.equal(folder.read(name, 1, 3), tensor[1:3])
        if tensor.dim() == 2:
            assert torch.equal(folder.read(name, 1, 2, dim=1), tensor[:, 1:2])
    read = sum(2 * tensor[0].nbytes + (tensor[:, 0].nbytes if tensor.dim() == 2 else 0) for tensor in TENSORS.values())
    assert folder.bytes_read == read


def test_a_killed_conversion_goes_on_behind_its_last_whole_file(tmp_path):
    write(tmp_path / "whole", 200).close()
    names = list(TENSORS)
    write(tmp_path / "cut", 200, names[:4])
    before = {path: path.stat().st_ino for path in (tmp_path / "cut").glob("*.safetensors")}
    sink = write(tmp_path / "cut", 200)
    assert 0 < sink.resumed < len(before)
    assert sum(path.stat().st_ino == number for path, number in before.items()) >= sink.resumed
    sink.close()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["identity", "bytes", "journal"])
def test_what_cannot_be_trusted_is_written_anew(tmp_path, damage):
    write(tmp_path / "whole", 200).close()
    write(tmp_path / "cut", 200, list(TENSORS)[:4])
    done = json.loads((tmp_path / "cut" / JOURNAL).read_text())["files"]
    if damage == "bytes":
        path = tmp_path / "cut" / next(iter(done))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    if damage == "journal":
        (tmp_path / "cut" / JOURNAL).write_text("[")
    sink = write(tmp_path / "cut", 200, identity="other" if damage == "identity" else "same")
    assert sink.resumed == (len(done) - 1 if damage == "bytes" else 0)
    sink.close()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda names: names.pop("b.weight"),
            r"holds b.weight, which model.safetensors.index.json does not name there",
        ),
        (lambda names: names.update(extra=names["large"]), r"names extra, which no file holds"),
        (lambda names: names.update(extra="../elsewhere"), r"outside of the folder"),
        (lambda names: names.update(extra="absent.safetensors"), r"absent.safetensors: No such file"),
    ],
)
def test_an_index_that_does_not_fit_is_told_by_name(tmp_path, change, message):
    write(tmp_path, 200).close()
    index = index_of(tmp_path)
    change(index["weight_map"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_dtype_that_fp32_does_not_hold_is_refused_when_it_is_read(tmp_path):
    save_file({"w": torch.ones(3, dtype=torch.float64), "v": torch.ones(2)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(folder.read("v", 0, 2), torch.ones(2))
    with pytest.raises(ConfigError, match="w is of the dtype F64, not of F32 or BF16 or F16"):
        folder.read("w", 0, 1)
    assert load_file(tmp_path / "model.safetensors").keys() == {"v", "w"}
