"""A folder of safetensors files, in one piece or in shards with an index, read by name and by rows.

Read here and not by the safetensors library, so that a read takes the bytes that it asks for and no mapped pages stay
behind, so that URLs work alike, and so that each inconsistency of headers and index is told by name.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.checkpoint.container import MAX_HEADER_BYTES
from engine.checkpoint.interchange.sources.source import listed
from engine.checkpoint.storage import Location, Remote
from engine.errors import ConfigError, PalimpsestError
from engine.parallel.sharding import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights, all of which fp32 holds exactly."""
_HOLDERS: dict[torch.dtype, Any] = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16}
"""Integers of the same size: numpy has no bf16."""


class _Place(NamedTuple):
    """Bytes of one tensor in a file."""

    file: Location
    dtype: str
    shape: Shape
    start: int


class SafetensorsFolder:
    """The tensors of a folder of theirs, checked against headers, sizes and index before any of them is read."""

    def __init__(self, folder: Location) -> None:
        """Read the headers.

        Raises:
            ConfigError: a file is missing, cut short or damaged, index and files name other tensors, or the weights are
                pickles.
        """
        self.folder, self.bytes_read = folder, 0
        names, index = _files(folder)
        self._places: dict[str, _Place] = {}
        for name in names:
            held = _header(folder / name)
            if twice := sorted(held.keys() & self._places.keys()):
                raise unreadable(folder, f"{listed(twice)} is in two files")
            if index is not None and (odd := sorted(key for key in held if index.get(key) != name)):
                raise unreadable(folder, f"{name} holds {listed(odd)}, which {INDEX} does not name there")
            self._places |= held
        if index is not None and (absent := sorted(index.keys() - self._places.keys())):
            raise unreadable(folder, f"{INDEX} names {listed(absent)}, which no file holds")

    @property
    def origin(self) -> str:
        return str(self.folder)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: place.shape for name, place in self._places.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_num_bytes(place) for place in self._places.values() if place.dtype in DTYPES)

    def dtype(self, name: str) -> torch.dtype:
        place = self._places[name]
        if place.dtype not in DTYPES:
            raise unreadable(self.folder, f"{name} is of the dtype {place.dtype}, not of {' or '.join(DTYPES)}")
        return DTYPES[place.dtype]

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        place, dtype = self._places[name], self.dtype(name)
        row = math.prod(place.shape[1:])
        if dim == 0:
            flat = self._values(place, first * row, end * row, dtype)
            found = flat.view(dtype).view(end - first, *place.shape[1:])
        else:
            assert dim == 1 < len(place.shape)
            found = self._columns(place, first, end, dtype)
        self.bytes_read += found.nbytes
        return found

    def _values(self, place: _Place, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Return elements [first, end) of a tensor as integers of its size."""
        start, stop = place.start + first * dtype.itemsize, place.start + end * dtype.itemsize
        try:
            if isinstance(place.file, Remote):
                # bytearray: an array over bytes could not be written to, as torch wants
                found = np.frombuffer(bytearray(place.file.read_range(start, stop)), _HOLDERS[dtype])
            else:
                found = np.fromfile(place.file, _HOLDERS[dtype], end - first, offset=start)
        except OSError as error:
            raise unreadable(place.file, str(error.strerror or error)) from error
        if found.size != end - first:
            raise unreadable(place.file, f"it ends before byte {stop}")
        return torch.from_numpy(found)

    def _columns(self, place: _Place, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the columns [first, end) of a matrix. A remote file is asked for all rows."""
        rows, columns = place.shape
        if isinstance(place.file, Remote) or end - first == columns:
            whole = self._values(place, 0, rows * columns, dtype).view(dtype).view(rows, columns)
            return whole if end - first == columns else whole[:, first:end].clone()
        # Mapped for this read alone: its pages would count as memory of this process as long as they are mapped.
        mapped = np.memmap(place.file, _HOLDERS[dtype], "r", place.start, (rows, columns))
        return torch.from_numpy(np.ascontiguousarray(mapped[:, first:end])).view(dtype)


def unreadable(folder: Location | str, reason: str) -> ConfigError:
    """Return the error for a folder that is no whole model of theirs."""
    return ConfigError(
        f"{folder} cannot be read as a Hugging Face model: {reason}",
        "a folder with config.json and whole safetensors files",
        "name a folder that `palimpsest convert` or save_pretrained wrote, or copy it again",
    )


def _num_bytes(place: _Place) -> int:
    return math.prod(place.shape) * DTYPES[place.dtype].itemsize


def _files(folder: Location) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of a folder's files of weights, and the file of each tensor where there is an index."""
    if (folder / SINGLE).is_file():
        return [SINGLE], None
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin")) if isinstance(folder, Path) else []
        if pickles:
            raise ConfigError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which may run code and is never opened",
                "safetensors",
                "write it anew with save_pretrained where you trust it",
            )
        raise unreadable(folder, f"there is no file named {SINGLE} or {INDEX}")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(file) for name, file in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(folder, f"{INDEX} is damaged ({type(error).__name__})") from error
    # names from a file: none may lead out of the folder
    if odd := sorted(name for name in set(found.values()) if Path(name).name != name):
        raise unreadable(folder, f"{INDEX} names {listed(odd)}, outside of the folder")
    return sorted(set(found.values())), found


def _header(path: Location) -> dict[str, _Place]:
    """Return the tensors of one file by name."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            # before reading: the length is the file's claim, and `read` would take that much memory
            if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - 8):
                raise unreadable(path, "it is no whole safetensors file: its header does not fit in it")
            content = json.loads(file.read(length))
        return _places(path, content, 8 + length, num_bytes)
    except PalimpsestError:
        raise
    except OSError as error:
        raise unreadable(path.parent, f"{path.name}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(path, f"its header is not that of a safetensors file ({error!r})") from error


def _places(path: Location, content: dict[str, Any], data_start: int, num_bytes: int) -> dict[str, _Place]:
    found, spans = {}, []
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        place = _Place(path, str(entry["dtype"]), shape, data_start + begin)
        if place.dtype in DTYPES and end - begin != _num_bytes(place):
            raise ValueError(f"{name}: {end - begin} bytes for the shape {shape} of {place.dtype}")
        found[name] = place
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        # tensors follow one another without gap or overlap, and the last one ends with the file
        if begin != at or end < begin:
            raise ValueError(f"tensors overlap or leave a gap at byte {begin}")
        at = end
    if data_start + at != num_bytes:
        raise ValueError(f"{data_start + at} bytes announced, {num_bytes} there")
    return found
