"""One writer's file: a safetensors file of flat fp32 shards whose header says what each is, so it stands alone.

Layout: 8 bytes header length (little endian), JSON header, then the shards one after the other. The header's
`__metadata__` lists per shard its start, length, tensor rank and size and the xxh3 of its bytes. Written here and
not by the safetensors library so that it is hashed while it is written; any safetensors reader opens it. Reading
maps a local file, asks for byte ranges of a remote one, and checks every offset first, so nothing a header says can
reach outside the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from engine.checkpoint.storage import Location, Remote
from engine.errors import CheckpointError

CHUNK_BYTES = 8 << 20
"""Bytes written and hashed at a time."""
MAX_HEADER_BYTES = 100 << 20
"""Bytes of the longest header that is read: the limit of the safetensors library."""
FORMAT = "palimpsest-shards 1"
# fp32; a shard in another dtype is no valid entry
ITEM_BYTES = 4
LONGEST_FRAME = 1 << 12
"""Bytes of a header without its entries: its length, the braces, format, writer and step."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `length` count elements of the flattened local part of one tensor rank."""

    key: str
    start: int
    length: int
    tensor_rank: int
    tensor_size: int

    def coordinates(self) -> list[int]:
        """Return the numbers that a header has of an entry, in their order."""
        return [self.start, self.length, self.tensor_rank, self.tensor_size]


@dataclass(frozen=True)
class FileRecord:
    """Size of a file, and the xxh3 (64 bit, hex) of all its bytes, as the manifest has them."""

    name: str
    num_bytes: int
    xxh3: str


def header_bytes(entries: list[Entry], data: np.ndarray, about: dict[str, Any]) -> bytes:
    """Return the file's first bytes for `data`, a flat fp32 array that holds the entries one after the other."""
    digests, at = [], 0
    for entry in entries:
        digests.append(digest(data[at : at + entry.length]))
        at += entry.length
    assert at == data.size, "the buffer holds exactly the entries"
    return _header(entries, digests, about)


def _header(entries: list[Entry], digests: list[str], about: dict[str, Any]) -> bytes:
    """Return the first bytes of a file of entries with these hashes; as long for any hashes."""
    header: dict[str, Any] = {}
    shards: dict[str, list[int | str]] = {}
    at = 0
    for entry, found in zip(entries, digests, strict=True):
        shards[entry.key] = [*entry.coordinates(), found]
        offsets = [at * ITEM_BYTES, (at + entry.length) * ITEM_BYTES]
        header[entry.key] = {"dtype": "F32", "shape": [entry.length], "data_offsets": offsets}
        at += entry.length
    # safetensors allows text alone as metadata: nested JSON.
    header["__metadata__"] = {"format": FORMAT, "about": compact(about), "shards": compact(shards)}
    text = compact(header).encode()
    # to a multiple of 8 bytes, as safetensors does: the data begin aligned (-13 % 8 = 3 spaces)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def longest_entry(key: str) -> int:
    """Bytes that an entry takes in a header at the most: its name twice, once as JSON within JSON, and nine numbers."""
    return 2 * len(json.dumps(json.dumps(key))) + 9 * 21 + 128


def write(
    path: Path, header: bytes, data: np.ndarray, check_cancelled: Callable[[], None] = lambda: None
) -> FileRecord:
    """Write header and data, hashed on the way, and return when they are on the disk and read back alike.

    `check_cancelled` is called before each chunk; what it raises ends the write.

    Raises:
        CheckpointError: the file system is full or refuses, or gives back something else.
    """
    hasher = xxhash.xxh3_64()
    # x: a file of this name can only be another writer's. Unbuffered: the chunks are large enough.
    with disk_errors(path), path.open("xb", buffering=0) as file:
        for block in (memoryview(header), _bytes_of(data)):
            for at in range(0, len(block), CHUNK_BYTES):
                check_cancelled()
                chunk = block[at : at + CHUNK_BYTES]
                hasher.update(chunk)
                _write_all(file.write, chunk)
        # before the commit renames the folder: a name must not outlive a crash that its data do not
        os.fsync(file.fileno())
    # The hash is of memory as it was written, so it tells of what the file system has made of it.
    with disk_errors(path):
        if file_digest(path) != hasher.hexdigest():
            raise damaged(path, "it reads otherwise than it was written")
    return FileRecord(path.name, len(header) + data.nbytes, hasher.hexdigest())


def write_stream(
    path: Path, entries: list[Entry], about: dict[str, Any], contents: Iterable[Iterable[np.ndarray]]
) -> FileRecord:
    """Write the entries one after the other, each from blocks of flat fp32, and return as `write` does.

    No more than a block is in memory. The header, which holds hashes of what follows it, is written again at the end.

    Raises:
        CheckpointError: the file system is full or refuses, or what making the blocks raises.
    """
    digests = []
    with disk_errors(path), path.open("xb", buffering=0) as file:
        header = _header(entries, ["0" * len(xxhash.xxh3_64().hexdigest())] * len(entries), about)
        _write_all(file.write, memoryview(header))
        for entry, blocks in zip(entries, contents, strict=True):
            hasher, length = xxhash.xxh3_64(), 0
            for block in blocks:
                content = _bytes_of(block)
                hasher.update(content)
                _write_all(file.write, content)
                length += block.size
            assert length == entry.length, f"{entry.key}: {length} elements"
            digests.append(hasher.hexdigest())
        end = file.tell()
        file.seek(0)
        found = _header(entries, digests, about)
        assert len(found) == len(header), "hashes have one length"
        _write_all(file.write, memoryview(found))
        os.fsync(file.fileno())
    # read back from the disk, hashes of the entries included
    if Container(path).damaged_entries():
        raise damaged(path, "it reads otherwise than it was written")
    with disk_errors(path):
        return FileRecord(path.name, end, file_digest(path))


def _write_all(write: Callable[[memoryview], int | None], chunk: memoryview) -> None:
    while len(chunk):  # an unbuffered write may take a part only
        chunk = chunk[write(chunk) or 0 :]


@contextlib.contextmanager
def disk_errors(path: Location) -> Iterator[None]:
    """Turn an `OSError` while writing at `path` into a `CheckpointError` that says what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left for {path}: {problem.strerror}",
                remedy="free some space or lower checkpoint.keep_last, then train again; earlier checkpoints are whole",
            ) from problem
        raise CheckpointError(
            f"cannot write {path}: {problem.strerror or problem}", remedy="mend the file system or its permissions"
        ) from problem


class Container:
    """A file of shards: its entries by key, and their elements; a local file is mapped and read where it is touched."""

    def __init__(self, path: Location) -> None:
        """Read the header. Raises `CheckpointError` where the file is absent, cut short or its header is wrong."""
        self.path = path
        header, self._data_start, self.num_bytes = _read_header(path)
        self._offsets: dict[str, int] = {}
        self.entries: dict[str, Entry] = {}
        self.digests: dict[str, str] = {}
        try:
            self._parse(header)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as problem:
            raise damaged(path, f"its header is not that of a file of shards ({problem!r})") from problem
        self._map: np.ndarray | None = None

    def values(self, key: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return `count` elements of an entry from `first` on (all by default): flat fp32; a write stays in memory.

        Raises:
            CheckpointError: the file cannot be read: a server is gone, or it was removed or cut meanwhile.
        """
        length = self.entries[key].length
        count = length - first if count is None else count
        assert 0 <= first <= first + count <= length, f"{key}: elements {first} to {first + count} of {length}"
        start = self._data_start + self._offsets[key] + first * ITEM_BYTES
        stop = start + count * ITEM_BYTES
        try:
            if isinstance(self.path, Remote):
                # bytearray: an array over bytes could not be written to, as torch wants
                return np.frombuffer(bytearray(self.path.read_range(start, stop)), dtype=np.float32)
            if self._map is None:
                # mode c: private pages. torch wants memory that could be written to, and the file must stay as it is.
                self._map = np.memmap(self.path, dtype=np.uint8, mode="c", offset=0, shape=(self.num_bytes,))
        except (OSError, ValueError) as problem:  # numpy raises the latter where the file is too short
            raise damaged(self.path, f"cannot be read ({getattr(problem, 'strerror', problem)})") from problem
        return self._map[start:stop].view(np.float32)

    def release(self) -> None:
        """Unmap the file once nothing refers to its elements: mapped pages that were read count as memory."""
        self._map = None

    def damaged_entries(self) -> list[str]:
        """Return keys of the entries whose bytes are not those that were written. Reads the whole file."""
        found = []
        for key in self.entries:
            if digest(self.values(key)) != self.digests[key]:
                found.append(key)
            self.release()  # no more than one entry is mapped and read at a time
        return found

    def _parse(self, header: dict[str, Any]) -> None:
        about = header.pop("__metadata__")
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        shards = json.loads(about["shards"])
        if shards.keys() != header.keys():
            raise ValueError("its list of shards is not its list of tensors")
        at = 0
        for key, tensor in header.items():
            *coordinates, self.digests[key] = shards[key]
            entry = Entry(key, *coordinates)
            begin, end = tensor["data_offsets"]
            # `begin != at`: entries follow each other without gap or overlap, and the last ends with the file (below).
            if tensor["dtype"] != "F32" or tensor["shape"] != [entry.length] or begin != at:
                raise ValueError(f"{key}: dtype, shape or offsets")
            if entry.length <= 0 or end - begin != entry.length * ITEM_BYTES:
                raise ValueError(f"{key}: {entry.length} elements in {end - begin} bytes")
            self.entries[key], self._offsets[key], at = entry, begin, end
        if self._data_start + at != self.num_bytes:
            raise ValueError(f"{self._data_start + at} bytes announced, {self.num_bytes} there")


def _read_header(path: Location) -> tuple[dict[str, Any], int, int]:
    """Return (header, position of the data, bytes of the file)."""
    try:
        num_bytes = plain_size(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise damaged(path, f"{num_bytes} bytes are too few for a header")
            (length,) = struct.unpack("<Q", prefix)
            # before reading: the length is the file's claim, and `read` would take that much memory
            if length > min(MAX_HEADER_BYTES, num_bytes - 8):
                raise damaged(path, f"a header of {length} bytes in a file of {num_bytes}")
            header = json.loads(file.read(length))
    except OSError as problem:
        raise damaged(path, f"cannot be read ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise damaged(path, "its header is not JSON") from problem
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    return header, 8 + length, num_bytes


def plain_size(path: Location) -> int:
    """Return the bytes of a plain file.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is a link (it may lead out of the checkpoint), or no plain file (a pipe would block).
    """
    if isinstance(path, Remote):
        return path.stat().st_size
    # lstat, not stat: a link is to be seen, not followed
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise damaged(path, "it is a link or no plain file")
    return found.st_size


def damaged(path: Location, what: str) -> CheckpointError:
    """Return the error for a file of a checkpoint that cannot be trusted."""
    return CheckpointError(
        f"{path}: {what}",
        remedy=f"`palimpsest checkpoint verify {path.parent}` names all damage; use an older checkpoint",
    )


def file_digest(path: Location) -> str:
    """xxh3 (64 bit, hex) of a whole file, read in chunks; raises `OSError`."""
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def digest(values: np.ndarray) -> str:
    """xxh3 (64 bit, hex) of an array's bytes."""
    return xxhash.xxh3_64(_bytes_of(values)).hexdigest()


def _bytes_of(values: np.ndarray) -> memoryview:
    return values.view(np.uint8).data


def compact(value: Any) -> str:
    """Return a value as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
