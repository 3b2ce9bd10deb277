"""Copies of rows of a reservoir, for sources that will vanish: bounded files beside the checkpoints, named by hash.

A row keeps the name that it has in the reservoir (shard, document, span), so a view finds its tokens by that name where
the shard itself is gone, and order, blocks and fingerprint are the same with either. The files are a function of the
generation that is copied and of the bound. Files are never changed; checkpoints name them.

Layout: 8 bytes length of the header (little endian), the header as JSON, then `row_ids` (uint64, rising), `lengths`
(uint16), `sentence_counts` (uint16) and `sentences` (uint16 first tokens within the row) where the source has them, and
the tokens of all rows, all little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from engine.atomic import replacing
from engine.data.replay.files import NamedFile
from engine.data.replay.generation import Domain, Generation
from engine.data.replay.rows import INSIDE, SHARD_SHIFT
from engine.data.shards.index import Index, token_dtype
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import CheckpointError, DataError

FORMAT = "palimpsest pinned rows 1"
FILE_BYTES = 64 << 20
"""Bytes of tokens of a file, from which on the next one begins."""
_MOST_HEADER_BYTES = 1 << 28


@dataclass(frozen=True)
class PinnedRow:
    """One row: content hash of its shard, document and span in it (`rows.Rows.inside`), tokens, and the first tokens of
    its sentences (None where the source knows none)."""

    content_hash: str
    inside: int
    tokens: np.ndarray
    sentences: np.ndarray | None


class _File:
    """One file of pinned rows: everything but the tokens in memory, and these mapped."""

    def __init__(self, path: Path, named: NamedFile) -> None:
        content = _verified(path, named)
        try:
            length = struct.unpack("<Q", content[:8].tobytes())[0]
            if length > min(_MOST_HEADER_BYTES, named.num_bytes):
                raise ValueError(f"a header of {length} bytes")
            self.header: dict[str, Any] = json.loads(content[8 : 8 + length].tobytes())
            if self.header["format"] != FORMAT:
                raise ValueError(self.header["format"])
            self._fill(content, 8 + length)
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise _damaged(path, f"it is no file of pinned rows ({error!r})") from error

    def _fill(self, content: np.ndarray, at: int) -> None:
        num_rows, has_sentences = int(self.header["rows"]), bool(self.header["has_sentences"])

        def column(dtype: str, count: int) -> np.ndarray:
            nonlocal at
            first, at = at, at + count * np.dtype(dtype).itemsize
            if at > content.size:
                raise ValueError("it is cut off")
            return np.frombuffer(content[first:at].tobytes(), dtype)

        self.row_ids = column("<u8", num_rows)
        lengths = column("<u2", num_rows).astype(np.int64)
        counts = column("<u2", num_rows).astype(np.int64) if has_sentences else np.zeros(num_rows, np.int64)
        # rows (2, 3) long begin at tokens (0, 2), the end is 5
        self.starts = np.append(0, np.cumsum(lengths))
        self.sentence_starts = np.append(0, np.cumsum(counts))
        self.sentences = column("<u2", int(counts.sum())).astype(np.int64)
        dtype = np.dtype(token_dtype(int(self.header["vocab_size"]))).newbyteorder("<")
        self.tokens = content[at:].view(dtype)  # mapped: read when a row is asked for
        if self.tokens.size != self.starts[-1]:
            raise ValueError(f"{self.tokens.size} tokens of {self.starts[-1]}")

    def numbers(self, content_hash: str, inside: np.ndarray) -> np.ndarray:
        """Return the numbers of rows (n,) of a shard in this file, (n,) int64; -1 for one that is not here."""
        if content_hash not in self.shards:
            return np.full(inside.size, -1, np.int64)
        wanted = inside | np.uint64(self.shards[content_hash]) << SHARD_SHIFT
        at = np.minimum(np.searchsorted(self.row_ids, wanted), self.row_ids.size - 1)
        return np.where(self.row_ids[at] == wanted, at, -1)

    @cached_property
    def shards(self) -> dict[str, int]:
        return {content_hash: number for number, content_hash in enumerate(self.header["shards"])}


class PinnedRows:
    """The pinned rows that a checkpoint names."""

    def __init__(self, folder: Path, files: Sequence[NamedFile]) -> None:
        """Open and verify the files. Raises `CheckpointError` where one is missing or damaged."""
        self._files = [_File(folder / named.name, named) for named in files]
        assert self._files, "no file: there are no pinned rows"

    @property
    def index(self) -> Index:
        """Index without shards: the tokenizer that the rows were written with."""
        header = self._files[0].header
        vocabulary = header["vocabulary"]
        return Index(
            int(header["vocab_size"]),
            int(header["eos_id"]),
            str(header["tokenizer_hash"]),
            (),
            None if vocabulary is None else Vocabulary.from_json(vocabulary, int(header["vocab_size"])),
        )

    @property
    def has_sentences(self) -> bool:
        """True if the sentences of all rows are known."""
        return all(file.header["has_sentences"] for file in self._files)

    @property
    def splits_sentences(self) -> bool:
        """True if some row has more than one sentence."""
        return any(bool((np.diff(file.sentence_starts) > 1).any()) for file in self._files)

    @property
    def num_rows(self) -> int:
        return sum(file.row_ids.size for file in self._files)

    @property
    def documents(self) -> dict[str, np.ndarray]:
        """Documents of which rows are pinned, by the content hash of their shard, (n,) int64 each."""
        found: dict[str, list[np.ndarray]] = {}
        for file in self._files:
            for content_hash, number in file.shards.items():
                mine = file.row_ids[file.row_ids >> SHARD_SHIFT == number]
                found.setdefault(content_hash, []).append(((mine & INSIDE) >> np.uint64(16)).astype(np.int64))
        return {content_hash: np.unique(np.concatenate(parts)) for content_hash, parts in found.items()}

    def has(self, content_hash: str, inside: np.ndarray) -> np.ndarray:
        """Return True for the rows (n,) of a shard that are pinned, (n,) bool."""
        found = np.zeros(inside.size, bool)
        for file in self._files:
            found |= file.numbers(content_hash, inside) >= 0
        return found

    def read(self, content_hash: str, inside: np.ndarray) -> list[PinnedRow]:
        """Return rows of a shard, all of which are pinned."""
        found: list[PinnedRow | None] = [None] * inside.size
        for file in self._files:
            for place, number in enumerate(file.numbers(content_hash, inside).tolist()):
                if number >= 0:
                    tokens = file.tokens[file.starts[number] : file.starts[number + 1]]
                    bounds = file.sentence_starts[number : number + 2]
                    sentences = file.sentences[slice(*bounds.tolist())] if file.header["has_sentences"] else None
                    found[place] = PinnedRow(content_hash, int(inside[place]), tokens, sentences)
        rows = [row for row in found if row is not None]
        assert len(rows) == inside.size, "the view has left out the rows that are not pinned"
        return rows


def chosen(generation: Generation, domains: Sequence[str], max_bytes: int, item_bytes: int) -> Generation:
    """Return the rows of a generation that are to be pinned: of each of the `domains` (none: all) the first ones, of
    all of them the same share of its tokens, as far as `max_bytes` go."""
    names = [name for name in generation.domains if not domains or name in domains]
    total = sum(generation.domains[name].num_tokens for name in names) * item_bytes
    found = {}
    for name in names:
        domain = generation.domains[name]
        reach = np.cumsum(domain.lengths, dtype=np.int64) * item_bytes
        # in whole numbers: bytes of this domain x max_bytes / bytes of all
        budget = domain.num_tokens * item_bytes if total <= max_bytes else int(reach[-1]) * max_bytes // total
        count = int(np.searchsorted(reach, budget, side="right"))
        found[name] = Domain(domain.row_ids[:count], domain.lengths[:count])
    return replace(Generation.of(generation.shards, found, generation.span_tokens), pinned=generation.pinned)


def write_pinned(
    folder: Path, rows: Iterable[PinnedRow], index: Index, file_bytes: int = FILE_BYTES
) -> Iterator[NamedFile]:
    """Write rows into files of `file_bytes` of tokens each; yield each file when it is on the disk.

    `index` says which tokenizer they were written with. Raises `CheckpointError` where the file system refuses.
    """
    waiting: list[PinnedRow] = []
    num_bytes, item_bytes = 0, np.dtype(token_dtype(index.vocab_size)).itemsize
    for row in rows:
        waiting.append(row)
        num_bytes += row.tokens.size * item_bytes
        if num_bytes >= file_bytes:
            yield _write(folder, waiting, index)
            waiting, num_bytes = [], 0
    if waiting:
        yield _write(folder, waiting, index)


def _write(folder: Path, rows: list[PinnedRow], index: Index) -> NamedFile:
    table = {content_hash: n for n, content_hash in enumerate(sorted({row.content_hash for row in rows}))}
    row_ids = np.array([row.inside | table[row.content_hash] << int(SHARD_SHIFT) for row in rows], "<u8")
    order = np.argsort(row_ids)
    ordered = [rows[number] for number in order.tolist()]
    sentences = [row.sentences for row in ordered if row.sentences is not None]
    has_sentences = len(sentences) == len(rows)
    header = {
        "format": FORMAT,
        "rows": len(rows),
        "vocab_size": index.vocab_size,
        "eos_id": index.eos_id,
        "tokenizer_hash": index.tokenizer_hash,
        "vocabulary": None if index.vocabulary is None else index.vocabulary.to_json(),
        "has_sentences": has_sentences,
        "shards": list(table),
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    # the tokens begin at a multiple of 4 bytes from the start of the file: spaces are no part of the JSON
    parts = [row_ids[order].tobytes(), np.array([row.tokens.size for row in ordered], "<u2").tobytes()]
    if has_sentences:
        parts.append(np.array([item.size for item in sentences], "<u2").tobytes())
        parts.append(np.concatenate(sentences).astype("<u2").tobytes())
    text += b" " * (-(8 + len(text) + sum(map(len, parts))) % 4)
    dtype = np.dtype(token_dtype(index.vocab_size)).newbyteorder("<")
    content = b"".join(
        [struct.pack("<Q", len(text)), text, *parts, *(row.tokens.astype(dtype).tobytes() for row in ordered)]
    )
    digest = xxhash.xxh3_64_hexdigest(content)
    named = NamedFile(f"pinned-{digest}", len(content), digest)
    path = folder / named.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size == named.num_bytes:
            path.touch()  # in use again: who removes files that nobody names goes by their age, too
        else:
            with replacing(path) as file:
                file.write(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}",
            remedy="free some space, lower reservoir.pin.max_bytes, or mend the file system or its permissions",
        ) from error
    return named


def _verified(path: Path, named: NamedFile) -> np.ndarray:
    """Return a file's bytes, mapped, after their hash was compared. Raises `CheckpointError`."""
    try:
        if path.stat().st_size != named.num_bytes:
            raise _damaged(path, f"it has {path.stat().st_size:,} bytes, {named.num_bytes:,} were written")
        content = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    if xxhash.xxh3_64_hexdigest(content.data) != named.xxh3:
        raise _damaged(path, "its bytes are not those that were written (xxh3 differs)")
    return content


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}", "the file as the run wrote it", "restore it from a copy, or use an older checkpoint"
    )


def refuse_other_tokenizer(pinned: PinnedRows, index: Index, location: str) -> None:
    """Raise `DataError` where rows were pinned with another tokenizer than a data set was written with."""
    if pinned.index.tokenizer_hash != index.tokenizer_hash:
        raise DataError(
            f"{location} was written with tokenizer {index.tokenizer_hash}, the pinned rows of the reservoir with "
            f"{pinned.index.tokenizer_hash}",
            "one tokenizer for all data that is replayed",
            "prepare the data again with the run's tokenizer",
        )
