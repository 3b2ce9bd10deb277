"""A checkpoint of Megatron-LM's GPT or BERT: the folder layout of its own saver, or `torch_dist` of Megatron Core.

Its own saver writes `iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt` per tensor and pipeline rank, with layers that
each pipeline rank counts from 0, and model chunks `model0`, `model1` where a rank has several. `torch_dist` is a
checkpoint of torch's DCP whose layers are stacked along a first dimension. Weights alone are read: the optimizer's
state is by numbers in the first and in flat buckets in the second. Follows megatron/training/checkpointing.py and
megatron/core/transformer/transformer_block.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.geometry import Box, dims
from engine.checkpoint.interchange.sources.dcp import METADATA, open_dcp
from engine.checkpoint.interchange.sources.deepspeed import RECORDS
from engine.checkpoint.interchange.sources.pickles import Record, open_torch_file, stored_tensor, unusable
from engine.checkpoint.interchange.sources.stored import StoredBox, StoredTensor, cut
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed
from engine.checkpoint.manifest import WEIGHT
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
"""File of `torch_dist` with the arguments."""
KIND = "a checkpoint of Megatron-LM's"
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.*)")


def open_megatron(folder_or_parent: Location) -> Unnamed:
    """Open a checkpoint: the folder of one iteration, or the folder above, whose `LATEST` names one.

    Raises:
        CheckpointError: it is none, it is not whole, or a file holds what may not be built.
    """
    folder = _tag(folder_or_parent)
    if (folder / METADATA).is_file():
        found, settings = open_dcp(folder), {}
        if (folder / COMMON).is_file():
            settings = _settings(open_torch_file(folder / COMMON, records=RECORDS))
        tensors: Parts = {}
        for name, parts in found.weights.items():
            tensors |= dict(_unstacked(name.removeprefix("model."), parts[0]))
        return Unnamed(found.origin, KIND, {WEIGHT: tensors}, None, found.facts, settings)
    files = _files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} holds no mp_rank_00/{_FILES[0]} and no {METADATA}", KIND, "name the folder that was saved into"
        )
    return _legacy(folder, files)


def _legacy(folder: Location, files: Mapping[tuple[int, int], Location]) -> Unnamed:
    """Return the weights of files by (pipeline rank, tensor rank)."""
    num_tensor = 1 + max(tensor for _, tensor in files)
    num_pipe = 1 + max(pipe for pipe, _ in files)
    missing = [
        pair for pipe in range(num_pipe) for tensor in range(num_tensor) if (pair := (pipe, tensor)) not in files
    ]
    if missing:
        raise unusable(folder, f"the file of pipeline rank {missing[0][0]} and tensor rank {missing[0][1]} is missing")
    contents = {rank: open_torch_file(path, records=RECORDS) for rank, path in files.items()}
    first = contents[0, 0]
    if not isinstance(first, dict) or float(first.get("checkpoint_version") or 0) < 2:
        raise unusable(files[0, 0], "its checkpoint_version is below 2: queries, keys and values are in another order")
    chunks = sorted(key for key in first if re.fullmatch(r"model\d*", str(key)))
    found: Parts = {}
    num_layers = 0
    # chunk v of pipeline rank p comes before chunk v of rank p + 1, and before all chunks v + 1
    for chunk in chunks:
        for pipe in range(num_pipe):
            highest = -1
            for tensor in range(num_tensor):
                for name, value in _flattened(contents[pipe, tensor].get(chunk) or {}):
                    match = _LAYER.fullmatch(name)
                    if match is not None:
                        highest = max(highest, int(match[2]))
                        name = f"{match[1]}{num_layers + int(match[2])}{match[3]}"
                    found.setdefault(name, []).append(stored_tensor(files[pipe, tensor], value))
            num_layers += highest + 1
    step = first.get("iteration")
    return Unnamed(str(folder), KIND, {WEIGHT: found}, None if step is None else int(step), {}, _settings(first))


def _flattened(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{before}{key}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            yield f"{before}{key}", value


def _unstacked(name: str, tensor: StoredTensor) -> Iterator[tuple[str, list[StoredTensor]]]:
    """Yield a tensor, or the layers' tensors of one that is stacked along a first dimension."""
    match = _STACKED.fullmatch(name)
    if match is None:
        yield name, [tensor]
        return
    for layer in range(tensor.shape[0]):
        boxes = []
        for part in tensor.boxes:
            if part.box.start[0] <= layer < part.box.start[0] + part.box.size[0]:
                size, start = part.box.size[1:], part.box.start[1:]
                numel = math.prod(size)
                first = (layer - part.box.start[0]) * numel
                find = functools.partial(_of_layer, part, first, numel, tensor.dtype.itemsize)
                boxes.append(StoredBox(Box(start or (0,), dims(size)), find))
        yield f"{match[1]}.{layer}.{match[2]}", [StoredTensor(tensor.shape[1:], tensor.dtype, tuple(boxes))]


def _of_layer(part: StoredBox, first: int, numel: int, item_bytes: int):
    return cut(part.find(), first, numel, item_bytes)


def _settings(content: Any) -> dict[str, Any]:
    args = content.get("args") if isinstance(content, dict) else None
    return {key: value for key, value in vars(args).items() if key != "arguments"} if isinstance(args, Record) else {}


def _files(folder: Location) -> dict[tuple[int, int], Location]:
    """Return the files of weights by (pipeline rank, tensor rank)."""
    found: dict[tuple[int, int], Location] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _RANK.fullmatch(path.name)
        for name in _FILES if match else ():
            if match and (path / name).is_file():
                found[int(match[2] or 0), int(match[1])] = path / name
    return found


def _tag(folder_or_parent: Location) -> Location:
    latest = folder_or_parent / LATEST
    if not latest.is_file():
        return folder_or_parent
    word = latest.read_text(encoding="utf-8").strip()
    name = f"iter_{int(word):07d}" if word.isdigit() else word
    # text from a file: it may not lead out of the folder
    if not name or Path(name).name != name:
        raise unusable(folder_or_parent, f"its file {LATEST} names {word!r}")
    return folder_or_parent / name
