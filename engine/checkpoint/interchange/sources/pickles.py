"""Pickles of others, opened without running anything that they hold, and with no tensor read into memory.

Files of `torch.save` go through torch's restricted unpickler (`weights_only`), which builds tensors, plain containers
and what is on a list of plain records; on the device "meta" a tensor is its shape, its dtype and the byte at which its
elements begin. A bare pickle goes through an unpickler that builds plain containers and inert stand-ins for the
records that a pattern names. Any other name in a file is an error that tells it, and nothing of it runs.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch

from engine.checkpoint.interchange.sources.stored import Extent, StoredTensor, whole
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError

MOST_BYTES = 1 << 30
"""Bytes of the longest bare pickle that is read: metadata, no weights."""


class Record:
    """Inert stand-in for an object of a class that is not needed: what it was made of, and its attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.arguments = state


def open_torch_file(
    path: Location, allowed: Sequence[str] = (), records: str = "(?!)", start: int = 0, length: int | None = None
) -> Any:
    """Return the content of a file of `torch.save`, with tensors on the device "meta".

    `allowed` are dotted names of plain classes that may be built; for names that the pattern `records` matches
    stand-ins are. `start` and `length` say which bytes of the file it is.

    Raises:
        CheckpointError: it cannot be read, or names something else.
    """
    try:
        with path.open("rb") as file, FileView(file, start, length) as raw:
            view: Any = raw  # torch asks for IO[bytes], of which it uses these methods
            known = [_class_of(name) for name in allowed]
            found = torch.serialization.get_unsafe_globals_in_checkpoint(view) if _is_zip(view) else []
            known += [(Record, name) for name in found if re.fullmatch(records, name)]
            view.seek(0)
            with torch.serialization.safe_globals(known):
                return torch.load(view, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named.group(1)}" if named else "it is no plain pickle"
        raise unusable(path, f"{what}, which is not on the list of what may be built") from error
    except Exception as error:  # torch's readers raise anything on bytes that are none, AttributeError among them
        raise unusable(path, f"it cannot be read ({_first_line(error)})") from error


def _class_of(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_zip(view: Any) -> bool:
    begins = view.read(4)
    view.seek(0)
    return begins == b"PK\x03\x04"


def stored_tensor(path: Location, tensor: torch.Tensor, start: int = 0) -> StoredTensor:
    """Return the place of a tensor of `open_torch_file` in its file.

    Raises:
        CheckpointError: the file is of an older format, or the tensor is not laid out row after row.
    """
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or not tensor.is_contiguous():
        what = "a tensor that is not contiguous" if offset is not None else "a file as torch before 1.6 wrote them"
        raise unusable(path, f"it is or holds {what}")
    at = start + offset + tensor.storage_offset() * tensor.dtype.itemsize
    return whole(tuple(tensor.shape), tensor.dtype, [Extent(path, at, tensor.numel())])


def open_pickle(path: Location, records: str) -> Any:
    """Return the content of a bare pickle: plain containers, dtypes, and stand-ins for what `records` matches.

    Raises:
        CheckpointError: it cannot be read, or names something else.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise unusable(path, f"it is longer than {MOST_BYTES} bytes")
        with path.open("rb") as file:
            return _Unpickler(file.read(), path, records).load()
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler raises anything on bytes that are none
        raise unusable(path, f"it cannot be read ({type(error).__name__}: {_first_line(error)})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Location, records: str) -> None:
        super().__init__(io.BytesIO(content))
        self._path, self._records = path, records
        self._made: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ("torch.Size", "builtins.tuple"):
            return tuple
        if full == "collections.OrderedDict":
            return dict
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if not re.fullmatch(self._records, full):
            raise unusable(self._path, f"it names {full}, which is not on the list of what may be built")
        # a class of its own for each name and each file: a pickle may set attributes of what it finds
        return self._made.setdefault(full, type(name, (Record,), {}))


class FileView(io.RawIOBase):
    """Some bytes of a file as a file."""

    def __init__(self, file: BinaryIO, start: int = 0, length: int | None = None) -> None:
        super().__init__()
        self._file, self._start, self._at = file, start, 0
        self._length = file.seek(0, io.SEEK_END) - start if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        content = self._file.read(size)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def unusable(path: Location | str, what: str) -> CheckpointError:
    """Return the error for a file of others that is not opened or does not hold what it should."""
    return CheckpointError(
        f"{path} cannot be used: {what}",
        "whole files that hold tensors, plain containers and the records of their format",
        "copy it again; if it holds more, write it anew with its own library where you trust it",
    )
