"""A Hugging Face folder's weights: safetensors files as `save_pretrained` lays them out, written tensor by tensor.

The plan (which tensor is in which file, at which byte) follows from names, shapes and dtypes alone, by the rules of
`huggingface_hub` and `safetensors`, so the files are byte for byte those of these libraries. A file that is done is
noted with its hash; a conversion that was killed goes on behind the last such file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.interchange.sinks.journal import JOURNAL, Journal
from engine.checkpoint.interchange.sources.safetensors_folder import DTYPES, INDEX, SINGLE
from engine.parallel.sharding import Shape

_SLICE_BYTES = 16 << 20
"""Bytes that are made contiguous and written at a time."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HOLDERS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Planned:
    """One tensor of a file: its shape, its dtype, and the byte at which it begins."""

    shape: Shape
    dtype: torch.dtype
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its header and its tensors."""

    name: str
    header: bytes
    tensors: Mapping[str, Planned]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(planned.num_bytes for planned in self.tensors.values())


def plan_shards(tensors: Mapping[str, tuple[Shape, torch.dtype]], shard_bytes: int) -> list[Shard]:
    """Return the files for tensors in this order, of at most `shard_bytes` each unless one tensor is larger."""
    groups: list[list[str]] = []
    held = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        # A tensor beyond the limit gets a file of its own, and the one before goes on behind it, as theirs does.
        if size > shard_bytes:
            groups.insert(len(groups) - 1 if held else len(groups), [name])
            continue
        if not held or held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    names = [SINGLE] if len(groups) == 1 else [_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    return [_shard(name, {key: tensors[key] for key in group}) for name, group in zip(names, groups, strict=True)]


def _name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(name: str, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> Shard:
    # safetensors' own order: larger items first, so that all are aligned, then by name
    order = sorted(tensors, key=lambda key: (-tensors[key][1].itemsize, _rank(tensors[key][1]), key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    places = {}
    for key in order:
        shape, dtype = tensors[key]
        places[key] = Planned(shape, dtype, at)
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + places[key].num_bytes]}
        at += places[key].num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    # in the order of the plan, in which the index names them
    return Shard(name, struct.pack("<Q", len(text)) + text, {key: places[key] for key in tensors})


def _rank(dtype: torch.dtype) -> int:
    """Return the place of a dtype among those of its size, in safetensors' order."""
    return [torch.bfloat16, torch.float16, torch.float32].index(dtype)


class SafetensorsSink:
    """Writes planned shards into a folder; `close` ends it."""

    def __init__(self, folder: Path, shards: list[Shard], identity: str) -> None:
        """Begin, or go on where a conversion of the same `identity` (source, plan) was killed.

        Raises `OSError` where the folder cannot be written.
        """
        self._folder, self._shards = folder, shards
        self._journal = Journal(folder, identity)
        self._shard_of = {name: shard for shard in shards for name in shard.tensors}
        self._done = self._journal.done
        self._left = {shard.name: set(shard.tensors) for shard in shards if shard.name not in self._done}
        self.resumed = len(self._done)
        for path in folder.glob("*.safetensors"):
            if path.name not in self._done:
                path.unlink()

    def lacks(self, name: str) -> bool:
        """Return False for a tensor in a file that an earlier, unfinished conversion has written."""
        return self._shard_of[name].name not in self._done

    def write(self, name: str, values: torch.Tensor) -> None:
        """Write a tensor, some rows at a time; raises `OSError`."""
        shard = self._shard_of[name]
        planned = shard.tensors[name]
        assert tuple(values.shape) == planned.shape, f"{name}: {tuple(values.shape)}, planned {planned.shape}"
        if shard.name in self._done:
            return
        path = self._folder / shard.name
        if not path.exists():
            with path.open("xb") as file:
                file.write(shard.header)
                file.truncate(shard.num_bytes)
        with path.open("r+b", buffering=0) as file:
            file.seek(len(shard.header) + planned.start)
            for block in _slices(values, planned.dtype):
                content = block.reshape(-1).view(np.uint8).data
                while len(content):
                    content = content[file.write(content) or 0 :]
            left = self._left[shard.name]
            left.discard(name)
            if not left:
                os.fsync(file.fileno())
        if not left:
            self._journal.note_file(shard.name)

    def close(self) -> None:
        """Write the index where there are several files. Every tensor has been written."""
        assert len(self._done) == len(self._shards), f"not written: {sorted(self._left)}"
        (self._folder / JOURNAL).unlink(missing_ok=True)
        if len(self._shards) == 1:
            return
        total = sum(planned.num_bytes for shard in self._shards for planned in shard.tensors.values())
        index = {
            "metadata": {"total_size": total, "format": "pt"},
            "weight_map": {name: shard.name for shard in self._shards for name in shard.tensors},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _slices(values: torch.Tensor, dtype: torch.dtype) -> Iterator[np.ndarray]:
    """Yield a tensor's elements in the order of a file, some rows at a time, as integers of its dtype's size."""
    holder = _HOLDERS[dtype.itemsize]
    rows = max(1, _SLICE_BYTES // (4 * max(1, math.prod(values.shape[1:]))))
    for first in range(0, values.shape[0], rows):
        yield values[first : first + rows].to(dtype).contiguous().view(holder).numpy()
