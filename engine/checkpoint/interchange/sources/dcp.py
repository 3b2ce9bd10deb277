"""A checkpoint of torch.distributed.checkpoint, whoever sharded it: its metadata says which file has which chunk.

`.metadata` is a bare pickle, each chunk a small file of `torch.save` within a larger one. Neither runs anything here
(`pickles`). Chunks that go through an extension of torch's storage (compression, say) are refused by name.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.geometry import Box, dims
from engine.checkpoint.interchange.sources.pickles import open_pickle, open_torch_file, stored_tensor, unusable
from engine.checkpoint.interchange.sources.stored import Extent, StoredBox, StoredSource, StoredTensor
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed, read_facts
from engine.checkpoint.manifest import WEIGHT
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError

METADATA = ".metadata"
RECORDS = (
    r"torch\.distributed\.checkpoint\.(metadata|filesystem|planner)\.\w+|torch\.serialization\._get_layout|torch\.strided"
    r"|pathlib(\._local)?\.\w*Path|megatron\.core\.[\w.]+"
)
"""Classes that the metadata is made of: inert stand-ins are built for them."""
_MOMENT = re.compile(
    r"(?:.+\.)?(?:optim\.(?!state\.)(?P<ours>[a-z_0-9]+)\.(?P<name>.+)"  # ours
    r"|state\.(?P<theirs>.+)\.(?P<moment>exp_avg|exp_avg_sq|momentum_buffer|step)"  # torch's get_state_dict
    r"|state\.(?P<first>exp_avg|exp_avg_sq|fp32_param)\.(?P<last>.+))"  # Megatron Core's
)


def open_dcp(folder: Location) -> Unnamed:
    """Open a checkpoint.

    Raises:
        CheckpointError: it is none, names files or bytes that are not there, or holds what may not be built.
    """
    metadata = open_pickle(folder / METADATA, RECORDS)
    try:
        tensors = _tensors(folder, metadata)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise unusable(
            folder / METADATA, f"it is not the metadata of torch's ({type(error).__name__}: {error})"
        ) from error
    states, steps = _by_state(tensors)
    step = _step(folder, steps)
    return Unnamed(str(folder), "a checkpoint of torch's DCP", states, step, read_facts(folder))


def _tensors(folder: Location, metadata: Any) -> dict[str, StoredTensor]:
    """Return all tensors by their keys."""
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, info in metadata.storage_data.items():
        offset = getattr(index, "offset", None)
        places[index.fqn, tuple(offset or ())] = info
    sizes: dict[str, int] = {}
    found = {}
    for name, one in metadata.state_dict_metadata.items():
        if not hasattr(one, "chunks"):
            continue  # bytes: a step as a number, a schedule
        shape = tuple(int(size) for size in one.size)
        boxes = []
        for chunk in one.chunks:
            start, size = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
            if math.prod(size) == 0:
                continue
            info = places.get((name, start)) or places[name, ()]
            find = functools.cache(functools.partial(_extents, folder, name, info, size, sizes))
            boxes.append(StoredBox(Box(start or (0,), dims(size)), find))
        _check_cover(folder, name, shape, boxes)
        found[name] = StoredTensor(shape, _dtype(one.properties), tuple(boxes))
    return found


def _check_cover(folder: Location, name: str, shape: tuple[int, ...], boxes: Sequence[StoredBox]) -> None:
    """Raise `CheckpointError` where the chunks of a tensor are not as many elements as it has, or lie outside."""
    inside = all(
        low >= 0 and low + size <= whole
        for one in boxes
        for low, size, whole in zip(one.box.start, one.box.size, dims(shape), strict=True)
    )
    if not inside or sum(one.box.numel for one in boxes) != math.prod(shape):
        raise unusable(folder / METADATA, f"the chunks of {name} do not make up its shape {shape}")


def _dtype(properties: Any) -> torch.dtype:
    # the record's state is (dtype, layout, requires_grad, memory format, pinned)
    found = properties.dtype if hasattr(properties, "dtype") else properties.arguments[0]
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{found!r} is no dtype")
    return found


def _extents(
    folder: Location, name: str, info: Any, size: tuple[int, ...], sizes: dict[str, int]
) -> tuple[Extent, ...]:
    """Return where the elements of one chunk are."""
    file = str(info.relative_path)
    if Path(file).name != file:
        raise unusable(folder / METADATA, f"it names the file {file!r}, outside of the folder")
    if getattr(info, "transform_descriptors", None):
        raise unusable(folder / file, f"{name} is stored through {', '.join(map(str, info.transform_descriptors))}")
    if not (folder / file).is_file():
        raise unusable(folder / file, f"it is not there, and {name} is in it")
    if file not in sizes:
        sizes[file] = (folder / file).stat().st_size
    start, length = int(info.offset), int(info.length)
    if not 0 <= start <= start + length <= sizes[file]:
        raise unusable(folder / file, f"{name} lies at the bytes {start} to {start + length} of {sizes[file]}")
    tensor = open_torch_file(folder / file, start=start, length=length)
    if not isinstance(tensor, torch.Tensor) or math.prod(tensor.shape) != math.prod(size):
        raise unusable(folder / file, f"{name} is no tensor of the shape {size} at byte {start}")
    (box,) = stored_tensor(folder / file, tensor, start).boxes
    return tuple(box.find())


def _by_state(tensors: dict[str, StoredTensor]) -> tuple[dict[str, Parts], list[StoredTensor]]:
    """Return weights and moments by the name of the weight, and the tensors that count steps."""
    states: dict[str, Parts] = {WEIGHT: {}}
    steps = []
    for key, tensor in tensors.items():
        match = _MOMENT.fullmatch(key)
        if match is None:
            states[WEIGHT][key] = [tensor]
            continue
        moment = match["ours"] or match["moment"] or match["first"]
        name = match["name"] or match["theirs"] or match["last"]
        if moment == "step":
            steps.append(tensor)
        else:
            states.setdefault(moment, {})[name] = [tensor]
    return states, steps


def _step(folder: Location, steps: Iterable[StoredTensor]) -> int | None:
    one = next(iter(steps), None)
    if one is None or math.prod(one.shape) != 1 or one.dtype != torch.float32:
        return None
    return int(StoredSource({"step": one}, str(folder)).read("step", 0, 1).item())
