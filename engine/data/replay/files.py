"""A reservoir on the disk: one base file, and files of what has entered since, in order; each is named by its hash.

Every file holds a whole reservoir: that of all entries, or that of the new ones alone. The state is a function of the
set of rows, so loading is merging, and what the new ones have displaced need not be written: a save writes bytes in
proportion to what has changed. A compacted reservoir is one file, whose bytes depend on its rows alone. Files are never
changed, so several checkpoints share them; which ones are in use is the business of the checkpoints that name them.

Layout: 8 bytes length of the header (little endian), the header as JSON, then for each domain `keys` (float64),
`row_ids` (uint64) and `lengths` (uint16), all little-endian. No source shard is needed to read it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from engine.atomic import replacing
from engine.data.replay.entries import Entries
from engine.data.replay.generation import Generation
from engine.data.replay.reservoir import Reservoir, Settings
from engine.data.replay.rows import used_shards
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.errors import CheckpointError

FORMAT = "palimpsest reservoir 1"
_COLUMNS = (("keys", "<f8"), ("row_ids", "<u8"), ("lengths", "<u2"))
_MOST_HEADER_BYTES = 1 << 28


@dataclass(frozen=True)
class NamedFile:
    """A file as a checkpoint names it: size, and the xxh3 (64 bit, hex) of all its bytes."""

    name: str
    num_bytes: int
    xxh3: str

    def to_json(self) -> list[Any]:
        return [self.name, self.num_bytes, self.xxh3]

    @classmethod
    def from_json(cls, item: Sequence[Any]) -> NamedFile:
        name, num_bytes, xxh3 = item
        return cls(str(name), int(num_bytes), str(xxh3))


@dataclass(frozen=True)
class NamedGeneration:
    """A generation as a checkpoint names it: a compacted file, and the settings with which it was frozen."""

    file: NamedFile
    settings: Settings

    def to_json(self) -> dict[str, Any]:
        # capacity and quota as they were: the run file may change them while the generation is replayed
        fixed = self.settings.fixed
        shares = None if fixed is None else dict(fixed)
        return {"file": self.file.name, "rows": self.settings.capacity, "quota": self.settings.quota, "shares": shares}

    @classmethod
    def from_json(cls, item: Mapping[str, Any], named: Mapping[str, NamedFile], settings: Settings) -> NamedGeneration:
        """Return what a checkpoint says, its files by name; `settings` are the run's."""
        frozen = replace(settings, capacity=item["rows"], quota=item["quota"], fixed=item["shares"])
        return cls(named[item["file"]], frozen)

    def load(self, folder: Path) -> Generation:
        """Return the generation.

        It has the rows of documents that were deleted since, whose place the view over it keeps: no other row moves.

        Raises:
            CheckpointError: the file is missing or damaged, or its rows or keys were made with another seed or span.
        """
        return read(folder / self.file.name, self.file, self.settings).freeze()


def write(folder: Path, reservoir: Reservoir, only_fresh: bool) -> NamedFile | None:
    """Write a reservoir, or what no file has of it yet (None where that is nothing); return when it is on the disk.

    Call `reservoir.mark_written` once it stands, on every rank. A file that is there already is left as it is.

    Raises:
        CheckpointError: the file system refuses.
    """
    reservoir.settle()
    table, entries = _selected(reservoir, only_fresh)
    if only_fresh and not any(found.size for found in entries.values()):
        return None
    blocks = list(_blocks(reservoir, table, entries))
    digest, num_bytes = xxhash.xxh3_64(), 0
    for block in blocks:
        digest.update(block)
        num_bytes += len(block)
    found = NamedFile(f"reservoir-{digest.hexdigest()}", num_bytes, digest.hexdigest())
    path = folder / found.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size == num_bytes:
            path.touch()  # in use again: who removes files that nobody names goes by their age, too
        else:
            with replacing(path) as file:
                for block in blocks:
                    file.write(block)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}",
            remedy="free some space, or mend the file system or its permissions; earlier checkpoints are whole",
        ) from error
    return found


def load(
    folder: Path, files: Iterable[NamedFile], settings: Settings, tombstones: Tombstones = NO_TOMBSTONES
) -> Reservoir:
    """Return the reservoir of a base file and those that follow it, without the rows of deleted documents.

    The capacity and the quotas are those of `settings`.

    Raises:
        CheckpointError: a file is missing or damaged, or its rows or keys were made with another seed or span.
    """
    found = Reservoir(settings, tombstones)
    for named in files:
        found.merge(read(folder / named.name, named, settings))
    found.mark_written()
    return found


def read(path: Path, named: NamedFile, settings: Settings) -> Reservoir:
    """Return the reservoir that one file holds. Raises `CheckpointError` as `load`."""
    try:
        with path.open("rb") as file:
            return _read(file, path, named, settings)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header is not that of a reservoir ({error!r})") from error


def _selected(reservoir: Reservoir, only_fresh: bool) -> tuple[tuple[str, ...], dict[str, Entries]]:
    """Return the entries to write by domain, sorted, and a table of their shards alone."""
    entries = {name: reservoir.entries[name] for name in sorted(reservoir.entries)}
    if only_fresh:
        entries = {name: found.at(found.is_fresh) for name, found in entries.items()}
    table, columns = used_shards(reservoir.shards, [found.row_ids for found in entries.values()])
    moved = zip(entries.items(), columns, strict=True)
    return table, {name: found.with_row_ids(row_ids) for (name, found), row_ids in moved}


def _blocks(reservoir: Reservoir, table: tuple[str, ...], entries: dict[str, Entries]) -> Iterable[memoryview]:
    settings = reservoir.settings
    header = {
        "format": FORMAT,
        "seed": settings.seed,
        "span_tokens": settings.span_tokens,
        "sizes": reservoir.sizes,
        "shards": table,
        "domains": [[name, found.size] for name, found in entries.items()],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for found in entries.values():
        for column, (_, dtype) in zip((found.keys, found.row_ids, found.lengths), _COLUMNS, strict=True):
            yield np.ascontiguousarray(column, dtype).view(np.uint8).data


def _read(file: BinaryIO, path: Path, named: NamedFile, settings: Settings) -> Reservoir:
    digest, prefix = xxhash.xxh3_64(), file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MOST_HEADER_BYTES
    if length > min(_MOST_HEADER_BYTES, named.num_bytes):
        raise _damaged(path, "it is truncated, or no reservoir")
    text = file.read(length)
    digest.update(prefix + text)
    header = json.loads(text)
    if header["format"] != FORMAT:
        raise ValueError(header["format"])
    counts = [(str(name), int(size)) for name, size in header["domains"]]
    expected = 8 + length + sum(size * sum(int(dtype[-1]) for _, dtype in _COLUMNS) for _, size in counts)
    if expected != named.num_bytes or path.stat().st_size != expected:  # before any memory is taken
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, {named.num_bytes:,} were written")
    entries = {}
    for name, size in counts:
        columns = []
        for _, dtype in _COLUMNS:
            column = np.empty(size, dtype)
            file.readinto(column.view(np.uint8).data)  # type: ignore[attr-defined]
            digest.update(column.view(np.uint8).data)
            columns.append(column.astype(column.dtype.newbyteorder("="), copy=False))
        entries[name] = Entries(*columns)
    if digest.hexdigest() != named.xxh3:
        raise _damaged(path, "its bytes are not those that were written (xxh3 differs)")
    _refuse_other_keys(path, header, settings)
    found = Reservoir(settings)
    found.shards, found.entries = tuple(header["shards"]), entries
    found.sizes = {str(name): dict(sizes) for name, sizes in header["sizes"].items()}
    return found


def _refuse_other_keys(path: Path, header: dict[str, Any], settings: Settings) -> None:
    """Raise `CheckpointError` where rows are cut, or keys drawn, in another way than this run does it."""
    for key, now in (("seed", settings.seed), ("span_tokens", settings.span_tokens)):
        if header[key] != now:
            raise CheckpointError(
                f"{path} is of a reservoir with {key} = {header[key]}, this run has {now}",
                f"{key} = {header[key]}, as when the reservoir was begun",
                "restore it, or start a new run in another folder",
            )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}",
        "the file as the run wrote it",
        "`palimpsest checkpoint verify` names all damage; restore the file from a copy, or use an older checkpoint",
    )
