"""Flat arrays of a folder of token shards, verified while they are opened: mapped where they lie plain, else unpacked.

Invariant: no byte of a file is handed out, nor given to a decompressor, before its size and its whole hash have been
compared with the index (a truncated memory map would end the process with a bus error). What is unpacked is compared
again: the array's own hash must hold, too. A file that has changed since its hash was compared is compared again.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from engine.data.shards.damage import DamagedShard
from engine.data.shards.index import PREPARE_AGAIN, ArrayFile
from engine.data.shards.open_shards import too_many_files
from engine.errors import DataError

_BLOCK_BYTES = 1 << 18
"""Small enough to stay in a core's cache between being read and hashed."""
_RIGHTS = "check the file's rights"


Identity = tuple[int, int, int, int]
"""Device, inode, size and time of the last change of a file (ns): equal as long as nobody wrote to it."""


def open_array(
    folder: Path, array: ArrayFile, verified: Identity | None = None, private: bool = False
) -> tuple[np.ndarray, Identity]:
    """Return the array (length,) in its little-endian dtype, read-only, and the identity of its file, now verified.

    A `private` array can be written to; the file stays as it is, and only the pages that are written to take memory.
    `verified` is the identity that the file had when this process compared its hash before, or None. Raises
    `DamagedShard` where the file is missing, of another size, or holds other bytes than were written, `DataError`
    where it cannot be read.
    """
    path = folder / array.file
    found = _check_size(path, array)
    dtype = np.dtype(array.dtype).newbyteorder("<")
    if array.compressed is not None:
        plain = _unpacked(path, array)
        return np.frombuffer(bytearray(plain) if private else plain, dtype), found
    if found != verified:
        _check_hash(path, array)
    if array.length == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype), found
    return _mapped(path, array, dtype, mmap.ACCESS_COPY if private else mmap.ACCESS_READ), found


def hash_file(path: Path, offset: int = 0, num_bytes: int | None = None) -> str:
    """Return the XXH3-128 in hex of a file's bytes, or of `num_bytes` from `offset` on. Raises `OSError`."""
    digest = xxhash.xxh3_128()
    block, left = memoryview(bytearray(_BLOCK_BYTES)), num_bytes
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while read := file.readinto(block if left is None else block[:left]):
            digest.update(block[:read])
            left = None if left is None else left - read
    return digest.hexdigest()


def _mapped(path: Path, array: ArrayFile, dtype: np.dtype, access: int) -> np.ndarray:
    """Return a plain array over a map of the file: numpy's memmap objects take longer to make, and to slice."""
    # a map may begin at a multiple of the page size alone: begin before the array, and skip the rest
    before = array.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb", buffering=0) as file:
            found = mmap.mmap(file.fileno(), before + array.bytes, access=access, offset=array.offset - before)
    except OSError as error:
        raise _unreadable(path, error) from error
    return np.frombuffer(found, dtype, array.length, before)


def _check_size(path: Path, array: ArrayFile) -> Identity:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DamagedShard(
            f"shard {path} is missing", f"a file of {array.stored_bytes:,} bytes", PREPARE_AGAIN
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    found = status.st_size - array.offset
    if found < array.stored_bytes or (found > array.stored_bytes and not array.is_stretch):
        what = "truncated" if found < array.stored_bytes else "longer than it was written"
        how = array.dtype if array.compressed is None else f"{array.dtype}, as {array.compressed.method}"
        raise DamagedShard(
            f"shard {path} is {what}: {max(found, 0):,} bytes",
            f"{array.stored_bytes:,} bytes ({array.length:,} x {how})",
            PREPARE_AGAIN,
        )
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_hash(path: Path, array: ArrayFile) -> None:
    try:
        found = hash_file(path, array.offset, array.bytes)
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != array.xxh3:
        raise _damaged(path, found, array.xxh3)


def _unpacked(path: Path, array: ArrayFile) -> bytes:
    """Return the array's bytes from a compressed file, both verified."""
    packed = array.compressed
    assert packed is not None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if (found := xxhash.xxh3_128_hexdigest(content)) != packed.xxh3:
        raise _damaged(path, found, packed.xxh3)
    try:
        # zstandard needs the size for frames that do not name their own
        plain = zstandard.ZstdDecompressor().decompress(content, max_output_size=array.bytes)
    except zstandard.ZstdError as error:
        raise DamagedShard(
            f"shard {path} does not unpack: {error}", f"{array.bytes:,} bytes of zstd", PREPARE_AGAIN
        ) from error
    if (found := xxhash.xxh3_128_hexdigest(plain)) != array.xxh3:
        raise _damaged(path, f"{found} unpacked", array.xxh3)
    return plain


def _unreadable(path: Path, error: OSError) -> DataError:
    return too_many_files(error) or DataError(f"shard {path} cannot be read: {error.strerror}", remedy=_RIGHTS)


def _damaged(path: Path, found: str, expected: str) -> DamagedShard:
    return DamagedShard(f"shard {path} is damaged: its bytes have xxh3 {found}", f"xxh3 {expected}", PREPARE_AGAIN)
